"""`RunConfig`: a whole run as one YAML file, and the trainer that it describes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast, get_type_hints

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_torch_bf16_gpu_available

from ..baselines import from_scratch
from ..data import Corpus, DataConfig, documents, load_tokenizer, prepare_data
from ..data.sources import local_files
from ..dims import ModelDims
from ..errors import DataError, RunError, SlopError
from ..growth import checkpoint_directory
from ..io.hub_address import locate
from ..io.serialization import parse, read_yaml, set_keys
from ..runs.directory import RunDirectory
from ..schedule import GrowthSchedule
from .arguments import PER_STAGE, SlopTrainingArguments
from .batches import blocks_per_step, keep_last, stage_batches
from .checks import check_growths, with_inits
from .spans import StageSpan, stage_spans
from .trainer import SlopTrainer


@dataclass(frozen=True)
class StageEvaluation:
    """What each stage of a run is scored on when it has been written; `evaluation.runs` does it.

    Args:
        tasks: `paper`, `perplexity`, or tasks of lm-eval; several with commas or as a list.
        limit, num_fewshot, batch_size, device, include_path, datasets: as for `EvalSettings`.
        after_growth: score each grown model also as it was before it was trained.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    tasks: str | tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    device: str | None = None
    include_path: str | None = None
    datasets: str | None = None
    after_growth: bool = False


@dataclass(frozen=True)
class RunConfig:
    """A run: schedule, model, data and training arguments, and what its stages are scored on.

    Args:
        schedule: the growth schedule, in place, or the path of its file.
        model: fields of the initial model's config that growth leaves alone, such as `tie_word_embeddings`
            (`model_type` is `llama` unless given); or `pretrained`, a directory or Hub id[@revision] to begin with.
            Fields beside `pretrained` say what is expected of it, so that a preview need not look it up.
        data: the corpus and how it is cut.
        training: fields of `SlopTrainingArguments`.
        evaluation: what each stage is scored on while the run trains; None, nothing. `slop train`, `slop compare` and
            `recipes/grow_1b.py` see to it; beside `build_trainer`, attach `EvaluateStages.of_run(config)`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    schedule: GrowthSchedule | str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: StageEvaluation | None = None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a run from YAML.

        Args:
            path: of the file; a `schedule` and a `mixture` given as paths are read relative to it.
            overrides: values by dotted key, such as `{"training.learning_rate": 1e-3}`.

        Raises:
            RunError: naming the file and the key at fault.
        """
        content = read_yaml(path, error=RunError) or {}
        if not isinstance(content, dict):
            raise RunError(f"{path}: expected a mapping with keys such as schedule, model, data and training")
        set_keys(content, overrides or {}, where=str(path), error=RunError)
        if isinstance(content.get("schedule"), str):
            content["schedule"] = str(Path(path).parent / content["schedule"])
        data = content.get("data")
        if isinstance(data, dict) and isinstance(data.get("mixture"), str):
            data["mixture"] = str(Path(path).parent / data["mixture"])
        return parse(cls, content, where=str(path), error=RunError)

    def with_schedule(self, schedule: GrowthSchedule | str | None) -> RunConfig:
        """The same run of another schedule; None leaves it as it is."""
        return self if schedule is None else dataclasses.replace(self, schedule=schedule)

    def read_schedule(self) -> GrowthSchedule:
        """The schedule, from its file where it is a path.

        Raises:
            RunError: where there is none.
        """
        if self.schedule is None:
            raise RunError(
                "the run has no schedule: write one into the config, or pass one made by `slop plan -o FILE`"
            )
        return GrowthSchedule.from_yaml(self.schedule) if isinstance(self.schedule, str) else self.schedule

    def arguments(self, output_dir: str | Path) -> SlopTrainingArguments:
        """The training arguments.

        Raises:
            RunError: for an unknown or unusable one.
        """
        known = [item.name for item in dataclasses.fields(SlopTrainingArguments) if item.init]
        _refuse_unknown(self.training, known, "training")
        hints = get_type_hints(SlopTrainingArguments)
        for_all = {key: [self.training[key]] for key in PER_STAGE if isinstance(self.training.get(key), (int, float))}
        given = {
            key: parse(hints[key], value, where=f"training.{key}", error=RunError)
            for key, value in {**self.training, **for_all}.items()
        }
        try:
            return SlopTrainingArguments(**{"report_to": "none", **given, "output_dir": str(output_dir)})
        except SlopError:
            raise
        except (ValueError, TypeError) as caught:
            raise RunError(f"training: {' '.join(str(caught).split())}") from None

    def model_config(self, dims: ModelDims, vocab_size: int, *, as_described: bool = False) -> PreTrainedConfig:
        """The initial model's config.

        Args:
            dims: its structure.
            vocab_size: unless the run's own fields say another.
            as_described: take the run's fields for those of a pretrained model, which is then not looked up.

        Raises:
            RunError: for an unknown field or family, a pre-trained model that cannot be read, or is not as described.
        """
        settings = dict(self.model)
        pretrained = settings.pop("pretrained", None)
        try:
            if pretrained is not None and not (as_described and settings):
                found = AutoConfig.from_pretrained(**locate(pretrained))
                for name, value in settings.items():
                    if getattr(found, name, None) != value:
                        raise RunError(
                            f"model.{name} is {value}, but {pretrained} has {getattr(found, name, None)}; leave it out"
                        )
                return found
            family = settings.pop("model_type", "llama")
            base = AutoConfig.for_model(family)
            _refuse_unknown(settings, [*base.to_dict(), "rope_theta"], "model")
            return dims.to_config(type(base)(**{"vocab_size": vocab_size, **settings}))
        except SlopError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as caught:
            raise RunError(f"model: {' '.join(str(caught).split())}") from None


