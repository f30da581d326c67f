"""Peak speeds by the names that torch gives to devices."""

import math

import pytest

from slop_hf.cost.device_peaks import _PEAKS, MATMUL_DTYPES, look_up_peak_flops

# As `torch.cuda.get_device_name()` spells them; older drivers leave "NVIDIA" out. Peak in bf16, or fp16 before Ampere.
NAMES = {
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla V100S-PCIE-32GB": 130e12,
    "Tesla T4": 65e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200 480GB": 989.5e12,
    "NVIDIA GH200 144G HBM3e": 989.5e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA RTX A6000": 154.8e12,
    "AMD Instinct MI250X": 191.5e12,
    "AMD Instinct MI300X": 1307.4e12,
    "AMD Instinct MI300X OAM": 1307.4e12,
    "AMD Instinct MI300X VF": 1307.4e12,
    "AMD Instinct MI325X": 1307.4e12,
}
# Beside CPUs: parts of a device, and devices whose names only begin like one that is known.
UNKNOWN = [
    "",
    "cpu",
    "Intel(R) Xeon(R) Platinum 8480+",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A10G",
    "NVIDIA A800-SXM4-80GB",
    "NVIDIA H20",
    "NVIDIA L40",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA RTX A6000-48Q",
    "AMD Instinct MI250X / MI250",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_as_torch_spells_them(name):
    half = "bf16" if look_up_peak_flops(name, "bf16") else "fp16"
    assert half == ("fp16" if name.startswith("Tesla") else "bf16")
    assert look_up_peak_flops(name, half) == NAMES[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_names_are_unknown(name):
    assert [look_up_peak_flops(name, dtype) for dtype in MATMUL_DTYPES] == [None] * 4


def test_every_row_is_found_by_a_name():
    known = {tuple(look_up_peak_flops(name, dtype) for dtype in MATMUL_DTYPES) for name in NAMES}
    assert known == {tuple(None if peak is None else peak * 1e12 for peak in peaks) for _, peaks in _PEAKS}


def test_figures_are_dense_ones():
    """Sparse figures are twice as high in every dtype but float32: one that slipped in would stand out."""
    for pattern, (bf16, fp16, tf32, fp32) in _PEAKS:
        assert bf16 in (None, fp16), pattern
        assert tf32 is None or math.isclose(tf32, fp16 / 2, rel_tol=0.02), pattern
        assert fp32 is None or fp32 <= (tf32 or fp16 / 4), pattern


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="bf16, fp16, tf32, fp32, got 'int8'"):
        look_up_peak_flops("NVIDIA H200", "int8")
