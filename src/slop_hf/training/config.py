"""`RunConfig`: a whole run as one YAML file, and the trainer that it describes."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torch_bf16_gpu_available
from typing_extensions import Self

from ..architectures import ARCHITECTURES
from ..baselines import from_scratch
from ..data import Corpus, DataConfig, load_tokenizer, prepare_data, read_documents
from ..data.config import STDLIB, find_places
from ..data.order import list_first_batches
from ..data.sources import list_local_files
from ..dims import ModelDims
from ..errors import DataError, EvaluationError, RunError, SlopError
from ..growth import find_checkpoint_directory, grow_model, measure_expert_utility, plan_growth
from ..growth.experts import make_equal_utility
from ..io.files import check_output, find_near
from ..io.hub_address import Address, locate
from ..io.hub_client import read_hub
from ..io.model_errors import explain_load_error
from ..io.numbers import is_finite_number, is_whole_number, require_whole_number
from ..io.record import Record
from ..io.serialization import Json, describe_alternatives, describe_unknown_key, parse, read_yaml, set_keys
from ..operators import EXPERTS
from ..runs.directory import RunDirectory, RunFacts
from ..schedule import GrowthSchedule
from .arguments import SlopTrainingArguments
from .batches import PER_STAGE, keep_last_stage
from .checks import HALF_PRECISION
from .learning_rate import check_scheduler, compute_end_rate, compute_rates
from .muon import MUON
from .ranks import Ranks
from .run_plan import plan_run, with_inits
from .spans import StageSpan
from .trainer import SlopTrainer

DEFAULT_FAMILY = "llama"
#: Keys that may be paths of existing files, by section; those of the data are in `data.config`.
_PATHS = {
    "": ("schedule",),
    "model": ("pretrained",),
    "training": ("cost_model", "deepspeed"),
    "evaluation": ("include_path", "datasets"),
}
_DTYPES = ("float32", "float64")
#: Arguments that transformers refuses without a GPU, or one that computes in bf16.
_FOR_GPUS = ("bf16", "bf16_full_eval", "tf32", "use_liger_kernel")
#: The message of transformers' enumerations.
_UNKNOWN_CHOICE = re.compile(r"(.+) is not a valid \w+, please select one of \[(.+)\]")
_QUOTED = re.compile(r"'([^']+)'")


@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation that a YAML file can give; `EvalSettings` describes them."""

    tasks: str | tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    device: str | None = None
    include_path: str | Path | None = None
    datasets: str | Path | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            require_whole_number(self.limit, "limit", error=EvaluationError)
        if self.num_fewshot is not None:
            require_whole_number(self.num_fewshot, "num_fewshot", least=0, error=EvaluationError)
        if self.batch_size != "auto" and not is_whole_number(self.batch_size, least=1):
            raise EvaluationError(f"batch_size must be 'auto', or a whole number, 1 or more, got {self.batch_size!r}")
        for name, value in self.directories.items():
            if not value.is_dir():
                raise EvaluationError(f"{name} {value}: no such directory")

    @property
    def directories(self) -> Mapping[str, Path]:
        """The given ones of `include_path` and `datasets`, as absolute paths."""
        directories = {"include_path": self.include_path, "datasets": self.datasets}
        return {name: Path(value).expanduser().absolute() for name, value in directories.items() if value is not None}


@dataclass(frozen=True)
class StageEvaluation(EvalOptions, Record, error=RunError):
    """Section `evaluation` of a run's file: how each stage is scored when it has finished.

    Args:
        after_growth: whether to score each grown model also before it is trained.
    """

    after_growth: bool = False


