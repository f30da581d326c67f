"""`SlopTrainingArguments`: transformers' arguments with the paper's recipe as defaults, and arguments of growth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from ..errors import RunError
from ..growth.plan import DEFAULT_NOISE
from ..io.serialization import Json
from .batches import PER_STAGE
from .launch import prepare_launch

#: Optimizers whose state is AdamW's two moments and a step per parameter.
ADAMW = frozenset({"adamw_torch", "adamw_torch_fused"})
LR_SPANS = ("stage", "run")


@dataclass
class SlopTrainingArguments(TrainingArguments):
    """Arguments of `SlopTrainer`; every argument of `transformers.TrainingArguments` keeps its meaning.

    The defaults follow Appendix B.1 of the paper: AdamW with betas 0.9 and 0.95, weight decay 0.1, gradients
    clipped at 1.0, learning rate 3e-4, and in every stage a warm-up and a cosine to 10% of the peak. The paper warms
    up for 2,000 steps; the default here is 5% of each stage, the same share of a stage of 10B tokens in batches of
    256K tokens. The schedule's tokens decide how long a stage lasts: `max_steps` and `num_train_epochs` are not used.

    Raises:
        RunError: for an argument without meaning in a staged run.
    """

    learning_rate: float = HfArg(default=3e-4, help="Peak learning rate of every stage.")
    adam_beta2: float = HfArg(default=0.95, help="Beta2 of AdamW.")
    weight_decay: float = HfArg(default=0.1, help="Weight decay of the matrices.")
    lr_scheduler_type: str = HfArg(
        default="cosine_with_min_lr",
        help="Learning-rate schedule over each stage or the run (lr_span); WSD: warmup_stable_decay.",
    )
    lr_scheduler_kwargs: dict[str, Json] | str | None = HfArg(
        default=None,
        help="Arguments of the learning-rate schedule; by default the cosine ends at 10%% of the peak, as in "
        "the paper. num_decay_steps below 1 is a share of the span.",
    )
    lr_span: str = HfArg(
        default="stage",
        help="Span of the learning-rate schedule: 'stage', again after each growth, or 'run', once.",
        metadata={"choices": LR_SPANS},
    )
    warmup_steps: float = HfArg(default=0.05, help="Warm-up of each span: steps, or below 1 a share of the span.")
    rewarm_steps: float | None = HfArg(
        default=None,
        help="Warm-up after each growth: steps, or below 1 a share of the stage. By default stages warm up for "
        "warmup_steps, and a schedule over the run ignores growths.",
    )
    batch_tokens: list[int] | None = HfArg(
        default=None,
        help="Tokens per optimizer step over all devices: one number, or one per stage. Accumulation follows "
        "from it. By default batch size, accumulation and number of devices decide.",
    )
    stage_batch_sizes: list[int] | None = HfArg(
        default=None, help="per_device_train_batch_size of each stage; large models may need a small one."
    )
    stage_learning_rates: list[float] | None = HfArg(
        default=None, help="Peak learning rate of each stage, one number per stage; by default learning_rate for all."
    )
    num_train_epochs: float = HfArg(default=1.0, help="Not used: the schedule's tokens decide.")
    train_sampling_strategy: str = HfArg(
        default="sequential", help="Stays sequential: the shuffled order is the run's own."
    )
    growth_init: dict[str, str] | str | None = HfArg(
        default=None, help="Init of each operator, or one for all, for stages without an init in the schedule."
    )
    growth_seed: int = HfArg(default=0, help="Seed of the entries that growth draws at random.")
    growth_noise: float = HfArg(
        default=DEFAULT_NOISE,
        help="Noise that breaks the symmetry of copies under the init `copy`, as a fraction of the model's "
        "initializer_range; it does not change the function.",
    )
    carry_optimizer_state: bool = HfArg(
        default=False,
        help="Grow AdamW's moments with the weights; by default every stage starts with a fresh AdamW, which "
        "reached a lower loss in our experiments (docs/results.md).",
    )
    eval_before_growth: bool = HfArg(default=True, help="Evaluate at the end of each stage.")
    eval_after_growth: bool = HfArg(default=True, help="Evaluate right after each growth.")
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="Hide non-finite losses in the log; the run stops at the first one anyway."
    )
    keep_optimizer_states: bool = HfArg(
        default=False, help="Keep the optimizer state of every stage, to roll back to; by default only the last one's."
    )
    max_shard_size: str = HfArg(default="2GB", help="Largest file of weights or optimizer state.")
    cost_model: str | None = HfArg(
        default=None, help="File written by `slop calibrate`, for the estimate of the time left."
    )
    peak_tflops: float | None = HfArg(
        default=None, help="Peak of a device in TFLOP/s, for MFU; not needed for known devices."
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "growth_init"]

    def __post_init__(self) -> None:
        prepare_launch(self)
        super().__post_init__()
        if self.device.type == "cpu":  # `use_cpu` does the same; pages are pinned for copies to a GPU
            self.dataloader_pin_memory = False
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
                "set carry_optimizer_state to false to start it afresh in every stage"
            )

    def _refuse_meaningless(self) -> None:
        if self.max_steps > 0 or self.num_train_epochs != 1.0:
            raise RunError(
                "max_steps and num_train_epochs have no meaning here; a stage lasts for its schedule's tokens"
            )
        if self.train_sampling_strategy != "sequential":
            raise RunError(
                f"train_sampling_strategy must stay 'sequential', got {self.train_sampling_strategy!r}: "
                "the trainer shuffles the blocks itself, without repeats; change `data_seed` for another order"
            )
        if self.load_best_model_at_end:
            raise RunError("load_best_model_at_end cannot work across stages of different shapes; leave it out")
        if self.hub_revision is not None:
            raise RunError(f"hub_revision {self.hub_revision!r}: each stage has its own revision; leave it out")
        if self.auto_find_batch_size:
            raise RunError("auto_find_batch_size would change the batch in the middle of a run; set stage_batch_sizes")
        if self.save_only_model:
            raise RunError("save_only_model writes checkpoints that no run can be resumed from; leave it out")
        if self.lr_span not in LR_SPANS:
            raise RunError(f"lr_span must be one of {', '.join(LR_SPANS)}, got {self.lr_span!r}")
        for name in PER_STAGE:
            numbers = getattr(self, name)
            if numbers is not None and (not numbers or min(numbers) <= 0):
                raise RunError(f"{name} must be positive numbers, one for all stages or one per stage, got {numbers}")
        for name in ("rewarm_steps", "peak_tflops", "growth_noise"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise RunError(f"{name} must not be negative, got {getattr(self, name)}")
