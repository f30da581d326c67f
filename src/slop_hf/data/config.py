"""Training-data configuration: `Source`, `Mixture` and `DataConfig`.

No torch here: a configuration is read and checked at once.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from huggingface_hub import constants
from typing_extensions import Self

from ..errors import DataError
from ..io.files import find_near
from ..io.network_errors import hide_secrets
from ..io.numbers import is_finite_number, is_whole_number, require_whole_number
from ..io.record import Record
from ..io.serialization import Json, read_yaml

STDLIB, PACKAGES = "python-stdlib", "python-packages"
#: Texts that every machine has: the Python sources of the standard library, and of the installed packages.
BUILT_IN = (STDLIB, PACKAGES)
SMALLEST_VOCAB = 257  # a token per byte, and the end of text
ONLY = "corpus"  # the name of the source of data without a mixture
#: How a file holds documents: it is one document; one per line; JSON with one per line; Parquet with one per row.
Format = Literal["text", "lines", "jsonl", "parquet"]
TokenizerKind = Literal["bpe", "sentencepiece"]
LEAST_SHARE = 1e-6
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass(frozen=True)
class Source(Record, error=DataError):
    """Documents of one kind, and their share of the training tokens.

    Args:
        source: place of the documents, or several places, each one of
            `"python-stdlib"`, the Python sources of the running interpreter's standard library;
            `"python-packages"`, those of the packages that are installed for it;
            a local file, or a folder, of which every visible file is read;
            the URL of a file;
            a dataset on the Hub, `"owner/name"` or `"owner/name:config"`.
            An existing local path comes before a dataset of the same name.
        weight: share of the tokens; the weights of a mixture add up to 1, or to 100.
        split: split of Hub datasets.
        text_column: column of Hub datasets, JSON lines and Parquet that holds the text.
        format: format of the files; default, by their names: `.jsonl` (`.ndjson`, `.json`), `.parquet`, and `text`
            for all others, with one document per file. Files may be compressed: `.gz`, `.zst`, `.bz2`, `.xz`.
        max_documents: use only the first N documents with text; None, all.

    Raises:
        DataError: for a value out of its range.
    """

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
                f"give {STDLIB!r}, {PACKAGES!r}, a local path, a URL, or a Hub dataset as owner/name or "
                "owner/name:config"
            )
        for place in self.places:
            _check_url(place)
        for name in ("split", "text_column"):
            if not getattr(self, name):
                raise DataError(f"{name} must not be empty; the default is {getattr(type(self), name)!r}")
        if self.format is not None and self.format not in get_args(Format):
            raise DataError(f"format must be one of {', '.join(get_args(Format))}, got {self.format!r}")
        if not is_finite_number(self.weight, least=0) or not self.weight:
            raise DataError(f"weight must be a number above 0, got {self.weight!r}; to leave a source out, delete it")
        if self.max_documents is not None:
            require_whole_number(self.max_documents, "max_documents", error=DataError)

    @property
    def places(self) -> tuple[str, ...]:
        """The places of the documents, always as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source


#: Far more parts than there are machines or cores; each has a folder.
MOST_PARTS = 100_000


