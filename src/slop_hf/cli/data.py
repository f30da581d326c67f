"""`slop data`: the commands inspect, tokenize and train-tokenizer, and their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

import slop_hf

from ..errors import DataError
from ..io.files import check_output, write_directory
from ..io.serialization import Json, parse, read_yaml, set_keys
from ..io.units import NOTHING, format_bytes, format_count, format_duration
from .options import AsJson, read_changes
from .shared import print_json, print_table, redirect_prints
from .wording import Command

if TYPE_CHECKING:
    from ..data import DataConfig
    from ..data.config import DataPart
    from ..data.corpus import SourceTokens

data_app = typer.Typer(
    help="Inspect and tokenize training data, and train tokenizers, before a run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_Config = Annotated[Path, typer.Argument(help="YAML file of a mixture (sources), or of a run (its section data).")]
_Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value: data.block_size=512, or sources.NAME.max_documents=1000"),
]
_QUANTITIES = ("tokens", "documents", "disk_bytes", "seconds")


@data_app.command("inspect", cls=Command)
def inspect_command(
    config: _Config,
    samples: Annotated[int, typer.Option(min=0, help="Number of documents to show per source, shortened.")] = 1,
    change: _Changes = None,
    as_json: AsJson = False,
) -> None:
    """Show what a mixture holds, and how long it lasts. No tokens are written; what is read of URLs is cached.

    Tokens, disk space and time are estimated from the first 4 MiB of each source, and marked ~; if all tokens are in
    the cache, they are exact. The size of a dataset on the Hub is unknown unless `max_documents` is set.

    A mixture lasts until one of its sources has been read to its end: a run with more tokens repeats that source.

    Examples:

    `slop data inspect recipes/data/redpajama.yaml`

    `slop data inspect recipes/grow_tiny.yaml --samples 0`
    """
    data = read_data(config, change)
    summary = _summarise(data)
    texts = _read_samples(data, samples)
    if as_json:
        print_json({**summary, "samples": texts})
        return
    _show_summary(summary, f"{config}")
    console = Console()
    for name, documents in texts.items():
        for number, text in enumerate(documents, start=1):
            console.rule(Text(f"{name}, document {number}"), align="left")
            console.print(Text(text), soft_wrap=True)


@data_app.command("tokenize", cls=Command)
def tokenize_command(
    config: _Config,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a tokenizer; replaces the config's.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that read, tokenize and write side by side: one per core.")
    ] = 1,
    part: Annotated[
        str | None,
        typer.Option(help="K/N: only the Kth of N parts, one per machine. The machine that ends last merges them."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost only; tokenize nothing.")] = False,
    change: _Changes = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize a mixture into the cache, so that runs begin at once.

    The cost is shown first. Each source is tokenized once and cached separately: other weights, block sizes and runs
    use the same tokens. After an interruption, the same command continues. With several workers or parts, the files
    are the same to the byte.

    Runs find the tokens if they have the same sources, tokenizer, `held_out` and `cache_dir`.

    Examples:

    `slop data tokenize recipes/data/local.yaml --set data.cache_dir=tokens --workers 16`

    On the third of eight machines: `slop data tokenize web.yaml --set data.cache_dir=/shared/tokens --part 3/8`
    """
    data = read_data(config, change)
    if tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=tokenizer)
    from ..data.config import DataPart, find_cache
    from ..data.sources import check_parts

    own_part = None if part is None else DataPart.parse(part)
    for source in data.sources.values() if own_part is not None or workers > 1 else ():
        check_parts(source)
    check_output(find_cache(data.cache_dir), "data.cache_dir", DataError, is_directory=True)
    summary = _summarise(data)
    if not as_json:
        _show_summary(summary, f"{config}")
    if dry_run:
        if as_json:
            print_json(summary)
        return
    with redirect_prints(as_json=as_json):
        missing = {} if own_part is None else _tokenize_part(data, own_part, workers)
        corpus = None if missing else slop_hf.prepare_data(data, workers=workers)
    if corpus is None:
        assert own_part is not None
        _show_missing(own_part, missing, as_json=as_json)
        return
    rows: list[dict[str, Json]] = [
        {
            "name": name,
            "weight": corpus.weights[name],
            "training_tokens": source.train.tokens,
            "held_out_tokens": source.held_out.tokens,
            "documents": source.documents,
            "disk_bytes": _count_disk_bytes(source),
            "folder": str(source.train.path.parent),
        }
        for name, source in corpus.sources.items()
    ]
    if as_json:
        print_json({"sources": rows, "vocab_size": len(corpus.tokenizer), "fingerprint": corpus.fingerprint})
        return
    for row in rows:
        print(
            f"{row['name']}: {row['training_tokens']:,} training tokens and {row['held_out_tokens']:,} held out, "
            f"from {row['documents']:,} documents, in {row['folder']}"
        )


