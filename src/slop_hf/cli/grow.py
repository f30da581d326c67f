"""`slop grow`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import slop_hf

from ..dims import ModelDims
from ..errors import GrowthError
from ..io.files import check_output
from ..io.serialization import read_json, read_yaml
from ..io.units import format_duration
from ..operators import EXPERTS, VOCABULARY, find_operators, grow_dims
from ..schedule import GrowthSchedule, GrowthStage
from .data import read_data
from .options import AsJson, split_list
from .shared import print_json


def grow_command(
    source: Annotated[str, typer.Argument(help="Model directory, or Hub id[@revision].")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the grown model; it must not exist.")],
    hidden_size: Annotated[int | None, typer.Option(min=1, help="New hidden size.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(min=1, help="New ffn size.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(min=1, help="New number of layers.")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(min=1, help="New number of query heads.")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(min=1, help="New number of key/value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="New size of a head.")] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="New number of tokens, alone: init mean (default), zeros or random."),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="New number of experts, alone: init preserving (default) or noisy."),
    ] = None,
    experts_per_token: Annotated[
        int | None, typer.Option(min=1, help="New number of active experts; default, see --experts in docs/growth.md.")
    ] = None,
    moe_intermediate_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Width of an expert, for a dense model: a divisor of its ffn size. Default: its ffn size."
        ),
    ] = None,
    probe_data: Annotated[
        Path | None,
        typer.Option(
            help="With --experts: YAML file of a run or a mixture. The experts with the highest utility on its "
            "training text are copied most often (init noisy)."
        ),
    ] = None,
    probe_blocks: Annotated[int, typer.Option(min=1, help="Blocks of --probe-data to measure on.")] = 32,
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", "-s", help="Schedule written by `slop plan`: grow through all its stages."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Init of the new entries, for all operators or one each: `layer=stack,ffn=copy`. "
            "Default: random; layers are stacked."
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Noise that breaks the symmetry of copies, as a fraction of initializer_range. Default: 0.1."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the new entries.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file.")] = "5GB",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads. Default: one per core, up to 4.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare both models on a batch; fail if growth should keep the function but does not."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the growth and its size; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Grow a saved model into a larger one, without training. Memory holds one tensor at a time, so any size works.

    The result is a stock transformers checkpoint with the tokenizer and a receipt, `growth_receipt.json`.

    Example: `slop grow ./small --hidden-size 2048 --init preserving -o ./large`

    A Llama becomes a Mixtral with 8 experts: `slop grow ./llama --experts 8 -o ./mixtral`

    With 64 finer experts, 8 of them active (ffn 14336): `slop grow ./llama --experts 64 --experts-per-token 8
    --moe-intermediate-size 1792 -o ./mixtral`

    8 experts become 12, by their utility on the text of a run: `slop grow ./mixtral --experts 12 --probe-data run.yaml
    -o ./larger`
    """
    check_output(output, "--output", GrowthError, is_directory=True)
    new = hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim
    fields = dataclasses.fields(ModelDims)  # in the order of the options
    sizes = {field.name: size for field, size in zip(fields, new, strict=True) if size is not None}
    if schedule is not None:
        read_yaml(schedule, error=GrowthError)  # again below: a wrong path is refused before torch is loaded
    directory = slop_hf.find_checkpoint_directory(source)
    missing = f"{directory} is not a model directory"
    config = read_json(directory / "config.json", if_missing=missing, error=GrowthError)
    old = ModelDims.from_config(config)
    settings: dict[str, Any] = {"seed": seed, "max_shard_size": max_shard_size}
    settings |= {} if noise is None else {"noise": noise}
    growth: tuple[Any, ...]
    for option, value in {
        "--experts-per-token": experts_per_token,
        "--moe-intermediate-size": moe_intermediate_size,
        "--probe-data": probe_data,
    }.items():
        if value is not None and experts is None:
            raise GrowthError(f"{option} belongs to --experts: give the new number of experts too")
    if experts is not None:
        if sizes or schedule or vocab_size is not None:
            raise GrowthError("--experts grows the experts alone: give the other sizes in a growth of their own")
        counts = {
            "num_experts": experts,
            "num_experts_per_tok": experts_per_token,
            "moe_intermediate_size": moe_intermediate_size,
        }
        named = {name: count for name, count in counts.items() if count is not None}
        growth, settings = (EXPERTS, named), {**settings, "init": _read_inits(init)}
        if probe_data is not None:
            from ..growth.experts import make_equal_utility  # with torch, which `slop --help` does without

            settings["utility"] = make_equal_utility(config)  # enough for a dry run, and for refusals
            if not dry_run:
                slop_hf.plan_checkpoint_growth(source, output, *growth, **settings)
                settings["utility"] = _measure_utility(source, probe_data, probe_blocks)
    elif vocab_size is not None:
        if sizes or schedule:
            raise GrowthError("--vocab-size grows the vocabulary alone: give the other sizes in a growth of their own")
        growth, settings = (VOCABULARY, vocab_size), {**settings, "init": _read_inits(init)}
    elif schedule:
        growth = (_read_stages(schedule, config, sizes, init),)
    else:
        growth = ([_build_stage(directory, old, sizes, init)],)
    if dry_run:
        plan = slop_hf.plan_checkpoint_growth(source, output, *growth, **settings)
        if as_json:
            print_json(plan.as_dict())
        else:
            print(f"would grow {plan}")
        return
    receipt = slop_hf.grow_checkpoint(source, output, *growth, threads=threads, verify=verify, **settings)
    if as_json:
        print(receipt.to_json(), end="")
        return
    print(f"{output}: {receipt.dims}, {receipt.parameters:,} parameters, in {format_duration(receipt.seconds)}")
    if probe := receipt.probe:
        print(
            f"largest change of a logit: {probe.max_logit_change:.1e} of the largest logit (rounding: "
            f"{probe.rounding_floor:.1e}); the loss changes by {probe.loss_change:+.1e}"
        )


