"""Tokenizers: train a byte-level BPE, or load one."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import DataError
from .sources import check_vocab_size

logger = logging.get_logger(__name__)

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, the same for the same texts.

    Every text decodes to itself, whatever its language: there is no normalization and a token for
    each byte. Token 0 is `<|endoftext|>`, which begins, ends and pads sequences. On little text there
    are fewer pairs to merge than asked for; the vocabulary is then smaller, and a warning says so.

    Args:
        texts: read once.
        vocab_size: tokens in all, at least 257 (256 bytes and the end of text).

    Raises:
        DataError: for a smaller `vocab_size`.

    >>> tokenizer = train_tokenizer(["to be or not to be"] * 2, 259)
    >>> len(tokenizer), tokenizer.eos_token_id
    (259, 0)
    >>> tokenizer.decode(tokenizer("naïve ☕").input_ids)
    'naïve ☕'
    """
    check_vocab_size(vocab_size)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once saves a single token, and says nothing about other texts
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        logger.warning(
            f"the corpus has pairs for a vocabulary of {bpe.get_vocab_size()} only, {vocab_size} were asked for; "
            "to silence this, lower vocab_size or give more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer in a local folder or on the Hub; code that comes with it is never run.

    Raises:
        DataError: if it cannot be loaded, has no Rust implementation or no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as caught:  # transformers, tokenizers, the Hub and the network: their errors share no base
        reason = str(caught).strip().partition("\n")[0] or type(caught).__name__
        raise DataError(
            f"tokenizer '{name}' cannot be loaded ({reason}): give a folder with tokenizer.json, "
            "a Hub id that can be reached, or leave tokenizer out to train one"
        ) from caught
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"tokenizer '{name}' is a {type(tokenizer).__name__} without a tokenizer.json, which packing needs: "
            "choose another tokenizer, or leave tokenizer out to train one"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer '{name}' has no eos_token, which ends every document: set one "
            "(tokenizer.eos_token = ...; tokenizer.save_pretrained(...)) or choose another tokenizer"
        )
    return tokenizer
