"""The random numbers of new entries: their distribution, and what they depend on."""

import math

import pytest
import torch

from slop_hf.growth import random_entries
from slop_hf.growth.random_entries import NormalStream


def test_they_are_normal():
    drawn = NormalStream(0, "a").draw([1000, 1000], 0.0, 1.0).double().flatten()
    assert abs(drawn.mean()) < 4 / math.sqrt(drawn.numel())
    assert drawn.std() == pytest.approx(1.0, abs=0.003)
    assert (drawn**4).mean() == pytest.approx(3.0, abs=0.03)
    # Kolmogorov-Smirnov: the largest distance from the normal distribution, at a level of about 1 in 10,000.
    steps = torch.arange(1, drawn.numel() + 1) / drawn.numel()
    distance = (torch.special.ndtr(drawn.sort().values) - steps).abs().max()
    assert distance * math.sqrt(drawn.numel()) < 2.2
    neighbours = (drawn[:-1] * drawn[1:]).mean()
    assert abs(neighbours) < 4 / math.sqrt(drawn.numel())


def test_mean_and_deviation():
    drawn = NormalStream(3, "a").draw([300, 300], 5.0, 0.02)
    assert drawn.dtype == torch.float32
    assert drawn.mean() == pytest.approx(5.0, abs=4 * 0.02 / 300)
    assert drawn.std() == pytest.approx(0.02, rel=0.02)


def test_each_parameter_and_seed_has_its_stream():
    streams = [NormalStream(seed, name).draw([1000], 0.0, 1.0) for seed in (0, 1) for name in ("a", "b")]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(4)
    assert correlations.abs().max() < 4 / math.sqrt(1000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_strides_and_dtype_change_nothing_but_rounding(dtype, monkeypatch):
    monkeypatch.setattr(random_entries, "ENTRIES_PER_CHUNK", 50)
    plain = torch.empty(23, 7)
    NormalStream(0, "a").fill(plain, 1.0, 0.1)
    strided = torch.empty(7, 40, dtype=dtype).T[10:33]
    NormalStream(0, "a").fill(strided, 1.0, 0.1)
    assert torch.equal(strided, plain.to(dtype))
    assert len(plain.unique()) > 100


@pytest.mark.parametrize("shape", [[0], [1], [3], [5, 1], [0, 4]])
def test_shapes_of_few_entries(shape):
    block = torch.empty(shape)
    NormalStream(0, "a").fill(block, 0.0, 1.0)
    assert block.isfinite().all()
