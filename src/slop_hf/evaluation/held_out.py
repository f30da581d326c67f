"""`HeldOut`: blocks of held-out text per source, and the exact perplexity of a model on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from accelerate.utils import find_executable_batch_size
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..data import Corpus
from ..data.packing import IGNORED, Blocks
from ..data.tokenizing import hash_vocabulary
from ..errors import EvaluationError
from ..io.numbers import require_whole_number
from ..io.serialization import hash_json, list_versions
from ..runs.records import EvalRecord, compute_perplexity
from ..training.config import EvalOptions
from ..training.ranks import Ranks
from .tasks import PERPLEXITY

#: Batch sizes that "auto" starts from and halves until one fits. On a CPU it has to fit at once: a process that takes
#: too much memory there is killed.
LARGEST_BATCH, LARGEST_BATCH_ON_CPU = 64, 8


@dataclass(frozen=True)
class HeldOut:
    """Tokenized text to measure perplexity on.

    Args:
        sources: blocks per source; a block has `input_ids`, and may have `labels` and `position_ids`, each int64 of
            shape [length].
        weights: weight of each source in the mean loss, adding up to 1; None to weight each by its predicted tokens.
        fingerprint: hash of the blocks and weights.
        vocabulary: hash of the tokenizer; "" if it is not known.
    """

    sources: Mapping[str, Blocks]
    weights: Mapping[str, float] | None
    fingerprint: str
    vocabulary: str = ""

    @classmethod
    def from_corpus(cls, corpus: Corpus) -> HeldOut:
        """Take the held-out part of training data, weighted like the mixture."""
        parts = corpus.held_out
        if not parts:
            raise EvaluationError("no block of the data is held out: set held_out in its config to a larger share")
        total = math.fsum(corpus.weights[name] for name in parts)
        weights = {name: corpus.weights[name] / total for name in parts}
        cut = [(part.block_size, part.eos) for part in parts.values()]
        return cls(parts, weights, hash_json([corpus.fingerprint, cut]), corpus.vocabulary)

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], tokenizer: PreTrainedTokenizerFast, block_size: int) -> HeldOut:
        """Tokenize named texts, end each with the end-of-text token, and cut them into blocks of `block_size` tokens.

        The last block of a text may be shorter.

        Raises:
            EvaluationError: if there is no text, a text is empty, or `block_size` is below 2.
        """
        # One token alone predicts nothing.
        require_whole_number(block_size, "block_size", least=2, error=EvaluationError)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise EvaluationError(
                f"tokenizer must be a PreTrainedTokenizerFast, got {type(tokenizer).__name__}: give the model's"
            )
        if not isinstance(texts, Mapping) or not texts or not all(isinstance(text, str) for text in texts.values()):
            raise EvaluationError("texts must be one or more texts by name, such as {'notes': 'It was …'}")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        sources: dict[str, Blocks] = {}
        for name, text in texts.items():
            tokens = torch.tensor([*tokenizer(text, add_special_tokens=False).input_ids, *end])
            if not text.strip() or len(tokens) < 2:
                raise EvaluationError(f"{name} has no text to predict")
            sources[name] = [{"input_ids": block} for block in tokens.split(block_size) if len(block) > 1]
        vocabulary = hash_vocabulary(tokenizer)
        return cls(sources, None, hash_json([dict(texts), block_size, vocabulary]), vocabulary)


def measure_perplexity(
    model: PreTrainedModel,
    held_out: HeldOut,
    *,
    limit: int | None = None,
    batch_size: int | str = "auto",
    ranks: Ranks = Ranks(),  # noqa: B008
) -> EvalRecord:
    r"""Measure the exact perplexity of a model on held-out text, per source and overall.

    $$ppl_s = \exp\Big(\frac{1}{N_s} \sum_{i=1}^{N_s} -\log p(x_i \mid x_{<i})\Big), \qquad
      ppl = \exp\Big(\sum_s w_s \log ppl_s\Big)$$

    Every token of every block counts once, except the first of each block, which nothing predicts. Losses are summed
    in float64 over all tokens, not averaged per batch: the batch size and the number of ranks change the result only
    through the model's own rounding.

    Args:
        limit: number of blocks to use per source, from the first; None for all.
        batch_size: blocks per batch; "auto" starts from 64 (8 on a CPU) and halves it while memory does not suffice.
        ranks: processes that share the blocks; each of them makes this call.

    Raises:
        EvaluationError: if there is nothing to predict, or the blocks do not fit the model.

    Returns:
        On every rank, a record of the task `perplexity` with the metrics `perplexity` and `loss`, in nats per token,
        and if there are several sources also `perplexity/NAME` and `loss/NAME`.
    """
    EvalOptions(PERPLEXITY, limit=limit, batch_size=batch_size)  # refuses numbers that mean nothing
    sources = held_out.sources
    if not sources or not all(map(len, sources.values())):
        names = ", ".join(name for name, blocks in sources.items() if not len(blocks)) or "held_out"
        raise EvaluationError(f"{names} has no blocks to predict; use more text")
    counts = {name: len(blocks) if limit is None else min(limit, len(blocks)) for name, blocks in sources.items()}
    longest = max(len(blocks[0]["input_ids"]) for blocks in sources.values())
    if longest > (context := getattr(model.config, "max_position_embeddings", longest)):
        raise EvaluationError(
            f"blocks have {longest} tokens, and the model reads {context}: cut shorter ones (block_size)"
        )

    def measure(batch_size: int) -> dict[str, tuple[float, int]]:
        shares = {name: range(ranks.rank, count, ranks.count) for name, count in counts.items()}
        return {name: _sum_losses(model, sources[name], share, batch_size) for name, share in shares.items()}

    with ranks.raise_on_all():
        if batch_size == "auto":
            largest = LARGEST_BATCH_ON_CPU if model.device.type == "cpu" else LARGEST_BATCH
            sums = find_executable_batch_size(measure, starting_batch_size=largest)()
        else:
            sums = measure(int(batch_size))
    gathered = ranks.gather_all(sums)
    by_source = {name: list(zip(*(part[name] for part in gathered), strict=True)) for name in sums}
    totals = {name: (math.fsum(losses), sum(tokens)) for name, (losses, tokens) in by_source.items()}
    if empty := [name for name, (_, tokens) in totals.items() if not tokens]:
        raise EvaluationError(f"{', '.join(empty)}: no token is predicted; use more text")
    return EvalRecord(
        PERPLEXITY,
        _compute_metrics(totals, held_out.weights),
        documents=sum(counts.values()),
        limit=limit,
        harness=f"slop-hf {list_versions()['slop-hf']}, data {held_out.fingerprint[:12]}",
    )


def _compute_metrics(totals: Mapping[str, tuple[float, int]], weights: Mapping[str, float] | None) -> dict[str, float]:
    losses = {name: total / tokens for name, (total, tokens) in totals.items()}
    if weights is None:
        loss = math.fsum(total for total, _ in totals.values()) / sum(tokens for _, tokens in totals.values())
    else:
        loss = math.fsum(weights[name] * losses[name] for name in losses)
    metrics = {"perplexity": compute_perplexity(loss), "loss": loss}
    if len(losses) > 1:
        metrics |= {f"perplexity/{name}": compute_perplexity(of_source) for name, of_source in losses.items()}
        metrics |= {f"loss/{name}": of_source for name, of_source in losses.items()}
    return metrics


@torch.no_grad()
def _sum_losses(model: PreTrainedModel, blocks: Blocks, indices: range, batch_size: int) -> tuple[float, int]:
    """Return the sum of the token losses of some blocks, and the number of predicted tokens."""
    total, count, vocabulary = 0.0, 0, model.get_input_embeddings().weight.shape[0]
    for batch in _iterate_batches(blocks, indices, batch_size):
        labels = batch.pop("labels", batch["input_ids"])  # [batch, length]
        if (token := int(batch["input_ids"].max())) >= vocabulary:  # on a GPU, it would end the process
            raise EvaluationError(
                f"the text has the token {token}, and the model's vocabulary {vocabulary} tokens: tokenize the text "
                "with the model's tokenizer"
            )
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).logits
        exact = torch.promote_types(logits.dtype, torch.float32)
        for row, label in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one by one: a row is [length, vocabulary]
            target = label.to(row.device)
            losses = cross_entropy(row.to(exact), target, ignore_index=IGNORED, reduction="none")
            total += float(losses.cpu().double().sum())
            count += int((label != IGNORED).sum())
    return total, count


def _iterate_batches(blocks: Blocks, indices: range, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of blocks of equal length, [batch, length] per tensor; nothing is padded."""
    for _, group in groupby((blocks[index] for index in indices), key=lambda block: len(block["input_ids"])):
        while batch := list(islice(group, batch_size)):
            yield {name: torch.stack([block[name] for block in batch]) for name in batch[0]}