@dataclass(frozen=True)
class ExpertOptions(Record, error=RunError):
    """Key `experts` of the section `model`: experts that the pretrained model gets before the run begins.

    Args:
        num_experts, num_experts_per_tok, moe_intermediate_size, init: as for the operator "experts" of `grow_model`.
        probe_blocks: number of the run's first training blocks on which the utility of each expert is measured, so
            that those with the highest are copied most often; 0 copies all equally often.

    Raises:
        RunError: if `probe_blocks` is negative.
    """

    num_experts: int
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    init: str | None = None
    probe_blocks: int = 0

    def __post_init__(self) -> None:
        require_whole_number(self.probe_blocks, "probe_blocks", least=0, error=RunError)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes for `grow_model`."""
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class RunConfig(Record, error=RunError):
    """The configuration of a run: schedule, model, data, training arguments and evaluation.

    Args:
        schedule: growth schedule, or the path of its YAML file.
        model: settings of the initial model's config that growth does not change, such as `tie_word_embeddings`;
            `model_type` is `llama` by default. Or `pretrained`: the directory or Hub id[@revision] of a model to begin
            with. Settings next to `pretrained` are what is expected of that model, so that a preview need not load it.
            `attn_implementation` names the attention kernel of every stage's model, such as `sdpa`. `experts` next to
            `pretrained` gives that model experts, or more of them, before the run begins (`ExpertOptions`).
        data: training data.
        training: fields of `SlopTrainingArguments`.
        evaluation: what each stage is scored on during the run; None for nothing. `slop_hf.train_run` does it; next to
            `build_trainer`, attach `EvaluateStages.of_run(config)` yourself.
    """

    schedule: GrowthSchedule | str | None = None
    model: dict[str, Json] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, Json] = field(default_factory=dict)
    evaluation: StageEvaluation | None = None

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Mapping[str, Json] | None = None) -> Self:
        """Read a run from a YAML file.

        A relative path in it belongs to something next to the file, or else in the working directory.

        Args:
            path: the file.
            overrides: values by dotted key, such as `{"training.learning_rate": 1e-3}`. Their relative paths are
                looked for in the working directory first.

        Raises:
            RunError: naming the file and the faulty key.
        """
        content = read_yaml(path, error=RunError)
        if content is None:
            content = {}
        return cls.from_content(content, overrides or {}, where=str(path), folder=Path(path).parent)

    @classmethod
    def from_content(cls, content: Json, overrides: Mapping[str, Json], *, where: str, folder: Path) -> Self:
        """Build a run from the content of a file, or of a section of one, as `from_yaml` does.

        Args:
            content: content of the file, which is changed.
            overrides: as for `from_yaml`.
            where: name of the file, for error messages.
            folder: folder of the file.

        Raises:
            RunError: naming the file and the faulty key.
        """
        if not isinstance(content, dict):
            raise RunError(f"{where}: expected a mapping with keys such as schedule, model, data and training")
        _find_files(content, folder)
        set_keys(content, overrides, where=where, error=RunError)
        _find_files(content, folder, working_first=True)
        data = content.get("data")
        if data is None or (isinstance(data, dict) and not data.keys() & {"source", "mixture"}):
            raise RunError(
                f"{where}: it names no training data; give data.source ({STDLIB}, a local file or folder, a URL or a "
                "Hub dataset) or data.mixture"
            )
        return cls.from_plain(content, where)

    def with_schedule(self, schedule: GrowthSchedule | str | None) -> RunConfig:
        """Return the run with another schedule; None changes nothing."""
        return self if schedule is None else dataclasses.replace(self, schedule=schedule)

    def read_schedule(self) -> GrowthSchedule:
        """Return the schedule, reading its file if it is a path.

        Raises:
            RunError: if the run has no schedule.
        """
        if self.schedule is None:
            raise RunError(
                "the run has no schedule: write one into the config, or pass one made by `slop plan -o FILE`"
            )
        return GrowthSchedule.from_yaml(self.schedule) if isinstance(self.schedule, str) else self.schedule

    @property
    def attention(self) -> str | None:
        """Name of the attention kernel; None for transformers' default."""
        return cast("str | None", self.model.get("attn_implementation"))

    @property
    def experts(self) -> ExpertOptions | None:
        """Experts that the pretrained model gets before the run begins; None if it begins as it is.

        Raises:
            RunError: for unknown keys, or without a pretrained model.
        """
        if "experts" not in self.model:
            return None
        if "pretrained" not in self.model:
            raise RunError(
                "model.experts grows a pretrained model; give model.pretrained, or else the numbers of a family with "
                "experts, such as model_type: mixtral and num_local_experts"
            )
        return ExpertOptions.from_plain(self.model["experts"], "model.experts")

    def parse_training(self) -> dict[str, Json]:
        """Return the section `training` with the types of `SlopTrainingArguments`.

        Raises:
            RunError: for an unknown argument, or a value of another type.
        """
        names = [item.name for item in dataclasses.fields(SlopTrainingArguments) if item.init]
        _refuse_unknown(self.training, names, "training")
        if "output_dir" in self.training:
            raise RunError("training.output_dir: `slop train -o DIR` names the run directory; leave this key out")
        hints = get_type_hints(SlopTrainingArguments)
        for_all = {key: [self.training[key]] for key in PER_STAGE if isinstance(self.training.get(key), (int, float))}
        return {
            key: parse(hints[key], value, where=f"training.{key}", error=RunError)
            for key, value in {**self.training, **for_all}.items()
        }

    def arguments(self, output_dir: str | Path) -> SlopTrainingArguments:
        """Return the training arguments.

        Raises:
            RunError: for an unknown argument, or an invalid value.
        """
        values = self.parse_training()
        try:
            return SlopTrainingArguments(**{"report_to": "none", **values, "output_dir": str(output_dir)})
        except SlopError as caught:
            raise type(caught)(f"training: {caught}") from None
        except (ValueError, TypeError) as caught:
            known = _describe_unknown_choice(caught, values) or _describe_missing_gpu(values)
            raise RunError(known or f"training: {_summarise(caught)}") from None

    def model_config(self, dims: ModelDims, vocab_size: int, *, as_described: bool = False) -> PreTrainedConfig:
        """Return the config of the initial model.

        Args:
            vocab_size: size of its vocabulary, unless the run's own settings give one.
            as_described: whether to use the run's settings instead of loading the pretrained model's config.

        Raises:
            RunError: for an unknown setting or family, or if the pretrained model cannot be read or is not as
                described.
        """
        settings = dict(self.model)
        pretrained = settings.pop("pretrained", None)
        _check_model_settings(pretrained, settings)
        settings.pop("attn_implementation", None)
        settings.pop("experts", None)
        experts = self.experts
        try:
            if pretrained is not None and (experts is not None or not (as_described and settings)):
                config = _load_config(pretrained)
                for name, value in settings.items():
                    actual = getattr(config, name, None)
                    if actual != value:
                        raise RunError(f"model.{name} is {value}, but {pretrained} has {actual}; leave it out")
                if experts is not None:
                    utility = make_equal_utility(config) if experts.probe_blocks else None
                    growth = plan_growth(config, EXPERTS, experts.sizes, init=experts.init, utility=utility)
                    config = growth.config()
            else:
                base = AutoConfig.for_model(settings.pop("model_type", DEFAULT_FAMILY))
                known = [*base.to_dict(), *base.attribute_map, "rope_theta", "attn_implementation"]
                _refuse_unknown(settings, known, "model")
                config = dims.to_config(type(base)(**{"vocab_size": vocab_size, **settings}))
            return _set_attention(config, self.attention)
        except SlopError:
            raise
        except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as caught:
            raise RunError(f"model: {_summarise(caught)}") from None


