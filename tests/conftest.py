"""Tests run offline, quietly and on one thread; the libraries read these settings when they are first imported."""

import gc
import os
import sys
import tempfile
from contextlib import contextmanager

import pytest
import yaml
from hypothesis import settings

_hf_home = tempfile.TemporaryDirectory(prefix="slop-hf-tests-", ignore_cleanup_errors=True)  # removed at exit

os.environ.update(
    HF_HOME=_hf_home.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

# Imports and the collection of tests leave no garbage: searching for some takes 7 seconds.
gc.disable()
gc.set_threshold(20_000)

# Tests kill processes, but never the machine: a run of three seconds waits for the disk for one of them.
os.fsync = lambda descriptor: None

# The same examples in every run: a change is judged by what it changed, not by the dice.
settings.register_profile("steady", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_collection_finish(session):
    """Let `gc.collect`, which every stage and every evaluation calls, skip what the imports of all tests have made."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item):
    """The same for what earlier tests have imported and left behind."""
    gc.freeze()


@pytest.fixture
def slop(monkeypatch, capfd):
    """Run `slop` in this process, as a user would type it: (exit code, stdout, stderr)."""
    from slop_hf.cli import main  # after the settings above

    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["slop", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def output_of(slop):
    def output(*arguments):
        code, out, err = slop(*arguments)
        assert code == 0, err
        return out

    return output


@pytest.fixture
def error_of(slop):
    def error(*arguments):
        code, _, err = slop(*arguments)
        assert code == 2, err
        assert err.startswith("error: ") and len(err.strip().splitlines()) <= 2, err
        return err

    return error


@pytest.fixture
def another_writer():
    """Hold the lock of a directory, as process 1 of the machine "elsewhere" would."""
    from slop_hf.runs.lock import DirectoryLock, Process

    @contextmanager
    def write(directory):
        lock = DirectoryLock(directory)
        lock.acquire()
        lock.name_writers("training", [Process("elsewhere", 1, 0.0)])
        try:
            yield
        finally:
            lock.release()

    return write


@pytest.fixture
def config(tmp_path):
    """A run of three short stages over a few text files."""
    from slop_hf import ModelDims

    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"file {number}: " + " ".join(str(number * k) for k in range(60)))
    dims = ModelDims(16, 32, 2, 2)
    deeper = dims.replace(num_hidden_layers=3)
    wider = deeper.replace(intermediate_size=48)
    stages = [
        {"operators": ["layer"], "dims": deeper.as_dict(), "tokens": 600},
        {"operators": ["ffn"], "dims": wider.as_dict(), "tokens": 600},
    ]
    data = {
        "source": str(texts),
        "vocab_size": 300,
        "block_size": 32,
        "held_out": 0.2,
        "cache_dir": str(tmp_path / "cache"),
    }
    run = {
        "schedule": {"initial": dims.as_dict(), "initial_tokens": 600, "stages": stages},
        "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
        "data": data,
        "training": {"per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 2, "disable_tqdm": True},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path
