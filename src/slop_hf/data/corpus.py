"""`prepare_data`: from a `DataConfig` to blocks of tokens, by way of a cache.

Every source is tokenized once, whatever its weight:

    tokenizers/KEY/                    a tokenizer that was trained, as transformers saves it
    sources/KEY/train.ds, held_out.ds  tokens (see packing.py), each with .index and .metadata
    sources/KEY/source.json            counts, fingerprint, and what it was made from

A folder is complete or absent; `.KEY.building` is one that a later call goes on with. A key covers all that the
content depends on. The block size is not among it: blocks are cut when reading.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from huggingface_hub import constants
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import DataError
from ..io.files import write_directory, write_text
from ..io.serialization import hash_json, parse, read_yaml, to_json, to_plain
from .config import STDLIB, DataConfig, Source
from .packing import MixedBlocks, PackedDataset
from .sources import DocumentStream, documents, local_files
from .tokenizer import load_tokenizer, train_tokenizer
from .tokenizing import HELD_OUT, PARTS, TRAIN, part_of, tokenize, vocabulary_of

logger = logging.get_logger(__name__)

FORMAT = 2  # of the cache: count up when the same configuration gives other tokens or files

# The merges of a small vocabulary have settled long before; training keeps the distinct words in memory.
TOKENIZER_TRAINING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SourceTokens:
    """A tokenized source.

    Args:
        train, held_out: blocks for training and for evaluation; no document is in both.
        documents: how many there are, both parts together.
        fingerprint: a hash of all tokens: the same content has the same, wherever it was prepared.
    """

    train: PackedDataset
    held_out: PackedDataset
    documents: int
    fingerprint: str


@dataclass(frozen=True)
class Corpus:
    """Tokenized training data.

    Args:
        tokenizer: the one that made the tokens.
        sources: by name.
        weights: the share of each source of the training tokens; they add up to 1.
        fingerprint: a hash of the tokenizer, all tokens and the weights.
    """

    tokenizer: PreTrainedTokenizerFast
    sources: Mapping[str, SourceTokens]
    weights: Mapping[str, float]
    fingerprint: str

    @cached_property
    def train(self) -> MixedBlocks:
        """What a trainer draws from, by the weights."""
        return MixedBlocks({name: one.train for name, one in self.sources.items()}, self.weights, self.fingerprint)

    @cached_property
    def held_out(self) -> PackedDataset | dict[str, PackedDataset] | None:
        """What a trainer evaluates on: blocks by source, those of the only one, or none."""
        found = {name: one.held_out for name, one in self.sources.items() if len(one.held_out)}
        return (next(iter(found.values())) if len(self.sources) == 1 else found) if found else None

    @property
    def documents(self) -> int:
        """How many there are in all."""
        return sum(one.documents for one in self.sources.values())


@dataclass(frozen=True)
class _Record:
    """What source.json holds; tokens by part."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    documents: int
    tokens: dict[str, int]
    fingerprint: str
    made_from: dict[str, Any]


def prepare_data(config: DataConfig, *, progress: bool = True) -> Corpus:
    """The data that `config` describes, tokenized on the first call and from the cache after that.

    The tokenizer is trained on training documents alone: the first 64 MiB, of each source its share. Changed local
    files make a new cache; a dataset that changes on the Hub does not: delete the cache to read it anew.

    A call that is interrupted is gone on with by the next. Processes that call at the same time wait for the one that
    came first; in distributed training, let the main process of each machine go first
    (`args.main_process_first()`).

    Args:
        config: the data.
        progress: whether to show bars.

    Raises:
        DataError: for a source or tokenizer that cannot be read, a training part that has less than one block,
            or a damaged cache.
    """
    cache = _cache(config)
    tokenizer = _tokenizer(config, cache)
    vocabulary = vocabulary_of(tokenizer)
    folders = _folders(config, cache, vocabulary)
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    _look_up(config.sources[name] for name in missing)
    for name in missing:
        _build(name, config, tokenizer, folders[name], progress)
    found = {name: _load(name, folder, config, tokenizer.eos_token_id) for name, folder in folders.items()}
    _check_held_out(config, found)
    content = [vocabulary, *((name, one.fingerprint, config.weights[name]) for name, one in found.items())]
    return Corpus(tokenizer, found, config.weights, hash_json(content))


def cached(config: DataConfig) -> bool:
    """Whether all tokens of `config` are in the cache."""
    cache = _cache(config)
    if config.tokenizer is None and not (cache / "tokenizers" / _tokenizer_key(config)).is_dir():
        return False
    return all(
        folder.is_dir() for folder in _folders(config, cache, vocabulary_of(_tokenizer(config, cache))).values()
    )


def tokenizer_texts(config: DataConfig) -> Iterator[str]:
    """The training documents that a tokenizer is trained on: of each source the first, as many bytes as its share."""
    for name, source in config.sources.items():
        left = TOKENIZER_TRAINING_BYTES * config.weights[name]
        for text in documents(source):
            content = text.encode()
            if part_of(content, config.held_out) == TRAIN:
                yield text
                left -= len(content)
                if left <= 0:
                    break


