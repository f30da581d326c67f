"""It runs: the tests of tests/gpu, one line per test in the record."""

from __future__ import annotations

import os

import pytest
from common import PartRecord, Settings
from measuring import ROOT, Record, make_goal


class Recorder:
    """A plugin of pytest that adds each test to the record when it has ended."""

    def __init__(self, record: PartRecord) -> None:
        self.record = record
        self.tests: list[Record] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take note of a test's call; of its setup and teardown only if they fail or skip it."""
        if report.when != "call" and report.passed:
            return
        test: Record = {"name": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if not report.passed:
            lines = get_reason(report).strip().splitlines() or [""]
            test["reason"] = lines[-1][:300]
        self.tests.append(test)
        self.record.add(tests=self.tests)

    @property
    def failures(self) -> int:
        return sum(test["outcome"] == "failed" for test in self.tests)


def get_reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped or failed."""
    if isinstance(report.longrepr, tuple):  # path, line and reason of a skipped test
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.partition("\n")[0] if crash is not None else str(report.longrepr)


def run(settings: Settings) -> None:
    """Run the tests.

    Raises:
        SystemExit: if one of them fails, or none ran.
    """
    record = PartRecord.begin(settings, "runs")
    recorder = Recorder(record)
    os.environ["SLOP_REHEARSE"] = str(int(settings.rehearses))
    os.chdir(ROOT)
    words = ["-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    code = int(pytest.main([*words, f"--basetemp={settings.workdir / 'tests'}"], plugins=[recorder]))
    record.add([make_goal("tests that fail", recorder.failures + (code != 0 and not recorder.failures), 0)])
    if code:
        raise SystemExit(code)
