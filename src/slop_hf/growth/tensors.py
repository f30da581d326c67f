"""Applying a `ParameterPlan` to a tensor.

Random entries are drawn on the CPU in float32 from a generator seeded by (seed, parameter name), so that they depend
neither on the order of parameters nor on device or dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch

from .axes import AxisMap, Run
from .inits import Fill
from .plan import ParameterPlan

#: Entries drawn at a time. Changing it changes the random entries of every growth.
CHUNK = 2**18

#: Gives the distribution of a block that the named operators have added (None: a dimension where it is old).
Filler = Callable[[Sequence[str | None]], Fill]
#: Gives the factor of a block of old entries from its runs, one a dimension.
Factor = Callable[[Sequence[Run]], float]


def grow_parameter(tensor: torch.Tensor, plan: ParameterPlan) -> torch.Tensor:
    """The grown parameter: old entries scaled and in their places, new ones filled, noise on copies.

    Args:
        tensor: the old one, shape `[axis.old_size for axis in plan.maps]`; it is not changed, its storage not shared.
        plan: of this parameter.

    Returns:
        Tensor of shape `[axis.new_size for axis in plan.maps]`, with the dtype and device of the old one.
    """
    if plan.silent:
        if plan.row.kind == "norm":
            # New slots of the branch may hold zeros, and gains of zero on top of them would be dead for ever.
            silence = tensor.new_full([axis.old_size for axis in plan.maps], -plan.gain_offset)
            return assemble(silence, plan.maps, plan.fill, lambda runs: 1.0)
        return tensor.new_zeros([axis.new_size for axis in plan.maps])
    # Arithmetic in float32 at least: a half-precision weight is rounded once, when it is stored.
    exact = torch.promote_types(tensor.dtype, torch.float32)
    source = tensor.detach()
    if plan.centre:
        source = source.to(exact)
        source = (source - source.mean(dim=plan.row.axes.index("hidden"), keepdim=True)).to(tensor.dtype)
    if plan.gain_offset:
        source = ((source.to(exact) + plan.gain_offset) * plan.scale - plan.gain_offset).to(tensor.dtype)
    scale, reads = 1.0 if plan.gain_offset else plan.scale, plan.row.reads
    generator = generator_for(plan.seed, plan.name)

    def factor(runs: Sequence[Run]) -> float:
        return scale if reads is None else scale / runs[reads].copies

    grown = assemble(source, plan.maps, plan.fill, factor, generator)
    if plan.noise:
        add_zero_sum_noise(grown, plan.maps[-1], plan.noise, generator)
        # Rows that are to write zeros would write the rounding of that sum, which later layers magnify.
        for run in plan.maps[0].runs:
            if run.old is None and not plan.fill([run.operator, None]).std:
                grown[run.start : run.start + run.length] = 0
    return grown


def assemble(
    source: torch.Tensor,
    maps: Sequence[AxisMap],
    fill: Filler,
    factor: Factor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A tensor put together block by block from old entries times a factor, and new ones drawn from a distribution.

    >>> from .inits import ONE
    >>> assemble(torch.ones(2) * 3, [AxisMap.append(2, 3, "hidden")], lambda operators: ONE, lambda runs: 0.5)
    tensor([1.5000, 1.5000, 1.0000])
    """
    if all(axis.is_identity for axis in maps) and factor([axis.runs[0] for axis in maps]) == 1.0:
        return source.clone()
    exact = torch.promote_types(source.dtype, torch.float32)
    grown = torch.empty([axis.new_size for axis in maps], dtype=source.dtype, device=source.device)
    for runs in product(*(axis.runs for axis in maps)):
        block = grown[tuple(slice(run.start, run.start + run.length) for run in runs)]
        olds = [run.old for run in runs]
        if None not in olds:
            old = source[tuple(slice(run.old, run.old + run.length) for run in runs if run.old is not None)]
            times = factor(runs)
            block.copy_(old if times == 1.0 else old.to(exact) * times)
            continue
        mean, std = fill([run.operator if run.old is None else None for run in runs])
        if std:
            draw_normal(block, mean, std, generator)
        else:
            block.fill_(mean)
    return grown


def draw_normal(block: torch.Tensor, mean: float, std: float, generator: torch.Generator | None) -> None:
    """Fill a block from a normal distribution, chunk by chunk of its first dimension.

    The numbers drawn depend on the block's shape alone, not on its strides, dtype or device.
    """
    for part in _chunks(block):
        if part.dtype == torch.float32 and part.device.type == "cpu" and part.is_contiguous():
            part.normal_(mean, std, generator=generator)
        else:
            part.copy_(torch.empty(part.shape).normal_(mean, std, generator=generator))


def add_zero_sum_noise(weight: torch.Tensor, axis: AxisMap, std: float, generator: torch.Generator) -> None:
    """Part the copies that a weight reads by noise which sums to zero over the copies of each old slot.

    Copies hold the same activation, so what is read of them together does not change; but from now on their gradients
    differ, and so do they. Equal copies would stay equal for ever, and the model would learn no more than the old one.

    Args:
        weight: the grown weight; it reads its last dimension.
        axis: the map of that dimension.
        std: of the noise before its mean over the copies is taken away.
        generator: on the CPU.
    """
    source = [(new, old) for new, old in enumerate(axis.source) if old is not None]
    olds = torch.tensor([old for _, old in source])
    count = torch.bincount(olds, minlength=axis.old_size)
    copied = count[olds] > 1
    slots, olds = torch.tensor([new for new, _ in source])[copied], olds[copied]
    for part in _chunks(weight):
        drawn = torch.empty(*part.shape[:-1], len(slots)).normal_(0.0, std, generator=generator)
        drawn = drawn.to(torch.promote_types(part.dtype, torch.float32))  # the sum is zero to the weight's precision
        total = drawn.new_zeros(*part.shape[:-1], axis.old_size).index_add_(-1, olds, drawn)
        noise = drawn - (total / count.clamp(min=1))[..., olds]
        part[..., slots] += noise.to(part)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a few rows each, small enough to stay in the processor's cache."""
    rows = max(1, CHUNK * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]


def generator_for(seed: int, name: str) -> torch.Generator:
    """The generator of one parameter's new entries.

    >>> a, b = generator_for(0, "lm_head.weight"), generator_for(0, "lm_head.weight")
    >>> bool((torch.randn(3, generator=a) == torch.randn(3, generator=b)).all())
    True
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
