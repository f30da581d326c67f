"""`GrowthStage` and `GrowthSchedule`: the plan, as a frozen value and as YAML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from .cost.flops import DEFAULT_CONFIG, flops_per_token
from .dims import ModelDims
from .errors import GrowthError, ScheduleError
from .io.files import write_text
from .io.serialization import parse, read_yaml, to_yaml
from .operators import OPERATORS, operator_named, operators_between

#: The paper trains the initial model on 25B tokens and every stage on 10B (section 4.1).
PAPER_INITIAL_SHARE = 2.5


def token_shares(total: float, stages: int, *, initial_share: float = PAPER_INITIAL_SHARE) -> list[int]:
    """`total` tokens for the initial model and `stages` growth stages, in whole tokens; the paper's rule.

    >>> token_shares(65e9, 4)
    [25000000000, 10000000000, 10000000000, 10000000000, 10000000000]
    """
    if not (total > 0 and math.isfinite(total)) or not (initial_share >= 0 and math.isfinite(initial_share)):
        raise ScheduleError(f"tokens must be positive and shares not negative, got {total} and {initial_share}")
    parts = stages + initial_share
    if not parts:
        raise ScheduleError("a schedule without stages trains its initial model: give it a share of the tokens")
    return [round(total * initial_share / parts)] + [round(total / parts)] * stages


@dataclass(frozen=True)
class GrowthStage:
    """One growth, and the training after it.

    Args:
        operators: the operators that grow in this stage, the leading one first.
        dims: the structure after the growth.
        tokens: tokens of training after the growth.
        init: how new entries are initialised: one name for all operators, a mapping from operator to name,
            or None for the paper's (`random`; layers `stack`).

    >>> GrowthStage(("hidden", "mha"), ModelDims(128, 256, 4, 4)).label
    'hidden'
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    operators: tuple[str, ...]
    dims: ModelDims
    tokens: int = 0
    init: str | dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.operators:
            raise ScheduleError(f"a stage needs at least one operator of {', '.join(OPERATORS)}")
        for name in self.operators:
            operator_named(name)
        if len(set(self.operators)) < len(self.operators):
            raise ScheduleError(f"operators {', '.join(self.operators)} name one twice; each can grow once in a stage")
        _check_tokens(self.tokens)
        if isinstance(self.init, Mapping) and (strays := sorted(set(self.init) - set(self.operators))):
            raise ScheduleError(f"init names {', '.join(strays)}, but the stage grows {', '.join(self.operators)}")

    @property
    def label(self) -> str:
        """The operators' names joined; heads that follow hidden are not spelled out, as in the paper."""
        return "-".join(self._spelled_out)

    @property
    def letters(self) -> str:
        """The same in letters: `h`, or `lf` for a stage that grows two dimensions."""
        return "".join(OPERATORS[name].letter for name in self._spelled_out)

    @property
    def _spelled_out(self) -> list[str]:
        return [name for name in self.operators if name != "mha" or "hidden" not in self.operators]


@dataclass(frozen=True)
class GrowthSchedule:
    """The initial structure and the stages that lead to the target; without stages, training from scratch.

    Args:
        initial: the structure to begin with.
        stages: the growth stages, in order.
        initial_tokens: tokens of training before the first growth; 0 for a model that is trained already.
        scores: what each objective made of the schedule (smaller is better), when a planner made it.

    Raises:
        ScheduleError: where the stages do not follow one another.

    >>> schedule = GrowthSchedule(ModelDims(64, 128, 2, 2), (
    ...     GrowthStage(("layer",), ModelDims(64, 128, 4, 2)),
    ...     GrowthStage(("hidden", "mha"), ModelDims(128, 128, 4, 4, head_dim=32))))
    >>> schedule.sequence, schedule.stage_name(2)
    ('l-h', 'stage-2-hidden')
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    initial: ModelDims
    stages: tuple[GrowthStage, ...] = ()
    initial_tokens: int = 0
    scores: dict[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _check_tokens(self.initial_tokens)
        before = self.initial
        for number, stage in enumerate(self.stages, start=1):
            try:
                needed = operators_between(before, stage.dims)
            except GrowthError as caught:
                raise ScheduleError(f"stage {number} ({stage.label}): {caught}") from None
            if set(needed) != set(stage.operators):
                raise ScheduleError(
                    f"stage {number} names {', '.join(stage.operators)}, but from {before} to {stage.dims} "
                    f"the dimensions that change belong to {', '.join(needed) or 'none'}"
                )
            before = stage.dims

    @property
    def target(self) -> ModelDims:
        """The structure at the end."""
        return self.structures[-1]

    @property
    def structures(self) -> tuple[ModelDims, ...]:
        """The structure in each stage of training, the initial one first."""
        return (self.initial, *(stage.dims for stage in self.stages))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of each stage of training, the initial one first."""
        return (self.initial_tokens, *(stage.tokens for stage in self.stages))

    @property
    def sequence(self) -> str:
        """The order of growth in letters, such as `l-f-h`; empty without stages."""
        return "-".join(stage.letters for stage in self.stages)

    def stage_name(self, number: int) -> str:
        """The name of a stage's directory; stage 0 is the initial model."""
        return f"stage-{number}-" + ("initial" if number == 0 else self.stages[number - 1].label)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of all stages, the initial one first."""
        return tuple(self.stage_name(number) for number in range(len(self.stages) + 1))

    def flops(self, config: Any = DEFAULT_CONFIG, sequence_length: int = 2048) -> float:
        """Training FLOPs of all stages (see `cost.flops_per_token`)."""
        pairs = zip(self.structures, self.tokens, strict=True)
        return float(sum(flops_per_token(dims, config, sequence_length) * tokens for dims, tokens in pairs))

    def with_tokens(self, total: float, *, initial_share: float = PAPER_INITIAL_SHARE) -> GrowthSchedule:
        """The same schedule with `total` tokens shared out by the paper's rule.

        Every growth stage takes one share and the initial model `initial_share` of them: 25B and 10B each in
        the paper (Section 4.1). An `initial_share` of 0 is for a model that is trained already.
        """
        return self.with_shares(token_shares(total, len(self.stages), initial_share=initial_share))

    def with_shares(self, tokens: Sequence[int]) -> GrowthSchedule:
        """The same schedule with other tokens for each stage of training, the initial model's first.

        Raises:
            ScheduleError: where they are not as many as the stages.
        """
        if len(tokens) != len(self.stages) + 1:
            raise ScheduleError(
                f"{len(tokens)} token counts for an initial model and {len(self.stages)} stages: give one for each"
            )
        stages = tuple(replace(stage, tokens=count) for stage, count in zip(self.stages, tokens[1:], strict=True))
        return replace(self, initial_tokens=tokens[0], stages=stages)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The schedule as YAML text, also written to `path` if one is given."""
        text = to_yaml(self)
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_yaml(cls, path: str | Path) -> GrowthSchedule:
        """Read a schedule; unknown keys and stages that do not follow one another are refused.

        Raises:
            ScheduleError: in one line that names the file and the key.
        """
        return parse(cls, read_yaml(path, error=ScheduleError), where=str(path), error=ScheduleError)

    def __iter__(self) -> Iterator[GrowthStage]:
        return iter(self.stages)


def _check_tokens(tokens: int) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ScheduleError(f"tokens must be a whole number, 0 or more, got {tokens!r}")
