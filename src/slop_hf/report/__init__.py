"""Reports: runs on disk as tables, figures, Markdown, HTML and JSON. No torch, no transformers."""

from __future__ import annotations

from .comparisons import compute_time_correlation, draw_heads, draw_radar, draw_time_correlation
from .figures import draw_run_losses, draw_run_paths
from .summary import RunSummary, compute_marginal_utility, name_runs, summarise
from .tables import build_comparison_table, tabulate_runs, tabulate_stages
from .write import write_report

__all__ = [
    "RunSummary",
    "build_comparison_table",
    "compute_marginal_utility",
    "compute_time_correlation",
    "draw_heads",
    "draw_radar",
    "draw_run_losses",
    "draw_run_paths",
    "draw_time_correlation",
    "name_runs",
    "summarise",
    "tabulate_runs",
    "tabulate_stages",
    "write_report",
]
