"""`SlopTrainingArguments`: transformers' arguments with the paper's recipe as defaults, and growth's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..errors import RunError

#: Optimizers whose state is AdamW's two moments and a step, kept per parameter.
ADAMW = frozenset({"adamw_torch", "adamw_torch_fused"})


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
        default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule; it starts anew in every stage."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "Its arguments; the paper ends at 10%%."}
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up of every stage: steps, or below 1 a share of the stage."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Not used: the schedule's tokens decide."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Stays sequential: the shuffled order is the run's own."}
    )
    growth_seed: int = field(default=0, metadata={"help": "Seed of the entries that growth draws at random."})
    carry_optimizer_state: bool = field(
        default=True,
        metadata={"help": "Grow AdamW's moments with the weights; otherwise every stage starts them anew."},
    )
    eval_after_growth: bool = field(
        default=True, metadata={"help": "Evaluate right after each growth as well as at the end of each stage."}
    )
    keep_optimizer_states: bool = field(
        default=False, metadata={"help": "Keep optimizer.safetensors of stages that a later one no longer needs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.push_to_hub:
            raise RunError("push_to_hub would push unfinished stages; push the finished stage directories instead")
        optim = getattr(self.optim, "value", self.optim)
        if self.carry_optimizer_state and optim not in ADAMW:
            raise RunError(
                f"optim {optim!r} keeps a state that cannot be grown (known: {', '.join(sorted(ADAMW))}); "
                "set carry_optimizer_state to false to start it anew in every stage"
            )
