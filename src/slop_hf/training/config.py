"""`RunConfig`: a whole run as one YAML file, and the trainer that it describes."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_torch_bf16_gpu_available
from typing_extensions import Self

from ..baselines import from_scratch
from ..data import Corpus, DataConfig, load_tokenizer, prepare_data, read_documents
from ..data.sources import list_local_files
from ..dims import ModelDims
from ..errors import DataError, RunError, SlopError
from ..growth import find_checkpoint_directory
from ..io.hub_address import locate
from ..io.model_errors import NEEDS_CODE, explain_load_error
from ..io.record import Record
from ..io.serialization import Json, parse, read_yaml, set_keys
from ..runs.directory import RunDirectory
from ..schedule import GrowthSchedule
from .arguments import SlopTrainingArguments
from .batches import PER_STAGE, keep_last_stage
from .ranks import Ranks
from .run_plan import plan_run, with_inits
from .spans import StageSpan
from .trainer import SlopTrainer


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


@dataclass(frozen=True)
class StageEvaluation(EvalOptions, Record, error=RunError):
    """Section `evaluation` of a run's file: how each stage is scored when it has finished.

    Args:
        after_growth: whether to score each grown model also before it is trained.
    """

    after_growth: bool = False


@dataclass(frozen=True)
class RunConfig(Record, error=RunError):
    """The configuration of a run: schedule, model, data, training arguments and evaluation.

    Args:
        schedule: growth schedule, or the path of its YAML file.
        model: settings of the initial model's config that growth does not change, such as `tie_word_embeddings`;
            `model_type` is `llama` by default. Or `pretrained`: the directory or Hub id[@revision] of a model to begin
            with. Settings next to `pretrained` are what is expected of that model, so that a preview need not load it.
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

        Args:
            path: the file; if its `schedule` or `mixture` is a path, that path is relative to the file.
            overrides: values by dotted key, such as `{"training.learning_rate": 1e-3}`.

        Raises:
            RunError: naming the file and the faulty key.
        """
        content = read_yaml(path, error=RunError) or {}
        if not isinstance(content, dict):
            raise RunError(f"{path}: expected a mapping with keys such as schedule, model, data and training")
        set_keys(content, overrides or {}, where=str(path), error=RunError)
        folder = Path(path).parent
        if isinstance(content.get("schedule"), str):
            content["schedule"] = str(folder / content["schedule"])
        data = content.get("data")
        if isinstance(data, dict) and isinstance(data.get("mixture"), str):
            data["mixture"] = str(folder / data["mixture"])
        return cls.from_plain(content, str(path))

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

    def arguments(self, output_dir: str | Path) -> SlopTrainingArguments:
        """Return the training arguments.

        Raises:
            RunError: for an unknown argument, or an invalid value.
        """
        names = [item.name for item in dataclasses.fields(SlopTrainingArguments) if item.init]
        _refuse_unknown(self.training, names, "training")
        hints = get_type_hints(SlopTrainingArguments)
        for_all = {key: [self.training[key]] for key in PER_STAGE if isinstance(self.training.get(key), (int, float))}
        values = {
            key: parse(hints[key], value, where=f"training.{key}", error=RunError)
            for key, value in {**self.training, **for_all}.items()
        }
        try:
            return SlopTrainingArguments(**{"report_to": "none", **values, "output_dir": str(output_dir)})
        except SlopError:
            raise
        except (ValueError, TypeError) as caught:
            raise RunError(f"training: {' '.join(str(caught).split())}") from None

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
        try:
            if pretrained is not None and not (as_described and settings):
                config = _load_config(pretrained)
                for name, value in settings.items():
                    actual = getattr(config, name, None)
                    if actual != value:
                        raise RunError(f"model.{name} is {value}, but {pretrained} has {actual}; leave it out")
                return config
            family = settings.pop("model_type", "llama")
            base = AutoConfig.for_model(family)
            _refuse_unknown(settings, [*base.to_dict(), "rope_theta"], "model")
            return dims.to_config(type(base)(**{"vocab_size": vocab_size, **settings}))
        except SlopError:
            raise
        except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as caught:
            raise RunError(f"model: {' '.join(str(caught).split())}") from None


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
    corpus = _prepare_data_in_turn(config.data, Ranks.from_args(args))
    model = _build_initial_model(config, schedule, corpus, args.seed, scratch=scratch)
    return SlopTrainer(
        model,
        args,
        schedule=schedule,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        processing_class=corpus.tokenizer,
        **kwargs,
    )


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
    config: RunConfig, output_dir: str | Path, *, scratch: bool = False, devices: int = 1
) -> tuple[StageSpan, ...]:
    """Return the stages that a run would train, without training.

    A preview needs no network and no GPU: data sets on the Hub are not looked up, a tokenizer there only if neither
    `model` nor `data` gives the vocabulary's size, and bf16 is accepted without a device that computes in it.

    Args:
        scratch: as for `build_trainer`.
        devices: number of devices that would share the work.

    Raises:
        SlopError: if the run cannot be trained, as far as that can be seen without reading the whole corpus.
    """
    training = dict(config.training)
    if not is_torch_bf16_gpu_available():
        for name in ("bf16", "bf16_full_eval", "tf32"):  # transformers refuses them without such a device
            training.pop(name, None)
    args = dataclasses.replace(config, training=training).arguments(output_dir)
    schedule = with_inits(_read_schedule(config, args, scratch=scratch), args.growth_init)
    if RunDirectory(output_dir).exists:
        raise RunError(f"{output_dir} holds another run; resume it or choose another output directory")
    for source in config.data.sources.values():
        if local := tuple(place for place in source.places if list_local_files(place) is not None):
            next(read_documents(dataclasses.replace(source, source=local)))  # refuses missing and empty places
    model_config = config.model_config(schedule.initial, find_vocab_size(config), as_described=True)
    if scratch:
        model_config = schedule.initial.to_config(model_config)
    dims = ModelDims.from_config(model_config)
    if dims != schedule.initial:
        raise RunError(
            f"the pretrained model has {dims}, the schedule begins with {schedule.initial}; plan from this model"
        )
    if config.data.block_size > model_config.max_position_embeddings:
        raise DataError(
            f"block_size {config.data.block_size} is above the model's max_position_embeddings "
            f"{model_config.max_position_embeddings}; use shorter blocks"
        )
    return plan_run(schedule, args, model_config, block_size=config.data.block_size, devices=devices).spans


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
            return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
        except (OSError, ValueError) as caught:
            reason = explain_load_error(caught)
            raise RunError(
                f"model.pretrained {pretrained} cannot be loaded ({reason}); it must have safetensors"
            ) from None
    model_config = schedule.initial.to_config(model_config)  # from scratch, a pretrained model has other dims
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model_config, name, getattr(corpus.tokenizer, name))
    set_seed(seed)
    if is_deepspeed_zero3_enabled():
        from . import zero3

        return zero3.build_random_model(model_config)
    return AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)


def _load_config(pretrained: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(**locate(pretrained), trust_remote_code=False)
    except ValueError as caught:
        if (reason := explain_load_error(caught)) == NEEDS_CODE:
            raise RunError(f"model.pretrained {pretrained} cannot be loaded: {reason}; give a stock model") from None
        raise


def _refuse_unknown(names: Iterable[str], known: list[str], section: str) -> None:
    if unknown := [name for name in names if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise RunError(f"{section}: unknown key {unknown[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