def _tokenize_part(data: DataConfig, part: DataPart, workers: int) -> dict[str, list[DataPart]]:
    from ..data.corpus import prepare_part

    return prepare_part(data, part, workers=workers)


def _show_missing(part: DataPart, missing: Mapping[str, list[DataPart]], *, as_json: bool) -> None:
    """Print which parts the other machines have still to tokenize."""
    numbers: dict[str, Json] = {name: [other.number for other in parts] for name, parts in missing.items()}
    if as_json:
        print_json({"part": part.number, "parts": part.count, "missing": numbers})
        return
    for name, parts in missing.items():
        others = ", ".join(str(other.number) for other in parts)
        print(f"{name}: part {part.number} of {part.count} is in the cache; missing: {others}")
    print("the machine that tokenizes the last part merges them; until then, runs do not find the tokens")


@data_app.command("train-tokenizer", cls=Command)
def train_tokenizer_command(
    config: _Config,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, new or empty.")],
    kind: Annotated[
        str | None, typer.Option(help="'bpe' (byte-level), or 'sentencepiece' as in LLaMA. Default: the config's.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary size. Default: the config's.")] = None,
    change: _Changes = None,
    as_json: AsJson = False,
) -> None:
    """Train a tokenizer on a mixture: on 64 MiB of its training documents, shared by the weights of the sources.

    It is saved as transformers saves one, and `AutoTokenizer` loads it. Runs whose `data.tokenizer` is its directory
    share it, whatever their data. 'sentencepiece' needs `pip install "slop-hf[sentencepiece]"` for training only.

    Example: `slop data train-tokenizer recipes/data/local.yaml -o tokenizers/local --vocab-size 8192`
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"--output {output} exists and is not an empty directory: choose another one")
    check_output(output, "--output", DataError, is_directory=True)
    data = read_data(config, change)
    data = dataclasses.replace(
        data,
        tokenizer=None,
        tokenizer_kind=kind or data.tokenizer_kind,  # type: ignore[arg-type]
        vocab_size=data.vocab_size if vocab_size is None else vocab_size,
    )
    from ..data import train_tokenizer  # torch takes seconds
    from ..data.corpus import read_tokenizer_texts

    with redirect_prints(as_json=as_json), write_directory(output) as directory:
        tokenizer = train_tokenizer(read_tokenizer_texts(data), data.vocab_size, data.tokenizer_kind)
        tokenizer.save_pretrained(directory)
    if as_json:
        print_json({"tokenizer": str(output), "kind": data.tokenizer_kind, "vocab_size": len(tokenizer)})
        return
    print(f"{data.tokenizer_kind} tokenizer of {len(tokenizer):,} tokens written to {output}")
    print(f"to use it, set data.tokenizer: {output}")


def read_data(path: Path, changes: list[str] | None) -> DataConfig:
    """Read the data that the file of a mixture or a run describes, with the changes of `--set`.

    Keys of a mixture begin with `sources.`. Keys that begin with `data.` are for the other settings of a run's data;
    they can be set for the file of a mixture, too.

    Raises:
        SlopError: if a key or a value is wrong, with the name of the file and the key.
    """
    content = read_yaml(path, error=DataError)
    if content is None:
        raise DataError(f"{path} is empty: expected the sources of a mixture, or a run with a section data")
    overrides = read_changes(changes)
    from ..data import DataConfig  # with torch, which takes seconds
    from ..data.config import find_places

    if not isinstance(content, dict) or "sources" not in content:
        return slop_hf.RunConfig.from_yaml(path, overrides=overrides).data
    find_places(content, path.parent)
    described: dict[str, Json] = {"mixture": content}
    within = {
        key.removeprefix("data.") if key.startswith("data.") else f"mixture.{key}": value
        for key, value in overrides.items()
    }
    set_keys(described, within, where=str(path), error=DataError)
    find_places(described, path.parent, working_first=True)
    return parse(DataConfig, described, where=str(path), error=DataError)


def _summarise(config: DataConfig) -> dict[str, Json]:
    """Summarise a mixture: exactly if it is in the cache, otherwise estimated from samples.

    Returns:
        `sources`, one row each; `total`, the sums of the known quantities; `complete`, whether all are known;
        `cached`; `tokenizer`, a description; `tokens_before_repeat`, and `scarcest`, the source that repeats first.
    """
    from ..data.corpus import is_cached
    from ..data.estimate import find_first_repeat
    from ..data.sources import list_place_names

    in_cache = is_cached(config)
    quantities, training_tokens, tokenizer = (_count if in_cache else _estimate)(config)
    rows = [
        {"name": name, "places": list_place_names(source), "weight": config.weights[name], **quantities[name]}
        for name, source in config.sources.items()
    ]
    tokens, scarcest = find_first_repeat(training_tokens, config.weights) or (None, None)
    return {
        "sources": rows,
        "total": {key: sum(row[key] or 0 for row in rows) for key in _QUANTITIES},
        "complete": all(row[key] is not None for row in rows for key in _QUANTITIES),
        "cached": in_cache,
        "tokenizer": tokenizer,
        "tokens_before_repeat": tokens,
        "scarcest": scarcest,
    }


def _count(config: DataConfig) -> tuple[dict[str, dict[str, Json]], Mapping[str, int | None], str]:
    """Return the size and the training tokens of each source of a cached mixture, and the tokenizer's description."""
    corpus = slop_hf.prepare_data(config, progress=False)
    quantities: dict[str, dict[str, Json]] = {
        name: {
            "tokens": source.train.tokens + source.held_out.tokens,
            "documents": source.documents,
            "disk_bytes": _count_disk_bytes(source),
            "seconds": 0,
        }
        for name, source in corpus.sources.items()
    }
    training_tokens = {name: source.train.tokens for name, source in corpus.sources.items()}
    return quantities, training_tokens, config.tokenizer or f"trained on the text, {len(corpus.tokenizer):,} tokens"


