"""Runs to report on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

from slop_hf.report.write import REPORT_FIGURES
from slop_hf.runs.directory import RunDirectory


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    """Write a run with `write_run`, by its name, in the temporary directory of the test."""

    def make(name: str = "grown", *args: Any, **kwargs: Any) -> RunDirectory:
        return write_run(tmp_path / name, *args, **kwargs)

    return make


@pytest.fixture
def text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the two figures of every report in tests of the text: drawing takes most of the time."""

    def empty(runs: object, path: Path) -> Path:
        path.write_bytes(b"")
        return path

    for name in ("loss", "path"):
        kind = replace(REPORT_FIGURES[name], draw=empty)
        monkeypatch.setitem(REPORT_FIGURES, name, kind)
