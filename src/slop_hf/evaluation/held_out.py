"""`HeldOut`: blocks of held-out text by source, and their exact perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .. import __version__
from ..data import Corpus
from ..data.tokenizing import vocabulary_of
from ..errors import EvaluationError
from ..io.serialization import hash_json
from ..runs.records import EvalRecord, perplexity
from ..training.ranks import Ranks
from .tasks import PERPLEXITY

Block = Mapping[str, torch.Tensor]

#: What `auto` begins with, and lowers until it fits. Where memory is the machine's nothing says that it does not fit:
#: the process is killed.
LARGEST_BATCH, LARGEST_BATCH_ON_CPU = 64, 8
IGNORED = -100  # the label of what is not to be predicted


@dataclass(frozen=True)
class HeldOut:
    """Tokenized text to measure perplexity on.

    Args:
        sources: blocks by source; a block has `input_ids`, and may have `labels` and `position_ids`, each int64 of
            shape [length].
        weights: the share of each source in the whole; None, that of its predicted tokens.
        fingerprint: of all of it.
        vocabulary: a hash of the tokenizer.
    """

    sources: Mapping[str, Sequence[Block]]
    weights: Mapping[str, float] | None
    fingerprint: str
    vocabulary: str = ""

    @classmethod
    def of_corpus(cls, corpus: Corpus) -> HeldOut:
        """The held-out part of training data, weighted as its mixture is.

        Raises:
            EvaluationError: where no source has a block held out.
        """
        parts: dict[str, Any] = {name: one.held_out for name, one in corpus.sources.items() if len(one.held_out)}
        if not parts:
            raise EvaluationError("no block of the data is held out: set held_out in its config to a larger share")
        shares = math.fsum(corpus.weights[name] for name in parts)
        weights = {name: corpus.weights[name] / shares for name in parts}
        cut = [(part.block_size, part.eos) for part in parts.values()]
        return cls(parts, weights, hash_json([corpus.fingerprint, cut]), vocabulary_of(corpus.tokenizer))

    @classmethod
    def of_texts(cls, texts: Mapping[str, str], tokenizer: PreTrainedTokenizerFast, block_size: int) -> HeldOut:
        """Texts by name, each with an end of text behind it, in blocks of `block_size` tokens and a shorter last one.

        Raises:
            EvaluationError: for a text without anything to predict, and for blocks of less than two tokens.
        """
        if block_size < 2:
            raise EvaluationError(f"block_size must be at least 2, got {block_size}: one token predicts nothing")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        sources: dict[str, Sequence[Block]] = {}
        for name, text in texts.items():
            tokens = torch.tensor([*tokenizer(text, add_special_tokens=False).input_ids, *end])
            if not text.strip() or len(tokens) < 2:
                raise EvaluationError(f"{name} has no text to predict")
            sources[name] = [{"input_ids": block} for block in tokens.split(block_size) if len(block) > 1]
        vocabulary = vocabulary_of(tokenizer)
        return cls(sources, None, hash_json([dict(texts), block_size, vocabulary]), vocabulary)


def perplexity_of(
    model: PreTrainedModel,
    held_out: HeldOut,
    *,
    limit: int | None = None,
    batch_size: int | str = "auto",
    ranks: Ranks = Ranks(),  # noqa: B008
) -> EvalRecord:
    r"""Exact perplexity of a model on held-out text, of each source and of all.

    $$ppl_s = \exp\Big(\frac{1}{N_s} \sum_{i=1}^{N_s} -\log p(x_i \mid x_{<i})\Big), \qquad
      ppl = \exp\Big(\sum_s w_s \log ppl_s\Big)$$

    Every token of every block counts once, but for the first of a block, which nothing predicts. Losses are summed in
    float64 over all tokens: no mean of batches, so that the batch size and the number of ranks do not matter beyond
    what they do to the model's own rounding.

    Args:
        model: on its device.
        held_out: the text.
        limit: use the first so many blocks of each source.
        batch_size: blocks at a time; "auto" begins with 64 (8 on a CPU) and takes less where memory does not suffice.
        ranks: that share the blocks; all of them call this.

    Returns:
        On all ranks, a record of the task `perplexity` with the metrics `perplexity` and `loss`, in nats a token, and
        of several sources `perplexity/NAME` and `loss/NAME`.

    Raises:
        EvaluationError: for blocks that are longer than the model reads, or where nothing is predicted.
    """
    sources = {name: _first(blocks, limit) for name, blocks in held_out.sources.items()}
    longest = max(len(blocks[0]["input_ids"]) for blocks in sources.values())
    if longest > (room := getattr(model.config, "max_position_embeddings", longest)):
        raise EvaluationError(f"blocks have {longest} tokens, the model reads {room}: cut shorter ones (block_size)")

    def measure(batch_size: int) -> dict[str, tuple[float, int]]:
        return {name: _sum_losses(model, blocks, batch_size, ranks) for name, blocks in sources.items()}

    if batch_size == "auto":
        largest = LARGEST_BATCH_ON_CPU if model.device.type == "cpu" else LARGEST_BATCH
        sums = find_executable_batch_size(measure, starting_batch_size=largest)()
    else:
        sums = measure(int(batch_size))
    gathered = ranks.all_gather(sums)
    totals = {
        name: (math.fsum(one[name][0] for one in gathered), sum(one[name][1] for one in gathered)) for name in sums
    }
    if empty := [name for name, (_, tokens) in totals.items() if not tokens]:
        raise EvaluationError(f"{', '.join(empty)}: no token is predicted; use more text")
    return EvalRecord(
        PERPLEXITY,
        _metrics(totals, held_out.weights),
        documents=sum(map(len, sources.values())),
        limit=limit,
        harness=f"slop-hf {__version__}, data {held_out.fingerprint[:12]}",
    )


def _metrics(totals: Mapping[str, tuple[float, int]], weights: Mapping[str, float] | None) -> dict[str, float]:
    losses = {name: total / tokens for name, (total, tokens) in totals.items()}
    if weights is None:
        loss = math.fsum(total for total, _ in totals.values()) / sum(tokens for _, tokens in totals.values())
    else:
        loss = math.fsum(weights[name] * losses[name] for name in losses)
    metrics = {"perplexity": perplexity(loss), "loss": loss}
    if len(losses) > 1:
        metrics |= {f"perplexity/{name}": perplexity(one) for name, one in losses.items()}
        metrics |= {f"loss/{name}": one for name, one in losses.items()}
    return metrics


@torch.no_grad()
def _sum_losses(model: PreTrainedModel, blocks: Sequence[Block], batch_size: int, ranks: Ranks) -> tuple[float, int]:
    """The sum of this rank's token losses, and how many they are."""
    total, count = 0.0, 0
    for batch in _batches(blocks, range(ranks.rank, len(blocks), ranks.count), batch_size):
        labels = batch.pop("labels", batch["input_ids"])
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).logits
        exact = torch.promote_types(logits.dtype, torch.float32)
        for row, label in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one by one: a row is [length, vocabulary]
            target = label.to(row.device)
            losses = cross_entropy(row.to(exact), target, ignore_index=IGNORED, reduction="none")
            total += float(losses.cpu().double().sum())
            count += int((label != IGNORED).sum())
    return total, count


def _batches(blocks: Sequence[Block], chosen: range, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Blocks of one length, stacked; a shorter one is a batch of its own, so that nothing is padded."""
    batch: list[Block] = []
    for index in chosen:
        block = blocks[index]
        if batch and (len(batch) == batch_size or len(block["input_ids"]) != len(batch[0]["input_ids"])):
            yield _stacked(batch)
            batch = []
        batch.append(block)
    if batch:
        yield _stacked(batch)


def _stacked(batch: Sequence[Block]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([block[name] for block in batch]) for name in batch[0]}


def _first(blocks: Sequence[Block], limit: int | None) -> Sequence[Block]:
    return blocks if limit is None or limit >= len(blocks) else [blocks[index] for index in range(limit)]
