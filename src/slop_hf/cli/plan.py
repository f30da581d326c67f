"""`slop plan`: the command and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ..baselines import Arm, compare_at_equal_flops, is_growth_favoured
from ..cost.flops import count_parameters
from ..cost.hours import CostModel
from ..cost.memory import MemoryLimit
from ..dims import ModelConfig, ModelDims
from ..errors import PlanError
from ..io.files import check_output
from ..io.units import format_count
from ..operators import OPERATORS
from ..paper import tables as paper
from ..planning.explain import Choice, explain
from ..planning.objectives import OBJECTIVES, Objective
from ..planning.planner import SlopPlanner
from ..planning.space import ConfigSpace
from ..schedule import PAPER_INITIAL_SHARE, GrowthSchedule
from .model_config import build_config, read_config, read_structure
from .options import AsJson, make_option, split_list
from .shared import print_json, print_table

_START, _SPACE, _SEARCH, _TOKENS, _HARDWARE, _OUTPUT = "From and to", "Space", "Search", "Tokens", "Hardware", "Output"


def plan_command(
    initial: Annotated[
        str | None, make_option(_START, help="Initial structure: hidden,ffn,layers,heads[,kv_heads[,head_dim]].")
    ] = None,
    source: Annotated[
        str | None,
        make_option(
            _START, "--from", help="Initial model instead: a model directory, config.json or Hub id[@revision]."
        ),
    ] = None,
    target_params: Annotated[
        float | None, make_option(_START, help="Consider every target of about this many parameters, e.g. 1e9.")
    ] = None,
    tolerance: Annotated[float, make_option(_START, help="Relative deviation allowed from --target-params.")] = 0.05,
    count: Annotated[str, make_option(_START, help="'model': all parameters; 'paper': l·(6h² + 3hf).")] = "model",
    target: Annotated[
        list[str] | None, make_option(_START, help="Target structure, like --initial; repeat it for more.")
    ] = None,
    destination: Annotated[
        str | None, make_option(_START, "--to", help="Target model: a model directory, config.json or Hub id.")
    ] = None,
    through: Annotated[
        list[str] | None, make_option(_START, help="Structure to pass on the way; repeat it for more.")
    ] = None,
    hidden_multiple: Annotated[int, make_option(_SPACE, help="Hidden sizes are multiples of this number.")] = 128,
    ffn_multiple: Annotated[int, make_option(_SPACE, help="ffn sizes are multiples of this number.")] = 256,
    ffn_ratios: Annotated[
        str, make_option(_SPACE, help="Ratios ffn / hidden of targets, rounded up to --ffn-multiple.")
    ] = "8/3,4",
    min_layers: Annotated[int, make_option(_SPACE, help="Fewest layers of a target.")] = 1,
    max_layers: Annotated[int, make_option(_SPACE, help="Most layers of a target.")] = 64,
    min_aspect: Annotated[float, make_option(_SPACE, help="Smallest hidden size / layers of a target.")] = 24,
    max_aspect: Annotated[float, make_option(_SPACE, help="Largest hidden size / layers of a target.")] = 384,
    min_hidden: Annotated[int | None, make_option(_SPACE, help="Smallest hidden size of a target.")] = None,
    max_hidden: Annotated[int | None, make_option(_SPACE, help="Largest hidden size of a target.")] = None,
    min_ffn: Annotated[int | None, make_option(_SPACE, help="Smallest ffn size of a target.")] = None,
    max_ffn: Annotated[int | None, make_option(_SPACE, help="Largest ffn size of a target.")] = None,
    min_heads: Annotated[int | None, make_option(_SPACE, help="Fewest heads of a target.")] = None,
    max_heads: Annotated[int | None, make_option(_SPACE, help="Most heads of a target.")] = None,
    heads: Annotated[
        str,
        make_option(
            _SPACE, help="Heads of wider targets: 'follow', more heads of the same size; 'fixed', as many, larger."
        ),
    ] = "follow",
    kv_heads: Annotated[
        int | None,
        make_option(_SPACE, help="Key/value heads of targets. Default: as many query heads per key/value head."),
    ] = None,
    tensor_parallel: Annotated[
        int, make_option(_SPACE, help="Number of devices that must divide heads, ffn and vocabulary.")
    ] = 1,
    vocab_size: Annotated[int | None, make_option(_SPACE, help="Vocabulary size. Default: --from's or 32000.")] = None,
    tied: Annotated[bool, make_option(_SPACE, "--tied", help="Tie the input and output embeddings.")] = False,
    sequence_length: Annotated[int, make_option(_SPACE, help="Tokens per training sequence.")] = 2048,
    operators: Annotated[
        str, make_option(_SEARCH, help=f"Dimensions with stages of their own, from {', '.join(OPERATORS)}.")
    ] = "layer,ffn,hidden",
    objective: Annotated[
        str, make_option(_SEARCH, help=f"Objective to rank schedules by: {', '.join(OBJECTIVES)}.")
    ] = "delta_params",
    mode: Annotated[
        str,
        make_option(_SEARCH, help="'once': each dimension in one stage; 'repeated': in several; 'joint': together."),
    ] = "once",
    stages: Annotated[
        int | None, make_option(_SEARCH, help="Number of stages. With flops or hours, it may be left open.")
    ] = None,
    max_stages: Annotated[int, make_option(_SEARCH, help="Largest number of stages if it is left open.")] = 6,
    stage_price: Annotated[float, make_option(_SEARCH, help="Fixed cost added per stage, in FLOPs or hours.")] = 0.0,
    max_factor: Annotated[
        float | None, make_option(_SEARCH, help="Largest factor that parameters may grow by in a stage, e.g. 2.")
    ] = None,
    top_k: Annotated[int, make_option(_SEARCH, "--top-k", "-k", help="Number of schedules.")] = 5,
    tokens: Annotated[
        str | None, make_option(_TOKENS, help="Tokens of the run, e.g. 65e9, or of each stage: 25e9,10e9,10e9,10e9.")
    ] = None,
    sharing: Annotated[
        str, make_option(_TOKENS, help="'paper': 2.5 : 1 : 1 : …; 'utility': equal marginal utility at each growth.")
    ] = "paper",
    pretrained: Annotated[
        bool, make_option(_TOKENS, "--pretrained", help="The initial model is trained: all tokens go to later stages.")
    ] = False,
    already_seen: Annotated[
        float, make_option(_TOKENS, help="Tokens that the initial model was trained on before; predicts losses.")
    ] = 0.0,
    cost_model: Annotated[
        str, make_option(_HARDWARE, help="'paper' (its A100 hours), or a file written by `slop calibrate`.")
    ] = "paper",
    device_memory: Annotated[
        float | None, make_option(_HARDWARE, help="Bytes per device, e.g. 80e9; larger structures are left out.")
    ] = None,
    devices: Annotated[int, make_option(_HARDWARE, help="Number of devices that share the training state.")] = 1,
    zero: Annotated[int, make_option(_HARDWARE, help="ZeRO stage, 0 to 3.")] = 0,
    micro_batch_size: Annotated[int, make_option(_HARDWARE, help="Sequences per device in a forward pass.")] = 1,
    checkpointing: Annotated[
        bool, make_option(_HARDWARE, "--checkpointing", help="Recompute activations (gradient checkpointing).")
    ] = False,
    precision: Annotated[str, make_option(_HARDWARE, help="'bf16' or 'fp32'.")] = "bf16",
    with_arms: Annotated[
        bool,
        make_option(
            _OUTPUT, "--arms/--no-arms", help="Compare schedule 1 with other ways to the same target (with --tokens)."
        ),
    ] = True,
    with_choices: Annotated[
        bool, make_option(_OUTPUT, "--explain", help="Show the alternatives to each growth of schedule 1.")
    ] = False,
    plot: Annotated[Path | None, make_option(_OUTPUT, help="Draw the schedules to a .png, .svg or .pdf file.")] = None,
    output: Annotated[
        Path | None, make_option(_OUTPUT, "--output", "-o", help="Write schedule 1 to this file, for `slop train`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the best growth schedules from an initial structure to a target size.

    As in the paper, each stage grows one dimension to its final size, and every order for every target is ranked.
    With `--mode`, dimensions grow in several stages, or together. Heads follow the hidden size unless `mha` is among
    the operators.

    Examples:

    `slop plan --initial 768,2048,6,6 --target-params 1e9 --tokens 65e9 -o plan.yaml`

    `slop plan --from ./small --to ./large/config.json --tokens 20e9 --pretrained --already-seen 300e9 --explain`
    """
    check_output(output, "--output", PlanError)
    check_output(plot, "--plot", PlanError)
    if plot is not None:
        from ..report.plan_figure import check_suffix, draw_plan  # matplotlib takes a second

        check_suffix(plot)
    memory = None
    if device_memory is not None:
        memory = MemoryLimit(device_memory, zero, devices, micro_batch_size, checkpointing, precision)  # type: ignore[arg-type]
    start = read_structure("initial", initial, source, "--initial", "--from")
    space = ConfigSpace(
        targets=[*map(ModelDims.parse, target or ()), *([read_config(destination, "--to")[0]] if destination else [])],
        target_params=target_params,
        tolerance=tolerance,
        count=count,  # type: ignore[arg-type]
        config=build_config(source, vocab_size, tied=tied),
        sequence_length=sequence_length,
        hidden_multiple=hidden_multiple,
        ffn_ratios=_read_ratios(ffn_ratios),
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
        operators=split_list(operators),
        objective=objective,
        cost_model=paper.fit_cost_model() if cost_model == "paper" else CostModel.from_yaml(cost_model),
        mode=mode,  # type: ignore[arg-type]
        stages=stages,
        max_stages=max_stages,
        stage_price=stage_price,
        max_factor=max_factor,
        through=[ModelDims.parse(text) for text in through or ()],
    )
    schedules = planner.plan(
        top_k,
        tokens=_read_tokens(tokens),
        initial_share=0.0 if pretrained else PAPER_INITIAL_SHARE,
        already_seen=already_seen,
        sharing=sharing,  # type: ignore[arg-type]
    )
    best, config = schedules[0], space.config
    arms, choices = list[Arm](), list[Choice]()
    if with_arms and tokens is not None:
        arms = compare_at_equal_flops(
            best, config, sequence_length, planner.cost_model, planner.law, already_seen=already_seen
        )
    if with_choices:
        choices = explain(planner, best, already_seen)
    if output is not None:
        best.to_yaml(output)
    if plot is not None:
        others = [(arm.name, arm.schedule) for arm in arms[1:]]
        draw_plan(schedules, others, config=config, sequence_length=sequence_length, path=plot)
    if as_json:
        favours_growth = is_growth_favoured(arms) if arms else None
        results = {"schedules": schedules, "arms": arms, "favours_growth": favours_growth, "choices": choices}
        print_json({"objective": objective, **results})
        return
    console = Console()
    _show_schedules(schedules, config, objective)
    steps = zip(best.structures, map(_format_tokens, best.tokens), strict=True)
    console.print("1: " + " → ".join(f"{dims} {count}".strip() for dims, count in steps), highlight=False)
    if choices:
        _show_choices(choices, OBJECTIVES[objective])
    if arms:
        _show_arms(arms)
        console.print(_judge_growth(arms), highlight=False)
    if output is not None:
        print(f"schedule 1 written to {output}")
    if plot is not None:
        print(f"figure written to {plot}")


