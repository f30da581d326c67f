"""Seven sources with RedPajama's weights, each in another file format, made of texts that every machine has."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from slop_hf.data import Source, read_documents

#: Weights of the paper's Table 6.
WEIGHTS = {
    "commoncrawl": 67.0,
    "c4": 15.0,
    "github": 4.5,
    "wikipedia": 4.5,
    "books": 4.5,
    "arxiv": 2.5,
    "stackexchange": 2.0,
}


def seven_sources(folder: Path, texts: int = 560, longest: int = 2000) -> dict[str, Any]:
    """Write the sources into a folder, and return the mixture as plain data for YAML.

    Documents are cut to `longest` characters, so that no source holds out many blocks.
    """
    documents = [text[:longest] for text in read_documents(Source("python-stdlib", max_documents=texts))]
    shares = dict(zip(WEIGHTS, (documents[number::7] for number in range(7)), strict=True))
    # Formats with one document per line need documents of one line.
    lines = {name: "\n".join(" ".join(text.split()) for text in shares[name]).encode() for name in ("c4", "books")}
    rows = {
        name: "\n".join(json.dumps({"id": number, column: text}) for number, text in enumerate(shares[name])).encode()
        for name, column in (("commoncrawl", "text"), ("wikipedia", "text"), ("stackexchange", "body"))
    }
    zstd = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(zstd, "zstd") as stream:
        stream.write(rows["commoncrawl"])
    files = {
        "commoncrawl.jsonl.zst": zstd.getvalue().to_pybytes(),
        "c4.txt.gz": gzip.compress(lines["c4"], 1),
        "wikipedia.jsonl.xz": lzma.compress(rows["wikipedia"], preset=0),
        "books.txt.bz2": bz2.compress(lines["books"]),
        "stackexchange.jsonl": rows["stackexchange"],
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "github").mkdir()
    for number, text in enumerate(shares["github"]):
        (folder / "github" / f"{number:03}.py").write_text(text, encoding="utf-8")
    table = pyarrow.table({"id": range(len(shares["arxiv"])), "article": shares["arxiv"]})
    pyarrow.parquet.write_table(table, folder / "arxiv.parquet", row_group_size=16)
    sources: dict[str, Any] = {
        "commoncrawl": {"source": str(folder / "commoncrawl.jsonl.zst")},
        "c4": {"source": str(folder / "c4.txt.gz"), "format": "lines"},
        "github": {"source": str(folder / "github")},
        "wikipedia": {"source": str(folder / "wikipedia.jsonl.xz")},
        "books": {"source": str(folder / "books.txt.bz2"), "format": "lines"},
        "arxiv": {"source": str(folder / "arxiv.parquet"), "text_column": "article"},
        "stackexchange": {"source": str(folder / "stackexchange.jsonl"), "text_column": "body"},
    }
    return {"sources": {name: {**source, "weight": WEIGHTS[name]} for name, source in sources.items()}}
