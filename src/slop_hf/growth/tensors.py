"""Applying a `ParameterPlan` to a tensor."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product

import torch

from .axes import AxisMap, Run
from .inits import InitDistribution
from .plan import ParameterPlan
from .random_entries import NormalStream, split_into_chunks

#: Gives the distribution of a block that the named operators have added (None: a dimension where it is old).
Filler = Callable[[Sequence[str | None]], InitDistribution]
#: Gives the factor of a block of old entries from its runs, one a dimension.
Factor = Callable[[Sequence[Run]], float]


def grow_parameter(tensor: torch.Tensor, plan: ParameterPlan, out: torch.Tensor | None = None) -> torch.Tensor:
    """The grown parameter: old entries scaled and in their places, new ones filled, noise on copies.

    Args:
        tensor: the old one, shape `[axis.old_size for axis in plan.maps]`; it is not changed, its storage not shared.
        plan: of this parameter.
        out: where the grown one is to be put, of its shape, dtype and device; by default in new memory.

    Returns:
        Tensor of shape `[axis.new_size for axis in plan.maps]`, with the dtype and device of the old one.
    """
    if plan.silent:
        if plan.row.kind == "norm":
            # New slots of the branch may hold zeros, and gains of zero on top of them would be dead for ever.
            silence = tensor.new_full([axis.old_size for axis in plan.maps], -plan.gain_offset)
            return assemble(silence, plan.maps, plan.fill, lambda runs: 1.0, out=out)
        return allocate_grown(tensor, plan.maps, out).zero_()
    # Arithmetic in float32 at least: a half-precision weight is rounded once, when it is stored.
    exact = torch.promote_types(tensor.dtype, torch.float32)
    source = tensor.detach()
    if plan.centre:
        source = source.to(exact)
        source = (source - source.mean(dim=plan.row.axes.index("hidden"), keepdim=True)).to(tensor.dtype)
    if plan.gain_offset and plan.scale != 1.0:
        source = ((source.to(exact) + plan.gain_offset) * plan.scale - plan.gain_offset).to(tensor.dtype)
    scale, reads = 1.0 if plan.gain_offset else plan.scale, plan.row.reads
    draws = NormalStream(plan.seed, plan.name)

    def factor(runs: Sequence[Run]) -> float:
        return scale if reads is None else scale / runs[reads].copies

    grown = assemble(source, plan.maps, plan.fill, factor, draws, out)
    if plan.noise:
        add_zero_sum_noise(grown, plan.maps[-1], plan.noise, draws)
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
    draws: NormalStream | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A tensor put together block by block from old entries times a factor, and new ones drawn from a distribution.

    It goes to `out`, or else to new memory.

    >>> from .inits import ONE
    >>> assemble(torch.ones(2) * 3, [AxisMap.append(2, 3, "hidden")], lambda operators: ONE, lambda runs: 0.5)
    tensor([1.5000, 1.5000, 1.0000])
    """
    exact = torch.promote_types(source.dtype, torch.float32)
    grown = allocate_grown(source, maps, out)
    for runs in product(*(axis.runs for axis in maps)):
        block = grown[tuple(slice(run.start, run.start + run.length) for run in runs)]
        olds = [run.old for run in runs]
        if None not in olds:
            old = source[tuple(slice(run.old, run.old + run.length) for run in runs if run.old is not None)]
            times = factor(runs)
            if times == 1.0:
                block.copy_(old)
            else:
                for part, old_part in zip(split_into_chunks(block), split_into_chunks(old), strict=True):
                    part.copy_(old_part.to(exact) * times)
            continue
        mean, std = fill([run.operator if run.old is None else None for run in runs])
        if std:
            assert draws is not None
            draws.fill(block, mean, std)
        else:
            block.fill_(mean)
    return grown


def add_zero_sum_noise(weight: torch.Tensor, axis: AxisMap, std: float, draws: NormalStream) -> None:
    """Part the copies that a weight reads by noise which sums to zero over the copies of each old slot.

    Copies hold the same activation, so what is read of them together does not change; but from now on their gradients
    differ, and so do they. Equal copies would stay equal for ever, and the model would learn no more than the old one.

    Args:
        weight: the grown weight; it reads its last dimension.
        axis: the map of that dimension.
        std: of the noise before its mean over the copies is taken away.
        draws: the weight's random numbers.
    """
    copies: list[tuple[int, slice, slice, slice]] = []  # number; slots in the weight, in the old one, in what is drawn
    count = 0
    for start, length, old, many, _ in axis.runs:
        if old is not None and many > 1:
            slots, olds, place = (slice(first, first + length) for first in (start, old, count))
            copies.append((many, slots, olds, place))
            count += length
    for part in split_into_chunks(weight):
        drawn = draws.draw([*part.shape[:-1], count], 0.0, std)
        drawn = drawn.to(torch.promote_types(part.dtype, torch.float32))  # the sum is zero to the weight's precision
        mean = drawn.new_zeros(*part.shape[:-1], axis.old_size)
        for many, _, olds, place in copies:
            mean[..., olds] += drawn[..., place] / many
        for _, slots, olds, place in copies:
            part[..., slots] += (drawn[..., place] - mean[..., olds]).to(part)


def allocate_grown(source: torch.Tensor, maps: Sequence[AxisMap], out: torch.Tensor | None) -> torch.Tensor:
    """`out`, or new memory for the grown tensor."""
    shape = [axis.new_size for axis in maps]
    if out is None:
        return torch.empty(shape, dtype=source.dtype, device=source.device)
    assert (list(out.shape), out.dtype, out.device) == (shape, source.dtype, source.device)
    return out


@contextmanager
def start_worker_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that share out tensors: random numbers are drawn on one thread a tensor, so torch takes one in each."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


class ThreadMemory(threading.local):
    """A thread's memory for the tensor that it reads and the one that it writes, used again for the next.

    The kernel clears every page that it hands out, which takes longer than to fill it. A tensor of more than `limit`
    bytes has memory of its own, which is given back.

    Args:
        limit: in bytes, for each use.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[str, torch.Tensor] = {}

    def tensor(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content; the one before of the same use, in this thread, is written over."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._limit:
            return torch.empty(shape, dtype=dtype)
        if use not in self._held:
            self._held[use] = torch.empty(self._limit, dtype=torch.uint8)  # pages that are never touched cost nothing
        return self._held[use][:nbytes].view(dtype).view(shape)