def build_trainer(config: RunConfig, output_dir: str | Path, *, scratch: bool = False, **kwargs: Any) -> SlopTrainer:
    """The trainer of a run: prepares the data, makes or loads the initial model.

    Args:
        config: the run.
        output_dir: where it writes.
        scratch: train the schedule's target from random weights with the same FLOPs instead.
        kwargs: more arguments of `SlopTrainer`, such as `callbacks`.

    Raises:
        SlopError: for what cannot run, before training begins.
    """
    args = config.arguments(output_dir)
    schedule = _arm(config, scratch)
    if scratch:
        keep_last(args)
    with args.main_process_first(local=False, desc="preparing the data"):
        corpus = prepare_data(config.data)
    model = _initial_model(config, schedule, corpus, args.seed, scratch=scratch)
    return SlopTrainer(
        model,
        args,
        schedule=schedule,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        processing_class=corpus.tokenizer,
        **kwargs,
    )


def preview_run(
    config: RunConfig, output_dir: str | Path, *, scratch: bool = False, devices: int = 1
) -> tuple[StageSpan, ...]:
    """What a run would do, without doing it: the spans of its stages.

    It may be asked anywhere: a dataset on the Hub is not looked up, a tokenizer there only where neither `model` nor
    `data` tells its size, and devices that compute in bf16 are not needed.

    Args:
        config: the run.
        output_dir: where it would write.
        scratch: as for `build_trainer`.
        devices: that would share the work.

    Raises:
        SlopError: for what cannot run, as far as it shows without reading the whole corpus.
    """
    training = dict(config.training)
    if not is_torch_bf16_gpu_available():
        for name in ("bf16", "bf16_full_eval", "tf32"):  # transformers refuses them where there is no such device
            training.pop(name, None)
    args = dataclasses.replace(config, training=training).arguments(output_dir)
    schedule = with_inits(_arm(config, scratch), args.growth_init)
    if scratch:
        keep_last(args)
    if RunDirectory(output_dir).exists:
        raise RunError(f"{output_dir} holds another run; resume it or choose another output directory")
    for source in config.data.sources.values():
        if local := tuple(place for place in source.places if local_files(place) is not None):
            next(documents(dataclasses.replace(source, source=local)))  # refuses a place that is missing or empty
    model_config = config.model_config(schedule.initial, known_vocab_size(config), as_described=True)
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
            f"{model_config.max_position_embeddings}; cut shorter blocks"
        )
    blocks = blocks_per_step(args, config.data.block_size, devices, len(schedule.stages) + 1)
    stage_batches(args, blocks, devices)  # refuses a batch that the devices cannot share
    spans = stage_spans(schedule, model_config, config.data.block_size, blocks)
    check_growths(spans, model_config)
    return spans


def known_vocab_size(config: RunConfig) -> int:
    """The model's vocabulary as far as the run says it; otherwise that of its tokenizer, which is then loaded."""
    tokenizer = config.data.tokenizer
    if tokenizer is None:
        return config.data.vocab_size
    if "vocab_size" in config.model and not Path(tokenizer).exists():
        return config.model["vocab_size"]
    return len(load_tokenizer(tokenizer))


def _arm(config: RunConfig, scratch: bool) -> GrowthSchedule:
    schedule = config.read_schedule()
    if not scratch:
        return schedule
    model_config = config.model_config(schedule.initial, config.data.vocab_size, as_described=True)
    return from_scratch(schedule, model_config, config.data.block_size)


def _pretrained_model(source: str) -> PreTrainedModel:
    try:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(checkpoint_directory(source), dtype="auto"))
    except OSError as caught:
        reason = str(caught).strip().partition("\n")[0]
        raise RunError(f"model.pretrained {source} cannot be loaded ({reason}); it has to have safetensors") from None


def _initial_model(
    config: RunConfig, schedule: GrowthSchedule, corpus: Corpus, seed: int, *, scratch: bool
) -> PreTrainedModel:
    model_config = config.model_config(schedule.initial, len(corpus.tokenizer))
    pretrained = config.model.get("pretrained")
    if pretrained is not None and not scratch:
        return _pretrained_model(pretrained)
    model_config = schedule.initial.to_config(model_config)  # a pretrained one's, where its target begins from scratch
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model_config, name, getattr(corpus.tokenizer, name))
    set_seed(seed)
    if is_deepspeed_zero3_enabled():
        from . import zero3

        return zero3.random_model(model_config)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(model_config))


def _refuse_unknown(given: Iterable[str], known: list[str], section: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise RunError(f"{section}: unknown key {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
