"""`prepare_data`: from a `DataConfig` to blocks of tokens, through a cache.

Every source is tokenized once, whatever its weight:

    tokenizers/KEY/                    a trained tokenizer, as transformers saves it
    sources/KEY/train.ds, held_out.ds  tokens (see packing.py), each with .index and .metadata
    sources/KEY/source.json            counts, fingerprint, and everything that the tokens depend on
    sources/.KEY.parts/3-of-8/         tokens of a part of the files, until all parts are merged (see parts.py)
    downloads/                         files at URLs, until their source is tokenized

A folder is complete or absent; a later call resumes from `.KEY.building`. A key covers everything that the content
depends on. The block size is not part of it: blocks are cut when they are read.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import DataError
from ..io.files import write_directory
from ..io.numbers import require_whole_number
from ..io.record import Record
from ..io.serialization import Json, hash_json, to_plain
from .config import STDLIB, DataConfig, DataPart, Source, find_cache
from .locking import lock_cache
from .packing import MixedBlocks, PackedDataset, TokenWriter
from .parts import TokenizingJob, merge_parts, tokenize_part
from .sources import (
    DocumentStream,
    check_parts,
    discard_downloads,
    list_local_files,
    list_place_names,
    read_documents,
)
from .tokenizer import load_tokenizer, train_tokenizer
from .tokenizing import HELD_OUT_SPLIT, SPLITS, TRAIN_SPLIT, choose_split, hash_vocabulary

logger = logging.get_logger(__name__)

FORMAT_VERSION = 2  # of the cache: count up when the same configuration gives other tokens or files

# The merges of a small vocabulary have settled long before; training keeps the distinct words in memory.
TOKENIZER_TRAINING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SourceTokens:
    """A tokenized source; no document is in both parts."""

    train: PackedDataset
    held_out: PackedDataset
    documents: int  # in both parts together
    fingerprint: str  # hash of all tokens, the same for the same content wherever it was prepared


@dataclass(frozen=True)
class Corpus:
    """Tokenized training data.

    Args:
        tokenizer: tokenizer of the tokens.
        sources: tokens by source.
        weights: share of each source in the training tokens; the shares add up to 1.
        fingerprint: hash of the tokenizer, all tokens and the weights.
        vocabulary: hash of the tokenizer, as from `hash_vocabulary`.
    """

    tokenizer: PreTrainedTokenizerFast
    sources: Mapping[str, SourceTokens]
    weights: Mapping[str, float]
    fingerprint: str
    vocabulary: str

    @cached_property
    def train(self) -> MixedBlocks:
        """The training blocks, which a trainer draws by the weights."""
        parts = {name: source.train for name, source in self.sources.items()}
        return MixedBlocks(parts, self.weights, self.fingerprint)

    @property
    def held_out(self) -> dict[str, PackedDataset]:
        """The blocks to evaluate on, by source; sources without a held-out block are left out."""
        return {name: source.held_out for name, source in self.sources.items() if len(source.held_out)}

    @property
    def documents(self) -> int:
        """The number of documents of all sources."""
        return sum(source.documents for source in self.sources.values())


@dataclass(frozen=True)
class _SourceRecord(Record, error=DataError):
    """The content of source.json."""

    documents: int
    tokens: dict[str, int]  # by split
    fingerprint: str
    made_from: dict[str, Json]


@dataclass(frozen=True)
class _CachedSource:
    """A source, and its folder in the cache, complete or absent."""

    name: str
    source: Source
    made_from: dict[str, Json]  # everything that its tokens depend on
    folder: Path  # its name is the hash of made_from

    @property
    def parts(self) -> Path:
        """The folder of its parts, until they are merged."""
        return self.folder.with_name(f".{self.folder.name}.parts")


def prepare_data(config: DataConfig, *, progress: bool = True, workers: int = 1) -> Corpus:
    """Return the data that `config` describes, tokenized on the first call and from the cache after that.

    The tokenizer is trained on training documents alone: the first 64 MiB, shared by the weights of the sources.
    Changed local files make a new cache. A changed dataset on the Hub does not: delete the cache to read it again.

    After an interruption, the next call resumes. Concurrent processes wait for the first one.

    Args:
        config: data configuration.
        progress: whether to show progress bars.
        workers: number of processes that read, tokenize and write. Their files are those of one process.

    Raises:
        DataError: for a source or tokenizer that cannot be read, training documents that fill no block, a damaged
            cache, or several workers for a source that cannot be read in parts.
    """
    require_whole_number(workers, "workers", error=DataError)
    texts = _describe_sources(config)
    tokenizer = _prepare_tokenizer(config, texts)
    vocabulary = hash_vocabulary(tokenizer)
    sources = _find_sources(config, texts, vocabulary)
    for source in _list_missing(sources, config, in_parts=workers > 1):
        _tokenize(source, _make_job(source, config, tokenizer), progress, workers)
    tokens = {source.name: _load_tokens(source, config, tokenizer.eos_token_id) for source in sources}
    _warn_of_missing_held_out(config, tokens)
    content = [vocabulary, *((name, source.fingerprint, config.weights[name]) for name, source in tokens.items())]
    return Corpus(tokenizer, tokens, config.weights, hash_json(content), vocabulary)


def prepare_part(
    config: DataConfig, part: DataPart, *, progress: bool = True, workers: int = 1
) -> dict[str, list[DataPart]]:
    """Tokenize one part of each source that is not in the cache; the call that finds all parts there merges them.

    Several machines can fill one cache, each with a part of its own. The files are those of one process. After an
    interruption, the next call resumes.

    Args:
        config: data configuration, the same on all machines, with a `cache_dir` and files that they share.
        part: part for this machine.
        progress: whether to show progress bars.
        workers: number of processes on this machine.

    Returns:
        The parts that are still missing, by source; empty if the cache is complete.

    Raises:
        DataError: as for `prepare_data`, and for a source that cannot be read in parts.
    """
    require_whole_number(workers, "workers", error=DataError)
    texts = _describe_sources(config)
    tokenizer = _prepare_tokenizer(config, texts)
    sources = _find_sources(config, texts, hash_vocabulary(tokenizer))
    missing: dict[str, list[DataPart]] = {}
    for source in _list_missing(sources, config, in_parts=True):
        job = _make_job(source, config, tokenizer)
        with lock_cache(source.parts / f".{part}.lock"):
            tokenize_part(job, source.parts / str(part), part, workers, _make_title(source, progress))
        parts = [DataPart(number, part.count) for number in range(1, part.count + 1)]
        with _lock(source.folder):
            absent = [other for other in parts if not (source.parts / str(other)).is_dir()]
            if source.folder.is_dir():
                continue
            if absent:
                missing[source.name] = absent
            else:
                building = _make_building(source)
                _finish(source, building, merge_parts(job, [source.parts / str(other) for other in parts], building))
        if not absent:
            discard_downloads(source.source, config.cache_dir)
    return missing


def is_cached(config: DataConfig) -> bool:
    """Whether all tokens of `config` are in the cache."""
    texts = _describe_sources(config)
    if config.tokenizer is None and not _find_tokenizer(config, texts).is_dir():
        return False
    vocabulary = hash_vocabulary(_prepare_tokenizer(config, texts))
    return all(source.folder.is_dir() for source in _find_sources(config, texts, vocabulary))


def read_tokenizer_texts(config: DataConfig) -> Iterator[str]:
    """Yield the training documents for a tokenizer: the first ones of each source, as many bytes as its share."""
    for name, source in config.sources.items():
        bytes_left = TOKENIZER_TRAINING_BYTES * config.weights[name]
        for text in read_documents(source, cache_dir=config.cache_dir):
            content = text.encode()
            if choose_split(content, config.held_out) == TRAIN_SPLIT:
                yield text
                bytes_left -= len(content)
                if bytes_left <= 0:
                    break


def _prepare_tokenizer(config: DataConfig, texts: Mapping[str, dict[str, Json]]) -> PreTrainedTokenizerFast:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    folder = _find_tokenizer(config, texts)
    if not folder.is_dir():
        for source in config.sources.values():
            DocumentStream(source, cache_dir=config.cache_dir)
        with _lock(folder):
            if not folder.is_dir():
                trained = train_tokenizer(read_tokenizer_texts(config), config.vocab_size, config.tokenizer_kind)
                with write_directory(folder) as temporary:
                    trained.save_pretrained(temporary)
    try:
        return load_tokenizer(folder)
    except DataError as caught:
        raise _explain_damage(folder, caught) from caught


def _list_missing(sources: Sequence[_CachedSource], config: DataConfig, *, in_parts: bool) -> list[_CachedSource]:
    """Return the sources outside the cache; a wrong one is refused before another is read for hours."""
    missing = [source for source in sources if not source.folder.is_dir()]
    for source in missing:
        DocumentStream(source.source, cache_dir=config.cache_dir)
        if in_parts:
            check_parts(source.source)
    return missing


def _make_job(source: _CachedSource, config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> TokenizingJob:
    name = config.tokenizer or f"{config.tokenizer_kind} of {config.vocab_size}"
    return TokenizingJob(source.source, tokenizer, config.held_out, name, config.cache_dir)


def _make_title(source: _CachedSource, progress: bool) -> str | None:
    return f"tokenizing {source.name}" if progress else None


def _make_building(source: _CachedSource) -> Path:
    """Create the folder that becomes the source's in the cache when it is complete."""
    building = source.folder.with_name(f".{source.folder.name}.building")
    building.mkdir(exist_ok=True)
    return building


