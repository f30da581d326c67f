"""`Soundness`: a run whose loss is not finite stops before it saves what it has become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import DivergedError
from .ranks import Ranks


class Soundness:
    """Watches losses on the device, without waiting for them; looks at what it has seen when asked.

    Args:
        ranks: of the run; where one of them has seen something, all stop.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._unsound: torch.Tensor | None = None

    def watch(self, loss: torch.Tensor) -> None:
        """Take note of a loss."""
        bad = ~torch.isfinite(loss.detach())
        self._unsound = bad if self._unsound is None else self._unsound | bad

    def check(self, grad_norm: Any, last_good: Path | None) -> None:
        """Stop where a loss since the last check, or the gradient's norm, was not finite.

        Args:
            grad_norm: of this step; None if it is not known.
            last_good: what can be resumed from.

        Raises:
            DivergedError: on all ranks.
        """
        fault = None
        if self._unsound is not None and bool(self._unsound.any()):
            fault = "the loss"
        elif grad_norm is not None and not torch.isfinite(torch.as_tensor(grad_norm)):
            fault = "the gradient's norm"
        self._unsound = None
        fault = next((one for one in self._ranks.all_gather(fault) if one is not None), None)
        if fault is not None:
            where = f"the last good state is {last_good}" if last_good else "nothing was saved before"
            raise DivergedError(
                f"{fault} is not finite any more; training stops here, {where}. Lower learning_rate, warm up for "
                "longer (rewarm_steps) or clip gradients at less (max_grad_norm), then resume"
            )
