"""`NonFiniteLossGuard`: stop on a non-finite loss, before anything is saved."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import DivergedError
from .ranks import Ranks


class NonFiniteLossGuard:
    """Collects on the device whether a loss was not finite, without waiting for the device until it is asked.

    A non-finite loss on one rank stops all.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._non_finite: torch.Tensor | None = None

    def watch(self, loss: torch.Tensor) -> None:
        """Include a loss in the next check."""
        non_finite = ~torch.isfinite(loss.detach())
        self._non_finite = non_finite if self._non_finite is None else self._non_finite | non_finite

    def check(self, grad_norm: float | torch.Tensor | None, last_good: Path | None) -> None:
        """Raise `DivergedError` on all ranks if a loss since the last check, or the gradient norm, was not finite.

        Args:
            grad_norm: norm of this step's gradient; None if it is unknown.
            last_good: checkpoint or stage to resume from; None if nothing was saved.
        """
        fault = None
        if self._non_finite is not None and bool(self._non_finite.any()):
            fault = "the loss"
        elif grad_norm is not None and not torch.isfinite(torch.as_tensor(grad_norm)):
            fault = "the gradient norm"
        self._non_finite = None
        if fault := next(filter(None, self._ranks.gather_all(fault)), None):
            state = f"the last good state is {last_good}" if last_good else "nothing was saved before"
            raise DivergedError(
                f"{fault} is no longer finite; training stopped, and {state}. Lower learning_rate, lengthen the "
                "warm-up (rewarm_steps) or clip gradients more (max_grad_norm), then resume"
            )