def _tokenize(source: _CachedSource, job: TokenizingJob, progress: bool, workers: int) -> None:
    with _lock(source.folder):
        if source.folder.is_dir():
            return
        building, title = _make_building(source), _make_title(source, progress)
        if workers == 1:
            writers = job.run(building, title=title)
        else:
            part = DataPart(1, 1)
            tokenize_part(job, source.parts / str(part), part, workers, title)
            writers = merge_parts(job, [source.parts / str(part)], building)
        _finish(source, building, writers)
    discard_downloads(source.source, job.cache_dir)


def _finish(source: _CachedSource, building: Path, writers: Mapping[str, TokenWriter]) -> None:
    """Write the record of a source's tokens, and make their folder a part of the cache."""
    record = _SourceRecord(
        documents=sum(writer.documents for writer in writers.values()),
        tokens={split: writer.tokens for split, writer in writers.items()},
        fingerprint=hash_json([writer.digest for writer in writers.values()]),
        made_from={**source.made_from, "source": list_place_names(source.source)},
    )
    record.to_json(building / "source.json")
    building.rename(source.folder)
    shutil.rmtree(source.parts, ignore_errors=True)


def _lock(folder: Path) -> AbstractContextManager[None]:
    """Let one process at a time make a folder."""
    return lock_cache(folder.with_name(f".{folder.name}.lock"))


