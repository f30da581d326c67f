"""Runs to report on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

from slop_hf.runs.directory import RunDirectory


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    """`write_run` under the test's own directory, by name."""

    def make(name: str = "grown", *args: Any, **kwargs: Any) -> RunDirectory:
        return write_run(tmp_path / name, *args, **kwargs)

    return make


@pytest.fixture
def text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the two figures of every report where only the text matters: they are what takes time."""

    def empty(runs: object, path: Path) -> Path:
        path.write_bytes(b"")
        return path

    for name in ("draw_run_losses", "draw_run_paths"):
        monkeypatch.setattr(f"slop_hf.report.write.{name}", empty)
