"""Where texts come from: the standard library, local files, the Hub; and `DataConfig`, which names them.

No torch here, so that a configuration can be read and checked at once.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from ..errors import DataError

STDLIB = "python-stdlib"
SMALLEST_VOCAB = 257  # a token for each byte, and the end of text
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class DataConfig:
    """A corpus and how to cut it into blocks of tokens.

    Args:
        source: where the texts are, one or several of
            `"python-stdlib"`, the Python sources of the running interpreter's standard library;
            a local file or folder, in which every visible file that is UTF-8 text is a document;
            a dataset on the Hub, `"owner/name"` or `"owner/name:config"`, in which every row is one.
            An existing local path comes before a dataset of the same name.
        split: the split of Hub datasets.
        text_column: the column of Hub datasets that holds the text.
        tokenizer: a local folder or Hub id; None trains one on the corpus.
        vocab_size: tokens of the tokenizer to train, at least 257 (the bytes and the end of text).
        block_size: tokens in a training example.
        held_out: share of the documents kept for evaluation, in [0, 1).
        max_documents: use only the first so many documents with text; None, all.
        cache_dir: where tokenized corpora are kept; default, `slop_hf` in the Hugging Face home.

    Raises:
        DataError: for a value out of its range.

    >>> DataConfig(source=["notes.txt", "owner/name:en"]).sources
    ('notes.txt', 'owner/name:en')
    >>> DataConfig(held_out=1.0)
    Traceback (most recent call last):
    slop_hf.errors.DataError: held_out must be a share of the documents in [0, 1), got 1.0
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    source: str | tuple[str, ...] = STDLIB
    split: str = "train"
    text_column: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    block_size: int = 256
    held_out: float = 0.02
    max_documents: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, list):
            object.__setattr__(self, "source", tuple(self.source))
        named = isinstance(self.sources, tuple) and all(isinstance(source, str) and source for source in self.sources)
        if not named or not self.sources:
            raise DataError(
                f"source must name a corpus or a list of them, got {self.source!r}: "
                f"give {STDLIB!r}, a local path, or a Hub dataset as owner/name or owner/name:config"
            )
        for name in ("split", "text_column"):
            if not getattr(self, name):
                raise DataError(f"{name} must not be empty; the default is {getattr(type(self), name)!r}")
        if self.tokenizer == "":
            raise DataError("tokenizer must be a local folder or Hub id, or None to train one, got ''")
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        # Transformers predicts each token from those before it: one alone has nothing to predict.
        self._check_count("block_size", 2)
        if self.max_documents is not None:
            self._check_count("max_documents", 1)
        number = isinstance(self.held_out, (int, float)) and not isinstance(self.held_out, bool)
        if not number or not 0 <= self.held_out < 1:
            raise DataError(f"held_out must be a share of the documents in [0, 1), got {self.held_out!r}")

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"{name} must be a whole number of at least {least}, got {value!r}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The source or sources, always as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source


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


def documents(config: DataConfig) -> Iterator[str]:
    """The texts of a corpus, one by one, in an order that is always the same; blank ones are left out.

    Files are read as they are asked for and Hub datasets are streamed, but every source is looked up
    at the call, so that a wrong name fails before work begins.

    Raises:
        DataError: for a source that is neither a local path nor a dataset that the Hub gives, for a
            column that is not there or holds no text and, once the texts end, for a corpus without any.

    >>> len(list(documents(DataConfig("python-stdlib", max_documents=3))))
    3
    """
    return _with_text([_open(source, config) for source in config.sources], config)


def local_files(source: str) -> dict[str, Path] | None:
    """The files of a local source by their names relative to it, sorted; None for a Hub dataset.

    Raises:
        DataError: for a name that is neither.
    """
    if source == STDLIB:
        # Installed packages lie inside the standard library's folder and are no part of it.
        root = Path(sysconfig.get_paths()["stdlib"])
        return _walk(root, suffix=".py", skipped=("site-packages", "dist-packages"))
    path = Path(source).expanduser()
    if path.is_dir():
        return _walk(path)
    if path.is_file():
        return {path.name: path}
    if _HUB_ID.fullmatch(source):
        return None
    raise DataError(
        f"source {source!r} is neither an existing file or folder nor a Hub dataset id (owner/name or "
        f"owner/name:config): correct the path, or use {STDLIB!r}, which needs no download"
    )


def _open(source: str, config: DataConfig) -> Iterator[str]:
    files = local_files(source)
    if files is None:
        return _hub_texts(source, config)
    return (_read(path) for path in files.values())


def _with_text(sources: list[Iterator[str]], config: DataConfig) -> Iterator[str]:
    found = False
    for text in islice(filter(str.strip, chain.from_iterable(sources)), config.max_documents):
        found = True
        yield text
    if not found:
        raise DataError(
            f"no document with text in {', '.join(map(repr, config.sources))}: expected files of UTF-8 text or "
            f"rows with text in the column {config.text_column!r}"
        )


def _walk(root: Path, suffix: str = "", skipped: tuple[str, ...] = ()) -> dict[str, Path]:
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in skipped and name != "__pycache__" and name[0] != "."
        ]
        for name in names:
            path = Path(folder, name)
            if name[0] != "." and name.endswith(suffix) and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def _read(path: Path) -> str:
    """The text of a file, line ends as they are; "" if it is not text (a NUL byte is git's sign of that)."""
    content = path.read_bytes()
    try:
        return "" if b"\0" in content else content.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _hub_texts(source: str, config: DataConfig) -> Iterator[str]:
    # Takes longer to import than everything else here together, and only Hub sources need it.
    import datasets

    name, _, subset = source.partition(":")
    try:
        rows = iter(datasets.load_dataset(name, subset or None, split=config.split, streaming=True))
        first = next(rows, None)
    except Exception as caught:  # datasets, hub client, pyarrow and the network: their errors share no base
        reason = str(caught).strip().partition("\n")[0] or type(caught).__name__
        raise DataError(
            f"source {source!r} is no local path, and the Hub did not give its split {config.split!r} ({reason}): "
            "check the name (owner/name or owner/name:config), the split, the network and HF_ENDPOINT, "
            "or use a local path"
        ) from caught
    if first is None:
        return iter(())
    if config.text_column not in first:
        raise DataError(
            f"source {source!r} has no column {config.text_column!r}: set text_column to one of {', '.join(first)}"
        )
    return (_text_of(row, source, config.text_column) for row in chain([first], rows))


def _text_of(row: dict[str, Any], source: str, column: str) -> str:
    text = row[column]
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        texts = ", ".join(name for name, value in row.items() if isinstance(value, str)) or "none"
        raise DataError(f"column {column!r} of {source!r} holds {kind}, expected text; columns with text: {texts}")
    return text or ""