def _load_tokens(source: _CachedSource, config: DataConfig, eos: int) -> SourceTokens:
    try:
        record = _SourceRecord.from_json(source.folder / "source.json")
    except ValueError as caught:
        raise _explain_damage(source.folder, caught) from caught
    masked_eos = eos if config.document_mask else None
    train, held_out = (PackedDataset(source.folder / f"{split}.ds", config.block_size, masked_eos) for split in SPLITS)
    if not len(train):
        raise _explain_missing_block(source.name, TRAIN_SPLIT, record, config)
    if not len(held_out) and config.held_out > 0 and len(config.sources) == 1:
        raise _explain_missing_block(source.name, HELD_OUT_SPLIT, record, config)
    return SourceTokens(train, held_out, record.documents, record.fingerprint)


def _warn_of_missing_held_out(config: DataConfig, tokens: Mapping[str, SourceTokens]) -> None:
    missing = [name for name, source in tokens.items() if not len(source.held_out)]
    if config.held_out and len(tokens) > 1 and missing:
        logger.warning(
            f"no held-out loss for {', '.join(missing)}: the held-out documents have less than a block of "
            f"{config.block_size} tokens; use more documents, or a larger share held_out (now {config.held_out:g})"
        )


def _explain_missing_block(name: str, split: str, record: _SourceRecord, config: DataConfig) -> DataError:
    return DataError(
        f"the {split} part of {name} has {record.tokens.get(split)} tokens, less than a block of {config.block_size}, "
        f"from {record.documents} documents: use a larger corpus, another share held_out "
        f"(now {config.held_out:g}{'' if split == TRAIN_SPLIT else '; 0 holds out none'}) or a smaller block_size"
    )


def _explain_damage(folder: Path, caught: Exception) -> DataError:
    return DataError(f"the cache is damaged ({caught}): delete the folder {folder}; it will be made again")


def _find_tokenizer(config: DataConfig, texts: Mapping[str, dict[str, Json]]) -> Path:
    """Return the folder of the tokenizer trained on the sources."""
    weighted = [(config.weights[name], described) for name, described in texts.items()]
    content = [weighted, config.held_out, config.vocab_size, config.tokenizer_kind, TOKENIZER_TRAINING_BYTES]
    return find_cache(config.cache_dir) / "tokenizers" / hash_json(content)


def _find_sources(config: DataConfig, texts: Mapping[str, dict[str, Json]], vocabulary: str) -> list[_CachedSource]:
    folder = find_cache(config.cache_dir) / "sources"
    made_from = {name: {"vocabulary": vocabulary, "held_out": config.held_out, **texts[name]} for name in texts}
    return [
        _CachedSource(name, config.sources[name], made, folder / hash_json(made)) for name, made in made_from.items()
    ]


def _describe_sources(config: DataConfig) -> dict[str, dict[str, Json]]:
    """Return everything that the texts of each source depend on; files by name, size and modification time in ns."""
    descriptions = {}
    for name, source in config.sources.items():
        fields = {**to_plain(source), "source": list(source.places)}
        del fields["weight"]
        descriptions[name] = {
            "format_version": FORMAT_VERSION,
            "python": platform.python_version() if STDLIB in source.places else None,
            **fields,
            "files": [_list_stamps(place) for place in source.places],
        }
    return descriptions


def _list_stamps(place: str) -> list[tuple[str, int, int]] | None:
    files = list_local_files(place)
    if files is None:
        return None
    return [(name, (stat := path.stat()).st_size, stat.st_mtime_ns) for name, path in files.items()]