def _measure_utility(source: str, data: Path, blocks: int) -> list[list[float]]:
    """Return the utility of each expert of a checkpoint on the first blocks that a run on this data reads."""
    from ..data import prepare_data  # with torch
    from ..data.order import list_first_batches
    from ..evaluation.scoring import EvaluatedModel
    from ..growth import measure_expert_utility

    model = EvaluatedModel(source)
    described = dataclasses.replace(read_data(data, None), tokenizer=str(model.directory))
    return measure_expert_utility(model.model, list_first_batches(prepare_data(described).train, blocks))


def _build_stage(directory: Path, old: ModelDims, sizes: dict[str, int], init: str | None) -> GrowthStage:
    """Return the growth that the options for sizes and inits describe."""
    if not sizes:
        raise GrowthError("nothing to grow: give at least one new size, such as --num-hidden-layers, or --schedule")
    new = grow_dims(old, sizes)
    operators = find_operators(old, new)
    if not operators:
        raise GrowthError(f"nothing to grow: {directory} has {old} already")
    return GrowthStage(operators, new, init=_read_inits(init))


def _read_stages(
    path: Path, config: Mapping[str, Any], sizes: Mapping[str, int], init: str | None
) -> Sequence[GrowthStage]:
    """Read the growths of a schedule; refuse other sizes and inits next to it."""
    if sizes or init:
        raise GrowthError(f"{path} has its own sizes and inits: give either --schedule, or new sizes and --init")
    schedule = GrowthSchedule.from_yaml(path)
    if schedule.initial != (old := ModelDims.from_config(config)):
        raise GrowthError(f"{path} begins with {schedule.initial}, but the model has {old}")
    if mismatch := schedule.find_mismatch(config):
        raise GrowthError(f"{path}: {mismatch}")
    if not schedule.stages:
        raise GrowthError(f"{path} has no stages: nothing to grow")
    return schedule.stages


def _read_inits(text: str | None) -> str | dict[str, str] | None:
    """Read one init for all operators, or one each as `layer=stack,ffn=copy`."""
    if text is None or (text.strip() and "=" not in text):
        return text
    pairs = [[side.strip() for side in part.split("=")] for part in split_list(text)]
    inits = {pair[0]: pair[-1] for pair in pairs}
    if not inits or len(inits) < len(pairs) or not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise GrowthError(f"--init must be one init, or one per operator such as layer=stack,ffn=copy, got {text!r}")
    return inits
