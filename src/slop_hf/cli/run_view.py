"""What `slop train` and a recipe's launcher share: changes by `--set`, the dry run, and how a run ended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import slop_hf

from ..cost.memory import MemoryEstimate, training_memory
from ..errors import RunError
from ..io.hub_address import Address
from ..io.serialization import parse_yaml
from ..runs.directory import RunDirectory

if TYPE_CHECKING:
    from ..hub.callback import PublishCallback
    from ..hub.reading import FetchedStage
    from ..training import RunConfig, StageSpan


def read_changes(changes: Sequence[str]) -> dict[str, Any]:
    """The overrides of `RunConfig.from_yaml` that `--set key=value` asks for, values as in YAML.

    Raises:
        RunError: for one without a value.

    >>> read_changes(["training.learning_rate=1e-3", "data.source=[a.txt, b.txt]"])
    {'training.learning_rate': 0.001, 'data.source': ['a.txt', 'b.txt']}
    """
    pairs = [change.partition("=") for change in changes]
    for key, equals, _ in pairs:
        if not equals:
            raise RunError(f"--set {key}: expected key=value, such as training.learning_rate=1e-3")
    return {key: parse_yaml(value) for key, _, value in pairs}


def show_preview(
    config: RunConfig,
    output: Path,
    *,
    scratch: bool = False,
    devices: int = 1,
    zero_stage: int = 0,
    as_json: bool = False,
) -> None:
    """Print what a run would do: a row a stage, and the memory of each device.

    Args:
        scratch: as for `build_trainer`.
        devices, zero_stage: that share the work and the memory, see `training_memory`.

    Raises:
        SlopError: for what cannot run.
    """
    spans = slop_hf.preview_run(config, output, scratch=scratch, devices=devices)
    settings = _memory_settings(config, spans, devices)
    estimates = _estimates(config, spans, settings, devices, zero_stage)
    if as_json:
        print(json.dumps([_row(*pair) for pair in zip(spans, estimates, strict=True)], indent=2))
        return
    largest = max(range(len(spans)), key=lambda number: estimates[number].total)
    caption = _memory_line(spans[largest], estimates[largest], settings[largest], devices, zero_stage)
    Console().print(_table(spans, title=f"{output} would train", caption=caption))


def train_run(
    config: RunConfig, output: Path, *, scratch: bool = False, resume: bool = False, stage: FetchedStage | None = None
) -> None:
    """Train a run, scoring its stages as its section `evaluation` says, and publishing them where Trainer's argument
    `push_to_hub` asks for it; what they have scored by then is published with them.

    Args:
        scratch: as for `build_trainer`.
        resume: go on with the run in `output`, or begin if there is none.
        stage: the published one that it begins with.

    Raises:
        SlopError: for what cannot run; that a stage could not be scored or published is only told.
    """
    resume = resume and RunDirectory(output).exists  # asked before any rank begins one
    publishing = _publishing(config, stage)
    from ..evaluation.runs import EvaluateStages, check_evaluation  # with torch
    from ..training.launch import launched

    with launched():
        check_evaluation(config)
        trainer = slop_hf.build_trainer(config, output, scratch=scratch, callbacks=publishing)
        if (evaluating := EvaluateStages.of_run(config)) is not None:
            trainer.add_callback(evaluating)
        if stage is not None and trainer.is_world_process_zero() and not RunDirectory(output).exists:
            stage.origin.save(RunDirectory(output))
        trainer.train(resume_from_checkpoint=resume)
        for callback in publishing:
            if summary := callback.finish():
                print(summary)
        del trainer  # with all that would hold its processes together


def _publishing(config: RunConfig, stage: FetchedStage | None) -> list[PublishCallback]:
    if not config.training.get("push_to_hub"):
        return []
    begun_with = config.model.get("pretrained")
    base_model = None  # a directory is none; a run that begins with a published stage knows its repository
    if begun_with is not None and stage is None and not Path(begun_with).exists():
        base_model = Address.parse(begun_with).repo_id
    return [slop_hf.PublishCallback.from_arguments(config.training, base_model=base_model)]


def show_outcome(output: Path, *, as_json: bool = False) -> None:
    """Print the records of a run's finished stages as JSON, or one line about them."""
    records = RunDirectory(output).records()
    if as_json:
        print("[" + ",\n".join(record.to_json().rstrip() for record in records) + "]")
        return
    if not records:
        print(f"{output}: no stage is finished yet")
        return
    last = records[-1]
    quality = f", perplexity {last.perplexity:.2f}" if last.perplexity else ""
    print(f"{output}: {len(records)} stages, {last.total_tokens:,} tokens, {last.total_flops:.3g} FLOPs{quality}")


