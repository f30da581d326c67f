"""The default law is the one that its command makes of the law fitted to all records."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("default_law_benchmark", ROOT / "benchmarks" / "default_law.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_law_is_up_to_date(benchmark, capsys):
    assert benchmark.main(["--check"]) == 0, capsys.readouterr().out


def test_another_fit_is_noticed_and_carried_over(benchmark, tmp_path, capsys):
    for name in (benchmark.FITTED, benchmark.LAW):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    fitted = tmp_path / benchmark.FITTED
    fitted.write_text(fitted.read_text().replace("  jump: 0.283366", "  jump: 0.5"))
    assert benchmark.main(["--check", "--root", str(tmp_path)]) == 1
    assert "run `python benchmarks/default_law.py`" in capsys.readouterr().out
    assert benchmark.main(["--root", str(tmp_path)]) == 0
    assert benchmark.main(["--check", "--root", str(tmp_path)]) == 0
    fitted.write_text("nonsense: 1")
    assert benchmark.main(["--check", "--root", str(tmp_path)]) == 2
