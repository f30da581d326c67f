"""`prepare_data`: from a `DataConfig` to blocks of tokens, by way of a cache.

A cached corpus is a folder, complete or absent:

    KEY/tokenizer/                     as transformers saves it
    KEY/train.ds, KEY/held_out.ds      tokens (see packing.py), each with .index and .metadata
    KEY/corpus.json                    counts, fingerprint, and the configuration it was made from

The key covers all that the tokens depend on. The block size is not among it: blocks are cut when reading.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import constants
from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from ..serialization import parse, read_yaml, to_json, write_text
from .packing import PackedDataset, pack
from .sources import STDLIB, DataConfig, documents, local_files
from .tokenizer import load_tokenizer, train_tokenizer

FORMAT = 1  # of the cache: count up when the same configuration gives other tokens or files

# The merges of a small vocabulary have settled long before; training keeps the distinct words in memory.
TOKENIZER_TRAINING_BYTES = 64 * 2**20

TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Args:
        tokenizer: the one that made the tokens.
        train, held_out: blocks for training and for evaluation; no document is in both.
        documents: how many there are, both parts together.
        fingerprint: a hash of the tokenizer and all tokens: corpora of the same content have the same,
            wherever they were prepared and whatever the block size.
    """

    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset
    held_out: PackedDataset
    documents: int
    fingerprint: str


@dataclass(frozen=True)
class _Record:
    """What corpus.json holds; tokens by part."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    documents: int
    tokens: dict[str, int]
    fingerprint: str
    config: dict[str, Any]


def prepare_data(config: DataConfig) -> Corpus:
    """The corpus that `config` describes, tokenized on the first call and from the cache after that.

    A document is held out if the hash of its text, as a fraction, is below `config.held_out`: equal
    documents are on the same side, whatever their order and number. The tokenizer is trained on training
    documents alone (the first 64 MiB). Changed local files make a new cache; a dataset or tokenizer
    that changes on the Hub does not: delete the cache to read it anew.

    Processes that call at the same time do the same work and share one result; in distributed training,
    let the main process of each machine go first (`args.main_process_first()`).

    Raises:
        DataError: for a corpus or tokenizer that cannot be read, a part that has less than one block,
            or a damaged cache.
    """
    cache = Path(config.cache_dir or os.path.join(constants.HF_HOME, "slop_hf")).expanduser().absolute()
    folder = cache / _key(config)
    if not folder.is_dir():
        _build(config, folder)
    return _load(config, folder)


def _build(config: DataConfig, folder: Path) -> None:
    texts = documents(config)  # opened first of all: a wrong source fails before the tokenizer is trained
    if config.tokenizer is None:
        training = (text for text in documents(config) if _part(text, config.held_out) == TRAIN)
        tokenizer = train_tokenizer(_first_bytes(training, TOKENIZER_TRAINING_BYTES), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    # A plain mkdir, unlike mkdtemp's, leaves the folder readable to others where the umask does.
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    aside.mkdir(parents=True)
    try:
        labelled = ((_part(text, config.held_out), text) for text in texts)
        name = config.tokenizer or f"{folder.name}/tokenizer"
        writers = pack(labelled, tokenizer, aside, (TRAIN, HELD_OUT), name)
        tokenizer.save_pretrained(aside / "tokenizer")
        content = blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16)
        for writer in writers:
            content.update(writer.digest.digest())
        record = _Record(
            documents=sum(writer.documents for writer in writers),
            tokens={writer.path.stem: writer.tokens for writer in writers},
            fingerprint=content.hexdigest(),
            config=_ingredients(config),
        )
        write_text(aside / "corpus.json", to_json(record))
        try:
            aside.rename(folder)
        except OSError:
            # Another process was faster, and its corpus is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _load(config: DataConfig, folder: Path) -> Corpus:
    try:
        record = parse(_Record, read_yaml(folder / "corpus.json"), where="corpus.json", error=DataError)
        tokenizer = load_tokenizer(folder / "tokenizer")
    except ValueError as caught:
        raise DataError(
            f"the cached corpus is damaged ({caught}): delete the folder {folder}, and it will be made anew"
        ) from caught
    train, held_out = (PackedDataset(folder / f"{part}.ds", config.block_size) for part in (TRAIN, HELD_OUT))
    for part, blocks in ((TRAIN, train), (HELD_OUT, held_out)):
        if not len(blocks) and (part == TRAIN or config.held_out > 0):
            raise DataError(
                f"the {part} part has {record.tokens.get(part)} tokens, less than a block of {config.block_size}, out "
                f"of {record.documents} documents (a file is one): use a larger corpus, another share held_out "
                f"(now {config.held_out:g}{'' if part == TRAIN else '; 0 holds out none'}) or a smaller block_size"
            )
    return Corpus(tokenizer, train, held_out, record.documents, record.fingerprint)


def _part(text: str, held_out: float) -> str:
    fraction = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
    return HELD_OUT if fraction < held_out else TRAIN


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def _ingredients(config: DataConfig) -> dict[str, Any]:
    """What the tokens depend on, as far as the configuration tells."""
    values = {
        "source": list(config.sources),
        "split": config.split,
        "text_column": config.text_column,
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size if config.tokenizer is None else None,
        "held_out": config.held_out,
        "max_documents": config.max_documents,
    }
    return {name: value for name, value in values.items() if value is not None}


def _key(config: DataConfig) -> str:
    ingredients = {
        "format": FORMAT,
        "python": platform.python_version() if STDLIB in config.sources else None,
        "files": [_stamps(source) for source in config.sources],
        "tokenizer_files": _stamps(config.tokenizer)
        if config.tokenizer and os.path.exists(config.tokenizer)
        else None,
        **_ingredients(config),
    }
    return blake2b(json.dumps(ingredients, sort_keys=True).encode(), digest_size=16).hexdigest()


def _stamps(source: str) -> list[tuple[str, int, int]] | None:
    """(name, size, modification time in ns) of the files of a local source, which tell whether one changed."""
    files = local_files(source)
    if files is None:
        return None
    stats = ((name, path.stat()) for name, path in files.items())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