def _cache(config: DataConfig) -> Path:
    return Path(config.cache_dir or os.path.join(constants.HF_HOME, "slop_hf")).expanduser().absolute()


def _folders(config: DataConfig, cache: Path, vocabulary: str) -> dict[str, Path]:
    """Where the tokens of each source are, or will be."""
    keys = {name: hash_json(_made_from(one, config.held_out, vocabulary)) for name, one in config.sources.items()}
    return {name: cache / "sources" / key for name, key in keys.items()}


def _look_up(sources: Iterable[Source]) -> None:
    """Refuse a source that is not there before any other is read for hours."""
    for source in sources:
        DocumentStream(source)


def _tokenizer(config: DataConfig, cache: Path) -> PreTrainedTokenizerFast:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    folder = cache / "tokenizers" / _tokenizer_key(config)
    if not folder.is_dir():
        _look_up(config.sources.values())
        with _alone(folder):
            if not folder.is_dir():
                trained = train_tokenizer(tokenizer_texts(config), config.vocab_size, config.tokenizer_kind)
                with write_directory(folder) as aside:
                    trained.save_pretrained(aside)
    try:
        return load_tokenizer(folder)
    except DataError as caught:
        raise _damaged(folder, caught) from caught


def _build(name: str, config: DataConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, progress: bool) -> None:
    source = config.sources[name]
    made_from = _made_from(source, config.held_out, vocabulary_of(tokenizer))
    with _alone(folder):
        if folder.is_dir():
            return
        aside = folder.with_name(f".{folder.name}.building")
        aside.mkdir(exist_ok=True)
        writers = tokenize(
            source,
            tokenizer,
            aside,
            config.held_out,
            config.tokenizer or f"{config.tokenizer_kind} of {config.vocab_size}",
            title=f"tokenizing {name}",
            progress=progress,
        )
        record = _Record(
            documents=sum(writer.documents for writer in writers.values()),
            tokens={part: writer.tokens for part, writer in writers.items()},
            fingerprint=hash_json([writer.digest for writer in writers.values()]),
            made_from=made_from,
        )
        write_text(aside / "source.json", to_json(record))
        aside.rename(folder)


def _alone(folder: Path) -> FileLock:
    """Lets one process at a time make a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _load(name: str, folder: Path, config: DataConfig, eos: int) -> SourceTokens:
    try:
        record = parse(_Record, read_yaml(folder / "source.json"), where="source.json", error=DataError)
    except ValueError as caught:
        raise _damaged(folder, caught) from caught
    kept_apart = eos if config.document_mask else None
    train, held_out = (PackedDataset(folder / f"{part}.ds", config.block_size, kept_apart) for part in PARTS)
    if not len(train):
        raise _too_little(name, TRAIN, record, config)
    if not len(held_out) and config.held_out > 0 and len(config.sources) == 1:
        raise _too_little(name, HELD_OUT, record, config)
    return SourceTokens(train, held_out, record.documents, record.fingerprint)


def _check_held_out(config: DataConfig, found: Mapping[str, SourceTokens]) -> None:
    """Say which sources of a mixture are too small to be evaluated on."""
    if config.held_out and len(found) > 1 and (missing := [name for name, one in found.items() if not one.held_out]):
        logger.warning(
            f"no block of {config.block_size} tokens is held out of {', '.join(missing)}: there is no held-out loss "
            f"of these; use more of their documents, or another share held_out (now {config.held_out:g})"
        )


def _too_little(name: str, part: str, record: _Record, config: DataConfig) -> DataError:
    return DataError(
        f"the {part} part of {name} has {record.tokens.get(part)} tokens, less than a block of {config.block_size}, "
        f"out of {record.documents} documents: use a larger corpus, another share held_out "
        f"(now {config.held_out:g}{'' if part == TRAIN else '; 0 holds out none'}) or a smaller block_size"
    )


def _damaged(folder: Path, caught: Exception) -> DataError:
    return DataError(f"the cache is damaged ({caught}): delete the folder {folder}, and it will be made anew")


def _made_from(source: Source, held_out: float, vocabulary: str) -> dict[str, Any]:
    """All that the tokens of a source depend on."""
    return {"vocabulary": vocabulary, "held_out": held_out, **_texts_of(source)}


def _texts_of(source: Source) -> dict[str, Any]:
    described = {**to_plain(source), "source": list(source.places)}
    del described["weight"]
    files = [_stamps(place) for place in source.places]
    return {
        "format_version": FORMAT,
        "python": platform.python_version() if STDLIB in source.places else None,
        **described,
        "files": files,
    }


def _tokenizer_key(config: DataConfig) -> str:
    texts = [(config.weights[name], _texts_of(source)) for name, source in config.sources.items()]
    return hash_json([texts, config.held_out, config.vocab_size, config.tokenizer_kind, TOKENIZER_TRAINING_BYTES])


def _stamps(place: str) -> list[tuple[str, int, int]] | None:
    """(name, size, modification time in ns) of the files of a local place, which tell whether one changed."""
    files = local_files(place)
    if files is None:
        return None
    stats = ((name, path.stat()) for name, path in files.items())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