def build_trainer(config: RunConfig, output_dir: str | Path, *, scratch: bool = False, **kwargs: Any) -> SlopTrainer:
    """Return the trainer of a run, after preparing the data and building or loading the initial model.

    Args:
        scratch: whether to train the schedule's target from random weights with the same FLOPs instead.
        kwargs: further arguments of `SlopTrainer`, such as `callbacks`.

    Raises:
        SlopError: before training begins, if the run cannot be trained.
    """
    args = config.arguments(output_dir)
    schedule = _read_schedule(config, args, scratch=scratch)
    check_output(output_dir, "run directory", RunError, is_directory=True)
    if config.experts is not None and is_deepspeed_zero3_enabled():
        raise RunError(
            "model.experts grows the whole model on each rank, and under ZeRO-3 a rank holds a part; grow it before "
            "the run with `slop grow PRETRAINED --experts N -o DIR`, and set model.pretrained to DIR"
        )
    _check_attention(_preview_model(config, schedule, scratch=scratch), config.attention)
    corpus = _prepare_data_in_turn(config.data, Ranks.from_args(args))
    model = _build_initial_model(config, schedule, corpus, args.seed, scratch=scratch)
    if config.experts is not None and not scratch:
        model = _grow_experts(model, config.experts, corpus, args)
    return SlopTrainer(
        model,
        args,
        schedule=schedule,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        processing_class=corpus.tokenizer,
        **kwargs,
    )


def _grow_experts(
    model: PreTrainedModel, experts: ExpertOptions, corpus: Corpus, args: SlopTrainingArguments
) -> PreTrainedModel:
    """Return the pretrained model with its new experts, the same on all ranks."""
    utility = None
    if experts.probe_blocks:
        data_seed = args.seed if args.data_seed is None else args.data_seed
        batches = list_first_batches(corpus.train, experts.probe_blocks, data_seed)
        # The sums of a GPU may differ between ranks in their last digits, and with them the order of two experts.
        utility = Ranks.from_args(args).from_first(measure_expert_utility(model, batches))
    seed, noise = args.growth_seed, args.growth_noise
    return grow_model(model, EXPERTS, experts.sizes, init=experts.init, seed=seed, noise=noise, utility=utility)


