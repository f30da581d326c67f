"""Muon for the matrices of the layers and AdamW for all other parameters, as one optimizer.

Muon moves a matrix by its orthogonalised momentum (Jordan et al., "Muon: an optimizer for hidden layers in neural
networks", 2024). With `adjust_lr_fn` "match_rms_adamw", the default here, an update has the size of AdamW's, so that
learning rates and weight decay found for AdamW can be used (Liu et al., "Muon is scalable for LLM training", 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import AdamW, Optimizer

from ..architectures import LAYER, get_architecture
from ..errors import RunError
from ..io.serialization import describe_unknown_key
from .ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .arguments import SlopTrainingArguments

#: Name of the optimizer, in the argument `optim` and in the facts of a run.
MUON = "muon"
#: Muon's moment in its state.
MOMENTUM = "momentum_buffer"
#: Key of a group that names its algorithm; groups without it are AdamW's, or another optimizer's.
ALGORITHM = "algorithm"
#: Settings in `optim_args`, with their types and defaults.
_SETTINGS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "momentum": (float, 0.95),
    "nesterov": (lambda text: {"true": True, "false": False}[text.lower()], True),
    "ns_steps": (int, 5),
    "adjust_lr_fn": (lambda text: {name: name for name in ("original", "match_rms_adamw")}[text], "match_rms_adamw"),
}


def parse_settings(text: str | None) -> dict[str, Any]:
    """Return Muon's settings, given those that differ from the defaults as `optim_args` writes them.

    Raises:
        RunError: for an unknown setting, or a value of another kind.

    >>> parse_settings("ns_steps=6, adjust_lr_fn=original")
    {'momentum': 0.95, 'nesterov': True, 'ns_steps': 6, 'adjust_lr_fn': 'original'}
    """
    settings = {name: default for name, (_, default) in _SETTINGS.items()}
    for part in (text or "").replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if not part:
            continue
        if name not in _SETTINGS:
            raise RunError(f"optim_args of muon: {describe_unknown_key(name, _SETTINGS)}")
        try:
            settings[name] = _SETTINGS[name][0](value)
        except (ValueError, KeyError):
            raise RunError(
                f"optim_args of muon: {name} cannot be {value!r}; the default is {_SETTINGS[name][1]}"
            ) from None
    if not 0 <= settings["momentum"] < 1 or not 1 <= settings["ns_steps"] < 100:
        raise RunError(
            "optim_args of muon: momentum must be at least 0 and below 1, ns_steps from 1 to 99, "
            f"got {settings['momentum']} and {settings['ns_steps']}"
        )
    return settings


class MatrixPart(NamedTuple):
    """The part of a matrix in a flat tensor of this rank.

    Args:
        shape: shape of the whole matrix.
        start, size: position and length in the flat tensor; the parts of the ranks, one after another, are the matrix,
            and padding at the end.
    """

    shape: tuple[int, ...]
    start: int
    size: int


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` for some groups of parameters, `torch.optim.AdamW` for the others.

    The two share this optimizer's groups and states, so it is saved, scheduled and grown like any other.

    Args:
        matrices: groups for Muon, with its settings.
        others: groups for AdamW, with its settings.
        ranks: ranks of the launch, for matrices that are sharded over them.

    Attributes:
        shards: for each flat tensor that takes the place of a group's matrices (ZeRO-3), the parts of the matrices.
            The whole momentum of a matrix is gathered on one rank, which orthogonalises it: the update is that of one
            process, to the last bit if the gradients are equal.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], ranks: Ranks) -> None:
        # ZeRO-3 has emptied the matrices of a grown model: torch's Muon, which refuses them, sees another one first.
        self._muon = torch.optim.Muon([torch.zeros(1, 1, requires_grad=True)])
        self._adamw = AdamW([torch.zeros(1, requires_grad=True)])
        groups = [
            {**optimizer.defaults, **group, ALGORITHM: algorithm}
            for optimizer, algorithm, given in ((self._muon, MUON, matrices), (self._adamw, "adamw", others))
            for group in given
            if group["params"]
        ]
        super().__init__(groups, {})
        self._ranks = ranks
        self.shards: dict[torch.Tensor, list[MatrixPart]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole = []
        for group in self.param_groups:
            if group[ALGORITHM] != MUON:
                whole.append(group)
            elif any(parameter in self.shards for parameter in group["params"]):
                for flat in group["params"]:
                    self._step_shards(group, flat)
            elif any(_is_dtensor(parameter) for parameter in group["params"]):
                self._step_rows(group)
            else:
                whole.append(group)
        for optimizer, is_muon in ((self._muon, True), (self._adamw, False)):
            optimizer.state = self.state
            optimizer.param_groups = [group for group in whole if (group[ALGORITHM] == MUON) == is_muon]
            optimizer.step()
        return loss

    def _step_shards(self, group: Mapping[str, Any], flat: torch.Tensor) -> None:
        """Update this rank's parts of matrices in a flat tensor, as `torch.optim.Muon` updates whole ones."""
        if flat.grad is None:
            return
        update = self._compute_update(group, flat)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        shards = self.shards[flat]
        parts = [update[shard.start : shard.start + shard.size] for shard in shards]
        shapes = [shard.shape for shard in shards]
        _orthogonalize(parts, shapes, group, self._ranks)
        for shard, part in zip(shards, parts, strict=True):
            rate = group["lr"] * _adjust_rate(group, shard.shape)
            flat[shard.start : shard.start + shard.size].add_(part, alpha=-rate)

    def _step_rows(self, group: Mapping[str, Any]) -> None:
        """Update this rank's rows of the matrices of a group (FSDP2), as `torch.optim.Muon` updates whole ones."""
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        for first in range(0, len(matrices), self._ranks.count):
            batch = matrices[first : first + self._ranks.count]
            parts = [self._ranks.pad_rows(self._compute_update(group, matrix), matrix.shape) for matrix in batch]
            _orthogonalize(parts, [matrix.shape for matrix in batch], group, self._ranks)
            for matrix, part in zip(batch, parts, strict=True):
                rows = matrix.to_local()
                rows.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * _adjust_rate(group, matrix.shape)
                rows.add_(part[: rows.numel()].view_as(rows).to(rows.device), alpha=-rate)

    def _compute_update(self, group: Mapping[str, Any], parameter: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the update before it is made orthogonal; the momentum advances."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter)
        gradient, momentum = _take_local(parameter.grad), _take_local(state[MOMENTUM])
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()


def _is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, whose class torch 2.4 does not export."""
    return hasattr(tensor, "to_local")


def _take_local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _orthogonalize(
    parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], group: Mapping[str, Any], ranks: Ranks
) -> None:
    """Replace matrices, of which this rank has the given parts, by orthogonal ones; each rank computes its share."""
    for first in range(0, len(parts), ranks.count):
        batch = range(first, min(first + ranks.count, len(parts)))
        own: torch.Tensor | None = None
        for owner, number in enumerate(batch):
            whole = ranks.gather_parts(parts[number].to(ranks.device), shapes[number], owner)
            if whole is not None:
                own = compute_direction(whole, group)
        for owner, number in enumerate(batch):
            part, value = parts[number], own if owner == ranks.rank else None
            part.copy_(ranks.cut_part(value, part.numel(), owner, part.dtype))


def compute_direction(matrix: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Return the direction in which `torch.optim.Muon` moves a matrix, by its own Newton-Schulz iteration.

    Muon without momentum and decay, applied to zeros, leaves nothing but the direction. Its "original" rate has no
    factor for a matrix that is not tall; a tall one is transposed, as the iteration does too.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    gradient = matrix.T if is_tall else matrix
    zeros = torch.zeros_like(gradient).requires_grad_()
    zeros.grad = gradient
    names = ("ns_coefficients", "eps", "ns_steps")
    plain: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([zeros], **plain, adjust_lr_fn="original", **{name: group[name] for name in names}).step()
    return -zeros.detach().T if is_tall else -zeros.detach()


def _adjust_rate(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    """Return the factor of the learning rate for a matrix, as `torch.optim.Muon` computes it."""
    rows, columns = shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def build_muon(
    model: PreTrainedModel,
    args: SlopTrainingArguments,
    decayed: Collection[str],
    ranks: Ranks,
    *,
    adamw_rate: float,
) -> MuonWithAdamW:
    """Return the optimizer of a stage: Muon for the trained matrices of the layers, AdamW for the rest.

    Args:
        args: training arguments, with the stage's learning rate, which is Muon's.
        decayed: names of the parameters with weight decay.
        adamw_rate: learning rate of AdamW.
    """
    architecture = get_architecture(model.config)
    rows = [row for row in architecture.rows(model.config) if row.kind == "projection"]
    layers = range(model.config.num_hidden_layers)
    names = {row.name.replace(LAYER, str(layer)) for row in rows if row.is_in_layer for layer in layers}
    matrices: list[torch.Tensor] = []
    others: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = architecture.canonical_name(name) in names
            (matrices if is_matrix else others[name in decayed]).append(parameter)
    settings = {**parse_settings(args.optim_args), "lr": args.learning_rate, "weight_decay": args.weight_decay}
    adamw = {"lr": adamw_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return MuonWithAdamW(
        [{"params": matrices, **settings}],
        [{"params": others[decays], **adamw, "weight_decay": args.weight_decay * decays} for decays in (True, False)],
        ranks,
    )
