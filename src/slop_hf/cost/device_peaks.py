"""Peak speeds of accelerators, as their vendors state them: the denominator of MFU."""

from __future__ import annotations

import re

from ..errors import PlanError

MATMUL_DTYPES = ("bf16", "fp16", "tf32", "fp32")

# Dense matrix products in 1e12 FLOP/s, in the order of MATMUL_DTYPES; None if the device has no unit for the dtype, or
# there is no figure that we trust. The figures are from vendors' data sheets; half of a figure given only "with
# sparsity". Half precision accumulates in float32, as torch does, which runs at half speed on GeForce cards. The
# figures for GeForce and A6000 are from the white papers of GA102, Ada and RTX Blackwell; B200 and GB200 are HGX B200
# and GB200 NVL72, divided by 8 and 72. Names match as a whole: a variant with other clocks, or a slice of a device
# (MIG), is unknown rather than wrong.
_PEAKS: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    (r"V100-SXM2-(16|32)GB", (None, 125.0, None, 15.7)),
    (r"V100-PCIE-(16|32)GB", (None, 112.0, None, 14.0)),
    (r"V100S-PCIE-32GB", (None, 130.0, None, 16.4)),
    (r"T4", (None, 65.0, None, 8.1)),
    (r"A10", (125.0, 125.0, 62.5, 31.2)),
    (r"A100-(SXM4?|PCIE)-(40|80)GB|A100 80GB PCIe", (312.0, 312.0, 156.0, 19.5)),
    (r"L4", (121.0, 121.0, 60.0, 30.3)),
    (r"L40S", (362.05, 362.05, 183.0, 91.6)),
    (r"H100 80GB HBM3|H200|GH200 \d+GB?( HBM3e)?", (989.5, 989.5, 494.5, 67.0)),
    (r"H100 PCIe", (756.5, 756.5, 378.0, 51.0)),
    (r"H(100|200) NVL", (835.5, 835.5, 417.5, 60.0)),
    (r"B200", (2250.0, 2250.0, 1125.0, None)),
    (r"GB200", (2500.0, 2500.0, 1250.0, None)),
    (r"RTX 3090", (71.0, 71.0, 35.6, 35.6)),
    (r"RTX 4090", (165.2, 165.2, 82.6, 82.6)),
    (r"RTX 5090", (209.5, 209.5, 104.8, 104.8)),
    (r"RTX A6000", (154.8, 154.8, 77.4, 38.7)),
    (r"MI250X", (191.5, 191.5, None, 47.85)),  # half of the card: torch sees each of its two dies as a device
    (r"MI3(00|25)X( OAM| VF)?", (1307.4, 1307.4, 653.7, 163.4)),  # in one piece (SPX); the name is the same in parts
)
_VENDOR = re.compile(r"((NVIDIA|AMD|Tesla|GeForce|Instinct) )*")  # driver versions differ in these


def look_up_peak_flops(device_name: str, dtype: str) -> float | None:
    """Look up the peak speed of a device's dense matrix products, in FLOP/s.

    Args:
        device_name: name as `torch.cuda.get_device_name()` returns it.
        dtype: precision of the products: "bf16", "fp16", "tf32" (float32 tensors, if torch may round them) or "fp32".

    Returns:
        The peak, or None for an unknown device, such as a CPU, and for a device that does not compute in `dtype`.

    Raises:
        PlanError: for any other `dtype`.

    >>> f"{look_up_peak_flops('NVIDIA H100 80GB HBM3', 'bf16'):.4g}"
    '9.895e+14'
    >>> print(look_up_peak_flops("Tesla T4", "bf16"))
    None
    """
    if dtype not in MATMUL_DTYPES:
        raise PlanError(f"dtype must be one of {', '.join(MATMUL_DTYPES)}, got {dtype!r}")
    name = _VENDOR.sub("", device_name.strip(), count=1)
    for pattern, peaks in _PEAKS:
        if re.fullmatch(pattern, name):
            peak = peaks[MATMUL_DTYPES.index(dtype)]
            return None if peak is None else peak * 1e12
    return None
