"""`slop plan`: the command and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ..architectures import read_setting
from ..baselines import Arm, compare_at_equal_flops
from ..baselines.comparison import forecast_final_loss
from ..cost.flops import count_parameters
from ..cost.hours import CostModel
from ..cost.memory import MemoryLimit
from ..dims import ModelConfig, ModelDims
from ..errors import PlanError
from ..io.files import check_output
from ..io.units import format_count, format_significant
from ..operators import OPERATORS
from ..paper import tables as paper
from ..planning.advice import Advice, Question, judge_schedule
from ..planning.explain import Choice, explain
from ..planning.final_loss import LossSettings, SearchOutcome
from ..planning.objectives import FINAL_LOSS, OBJECTIVE_NAMES, OBJECTIVES, Objective, get_title
from ..planning.planner import SlopPlanner
from ..planning.space import ConfigSpace
from ..schedule import PAPER_INITIAL_SHARE, GrowthSchedule
from .model_config import build_config, read_config, read_law, read_structure
from .options import (
    AsJson,
    Checkpointing,
    DeviceMemory,
    MemoryDevices,
    MicroBatchSize,
    PrecisionName,
    ZeroStage,
    make_option,
    split_list,
)
from .shared import print_if_slow, print_json, print_table
from .wording import name_options

#: `favours_growth` in JSON by the kind of a verdict; None for the others.
_VERDICTS = {"grow": True, "do_not_grow": False}
_SLOW = "still searching; a coarser --hidden-multiple or --ffn-multiple, fewer --stages or --mode once is faster"
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
        str, make_option(_SEARCH, help=f"Objective to rank schedules by: {', '.join(OBJECTIVE_NAMES)}.")
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
    flops: Annotated[
        float | None, make_option(_TOKENS, help="Training FLOPs of the run, e.g. 1e20, for --objective final_loss.")
    ] = None,
    law: Annotated[
        str | None,
        make_option(
            _TOKENS,
            help="Growth law of the verdict and of --objective final_loss: a file. Default: the law of the package.",
        ),
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
    device_memory: DeviceMemory = None,
    devices: MemoryDevices = 1,
    zero: ZeroStage = 0,
    micro_batch_size: MicroBatchSize = 1,
    checkpointing: Checkpointing = False,
    precision: PrecisionName = "bf16",
    optimizer: Annotated[
        str, make_option(_HARDWARE, help="'adamw', or 'muon', whose state is smaller: for the memory.")
    ] = "adamw",
    with_arms: Annotated[
        bool,
        make_option(
            _OUTPUT, "--arms/--no-arms", help="Compare schedule 1 with other ways to the same target (with --tokens)."
        ),
    ] = True,
    with_choices: Annotated[
        bool, make_option(_OUTPUT, "--explain", help="Show the alternatives to each growth of schedule 1.")
    ] = False,
    wide: Annotated[
        bool, make_option(_OUTPUT, "--wide", help="List every objective of each schedule, not only the one ranked by.")
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
    # Without a limit, the other settings have no effect; they are checked all the same.
    room = 1.0 if device_memory is None else device_memory
    memory = MemoryLimit(
        room,
        zero,
        devices,
        micro_batch_size,
        checkpointing,
        precision,  # type: ignore[arg-type]
        optimizer,  # type: ignore[arg-type]
    )
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
        memory=None if device_memory is None else memory,
    )
    loss_law = read_law(law)
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
        loss=LossSettings(loss_law),
    )
    outcomes = list[SearchOutcome]()
    with print_if_slow(_SLOW):
        schedules = planner.plan(
            top_k,
            tokens=_read_tokens(tokens),
            flops=flops,
            initial_share=0.0 if pretrained else PAPER_INITIAL_SHARE,
            already_seen=already_seen,
            sharing=sharing,  # type: ignore[arg-type]
            observe=outcomes.append,
        )
    config = space.config
    # Only what the user said: another vocabulary than the default one is no mistake.
    is_given = {"vocab_size": vocab_size is not None, "tie_word_embeddings": tied}
    planned_for = {name: read_setting(config, name) for name in is_given if is_given[name] or source is not None}
    schedules = [replace(schedule, **planned_for) for schedule in schedules]
    best = schedules[0]
    arms, choices, advice, no_verdict = list[Arm](), list[Choice](), None, ""
    if with_arms and any(best.tokens):
        arms = compare_at_equal_flops(
            best, config, sequence_length, planner.cost_model, planner.law, already_seen=already_seen
        )
        question = Question(
            best.flops(config, sequence_length),
            start=best.initial,
            already_seen=already_seen,
            target=best.target,
            config=config,
            sequence_length=sequence_length,
            cost_model=planner.cost_model,
            law=loss_law,
        )
        try:
            advice = judge_schedule(question, best)
        except PlanError as caught:
            reason = name_options(str(caught), {"already_seen": "--already-seen"})
            no_verdict = f"No verdict on growth: {reason}"
    if with_choices:
        with print_if_slow(_SLOW):
            choices = explain(planner, best, already_seen)
    if output is not None:
        best.to_yaml(output)
    if plot is not None:
        others = [(arm.name, arm.schedule) for arm in arms[1:]]
        losses: list[float | None] = []
        if all(any(schedule.tokens) for schedule in schedules):
            losses = [forecast_final_loss(schedule, config, planner.law, already_seen) for schedule in schedules]
            losses += [arm.loss for arm in arms[1:]]
        draw_plan(schedules, others, config=config, sequence_length=sequence_length, path=plot, losses=losses)
    if as_json:
        favours_growth = None if advice is None else _VERDICTS.get(advice.verdict.kind)
        results = {"schedules": schedules, "arms": arms, "favours_growth": favours_growth, "choices": choices}
        results |= {} if advice is None else {"advice": advice}
        searches = [{"search": outcome} for outcome in outcomes]
        print_json({"objective": objective, **results, **(searches[0] if searches else {})})
        return
    console = Console()
    _show_schedules(schedules, config, objective, wide=wide)
    steps = zip(best.structures, map(_format_tokens, best.tokens), strict=True)
    path = "1: " + " → ".join(f"{dims} {count}".strip() for dims, count in steps)
    console.print(path if len(path) <= console.width else path.replace(" → ", "\n   → "), highlight=False)
    for outcome in outcomes:
        spans = {"run": "one learning-rate schedule over the run", "stage": "a learning-rate schedule per stage"}
        console.print(f"{outcome.describe()} Schedule 1 has {spans[outcome.runs[0].span]}.", highlight=False)
    for remark in _list_remarks(best, objective, sharing):
        console.print(remark, highlight=False)
    if choices:
        console.print()
        _show_choices(choices, OBJECTIVES[objective])
    if arms:
        console.print()
        _show_arms(arms)
        for line in [no_verdict] if advice is None else _describe_verdict(advice):
            console.print(line, highlight=False)
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


def _show_schedules(schedules: Sequence[GrowthSchedule], config: ModelConfig, objective: str, *, wide: bool) -> None:
    initial, scores = schedules[0].initial, schedules[0].scores
    # Whatever ranks the schedules, and what they cost.
    shown = [name for name in scores if wide or name in (objective, "flops", "hours")]
    caption = f"target: (hidden, ffn, layers, heads); ranked by {objective}, best first"
    print_table(
        f"Growth from {initial}, {format_count(count_parameters(initial, config))} parameters",
        (">", "order", "target", ">params", *(f">{get_title(name)}" for name in shown)),
        [
            (
                str(rank),
                schedule.sequence,
                str(schedule.target),
                format_count(count_parameters(schedule.target, config)),
                *(_format_score(name, schedule.scores[name]) for name in shown),
            )
            for rank, schedule in enumerate(schedules, start=1)
        ],
        wraps=("target",),
        caption=caption if len(shown) == len(scores) else f"{caption}; --wide lists every objective",
    )


def _format_score(objective: str, value: float) -> str:
    if objective == FINAL_LOSS:
        return f"{value:.4f}"
    return _format_hours(value) if objective == "hours" else f"{value:.3g}"


def _format_hours(hours: float | None) -> str:
    return format_significant(hours) if hours is None or hours >= 0.001 else f"{hours:.3g}"


def _list_remarks(best: GrowthSchedule, objective: str, sharing: str) -> list[str]:
    """Return what a reader of the best schedule could take for something else."""
    remarks = []
    empty = [str(number) for number, stage in enumerate(best, start=1) if not stage.tokens]
    if sharing == "utility" and empty:
        remarks.append(
            f"Stages without tokens: {', '.join(empty)}. They grow the model and do not train it, since by the "
            "scaling law the budget is better used in the others; --sharing paper trains every stage."
        )
    if objective.startswith("delta_params") and any(stage.operators == ("mha",) for stage in best):
        remarks.append(
            f"{objective} counts l·(6h² + 3hf) parameters, without heads: a stage that grows only heads costs "
            "nothing when it comes first, so the best orders begin with it."
        )
    return remarks


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
        wraps=("to",),
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
                _format_hours(arm.hours),
                "unknown" if arm.loss is None else f"{arm.loss:.4f}",
            )
            for arm in arms
        ],
        wraps=("stages",),
        caption="hours: device hours by the cost model; loss: by a scaling law, if growth keeps the loss",
    )


def _describe_verdict(advice: Advice) -> list[str]:
    """Return sentences that say whether growth pays at all."""
    if advice.verdict.chance_growth is None:
        return [advice.verdict.sentence]
    names = {"growth": "this schedule", "scratch_target": "from scratch, the same target"}
    rows = [f"{names.get(o.kind, o.label)} {o.loss:.3f}" for o in advice.options]
    share = advice.options[0].error
    return [
        f"Losses by a growth law, at the same FLOPs: {'; '.join(rows)} (± {share:.2f}, mostly shared).",
        advice.verdict.sentence,
        "`slop advise` looks for better ways.",
    ]


def _format_tokens(count: float) -> str:
    return format_count(count) if count else ""