def _estimate(config: DataConfig) -> tuple[dict[str, dict[str, Json]], Mapping[str, int | None], str]:
    """Return the same as `_count`, estimated from samples, for a mixture outside the cache."""
    from ..data.estimate import estimate

    estimated = estimate(config)
    quantities = {name: source._asdict() for name, source in estimated.sources.items()}
    return quantities, estimated.training_tokens, estimated.tokenizer


def _count_disk_bytes(source: SourceTokens) -> int:
    return sum(part.path.stat().st_size for part in (source.train, source.held_out))


def _read_samples(config: DataConfig, count: int) -> dict[str, list[str]]:
    """Return the first documents of each source, shortened."""
    if not count:
        return {}
    from ..data.estimate import shorten
    from ..data.sources import read_documents

    return {
        name: [shorten(text) for text in islice(read_documents(source, cache_dir=config.cache_dir), count)]
        for name, source in config.sources.items()
    }


def _show_summary(summary: Mapping[str, Json], title: str) -> None:
    """Print one row per source, their sum, and how long the mixture lasts."""
    in_cache, is_complete, tokens = summary["cached"], summary["complete"], summary["tokens_before_repeat"]
    mark = "" if in_cache else "~"

    def format_quantities(row: Mapping[str, Json], mark: str) -> list[str]:
        formatters = (*2 * ["{:,}".format if in_cache else format_count], format_bytes, format_duration)
        cells = [form(row[key]) for form, key in zip(formatters, _QUANTITIES, strict=True)]
        return [cell if cell == NOTHING else f"{mark}{cell}" for cell in cells]

    print_table(
        escape(title),
        ("source", "where", ">weight", ">tokens", ">documents", ">disk", ">time"),
        [
            (row["name"], escape(", ".join(row["places"])), f"{row['weight']:.2%}", *format_quantities(row, mark))
            for row in summary["sources"]
        ],
        total=("sum", "", "", *format_quantities(summary["total"], mark if is_complete else "> ")),
        wraps=("where",),
    )
    print(f"tokenizer: {summary['tokenizer']}")
    if tokens is None:
        print("unknown how many training tokens there are before a source repeats: no source has a known size")
    else:
        count = f"{tokens:,}" if in_cache else format_count(tokens)
        unknown = "" if is_complete else ", among sources of known size"
        print(f"{mark}{count} training tokens before a source repeats: {summary['scarcest']} is the first{unknown}")
    print("all tokens are in the cache" if in_cache else "not all tokens are in the cache")
