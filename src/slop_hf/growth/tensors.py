"""Execution of a `ParameterPlan` on a tensor."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product

import torch

from ..operators import VOCABULARY
from .axes import AxisMap, Segment
from .inits import InitDistribution
from .plan import ParameterPlan
from .random_entries import NormalStream, split_into_chunks

#: The operators that added a block, one per dimension (None: old there) -> the distribution of its entries.
ChooseDistribution = Callable[[Sequence[str | None]], InitDistribution]
#: The segments of a block of old entries, one per dimension -> the factor of its entries.
ComputeFactor = Callable[[Sequence[Segment]], float]


def grow_parameter(tensor: torch.Tensor, plan: ParameterPlan, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the grown parameter: old entries scaled and moved, new ones filled, noise added to copies.

    Args:
        tensor: old parameter, shape `plan.old_shape`; it is not changed and shares no storage with the result.
        out: tensor of shape `plan.new_shape`, with the dtype and device of the old one, to write the result into; None
            allocates one.
    """
    if plan.zeroed:
        if plan.row.kind == "norm" and plan.takes_nothing:
            return allocate_grown(tensor, plan.maps, out).fill_(-plan.gain_offset)
        if plan.row.kind == "norm":
            # New gains stay 1: new slots of the branch may hold zeros, and zero gains would leave them no gradient.
            zeros = tensor.new_full(plan.old_shape, -plan.gain_offset)
            return assemble(zeros, plan.maps, plan.choose_distribution, lambda segments: 1.0, out=out)
        return allocate_grown(tensor, plan.maps, out).zero_()
    if plan.parts:
        grown = allocate_grown(tensor, plan.maps, out)
        for old, new, part in split_parts(tensor, grown, plan):
            grow_parameter(old, part, new)
        return grown
    # Compute in float32 at least: a half-precision weight is rounded once, when it is stored.
    exact = torch.promote_types(tensor.dtype, torch.float32)
    source = tensor.detach()
    if plan.is_centred:
        source = source.to(exact)
        source = (source - source.mean(dim=plan.row.axes.index("hidden"), keepdim=True)).to(tensor.dtype)
    if plan.gain_offset and plan.scale != 1.0:
        source = ((source.to(exact) + plan.gain_offset) * plan.scale - plan.gain_offset).to(tensor.dtype)
    scale, read_dimension = 1.0 if plan.gain_offset else plan.scale, plan.row.read_dimension
    numbers = NormalStream(plan.seed, plan.name)

    def compute_factor(segments: Sequence[Segment]) -> float:
        return scale if read_dimension is None else scale / segments[read_dimension].copies

    grown = assemble(source, plan.maps, plan.choose_distribution, compute_factor, numbers, out)
    if plan.inits.get(VOCABULARY) == "mean" and VOCABULARY in plan.row.axes:
        tokens = plan.row.axes.index(VOCABULARY)
        first, count = plan.maps[tokens].old_size, len(plan.maps[tokens].new_slots)
        mean = source.mean(dim=tokens, keepdim=True, dtype=torch.float64)  # which does not depend on threads
        grown.narrow(tokens, first, count).copy_(mean)
    if plan.shards > 1:  # a router
        grown.copy_(grown[:: plan.shards].repeat_interleave(plan.shards, dim=0))
    if plan.copy_noise:
        add_copy_noise(grown, plan)
    if plan.noise and read_dimension is not None:
        add_zero_sum_noise(grown.movedim(read_dimension, -1), plan.maps[read_dimension], plan.noise, numbers)
        # Rows that must write zeros would write the rounding error of the noise's sum, which later layers magnify.
        written = plan.row.write_dimension
        for segment in plan.maps[written].segments:
            operators = [segment.operator if dimension == written else None for dimension in range(grown.dim())]
            if segment.old is None and not plan.choose_distribution(operators).std:
                grown.narrow(written, segment.start, segment.length).zero_()
    return grown


def split_parts(
    old: torch.Tensor, grown: torch.Tensor, plan: ParameterPlan
) -> Iterator[tuple[torch.Tensor, torch.Tensor, ParameterPlan]]:
    """Yield views of the parts of a parameter, or of its moment, before and after growth, each with its plan."""
    if plan.row.is_stacked:
        olds, news = [old[source or 0] for source in plan.maps[0].source], grown.unbind()
    else:
        dimension = plan.joined_dimension
        assert dimension is not None
        parts = plan.maps[dimension].parts
        news = grown.split([part.new_size for part in parts], dimension)
        olds = [] if plan.source_shape else list(old.split([part.old_size for part in parts], dimension))
    if plan.source_shape:  # nothing is taken from it but the dtype
        olds = [old] * len(news)
    yield from zip(olds, news, plan.parts, strict=True)


