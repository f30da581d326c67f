"""`slop plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..cost import DEFAULT_CONFIG, count_parameters
from ..dims import ModelDims
from ..errors import PlanError
from ..objectives import OBJECTIVES
from ..operators import OPERATORS
from ..planner import SlopPlanner
from ..schedule import PAPER_INITIAL_SHARE, GrowthSchedule
from ..serialization import plain
from ..space import ConfigSpace

_CARRIED_OVER = ("model_type", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias")


def plan(
    initial: Annotated[
        str | None, typer.Option(help="Initial structure: hidden,ffn,layers,heads[,kv_heads[,head_dim]].")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Take it from a model directory or config.json instead.")
    ] = None,
    target_params: Annotated[
        float | None, typer.Option(help="Every structure of about this many parameters is a target, e.g. 1e9.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A target structure, like --initial; give it again for more.")
    ] = None,
    operators: Annotated[
        str, typer.Option(help=f"Dimensions to grow, of {', '.join(OPERATORS)}.")
    ] = "layer,ffn,hidden",
    objective: Annotated[str, typer.Option(help=f"What to minimise: {', '.join(OBJECTIVES)}.")] = "delta_params",
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="How many schedules.")] = 5,
    tokens: Annotated[
        float | None, typer.Option(help="Training tokens of the whole run, e.g. 65e9, shared out 2.5 : 1 : 1 : …")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="The initial model is trained already: all tokens go to the stages.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="How far parameters may be off --target-params.")] = 0.05,
    count: Annotated[str, typer.Option(help="'model': all parameters; 'paper': l·(6h² + 3hf).")] = "model",
    hidden_multiple: Annotated[int, typer.Option(help="Hidden sizes of targets are multiples of it.")] = 128,
    ffn_multiple: Annotated[int, typer.Option(help="ffn sizes are rounded up to multiples of it.")] = 256,
    min_layers: Annotated[int, typer.Option(help="Least depth of a target.")] = 1,
    max_layers: Annotated[int, typer.Option(help="Greatest depth of a target.")] = 64,
    min_aspect: Annotated[float, typer.Option(help="Least hidden size / layers of a target.")] = 24,
    max_aspect: Annotated[float, typer.Option(help="Greatest hidden size / layers of a target.")] = 384,
    vocab_size: Annotated[
        int | None, typer.Option(help="Vocabulary, for parameters and FLOPs. Default 32000.")
    ] = None,
    tied: Annotated[bool, typer.Option("--tied", help="Input and output embeddings are tied.")] = False,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a training sequence, for FLOPs.")] = 2048,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the best schedule here, for `slop train`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the schedules as JSON.")] = False,
) -> None:
    """Find the best growth schedules from a structure to a size.

    One dimension grows in each stage; the planner ranks every order of every target that meets the constraints.
    Heads follow the hidden size at a fixed head size unless `mha` is among the operators.

    Example: `slop plan --initial 768,2048,6,6 --target-params 1e9 --tokens 65e9 -o plan.yaml`
    """
    start, config = _initial(initial, source)
    config |= {"vocab_size": vocab_size} if vocab_size else {}
    config |= {"tie_word_embeddings": True} if tied else {}
    space = ConfigSpace(
        targets=tuple(ModelDims.parse(text) for text in target or ()),
        target_params=target_params,
        tolerance=tolerance,
        count=count,  # type: ignore[arg-type]
        config=config,
        sequence_length=sequence_length,
        hidden_multiple=hidden_multiple,
        ffn_multiple=ffn_multiple,
        min_layers=min_layers,
        max_layers=max_layers,
        min_aspect=min_aspect,
        max_aspect=max_aspect,
    )
    names = tuple(name.strip() for name in operators.split(",") if name.strip())
    share = 0.0 if pretrained else PAPER_INITIAL_SHARE
    schedules = SlopPlanner(start, space, operators=names, objective=objective).plan(
        top_k, tokens=tokens, initial_share=share
    )
    if output is not None:
        schedules[0].to_yaml(output)
    if as_json:
        print(json.dumps([plain(schedule) for schedule in schedules], indent=2))
        return
    Console().print(_table(schedules, objective, config))
    print("1:", " → ".join(str(dims) for dims in schedules[0].structures))
    if output is not None:
        print(f"schedule 1 written to {output}")


def _initial(text: str | None, source: Path | None) -> tuple[ModelDims, dict[str, Any]]:
    if (text is None) == (source is None):
        raise PlanError("give the initial structure either with --initial or with --from")
    if text is not None:
        return ModelDims.parse(text), dict(DEFAULT_CONFIG)
    assert source is not None
    path = source / "config.json" if source.is_dir() else source
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as caught:
        raise PlanError(f"--from {source}: no readable config.json there ({caught})") from None
    return ModelDims.from_config(found), {name: found[name] for name in _CARRIED_OVER if name in found}


_TITLES = {"delta_params": "Π Δparams", "delta_params_eq3": "by Eq. 3", "flops": "FLOPs"}


def _table(schedules: list[GrowthSchedule], objective: str, config: dict[str, Any]) -> Table:
    """Schedules side by side, best first."""
    first = schedules[0]
    size = count_parameters(first.initial, config) / 1e6
    table = Table(
        box=SIMPLE,
        collapse_padding=True,
        title=f"Growth from {first.initial}, {size:,.1f}M parameters",
        caption=f"target: (hidden, ffn, layers, heads); ranked by {objective}, best first",
    )
    table.add_column("", justify="right")
    table.add_column("order", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for name in ("params", *(_TITLES.get(name, name) for name in first.scores)):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, schedule in enumerate(schedules, start=1):
        size = count_parameters(schedule.target, config) / 1e6
        scores = [f"{value:.3g}" for value in schedule.scores.values()]
        table.add_row(str(rank), schedule.sequence, str(schedule.target), f"{size:,.1f}M", *scores)
    return table
