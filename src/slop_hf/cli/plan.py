"""`slop plan`."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cost.flops import DEFAULT_CONFIG
from ..cost.hours import CostModel
from ..cost.memory import MemoryLimit
from ..dims import ModelDims
from ..errors import PlanError
from ..io.serialization import to_plain
from ..operators import OPERATORS
from ..paper import tables as paper
from ..planning.objectives import OBJECTIVES
from ..planning.planner import SlopPlanner
from ..planning.space import ConfigSpace
from ..schedule import PAPER_INITIAL_SHARE
from . import plan_view
from .model_config import read_config

_START, _SPACE, _SEARCH, _TOKENS, _HARDWARE, _OUTPUT = "From and to", "Space", "Search", "Tokens", "Hardware", "Output"


def _option(panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


def plan(
    initial: Annotated[
        str | None, _option(_START, help="Initial structure: hidden,ffn,layers,heads[,kv_heads[,head_dim]].")
    ] = None,
    source: Annotated[
        str | None,
        _option(_START, "--from", help="Take it from a model directory, a config.json or a Hub id[@revision]."),
    ] = None,
    target_params: Annotated[
        float | None, _option(_START, help="Every structure of about this many parameters is a target, e.g. 1e9.")
    ] = None,
    tolerance: Annotated[float, _option(_START, help="How far parameters may be off --target-params.")] = 0.05,
    count: Annotated[str, _option(_START, help="'model': all parameters; 'paper': l·(6h² + 3hf).")] = "model",
    target: Annotated[
        list[str] | None, _option(_START, help="A target structure, like --initial; give it again for more.")
    ] = None,
    destination: Annotated[
        str | None, _option(_START, "--to", help="The target, from a model directory, a config.json or a Hub id.")
    ] = None,
    through: Annotated[
        list[str] | None, _option(_START, help="A structure to pass on the way; give it again for more.")
    ] = None,
    hidden_multiple: Annotated[int, _option(_SPACE, help="Hidden sizes are multiples of it.")] = 128,
    ffn_multiple: Annotated[int, _option(_SPACE, help="ffn sizes are multiples of it.")] = 256,
    ffn_ratios: Annotated[str, _option(_SPACE, help="Targets' ffn / hidden, rounded up to --ffn-multiple.")] = "8/3,4",
    min_layers: Annotated[int, _option(_SPACE, help="Least depth of a target.")] = 1,
    max_layers: Annotated[int, _option(_SPACE, help="Greatest depth of a target.")] = 64,
    min_aspect: Annotated[float, _option(_SPACE, help="Least hidden size / layers of a target.")] = 24,
    max_aspect: Annotated[float, _option(_SPACE, help="Greatest hidden size / layers of a target.")] = 384,
    min_hidden: Annotated[int | None, _option(_SPACE, help="Least hidden size of a target.")] = None,
    max_hidden: Annotated[int | None, _option(_SPACE, help="Greatest hidden size of a target.")] = None,
    min_ffn: Annotated[int | None, _option(_SPACE, help="Least ffn size of a target.")] = None,
    max_ffn: Annotated[int | None, _option(_SPACE, help="Greatest ffn size of a target.")] = None,
    min_heads: Annotated[int | None, _option(_SPACE, help="Fewest heads of a target.")] = None,
    max_heads: Annotated[int | None, _option(_SPACE, help="Most heads of a target.")] = None,
    heads: Annotated[
        str, _option(_SPACE, help="Of wider targets: 'follow', more heads of one size; 'fixed', as many, larger ones.")
    ] = "follow",
    kv_heads: Annotated[
        int | None, _option(_SPACE, help="Key/value heads of targets. Default: the group stays.")
    ] = None,
    tensor_parallel: Annotated[int, _option(_SPACE, help="Devices that share heads, ffn and vocabulary evenly.")] = 1,
    vocab_size: Annotated[int | None, _option(_SPACE, help="Vocabulary. Default: that of --from, or 32000.")] = None,
    tied: Annotated[bool, _option(_SPACE, "--tied", help="Input and output embeddings are tied.")] = False,
    sequence_length: Annotated[int, _option(_SPACE, help="Tokens of a training sequence.")] = 2048,
    operators: Annotated[
        str, _option(_SEARCH, help=f"Dimensions with stages of their own, of {', '.join(OPERATORS)}.")
    ] = "layer,ffn,hidden",
    objective: Annotated[str, _option(_SEARCH, help=f"What to rank by: {', '.join(OBJECTIVES)}.")] = "delta_params",
    mode: Annotated[
        str, _option(_SEARCH, help="'once': each dimension in one stage; 'repeated': in several; 'joint': together.")
    ] = "once",
    stages: Annotated[
        int | None, _option(_SEARCH, help="Number of stages; free where flops or hours are minimised.")
    ] = None,
    max_stages: Annotated[int, _option(_SEARCH, help="Most stages where their number is free.")] = 6,
    stage_price: Annotated[float, _option(_SEARCH, help="What a stage costs besides, in FLOPs or hours.")] = 0.0,
    max_factor: Annotated[
        float | None, _option(_SEARCH, help="Most that parameters may grow in a stage, e.g. 2.")
    ] = None,
    top_k: Annotated[int, _option(_SEARCH, "--top-k", "-k", help="How many schedules.")] = 5,
    tokens: Annotated[
        str | None, _option(_TOKENS, help="Of the whole run, e.g. 65e9; or of each stage: 25e9,10e9,10e9,10e9.")
    ] = None,
    sharing: Annotated[
        str, _option(_TOKENS, help="'paper', 2.5 : 1 : 1 : …; or 'utility', equal marginal utility at each growth.")
    ] = "paper",
    pretrained: Annotated[
        bool, _option(_TOKENS, "--pretrained", help="The initial model is trained already: all tokens go to stages.")
    ] = False,
    already_seen: Annotated[
        float, _option(_TOKENS, help="Tokens that the initial model has been trained on, to predict losses.")
    ] = 0.0,
    cost_model: Annotated[
        str, _option(_HARDWARE, help="'paper' (its A100 hours), or a file that `slop calibrate` wrote.")
    ] = "paper",
    device_memory: Annotated[
        float | None, _option(_HARDWARE, help="Bytes of a device, e.g. 80e9; what does not fit is left out.")
    ] = None,
    devices: Annotated[int, _option(_HARDWARE, help="Devices that share the training state.")] = 1,
    zero: Annotated[int, _option(_HARDWARE, help="ZeRO stage, 0 to 3.")] = 0,
    micro_batch_size: Annotated[int, _option(_HARDWARE, help="Sequences on a device at a time.")] = 1,
    checkpointing: Annotated[bool, _option(_HARDWARE, "--checkpointing", help="Activations are recomputed.")] = False,
    precision: Annotated[str, _option(_HARDWARE, help="'bf16' or 'fp32'.")] = "bf16",
    arms: Annotated[bool, _option(_OUTPUT, help="Set schedule 1 beside other ways to the same target.")] = True,
    explain: Annotated[bool, _option(_OUTPUT, "--explain", help="Say what each growth was chosen over.")] = False,
    plot: Annotated[Path | None, _option(_OUTPUT, help="Draw the schedules here (.png, .svg or .pdf).")] = None,
    output: Annotated[
        Path | None, _option(_OUTPUT, "--output", "-o", help="Write schedule 1 here, for `slop train`.")
    ] = None,
    as_json: Annotated[bool, _option(_OUTPUT, "--json", help="Print everything as JSON.")] = False,
) -> None:
    """Find the best growth schedules from a structure to a size.

    As in the paper, one dimension grows in each stage, all the way, and every order to every target is ranked; --mode
    lets dimensions grow in several steps, or together. Heads follow the hidden size unless `mha` is among the
    operators.

    Examples:

    `slop plan --initial 768,2048,6,6 --target-params 1e9 --tokens 65e9 -o plan.yaml`

    `slop plan --from ./small --to ./large/config.json --tokens 20e9 --pretrained --already-seen 300e9 --explain`
    """
    start, config = _start(initial, source)
    config |= {"vocab_size": vocab_size} if vocab_size else {}
    config |= {"tie_word_embeddings": True} if tied else {}
    memory = None
    if device_memory is not None:
        memory = MemoryLimit(device_memory, zero, devices, micro_batch_size, checkpointing, precision)  # type: ignore[arg-type]
    space = ConfigSpace(
        targets=[
            *map(ModelDims.parse, target or ()),
            *([read_config(destination, "--to")[0]] if destination else []),
        ],
        target_params=target_params,
        tolerance=tolerance,
        count=count,  # type: ignore[arg-type]
        config=config,
        sequence_length=sequence_length,
        hidden_multiple=hidden_multiple,
        ffn_ratios=_ratios(ffn_ratios),
        ffn_multiple=ffn_multiple,
        min_layers=min_layers,
        max_layers=max_layers,
        min_aspect=min_aspect,
        max_aspect=max_aspect,
        min_hidden=min_hidden,
        max_hidden=max_hidden,
        min_ffn=min_ffn,
        max_ffn=max_ffn,
        min_heads=min_heads,
        max_heads=max_heads,
        heads=heads,  # type: ignore[arg-type]
        kv_heads=kv_heads,
        tensor_parallel=tensor_parallel,
        memory=memory,
    )
    planner = SlopPlanner(
        start,
        space,
        operators=tuple(name.strip() for name in operators.split(",") if name.strip()),
        objective=objective,
        cost_model=paper.cost_model() if cost_model == "paper" else CostModel.from_yaml(cost_model),
        mode=mode,  # type: ignore[arg-type]
        stages=stages,
        max_stages=max_stages,
        stage_price=stage_price,
        max_factor=max_factor,
        through=[ModelDims.parse(text) for text in through or ()],
    )
    share = 0.0 if pretrained else PAPER_INITIAL_SHARE
    schedules = planner.plan(
        top_k,
        tokens=_tokens(tokens),
        initial_share=share,
        already_seen=already_seen,
        sharing=sharing,  # type: ignore[arg-type]
    )
    answer = plan_view.Answer.of(
        planner, schedules, already_seen, with_arms=arms and tokens is not None, explained=explain
    )
    _write(answer, output, plot)
    if as_json:
        print(json.dumps(to_plain(answer.as_dict()), indent=2))
        return
    plan_view.show(answer)
    for path in (output, plot):
        if path is not None:
            print(f"{'schedule 1' if path == output else 'figure'} written to {path}")


def _write(answer: plan_view.Answer, output: Path | None, plot: Path | None) -> None:
    if output is not None:
        answer.schedules[0].to_yaml(output)
    if plot is not None:
        from ..report.plan_figure import plan_figure  # matplotlib takes a second

        space = answer.planner.space
        arms = [(arm.name, arm.schedule) for arm in answer.arms[1:]]
        plan_figure(answer.schedules, arms, config=space.config, sequence_length=space.sequence_length, path=plot)


def _start(text: str | None, source: str | None) -> tuple[ModelDims, dict[str, Any]]:
    if (text is None) == (source is None):
        raise PlanError("give the initial structure either with --initial or with --from")
    if text is not None:
        return ModelDims.parse(text), dict(DEFAULT_CONFIG)
    assert source is not None
    return read_config(source, "--from")


def _tokens(text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        counts = [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(
            f"--tokens {text!r}: expected a number such as 65e9, or one for each stage, with commas"
        ) from None
    return counts if len(counts) > 1 else counts[0]


def _ratios(text: str) -> tuple[Fraction, ...]:
    try:
        ratios = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        ratios = ()
    if not ratios or min(ratios) <= 0:
        raise PlanError(f"--ffn-ratios {text!r}: expected positive numbers or fractions with commas, such as 8/3,4")
    return ratios
