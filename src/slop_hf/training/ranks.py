"""`Ranks`: the processes of a run, and how they agree."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers.utils import logging

from ..errors import OtherRankError

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.get_logger(__name__)

T = TypeVar("T")

#: Longest pause between two looks at whether the other ranks have come, and time between two lines about it.
_POLL_SECONDS, _LINE_SECONDS = 1.0, 60.0
_waits = itertools.count()  # the same on all ranks: they all wait in the same order


@dataclass(frozen=True)
class Ranks:
    """This process and the processes of the run.

    Args:
        rank: number of this process.
        count: number of processes.
        device: device that tensors sent between ranks must be on.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_args(cls, args: TrainingArguments) -> Ranks:
        """Return the ranks described by `TrainingArguments`."""
        device = torch.device("cpu") if args.world_size > 1 and dist.get_backend() == "gloo" else args.device
        return cls(args.process_index, args.world_size, device)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what has to be written once."""
        return self.rank == 0

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def wait_without_timeout(self, purpose: str) -> None:
        """Wait for all ranks as long as it takes, where a collective would fail after half an hour.

        Args:
            purpose: what they are waited for, such as "to tokenize the data", for a line each minute.
        """
        if self.count == 1:
            return
        store, key = _get_default_store(), f"slop-hf/wait-{next(_waits)}"
        store.add(key, 1)
        began = time.monotonic()
        pause, lines = 0.01, 1
        while (arrived := store.add(key, 0)) < self.count:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)
            if time.monotonic() - began > lines * _LINE_SECONDS:
                if self.rank < 2:  # the first rank, or the next one if the first is the one that works
                    ready = f"{arrived} of {self.count} are ready"
                    logger.warning(f"rank {self.rank} waits for others {purpose}: {ready} ({lines} min so far)")
                lines += 1

    def gather_all(self, value: T) -> list[T]:
        """Return a small value of every rank, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Return the first rank's value on all ranks."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_parts(self, part: torch.Tensor, shape: Sequence[int], owner: int) -> torch.Tensor | None:
        """Return a whole tensor on its owner, given the part of each rank; None on the other ranks.

        All ranks gather, by the connections of training: with a different owner each time, every rank would have to
        connect to every other one.

        Args:
            part: flat part of this rank on `device`, of the same size on all ranks; the parts of all ranks, one after
                another, are the tensor, and padding at the end.
            shape: shape of the whole tensor.
            owner: rank that needs it.
        """
        flat = part
        if self.count > 1:
            flat = part.new_empty(part.numel() * self.count)
            dist.all_gather_into_tensor(flat, part.contiguous())
            if self.rank != owner:
                return None
        return flat[: math.prod(shape)].view(tuple(shape))

    def gather_slice(
        self, part: torch.Tensor, size: int, numbers: range, owner: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Return consecutive numbers of a tensor on their owner, given the part of each rank; None on other ranks.

        Only the ranks that have some of them send; each rank receives them, and nothing else.

        Args:
            part: flat part of this rank, without padding.
            size: numbers in the part of one rank, with padding.
            numbers: positions in the flat tensor, one after another.
            owner: rank that needs them.
            dtype: dtype of the result.

        >>> Ranks().gather_slice(torch.arange(6), 6, range(2, 5), 0, torch.int64)
        tensor([2, 3, 4])
        """
        gathered = torch.empty(len(numbers), dtype=dtype, device=self.device)
        for rank in range(numbers.start // size, math.ceil(numbers.stop / size)):
            first = max(numbers.start, rank * size)
            received = gathered[first - numbers.start : min(numbers.stop, (rank + 1) * size) - numbers.start]
            if rank == self.rank:
                received.copy_(part[first - rank * size :][: len(received)])
            if self.count > 1:
                dist.broadcast(received, src=rank)  # by the connections of training, as in `gather_parts`
        return gathered if self.rank == owner else None

    def cut_part(
        self, value: torch.Tensor | None, size: int, owner: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return this rank's flat part of a tensor that its owner has: the reverse of `gather_parts`.

        Args:
            value: the whole tensor; None on the other ranks.
            size: numbers in the part of one rank, with padding.
            owner: rank that has the tensor.
            dtype: dtype of the parts.
        """
        flat = torch.empty(size * self.count, dtype=dtype, device=self.device)
        if value is not None:
            flat[: value.numel()].copy_(value.flatten(), non_blocking=True)
            flat[value.numel() :] = 0  # the padding
        if self.count > 1:
            dist.broadcast(flat, src=owner)  # by the connections of training, as in `gather_parts`
        return flat[size * self.rank :][:size]

    def count_rows_part(self, shape: Sequence[int]) -> int:
        """Return the numbers in one rank's part of a tensor cut by rows, with padding.

        FSDP2 gives each rank equally many rows, rounded up; the last parts are smaller or empty.

        >>> Ranks(count=2).count_rows_part((5, 4))
        12
        """
        return math.ceil(shape[0] / self.count) * math.prod(shape[1:])

    def pad_rows(self, rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return this rank's rows of a tensor as a flat part on `device`, for `gather_parts`.

        Args:
            rows: this rank's rows; none, or fewer than on the first rank, on the last ranks.
            shape: shape of the whole tensor.
        """
        part = rows.new_zeros(self.count_rows_part(shape), device=self.device)
        part[: rows.numel()] = rows.flatten()
        return part

    def raise_any(self, error: Exception | None) -> None:
        """Raise an error on every rank if one rank has one: the others would wait for that rank in vain."""
        errors = self.gather_all(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, reason in enumerate(errors):
            if reason is not None:
                raise OtherRankError(rank, reason)

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Run a block without collectives; if it fails on one rank, raise on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # whatever it is: the others would wait for this rank until the timeout
            error = caught
        self.raise_any(error)

    def select_share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's share of a list: every `count`-th item."""
        return list(items[self.rank :: self.count])