def _prepare_data_in_turn(config: DataConfig, ranks: Ranks) -> Corpus:
    """Prepare the data on the first rank; then the others read the cache, or fill the one of their machine.

    An empty cache may take hours to fill, so the ranks wait for each other without a timeout.
    """
    corpus: Corpus | None = None
    error: Exception | None = None
    for is_my_turn in (ranks.is_first, not ranks.is_first):
        if is_my_turn:
            try:
                corpus = prepare_data(config)
            except Exception as caught:
                error = caught
        ranks.wait_without_timeout("to prepare the data")
        ranks.raise_any(error)
    assert corpus is not None
    return corpus


def preview_run(
    config: RunConfig, output_dir: str | Path, *, scratch: bool = False, devices: int = 1, check_texts: bool = True
) -> tuple[StageSpan, ...]:
    """Return the stages that a run would train, without training.

    A preview needs no network and no GPU: data sets on the Hub are not looked up, a tokenizer there only if neither
    `model` nor `data` gives the vocabulary's size; bf16 is accepted without a device that computes in it, and so are
    kernels that are not installed.

    Args:
        scratch: as for `build_trainer`.
        devices: number of devices that would share the work.
        check_texts: whether to look up local files, which takes seconds for a folder of many.

    Raises:
        SlopError: if the run cannot be trained, as far as that can be seen without reading the whole corpus.
    """
    check_output(output_dir, "run directory", RunError, is_directory=True)
    args = _build_preview_arguments(config, output_dir)
    schedule = with_inits(_read_schedule(config, args, scratch=scratch), args.growth_init)
    if RunDirectory(output_dir).exists:
        raise RunError(f"{output_dir} holds another run; resume it or choose another output directory")
    for source in config.data.sources.values() if check_texts else ():
        if local := tuple(place for place in source.places if list_local_files(place) is not None):
            next(read_documents(dataclasses.replace(source, source=local)))  # refuses missing and empty places
    model_config = _preview_model(config, schedule, scratch=scratch)
    plan = plan_run(schedule, args, model_config, block_size=config.data.block_size, devices=devices)
    check_scheduler(args, plan.spans)
    return plan.spans


class RatePreview(NamedTuple):
    """The learning rates of a run.

    Args:
        spans: its stages, in whole steps.
        rates: learning rate at each step of each stage.
        end_rate: learning rate that its last schedule ends with, as a share of the peak.
    """

    spans: tuple[StageSpan, ...]
    rates: list[list[float]]
    end_rate: float


def preview_rates(config: RunConfig, *, begun: RunFacts | None = None) -> RatePreview:
    """Return the stages that a run would train, and its learning rates.

    Args:
        begun: facts of the run if it has begun: it keeps its batches.

    Raises:
        SlopError: if the schedule, the model's config or the training arguments are wrong.
    """
    args = _build_preview_arguments(config, "preview")
    schedule = with_inits(_read_schedule(config, args, scratch=False), args.growth_init)
    model_config = _preview_model(config, schedule, scratch=False)
    plan = plan_run(schedule, args, model_config, block_size=config.data.block_size, devices=1, begun=begun)
    return RatePreview(plan.spans, compute_rates(args, plan.spans, plan.rates), compute_end_rate(args, plan.spans))


def _build_preview_arguments(config: RunConfig, output_dir: str | Path) -> SlopTrainingArguments:
    """Return the training arguments, without a precision that only another machine has."""
    config.parse_training()
    training = dict(config.training)
    if not is_torch_bf16_gpu_available():
        for name in _FOR_GPUS:
            training.pop(name, None)
    return dataclasses.replace(config, training=training).arguments(output_dir)


