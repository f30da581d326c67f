"""`plan_upscaling`: a finished checkpoint, deepened at once and trained on, and the loss predicted for that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from ..cost.growth_law import GrowthLaw
from ..cost.law_transfer import load_default_law
from ..cost.memory import MemoryLimit
from ..dims import ModelConfig, ModelDims
from ..errors import PlanError
from ..io.numbers import is_positive_number, require_whole_number
from ..io.serialization import Json, to_plain
from ..schedule import GrowthSchedule, GrowthStage
from .advice import GROWTH_INITS, Advice, AdvisedOption, Question, build_run, judge_schedule
from .budget import MOST_TOKENS
from .deployable import round_layers

#: Factor of the layers: in the middle of what has been published. The growth law hardly separates them.
DEFAULT_FACTOR = Fraction(4, 3)
#: Factors that finished checkpoints were deepened by: LLaMA-Pro and Kanana 1.25, Falcon3 1.43, SOLAR 1.5.
USUAL_FACTORS = (1.2, 1.5)
#: Tokens of the continued training per parameter of the grown model: compute-optimal from scratch (Hoffmann et al.
#: 2022), and twice the ten of LLaMA-Pro.
TOKENS_PER_PARAMETER = 20


@dataclass(frozen=True)
class Upscaling:
    """A finished checkpoint, the growth of its layers, and the continued training of the grown model.

    Args:
        question: the checkpoint, and the training FLOPs of the grown model as the budget.
        schedule: growth before any further training, in one stage.
        advice: this schedule compared with the ways not to grow, at the same FLOPs.
    """

    question: Question
    schedule: GrowthSchedule
    advice: Advice

    @property
    def stage(self) -> GrowthStage:
        """The growth."""
        return self.schedule.stages[0]

    @property
    def option(self) -> AdvisedOption:
        """The forecast for the grown model."""
        return next(option for option in self.advice.options if option.kind == "growth")

    @property
    def factor(self) -> float:
        """New layers per old layer."""
        return self.stage.dims.num_hidden_layers / self.schedule.initial.num_hidden_layers

    @property
    def remark(self) -> str | None:
        """A sentence about a factor outside of those of published checkpoints; None within them."""
        low, high = USUAL_FACTORS
        if low <= self.factor <= high:
            return None
        return (
            f"{self.factor:.2f} times the layers is outside of the {low:g} to {high:g} times by which published "
            "checkpoints were deepened."
        )

    def as_dict(self) -> dict[str, Json]:
        """Return the growth, its costs before and after, and the forecast as plain data."""
        sides: dict[str, Json] = {
            name: self._describe(dims)
            for name, dims in zip(("before", "after"), self.schedule.structures, strict=True)
        }
        training: dict[str, Json] = {"tokens": self.stage.tokens, "flops": self.option.flops}
        growth: dict[str, Json] = {**sides, "init": self.stage.init, "remark": self.remark}
        return {**growth, "training": training, "advice": to_plain(self.advice)}

    def _describe(self, dims: ModelDims) -> dict[str, Json]:
        question = self.question
        memory = question.memory.estimate(dims, question.config, question.sequence_length)
        return {
            "dims": to_plain(dims),
            "parameters": int(count_parameters(dims, question.config)),
            "flops_per_token": question.count_flops(dims),
            "memory_bytes": {**{name: int(size) for name, size in vars(memory).items()}, "total": int(memory.total)},
        }

    def build_run(self, directory: str, data: str | None = None) -> dict[str, Json]:
        """Return the content of a file for `slop train` that trains the grown model.

        Args:
            directory: directory of the grown checkpoint, as the file should name it.
            data: source of the training text; None to leave it out, to be filled in.
        """
        schedule = GrowthSchedule(self.stage.dims, initial_tokens=self.stage.tokens)
        return build_run(self.question, replace(self.option, schedule=schedule), data, directory)


def choose_layers(layers: int, target: int | None = None, by: float | None = None) -> int:
    """Return the number of layers to grow to, by default about a third more, in multiples that users deploy.

    Args:
        layers: layers of the checkpoint.
        target: number of layers to grow to.
        by: factor of the layers instead.

    Raises:
        PlanError: if both are given, or the result is not above `layers`.

    >>> [choose_layers(layers) for layers in (16, 24, 28, 32)]
    [20, 32, 36, 44]
    >>> choose_layers(32, by=1.25), choose_layers(32, target=48)
    (40, 48)
    """
    if target is not None and by is not None:
        raise PlanError("the depth is given twice: give either `layers` or `by`")
    if by is not None and not (is_positive_number(by) and by > 1):
        raise PlanError(f"by must be a factor above 1, such as 1.33, got {by!r}")
    if target is not None:
        require_whole_number(target, "layers", error=PlanError)
        chosen = target
    else:
        chosen = round_layers(layers * DEFAULT_FACTOR) if by is None else round(layers * by)
    if chosen <= layers:
        raise PlanError(
            f"{chosen} layers are not more than the checkpoint's {layers}: give layers={layers + 1} or more"
        )
    return chosen


def plan_upscaling(
    start: ModelDims,
    *,
    already_seen: float,
    layers: int | None = None,
    by: float | None = None,
    tokens: float | None = None,
    init: str | None = None,
    config: ModelConfig = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    memory: MemoryLimit | None = None,
    law: GrowthLaw | None = None,
) -> Upscaling:
    """Plan to deepen a finished checkpoint at once and to train the result.

    Args:
        start: structure of the checkpoint.
        already_seen: tokens that it was trained on.
        layers, by: number of layers to grow to, or factor of the layers; default as in `choose_layers`.
        tokens: tokens to train the grown model on; default 20 per parameter.
        init: init of the operator `layer`; default that of `slop advise`.
        config, sequence_length: settings that growth does not change, and tokens per training sequence.
        memory: memory per device, and how training uses it.
        law: growth law; None is the default law.

    Raises:
        PlanError: if a number is out of range, or the grown model does not fit into the memory of a device.
        ScheduleError: for an init that layers do not have.

    >>> plan = plan_upscaling(ModelDims(2048, 8192, 16, 32, 8), already_seen=9e12)
    >>> plan.stage.dims.num_hidden_layers, plan.stage.tokens / 1e9
    (20, 27.0)
    """
    if not is_positive_number(already_seen):
        raise PlanError(
            f"already_seen must be a positive number of tokens, got {already_seen!r}: give those of the checkpoint"
        )
    if tokens is not None and not (is_positive_number(tokens) and 1 <= tokens <= MOST_TOKENS):
        raise PlanError(
            f"tokens must be from 1 to {MOST_TOKENS:g}, got {tokens!r}: give those of the continued training"
        )
    grown = start.replace(num_hidden_layers=choose_layers(start.num_hidden_layers, layers, by))
    if tokens is None:
        tokens = float(f"{TOKENS_PER_PARAMETER * count_parameters(grown, config):.3g}")
    stage = GrowthStage(("layer",), grown, round(tokens), GROWTH_INITS["layer"] if init is None else init)
    schedule = GrowthSchedule(start, (stage,))
    question = Question(
        count_flops_per_token(grown, config, sequence_length) * stage.tokens,
        start=start,
        already_seen=already_seen,
        target=grown,
        config=config,
        sequence_length=sequence_length,
        memory=memory or MemoryLimit(1e18),
        law=law or load_default_law(),
    )
    if not question.fits(grown):
        raise PlanError(f"the grown model does not fit: it {question.memory.explain(grown, config, sequence_length)}")
    return Upscaling(question, schedule, judge_schedule(question, schedule))
