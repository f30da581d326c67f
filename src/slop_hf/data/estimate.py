"""Estimated tokens, disk space and time of a mixture, from a sample of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

#: Size up to which the smallest file is read to find the bytes of text per byte of the files.
SMALLEST_BYTES = 64 * 2**20


class SourceEstimate(NamedTuple):
    """The estimated size of a source, from the sizes of its files or from `max_documents`.

    Without either, as for a whole dataset on the Hub, all but `bytes_per_token` are None.

    Args:
        tokens: number of tokens; the end of a document counts as one.
        documents: number of documents.
        disk_bytes: size of the tokens in the cache.
        seconds: time to read and tokenize it at the speed of the sample.
        bytes_per_token: bytes of text per token.
    """

    tokens: int | None
    documents: int | None
    disk_bytes: int | None
    seconds: float | None
    bytes_per_token: float


class DataEstimate(NamedTuple):
    """The estimated size of a mixture.

    Args:
        sources: estimate of each source.
        training_tokens: tokens for training by source.
        tokenizer: description of the tokenizer that counted the tokens.
    """

    sources: dict[str, SourceEstimate]
    training_tokens: dict[str, int | None]
    tokenizer: str


class _Sample(NamedTuple):
    texts: list[str]
    documents: float  # the last one counts by the share read of it
    nbytes: int
    seconds: float
    is_whole: bool


def estimate(config: DataConfig, sample_bytes: int = 4 * 2**20) -> DataEstimate:
    """Estimate the size of each source of a mixture by tokenizing its first documents; no tokens are written.

    Args:
        config: data configuration.
        sample_bytes: largest amount of text to read per source.

    Raises:
        DataError: for a source that cannot be read, or texts that no tokenizer can be trained on.

    >>> estimate(DataConfig(max_documents=3, vocab_size=300)).sources["corpus"].documents
    3
    """
    samples = {name: _read_sample(source, sample_bytes, config.cache_dir) for name, source in config.sources.items()}
    tokenizer, description = _get_tokenizer(config, samples)
    sources = {name: _estimate_source(source, samples[name], tokenizer) for name, source in config.sources.items()}
    training_tokens = {
        name: None if source.tokens is None else round(source.tokens * (1 - config.held_out))
        for name, source in sources.items()
    }
    return DataEstimate(sources, training_tokens, description)


def find_first_repeat(tokens: Mapping[str, int | None], weights: Mapping[str, float]) -> tuple[int, str] | None:
    """Return how many tokens a mixture has before one of its sources repeats, and the name of that source.

    It is the least of tokens / weight. Sources of unknown size are left out; None if there is no other.

    >>> find_first_repeat({"web": 9_000, "books": 500, "code": None}, {"web": 0.8, "books": 0.1, "code": 0.1})
    (5000, 'books')
    """
    reach = [(round(count / weights[name]), name) for name, count in tokens.items() if count is not None]
    return min(reach, default=None)


def shorten(text: str, limit: int = 400) -> str:
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


def _estimate_source(source: Source, sample: _Sample, tokenizer: PreTrainedTokenizerFast) -> SourceEstimate:
    start = perf_counter()
    encodings = make_plain_backend(tokenizer).encode_batch_fast(sample.texts, add_special_tokens=False)
    seconds = max(perf_counter() - start, sample.seconds)  # reading and tokenizing run in parallel
    sample_tokens = sum(len(encoding.ids) + 1 for encoding in encodings)
    bytes_per_token = sample.nbytes / sample_tokens
    scale = _compare_with_sample(source, sample)
    if scale is None:
        return SourceEstimate(None, None, None, None, bytes_per_token)
    tokens = round(scale * sample_tokens)
    disk_bytes = tokens * choose_token_dtype(len(tokenizer)).itemsize
    return SourceEstimate(tokens, round(scale * sample.documents), disk_bytes, scale * seconds, bytes_per_token)


def _compare_with_sample(source: Source, sample: _Sample) -> float | None:
    """Return how many times as large as its sample a source is; None if that is unknown."""
    if sample.is_whole:
        return 1.0
    scales = []
    if (file_bytes := count_local_bytes(source)) is not None:
        scales.append(file_bytes * _measure_text_share(source) / sample.nbytes)
    if source.max_documents is not None:
        scales.append(source.max_documents / sample.documents)
    return min(scales, default=None)


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
