"""Reports: runs on disk as tables, figures, Markdown, HTML and JSON. No torch, no transformers."""

from __future__ import annotations

from .comparisons import correlation_figure, heads_figure, radar_figure, time_correlation
from .figures import loss_figure, path_figure
from .summary import RunSummary, marginal_utility, run_names, summarise
from .tables import comparison_markdown, comparison_table, stage_markdown
from .write import write_report

__all__ = [
    "RunSummary",
    "comparison_markdown",
    "comparison_table",
    "correlation_figure",
    "heads_figure",
    "loss_figure",
    "marginal_utility",
    "path_figure",
    "radar_figure",
    "run_names",
    "stage_markdown",
    "summarise",
    "time_correlation",
    "write_report",
]