def _memory_settings(config: RunConfig, spans: Sequence[StageSpan], devices: int) -> list[dict[str, Any]]:
    """What each stage's memory depends on beside its structure, as `training_memory` calls it."""
    from ..training.batches import Batches, per_stage  # with torch, which `slop --help` does without

    defaults = {item.name: item.default for item in dataclasses.fields(slop_hf.SlopTrainingArguments)}
    chosen = {**defaults, **config.training}
    of_stages = chosen["stage_batch_sizes"]
    if isinstance(of_stages, list) and len(spans) == 1:  # from scratch: the target alone
        of_stages = of_stages[-1:]
    sizes = of_stages, chosen["per_device_train_batch_size"], len(spans), "stage_batch_sizes"
    checkpointing = chosen.get("activation_checkpointing")  # the name of newer transformers
    common = {
        "checkpointing": bool(chosen.get("gradient_checkpointing") if checkpointing is None else checkpointing),
        "precision": "bf16" if chosen["bf16"] else "fp32",
    }
    return [
        # A stage without steps has no batch; what a step of its would take is told all the same.
        {
            "micro_batch_size": Batches.share(span.blocks_per_step or size * devices, size, devices).micro_batch_size,
            **common,
        }
        for span, size in zip(spans, per_stage(*sizes), strict=True)
    ]


def _estimates(
    config: RunConfig, spans: Sequence[StageSpan], settings: list[dict[str, Any]], devices: int, zero_stage: int
) -> list[MemoryEstimate]:
    from ..training.config import known_vocab_size

    model = config.model_config(spans[0].dims, known_vocab_size(config), as_described=True)
    length = config.data.block_size
    return [
        training_memory(span.dims, model, length, devices=devices, zero_stage=zero_stage, **setting)
        for span, setting in zip(spans, settings, strict=True)
    ]


def _row(span: StageSpan, memory: MemoryEstimate) -> dict[str, Any]:
    return {
        "stage": span.name,
        "structure": str(span.dims),
        "parameters": span.parameters,
        "tokens": span.tokens,
        "steps": span.steps,
        "flops": span.flops,
        "memory_bytes": {**dataclasses.asdict(memory), "total": memory.total},
    }


def _memory_line(
    span: StageSpan, memory: MemoryEstimate, setting: dict[str, Any], devices: int, zero_stage: int
) -> str:
    parts = {"weights": memory.parameters, **dataclasses.asdict(memory)}
    sizes = " + ".join(f"{name} {_gib(parts[name])}" for name in ("weights", "gradients", "optimizer", "activations"))
    batch, precision = setting["micro_batch_size"], setting["precision"]
    where = f"{devices} device{'s' * (devices > 1)}, ZeRO stage {zero_stage}, micro-batch {batch}, {precision}"
    # Trainer's autocast keeps weights in float32 and casts what it reads; DeepSpeed keeps them in bf16.
    more = "; autocast without DeepSpeed takes more" if precision == "bf16" and not zero_stage else ""
    return f"memory of each device, most in {span.name}: {_gib(memory.total)} GiB = {sizes} ({where}{more})"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def _table(spans: Sequence[StageSpan], *, title: str, caption: str) -> Table:
    """What the run would do, a row a stage."""
    table = Table(box=SIMPLE, title=title, caption=caption, pad_edge=False, collapse_padding=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("structure")  # broken where a terminal is narrow; numbers stay whole
    for column in ("parameters", "tokens", "steps", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for span in spans:
        sizes = f"{span.parameters:,}", f"{span.tokens:,}", f"{span.steps:,}", f"{span.flops:.3g}"
        table.add_row(span.name, str(span.dims), *sizes)
    table.add_section()
    tokens, flops = sum(span.tokens for span in spans), sum(span.flops for span in spans)
    table.add_row("sum", "", "", f"{tokens:,}", f"{spans[-1].end_step:,}", f"{flops:.3g}")
    return table
