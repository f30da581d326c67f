"""Tests for a GPU: `python -m pytest -m gpu tests/gpu`. SLOP_REHEARSE=1 runs them on the CPU, to try them out."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # the run of the training tests

REHEARSES = os.environ.get("SLOP_REHEARSE") == "1"
if REHEARSES:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # torch_compile then compiles nothing


@pytest.fixture(scope="session")
def device():
    import torch

    if REHEARSES:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; SLOP_REHEARSE=1 tries the test on the CPU")
    return "cuda"


@pytest.fixture
def build(device, tmp_path):
    """Build a trainer of the tests' run on the device; `name` is its directory."""
    import training_runs

    def build(name="run", **settings):
        return training_runs.trainer(tmp_path / name, **{"use_cpu": device == "cpu", **settings})

    return build
