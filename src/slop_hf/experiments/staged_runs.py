"""Runs of a comparison as a growth law sees them, and a figure of its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from matplotlib import rc_context
from matplotlib.lines import Line2D

from ..cost.growth_law import GrowthLaw
from ..cost.least_squares import Z80
from ..cost.staged_run import StagedRun, TrainedStage, compute_factors
from ..dims import ModelDims
from ..errors import RunError
from ..io.serialization import Json, parse
from ..operators import resolve_inits
from ..report.drawing import (
    RUN_COLOURS,
    STYLE,
    LegendEntry,
    create_figure,
    draw_grid,
    draw_legend,
    shorten_name,
    write_png,
)
from ..schedule import GrowthStage
from ..training.config import RunConfig, preview_rates
from ..training.spans import StageSpan
from .comparison import FINISHED_RATE, Comparison, RunResult, StageResult

#: Rates of a stage are averaged over this many equal parts.
_RATES = 48


def list_staged_runs(comparison: Comparison) -> list[StagedRun]:
    """Return the runs of a comparison, in its order, with their learning rates and held-out losses.

    Raises:
        RunError: if the record lacks the config of its runs, or a learning rate depends on more than the step.
    """
    if "run" not in comparison.settings:
        raise RunError(f"the record of {comparison.name} lacks the config of its runs; make it with `slop compare`")
    shared = parse(RunConfig, comparison.settings["run"], where=f"the record of {comparison.name}", error=RunError)
    changes = comparison.settings.get("arms")
    rates: dict[tuple[str, float], list[tuple[float, ...]]] = {}
    runs = []
    for run in comparison.runs:
        training = {**shared.training, **(changes.get(run.arm, {}) if isinstance(changes, dict) else {})}
        key = run.arm, run.budget
        if key not in rates:
            config = replace(shared, schedule=run.schedule, training=training)
            rates[key] = [_thin(stage) for stage in preview_rates(config).rates]
        runs.append(
            StagedRun(
                _list_stages(run, rates[key], is_carried=_carries_state(training)),
                experiment=comparison.name,
                text=describe_text(shared),
                is_finished=run.is_finished,
            )
        )
    return runs


def describe_text(run: RunConfig) -> str:
    """Return what losses depend on besides the run: its text and how it is cut into tokens and blocks."""
    data = run.data
    return f"{data.source}, {data.tokenizer_kind} of {data.vocab_size}, blocks of {data.block_size}"


def _thin(rates: Sequence[float]) -> tuple[float, ...]:
    """Return a stage's rates, averaged over equal parts if there are many."""
    if len(rates) <= _RATES:
        return tuple(rates) or (0.0,)
    edges = [round(number * len(rates) / _RATES) for number in range(_RATES + 1)]
    return tuple(sum(rates[a:b]) / (b - a) for a, b in pairwise(edges))


def _list_stages(run: RunResult, rates: Sequence[tuple[float, ...]], *, is_carried: bool) -> tuple[TrainedStage, ...]:
    return tuple(
        _build_stage(
            result,
            run.stages[number - 1].dims if number else None,
            run.schedule.stages[number - 1] if number else None,
            stage_rates,
            is_carried=is_carried,
            losses=_list_losses(run, number),
        )
        for number, (result, stage_rates) in enumerate(zip(run.stages, rates, strict=True))
    )


def _build_stage(
    stage: StageResult | StageSpan,
    before: ModelDims | None,
    growth: GrowthStage | None,
    rates: tuple[float, ...],
    *,
    is_carried: bool,
    losses: tuple[tuple[float, float], ...] = (),
) -> TrainedStage:
    """Return a planned or finished stage; `before` is the structure that it grew from."""
    inits = resolve_inits(growth.operators, growth.init) if growth else {}
    return TrainedStage(
        parameters=stage.parameters,
        width=stage.dims.hidden_size,
        tokens=stage.tokens,
        rates=rates,
        factors=compute_factors(before, stage.dims) if before else {},
        is_copied=inits.get("hidden", "random") != "random",
        is_carried=is_carried and before is not None,
        losses=losses,
    )