def _read_tokens(text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        counts = [float(part) for part in text.split(",")]
    except ValueError:
        expected = "expected a number such as 65e9, or one per stage, separated by commas"
        raise PlanError(f"--tokens {text!r}: {expected}") from None
    return counts if len(counts) > 1 else counts[0]


def _read_ratios(text: str) -> tuple[Fraction, ...]:
    try:
        ratios = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        ratios = ()
    if not ratios or min(ratios) <= 0:
        raise PlanError(f"--ffn-ratios {text!r}: expected positive numbers or fractions, separated by commas: 8/3,4")
    return ratios


def _show_schedules(schedules: Sequence[GrowthSchedule], config: ModelConfig, objective: str) -> None:
    initial = schedules[0].initial
    print_table(
        f"Growth from {initial}, {format_count(count_parameters(initial, config))} parameters",
        (">", "order", "target", ">params", *(f">{OBJECTIVES[name].title}" for name in schedules[0].scores)),
        [
            (
                str(rank),
                schedule.sequence,
                str(schedule.target),
                format_count(count_parameters(schedule.target, config)),
                *(f"{value:.3g}" for value in schedule.scores.values()),
            )
            for rank, schedule in enumerate(schedules, start=1)
        ],
        caption=f"target: (hidden, ffn, layers, heads); ranked by {objective}, best first",
    )


def _show_choices(choices: Sequence[Choice], objective: Objective) -> None:
    """Print each growth of the best schedule, and the best alternatives to it."""
    rows: list[tuple[str, ...]] = []
    for number, choice in enumerate(choices, start=1):
        taken = choice.taken
        rows.append((str(number), f"[bold]{taken.stage.label}", str(taken.stage.dims), f"{taken.value:.4g}", ""))
        for other in choice.others:
            ratio = f"× {other.value / taken.value:.3g}" if taken.value else ""
            rows.append(("", other.stage.label, str(other.stage.dims), f"{other.value:.4g}", ratio))
    print_table(
        f"Why this order: {objective.title} of the best schedule that continues with each growth",
        ("stage", "growth", "to", f">{objective.title}", ">"),
        rows,
        caption=f"the {objective.best} is best; same target, same number of stages",
    )


def _show_arms(arms: Sequence[Arm]) -> None:
    print_table(
        "Other ways to the same target, at the same training FLOPs",
        ("arm", "stages", ">tokens", ">FLOPs", ">hours", ">loss"),
        [
            (
                arm.name.replace("_", " "),
                arm.schedule.sequence or "–",
                _format_tokens(arm.tokens),
                f"{arm.flops:.3g}",
                "" if arm.hours is None else f"{arm.hours:,.4g}",
                "unknown" if arm.loss is None else f"{arm.loss:.4f}",
            )
            for arm in arms
        ],
        caption="hours: device hours by the cost model; loss: by a scaling law, if growth keeps the loss",
    )


def _judge_growth(arms: Sequence[Arm]) -> str:
    """Return a sentence that says whether the prediction favours growth at all."""
    losses, is_favoured = {arm.name: arm.loss for arm in arms}, is_growth_favoured(arms)
    if is_favoured is None:
        return "Whether growth pays is unknown: give the initial model's training tokens with --already-seen."
    plan, scratch = losses["plan"], losses["from_scratch"]
    assert plan is not None and scratch is not None
    if is_favoured:
        return f"The prediction favours growth: loss {plan:.4f}, from scratch {scratch:.4f} at the same FLOPs."
    return (
        f"The prediction favours no growth: from scratch reaches a loss of {scratch:.4f} with the same FLOPs, this "
        f"schedule {plan:.4f}."
    )


def _format_tokens(count: float) -> str:
    return format_count(count) if count else ""
