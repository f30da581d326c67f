"""`probe_growth`: measures what a growth did to the function, the gradients and the copies; hashes of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import xxhash
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..architectures import read_setting
from ..dims import ModelDims
from ..errors import GrowthError
from .model import hide_progress_bars
from .plan import GrowthPlan, ParameterPlan, require_plan
from .receipt import GrowthProbe
from .safetensors_io import read_checkpoint_headers, read_tensor

PROBE_SHAPE = (2, 64)


def probe_checkpoints(source: Path, grown: Path, growths: Sequence[GrowthPlan]) -> GrowthProbe:
    """Apply `probe_growth` to two checkpoints on disk; both models are in memory at the same time.

    After several growths, gradients and copies are skipped: no single plan says which entries are new.
    """
    with hide_progress_bars():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=False)
            for path in (source, grown)
        )
    return probe_growth(before, after, growths[0] if len(growths) == 1 else None)


def probe_growth(
    source: PreTrainedModel, grown: PreTrainedModel, plan: GrowthPlan | None, tokens: torch.Tensor | None = None
) -> GrowthProbe:
    """Compare a model with its grown version on a batch of tokens.

    Both models, a copy of the source in another precision for the rounding floor, and the gradients are in memory at
    the same time.

    Args:
        plan: growth between the models; None skips gradients and copies.
        tokens: int64 `[batch, length]`; default, 2 × 64 tokens drawn at random from the vocabulary.

    Raises:
        GrowthError: if the logits are not finite, or the models, the plan and the tokens do not fit each other.
    """
    _check_models(source, grown, plan)
    vocab = read_setting(source.config, "vocab_size")
    if tokens is None:
        length = min(PROBE_SHAPE[1], source.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab, (PROBE_SHAPE[0], length), generator=generator)
    _check_tokens(tokens, vocab)
    tokens = tokens.to(source.device)
    before, loss_before = _forward(source, tokens, vocab)
    # Families compute norms in float32 whatever the dtype, so a float64 model rounds like a float32 one.
    other = torch.float64 if source.dtype == torch.float32 else torch.float32
    precise = copy.deepcopy(source).to(other)
    if source.config._experts_implementation not in (None, "eager"):
        precise.set_experts_implementation("eager")  # the others' kernels take no float64
    reference, _ = _forward(precise, tokens, vocab)
    after, loss_after = _forward(grown, tokens.to(grown.device), vocab)
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
        live_share=_measure_live_share(grown, plan, tokens.to(grown.device)) if plan else None,
        copies_spread=_measure_copies_spread(grown, plan) if plan else None,
    )


def _check_models(source: PreTrainedModel, grown: PreTrainedModel, plan: GrowthPlan | None) -> None:
    for name, model in (("source", source), ("grown", grown)):
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
            kind = type(model).__name__
            raise GrowthError(f"{name} must be a model in memory, got {kind}; load it with from_pretrained")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise GrowthError(f"{name} is on the meta device, which holds no values; load its weights first")
    if plan is not None:
        require_plan(plan)
    sizes = [read_setting(model.config, "vocab_size") for model in (source, grown)]
    if sizes[1] != ((plan.vocab_size if plan else None) or sizes[0]):
        raise GrowthError(f"the vocabularies have {sizes[0]} and {sizes[1]} tokens: these models are no growth's")
    if plan is not None and (dims := ModelDims.from_config(grown.config)) != plan.new:
        raise GrowthError(f"the plan grows to {plan.new}, but the grown model has {dims}; pass its own plan")


def _check_tokens(tokens: object, vocab: int) -> None:
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise GrowthError(f"tokens must be integers [batch, length], got {got}")
    if not tokens.shape[0] or tokens.shape[1] < 2 or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        raise GrowthError(
            f"tokens must be at least two per row, from 0 to {vocab - 1}, got shape {list(tokens.shape)}"
        )


def hash_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a hash of named tensors that depends neither on their order nor on the files that hold them.

    >>> a, b = torch.ones(2), torch.zeros(3)
    >>> hash_weights([("a", a), ("b", b)]) == hash_weights([("b", b), ("a", a)])
    True
    """
    return combine_hashes((name, hash_tensor(tensor)) for name, tensor in tensors)


