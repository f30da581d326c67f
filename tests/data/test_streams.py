from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pyarrow
import pyarrow.parquet
import pytest
from http_server import FileServer

from slop_hf.data import download
from slop_hf.data.config import Format, Source
from slop_hf.data.sources import DocumentStream, discard_downloads
from slop_hf.errors import DataError
from slop_hf.io.network_errors import summarise_error
from slop_hf.io.retry import Retries, RetryPolicy

TEXTS = ["first", "zwei ☕", "третий\u2028still", "four " * 50, *(f"document {i}" for i in range(5, 40)), "last"]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def lines(texts: list[str]) -> bytes:
    return "".join(f"{text}\n \n" for text in texts).encode()[:-3]  # blank lines between, and no end of line last


def jsonl(texts: list[str]) -> bytes:
    rows: list[Any] = [row for text in texts for row in ({"id": 0, "text": text}, {"id": 1, "text": None})]
    return "\n\n".join(map(json.dumps, rows)).encode()


def parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(2 * len(texts)), "text": [x for text in texts for x in (text, None)]})
    pyarrow.parquet.write_table(table, sink, row_group_size=11)
    return sink.getvalue().to_pybytes()


CONTENT: dict[Format, Callable[[list[str]], bytes]] = {"lines": lines, "jsonl": jsonl, "parquet": parquet}
KINDS = [(kind, suffix) for kind in CONTENT for suffix in COMPRESS if kind != "parquet" or not suffix]


def packed(kind: Format, suffix: str, texts: list[str] = TEXTS) -> bytes:
    return COMPRESS[suffix](CONTENT[kind](texts))


def resumed(source: Source, documents: int) -> tuple[list[str], DocumentStream]:
    """The first texts, and a stream that resumes after them from a state in JSON."""
    stream = DocumentStream(source)
    first = [text for _, text in zip(range(documents), stream, strict=False)]
    return first, DocumentStream(source, json.loads(json.dumps(stream.state_dict())))


