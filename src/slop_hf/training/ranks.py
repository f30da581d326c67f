"""`Ranks`: the processes of a run, and how they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import RunError, SlopError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Args:
        rank: its number.
        count: how many there are.
        device: that messages between ranks have to lie on.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, args: Any) -> Ranks:
        """Those that `TrainingArguments` have found."""
        device = torch.device("cpu") if args.world_size > 1 and dist.get_backend() == "gloo" else args.device
        return cls(args.process_index, args.world_size, device)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            dist.barrier()

    def all_gather(self, value: T) -> list[T]:
        """A small value of every rank, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first rank's value, on all."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank what was raised on one; otherwise the others would wait for it for ever.

        Raises:
            SlopError: the error of this rank, or of the first that has one.
        """
        errors = self.all_gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(errors):
            if message is not None:
                raise RunError(f"rank {rank} failed: {message}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without messages between ranks, which fails on all of them where it fails on one."""
        failed: Exception | None = None
        try:
            yield
        except (SlopError, OSError) as caught:
            failed = caught
        self.agree(failed)

    def mine(self, items: Sequence[T]) -> list[T]:
        """This rank's share of a list: every `count`-th item."""
        return list(items[self.rank :: self.count])
