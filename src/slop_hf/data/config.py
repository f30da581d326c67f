"""What training data there is: `Source`, `Mixture`, and `DataConfig`, which also says how it is cut.

No torch here, so that a configuration can be read and checked at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from ..errors import DataError
from ..io.serialization import parse, read_yaml

STDLIB = "python-stdlib"
SMALLEST_VOCAB = 257  # a token for each byte, and the end of text
ONLY = "corpus"  # the name of a source that is the only one
#: How a file holds documents: all of it is one; one a line; JSON with one a line; Parquet with one a row.
Format = Literal["text", "lines", "jsonl", "parquet"]
TokenizerKind = Literal["bpe", "sentencepiece"]
LEAST_SHARE = 1e-6
ROUNDING = 1e-4  # of weights that were written with a few digits
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass(frozen=True)
class Source:
    """Documents of one kind, and their share of the training tokens.

    Args:
        source: where the documents are, one place or several of
            `"python-stdlib"`, the Python sources of the running interpreter's standard library;
            a local file, or a folder, of which every visible file is read;
            the URL of a file;
            a dataset on the Hub, `"owner/name"` or `"owner/name:config"`.
            An existing local path comes before a dataset of the same name.
        weight: its share of the tokens; the weights of a mixture add up to 1, or to 100.
        split: the split of Hub datasets.
        text_column: the column of Hub datasets, JSON lines and Parquet that holds the text.
        format: of files; by default each one's name tells: `.jsonl` (`.ndjson`, `.json`), `.parquet`, and `text` for
            all others, in which a file is a document. Files may be compressed: `.gz`, `.zst`, `.bz2`, `.xz`.
        max_documents: use only the first so many documents with text; None, all.

    Raises:
        DataError: for a value out of its range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    source: str | tuple[str, ...] = STDLIB
    weight: float = 1.0
    split: str = "train"
    text_column: str = "text"
    format: Format | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, list):
            object.__setattr__(self, "source", tuple(self.source))
        named = isinstance(self.places, tuple) and all(isinstance(place, str) and place for place in self.places)
        if not named or not self.places:
            raise DataError(
                f"source must name a corpus or a list of them, got {self.source!r}: "
                f"give {STDLIB!r}, a local path, a URL, or a Hub dataset as owner/name or owner/name:config"
            )
        for name in ("split", "text_column"):
            if not getattr(self, name):
                raise DataError(f"{name} must not be empty; the default is {getattr(type(self), name)!r}")
        if self.format is not None and self.format not in get_args(Format):
            raise DataError(f"format must be one of {', '.join(get_args(Format))}, got {self.format!r}")
        if not _is_number(self.weight) or not 0 < self.weight < math.inf:
            raise DataError(f"weight must be a number above 0, got {self.weight!r}; leave a source out for none of it")
        if self.max_documents is not None:
            _check_count("max_documents", self.max_documents, 1)

    @property
    def places(self) -> tuple[str, ...]:
        """Where the documents are, always as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Mixture:
    """Several sources, each with its share of the training tokens.

    Args:
        sources: by name; a name goes into logs (`eval_NAME_loss`) and records.

    Raises:
        DataError: for weights that do not add up to 1 or 100, and names that cannot be part of a file's name.

    >>> mixture = Mixture({"web": Source("web/", weight=90), "books": Source("books/", weight=10)})
    >>> mixture.weights
    {'web': 0.9, 'books': 0.1}
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    sources: dict[str, Source]

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("a mixture needs sources: {NAME: {source: ..., weight: ...}, ...}")
        for name in self.sources:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise DataError(f"{name!r} cannot name a source: use letters, digits, _ and -")
        total = math.fsum(source.weight for source in self.sources.values())
        if not any(math.isclose(total, whole, rel_tol=ROUNDING) for whole in (1.0, 100.0)):
            given = ", ".join(f"{name} {source.weight:g}" for name, source in self.sources.items())
            raise DataError(
                f"the weights add up to {total:g}, expected 1 or 100 ({given}); "
                f"multiplied by {100 / total:.6g} they would add up to 100"
            )
        for name, share in self.weights.items():
            if share < LEAST_SHARE:
                raise DataError(f"{name} has a share of {share:g}, less than {LEAST_SHARE:g}; leave it out")

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the sources, which add up to 1."""
        total = math.fsum(source.weight for source in self.sources.values())
        return {name: source.weight / total for name, source in self.sources.items()}

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Mixture:
        """Read a mixture; local places are relative to the working directory, as on the command line.

        Raises:
            DataError: naming the file and the key at fault.
        """
        return parse(cls, read_yaml(path, error=DataError) or {}, where=str(path), error=DataError)


@dataclass(frozen=True)
class DataConfig:
    """Training data and how to cut it into blocks of tokens.

    There is one source (`source` and the four fields behind it), or a `mixture` of several.

    Args:
        source, split, text_column, format, max_documents: of the one source, as for `Source`.
        mixture: the sources with their weights, in place, or the path of their file.
        tokenizer: a local folder or Hub id[@revision]; None trains one on the training documents.
        tokenizer_kind: of the one to train: `"bpe"`, byte-level, or `"sentencepiece"`, SentencePiece's BPE.
        vocab_size: of the one to train, at least 257 (the bytes and the end of text).
        block_size: tokens in a training example.
        held_out: share of the documents of each source kept for evaluation, in [0, 1).
        document_mask: let no token see another document of its block, and predict none from another.
        cache_dir: where tokenized corpora are kept; default, `slop_hf` in the Hugging Face home.

    Raises:
        DataError: for a value out of its range.

    >>> DataConfig(source=["notes.txt", "owner/name:en"]).sources["corpus"].places
    ('notes.txt', 'owner/name:en')
    >>> DataConfig(held_out=1.0)
    Traceback (most recent call last):
    slop_hf.errors.DataError: held_out must be a share of the documents in [0, 1), got 1.0
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    source: str | tuple[str, ...] = STDLIB
    split: str = "train"
    text_column: str = "text"
    format: Format | None = None
    max_documents: int | None = None
    mixture: Mixture | str | None = None
    tokenizer: str | None = None
    tokenizer_kind: TokenizerKind = "bpe"
    vocab_size: int = 4096
    block_size: int = 256
    held_out: float = 0.02
    document_mask: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, list):
            object.__setattr__(self, "source", tuple(self.source))
        assert self.sources  # read and checked now
        if self.tokenizer == "":
            raise DataError("tokenizer must be a local folder or Hub id, or None to train one, got ''")
        if self.tokenizer_kind not in get_args(TokenizerKind):
            raise DataError(
                f"tokenizer_kind must be one of {', '.join(get_args(TokenizerKind))}, got {self.tokenizer_kind!r}"
            )
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        # Transformers predicts each token from those before it: one alone has nothing to predict.
        _check_count("block_size", self.block_size, 2)
        if not _is_number(self.held_out) or not 0 <= self.held_out < 1:
            raise DataError(f"held_out must be a share of the documents in [0, 1), got {self.held_out!r}")

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """The sources by name; a single one is named `corpus`."""
        own = {name: getattr(self, name) for name in ("source", "split", "text_column", "format", "max_documents")}
        if self.mixture is None:
            return {ONLY: Source(**own)}
        for name, value in own.items():
            if value != getattr(type(self), name):
                raise DataError(f"{name} {value!r} is for data of one source; set it for sources of the mixture")
        mixture = Mixture.from_yaml(self.mixture) if isinstance(self.mixture, str) else self.mixture
        return dict(mixture.sources)

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the sources, which add up to 1."""
        total = math.fsum(source.weight for source in self.sources.values())
        return {name: source.weight / total for name, source in self.sources.items()}


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot spell every text.

    Raises:
        DataError: for less than 257 tokens.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"vocab_size must be a whole number of at least {SMALLEST_VOCAB} (256 bytes and the end of text), "
            f"got {vocab_size!r}"
        )


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
