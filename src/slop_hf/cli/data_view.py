"""What `slop data` prints: a row a source, how long the mixture lasts, and samples."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import slop_hf

if TYPE_CHECKING:
    from ..data import Corpus, DataConfig
    from ..data.corpus import SourceTokens

COUNTS = ("tokens", "documents", "disk_bytes", "seconds")


def overview(config: DataConfig) -> dict[str, Any]:
    """What is known of a mixture: exact where it is in the cache, estimated from samples where it is not.

    Returns:
        Plain values: `sources`, a row each; `total`, the sums of what is known; `complete`, whether all is;
        `cached`; `tokenizer` in words; `tokens_before_repeat`, and `scarcest`, the source that repeats first.
    """
    from ..data.corpus import cached
    from ..data.estimate import tokens_before_repeat

    exact = cached(config)
    rows, training, tokenizer = (_counted if exact else _estimated)(config)
    reach = tokens_before_repeat(training, config.weights) or (None, None)
    return {
        "sources": rows,
        "total": {key: sum(row[key] or 0 for row in rows) for key in COUNTS},
        "complete": all(row[key] is not None for row in rows for key in COUNTS),
        "cached": exact,
        "tokenizer": tokenizer,
        "tokens_before_repeat": reach[0],
        "scarcest": reach[1],
    }


def _counted(config: DataConfig) -> tuple[list[dict[str, Any]], dict[str, int], str]:
    corpus = slop_hf.prepare_data(config, progress=False)
    rows = [
        {
            "name": name,
            "places": list(config.sources[name].places),
            "weight": config.weights[name],
            "tokens": found.train.tokens + found.held_out.tokens,
            "documents": found.documents,
            "disk_bytes": _disk_bytes(found),
            "seconds": 0,
        }
        for name, found in corpus.sources.items()
    ]
    training = {name: found.train.tokens for name, found in corpus.sources.items()}
    return rows, training, config.tokenizer or f"its own, of {len(corpus.tokenizer):,} tokens"


def _estimated(config: DataConfig) -> tuple[list[dict[str, Any]], dict[str, int | None], str]:
    from ..data.estimate import estimate

    found = estimate(config)
    rows = [
        {
            "name": one.name,
            "places": list(one.places),
            "weight": one.weight,
            **{key: getattr(one, key) for key in COUNTS},
            "bytes_per_token": one.bytes_per_token,
        }
        for one in found.sources
    ]
    return rows, found.training_tokens, found.tokenizer


def _disk_bytes(found: SourceTokens) -> int:
    return sum(part.path.stat().st_size for part in (found.train, found.held_out))


def samples_of(config: DataConfig, count: int) -> dict[str, list[str]]:
    """The first documents of each source, shortened."""
    if not count:
        return {}
    from ..data.estimate import shortened
    from ..data.sources import documents

    return {
        name: [shortened(text) for text in islice(documents(source), count)] for name, source in config.sources.items()
    }


def show_overview(found: dict[str, Any], title: str) -> None:
    """Print a row a source, their sum, and what follows from it."""
    table = Table(box=SIMPLE, title=escape(title), pad_edge=False, collapse_padding=True)
    table.add_column("source", no_wrap=True)
    table.add_column("where", overflow="fold")  # broken where a terminal is narrow; numbers stay whole
    for column in ("weight", "tokens", "documents", "disk", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    exact = found["cached"]
    for row in found["sources"]:
        where = escape(", ".join(row["places"]))
        table.add_row(row["name"], where, f"{row['weight']:.2%}", *_cells(row, "" if exact else "~"))
    table.add_section()
    table.add_row("sum", "", "", *_cells(found["total"], "" if exact else "~" if found["complete"] else "> "))
    Console().print(table)
    for line in _lines(found):
        print(line)


def _cells(row: dict[str, Any], mark: str) -> list[str]:
    tokens, documents, disk, seconds = (row[key] for key in COUNTS)
    figures = (_count(tokens, exact=not mark), _count(documents, exact=not mark), _size(disk), _time(seconds))
    return [f"{mark}{figure}" if figure not in ("?", "-") else figure for figure in figures]


def _lines(found: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    reach = found["tokens_before_repeat"]
    lines = [f"tokens counted by {found['tokenizer']}"]
    if reach is None:
        lines.append("how many tokens there are before a source repeats is not known: no source tells its size")
    else:
        mark = "" if found["cached"] else "~"
        known = "" if found["complete"] else ", of those whose size is known"
        count = _count(reach, exact=found["cached"])
        lines.append(f"{mark}{count} training tokens before a source repeats: {found['scarcest']} is the first{known}")
    lines.append("all of it is in the cache" if found["cached"] else "not all of it is in the cache")
    return lines


def show_samples(texts: dict[str, list[str]]) -> None:
    """Print documents as they are, under the names of their sources."""
    console = Console()
    for name, shown in texts.items():
        for number, text in enumerate(shown, 1):
            console.rule(Text(f"{name}, document {number}"), align="left")
            console.print(Text(text), soft_wrap=True)


def show_result(corpus: Corpus, *, as_json: bool) -> None:
    """Print where the tokens of each source lie, and how many there are."""
    rows = [
        {
            "name": name,
            "weight": corpus.weights[name],
            "training_tokens": found.train.tokens,
            "held_out_tokens": found.held_out.tokens,
            "documents": found.documents,
            "disk_bytes": _disk_bytes(found),
            "folder": str(found.train.path.parent),
        }
        for name, found in corpus.sources.items()
    ]
    if as_json:
        answer = {"sources": rows, "vocab_size": len(corpus.tokenizer), "fingerprint": corpus.fingerprint}
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    for row in rows:
        print(
            f"{row['name']}: {row['training_tokens']:,} training tokens and {row['held_out_tokens']:,} held out, "
            f"of {row['documents']:,} documents, in {row['folder']}"
        )


def _count(count: int | None, *, exact: bool) -> str:
    if count is None:
        return "?"
    if exact or count < 1000:
        return f"{count:,}"
    unit, size = next(
        (unit, size) for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)) if count >= size
    )
    return f"{count / size:.3g}{unit}"


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "?"
    unit, size = next((unit, size) for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 0)) if nbytes >= size)
    return f"{nbytes / (size or 2**10):,.3g} {unit}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if not seconds:
        return "-"
    unit, size = next((unit, size) for unit, size in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= size)
    return f"{seconds / (size or 1):,.2g} {unit}"