def _preview_model(config: RunConfig, schedule: GrowthSchedule, *, scratch: bool) -> PreTrainedConfig:
    """Return the config of the initial model as the run describes it; refuse one that does not fit the schedule."""
    model_config = config.model_config(schedule.initial, find_vocab_size(config), as_described=True)
    if scratch:
        model_config = schedule.initial.to_config(model_config)
    dims = ModelDims.from_config(model_config)
    if dims != schedule.initial:
        raise RunError(
            f"the pretrained model has {dims}, the schedule begins with {schedule.initial}; plan from this model"
        )
    if mismatch := schedule.find_mismatch(model_config):
        raise RunError(mismatch)
    if "flash" in (config.attention or "") and not any(config.training.get(name) for name in ("bf16", "fp16")):
        raise RunError(
            f"model.attn_implementation {config.attention} computes in half precision only; set training.bf16, or "
            "take sdpa"
        )
    if config.data.block_size > model_config.max_position_embeddings:
        raise DataError(
            f"block_size {config.data.block_size} is above the model's max_position_embeddings "
            f"{model_config.max_position_embeddings}; use shorter blocks"
        )
    return _set_attention(model_config, config.attention)


def _set_attention(config: PreTrainedConfig, attention: str | None) -> PreTrainedConfig:
    """Set the attention kernel of a new config, which does not follow from its settings; None changes nothing."""
    if attention is not None:
        config._attn_implementation = attention
    return config


def _check_attention(config: PreTrainedConfig, attention: str | None) -> None:
    """Refuse an attention kernel that is not installed here, or that the family does not have.

    transformers decides on that when it builds a model; here it builds one without memory for its weights.
    """
    if attention is None:
        return
    try:
        with no_init_weights(), torch.device("meta"):
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config))
    except (ImportError, ValueError) as caught:
        reason = _summarise(caught).rpartition("following error: ")[2]
        raise RunError(
            f"model.attn_implementation {attention} cannot be used here: {reason} Install what it needs, or take sdpa"
        ) from None


def find_vocab_size(config: RunConfig) -> int:
    """Return the size of the vocabulary, from the run's settings if they give it, else by loading the tokenizer."""
    tokenizer = config.data.tokenizer
    if tokenizer is None:
        return config.data.vocab_size
    if "vocab_size" in config.model and not Path(tokenizer).exists():
        return cast(int, config.model["vocab_size"])  # `model_config` refuses anything else
    return len(load_tokenizer(tokenizer))


def _read_schedule(config: RunConfig, args: SlopTrainingArguments, *, scratch: bool) -> GrowthSchedule:
    """Return the run's schedule; from scratch, a schedule of the target alone, with the last stage's arguments."""
    schedule = config.read_schedule()
    family = ARCHITECTURES.get(str(config.model.get("model_type", DEFAULT_FAMILY)))
    sizes = schedule.initial.as_dict()
    own_names = {own: sizes[name] for name, own in family.config_fields.items() if name in sizes} if family else {}
    for name, size in {**sizes, **own_names}.items():
        if config.model.get(name, size) != size:
            raise RunError(
                f"model.{name} is {config.model[name]!r}, but the schedule decides on sizes, and begins with {size}; "
                f"leave model.{name} out"
            )
    if not scratch:
        return schedule
    keep_last_stage(args)
    model_config = config.model_config(schedule.initial, config.data.vocab_size, as_described=True)
    return from_scratch(schedule, model_config, config.data.block_size)


def _build_initial_model(
    config: RunConfig, schedule: GrowthSchedule, corpus: Corpus, seed: int, *, scratch: bool
) -> PreTrainedModel:
    model_config = config.model_config(schedule.initial, len(corpus.tokenizer))
    if (pretrained := config.model.get("pretrained")) is not None and not scratch:
        directory = find_checkpoint_directory(pretrained)
        try:
            kernel = {} if config.attention is None else {"attn_implementation": config.attention}
            model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False, **kernel)
            # DeepSpeed keeps float32 masters; without it, half of AdamW's small updates would be rounded away.
            is_half = model.dtype in HALF_PRECISION and not is_deepspeed_zero3_enabled()
            return model.float() if is_half else model
        except (OSError, ValueError) as caught:
            reason = explain_load_error(caught)
            raise RunError(
                f"model.pretrained {pretrained} cannot be loaded ({reason}); it must have safetensors"
            ) from None
    # From scratch, a pretrained model has other dims.
    model_config = _set_attention(schedule.initial.to_config(model_config), config.attention)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model_config, name, getattr(corpus.tokenizer, name))
    set_seed(seed)
    if is_deepspeed_zero3_enabled():
        from . import zero3

        return zero3.build_random_model(model_config)
    return AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)