@dataclass(frozen=True)
class DataPart:
    """One of several contiguous parts of a source's files, each of about as many bytes.

    Args:
        number: number of the part, from 1 on.
        count: number of parts.

    Raises:
        DataError: unless `number` is from 1 to `count`, which is at most `MOST_PARTS`.

    >>> DataPart.parse("3/8")
    DataPart(number=3, count=8)
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not (is_whole_number(self.number, least=1) and is_whole_number(self.count, least=self.number)):
            raise DataError(_explain_part(f"{self.number}/{self.count}"))
        if self.count > MOST_PARTS:
            raise DataError(f"part {self.number}/{self.count} is one of more than {MOST_PARTS:,} parts: give fewer")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a part as `number/count`.

        Raises:
            DataError: for any other text.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise DataError(_explain_part(text))
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    def cut(self, sizes: Sequence[float]) -> range:
        """Return the positions of this part's items in a list, given their sizes.

        >>> [DataPart(number, 3).cut([5, 1, 1, 1, 5]) for number in (1, 2, 3)]
        [range(0, 1), range(1, 4), range(4, 5)]
        """
        total = math.fsum(sizes) or 1.0
        middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
        numbers = [min(int(middle / total * self.count), self.count - 1) + 1 for middle in middles]
        return range(bisect_left(numbers, self.number), bisect_right(numbers, self.number))


def _explain_part(text: str) -> str:
    return f"part must be K/N, the Kth of N parts, such as 3/8, got {text!r}: give K from 1 to N"


@dataclass(frozen=True)
class Mixture(Record, error=DataError):
    """Several sources, each with its share of the training tokens.

    Args:
        sources: sources by name; the names go into logs (`eval_NAME_loss`) and records.

    Raises:
        DataError: for weights that do not add up to 1 or 100, and names that cannot be part of a file's name.

    >>> mixture = Mixture({"web": Source("web/", weight=90), "books": Source("books/", weight=10)})
    >>> mixture.weights
    {'web': 0.9, 'books': 0.1}
    """

    sources: dict[str, Source]

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a mixture from a YAML file; a relative place is next to the file, or else in the working directory.

        Raises:
            DataError: if the file does not exist or does not hold a mixture.
        """
        content = read_yaml(path, error=DataError)
        find_places(content, Path(path).parent)
        return cls.from_plain({} if content is None else content, str(path))

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("a mixture needs sources: {NAME: {source: ..., weight: ...}, ...}")
        for name in self.sources:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise DataError(f"{name!r} cannot name a source: use letters, digits, _ and -")
        total = math.fsum(source.weight for source in self.sources.values())
        if not any(math.isclose(total, whole, rel_tol=1e-4) for whole in (1.0, 100.0)):  # written with a few digits
            weights = ", ".join(f"{name} {source.weight:g}" for name, source in self.sources.items())
            raise DataError(
                f"the weights add up to {total:g}, expected 1 or 100 ({weights}); "
                f"multiplied by {100 / total:.6g} they would add up to 100"
            )
        for name, share in self.weights.items():
            if share < LEAST_SHARE:
                raise DataError(f"{name} has a share of {share:g}, less than {LEAST_SHARE:g}; leave it out")

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the sources, which add up to 1."""
        return _normalize_weights(self.sources)


@dataclass(frozen=True)
class DataConfig(Record, error=DataError):
    """Training data, and how it is cut into blocks of tokens.

    The data is one source (`source` and the four fields after it), or a `mixture` of several.

    Args:
        source, split, text_column, format, max_documents: fields of the only source, as for `Source`.
        mixture: sources with their weights, or the path of their file.
        tokenizer: local folder or Hub id[@revision]; None trains a tokenizer on the training documents.
        tokenizer_kind: kind of tokenizer to train: `"bpe"`, byte-level, or `"sentencepiece"`, SentencePiece's BPE.
        vocab_size: size of the vocabulary to train, at least 257 (the bytes and the end of text).
        block_size: tokens per training example.
        held_out: share of the documents of each source kept for evaluation, in [0, 1).
        document_mask: whether tokens see, and are predicted from, their own document only.
        cache_dir: cache of tokens and downloads; default, `slop_hf` in the Hugging Face home.

    Raises:
        DataError: for a value out of its range.

    >>> DataConfig(source=["notes.txt", "owner/name:en"]).sources["corpus"].places
    ('notes.txt', 'owner/name:en')
    >>> DataConfig(held_out=1.0)
    Traceback (most recent call last):
    slop_hf.errors.DataError: held_out must be a share of the documents in [0, 1), got 1.0
    """

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
        assert self.sources  # a mixture's file is read and checked now
        if self.tokenizer == "":
            raise DataError("tokenizer must be a local folder or Hub id, or be left out to train one, got ''")
        if self.tokenizer_kind not in get_args(TokenizerKind):
            raise DataError(
                f"tokenizer_kind must be one of {', '.join(get_args(TokenizerKind))}, got {self.tokenizer_kind!r}"
            )
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        # Transformers predicts each token from those before it: one token alone leaves nothing to predict.
        require_whole_number(self.block_size, "block_size", least=2, error=DataError)
        if not is_finite_number(self.held_out, least=0) or self.held_out >= 1:
            raise DataError(f"held_out must be a share of the documents in [0, 1), got {self.held_out!r}")

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """The sources by name; the name of data without a mixture is `corpus`."""
        fields = {name: getattr(self, name) for name in ("source", "split", "text_column", "format", "max_documents")}
        if self.mixture is None:
            return {ONLY: Source(**fields)}
        for name, value in fields.items():
            if value != getattr(type(self), name):
                raise DataError(f"{name} {value!r} is for data of one source; set it for sources of the mixture")
        mixture = Mixture.from_yaml(self.mixture) if isinstance(self.mixture, str) else self.mixture
        return dict(mixture.sources)

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the sources, which add up to 1."""
        return _normalize_weights(self.sources)


def is_url(place: str) -> bool:
    """Whether a place is the URL of a file.

    >>> is_url("https://example.org/a.jsonl"), is_url("owner/name")
    (True, False)
    """
    return place.lower().startswith(("http://", "https://"))


def _check_url(place: str) -> None:
    """Refuse a URL whose host or port cannot be read."""
    if not is_url(place):
        return
    try:
        parts = urlsplit(place)
        is_valid = bool(parts.hostname) and parts.port != 0  # reading the port checks it
    except ValueError:
        is_valid = False
    if not is_valid:
        raise DataError(
            f"source {hide_secrets(place)!r} is a malformed URL: expected http(s)://host[:port]/path, with an IPv6 "
            "address in brackets"
        )


def find_places(content: Json, folder: str | os.PathLike[str], *, working_first: bool = False) -> None:
    """Replace the paths in the content of a file about data, or of a part of it, as `find_near` does, in place."""
    if not isinstance(content, dict):
        return
    for key in ("source", "mixture", "tokenizer"):
        value = content.get(key)
        if isinstance(value, str):
            content[key] = _find_place(value, folder, working_first)
        elif isinstance(value, list):
            content[key] = [
                _find_place(place, folder, working_first) if isinstance(place, str) else place for place in value
            ]
        else:
            find_places(value, folder, working_first=working_first)
    sources = content.get("sources")
    for source in sources.values() if isinstance(sources, dict) else ():
        find_places(source, folder, working_first=working_first)


def _find_place(place: str, folder: str | os.PathLike[str], working_first: bool) -> str:
    return place if place in BUILT_IN else find_near(place, folder, working_first=working_first)


def _normalize_weights(sources: Mapping[str, Source]) -> dict[str, float]:
    total = math.fsum(source.weight for source in sources.values())
    return {name: source.weight / total for name, source in sources.items()}


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot spell every text: fewer than 257 tokens."""
    if not is_whole_number(vocab_size, least=SMALLEST_VOCAB):
        raise DataError(
            f"vocab_size must be a whole number of at least {SMALLEST_VOCAB} (256 bytes and the end of text), "
            f"got {vocab_size!r}"
        )


def find_cache(cache_dir: str | None) -> Path:
    """Return the absolute path of the cache; None is the default one, `slop_hf` in the Hugging Face home."""
    return Path(cache_dir or os.path.join(constants.HF_HOME, "slop_hf")).expanduser().absolute()
