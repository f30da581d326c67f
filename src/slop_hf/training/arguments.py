"""`SlopTrainingArguments`: transformers' arguments with the paper's recipe as defaults, and arguments of growth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from ..cost.hours import CostModel
from ..errors import RunError
from ..growth.plan import DEFAULT_NOISE
from ..growth.safetensors_io import plan_shards
from ..io.numbers import is_finite_number, is_whole_number
from ..io.serialization import Json, describe_alternatives
from .batches import PER_STAGE
from .launch import prepare_launch
from .muon import MUON, parse_settings

#: Optimizers whose state is AdamW's two moments and a step per parameter.
ADAMW = frozenset({"adamw_torch", "adamw_torch_fused"})
#: Name of all optimizers with that state, in the facts of a run.
ADAMW_STATE = "adamw"
LR_SPANS = ("stage", "run")
#: What the optimizer has of its state after a growth, see `SlopTrainingArguments`.
STATES_AT_GROWTH = ("new", "carried", "kept")
#: Whole numbers, with the smallest one allowed.
_WHOLE_NUMBERS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "save_total_limit": 0,
    "seed": 0,
    "data_seed": 0,
    "growth_seed": None,
}
#: Numbers from 0 on, with what they must be below.
_NUMBERS = {
    **dict.fromkeys(
        ("learning_rate", "adamw_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), math.inf
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), 1.0),
    **dict.fromkeys(("warmup_steps", "rewarm_steps", "logging_steps", "eval_steps", "save_steps"), math.inf),
    **dict.fromkeys(("new_parameter_rate", "new_parameter_steps"), math.inf),
    **dict.fromkeys(("growth_noise", "peak_tflops", "neftune_noise_alpha"), math.inf),
}
_NEVER_LISTED = ("flyte",)  # by transformers, among the available trackers
#: Stages and steps are added to a seed, and numpy's seeds end at 2**32.
LARGEST_SEED = 2**31 - 1


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
    optim: str = HfArg(
        default=TrainingArguments.default_optim,
        help="Optimizer: one that transformers knows, or 'muon', which is Muon for the matrices of the layers and "
        "AdamW for all other parameters.",
        metadata={"choices": [*(name.value for name in OptimizerNames), MUON]},
    )
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
    adamw_learning_rate: float | None = HfArg(
        default=None,
        help="Peak learning rate of AdamW under optim 'muon', which leaves embeddings, head, norms and biases to it; "
        "by default learning_rate. stage_learning_rates change it in proportion.",
    )
    optimizer_state_at_growth: str | None = HfArg(
        default=None,
        help="State of the optimizer after a growth. 'new': every stage starts with a fresh one (the default). "
        "'carried': moments grow like the weights, and copies get those of their source. 'kept': entries that were "
        "there keep their moments, and new ones, copies among them, start at zero.",
        metadata={"choices": STATES_AT_GROWTH},
    )
    carry_optimizer_state: bool | None = HfArg(
        default=None,
        help="Earlier name: true is optimizer_state_at_growth 'carried', false is 'new'.",
    )
    new_parameter_rate: float = HfArg(
        default=1.0,
        help="Factor of the learning rate of parameters that a growth has added, which are those of added layers.",
    )
    new_parameter_steps: float | None = HfArg(
        default=None,
        help="Steps after a growth for which new_parameter_rate holds, or below 1 a share of the stage; by default "
        "the whole stage.",
    )
    eval_before_growth: bool = HfArg(default=True, help="Evaluate at the end of each stage.")
    eval_after_growth: bool = HfArg(default=True, help="Evaluate right after each growth.")
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="Hide non-finite losses in the log; the run stops at the first one anyway."
    )
    keep_optimizer_states: bool = HfArg(
        default=False, help="Keep the optimizer state of every stage, to roll back to; by default only the last one's."
    )
    keep_checkpoints: bool = HfArg(
        default=False,
        help="Keep the checkpoints of a stage that has finished (as many as save_total_limit), for `--decay-from`.",
    )
    compile_layers: bool = HfArg(
        default=False,
        help="With torch_compile: compile each layer by itself, for fixed shapes, rather than the whole model. All "
        "layers share one compilation.",
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
        self._check_numbers()
        prepare_launch(self)
        is_muon = self.optim == MUON
        if is_muon:  # unknown to transformers
            self.optim = "adamw_torch"
        super().__post_init__()
        if is_muon:
            self.optim = MUON
        if self.device.type in ("cpu", "mps"):  # pages are pinned for copies to a GPU with memory of its own
            self.dataloader_pin_memory = False
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        for name in PER_STAGE:
            if isinstance(getattr(self, name), (int, float)):
                setattr(self, name, [getattr(self, name)])
        self._refuse_meaningless()
        self._check_files_and_packages()
        self._resolve_state_at_growth()
        optim = getattr(self.optim, "value", self.optim)
        if optim == MUON:
            parse_settings(self.optim_args)
        elif self.adamw_learning_rate is not None:
            raise RunError(f"adamw_learning_rate is for optim muon, got optim {optim}; set learning_rate instead")
        if self.optimizer_state_at_growth != "new" and optim not in {*ADAMW, MUON}:
            raise RunError(
                f"optim {optim!r} keeps a state that cannot be grown (known: {', '.join(sorted({*ADAMW, MUON}))}); "
                "set optimizer_state_at_growth to new to start it afresh in every stage"
            )

    def _resolve_state_at_growth(self) -> None:
        """Set `optimizer_state_at_growth` and its earlier name, each from the other."""
        state, carried = self.optimizer_state_at_growth, self.carry_optimizer_state
        if state is None:
            state = "carried" if carried else "new"
        if state not in STATES_AT_GROWTH:
            raise RunError(
                f"unknown optimizer_state_at_growth {state!r}{describe_alternatives(str(state), STATES_AT_GROWTH)}"
            )
        if (carried and state != "carried") or (carried is False and state == "carried"):
            raise RunError(
                f"carry_optimizer_state {str(carried).lower()} contradicts optimizer_state_at_growth {state}; "
                "leave out carry_optimizer_state, the earlier name"
            )
        self.optimizer_state_at_growth, self.carry_optimizer_state = state, state == "carried"

    def _check_numbers(self) -> None:
        for name, least in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not is_whole_number(value, least):
                bound = "" if least is None else f" of at least {least}"
                raise RunError(f"{name} must be a whole number{bound}, got {value!r}")
        for name in ("seed", "data_seed"):
            if (getattr(self, name) or 0) > LARGEST_SEED:
                raise RunError(f"{name} must be at most {LARGEST_SEED}, got {getattr(self, name)}")
        for name, limit in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not (is_finite_number(value, least=0) and value < limit):
                bound = "" if math.isinf(limit) else f" and below {limit:g}"
                raise RunError(f"{name} must be a number, at least 0{bound}, got {value!r}")

    def _check_files_and_packages(self) -> None:
        """Refuse now what the trainer would miss only once the data are ready."""
        available = get_available_reporting_integrations()
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise RunError(f"report_to {name!r} is unknown{describe_alternatives(name, INTEGRATION_TO_CALLBACK)}")
            if name not in (*available, *_NEVER_LISTED):
                raise RunError(
                    f"report_to {name!r} is not installed here; install its package, or leave report_to out"
                )
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise RunError(
                "use_liger_kernel needs the package liger-kernel (0.3 or newer), which is not installed here; install "
                "it, or leave use_liger_kernel out"
            )
        if self.use_liger_kernel and self.device.type == "cpu":
            raise RunError("use_liger_kernel needs a GPU, and training would run on the CPU; leave it out")
        if self.cost_model is not None:
            CostModel.from_yaml(self.cost_model)
        plan_shards({}, self.max_shard_size)
        if self.growth_init == "":
            raise RunError("growth_init is empty; name an init such as 'preserving', or leave it out")

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
        if self.compile_layers and not self.torch_compile:
            raise RunError("compile_layers says how torch_compile compiles; set torch_compile too, or leave it out")
        if self.lr_span not in LR_SPANS:
            raise RunError(f"lr_span must be one of {', '.join(LR_SPANS)}, got {self.lr_span!r}")
        for name in PER_STAGE:
            numbers = getattr(self, name)
            if numbers is not None and not (numbers and all(map(_is_positive, numbers))):
                raise RunError(f"{name} must be positive numbers, one for all stages or one per stage, got {numbers}")
        if self.resume_from_checkpoint is not None:
            raise RunError(
                "resume_from_checkpoint is no argument of a run: resume with `slop train --resume`, or in Python with "
                "train(resume_from_checkpoint=True)"
            )


def name_optimizer(
    args: SlopTrainingArguments, custom: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None
) -> str:
    """Return the name of the optimizer in the facts of a run; refuse arguments that it would not follow.

    Args:
        custom: `Trainer`'s argument `optimizer_cls_and_kwargs`.
    """
    if custom is None:
        optim = str(getattr(args.optim, "value", args.optim))
        return ADAMW_STATE if optim in ADAMW else optim
    optimizer, settings = custom
    if args.stage_learning_rates is not None:
        raise RunError(
            "stage_learning_rates has no effect on optimizer_cls_and_kwargs, whose own lr holds in every stage; "
            "choose the optimizer with `optim`, or leave stage_learning_rates out"
        )
    if optimizer is torch.optim.AdamW and not settings.get("amsgrad"):
        return ADAMW_STATE
    if args.optimizer_state_at_growth != "new":
        raise RunError(
            f"{optimizer.__name__} keeps a state that cannot be grown; set optimizer_state_at_growth to new to start "
            "it afresh in every stage"
        )
    return optimizer.__name__


def _is_positive(number: object) -> bool:
    return is_finite_number(number, least=0) and number != 0