def _load_config(pretrained: str) -> PreTrainedConfig:
    try:
        return read_hub(
            lambda: AutoConfig.from_pretrained(**locate(pretrained), trust_remote_code=False), f"reading {pretrained}"
        )
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as caught:
        reason = explain_load_error(caught)
        raise RunError(f"model.pretrained {pretrained} cannot be loaded: {reason}; give a stock model") from None


def _find_files(content: dict[str, Json], folder: Path, *, working_first: bool = False) -> None:
    """Replace relative paths in the content of a run's file as `find_near` does, in place."""
    find_places(content.get("data"), folder, working_first=working_first)
    for section, names in _PATHS.items():
        values: Json = content.get(section) if section else content
        for name in names if isinstance(values, dict) else ():
            if isinstance(values.get(name), str):
                values[name] = find_near(values[name], folder, working_first=working_first)


def _check_model_settings(pretrained: Json, settings: Mapping[str, Json]) -> None:
    """Refuse families without an axis table, and values that transformers would accept and training would not."""
    family = settings.get("model_type", DEFAULT_FAMILY)
    if not isinstance(family, str) or family not in ARCHITECTURES:
        known = describe_alternatives(str(family), ARCHITECTURES)
        raise RunError(f"model.model_type {family!r} cannot be grown{known}")
    for name in ("vocab_size", "max_position_embeddings"):
        if name in settings and not is_whole_number(settings[name], 1):
            raise RunError(f"model.{name} must be a whole number of at least 1, got {settings[name]!r}")
    for name, value in settings.items():
        if name.endswith("_dropout") and not (is_finite_number(value, 0) and value < 1):
            raise RunError(f"model.{name} must be a number from 0 on and below 1, got {value!r}")
    if pretrained is None and (dtype := settings.get("dtype")) not in (None, *_DTYPES):
        raise RunError(
            f"model.dtype must be {' or '.join(_DTYPES)}, got {dtype!r}: AdamW's small updates need precise "
            "weights; for faster arithmetic set training.bf16"
        )
    attention = settings.get("attn_implementation")
    kernels = sorted({"eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)})
    if attention is not None and attention not in kernels:
        alternatives = describe_alternatives(str(attention), kernels)
        raise RunError(f"model.attn_implementation {attention!r} is unknown{alternatives}")
    activation = settings.get("hidden_act")
    if activation is not None and activation not in ACT2FN:
        raise RunError(f"model.hidden_act {activation!r} is unknown{describe_alternatives(str(activation), ACT2FN)}")
    if pretrained is None:
        return
    if not isinstance(pretrained, str) or not pretrained:
        raise RunError(f"model.pretrained must be a model directory or a Hub id[@revision], got {pretrained!r}")
    if not Path(pretrained).exists() and Address.find(pretrained) is None:
        raise RunError(f"model.pretrained {pretrained}: no such directory, and not a Hub id; correct the path")
    if (Path(pretrained) / "adapter_config.json").is_file():
        raise RunError(
            f"model.pretrained {pretrained} holds adapters of peft, and a run trains stock models only; "
            "merge them into the model (merge_and_unload), and save it without them"
        )


def _refuse_unknown(names: Iterable[str], known: Iterable[str], section: str) -> None:
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise RunError(f"{section}: {describe_unknown_key(str(unknown[0]), known, list_known=False)}")


def _describe_unknown_choice(caught: Exception, values: Mapping[str, Json]) -> str | None:
    """Return a message that names the argument, if transformers does not know its value; it lists all it knows."""
    if (match := _UNKNOWN_CHOICE.fullmatch(str(caught))) is None:
        return None
    value, known = match[1], _QUOTED.findall(match[2])
    name = next((name for name in values if str(values[name]) == value), "")
    known += [MUON] if name == "optim" else []
    return f"training.{name}: {value!r} is unknown{describe_alternatives(value, known)}"


def _describe_missing_gpu(values: Mapping[str, Json]) -> str | None:
    """Return a message if a run asks for bfloat16, as those planned for GPUs do, on a machine without such a GPU."""
    if not values.get("bf16") or values.get("use_cpu") or is_torch_bf16_gpu_available():
        return None
    return (
        "training.bf16 needs a GPU that computes in bfloat16, and this machine has none: --set training.bf16=false "
        "trains in float32"
    )


def _summarise(caught: Exception) -> str:
    line = " ".join(str(caught).split())
    return re.sub(r"^Validation error for field '\w+': \w+Error: Field ", "", line)  # of transformers' configs
