"""`GrowthStage` and `GrowthSchedule`: the plan of a staged growth, as a frozen value and as YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .architectures import read_setting
from .cost.flops import DEFAULT_CONFIG, count_flops_per_token
from .dims import ModelConfig, ModelDims
from .errors import GrowthError, ScheduleError
from .io.numbers import is_finite_number, is_positive_number, require_whole_number
from .io.record import Record
from .io.serialization import describe_alternatives
from .operators import OPERATORS, find_operators, get_operator, resolve_inits

#: Tokens of the initial model per token of a growth stage: the paper trains on 25B and 10B (section 4.1).
PAPER_INITIAL_SHARE = 2.5

#: More stages than any two structures have steps between them that are worth a stage.
MOST_STAGES = 100_000


def share_tokens(total: float, stages: int, *, initial_share: float = PAPER_INITIAL_SHARE) -> list[int]:
    """Split `total` tokens between the initial model and `stages` growth stages by the paper's rule (section 4.1).

    Args:
        total: tokens of the whole run.
        stages: number of growth stages, each of which takes one share.
        initial_share: shares of the initial model; 0 for an already trained model.

    Returns:
        Whole tokens per stage of training, the initial model's first.

    Raises:
        ScheduleError: if a number is out of range, or nothing would be trained.

    >>> share_tokens(65e9, 4)
    [25000000000, 10000000000, 10000000000, 10000000000, 10000000000]
    """
    require_whole_number(stages, "stages", least=0, most=MOST_STAGES, error=ScheduleError)
    if not (is_positive_number(total) and is_finite_number(initial_share, least=0)):
        raise ScheduleError(f"tokens must be positive and shares not negative, got {total} and {initial_share}")
    parts = stages + initial_share
    if not parts:
        raise ScheduleError("a schedule without stages trains its initial model: give it a share of the tokens")
    return [round(total * initial_share / parts)] + [round(total / parts)] * stages


@dataclass(frozen=True)
class GrowthStage(Record, error=ScheduleError):
    """One growth, and the training that follows it.

    Args:
        operators: operators that grow in this stage, the leading one first.
        dims: structure after the growth.
        tokens: tokens to train on after the growth.
        init: initialisation of new entries: one name for all operators, a mapping from operator to name, or None for
            the paper's (`random`; layers `stack`).

    Raises:
        ScheduleError: for no operator, an operator named twice, negative tokens, or an init that an operator does not
            have.

    >>> GrowthStage(("hidden", "mha"), ModelDims(128, 256, 4, 4)).label
    'hidden'
    """

    operators: tuple[str, ...]
    dims: ModelDims
    tokens: int = 0
    init: str | dict[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.operators, str):
            raise ScheduleError(
                f"operators must be a tuple of names, got {self.operators!r}: give ({self.operators!r},)"
            )
        if not isinstance(self.dims, ModelDims):
            raise ScheduleError(f"dims of a stage must be a ModelDims, got {self.dims!r}")
        if not self.operators:
            raise ScheduleError(f"a stage needs at least one operator of {', '.join(OPERATORS)}")
        for name in self.operators:
            get_operator(name)
        if len(set(self.operators)) < len(self.operators):
            raise ScheduleError(f"operators {', '.join(self.operators)} name one twice; each can grow once in a stage")
        require_whole_number(self.tokens, "tokens", least=0, error=ScheduleError)
        if isinstance(self.init, Mapping) and (strays := sorted(set(self.init) - set(self.operators))):
            hint = describe_alternatives(strays[0], self.operators, list_all=False)
            raise ScheduleError(f"init names {strays[0]!r}, but the stage grows {', '.join(self.operators)}{hint}")
        try:
            resolve_inits(self.operators, self.init)
        except GrowthError as caught:
            raise ScheduleError(str(caught)) from None

    @property
    def label(self) -> str:
        """Names of the operators, joined by hyphens; as in the paper, heads that follow hidden are left out."""
        return "-".join(self._spelled_out)

    @property
    def letters(self) -> str:
        """The same in letters, such as `h`, or `lf` for a stage that grows two dimensions."""
        return "".join(OPERATORS[name].letter for name in self._spelled_out)

    @property
    def _spelled_out(self) -> list[str]:
        return [name for name in self.operators if name != "mha" or "hidden" not in self.operators]


@dataclass(frozen=True)
class GrowthSchedule(Record, error=ScheduleError):
    """The initial structure, and the stages that lead to the target; without stages, training from scratch.

    Args:
        initial: structure to begin with.
        stages: growth stages, in order.
        initial_tokens: tokens to train on before the first growth; 0 for an already trained model.
        scores: score of the schedule by each objective (smaller is better), if a planner made it.
        vocab_size, tie_word_embeddings: settings of the models that the schedule was planned for; None for any.

    Raises:
        ScheduleError: if a stage does not follow from the one before.

    >>> schedule = GrowthSchedule(ModelDims(64, 128, 2, 2), (
    ...     GrowthStage(("layer",), ModelDims(64, 128, 4, 2)),
    ...     GrowthStage(("hidden", "mha"), ModelDims(128, 128, 4, 4, head_dim=32))))
    >>> schedule.sequence, schedule.stage_name(2)
    ('l-h', 'stage-2-hidden')
    """

    initial: ModelDims
    stages: tuple[GrowthStage, ...] = ()
    initial_tokens: int = 0
    scores: dict[str, float] = field(default_factory=dict, compare=False)
    vocab_size: int | None = field(default=None, compare=False)
    tie_word_embeddings: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_whole_number(self.initial_tokens, "initial_tokens", least=0, error=ScheduleError)
        if self.vocab_size is not None:
            require_whole_number(self.vocab_size, "vocab_size", error=ScheduleError)
        if not isinstance(self.initial, ModelDims):
            raise ScheduleError(f"initial must be a ModelDims, got {self.initial!r}")
        before = self.initial
        for number, stage in enumerate(self.stages, start=1):
            if not isinstance(stage, GrowthStage):
                raise ScheduleError(f"stages must be a tuple of GrowthStage, got {stage!r} in it")
            try:
                needed = find_operators(before, stage.dims)
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
        """Structure at the end."""
        return self.structures[-1]

    @property
    def structures(self) -> tuple[ModelDims, ...]:
        """Structure in each stage of training, the initial one first."""
        return (self.initial, *(stage.dims for stage in self.stages))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each stage of training, the initial one first."""
        return (self.initial_tokens, *(stage.tokens for stage in self.stages))

    @property
    def sequence(self) -> str:
        """Order of growth in letters, such as `l-f-h`; empty without stages."""
        return "-".join(stage.letters for stage in self.stages)

    def stage_name(self, number: int) -> str:
        """Name of a stage's directory; stage 0 is the initial model."""
        return f"stage-{number}-" + ("initial" if number == 0 else self.stages[number - 1].label)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of all stages, the initial one first."""
        return tuple(self.stage_name(number) for number in range(len(self.stages) + 1))

    def flops(self, config: ModelConfig = DEFAULT_CONFIG, sequence_length: int = 2048) -> float:
        """Training FLOPs of all stages (see `cost.flops.count_flops_per_token`)."""
        pairs = zip(self.structures, self.tokens, strict=True)
        return float(sum(count_flops_per_token(dims, config, sequence_length) * tokens for dims, tokens in pairs))

    def find_mismatch(self, config: ModelConfig) -> str | None:
        """Explain why a model is not the one that the schedule was planned for, with the remedy; None if it is.

        >>> schedule = GrowthSchedule(ModelDims(64, 128, 2, 2), vocab_size=300)
        >>> schedule.find_mismatch({"vocab_size": 300}), schedule.find_mismatch({"vocab_size": 400})[:59]
        (None, 'the schedule was planned for a vocabulary of 300, the model')
        """
        size, tied = read_setting(config, "vocab_size"), bool(read_setting(config, "tie_word_embeddings", False))
        if self.vocab_size not in (None, size):
            return (
                f"the schedule was planned for a vocabulary of {self.vocab_size}, the model has {size}: plan with "
                f"`slop plan --vocab-size {size}`, take a model with {self.vocab_size}, or remove vocab_size from the "
                "schedule"
            )
        if self.tie_word_embeddings not in (None, tied):
            kinds = ("untied", "tied")
            return (
                f"the schedule was planned for {kinds[not tied]} embeddings, the model's are {kinds[tied]}: plan "
                f"{'with' if tied else 'without'} `--tied`, set model.tie_word_embeddings to {str(not tied).lower()}, "
                "or remove tie_word_embeddings from the schedule"
            )
        return None

    def with_tokens(self, total: float, *, initial_share: float = PAPER_INITIAL_SHARE) -> GrowthSchedule:
        """Return the schedule with `total` tokens, split by the paper's rule (section 4.1).

        Args:
            total: tokens of the whole run.
            initial_share: shares of the initial model, while a growth stage takes one; 0 for an already trained
                model.

        Raises:
            ScheduleError: if `total` is not positive or `initial_share` is negative, or if nothing would be trained.
        """
        return self.with_shares(share_tokens(total, len(self.stages), initial_share=initial_share))

    def with_shares(self, tokens: Sequence[int]) -> GrowthSchedule:
        """Return the schedule with the given tokens per stage of training, the initial model's first.

        Raises:
            ScheduleError: unless there is one number per stage.
        """
        if len(tokens) != len(self.stages) + 1:
            raise ScheduleError(
                f"{len(tokens)} token counts for an initial model and {len(self.stages)} stages: give one for each"
            )
        stages = tuple(replace(stage, tokens=count) for stage, count in zip(self.stages, tokens[1:], strict=True))
        return replace(self, initial_tokens=tokens[0], stages=stages)

    def __iter__(self) -> Iterator[GrowthStage]:
        return iter(self.stages)