def hash_stored_weights(directory: str | Path) -> str:
    """Return `hash_weights` of the weights in a directory, read one tensor at a time."""
    return hash_weights(
        (name, read_tensor(stored)) for name, stored in read_checkpoint_headers(Path(directory)).items()
    )


def hash_tensor(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and bytes.

    It is XXH3 with 128 bits, as fast as memory: it distinguishes weights and detects damage, but not forgery.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def combine_hashes(named: Iterable[tuple[str, str]]) -> str:
    """Return the hash of a model from the names and hashes of its tensors."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(named))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _forward(model: PreTrainedModel, tokens: torch.Tensor, vocab: int) -> tuple[torch.Tensor, float]:
    """Return the logits of the first `vocab` tokens in float64 and the next-token loss, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[..., :vocab].double().cpu()
    finally:
        model.train(training)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().cpu())
    return logits, float(loss)


def _measure_live_share(model: PreTrainedModel, plan: GrowthPlan, tokens: torch.Tensor) -> float | None:
    """Return the fraction of new entries with a gradient.

    Embeddings are left out: most of their rows have no token in a small batch.
    """
    weights = _get_canonical_weights(model, plan)
    targets = [(p, weights[p.name]) for p in plan.parameters() if p.row.kind != "embedding" and p.name in weights]
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
    for (parameter, _), gradient in zip(targets, gradients, strict=True):
        mask = mask_new_entries(parameter, plan)
        new += int(mask.sum())
        live += int((gradient.cpu()[mask] != 0).sum()) if gradient is not None else 0
    return live / new if new else None


def _get_canonical_weights(model: PreTrainedModel, plan: GrowthPlan) -> dict[str, torch.nn.Parameter]:
    return {plan.architecture.canonical_name(name): value for name, value in model.named_parameters()}


def mask_new_entries(parameter: ParameterPlan, plan: GrowthPlan) -> torch.Tensor:
    """Return a boolean mask of a grown parameter's new entries: those in new slots, or all of an additional layer."""
    first = next(other for other in plan.parameters() if other.source == parameter.source)
    if first.name != parameter.name:  # an earlier layer grows from the same old layer
        return torch.ones(parameter.new_shape, dtype=torch.bool)
    mask = torch.zeros(parameter.new_shape, dtype=torch.bool)
    for dimension, axis in enumerate(parameter.maps):
        mask.index_fill_(dimension, torch.tensor(axis.new_slots, dtype=torch.long), True)
    return mask


def _measure_copies_spread(model: PreTrainedModel, plan: GrowthPlan) -> float | None:
    """Return how far the copies that weights read are from being equal, see `GrowthProbe.copies_spread`."""
    weights = _get_canonical_weights(model, plan)
    spread = total = 0.0
    for parameter in plan.parameters():
        if (read := parameter.row.read_dimension) is None:
            continue
        axis = parameter.maps[read]
        if axis.max_copies == 1 or parameter.zeroed:
            continue
        weight = weights[parameter.name].detach().double().cpu().movedim(read, -1)
        slots, olds = torch.tensor([(slot, old) for slot, old in enumerate(axis.source) if old is not None]).T
        count = torch.bincount(olds, minlength=axis.old_size).clamp(min=1)
        copies = weight[..., slots]
        mean = torch.zeros(*weight.shape[:-1], axis.old_size, dtype=weight.dtype).index_add_(-1, olds, copies) / count
        is_copied = count[olds] > 1
        spread += float((copies - mean[..., olds])[..., is_copied].square().sum())
        total += float(copies[..., is_copied].square().sum())
    return (spread / total) ** 0.5 if total else None
