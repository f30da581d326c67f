"""`compare_arms`: an experiment from its runs to its record, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arms import arm_runs, with_trunks
from .config import Experiment
from .record import Comparison, collect
from .running import Told, machine_name, run_experiment
from .write import write_comparison


def compare_arms(
    experiment: Experiment,
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    told: Told | None = None,
    train: bool = True,
) -> Comparison:
    """Run all arms of an experiment, and write what came out of them into its directory.

    Args:
        experiment: to run, `Experiment.from_yaml("recipes/experiments/table2.yaml", "nano")`.
        root: its directory; what lies there is gone on with.
        devices, workers, told: as in `run_experiment`.
        train: whether to train what is missing; otherwise what has finished is compared.

    Returns:
        the comparison, which lies in `root` as `comparison.json` and `comparison.md` beside its figures.

    Raises:
        SlopError: for what cannot be run, before anything is; and where a run fails.
    """
    if train:
        run_experiment(experiment, root, devices=devices, workers=workers, told=told)
    comparison = collect(experiment, with_trunks(arm_runs(experiment)), Path(root), machine_name())
    write_comparison(comparison, root)
    return comparison