def plan_staged_run(config: RunConfig, *, experiment: str = "") -> StagedRun:
    """Return a run as a growth law sees it, before it is trained: its stages in whole steps, without losses.

    Args:
        config: model, data, training and schedule of the run.
        experiment: name of the experiment that it belongs to.

    Raises:
        SlopError: if the run could not begin, or a learning rate depends on more than the step.
    """
    preview = preview_rates(config)
    is_carried = _carries_state(config.training)
    stages, before = [], None
    for span, rates in zip(preview.spans, preview.rates, strict=True):
        stages.append(_build_stage(span, before, span.growth, _thin(rates), is_carried=is_carried))
        before = span.dims
    is_finished = preview.end_rate <= FINISHED_RATE
    return StagedRun(tuple(stages), experiment, describe_text(config), is_finished)


def measure_staged_run(config: RunConfig, result: RunResult, *, experiment: str = "") -> StagedRun:
    """Return a finished run with its held-out losses; arguments and errors as for `plan_staged_run`."""
    planned = plan_staged_run(config, experiment=experiment)
    stages = [replace(stage, losses=_list_losses(result, number)) for number, stage in enumerate(planned.stages)]
    return replace(planned, stages=tuple(stages))


def _carries_state(training: Mapping[str, Json]) -> bool:
    """Whether the optimizer state grows with the weights, by the argument or by its earlier name."""
    state = training.get("optimizer_state_at_growth")
    return state != "new" if state is not None else bool(training.get("carry_optimizer_state"))


def _list_losses(run: RunResult, number: int) -> tuple[tuple[float, float], ...]:
    """Return the losses of a stage by its share of tokens, the one at its end last, without the one after growth."""
    stage = run.stages[number]
    if not stage.tokens:
        return ()
    before = sum(other.flops for other in run.stages[:number])
    points = zip(run.curve.stages, run.curve.flops, run.curve.losses, strict=True)
    shares = [((flops - before) / stage.flops, loss) for part, flops, loss in points if part == number]
    return (*((share, loss) for share, loss in shares if 0 < share < 0.97), (1.0, stage.eval_loss))


def draw_residuals(law: GrowthLaw, runs: Sequence[StagedRun], path: str | Path, *, source: str = "") -> Path:
    """Draw measured minus predicted losses at the ends of runs against the predicted ones, by experiment.

    Args:
        law: law to predict with, which knows the texts of the runs.
        runs: runs; those without a loss at their end are left out.
        path: PNG file to write.
        source: fingerprint of the data, see `write_png`.

    Raises:
        RunError: if no run has a loss at its end.
    """
    measured = [run for run in runs if run.end_loss is not None]
    if not measured:
        raise RunError(f"none of {len(runs)} runs has a loss at the end of a finished learning-rate schedule")
    points: dict[str, list[tuple[float, float]]] = {}
    for run, forecast in zip(measured, law.predict_all(measured), strict=True):
        points.setdefault(run.experiment, []).append((forecast.loss, (run.end_loss or 0.0) - forecast.loss))
    with rc_context(STYLE):
        figure = create_figure(6.4, 4.2)
        axes = figure.add_subplot()
        entries: list[LegendEntry] = []
        for number, (name, pairs) in enumerate(points.items()):
            style = {"color": RUN_COLOURS[number % len(RUN_COLOURS)], "marker": "o", "linestyle": "none", "alpha": 0.8}
            axes.plot(*zip(*pairs, strict=True), zorder=3, markersize=5, **style)
            entries.append((shorten_name(name, 28), Line2D([], [], **style)))
        axes.axhspan(-Z80 * law.deviation, Z80 * law.deviation, color="0.92", zorder=0)
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set_xlabel("predicted loss at the end (nats per token)")
        axes.set_ylabel("measured minus predicted")
        draw_grid(axes, "y")
        axes.set_title(f"Errors of the growth law over {len(measured)} runs", loc="left", parse_math=False)
        draw_legend(figure, entries, letters=60)
        return write_png(figure, path, source=source)
