"""`slop advise`: the command and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from ..cost.device_peaks import look_up_peak_flops
from ..cost.hours import CostModel
from ..dims import ModelDims
from ..errors import PlanError
from ..io.files import check_output, write_text
from ..io.serialization import to_yaml
from ..io.units import format_bytes, format_count, format_significant
from ..paper import tables as paper
from ..planning.advice import Advice, AdvisedOption, Question, advise, build_run
from .model_config import (
    build_config,
    choose_sequence_length,
    parse_structure,
    read_config,
    read_law,
    read_whole_config,
)
from .options import (
    AsJson,
    Checkpointing,
    DeviceMemory,
    MemoryDevices,
    MicroBatchSize,
    PrecisionName,
    ZeroStage,
    build_memory_limit,
    make_option,
)
from .shared import print_json, print_table

_MODEL, _BUDGET, _HARDWARE, _OUTPUT = "Model", "Budget", "Hardware", "Output"
#: Names of devices that vendors print in full, as users write them.
_DEVICES = {"H100": "H100 80GB HBM3", "A100": "A100-SXM4-80GB"}


def advise_command(
    source: Annotated[
        str | None,
        make_option(_MODEL, "--from", help="Your model: a model directory, config.json or Hub id[@revision]."),
    ] = None,
    initial: Annotated[
        str | None, make_option(_MODEL, help="Its structure instead: hidden,ffn,layers,heads[,kv_heads[,head_dim]].")
    ] = None,
    already_seen: Annotated[
        float | None, make_option(_MODEL, help="Tokens that your model was trained on; 0 if it is untrained.")
    ] = None,
    target: Annotated[
        str | None, make_option(_MODEL, help="Structure to grow to, like --initial. Default: some are proposed.")
    ] = None,
    vocab_size: Annotated[int | None, make_option(_MODEL, help="Vocabulary size. Default: --from's or 32000.")] = None,
    tied: Annotated[bool, make_option(_MODEL, "--tied", help="Tie the input and output embeddings.")] = False,
    sequence_length: Annotated[
        int | None,
        make_option(_MODEL, help="Tokens per training sequence. Default: 2048, or the model's positions if fewer."),
    ] = None,
    data: Annotated[
        str | None, make_option(_MODEL, help="Training text for --output, as data.source names it: a file, a Hub id.")
    ] = None,
    flops: Annotated[float | None, make_option(_BUDGET, help="Training FLOPs, e.g. 1e20.")] = None,
    tokens: Annotated[
        float | None, make_option(_BUDGET, help="Tokens of your model (or else of --target), e.g. 20e9.")
    ] = None,
    hours: Annotated[float | None, make_option(_BUDGET, help="Device hours, with --cost-model or --device.")] = None,
    cost_model: Annotated[
        str | None, make_option(_HARDWARE, help="'paper' (its A100 hours), or a file written by `slop calibrate`.")
    ] = None,
    device: Annotated[
        str | None, make_option(_HARDWARE, help="Name of the device, such as H100, at --mfu instead of a cost model.")
    ] = None,
    mfu: Annotated[float, make_option(_HARDWARE, help="Assumed share of the device's peak speed in bf16.")] = 0.4,
    device_memory: DeviceMemory = None,
    devices: MemoryDevices = 1,
    zero: ZeroStage = 0,
    micro_batch_size: MicroBatchSize = 1,
    checkpointing: Checkpointing = False,
    precision: PrecisionName = "bf16",
    law: Annotated[
        str | None, make_option(_OUTPUT, help="Growth law: a file. Default: the law of the package.")
    ] = None,
    row: Annotated[int, make_option(_OUTPUT, help="Row of the table that --output writes.")] = 1,
    plot: Annotated[
        Path | None, make_option(_OUTPUT, help="Draw loss against FLOPs to a .png, .svg or .pdf file.")
    ] = None,
    output: Annotated[
        Path | None, make_option(_OUTPUT, "--output", "-o", help="Write the run to this file, for `slop train`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what to do with a budget: train on, start from scratch, or grow; and what each would give.

    All rows cost the same. Losses are predicted by a growth law, with their errors; the verdict may be that it is too
    close to call.

    Examples:

    `slop advise --from EleutherAI/pythia-410m --already-seen 300e9 --tokens 20e9`

    `slop advise --flops 1e20 --data texts/ -o run.yaml`
    """
    check_output(output, "--output", PlanError)
    check_output(plot, "--plot", PlanError)
    if plot is not None:
        from ..report.advice_figure import draw_advice  # matplotlib takes a second
        from ..report.plan_figure import check_suffix

        check_suffix(plot)
    if output is not None and data is None:
        raise PlanError("--output writes a run, which needs training text: give --data, such as a folder of texts")
    question = Question(
        *_choose_budget(flops, tokens, hours),
        start=_read_start(source, initial, already_seen),
        already_seen=already_seen or 0.0,
        target=None if target is None else parse_structure(target, "--target"),
        config=build_config(source, vocab_size, tied=tied),
        sequence_length=choose_sequence_length(
            {} if source is None else read_whole_config(source, "--from"), sequence_length
        ),
        cost_model=_choose_cost_model(cost_model, device, mfu),
        memory=build_memory_limit(device_memory, zero, devices, micro_batch_size, checkpointing, precision),
        law=read_law(law),
    )
    advice = advise(question)
    if not 1 <= row <= len(advice.options):
        raise PlanError(f"--row must be from 1 to {len(advice.options)}, the rows of the table, got {row}")
    if output is not None:
        write_text(output, to_yaml(build_run(question, advice.options[row - 1], data, source)))
    if plot is not None:
        draw_advice(question, advice, plot)
    if as_json:
        print_json(advice)
        return
    show_advice(question, advice)
    if output is not None:
        print(f"row {row} written to {output}")
    if plot is not None:
        print(f"figure written to {plot}")


