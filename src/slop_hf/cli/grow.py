"""`slop grow`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import slop_hf

from ..dims import ModelDims
from ..errors import GrowthError
from ..io.serialization import read_json
from ..operators import find_operators
from ..schedule import GrowthSchedule, GrowthStage


def grow(
    source: Annotated[str, typer.Argument(help="Directory of the model to grow, or its Hub id[@revision].")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the grown model; it must not exist.")],
    hidden_size: Annotated[int | None, typer.Option(help="New hidden size.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="New ffn size.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="New number of layers.")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="New number of query heads.")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(help="New number of key/value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="New size of a head.")] = None,
    schedule: Annotated[
        Path | None, typer.Option("--schedule", "-s", help="Schedule of `slop plan`: grow through all its stages.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="How new entries are initialised, for all operators, or as `layer=stack,ffn=copy`. "
            "Default: random; layers are stacked."
        ),
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Noise that parts copies, as a share of initializer_range. Default: 0.1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random entries.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    threads: Annotated[int | None, typer.Option(help="Threads. Default: one for each core, up to 4.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Measure on a batch; fail if what should keep the function does not.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what space it takes, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt, or the plan, as JSON.")] = False,
) -> None:
    """Grow a saved model into a larger one, without training, whatever its size: a tensor is in memory at a time.

    The result is a stock transformers checkpoint with the tokenizer and a receipt, `growth.json`, beside it.

    Example: `slop grow ./small --hidden-size 2048 --init preserving -o ./large`
    """
    given = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    directory = slop_hf.checkpoint_directory(source)
    old = _dims(directory)
    stages = _stages(schedule, old, changes, init) if schedule else [_stage(directory, old, changes, init)]
    options: dict[str, Any] = {"seed": seed, "max_shard_size": max_shard_size}
    if noise is not None:
        options["noise"] = noise
    if dry_run:
        plan = slop_hf.plan_checkpoint_growth(source, output, stages, **options)
        print(json.dumps(plan.as_dict(), indent=2) if as_json else f"would grow {plan}")
        return
    receipt = slop_hf.grow_checkpoint(source, output, stages, threads=threads, verify=verify, **options)
    if as_json:
        print(receipt.to_json(), end="")
    else:
        print(f"{output}: {receipt.dims}, {receipt.parameters:,} parameters, in {receipt.seconds:.1f} s")
        if probe := receipt.probe:
            change, floor = f"{probe.max_logit_change:.1e}", f"{probe.rounding_floor:.1e}"
            print(f"logits change by {change} of the largest (rounding: {floor}), loss by {probe.loss_change:+.1e}")


def _dims(directory: Path) -> ModelDims:
    missing = f"{directory} is not a model directory"
    return ModelDims.from_config(read_json(directory / "config.json", if_missing=missing, error=GrowthError))


def _stage(directory: Path, old: ModelDims, changes: dict[str, int], init: str | None) -> GrowthStage:
    """The growth that the options ask for."""
    if not changes:
        raise GrowthError("nothing to grow: give at least one new size, such as --num-hidden-layers, or --schedule")
    if "num_attention_heads" in changes and old.num_key_value_heads == old.num_attention_heads:
        changes.setdefault("num_key_value_heads", changes["num_attention_heads"])
    new = old.replace(**changes)
    operators = find_operators(old, new)
    if not operators:
        raise GrowthError(f"nothing to grow: {directory} has {old} already")
    return GrowthStage(operators, new, init=_inits(init))


def _stages(path: Path, old: ModelDims, changes: Mapping[str, int], init: str | None) -> tuple[GrowthStage, ...]:
    """The growths of a schedule, which brings sizes and inits."""
    if changes or init:
        raise GrowthError("a schedule brings its own sizes and inits; give either --schedule or these")
    schedule = GrowthSchedule.from_yaml(path)
    if schedule.initial != old:
        raise GrowthError(f"{path} begins with {schedule.initial}, but the model has {old}")
    if not schedule.stages:
        raise GrowthError(f"{path} has no stages: nothing to grow")
    return schedule.stages


def _inits(text: str | None) -> str | dict[str, str] | None:
    """One init for all operators, or one each as `layer=stack,ffn=copy`."""
    if text is None or "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    return {operator.strip(): init.strip() for operator, _, init in pairs}
