"""`Experiment`: arms to compare with one another and the scales to compare them at, read from one YAML file."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..baselines import ARMS, BudgetKind
from ..dims import ModelDims
from ..errors import RunError
from ..io.numbers import is_finite_number, is_whole_number
from ..io.record import Record
from ..io.serialization import Json, describe_alternatives, read_yaml, set_keys
from ..operators import OPERATORS
from ..schedule import GrowthSchedule
from ..training.arguments import LARGEST_SEED
from ..training.config import RunConfig

_SCHEDULE_KEYS = ("plan", "order", "control", "schedule", "chain")
_RUN_KEY = "run."
_SEED_ARGUMENTS = {"seed", "data_seed", "growth_seed"}
_LONGEST_NAME = 200  # bytes; file systems allow 255, and names of files next to the directory are longer


@dataclass(frozen=True)
class ArmConfig(Record, error=RunError):
    """One arm: a schedule, given by exactly one of the first five keys, and the arm's own settings.

    Args:
        plan: rank of one of the planner's answers: a number from 1, `best` or `worst`.
        order: order of growth such as `l-f-h`; the planner's answer with this order.
        control: name of a control arm in `baselines.ARMS`, built from the planner's best answer.
        schedule: schedule in place, or the path of its file; its tokens are shares of the budget.
        chain: names or numbers of the structures to grow through, the initial one first; one, for a model that does
            not grow.
        about: description of the arm in a few words.
        initial: name of the structure to begin with, or its numbers, `48,128,3,3`.
        target: name or numbers of the structure to end with, or a list for the planner to choose from; the initial
            structure, for a model that does not grow.
        operators: dimensions that the planner grows in stages of their own; with `order`, the dimensions in it.
        planner: further arguments of `SlopPlanner`, such as `objective` or `mode`.
        space: further arguments of `ConfigSpace`, such as `hidden_multiple`.
        shares: relative tokens of each stage, the initial model's first; or `utility`. Default: the paper's shares.
            A control arm takes the shares of the plan that it is built from.
        budgets: multiples of the scale's budget; each is a run with a complete learning-rate schedule.
        training: training arguments that the arm changes, such as `learning_rate` or `growth_init`, but not seeds.
        seeds: seeds that replace the scale's.

    Raises:
        RunError: unless exactly one of the first five keys is given, and for unknown names or numbers out of range.
    """

    plan: int | str | None = None
    order: str | None = None
    control: str | None = None
    schedule: GrowthSchedule | str | None = None
    chain: tuple[str, ...] | None = None
    about: str = ""
    initial: str = "initial"
    target: str | tuple[str, ...] = "target"
    operators: tuple[str, ...] = ("layer", "ffn", "hidden")
    planner: dict[str, Json] = field(default_factory=dict)
    space: dict[str, Json] = field(default_factory=dict)
    shares: tuple[float, ...] | Literal["utility"] | None = None
    budgets: tuple[float, ...] = (1.0,)
    training: dict[str, Json] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        present = [key for key in _SCHEDULE_KEYS if getattr(self, key) is not None]
        if len(present) != 1:
            raise RunError(f"an arm needs one of {', '.join(_SCHEDULE_KEYS)}, got {', '.join(present) or 'none'}")
        if self.control is not None and self.control not in ARMS:
            raise RunError(f"unknown control arm {self.control!r}{describe_alternatives(str(self.control), ARMS)}")
        if self.plan not in (None, "best", "worst") and not is_whole_number(self.plan, least=1):
            raise RunError(f"plan must be a rank from 1, 'best' or 'worst', got {self.plan!r}")
        letters = {operator.letter for operator in OPERATORS.values()}
        if self.order is not None and not set(self.order.split("-")) <= letters:
            raise RunError(f"order must be letters of {', '.join(sorted(letters))} such as l-f-h, got {self.order!r}")
        if self.chain == ():
            raise RunError("chain must name one structure or more, got an empty list")
        if not self.target:
            raise RunError("target must name one structure or more, got an empty list")
        _check_budgets(self.budgets)
        shares = self.shares if isinstance(self.shares, tuple) else (1.0,)
        if not any(shares) or not all(is_finite_number(share, least=0) for share in shares):
            raise RunError(f"shares must be 0 or more, and not all of them 0, got {list(shares)}")
        if self.seeds is not None:
            check_seeds(self.seeds)
        _refuse_seed_arguments(self.training)


@dataclass(frozen=True)
class ScaleConfig(Record, error=RunError):
    """The size of an experiment.

    Args:
        run: config that all runs share (model, data, training, evaluation), in place or as the path of a run's file;
            its schedule is ignored. With `model.pretrained` all runs begin with that model, and seeds differ in the
            order of the data and in new entries.
        structures: structures by name, `hidden,ffn,layers,heads[,kv_heads[,head_dim]]`.
        flops: training FLOPs of each run; give these or `tokens`.
        tokens: training tokens of each run; give these or `flops`.
        seeds: seeds; each arm is run once per seed.
        arms: names of the arms to run at this scale; empty for all.
        budgets: multiples by arm, in place of the arm's own.
        model: fields of the model that the scale changes for all arms, such as `model_type`.
        training: training arguments that the scale changes for all arms.
        flops_per_second: speed of one core or device at this scale, for the hours in a dry run; None if unknown.

    Raises:
        RunError: unless there is exactly one budget and at least one seed.
    """

    run: str | dict[str, Json]
    structures: dict[str, str]
    flops: float | None = None
    tokens: float | None = None
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] = ()
    budgets: dict[str, tuple[float, ...]] = field(default_factory=dict)
    model: dict[str, Json] = field(default_factory=dict)
    training: dict[str, Json] = field(default_factory=dict)
    flops_per_second: float | None = None

    def __post_init__(self) -> None:
        speed = self.flops_per_second
        if speed is not None and not (is_finite_number(speed) and speed > 0):
            raise RunError(f"flops_per_second must be positive and finite, got {speed!r}")
        if (self.flops is None) == (self.tokens is None):
            raise RunError("a scale needs either flops or tokens, the budget of each of its runs")
        if not is_finite_number(self.budget) or self.budget <= 0:
            raise RunError(f"a budget must be positive and finite, got {self.equal} {self.budget:g}")
        check_seeds(self.seeds)
        for arm, budgets in self.budgets.items():
            try:
                _check_budgets(budgets)
            except RunError as caught:
                raise RunError(f"budgets.{arm}: {caught}") from None
        _refuse_seed_arguments(self.training)

    @property
    def equal(self) -> BudgetKind:
        """Unit of the budget that all runs share."""
        return "tokens" if self.flops is None else "flops"

    @property
    def budget(self) -> float:
        """Budget of each run, in that unit."""
        return float(self.flops or self.tokens or 0)


@dataclass(frozen=True)
class ExperimentConfig(Record, error=RunError):
    """The content of an experiment's file.

    Args:
        title: title of tables and pages.
        arms: arms by name; figures and tables keep their order.
        scales: scales by name.
        about: the question, and where it comes from.
        reference: arm whose final loss the others should reach; default, the first `from_scratch` arm.
        printed: numbers printed in the paper, by arm and column, to show next to the measured ones.

    Raises:
        RunError: if an arm named elsewhere does not exist, or an arm's name cannot name a directory.
    """

    title: str
    arms: dict[str, ArmConfig]
    scales: dict[str, ScaleConfig]
    about: str = ""
    reference: str | None = None
    printed: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.arms or not self.scales:
            raise RunError(f"an experiment needs arms and scales; {'scales' if self.arms else 'arms'} has none")
        in_scales = [arm for scale in self.scales.values() for arm in (*scale.arms, *scale.budgets)]
        for name in (self.reference, *self.printed, *in_scales):
            if name is not None and name not in self.arms:
                hint = describe_alternatives(name, self.arms, list_all=False)
                raise RunError(f"there is no arm {name!r}; the arms are {', '.join(self.arms)}{hint}")
        for name in self.arms:
            is_file_name = Path(name).name == name and name.isprintable() and len(name.encode()) <= _LONGEST_NAME
            if not name or not is_file_name or name.startswith("."):
                raise RunError(f"{name!r} cannot name an arm, because the directory of its runs has the same name")


@dataclass(frozen=True)
class Experiment:
    """An experiment at one of its scales.

    Args:
        name: name of its file, without the suffix.
        scale: name of the scale.
        title, about, printed: as in `ExperimentConfig`.
        arms: arms to run at this scale, by name.
        sizes: the scale.
        run: config that all runs share.
        reference: arm whose final loss the others should reach; None without one.
    """

    name: str
    scale: str
    title: str
    about: str
    arms: dict[str, ArmConfig]
    sizes: ScaleConfig
    run: RunConfig
    reference: str | None = None
    printed: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def from_yaml(
        cls, path: str | Path, scale: str | None = None, overrides: Mapping[str, Json] | None = None
    ) -> Experiment:
        """Read an experiment.

        Args:
            path: path of the YAML file; files that it names are relative to it.
            scale: name of the scale; may be left out if there is only one.
            overrides: values by dotted key, such as `{"scales.nano.flops": 1e12, "arms.slop.seeds": [0]}`; keys that
                begin with `run.` change the config that all runs share, `{"run.data.source": "texts/"}`.

        Raises:
            RunError: if the file is malformed, naming the file and the key.
        """
        path, overrides = Path(path), overrides or {}
        in_run = {key.removeprefix(_RUN_KEY): value for key, value in overrides.items() if key.startswith(_RUN_KEY)}
        in_file = {key: value for key, value in overrides.items() if not key.startswith(_RUN_KEY)}
        content = read_yaml(path, error=RunError) or {}
        if not isinstance(content, dict):
            raise RunError(f"{path}: expected a mapping with the keys title, arms and scales")
        set_keys(content, in_file, where=str(path), error=RunError)
        config = ExperimentConfig.from_plain(content, where=str(path))
        if scale is None and len(config.scales) == 1:
            scale = next(iter(config.scales))
        if scale not in config.scales:
            instead = f", not {scale!r}" if scale else ""
            hint = describe_alternatives(str(scale or ""), config.scales, list_all=False)
            raise RunError(f"{path}: choose a scale of {', '.join(config.scales)}{instead}{hint}")
        sizes = config.scales[scale]
        arms = {
            name: _resolve_schedule(arm, path, sizes.budgets.get(name, arm.budgets))
            for name, arm in config.arms.items()
            if not sizes.arms or name in sizes.arms
        }
        from_scratch = (name for name, arm in arms.items() if arm.control == "from_scratch")
        reference = config.reference or next(from_scratch, None)
        return cls(
            name=path.stem,
            scale=scale,
            title=config.title,
            about=config.about,
            arms=arms,
            sizes=sizes,
            run=_read_run(sizes, path, in_run),
            reference=reference if reference in arms else None,
            printed=config.printed,
        )

    def get_structure(self, name: str) -> ModelDims:
        """Return a structure of the scale by its name, or read its numbers; a `RunError` for unknown names."""
        text = self.sizes.structures.get(name, name)
        if "," not in text:
            known = ", ".join(self.sizes.structures) or "none"
            hint = describe_alternatives(name, self.sizes.structures, list_all=False)
            raise RunError(f"{self.name}: scale {self.scale} has no structure {name!r} (known: {known}){hint}")
        return ModelDims.parse(text)

    def structure(self, name: str) -> ModelDims:
        """Return `get_structure`, under its earlier name."""
        warnings.warn("Experiment.structure is now Experiment.get_structure", DeprecationWarning, stacklevel=2)
        return self.get_structure(name)


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse anything but one or more different seeds that a run can have."""
    is_right = all(is_whole_number(seed, least=0) and seed <= LARGEST_SEED for seed in seeds)
    if not seeds or not is_right or len(set(seeds)) < len(seeds):
        raise RunError(f"seeds must be one or more different whole numbers, 0 to {LARGEST_SEED}, got {list(seeds)}")


