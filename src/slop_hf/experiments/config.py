"""`ExperimentConfig`: arms that are to be compared, at a scale, as one YAML file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..baselines import ARMS
from ..dims import ModelDims
from ..errors import RunError
from ..io.serialization import parse, read_yaml, set_keys
from ..operators import OPERATORS
from ..schedule import GrowthSchedule
from ..training import RunConfig

#: What all arms of a comparison spend alike: training FLOPs, or tokens.
Equal = Literal["flops", "tokens"]
_WAYS = ("plan", "order", "control", "schedule")
_OF_RUN = "run."
_SEEDS = {"seed", "data_seed", "growth_seed"}


@dataclass(frozen=True)
class ArmConfig:
    """One arm: a schedule, told in one of four ways, and what is changed for it.

    Args:
        plan: the planner's answer of that rank: a number from 1, `best` or `worst`.
        order: the planner's answer that grows in this order, such as `l-f-h`.
        control: a control arm to the planner's best answer, a name in `baselines.ARMS`.
        schedule: a schedule in place, or the path of its file; its tokens are shares of the budget.
        about: what to tell of the arm, in a few words.
        initial: the name of the structure that it begins with, or what is spelled out, `48,128,3,3`.
        target: the same for the end; a planner may choose among several. The initial structure, for a model that is
            not grown.
        operators: dimensions that the planner grows in stages of their own; those of `order` where that is given.
        planner: more arguments of `SlopPlanner`, such as `objective` or `mode`.
        space: more arguments of `ConfigSpace`, such as `hidden_multiple`.
        shares: of the tokens, for each stage, the initial model's first; or `utility`. Default: the paper's. Those of
            a control arm are of the plan that it is a control to.
        budgets: multiples of the scale's budget that it is run at, each a run of its own with a whole
            learning-rate schedule.
        training: training arguments that it changes, such as `learning_rate` or `growth_init`; not the seeds.
        seeds: in place of the scale's.

    Raises:
        RunError: where there is not exactly one way, an unknown name, or a number that means nothing.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    plan: int | str | None = None
    order: str | None = None
    control: str | None = None
    schedule: GrowthSchedule | str | None = None
    about: str = ""
    initial: str = "initial"
    target: str | tuple[str, ...] = "target"
    operators: tuple[str, ...] = ("layer", "ffn", "hidden")
    planner: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    shares: tuple[float, ...] | Literal["utility"] | None = None
    budgets: tuple[float, ...] = (1.0,)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = [way for way in _WAYS if getattr(self, way) is not None]
        if len(given) != 1:
            raise RunError(f"an arm needs one of {', '.join(_WAYS)}, got {', '.join(given) or 'none'}")
        if self.control is not None and self.control not in ARMS:
            raise RunError(f"unknown control arm {self.control!r}; known: {', '.join(ARMS)}")
        ranks = isinstance(self.plan, int) and not isinstance(self.plan, bool) and self.plan >= 1
        if self.plan is not None and not ranks and self.plan not in ("best", "worst"):
            raise RunError(f"plan must be a rank from 1, 'best' or 'worst', got {self.plan!r}")
        letters = {operator.letter for operator in OPERATORS.values()}
        if self.order is not None and not set(self.order.split("-")) <= letters:
            raise RunError(f"order must be letters of {', '.join(sorted(letters))} such as l-f-h, got {self.order!r}")
        if not self.budgets or min(self.budgets) <= 0 or len(set(self.budgets)) < len(self.budgets):
            raise RunError(f"budgets must be different positive multiples, got {list(self.budgets)}")
        if isinstance(self.shares, tuple) and (min(self.shares, default=0) < 0 or not sum(self.shares) > 0):
            raise RunError(f"shares must be 0 or more, and not all of them 0, got {list(self.shares)}")
        if seeds := sorted(_SEEDS & set(self.training)):
            raise RunError(f"training names {', '.join(seeds)}, which follow from an arm's seeds: give `seeds`")


