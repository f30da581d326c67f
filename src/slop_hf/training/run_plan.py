"""`RunPlan`: a run laid out in stages, steps, batches and learning rates before it begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from transformers.utils import logging

from ..dims import ModelConfig, ModelDims
from ..growth import plan_growth, resolve_inits
from ..io.serialization import Json
from ..operators import get_operator
from ..runs.directory import RunFacts
from ..schedule import GrowthSchedule
from .arguments import SlopTrainingArguments
from .batches import Batches, count_blocks_per_step, resolve_per_stage, share_batches
from .muon import MUON, parse_settings
from .settings import describe_settings
from .spans import StageSpan, compute_stage_spans

logger = logging.get_logger(__name__)

#: Entries of a config that say nothing about the function of the model, or that the tokenizer decides on.
_INCIDENTAL = {
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_hidden_states", "output_attentions", "return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
}


@dataclass(frozen=True)
class RunPlan:
    """Every decision about a run that is made before its first step; built by `plan_run`.

    Args:
        schedule: growth schedule, with its inits.
        facts: facts that must not change when the run is resumed.
        spans: position of each stage on the axes of steps, blocks, tokens and FLOPs.
        batches: batch of one device in each stage.
        rates: peak learning rate of each stage.
        settings: settings that may change when the run is resumed (see `training.settings`).
    """

    schedule: GrowthSchedule
    facts: RunFacts
    spans: tuple[StageSpan, ...]
    batches: tuple[Batches, ...]
    rates: tuple[float, ...]
    settings: dict[str, Json] = field(default_factory=dict)

    @property
    def end_step(self) -> int:
        """The global step at which the run ends."""
        return self.spans[-1].end_step


def plan_run(
    schedule: GrowthSchedule,
    args: SlopTrainingArguments,
    config: ModelConfig,
    *,
    block_size: int,
    devices: int,
    blocks: int = 0,
    data: str = "",
    vocabulary: str = "",
    sample: str = "",
    optimizer: str = "",
    dtype: str = "",
    begun: RunFacts | None = None,
    strategy: str = "replicated",
) -> RunPlan:
    """Lay out a run, and refuse arguments that do not fit the schedule or the devices.

    Args:
        schedule: growth schedule, with its inits (see `with_inits`).
        config: config of the initial model.
        block_size: tokens per training block.
        blocks: number of blocks of the training data; 0 if unknown, as in a preview.
        data: fingerprint of the training data; "" if unknown.
        vocabulary, sample, optimizer, dtype: as in `RunFacts`; "" if unknown.
        begun: facts of the run if it has begun: it keeps its batches on any number of devices.
        strategy: how the devices hold the model (see `describe_settings`).
    """
    stages = len(schedule.structures)
    per_step = count_blocks_per_step(args, block_size, devices, stages)
    if begun is not None:
        if args.batch_tokens is not None and per_step != begun.batches(stages):
            logger.warning(f"batch_tokens {args.batch_tokens} is ignored: the run began with another batch")
        per_step = begun.batches(stages)
    newton_schulz = parse_settings(args.optim_args)["ns_steps"] if (optimizer or args.optim) == MUON else 0
    spans = compute_stage_spans(schedule, config, block_size, per_step, newton_schulz_steps=newton_schulz)
    batches = share_batches(args, per_step, devices)
    rates = resolve_per_stage(args.stage_learning_rates, args.learning_rate, stages, "stage_learning_rates")
    seed = args.seed if args.data_seed is None else args.data_seed
    facts = RunFacts(
        block_size=block_size,
        blocks=blocks,
        blocks_per_step=tuple(per_step),
        data_seed=seed,
        data=data,
        vocabulary=vocabulary,
        sample=sample,
        seed=args.seed,
        growth_seed=args.growth_seed,
        growth_noise=args.growth_noise,
        growth_init=args.growth_init,
        carry_optimizer_state=args.carry_optimizer_state,
        optimizer_state_at_growth=args.optimizer_state_at_growth,
        optimizer=optimizer,
        dtype=dtype,
        model=_describe_model(config),
    )
    for before, span in pairwise(spans):
        if span.growth is not None:  # refuse now what the boundary would refuse after hours
            growth_seed, noise = args.growth_seed + span.number, args.growth_noise
            plan_growth(before.dims.to_config(config), span.growth, seed=growth_seed, noise=noise)
    return RunPlan(schedule, facts, spans, batches, rates, describe_settings(args, batches, devices, strategy))


def _describe_model(config: ModelConfig) -> dict[str, Json]:
    """Return the settings of a model's config that growth does not change, as JSON gives them back."""
    content = config if isinstance(config, Mapping) else config.to_dict()
    grown = {*ModelDims.__dataclass_fields__, "layer_types"}
    kept = {name: value for name, value in content.items() if name not in grown | _INCIDENTAL and name[0] != "_"}
    plain: dict[str, Json] = json.loads(json.dumps(kept, default=str))
    return plain


def with_inits(schedule: GrowthSchedule, init: str | dict[str, str] | None) -> GrowthSchedule:
    """Return the schedule with an init for each stage whose init is not set.

    Args:
        init: one init for all operators, or one per operator, of which a stage takes what its operators need.
    """
    if init is None:
        return schedule
    for operator in init if isinstance(init, dict) else ():  # refuses unknown ones
        get_operator(operator)
        resolve_inits((operator,), init)
    stages = []
    for stage in schedule.stages:
        if stage.init is None:
            names = init if isinstance(init, str) else {name: init[name] for name in stage.operators if name in init}
            resolve_inits(stage.operators, names)
            stage = replace(stage, init=names or None)
        stages.append(stage)
    return replace(schedule, stages=tuple(stages))
