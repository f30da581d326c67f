"""`probe_growth`: measuring what a growth did to the function, the gradients and the ties between copies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..architectures import read_setting
from ..errors import GrowthError
from .axes import AxisMap
from .model import hide_progress_bars
from .plan import GrowthPlan, ParameterPlan
from .receipt import GrowthProbe
from .safetensors_io import read_checkpoint_headers, read_tensor

PROBE_SHAPE = (2, 64)


def probe_checkpoints(source: Path, grown: Path, growths: Sequence[GrowthPlan]) -> GrowthProbe:
    """`probe_growth` of two checkpoints on disk; both models are in memory at a time.

    After several growths, gradients and ties are not looked at: what is new is told by no single plan.
    """
    with hide_progress_bars():
        before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (source, grown))
    return probe_growth(before, after, growths[0] if len(growths) == 1 else None)


def probe_growth(
    source: PreTrainedModel, grown: PreTrainedModel, plan: GrowthPlan | None, tokens: torch.Tensor | None = None
) -> GrowthProbe:
    """Compare a model with what it has grown into, on a batch of tokens.

    Both models, a copy of the source in another precision for the rounding floor, and the gradients are in memory at
    a time.

    Args:
        source, grown: the models before and after.
        plan: the growth between them; None leaves gradients and ties out.
        tokens: int64 `[batch, length]`; default, 2 × 64 drawn at random from the vocabulary.

    Raises:
        GrowthError: where the logits are not finite.
    """
    if tokens is None:
        length = min(PROBE_SHAPE[1], source.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(read_setting(source.config, "vocab_size"), (PROBE_SHAPE[0], length), generator=generator)
    tokens = tokens.to(source.device)
    before, loss_before = _forward(source, tokens)
    # Families compute norms in float32 whatever the dtype, so a float64 model rounds like a float32 one.
    other = torch.float64 if source.dtype == torch.float32 else torch.float32
    reference, _ = _forward(copy.deepcopy(source).to(other), tokens)
    after, loss_after = _forward(grown, tokens.to(grown.device))
    size = before.abs().max()
    if not torch.isfinite(size) or not torch.isfinite(after).all():
        raise GrowthError("the probe's logits are not finite; the source or the growth is broken")
    change = (after - before).abs() / size
    floor = float((reference - before).abs().max() / size)
    return GrowthProbe(
        tokens=tokens.numel(),
        max_logit_change=float(change.max()),
        mean_logit_change=float(change.mean()),
        loss_change=loss_after - loss_before,
        rounding_floor=max(floor, float(torch.finfo(source.dtype).eps)),
        live_share=_live_share(grown, plan, tokens.to(grown.device)) if plan else None,
        copies_spread=_copies_spread(grown, plan) if plan else None,
    )


def hash_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of named tensors that does not depend on their order, or on the files that they lie in.

    >>> a, b = torch.ones(2), torch.zeros(3)
    >>> hash_weights([("a", a), ("b", b)]) == weights_hash([("b", b), ("a", a)])
    True
    """
    return combine_hashes((name, hash_tensor(tensor)) for name, tensor in tensors)


def hash_stored_weights(directory: Path) -> str:
    """`hash_weights` of the weights in a directory, in one file or several, read a tensor at a time.

    Raises:
        GrowthError: where there are none, or files that are corrupt.
    """
    return hash_weights((name, read_tensor(one)) for name, one in read_checkpoint_headers(directory).items())


def hash_tensor(tensor: torch.Tensor) -> str:
    """A hash of a tensor's dtype, shape and bytes.

    XXH3 of 128 bits, which is as fast as memory: it tells weights apart and finds damage, it does not stop a forger.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def combine_hashes(named: Iterable[tuple[str, str]]) -> str:
    """The hash of a whole from the names and hashes of its tensors."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(named))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _forward(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits in float64, and the next-token loss, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits.double().cpu()
    finally:
        model.train(training)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().cpu())
    return logits, float(loss)


def _live_share(model: PreTrainedModel, plan: GrowthPlan, tokens: torch.Tensor) -> float | None:
    """The share of new entries with a gradient, embeddings left out: most of them have no token in a small batch."""
    parameters = {plan.architecture.live_name(name): value for name, value in model.named_parameters()}
    wanted = {one.name: one for one in plan.parameters() if one.row.kind != "embedding"}
    targets = [(wanted[name], value) for name, value in parameters.items() if name in wanted]
    flags = [value.requires_grad for _, value in targets]
    for _, value in targets:
        value.requires_grad_(True)
    try:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        gradients = torch.autograd.grad(loss, [value for _, value in targets], allow_unused=True)
    finally:
        for (_, value), flag in zip(targets, flags, strict=True):
            value.requires_grad_(flag)
    new = live = 0
    for (one, _), gradient in zip(targets, gradients, strict=True):
        mask = mask_new_entries(one, plan)
        new += int(mask.sum())
        live += int((gradient.cpu()[mask] != 0).sum()) if gradient is not None else 0
    return live / new if new else None


def mask_new_entries(one: ParameterPlan, plan: GrowthPlan) -> torch.Tensor:
    """Which entries of a grown parameter are new: in new slots, or in a layer that was not there."""
    shape = [axis.new_size for axis in one.maps]
    if one.row.is_in_layer and _is_repeat(one, plan):
        return torch.ones(shape, dtype=torch.bool)
    mask = torch.zeros(shape, dtype=torch.bool)
    for dimension, axis in enumerate(one.maps):
        slots = [slot for slot, old in enumerate(axis.source) if old is None]
        mask.index_fill_(dimension, torch.tensor(slots, dtype=torch.long), True)
    return mask


def _is_repeat(one: ParameterPlan, plan: GrowthPlan) -> bool:
    first = next(parameter for parameter in plan.parameters() if parameter.source == one.source)
    return first.name != one.name


def _copies_spread(model: PreTrainedModel, plan: GrowthPlan) -> float | None:
    """How far the copies that weights read are from being equal."""
    parameters = {plan.architecture.live_name(name): value for name, value in model.named_parameters()}
    spread = total = 0.0
    for one, axis in _read_copies(plan):
        weight = parameters[one.name].detach().double().cpu()
        source = [(new, old) for new, old in enumerate(axis.source) if old is not None]
        slots, olds = torch.tensor(source).T
        count = torch.bincount(olds, minlength=axis.old_size).clamp(min=1)
        kept = weight[..., slots]
        mean = torch.zeros(*weight.shape[:-1], axis.old_size, dtype=weight.dtype).index_add_(-1, olds, kept) / count
        many = count[olds] > 1
        spread += float((kept - mean[..., olds])[..., many].square().sum())
        total += float(kept[..., many].square().sum())
    return (spread / total) ** 0.5 if total else None


def _read_copies(plan: GrowthPlan) -> Iterator[tuple[ParameterPlan, AxisMap]]:
    for one in plan.parameters():
        if one.row.reads is not None and one.maps[-1].most_copies > 1 and not one.silent:
            yield one, one.maps[-1]