@dataclass(frozen=True)
class ScaleConfig:
    """How large an experiment is.

    Args:
        run: what all runs have in common (model, data, training, evaluation), in place or the path of a run's file,
            whose schedule does not count.
        structures: by name, `hidden,ffn,layers,heads[,kv_heads[,head_dim]]`.
        flops: training FLOPs of each run; or
        tokens: training tokens of each run.
        seeds: each arm is run once with each.
        arms: those that are run at this scale; empty, all.
        budgets: by arm, multiples in place of the arm's own.
        model: fields of the model that all arms change of the run's, such as `model_type`.
        training: training arguments that all arms change of the run's.

    Raises:
        RunError: where there is not exactly one budget, or no seed.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    run: str | dict[str, Any]
    structures: dict[str, str]
    flops: float | None = None
    tokens: float | None = None
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] = ()
    budgets: dict[str, tuple[float, ...]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.flops is None) == (self.tokens is None):
            raise RunError("a scale needs either flops or tokens, which all its runs spend alike")
        if not (self.flops or self.tokens or 0) > 0:
            raise RunError(f"a budget must be positive, got {self.budget:g}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RunError(f"seeds must be one or more different numbers, got {list(self.seeds)}")

    @property
    def equal(self) -> Equal:
        """What all runs spend alike."""
        return "tokens" if self.flops is None else "flops"

    @property
    def budget(self) -> float:
        """How much of it."""
        return float(self.flops or self.tokens or 0)


@dataclass(frozen=True)
class ExperimentConfig:
    """Arms that are compared with one another at a scale.

    Args:
        title: a headline.
        arms: by name; figures and tables keep the order.
        scales: by name.
        about: what is asked, and where it comes from.
        reference: the arm whose final loss the others are to reach; default, the first `from_scratch` one.
        printed: what the paper prints of an arm, by arm and column, to be set beside what is measured.

    Raises:
        RunError: for a reference or an arm of a scale that is none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    title: str
    arms: dict[str, ArmConfig]
    scales: dict[str, ScaleConfig]
    about: str = ""
    reference: str | None = None
    printed: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        of_scales = [arm for scale in self.scales.values() for arm in (*scale.arms, *scale.budgets)]
        named = [self.reference, *self.printed, *of_scales]
        for name in named:
            if name is not None and name not in self.arms:
                raise RunError(f"there is no arm {name!r}; the arms are {', '.join(self.arms)}")
        for name in self.arms:
            if not name or Path(name).name != name or name.startswith("."):
                raise RunError(f"{name!r} cannot name an arm: its runs' directory is called so")


@dataclass(frozen=True)
class Experiment:
    """An experiment at one of its scales.

    Args:
        name: of its file.
        scale: the scale's name.
        title, about, reference, printed: as in `ExperimentConfig`; the reference is None where there is none.
        arms: by name.
        sizes: the scale.
        run: what all runs have in common.
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
        cls, path: str | Path, scale: str | None = None, overrides: Mapping[str, Any] | None = None
    ) -> Experiment:
        """Read an experiment.

        Args:
            path: of its file; files that it names are looked for beside it.
            scale: which; may be left out where there is one only.
            overrides: values by dotted key, such as `{"scales.nano.flops": 1e12, "arms.slop.seeds": [0]}`; keys that
                begin with `run.` are of what all runs have in common, `{"run.data.source": "texts/"}`.

        Raises:
            RunError: naming the file and the key at fault.
        """
        path, overrides = Path(path), overrides or {}
        of_run = {key.removeprefix(_OF_RUN): value for key, value in overrides.items() if key.startswith(_OF_RUN)}
        of_all = {key: value for key, value in overrides.items() if not key.startswith(_OF_RUN)}
        content = read_yaml(path, error=RunError) or {}
        if not isinstance(content, dict):
            raise RunError(f"{path}: expected a mapping with the keys title, arms and scales")
        set_keys(content, of_all, where=str(path), error=RunError)
        config = parse(ExperimentConfig, content, where=str(path), error=RunError)
        if scale is None and len(config.scales) == 1:
            scale = next(iter(config.scales))
        if scale not in config.scales:
            raise RunError(
                f"{path}: choose a scale of {', '.join(config.scales)}" + (f", not {scale!r}" if scale else "")
            )
        sizes = config.scales[scale]
        arms = {
            name: dataclasses.replace(arm, budgets=sizes.budgets.get(name, arm.budgets))
            for name, arm in config.arms.items()
            if not sizes.arms or name in sizes.arms
        }
        scratch = [name for name, arm in arms.items() if arm.control == "from_scratch"]
        reference = config.reference or next(iter(scratch), None)
        return cls(
            name=path.stem,
            scale=scale,
            title=config.title,
            about=config.about,
            arms={name: _beside(arm, path) for name, arm in arms.items()},
            sizes=sizes,
            run=_run_of(sizes, path, of_run),
            reference=reference if reference in arms else None,
            printed=config.printed,
        )

    def structure(self, name: str) -> ModelDims:
        """A structure by its name, or as it is spelled out.

        Raises:
            RunError: for a name that the scale does not have.
        """
        text = self.sizes.structures.get(name, name)
        if "," not in text:
            known = ", ".join(self.sizes.structures)
            raise RunError(f"{self.name}: scale {self.scale} has no structure {name!r} (known: {known})")
        return ModelDims.parse(text)


def _beside(arm: ArmConfig, path: Path) -> ArmConfig:
    """The arm, its schedule's file taken relative to the experiment's."""
    return dataclasses.replace(arm, schedule=str(path.parent / arm.schedule)) if isinstance(arm.schedule, str) else arm


def _run_of(sizes: ScaleConfig, path: Path, overrides: Mapping[str, Any]) -> RunConfig:
    sections = {"model": sizes.model, "training": sizes.training}
    of_scale = {f"{section}.{name}": value for section, own in sections.items() for name, value in own.items()}
    changes = {**of_scale, **overrides}
    if isinstance(sizes.run, str):
        return RunConfig.from_yaml(path.parent / sizes.run, changes)
    where = f"{path}: run"
    content = copy.deepcopy(sizes.run)
    set_keys(content, changes, where=where, error=RunError)
    return parse(RunConfig, content, where=where, error=RunError)
