"""The held-out loss of an evaluation: the mean over all predicted tokens, on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.state import GradientState

from ..data.packing import IGNORED
from .ranks import Ranks


class HeldOutLoss:
    """Turns the loss of `Trainer.evaluation_loop` into the mean over predicted tokens.

    The loop averages the losses of batches, each weighted by its rows. Accelerate gives every rank the same number of
    full batches, and fills up the last ones with rows from the beginning of the data; the loop cuts off their losses
    and predictions. So two things are left to do: such surplus rows predict nothing, and a batch whose rows predict
    fewer tokens than others weighs less. If every row predicts `block_size - 1` tokens, no bit changes.

    Args:
        block_size: tokens per training block.
    """

    def __init__(self, ranks: Ranks, block_size: int) -> None:
        self._ranks, self._full = ranks, max(block_size - 1, 1)
        self._rows, self._tokens = 0, torch.zeros((), dtype=torch.int64)
        self._weight: torch.Tensor | float = 1.0  # of the batch

    def mask_surplus(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a batch whose surplus rows have no labels, and count its other rows and the tokens they predict."""
        labels = inputs.get("labels")  # [rows, length]
        if labels is None:
            return inputs
        state, rows = GradientState(), len(labels)
        if state.end_of_dataloader and state.remainder > 0:
            # The last batches of all ranks together begin with `remainder` rows, in the order of the ranks.
            rows = min(max(state.remainder - self._ranks.rank * rows, 0), rows)
        if rows < len(labels):
            labels = labels.clone()
            labels[rows:] = IGNORED
            inputs = {**inputs, "labels": labels}
        tokens = labels[..., 1:].ne(IGNORED).sum()
        self._weight = tokens / max(rows * self._full, 1)
        self._rows, self._tokens = self._rows + rows, self._tokens.to(tokens.device) + tokens
        return inputs

    def weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of the batch, times its predicted tokens per row; 0 if it predicts none."""
        weight = torch.as_tensor(self._weight, device=loss.device)
        return torch.where(weight > 0, loss * weight, torch.zeros_like(loss))

    def average(self, loss: float) -> float:
        """Return the mean over predicted tokens, from the loop's mean over rows of weighted losses."""
        counts = self._ranks.gather_all((self._rows, int(self._tokens)))
        rows, tokens = (sum(column) for column in zip(*counts, strict=True))
        return loss / (tokens / (rows * self._full)) if tokens else float("nan")
