"""`slop grow`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import slop_hf

from ..cost import count_parameters, weight_bytes
from ..dims import ModelDims
from ..errors import GrowthError
from ..operators import operators_between
from ..schedule import GrowthStage


def grow(
    source: Annotated[Path, typer.Argument(help="Directory of the model to grow.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the grown model; it must not exist.")],
    hidden_size: Annotated[int | None, typer.Option(help="New hidden size.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="New ffn size.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="New number of layers.")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="New number of query heads.")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(help="New number of key/value heads.")] = None,
    init: Annotated[
        str | None, typer.Option(help="How new entries are initialised. Default: random; layers are stacked.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random entries.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Grow a saved model into a larger one, once, without training.

    The result is a stock transformers checkpoint with the tokenizer and a receipt, `growth.json`, beside it.

    Example: `slop grow ./small -o ./large --num-hidden-layers 12`
    """
    given = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
    }
    stage = _stage(source, {name: value for name, value in given.items() if value is not None}, init)
    plan = slop_hf.plan_checkpoint_growth(source, output, stage, seed=seed)
    if dry_run:
        size = count_parameters(plan.new, plan.config)
        what = {"from": str(plan.old), "to": str(plan.new), "inits": dict(plan.inits), "parameters": size}
        what["weight_bytes"] = weight_bytes(plan.new, plan.config, bytes_per_parameter=4)
        lines = [
            f"would grow {source} {plan.old} to {output} {plan.new}",
            f"{size:,} parameters, inits {dict(plan.inits)}",
        ]
        print(json.dumps(what, indent=2) if as_json else "\n".join(lines))
        return
    receipt = slop_hf.grow_checkpoint(source, output, stage, seed=seed, max_shard_size=max_shard_size)
    if as_json:
        print(receipt.to_json(), end="")
    else:
        print(f"{output}: {receipt.dims}, {receipt.parameters:,} parameters, in {receipt.seconds:.1f} s")


def _stage(source: Path, changes: dict[str, int], init: str | None) -> GrowthStage:
    """The growth that the options ask for."""
    path = source / "config.json"
    if not path.is_file():
        raise GrowthError(f"{source} is not a model directory: it has no config.json")
    old = ModelDims.from_config(json.loads(path.read_text(encoding="utf-8")))
    if not changes:
        raise GrowthError("nothing to grow: give at least one new size, such as --num-hidden-layers")
    if "num_attention_heads" in changes and old.num_key_value_heads == old.num_attention_heads:
        changes.setdefault("num_key_value_heads", changes["num_attention_heads"])
    new = old.replace(**changes)
    operators = operators_between(old, new)
    if not operators:
        raise GrowthError(f"nothing to grow: {source} has {old} already")
    return GrowthStage(operators, new, init=init)
