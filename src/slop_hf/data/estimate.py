"""Estimated tokens, disk space and time of a mixture, from a sample of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from .config import DataConfig, Source
from .formats import is_wrapped
from .packing import choose_token_dtype
from .sources import count_local_bytes, list_local_files, read_documents
from .tokenizer import load_tokenizer, train_tokenizer
from .tokenizing import make_plain_backend

SAMPLE_BYTES = 4 * 2**20
#: Size up to which the smallest file is read to find the bytes of text per byte of the files.
SMALLEST_BYTES = 64 * 2**20
SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class SourceEstimate:
    """The estimated size of a source.

    The size of the whole is known from the sizes of its files, or from `max_documents`; without either, as for a whole
    dataset on the Hub, the last five fields are None.

    Args:
        name: name of the source.
        places: places of the source.
        weight: share of the tokens.
        bytes_per_token: bytes of text per token; the end of a document counts as a token.
        text_bytes, documents, tokens, disk_bytes: size of the whole source.
        seconds: time to read and tokenize it at the speed of the sample.
    """

    name: str
    places: tuple[str, ...]
    weight: float
    bytes_per_token: float
    text_bytes: int | None = None
    documents: int | None = None
    tokens: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class DataEstimate:
    """The estimated size of a mixture.

    Args:
        sources: sources in the order of the configuration.
        tokenizer: description of the tokenizer that counted the tokens.
        training_tokens: tokens for training by source.
    """

    sources: tuple[SourceEstimate, ...]
    tokenizer: str
    training_tokens: dict[str, int | None]


class _Sample(NamedTuple):
    texts: list[str]
    documents: float  # the last one counts by the share of it that was read
    nbytes: int
    seconds: float
    is_whole: bool


def estimate(config: DataConfig, sample_bytes: int = SAMPLE_BYTES) -> DataEstimate:
    """Estimate the size of each source of a mixture by tokenizing its first documents; no tokens are written.

    Args:
        config: data configuration.
        sample_bytes: largest amount of text to read per source.

    Raises:
        DataError: for a source that cannot be read, or texts that no tokenizer can be trained on.

    >>> estimate(DataConfig(max_documents=3, vocab_size=300)).sources[0].documents
    3
    """
    samples = {name: _read_sample(source, sample_bytes, config.cache_dir) for name, source in config.sources.items()}
    tokenizer, description = _get_tokenizer(config, samples)
    sources = tuple(
        _estimate_source(name, source, config.weights[name], samples[name], tokenizer)
        for name, source in config.sources.items()
    )
    training_tokens = {
        source.name: None if source.tokens is None else round(source.tokens * (1 - config.held_out))
        for source in sources
    }
    return DataEstimate(sources, description, training_tokens)


def find_first_repeat(tokens: Mapping[str, int | None], weights: Mapping[str, float]) -> tuple[int, str] | None:
    """Return how many tokens a mixture has before one of its sources repeats, and the name of that source.

    It is the least of tokens / weight. Sources of unknown size are left out; None if there is no other.

    >>> find_first_repeat({"web": 9_000, "books": 500, "code": None}, {"web": 0.8, "books": 0.1, "code": 0.1})
    (5000, 'books')
    """
    reach = [(round(count / weights[name]), name) for name, count in tokens.items() if count is not None]
    return min(reach, default=None)


def shorten(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the beginning of a text.

    >>> shorten("to be or not to be", 8)
    'to be or …'
    """
    return text if len(text) <= limit else f"{text[:limit].rstrip()} …"


def _read_sample(source: Source, limit: int, cache_dir: str | None) -> _Sample:
    texts: list[str] = []
    nbytes, documents, start = 0, 0.0, None
    for text in read_documents(source, cache_dir=cache_dir):
        start = start or perf_counter()  # after the first document: opening the source is a one-off cost
        content = text.encode()
        part = content[: limit - nbytes]
        texts.append(part.decode(errors="ignore"))
        nbytes += len(part)
        documents += len(part) / len(content)
        if nbytes >= limit:
            break
    return _Sample(texts, documents, nbytes, perf_counter() - (start or 0.0), nbytes < limit)


def _get_tokenizer(config: DataConfig, samples: Mapping[str, _Sample]) -> tuple[PreTrainedTokenizerFast, str]:
    """Return the configured tokenizer, or one trained on as much of each sample as its weight says."""
    reason = ""
    if config.tokenizer is not None:
        try:
            return load_tokenizer(config.tokenizer), config.tokenizer
        except DataError:
            reason = f", as {config.tokenizer} cannot be loaded"
    largest = max(sample.nbytes for sample in samples.values())

    def read_texts() -> Iterator[str]:
        for name, sample in samples.items():
            bytes_left = largest * config.weights[name]
            for text in sample.texts:
                yield text
                bytes_left -= len(text.encode())
                if bytes_left <= 0:
                    break

    trained = train_tokenizer(read_texts(), config.vocab_size, config.tokenizer_kind)
    return trained, f"a {config.tokenizer_kind} of {len(trained):,} tokens trained on the sample{reason}"


def _estimate_source(
    name: str, source: Source, weight: float, sample: _Sample, tokenizer: PreTrainedTokenizerFast
) -> SourceEstimate:
    start = perf_counter()
    encodings = make_plain_backend(tokenizer).encode_batch_fast(sample.texts, add_special_tokens=False)
    # Reading and tokenizing run in parallel.
    seconds_per_byte = max(perf_counter() - start, sample.seconds) / sample.nbytes
    tokens_per_byte = sum(len(encoding.ids) + 1 for encoding in encodings) / sample.nbytes
    nbytes = _count_text_bytes(source, sample)
    if nbytes is None:
        return SourceEstimate(name, source.places, weight, 1 / tokens_per_byte)
    tokens = round(nbytes * tokens_per_byte)
    return SourceEstimate(
        name,
        source.places,
        weight,
        1 / tokens_per_byte,
        text_bytes=nbytes,
        documents=round(nbytes / sample.nbytes * sample.documents),
        tokens=tokens,
        disk_bytes=tokens * choose_token_dtype(len(tokenizer)).itemsize,
        seconds=nbytes * seconds_per_byte,
    )


def _count_text_bytes(source: Source, sample: _Sample) -> int | None:
    if sample.is_whole:
        return sample.nbytes
    bounds = []
    if (file_bytes := count_local_bytes(source)) is not None:
        bounds.append(file_bytes * _measure_text_share(source))
    if source.max_documents is not None:
        bounds.append(source.max_documents * sample.nbytes / sample.documents)
    return round(min(bounds)) if bounds else None


def _measure_text_share(source: Source) -> float:
    """Return the bytes of text per byte of the smallest file: below 1 for JSON, above it for compressed files.

    It is 1 for plain text, and if the smallest file is too large to read.
    """
    paths = [path for place in source.places for path in (list_local_files(place) or {}).values()]
    wrapped = [path for path in paths if source.format in ("jsonl", "parquet") or is_wrapped(path.name)]
    sizes = {path: size for path in wrapped if (size := path.stat().st_size)}
    smallest = min(sizes, key=sizes.__getitem__, default=None)
    if smallest is None or sizes[smallest] > SMALLEST_BYTES:
        return 1.0
    only = Source(str(smallest), text_column=source.text_column, format=source.format)
    return sum(len(text.encode()) for text in read_documents(only)) / sizes[smallest]
