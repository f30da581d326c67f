"""`SlopTrainingArguments`: transformers' arguments with the paper's recipe as defaults, and growth's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..errors import RunError
from ..growth.plan import DEFAULT_NOISE
from .launch import prepare_launch

#: Optimizers whose state is AdamW's two moments and a step, kept per parameter.
ADAMW = frozenset({"adamw_torch", "adamw_torch_fused"})
LR_SPANS = ("stage", "run")
#: Arguments that are one number for all stages, or one for each.
PER_STAGE = ("batch_tokens", "stage_batch_sizes", "stage_learning_rates")


@dataclass
class SlopTrainingArguments(TrainingArguments):
    """Arguments of `SlopTrainer`; every argument of `transformers.TrainingArguments` keeps its meaning.

    The defaults are Appendix B.1 of the paper: AdamW with betas 0.9 and 0.95, weight decay 0.1, gradients clipped at
    1.0, learning rate 3e-4, warm-up and a cosine to 10% of it, which starts anew in every stage. The paper warms up
    for 2,000 steps; the default here is 5% of each stage, the same share of a stage of 10B tokens in batches of
    256K. How long a stage lasts is told by the schedule's tokens: `max_steps` and `num_train_epochs` are not used.

    Raises:
        RunError: for an argument that has no meaning in a staged run.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of every stage."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the matrices."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr",
        metadata={"help": "Learning-rate schedule, over each stage or the run (lr_span); WSD: warmup_stable_decay."},
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Its arguments; left out, the cosine ends at 10%% of the peak, as the paper's. num_decay_steps "
            "below 1 is a share of the span."
        },
    )
    lr_span: str = field(
        default="stage",
        metadata={
            "help": "What the schedule spans: 'stage', anew after each growth, or 'run', once.",
            "choices": LR_SPANS,
        },
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up of each span: steps, or below 1 a share of the span."}
    )
    rewarm_steps: float | None = field(
        default=None,
        metadata={
            "help": "Warm-up after each growth: steps, or below 1 a share of the stage. Left out, stages warm up as "
            "warmup_steps says, and a schedule over the run goes on as if nothing had happened."
        },
    )
    batch_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "Tokens of an optimizer step over all devices: one number, or one for each stage. Accumulation "
            "follows from it. Left out, batch size, accumulation and number of devices decide."
        },
    )
    stage_batch_sizes: list[int] | None = field(
        default=None, metadata={"help": "per_device_train_batch_size of each stage; later models may need a smaller."}
    )
    stage_learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Peak learning rate of each stage, one number for each; left out, learning_rate for all."},
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Not used: the schedule's tokens decide."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Stays sequential: the shuffled order is the run's own."}
    )
    growth_init: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Init of each operator, or one name for all, for stages whose schedule names none."},
    )
    growth_seed: int = field(default=0, metadata={"help": "Seed of the entries that growth draws at random."})
    growth_noise: float = field(
        default=DEFAULT_NOISE,
        metadata={
            "help": "Noise that parts copies under the init `copy`, as a share of the model's initializer_range; it "
            "leaves the function as it is."
        },
    )
    carry_optimizer_state: bool = field(
        default=False,
        metadata={
            "help": "Grow AdamW's moments with the weights; otherwise every stage starts them anew, which ended lower "
            "in our experiments (docs/results.md)."
        },
    )
    eval_before_growth: bool = field(default=True, metadata={"help": "Evaluate at the end of each stage."})
    eval_after_growth: bool = field(default=True, metadata={"help": "Evaluate right after each growth."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite; the run stops where one comes."}
    )
    keep_optimizer_states: bool = field(
        default=False,
        metadata={"help": "Keep the optimizer's state of stages that a later one no longer needs, to roll back to."},
    )
    max_shard_size: str = field(default="2GB", metadata={"help": "Largest file of weights or optimizer state."})
    cost_model: str | None = field(
        default=None, metadata={"help": "File made by `slop calibrate`, to estimate the time left with."}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Peak of a device in TFLOP/s, for MFU; known devices need none."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "growth_init"]

    def __post_init__(self) -> None:
        prepare_launch(self)
        super().__post_init__()
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        for name in PER_STAGE:
            if isinstance(getattr(self, name), (int, float)):
                setattr(self, name, [getattr(self, name)])
        self._refuse_meaningless()
        optim = getattr(self.optim, "value", self.optim)
        if self.carry_optimizer_state and optim not in ADAMW:
            raise RunError(
                f"optim {optim!r} keeps a state that cannot be grown (known: {', '.join(sorted(ADAMW))}); "
                "set carry_optimizer_state to false to start it anew in every stage"
            )

    def _refuse_meaningless(self) -> None:
        if self.max_steps > 0 or self.num_train_epochs != 1.0:
            raise RunError(
                "max_steps and num_train_epochs have no meaning here; a stage lasts for its schedule's tokens"
            )
        if self.train_sampling_strategy != "sequential":
            raise RunError(
                f"train_sampling_strategy must stay 'sequential', got {self.train_sampling_strategy!r}: "
                "the trainer shuffles blocks itself, so that none comes twice; change `data_seed` for another order"
            )
        if self.load_best_model_at_end:
            raise RunError("load_best_model_at_end cannot work across stages of different shapes; leave it out")
        if self.hub_revision is not None:
            raise RunError(f"hub_revision {self.hub_revision!r}: each stage has a revision of its own; leave it out")
        if self.auto_find_batch_size:
            raise RunError("auto_find_batch_size would change the batch of a run in the middle; set stage_batch_sizes")
        if self.save_only_model:
            raise RunError("save_only_model leaves checkpoints that no run can be resumed from; leave it out")
        if self.lr_span not in LR_SPANS:
            raise RunError(f"lr_span must be one of {', '.join(LR_SPANS)}, got {self.lr_span!r}")
        for name in PER_STAGE:
            numbers = getattr(self, name)
            if numbers is not None and (not numbers or min(numbers) <= 0):
                raise RunError(f"{name} must be positive numbers, one or one for each stage, got {numbers}")
        for name in ("rewarm_steps", "peak_tflops", "growth_noise"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise RunError(f"{name} must not be negative, got {getattr(self, name)}")
