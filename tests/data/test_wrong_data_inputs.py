"""Wrong data, configurations and servers in Python: each is refused in one or two lines that say what to do."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from http_server import FileServer

from slop_hf.data import DataConfig, Mixture, Source, formats, load_tokenizer, prepare_data, read_documents, sources
from slop_hf.data import download as download_module
from slop_hf.errors import DataError
from slop_hf.io.retry import RetryPolicy

TEXT = b"to be or not to be\n" * 20
PAGE = b"\n<!DOCTYPE html><html><body>Log in to continue</body></html>"
HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download_module, "RETRY_POLICY", RetryPolicy(attempts=2, first_wait=0.0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def refusal(action: Callable[[], object]) -> str:
    """The message of the DataError that an action raises."""
    with pytest.raises(DataError) as caught:
        action()
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


# Configurations

CONFIGS: list[tuple[Callable[[], object], str]] = [
    (lambda: Source(""), "source must name a corpus"),
    (lambda: Source([]), "source must name a corpus"),  # type: ignore[arg-type]
    (lambda: Source(None), "source must name a corpus"),  # type: ignore[arg-type]
    (lambda: Source(["a", 3]), "source must name a corpus"),  # type: ignore[list-item,arg-type]
    (lambda: Source("http://[::1/x"), "is a malformed URL"),
    (lambda: Source("http://"), "is a malformed URL"),
    (lambda: Source("https://:80/a"), "is a malformed URL"),
    (lambda: Source("http://host:99999/a"), "is a malformed URL"),
    (lambda: Source("http://host:port/a"), "is a malformed URL"),
    (lambda: Source(("python-stdlib", "HTTPS://[bad")), "is a malformed URL"),
    (lambda: Source(split=""), "split must not be empty"),
    (lambda: Source(text_column=""), "text_column must not be empty"),
    (lambda: Source(format="csv"), "format must be one of text, lines, jsonl, parquet"),  # type: ignore[arg-type]
    (lambda: Source(weight=0), "weight must be a number above 0"),
    (lambda: Source(weight=-1), "weight must be a number above 0"),
    (lambda: Source(weight=float("nan")), "weight must be a number above 0"),
    (lambda: Source(weight="1"), "weight must be a number above 0"),  # type: ignore[arg-type]
    (lambda: Source(max_documents=0), "max_documents must be"),
    (lambda: Source(max_documents=1.5), "max_documents must be"),  # type: ignore[arg-type]
    (lambda: Source(max_documents=True), "max_documents must be"),
    (lambda: Mixture({}), "a mixture needs sources"),
    (lambda: Mixture({"a": Source(weight=0.5)}), "the weights add up to 0.5"),
    (lambda: Mixture({"a b": Source()}), "cannot name a source"),
    (lambda: Mixture({"../a": Source()}), "cannot name a source"),
    (lambda: DataConfig(vocab_size=256), "vocab_size must be a whole number of at least 257"),
    (lambda: DataConfig(vocab_size=300.0), "vocab_size must be"),  # type: ignore[arg-type]
    (lambda: DataConfig(block_size=1), "block_size must be"),
    (lambda: DataConfig(held_out=1.0), "held_out must be a share"),
    (lambda: DataConfig(held_out=float("inf")), "held_out must be a share"),
    (lambda: DataConfig(tokenizer=""), "tokenizer must be a local folder or Hub id"),
    (lambda: DataConfig(tokenizer_kind="word"), "tokenizer_kind must be one of"),  # type: ignore[arg-type]
    (lambda: DataConfig(source="a", mixture=Mixture({"b": Source()})), "is for data of one source"),
    (lambda: DataConfig(mixture="no/such/file.yaml"), "no/such/file.yaml"),
]


@pytest.mark.parametrize(("build", "message"), CONFIGS)
def test_a_wrong_configuration_is_refused(build: Callable[[], object], message: str) -> None:
    assert message in refusal(build)


def test_secrets_in_a_malformed_url_are_not_shown() -> None:
    shown = refusal(lambda: Source("https://me:password@[::1/a?signature=secret"))
    assert "password" not in shown and "secret" not in shown


# Files

FILES: list[tuple[str, bytes, dict[str, Any], str]] = [
    ("empty.txt", b"", {}, "no document with text"),
    ("blank.txt", b" \n\t", {}, "no document with text"),
    ("latin.txt", "é".encode("latin-1"), {}, "no document with text"),
    ("binary.bin", b"a\0b", {}, "no document with text"),
    ("latin.txt", b"first\n\xe9\n", {"format": "lines"}, "line 2 of"),
    ("cut.jsonl", b'{"text": "a"}\n{"text": ', {}, "line 2 of"),
    ("list.jsonl", b'["a"]', {}, "is a JSON list, expected a JSON object"),
    ("deep.jsonl", b"[" * 100_000, {}, "line 1 of"),
    ("number.jsonl", b'{"text": 3}', {}, "holds int, expected text"),
    ("other.jsonl", b'{"body": "a"}', {}, "has no column 'text'"),
    ("null.jsonl", b'{"text": null}', {}, "no document with text"),
    ("not.gz", b"not compressed", {}, "if it is cut off or damaged"),
    ("cut.txt.gz", gzip.compress(TEXT, mtime=0)[:-9], {}, "if it is cut off or damaged"),
    ("not.bz2", b"not compressed", {}, "if it is cut off or damaged"),
    ("not.xz", b"not compressed", {}, "if it is cut off or damaged"),
    ("not.zst", b"not compressed", {}, "if it is cut off or damaged"),
    ("not.parquet", b"PAR1 not parquet", {}, "if it is cut off or damaged"),
    ("large.txt", b"x" * 5000, {}, "a document of more than 1.02 kB of text"),
    ("large.txt.gz", gzip.compress(b"x" * 5000, mtime=0), {}, "a document of more than 1.02 kB of text"),
    ("large.txt.gz", gzip.compress(b"x" * 5000, mtime=0), {"format": "lines"}, "line 1 of"),
    ("large.jsonl", json.dumps({"text": "x" * 5000}).encode(), {}, "line 1 of"),
]


@pytest.mark.parametrize(("name", "content", "settings", "message"), FILES)
def test_a_wrong_file_is_refused(name, content, settings, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_DOCUMENT_BYTES", 1024)
    (tmp_path / name).write_bytes(content)
    shown = refusal(lambda: list(read_documents(Source(str(tmp_path / name), **settings))))
    assert message in shown and name in shown


def test_a_document_of_the_largest_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_DOCUMENT_BYTES", 1024)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 1024))
    assert list(read_documents(Source(str(tmp_path / "a.txt.gz")))) == ["x" * 1024]
    assert list(read_documents(Source(str(tmp_path / "a.txt.gz"), format="lines"))) == ["x" * 1024]


def test_no_more_than_the_largest_document_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_DOCUMENT_BYTES", 2**20)
    read = 0

    class Endless:
        def read(self, size: int) -> bytes:
            nonlocal read
            read += size
            return b"x" * size

    with pytest.raises(DataError, match="the largest allowed"):
        formats._read_text(Endless(), "bomb.gz")  # type: ignore[arg-type]
    assert read <= 3 * 2**20


def test_long_texts_of_parquet_are_decoded_a_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_PARQUET_BYTES", 1000)
    texts = [f"{i}" * 400 for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    rows = []
    iterate = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda *args, **named: rows.append(args[1]) or iterate(*args, **named),
    )
    assert list(read_documents(Source(str(tmp_path / "a.parquet")))) == texts
    assert set(rows) == {2}


def test_files_that_are_not_utf8_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in {
        "a.txt": TEXT,
        "b.txt": "é".encode("latin-1"),
        "c.bin": b"a\0b",
        "d.txt": "naïve".encode("utf-16"),
        "e.txt": b"\xff",
    }.items():
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert list(read_documents(Source(str(tmp_path)))) == [TEXT.decode()]
    (record,) = caplog.records
    assert f"{tmp_path}: 4 of 5 files are left out" in record.getMessage()
    assert "(b.txt, c.bin, d.txt, …)" in record.getMessage()


def test_a_character_across_two_pieces_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_PIECE_BYTES", 3)
    (tmp_path / "a.txt").write_text("a☕ü" * 20, encoding="utf-8")
    assert list(read_documents(Source(str(tmp_path)))) == ["a☕ü" * 20]


# Servers

RESPONSES: list[tuple[str, bytes, dict[str, str], dict[str, Any], str]] = [
    ("page.txt", PAGE, HTML, {}, "is a web page (text/html; charset=utf-8)"),
    ("page.jsonl", PAGE, HTML, {}, "set format to text to train on the page"),
    ("page.jsonl.gz", PAGE, HTML, {}, "is a web page"),
    ("page.parquet", PAGE, {"Content-Type": "application/xhtml+xml"}, {}, "is a web page"),
    ("page", PAGE, HTML, {"format": "lines"}, "is a web page"),
    ("cut.txt", TEXT, {"Content-Length": "9999999"}, {}, "has changed on the server"),
    ("part.txt", TEXT, {"Content-Range": "bytes x-y/z"}, {}, "without its offset"),
    ("é.txt", TEXT, {}, {}, "the URL is malformed"),
]


@pytest.mark.parametrize(("name", "content", "headers", "settings", "message"), RESPONSES)
def test_a_wrong_response_is_refused(name, content, headers, settings, message, tmp_path: Path) -> None:
    with FileServer({name: content}, headers={name: headers}) as server:
        source = Source(server.url(name), **settings)
        assert message in refusal(lambda: list(read_documents(source, cache_dir=str(tmp_path))))


@pytest.mark.parametrize(
    ("name", "content", "headers", "settings"),
    [
        ("page.html", PAGE, HTML, {}),
        ("page.txt", PAGE, HTML, {"format": "text"}),
        ("text.txt", TEXT, HTML, {}),  # a server that calls every file a page
        ("text.txt", TEXT, {"Content-Type": ";;;"}, {}),
        ("text.txt", TEXT, {"Content-Length": "abc"}, {}),
    ],
)
def test_odd_responses_with_text_are_read(name, content, headers, settings, tmp_path: Path) -> None:
    with FileServer({name: content}, headers={name: headers}) as server:
        texts = read_documents(Source(server.url(name), **settings), cache_dir=str(tmp_path))
        assert list(texts) == [content.decode()]


@pytest.mark.parametrize("url", ["http://" + "a" * 70 + ".org/x", "http://a\udc80/x", "http://a b/x", "http://a\nb/x"])
def test_a_url_that_cannot_be_sent_is_refused(url: str) -> None:
    assert "the URL is malformed" in refusal(lambda: list(read_documents(Source(url))))


# Tokenizers and caches


@pytest.mark.parametrize("name", ["no/such/tokenizer", "./nothing", "a/b/c", "two words"])
def test_a_wrong_tokenizer_is_refused(name: str) -> None:
    assert "cannot be loaded" in refusal(lambda: load_tokenizer(name))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "cannot be loaded" in refusal(lambda: load_tokenizer(tmp_path))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "text.txt").write_bytes(TEXT)
    config = DataConfig(str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "file"), vocab_size=260)
    assert "cache_dir" in refusal(lambda: prepare_data(config))


def test_list_place_names_hides_signatures() -> None:
    assert sources.list_place_names(Source("https://host/a?signature=secret")) == ["https://host/a"]
