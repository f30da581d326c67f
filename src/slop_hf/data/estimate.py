"""`estimate`: what tokenizing a mixture would take and give, from a sample of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from .config import DataConfig, Source
from .formats import is_wrapped
from .packing import token_dtype
from .sources import documents, local_bytes, local_files
from .tokenizer import load_tokenizer, train_tokenizer
from .tokenizing import plain_backend

SAMPLE_BYTES = 4 * 2**20
#: How many bytes a file has besides its texts, the smallest one tells if it is not above the limit.
SMALLEST_BYTES = 64 * 2**20
SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class SourceEstimate:
    """What is known of a source from its first documents.

    Args:
        name: of the source.
        places: where it is.
        weight: its share of the tokens; those of a mixture add up to 1.
        sample_documents, sample_bytes: how much was read.
        bytes_per_token: bytes of text, with the document's end as a token.
        sample: the first document, shortened.
        text_bytes, documents, tokens, disk_bytes, seconds: of the whole source, estimated from the sample and the
            sizes of its files, or `max_documents`; None where neither is known, as for a whole dataset on the Hub.
            `seconds` is the time to read and tokenize at the speed of the sample.
    """

    name: str
    places: tuple[str, ...]
    weight: float
    sample_documents: int
    sample_bytes: int
    bytes_per_token: float
    sample: str
    text_bytes: int | None
    documents: int | None
    tokens: int | None
    disk_bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class DataEstimate:
    """What is known of a mixture before it is tokenized.

    Args:
        sources: in the order of the configuration.
        tokenizer: in words, which one counted the tokens.
        token_bytes: that a token takes on the disk.
        held_out: the share of the documents kept for evaluation.
    """

    sources: tuple[SourceEstimate, ...]
    tokenizer: str
    token_bytes: int
    held_out: float

    @property
    def training_tokens(self) -> dict[str, int | None]:
        """Estimated tokens of each source for training."""
        return {one.name: one.tokens and round(one.tokens * (1 - self.held_out)) for one in self.sources}

    @property
    def before_repeat(self) -> tuple[int, str] | None:
        """The tokens a training can draw until a source repeats, and which; see `tokens_before_repeat`."""
        return tokens_before_repeat(self.training_tokens, {one.name: one.weight for one in self.sources})


def tokens_before_repeat(tokens: Mapping[str, int | None], weights: Mapping[str, float]) -> tuple[int, str] | None:
    """How many tokens a mixture can give before one of its sources has none left, and the name of that source.

    It is the least of tokens / weight. Sources of unknown size are left out; None if there is no other.

    >>> tokens_before_repeat({"web": 9_000, "books": 500, "code": None}, {"web": 0.8, "books": 0.1, "code": 0.1})
    (5000, 'books')
    """
    reach = [(round(count / weights[name]), name) for name, count in tokens.items() if count is not None]
    return min(reach, default=None)


def estimate(config: DataConfig, sample_bytes: int = SAMPLE_BYTES) -> DataEstimate:
    """Read the beginning of each source, tokenize it, and tell what the whole would take.

    Nothing is written. The first documents stand for all: sources whose beginning is not like the rest are misjudged.

    Args:
        config: the data.
        sample_bytes: of text to read of each source, at most.

    Raises:
        DataError: for a source that cannot be read, or texts that no tokenizer can be trained on.

    >>> found = estimate(DataConfig(max_documents=3, vocab_size=300))
    >>> found.sources[0].documents, found.token_bytes
    (3, 2)
    """
    samples = {name: _sample(source, sample_bytes) for name, source in config.sources.items()}
    tokenizer, described = _tokenizer(config, samples)
    token_bytes = token_dtype(len(tokenizer)).itemsize
    sources = tuple(
        _estimate(name, source, config.weights[name], samples[name], tokenizer, token_bytes)
        for name, source in config.sources.items()
    )
    return DataEstimate(sources, described, token_bytes, config.held_out)


class _Sample(NamedTuple):
    texts: list[str]
    documents: float  # the last one by the share of it that was read
    nbytes: int
    seconds: float
    whole: bool  # there is no more


def _sample(source: Source, limit: int) -> _Sample:
    texts: list[str] = []
    nbytes, read, began, whole = 0, 0.0, 0.0, True
    for text in documents(source):
        began = began or perf_counter()  # behind the first, for to open a source takes time but once
        content = text.encode()
        part = content[: limit - nbytes]
        texts.append(part.decode(errors="ignore"))
        nbytes += len(part)
        read += len(part) / len(content)
        if nbytes >= limit:
            whole = False
            break
    return _Sample(texts, read, nbytes, perf_counter() - began, whole)


def _tokenizer(config: DataConfig, samples: Mapping[str, _Sample]) -> tuple[PreTrainedTokenizerFast, str]:
    """The one that the data asks for, or one trained on as much of each sample as its weight says."""
    reason = ""
    if config.tokenizer is not None:
        try:
            return load_tokenizer(config.tokenizer), config.tokenizer
        except DataError:
            reason = f", as {config.tokenizer} cannot be loaded"
    most = max(sample.nbytes for sample in samples.values())
    texts = (text for name, one in samples.items() for text in _beginning(one.texts, most * config.weights[name]))
    trained = train_tokenizer(texts, config.vocab_size, config.tokenizer_kind)
    return trained, f"a {config.tokenizer_kind} of {len(trained):,} tokens trained on the sample{reason}"


def _beginning(texts: list[str], limit: float) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def _estimate(
    name: str,
    source: Source,
    weight: float,
    sample: _Sample,
    tokenizer: PreTrainedTokenizerFast,
    token_bytes: int,
) -> SourceEstimate:
    began = perf_counter()
    encodings = plain_backend(tokenizer).encode_batch_fast(sample.texts, add_special_tokens=False)
    # Reading and tokenizing go on side by side.
    seconds_per_byte = max(perf_counter() - began, sample.seconds) / sample.nbytes
    tokens_per_byte = sum(len(one.ids) + 1 for one in encodings) / sample.nbytes
    nbytes = _text_bytes(source, sample)
    tokens = None if nbytes is None else round(nbytes * tokens_per_byte)
    return SourceEstimate(
        name=name,
        places=source.places,
        weight=weight,
        sample_documents=len(sample.texts),
        sample_bytes=sample.nbytes,
        bytes_per_token=1 / tokens_per_byte,
        sample=shortened(sample.texts[0]),
        text_bytes=nbytes,
        documents=None if nbytes is None else round(nbytes / sample.nbytes * sample.documents),
        tokens=tokens,
        disk_bytes=None if tokens is None else tokens * token_bytes,
        seconds=None if nbytes is None else nbytes * seconds_per_byte,
    )


def _text_bytes(source: Source, sample: _Sample) -> int | None:
    """Bytes of text in a source, as far as its files' sizes or `max_documents` tell."""
    if sample.whole:
        return sample.nbytes
    known = []
    files = local_bytes(source)
    if files is not None:
        known.append(files * _text_share(source))
    if source.max_documents is not None:
        known.append(source.max_documents * sample.nbytes / sample.documents)
    return round(min(known)) if known else None


def _text_share(source: Source) -> float:
    """Bytes of text in a byte of the files: 1 for plain text, less for JSON, more for what is compressed.

    The smallest file tells; where it is large, 1 has to do.
    """
    paths = [path for place in source.places for path in (local_files(place) or {}).values()]
    wrapped = [path for path in paths if source.format in ("jsonl", "parquet") or is_wrapped(path.name)]
    sizes = {path: size for path in wrapped if (size := path.stat().st_size)}
    smallest = min(sizes, key=sizes.__getitem__, default=None)
    if smallest is None or sizes[smallest] > SMALLEST_BYTES:
        return 1.0
    one = Source(str(smallest), text_column=source.text_column, format=source.format)
    return sum(len(text.encode()) for text in documents(one)) / sizes[smallest]


def shortened(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """The beginning of a text.

    >>> shortened("to be or not to be", 8)
    'to be or …'
    """
    return text if len(text) <= limit else f"{text[:limit].rstrip()} …"