def assemble(
    source: torch.Tensor,
    maps: Sequence[AxisMap],
    choose_distribution: ChooseDistribution,
    compute_factor: ComputeFactor,
    numbers: NormalStream | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Assemble a grown tensor block by block: old entries times a factor, new ones drawn from a distribution.

    A block is a combination of segments, one per dimension; it is new if any of them is.

    >>> from .inits import ONE
    >>> assemble(torch.ones(2) * 3, [AxisMap.append(2, 3, "hidden")], lambda operators: ONE, lambda segments: 0.5)
    tensor([1.5000, 1.5000, 1.0000])
    """
    exact = torch.promote_types(source.dtype, torch.float32)
    grown = allocate_grown(source, maps, out)
    for segments in product(*(axis.segments for axis in maps)):
        block = grown[tuple(slice(segment.start, segment.start + segment.length) for segment in segments)]
        if any(segment.old is None for segment in segments):
            mean, std = choose_distribution([s.operator if s.old is None else None for s in segments])
            if std:
                assert numbers is not None
                numbers.fill(block, mean, std)
            else:
                block.fill_(mean)
            continue
        old = source[tuple(slice(s.old, s.old + s.length) for s in segments if s.old is not None)]
        factor = compute_factor(segments)
        if factor == 1.0:
            block.copy_(old)
        else:
            for part, old_part in zip(split_into_chunks(block), split_into_chunks(old), strict=True):
                part.copy_(old_part.to(exact) * factor)
    return grown


def add_zero_sum_noise(weight: torch.Tensor, axis: AxisMap, std: float, numbers: NormalStream) -> None:
    """Break the symmetry between copies with noise that sums to zero over the copies of each slot.

    Copies hold the same activation, so the sum that a weight reads from them does not change. But from then on their
    gradients differ, and so do they. Copies with equal weights would stay equal, and the grown model would learn no
    more than the old one.

    Args:
        weight: grown weight, changed in place; it reads its last dimension, whose map is `axis`.
        std: standard deviation of the noise before its mean over the copies is subtracted.
    """
    copies: list[tuple[int, slice, slice, slice]] = []  # count; slots of the weight, of the old axis, of the numbers
    width = 0
    for start, length, old, count, _ in axis.segments:
        if old is not None and count > 1:
            slots, olds, columns = (slice(first, first + length) for first in (start, old, width))
            copies.append((count, slots, olds, columns))
            width += length
    for part in split_into_chunks(weight):
        noise = numbers.draw([*part.shape[:-1], width], 0.0, std)
        noise = noise.to(torch.promote_types(part.dtype, torch.float32))  # the sum is zero to the weight's precision
        mean = noise.new_zeros(*part.shape[:-1], axis.old_size)
        for count, _, olds, columns in copies:
            mean[..., olds] += noise[..., columns] / count
        for _, slots, olds, columns in copies:
            part[..., slots] += (noise[..., columns] - mean[..., olds]).to(part)


def add_copy_noise(grown: torch.Tensor, plan: ParameterPlan) -> None:
    """Break the symmetry between copies of experts.

    The two copies of a pair get the same noise with opposite signs, so that the sum of both stays; a copy without a
    partner stays as it is. In a router, the rows of all copies but the first get a noise of their own.

    Args:
        grown: matrix of an expert, or of a router, changed in place.
    """
    numbers = NormalStream(plan.seed, plan.noise_name or f"{plan.name}+noise")
    rows = grown if plan.noise_name else grown[plan.maps[0].old_size :]
    for part in split_into_chunks(rows):
        noise = numbers.draw(part.shape, 0.0, abs(plan.copy_noise))
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        part.copy_(wide + math.copysign(1.0, plan.copy_noise) * noise.to(wide))


def allocate_grown(source: torch.Tensor, maps: Sequence[AxisMap], out: torch.Tensor | None) -> torch.Tensor:
    """Return `out`, or else an uninitialised tensor of the grown shape with the source's dtype and device."""
    shape = [axis.new_size for axis in maps]
    if out is None:
        return torch.empty(shape, dtype=source.dtype, device=source.device)
    assert (list(out.shape), out.dtype, out.device) == (shape, source.dtype, source.device)
    return out


@contextmanager
def start_worker_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads, each of which grows one tensor at a time.

    Within each of them torch uses a single thread: drawing random numbers cannot use more.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


class ThreadMemory(threading.local):
    """Memory that each thread reuses for the tensors that it reads and writes.

    The kernel clears every page that it hands out, which takes longer than filling it. A tensor of more than `limit`
    bytes gets memory that is freed afterwards.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffers: dict[str, torch.Tensor] = {}

    def allocate(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor; it overwrites this thread's previous tensor of the same use."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._limit:
            return torch.empty(shape, dtype=dtype)
        if use not in self._buffers:
            self._buffers[use] = torch.empty(self._limit, dtype=torch.uint8)  # untouched pages cost nothing
        return self._buffers[use][:nbytes].view(dtype).view(shape)
