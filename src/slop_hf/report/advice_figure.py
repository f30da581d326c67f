"""The figure of an advice: predicted loss against training FLOPs, with the options marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..io.files import write_file
from ..planning.advice import Advice, Question, forecast_options
from .drawing import RUN_COLOURS, RUN_MARKERS, STYLE, LegendEntry, create_figure, draw_grid, draw_legend, shorten_name
from .plan_figure import check_suffix

#: Budgets drawn, relative to the one asked about.
_MULTIPLES = tuple(float(multiple) for multiple in np.geomspace(0.25, 4, 9))


def draw_advice(question: Question, advice: Advice, path: str | Path) -> Figure:
    """Draw the loss that each option would reach at budgets around the one asked about.

    Bands are central 80% intervals of the difference from the first option, around the predicted loss: the errors that
    all options share move the curves together.

    Args:
        question: question.
        advice: its answer.
        path: the file to write: PNG, SVG or PDF by its suffix.

    Raises:
        PlanError: if the path has another suffix.
    """
    check_suffix(path)
    budgets = np.array(_MULTIPLES) * advice.budget
    losses, errors = forecast_options(question, advice, budgets.tolist())
    with rc_context(STYLE):
        figure = create_figure(7.0, 4.6)
        axes = figure.add_subplot()
        entries: list[LegendEntry] = []
        for number, option in enumerate(advice.options):
            colour, marker = RUN_COLOURS[number % len(RUN_COLOURS)], RUN_MARKERS[number % len(RUN_MARKERS)]
            axes.plot(budgets, losses[number], color=colour, linewidth=1.6, gid=f"option-{number + 1}")
            low, high = losses[number] - errors[number], losses[number] + errors[number]
            axes.fill_between(budgets, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot([advice.budget], [option.loss], marker, color=colour, markersize=6, zorder=4)
            handle = Line2D([], [], color=colour, marker=marker, linewidth=2)
            entries.append((shorten_name(option.label, 46), handle))
        axes.axvline(advice.budget, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs" if advice.unit == "flops" else "device hours")
        axes.set_ylabel("predicted loss at the end (nats per token)")
        draw_grid(axes, "y")
        axes.set_title("Predicted losses of the options", loc="left", parse_math=False)
        draw_legend(figure, entries, letters=100)
        with write_file(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:].lower())
    return figure
