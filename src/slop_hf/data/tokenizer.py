"""Tokenizers: training of a byte-level BPE or of SentencePiece's BPE, and loading."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import DataError
from ..io.hub_address import locate
from ..io.hub_client import read_hub
from ..io.model_errors import explain_load_error
from ..io.network_errors import get_first_line
from .config import TokenizerKind, check_vocab_size

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

logger = logging.get_logger(__name__)

END_OF_TEXT = "<|endoftext|>"
# In the order and spelling of SentencePiece and LLaMA.
UNKNOWN_TOKEN, BEGIN_TOKEN, END_TOKEN = "<unk>", "<s>", "</s>"
SENTENCEPIECE_SPACE = "\u2581"  # ▁


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: TokenizerKind = "bpe") -> PreTrainedTokenizerFast:
    """Train a tokenizer on `texts`; the same texts give the same tokenizer.

    Every text decodes to itself, whatever its language: there is no normalization, and every byte has a token. If the
    texts have too few pairs to merge, the vocabulary is smaller than `vocab_size`, and a warning says so.

    Args:
        texts: training texts, read once.
        vocab_size: number of tokens, at least 257 (256 bytes and the end of text).
        kind: `"bpe"`, byte-level BPE. Token 0 is `<|endoftext|>`, which begins, ends and pads sequences.
            `"sentencepiece"`, SentencePiece's BPE with LLaMA's settings: single digits, tokens for runs of spaces,
            bytes for rare characters, and tokens 0 to 2 `<unk>`, `<s>`, `</s>`. Unlike LLaMA's, it adds no space
            before a text. Training needs the extra `slop-hf[sentencepiece]`; the tokenizer does not. Its ids are those
            of SentencePiece, except that a space is spelled " ", not "▁", so that a "▁" in a text is preserved.

    Raises:
        DataError: for a smaller `vocab_size`, an unknown kind, a missing extra or texts without content.

    >>> tokenizer = train_tokenizer(["to be or not to be"] * 2, 259)
    >>> len(tokenizer), tokenizer.eos_token_id
    (259, 0)
    >>> tokenizer.decode(tokenizer("naïve ☕").input_ids)
    'naïve ☕'
    """
    check_vocab_size(vocab_size)
    train = {"bpe": _train_bpe, "sentencepiece": _train_sentencepiece}.get(kind)
    if train is None:
        raise DataError(f"a tokenizer's kind must be 'bpe' or 'sentencepiece', got {kind!r}")
    tokenizer = train(texts, vocab_size)
    if len(tokenizer) < vocab_size:
        logger.warning(
            f"the corpus has pairs for a vocabulary of only {len(tokenizer)} tokens, vocab_size is {vocab_size}; "
            "to silence this, lower vocab_size or give more text"
        )
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair that occurs once saves one token, and says nothing about other texts
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _train_sentencepiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=convert_sentencepiece(train_sentencepiece(texts, vocab_size)),
        unk_token=UNKNOWN_TOKEN,
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceProcessor:
    """Train a SentencePiece model with LLaMA's settings, but without its space before each text."""
    try:
        import sentencepiece
    except ImportError as caught:
        raise DataError(
            "training a SentencePiece tokenizer needs the package sentencepiece: pip install "
            "'slop-hf[sentencepiece]', or set tokenizer_kind to bpe"
        ) from caught
    failed: list[Exception] = []

    def lines() -> Iterator[str]:
        try:
            # By lines, as SentencePiece reads files: a line break stays a separate byte.
            yield from (line for text in texts for line in text.split("\n") if line)
        except Exception as caught:  # an unreadable source; SentencePiece would keep only its message
            failed.append(caught)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=2**30,  # in bytes; longer ones would be left out
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as caught:
        raise failed[0] if failed else _explain_sentencepiece_error(caught, vocab_size) from caught
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _explain_sentencepiece_error(caught: RuntimeError, vocab_size: int) -> DataError:
    least = re.search(r"required_chars\. \d+ vs (\d+)", str(caught))
    if least:
        return DataError(
            f"vocab_size {vocab_size} is too small for SentencePiece: {least[1]} tokens are needed for the characters "
            "of the texts, 256 bytes and 3 special tokens; set a larger one, or tokenizer_kind to bpe"
        )
    return DataError(f"SentencePiece cannot be trained on these texts ({get_first_line(caught)}): give more text")


def convert_sentencepiece(processor: SentencePieceProcessor) -> Tokenizer:
    """Convert a SentencePiece model to a tokenizer that does not need the package.

    The ids are equal for every text without "▁", which SentencePiece reads as " ". SentencePiece merges the neighbours
    whose union is the piece with the best score. Scores of a BPE model fall from piece to piece, so every way to split
    a piece in two is a merge, in the order of the pieces.
    """
    numbers = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(number) for number in numbers]
    learned = {
        pieces[number].replace(SENTENCEPIECE_SPACE, " "): number
        for number in numbers
        if not (processor.is_byte(number) or processor.is_control(number) or processor.is_unknown(number))
    }
    others = {pieces[number]: number for number in set(numbers) - set(learned.values())}
    splits = ((piece[:cut], piece[cut:]) for piece in learned for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in learned and right in learned]
    bpe = Tokenizer(models.BPE({**others, **learned}, merges, unk_token=UNKNOWN_TOKEN, byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return bpe


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer in a local folder or on the Hub; code that comes with it is never run.

    Raises:
        DataError: if it cannot be loaded, has no Rust implementation or no end-of-text token.
    """
    try:
        tokenizer = read_hub(
            lambda: AutoTokenizer.from_pretrained(**locate(name), trust_remote_code=False),
            f"reading the tokenizer {name}",
        )
    except Exception as caught:  # transformers, tokenizers, the Hub and the network: their errors share no base
        raise DataError(
            f"tokenizer '{name}' cannot be loaded ({explain_load_error(caught)}): give a folder with tokenizer.json, "
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