def _read_start(source: str | None, initial: str | None, already_seen: float | None) -> ModelDims | None:
    if source is not None and initial is not None:
        raise PlanError("give the model with either --from or --initial")
    if source is None and initial is None:
        return None
    if already_seen is None:
        raise PlanError(
            "--already-seen is missing: give the tokens that the model was trained on, 0 if it is untrained"
        )
    return read_config(source, "--from")[0] if source is not None else parse_structure(initial or "", "--initial")


def _choose_budget(
    flops: float | None, tokens: float | None, hours: float | None
) -> tuple[float, Literal["flops", "tokens", "hours"]]:
    if [flops, tokens, hours].count(None) != 2:
        raise PlanError("give the budget with exactly one of --flops, --tokens and --hours")
    if flops is not None:
        return flops, "flops"
    return (tokens, "tokens") if tokens is not None else (hours or 0.0, "hours")


def _choose_cost_model(cost_model: str | None, device: str | None, mfu: float) -> CostModel | None:
    if cost_model is not None and device is not None:
        raise PlanError("give the speed of the hardware with either --cost-model or --device")
    if device is None:
        if cost_model is None:
            return None
        return paper.fit_cost_model() if cost_model == "paper" else CostModel.from_yaml(cost_model)
    peak = look_up_peak_flops(_DEVICES.get(device, device), "bf16")
    if peak is None:
        raise PlanError(
            f"--device {device!r}: no peak speed is known for it; measure one with `slop calibrate` instead"
        )
    if not 0 < mfu <= 1:
        raise PlanError(f"--mfu must be a share above 0, up to 1, got {mfu}")
    return CostModel(1 / (peak * mfu * 3600), hardware=f"{device} at {mfu:.0%} of its peak, assumed")


def show_advice(question: Question, advice: Advice) -> None:
    """Print the options of an answer as a table, their stages, and the verdict."""
    console = Console()
    has_hours = question.cost_model is not None
    names = ("", "option", ">params", *[">hours"] * has_hours, ">memory", ">loss", ">vs row 1", ">best")
    print_table(
        f"Ways to spend {_describe_budget(question, advice)}",
        names,
        [_build_row(number, option, has_hours) for number, option in enumerate(advice.options, start=1)],
        wraps=("option",),
        optional=("memory", "params"),
        caption="±: 80% interval; options share most of their errors; best: chance to end lowest",
    )
    for number, option in enumerate(advice.options, start=1):
        console.print(f"{number}: {_describe_stages(option)}", highlight=False)
    console.print()
    console.print(f"[bold]{advice.verdict.sentence}", highlight=False)
    if advice.verdict.growth_pays_from is not None:
        multiple = advice.verdict.growth_pays_from / advice.budget
        console.print(
            f"By this law, that growth would be the best way with {multiple:g} times the budget.", highlight=False
        )
    for remark in advice.remarks:
        console.print(remark, highlight=False)


def _describe_budget(question: Question, advice: Advice) -> str:
    if question.unit == "hours":
        assert question.cost_model is not None
        return f"{question.budget:g} device hours ({question.cost_model.hardware or 'cost model'})"
    amount = f"{advice.budget:.3g} FLOPs"
    if question.unit == "tokens":
        owner = "your model" if question.start is not None else "the target"
        return f"{amount}, {format_count(question.budget)} tokens of {owner}"
    return amount


def _build_row(number: int, option: AdvisedOption, has_hours: bool) -> Sequence[str]:
    difference = "" if number == 1 else f"{option.difference:+.3f} ±{option.difference_error:.3f}"
    return (
        str(number),
        f"[bold]{option.label}" if number == 1 else option.label,
        format_count(option.parameters),
        *([format_significant(float(f"{option.hours:.6g}"))] if has_hours else []),
        format_bytes(option.memory),
        f"{option.loss:.3f} ±{option.error:.2f}",
        difference,
        f"{option.chance:.0%}",
    )


def _describe_stages(option: AdvisedOption) -> str:
    """Return the structures with their tokens, and what else the table has no room for."""
    steps = zip(option.schedule.structures, option.schedule.tokens, strict=True)
    path = " → ".join(f"{dims} {format_count(count)}" for dims, count in steps)
    span = "" if not option.schedule.stages else ", over the run" if option.lr_span == "run" else ", per stage"
    total = "" if not option.schedule.stages else f", {format_count(option.tokens)} tokens"
    return f"{path}{total}, {option.flops:.2e} FLOPs, learning rate {option.learning_rate:g}{span}"