def _check_budgets(budgets: Sequence[float]) -> None:
    is_right = all(is_finite_number(budget) and budget > 0 for budget in budgets)
    if not budgets or not is_right or len(set(budgets)) < len(budgets):
        raise RunError(f"budgets must be different positive multiples, got {list(budgets)}")


def _refuse_seed_arguments(training: Mapping[str, Json]) -> None:
    if seeds := sorted(_SEED_ARGUMENTS & set(training)):
        raise RunError(f"training sets {', '.join(seeds)}, which follow from the seeds: give `seeds` instead")


def _resolve_schedule(arm: ArmConfig, path: Path, budgets: tuple[float, ...]) -> ArmConfig:
    """Return an arm with the scale's budgets, and the path of its schedule relative to the experiment's file."""
    schedule = str(path.parent / arm.schedule) if isinstance(arm.schedule, str) else arm.schedule
    return dataclasses.replace(arm, budgets=budgets, schedule=schedule)


def _read_run(sizes: ScaleConfig, path: Path, overrides: Mapping[str, Json]) -> RunConfig:
    """Return the config that all runs share, with the scale's changes and then the overrides."""
    changes = {f"model.{key}": value for key, value in sizes.model.items()}
    changes |= {f"training.{key}": value for key, value in sizes.training.items()} | dict(overrides)
    if isinstance(sizes.run, str):
        return RunConfig.from_yaml(path.parent / sizes.run, changes)
    return RunConfig.from_content(copy.deepcopy(sizes.run), changes, where=f"{path}: run", folder=path.parent)