def check_every_place(source: Source, expected: list[str]) -> None:
    assert list(DocumentStream(source)) == expected
    for documents in range(len(expected) + 1):
        stream = DocumentStream(source)
        texts = iter(stream)
        first = [next(texts) for _ in range(documents)]
        rest = DocumentStream(source, json.loads(json.dumps(stream.state_dict())))
        assert first + list(rest) == expected
        assert rest.state_dict()["documents"] == len(expected)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Retry without waits, in small pieces, with a separate cache."""
    monkeypatch.setattr(download, "RETRY_POLICY", RetryPolicy(first_wait=0.0))
    monkeypatch.setattr(download, "PIECE_BYTES", 40_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


# Local files


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_every_format_resumes_from_every_document(tmp_path: Path, kind: Format, suffix: str) -> None:
    path = tmp_path / f"corpus.{kind}{suffix}"
    path.write_bytes(packed(kind, suffix))
    check_every_place(Source(str(path), format="lines" if kind == "lines" else None), TEXTS)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_of_text_resume_from_every_document(tmp_path: Path, suffix: str) -> None:
    for i, text in enumerate(["one\r\n", "two", " ", "three"]):
        (tmp_path / f"{i}.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    (tmp_path / f"9.bin{suffix}").write_bytes(COMPRESS[suffix](b"a\0b"))
    check_every_place(Source(str(tmp_path)), ["one\r\n", "two", "three"])


def test_places_of_several_formats_follow_one_another(tmp_path: Path) -> None:
    (tmp_path / "folder/deeper").mkdir(parents=True)
    (tmp_path / "folder/a.jsonl.zst").write_bytes(packed("jsonl", ".zst", ["a1", "a2"]))
    (tmp_path / "folder/deeper/b.txt").write_text("b")
    (tmp_path / "folder/deeper/c.parquet").write_bytes(packed("parquet", "", ["c1", "c2"]))
    (tmp_path / "z.ndjson").write_bytes(packed("jsonl", "", ["z1", "z2"]))
    source = Source([str(tmp_path / "z.ndjson"), str(tmp_path / "folder")])
    check_every_place(source, ["z1", "z2", "a1", "a2", "b", "c1", "c2"])


def test_max_documents_counts_over_resumptions(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(packed("jsonl", ""))
    source = Source(str(tmp_path / "a.jsonl"), max_documents=7)
    check_every_place(source, TEXTS[:7])
    assert list(resumed(source, 7)[1]) == []


def downloads(tmp_path: Path) -> list[Path]:
    """The files in the cache of downloads, except locks."""
    return [path for path in (tmp_path / "home/slop_hf/downloads").iterdir() if path.suffix != ".lock"]


def test_a_stream_resumes_from_its_state_and_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbroken')
    stream = DocumentStream(Source(str(tmp_path / "a.jsonl"), max_documents=2))
    assert [next(iter(stream)), next(iter(stream))] == ["one", "two"]
    assert list(stream) == []


def test_a_line_is_found_without_reading_what_lies_before(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed("jsonl", ""))
    source = Source(str(path))
    _, rest = resumed(source, 20)
    path.write_bytes(b"x" * 30 + path.read_bytes()[30:])
    # The check at the call looks at the first line; the stream made before reads from its place.
    assert list(rest) == TEXTS[20:]


def test_several_frames_and_members_are_one_file(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(b'{"text": "one"}\n{"te') + compress(b'xt": "two"}\n'))
        assert list(DocumentStream(Source(str(path)))) == ["one", "two"]


def test_halves_of_surrogate_pairs_and_byte_order_marks_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert list(DocumentStream(Source(str(tmp_path)))) == ["half \ufffd", "whole \U0001f600"]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
@pytest.mark.parametrize("kind", ["lines", "text"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, suffix: str, kind: Format) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](random.Random(0).randbytes(9999).hex().encode())[:-9])
    with pytest.raises(DataError, match=rf"cannot read .*a\.txt{suffix} \(.*cut off or damaged, get it again"):
        list(DocumentStream(Source(str(path), format=kind)))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS)[:-9])
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        DocumentStream(Source(str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 3 of .*a\.jsonl is not JSON \(.*expected a JSON object: correct or remove"),
        ("[1]", r"line 3 of .*a\.jsonl is a JSON list, expected a JSON object"),
        ('"\udcff"', r"line 3 of .*a\.jsonl is not JSON"),
        ('{"body": "x", "n": 1}', r"line 3 .* has no column 'text': set text_column to one of body, n"),
        ('{"body": "x", "text": 1}', r"'text' of line 3 .* holds int, expected text; columns with text: body"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    content = f'{{"text": "one"}}\n\n{line}\n'.encode(errors="surrogateescape")
    (tmp_path / "a.jsonl").write_bytes(content)
    first, rest = resumed(Source(str(tmp_path)), 1)
    assert first == ["one"]
    with pytest.raises(DataError, match=message):
        list(rest)


def test_a_line_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\n")
    with pytest.raises(DataError, match=r"line 2 of .*a\.txt is not UTF-8"):
        list(DocumentStream(Source(str(tmp_path), format="lines")))


def test_a_parquet_column_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS))
    with pytest.raises(DataError, match=r"a\.parquet has no column 'body': set text_column to one of id, text"):
        DocumentStream(Source(str(tmp_path), text_column="body"))
    with pytest.raises(DataError, match=r"column 'id' .* holds int, expected text; columns with text: text"):
        DocumentStream(Source(str(tmp_path), text_column="id"))


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS))
    source = Source(str(tmp_path))
    stream = DocumentStream(source)
    next(iter(stream))
    state = stream.state_dict()
    for wrong in (state | {"place": 1}, state | {"more": 0}):
        with pytest.raises(DataError, match="does not belong to a stream over 1 places: begin without it"):
            DocumentStream(source, wrong)
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:5]))
    with pytest.raises(DataError, match=r"a\.jsonl has \d+ bytes, and had \d+ when reading began"):
        list(DocumentStream(source, state))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"no longer has the file 'a\.jsonl'"):
        list(DocumentStream(source, state))


# URLs


def scripted(seed: int, drops: int = 2) -> Iterator[Any]:
    """Endless faults, with `drops` dropped connections per complete body."""
    dice = random.Random(seed)
    while True:
        for fault in [*(dice.uniform(0.2, 0.95) for _ in range(drops)), None]:
            for _ in range(dice.randrange(3)):
                yield dice.choice([500, 502, 503, 504, 408, 429, 0.0])
            yield fault


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_nothing_is_lost_or_doubled_over_a_bad_network(
    tmp_path: Path, kind: Format, suffix: str, ranges: bool
) -> None:
    texts = [f"{i} " + random.Random(i).randbytes(4000).hex() for i in range(60)]
    name, content = f"corpus.{kind}{suffix}", packed(kind, suffix, texts)
    # Without ranges, a drop before the byte already reached is no progress: several in a row would be too many.
    with FileServer({name: content}, scripted(7, 9 if ranges else 2), ranges=ranges) as server:
        source = Source(server.url(name), format=kind)
        assert list(DocumentStream(source)) == texts
        first, rest = resumed(source, 33)
        assert first + list(rest) == texts
    assert content in [path.read_bytes() for path in downloads(tmp_path)]


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_every_format_at_a_url_resumes_from_every_document(kind: Format, suffix: str) -> None:
    name = f"corpus.{kind}{suffix}"
    with FileServer({name: packed(kind, suffix, TEXTS[:8])}) as server:
        check_every_place(Source(server.url(name), format=kind), TEXTS[:8])


def test_a_file_of_text_at_a_url_is_a_document() -> None:
    with FileServer({"a.txt": b"one", "b.txt.gz": gzip.compress(b"two")}, scripted(5)) as server:
        check_every_place(Source([server.url("a.txt"), server.url("b.txt.gz")]), ["one", "two"])


def test_a_chunked_body_that_breaks_off_is_resumed() -> None:
    content = jsonl([f"{i} " * 999 for i in range(99)])
    faults = [None, 0.3, 0.5, 0.0, 0.9]
    with FileServer({"a.jsonl": content}, faults, chunked=True) as server:
        for _ in ("downloaded", "complete, but the server does not say so"):
            assert list(DocumentStream(Source(server.url("a.jsonl")))) == [f"{i} " * 999 for i in range(99)]
    assert len(server.requests) > 4


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_at_a_url_has_no_documents(ranges: bool) -> None:
    with FileServer({"a.jsonl": b""}, ranges=ranges) as server, pytest.raises(DataError, match="no document with"):
        list(DocumentStream(Source(server.url("a.jsonl"))))


def test_a_file_is_downloaded_once_and_no_further_than_it_is_read(tmp_path: Path) -> None:
    texts = [f"{i} " * 2000 for i in range(100)]
    content = lines(texts)
    with FileServer({"a.txt": content}) as server:
        source = Source(server.url("a.txt"), format="lines", max_documents=20)
        assert list(DocumentStream(source)) == texts[:20]
        assert len(content) > 14 * download.PIECE_BYTES and len(server.requests) < 6
        whole = Source(server.url("a.txt"), format="lines")
        first, rest = resumed(whole, 60)
        server.requests.clear()
        assert first + list(rest) == texts
        starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for _, asked in server.requests if asked]
        assert starts == sorted(starts) and starts[0] >= content.index(texts[60].encode()) - download.PIECE_BYTES
        server.requests.clear()
        assert list(DocumentStream(whole)) == texts
        assert server.requests == [("a.txt", None)]  # which file the server has


def test_a_download_can_be_shared_by_processes(tmp_path: Path) -> None:
    texts = [f"{i} " * 2000 for i in range(60)]
    with FileServer({"a.txt": lines(texts)}) as server:
        source = Source(server.url("a.txt"), format="lines")
        one, other = (iter(DocumentStream(source)) for _ in range(2))
        pairs = list(zip(one, other, strict=True))
    assert pairs == [(text, text) for text in texts]
    assert lines(texts) in [path.read_bytes() for path in downloads(tmp_path)]


def test_a_download_is_replaced_by_the_file_that_the_server_has_now() -> None:
    with FileServer({"a.txt": b"old\n"}) as server:
        source = Source(server.url("a.txt"), format="lines")
        assert list(DocumentStream(source)) == ["old"]
        server.files["a.txt"] = b"new\n"  # of the same size
        assert list(DocumentStream(source)) == ["new"]


def test_every_failure_is_logged_and_a_server_may_ask_to_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    failure = HTTPError("", 429, "Too Many Requests", {"Retry-After": "7"}, None)  # type: ignore[arg-type]
    policy = RetryPolicy()
    retries = Retries(policy, "reading it")
    with caplog.at_level(logging.WARNING, "slop_hf"):
        for caught in (TimeoutError("slow"), failure, ConnectionResetError("gone"), TimeoutError("slow")):
            download.wait_or_give_up(retries, caught)
    assert 0.5 <= waits[0] <= 1 and waits[1] == 7 and 2 <= waits[2] <= 4 <= waits[3] <= 8
    assert "reading it: slow; attempt 2 of 8 in" in caplog.messages[0]
    failure.headers["Retry-After"] = "Fri, 01 Jan 2100 00:00:00 GMT"
    download.wait_or_give_up(retries, failure)
    assert waits[-1] == policy.longest_retry_after


def test_reading_gives_up_and_a_later_run_completes() -> None:
    with FileServer({"a.jsonl": jsonl([f"{i} " * 5000 for i in range(50)])}, [None, None, 0.5]) as server:
        source = Source(server.url("a.jsonl"))
        stream = DocumentStream(source)
        server.faults = iter([0.5, *[503] * 6, 0.1, *[503] * 7])  # a drop and six are bearable
        seen = []
        message = r"http://127.*/a.jsonl failed 8 times in a row, the last time with: .*503.* resumes where it stopped"
        with pytest.raises(DataError, match=message):
            for text in stream:
                seen.append(text)
        assert 0 < len(seen) < 50
        assert next(server.faults, None) is None
        rest = DocumentStream(source, json.loads(json.dumps(stream.state_dict())))
        assert seen + list(rest) == [f"{i} " * 5000 for i in range(50)]


def test_bytes_that_were_there_before_are_no_progress() -> None:
    with FileServer({"a.txt": b"x\n" * 300_000}, ranges=False) as server:
        server.faults = iter([None, 0.6, *[0.5] * 20])
        with pytest.raises(DataError, match="failed 8 times in a row"):
            list(DocumentStream(Source(server.url("a.txt"), format="lines")))


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(404, "correct the URL"), (401, "signed URL"), (403, "signed URL"), (410, "gone"), (418, "correct it")],
)
def test_a_refusal_is_reported_at_once(status: int, remedy: str) -> None:
    with FileServer({}, [status] * 9) as server:
        for name in ("a.txt", "a.jsonl", "a.parquet"):
            with pytest.raises(DataError, match=rf"cannot read http://.*/{name} \(HTTP Error {status}.*{remedy}"):
                DocumentStream(Source(server.url(f"{name}?signature=secret")))
    assert len(server.requests) == 3


def test_a_later_place_is_looked_up_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with FileServer({}) as server, pytest.raises(DataError, match="404"):
        DocumentStream(Source([str(tmp_path), server.url("b.jsonl")]))


def test_a_file_that_changed_on_the_server_is_refused() -> None:
    long, other = jsonl([f"{i} " * 5000 for i in range(50)]), jsonl([f"{i}_" * 5000 for i in range(50)])
    for ranges in (True, False):
        with FileServer({"a.jsonl": long}, ranges=ranges) as server:
            source = Source(server.url("a.jsonl"))
            stream = DocumentStream(source)
            texts = iter(stream)
            for _ in range(49):
                next(texts)
            for changed in (other, jsonl(["short"])):
                server.files["a.jsonl"] = changed
                with pytest.raises(DataError, match=r"changed on the server.*begin again without the state"):
                    list(DocumentStream(source, stream.state_dict()))


def test_secrets_stay_out_of_messages_and_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FileServer({"a.txt": b" "}, [500, None]) as server:
        with pytest.raises(DataError) as raised:
            list(DocumentStream(Source(server.url("a.txt?sig=secret"))))
        assert caplog.messages and "secret" not in str(raised.value) + caplog.text
        assert all(b"secret" not in path.name.encode() + path.read_bytes() for path in downloads(tmp_path))
    with pytest.raises(DataError, match="holds a user or password") as raised:
        DocumentStream(Source("https://me:secret@localhost/a.txt"))
    assert "secret" not in str(raised.value)
    with pytest.raises(DataError, match="malformed"):
        DocumentStream(Source("https://localhost:port/a.txt"))
    assert summarise_error(OSError("Bearer abc hf_abc123 x")) == "Bearer ... hf_ ... x"


def test_downloads_are_discarded(tmp_path: Path) -> None:
    with FileServer({"a.parquet": parquet(TEXTS)}) as server:
        source = Source([server.url("a.parquet"), "python-stdlib"])
        next(iter(DocumentStream(source)))
        assert len(downloads(tmp_path)) == 2  # the file, and its identity
        discard_downloads(source, None)
    assert not downloads(tmp_path)


# The Hub, imitated by a folder


@pytest.fixture(params=["jsonl", "parquet"])
def hub(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Iterator[Any]], None]]:
    """Imitate the dataset `owner/name`; return a function that sets the faults to raise, one per call and row."""
    import datasets

    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(2):
        content = CONTENT[request.param](TEXTS[part * 20 : (part + 1) * 20])
        (folder / f"train-{part}.{request.param}").write_bytes(content)
    load, faults = datasets.load_dataset, [iter(())]

    def fail() -> None:
        fault = next(faults[0], None)
        if fault is not None:
            raise fault

    class Flaky:
        def __init__(self, inner: Any) -> None:
            self.state_dict, self.load_state_dict, self.inner = inner.state_dict, inner.load_state_dict, inner

        def __iter__(self) -> Iterator[Any]:
            for row in self.inner:
                fail()
                yield row

    def load_dataset(name: str, *rest: Any, **named: Any) -> Flaky:
        fail()
        return Flaky(load(str(folder), *rest, **named))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield lambda given: faults.__setitem__(0, given)


def test_a_hub_dataset_resumes_from_every_document(hub: Any) -> None:
    check_every_place(Source("owner/name"), TEXTS)


def test_no_row_is_lost_or_doubled_over_a_bad_network(hub: Any) -> None:
    dice = random.Random(3)

    class TransportError(Exception):
        """Like httpx's, without a base among the built-in errors."""

    def faults() -> Iterator[Exception | None]:
        while True:
            for _ in range(dice.randrange(4)):
                yield dice.choice([ConnectionError("gone"), TimeoutError(), TransportError("no route")])
            yield from [None] * dice.randrange(2, 9)  # a row after each successful load

    hub(faults())
    assert list(DocumentStream(Source("owner/name"))) == TEXTS
    first, rest = resumed(Source("owner/name", max_documents=35), 17)
    assert first + list(rest) == TEXTS[:35]


def test_the_hub_is_given_up_and_a_later_run_completes(hub: Any) -> None:
    stream = DocumentStream(Source("owner/name"))
    hub(iter([None] * 21 + [ConnectionError("gone")] * 8))
    seen = []
    with pytest.raises(DataError, match=r"the Hub dataset 'owner/name' failed 8 times in a row, .* gone"):
        for text in stream:
            seen.append(text)
    assert seen == TEXTS[:11]  # each is followed by a row without text
    assert seen + list(DocumentStream(Source("owner/name"), stream.state_dict())) == TEXTS


def test_a_refusal_of_the_hub_is_reported_at_once(hub: Any, caplog: pytest.LogCaptureFixture) -> None:
    for fault in (FileNotFoundError("Dataset doesn't exist"), ValueError("Bad split"), PermissionError("gated")):
        hub(iter([fault]))
        with pytest.raises(DataError, match=f"{fault}.*check the name"):
            DocumentStream(Source("owner/name"))
    assert not caplog.messages
