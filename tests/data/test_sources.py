from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from slop_hf.data import formats, sources
from slop_hf.data.config import Source
from slop_hf.data.sources import count_local_bytes, list_local_files, read_documents
from slop_hf.errors import DataError


def texts(source: Any, **settings: Any) -> list[str]:
    return list(read_documents(Source(source, **settings)))


def write(root: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def test_a_folder_gives_its_visible_texts_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "b.md": "second",
            "a/z.py": "first\r\n",
            "c.rst": "thïrd",
            "blank.txt": " \n",
            ".hidden.txt": "no",
            ".git/HEAD": "no",
            "a/__pycache__/z.txt": "no",
            "latin.txt": "é".encode("latin-1"),
            "binary.bin": b"ab\0cd",
        },
    )
    assert texts(folder) == ["first\r\n", "second", "thïrd"]
    assert texts(folder, max_documents=2) == ["first\r\n", "second"]


def test_a_file_is_a_document_and_sources_follow_one_another(tmp_path: Path) -> None:
    write(tmp_path, {"one.txt": "1", "two.txt": "2"})
    two, one = str(tmp_path / "two.txt"), str(tmp_path / "one.txt")
    assert texts(two) == ["2"]
    assert texts([two, one]) == ["2", "1"]


def test_the_standard_library_is_its_own_sources_without_installed_packages() -> None:
    files = list_local_files("python-stdlib")
    assert files is not None
    assert {"ast.py", "json/decoder.py"} <= set(files)
    assert list(files) == sorted(files)
    assert not any("site-packages" in name or not name.endswith(".py") for name in files)
    whole = formats.read_texts(formats.LocalFile(files["ast.py"]), "text", "text")
    assert [Path(ast.__file__).read_bytes().decode()] == [text for text, _ in whole]
    first = texts("python-stdlib", max_documents=5)
    assert len(first) == 5
    assert first == texts("python-stdlib", max_documents=5)


def test_files_are_read_only_when_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    stream = read_documents(Source(folder))
    assert next(stream) == "a"
    (tmp_path / "b.txt").write_text("changed")
    assert next(stream) == "changed"


def test_a_local_path_comes_before_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "owner/name", {"a.txt": "local"})
    monkeypatch.chdir(tmp_path)
    assert texts("owner/name") == ["local"]


def test_bytes_are_counted_if_all_places_are_local(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.txt": "four", "b/c.bin": b"\0" * 5})
    assert count_local_bytes(Source(folder)) == 9
    assert count_local_bytes(Source([folder, str(tmp_path / "a.txt")])) == 13
    assert count_local_bytes(Source([folder, "owner/name"])) is None
    assert count_local_bytes(Source("http://localhost/a.txt")) is None
    assert list_local_files("https://localhost/a.txt") is None


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere.txt", "a/b/c", "owner/"])
def test_a_name_that_is_nothing_is_refused_at_the_call(source: str) -> None:
    with pytest.raises(DataError, match="neither an existing file or folder nor a Hub dataset id"):
        read_documents(Source(source))


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"blank.txt": "\n", "binary": b"\xff\xfe"})
    with pytest.raises(DataError, match="no document with text"):
        texts(folder)


# The Hub's part, played by folders of data files, which `datasets` loads in the same way.


@pytest.fixture(autouse=True)
def no_cache_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def hub_texts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The texts of a folder that imitates the dataset `owner/name`."""
    import datasets

    load = datasets.load_dataset

    def read(folder: Path, subset: str = "", **settings: Any) -> list[str]:
        monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **named: load(str(folder), *rest, **named))
        return texts(f"owner/name{subset}", **settings)

    return read


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_rows_of_a_dataset_are_documents(tmp_path: Path, name: str, hub_texts: Any) -> None:
    rows = [{"text": "zero", "body": "0"}, {"text": None, "body": "1"}, {"text": "two\r\n☕", "body": "2"}]
    write_rows(tmp_path / "set" / name, rows)
    assert hub_texts(tmp_path / "set") == ["zero", "two\r\n☕"]
    assert hub_texts(tmp_path / "set", text_column="body", max_documents=2) == ["0", "1"]


def test_a_split_can_be_chosen(tmp_path: Path, hub_texts: Any) -> None:
    write_rows(tmp_path / "set/train.jsonl", [{"text": "to train"}])
    write_rows(tmp_path / "set/test.jsonl", [{"text": "to test"}])
    assert hub_texts(tmp_path / "set", split="test") == ["to test"]
    with pytest.raises(DataError, match=r"split 'validation'.*Available splits"):
        hub_texts(tmp_path / "set", split="validation")


def test_a_configuration_can_be_chosen(tmp_path: Path, hub_texts: Any) -> None:
    write_rows(tmp_path / "en.jsonl", [{"text": "hello"}])
    write_rows(tmp_path / "fr.jsonl", [{"text": "bonjour"}])
    configs = "configs: [{config_name: en, data_files: en.jsonl}, {config_name: fr, data_files: fr.jsonl}]"
    (tmp_path / "README.md").write_text(f"---\n{configs}\n---\n")
    assert hub_texts(tmp_path, ":fr") == ["bonjour"]


def test_a_wrong_column_is_refused_with_the_existing_ones(tmp_path: Path, hub_texts: Any) -> None:
    write_rows(tmp_path / "set/train.jsonl", [{"content": "x", "stars": 3}])
    with pytest.raises(DataError, match="no column 'text': set text_column to one of content, stars"):
        hub_texts(tmp_path / "set")
    with pytest.raises(DataError, match=r"'stars' .* holds int, expected text; columns with text: content"):
        hub_texts(tmp_path / "set", text_column="stars")


def test_an_unreachable_hub_is_refused_with_remedies() -> None:
    with pytest.raises(DataError, match=r"check the name .*network and HF_ENDPOINT, or use a local path"):
        read_documents(Source("owner/name:config"))  # conftest.py sets HF_HUB_OFFLINE


def test_local_texts_do_without_importing_datasets() -> None:
    # transformers looks for `datasets` only in its trainer; sources.py alone must not load it.
    code = (
        "import importlib.util, sys, types\n"
        f"package = types.ModuleType('slop_hf.data'); package.__path__ = [{str(Path(sources.__file__).parent)!r}]\n"
        "sys.modules['slop_hf.data'] = package\n"
        "from slop_hf.data.sources import Source, read_documents\n"
        "next(read_documents(Source('python-stdlib')))\n"
        "print(sorted({'datasets', 'pyarrow', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_installed_packages_are_a_source_of_python_files(tmp_path, monkeypatch):
    for name in ("pure/b/one.py", "pure/a.py", "pure/b/__pycache__/one.py", "pure/b/data.txt", "plat/c/two.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    paths = {"purelib": str(tmp_path / "pure"), "platlib": str(tmp_path / "plat")}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    assert list(list_local_files("python-packages") or ()) == ["a.py", "b/one.py", "c/two.py"]
    assert list(texts("python-packages", max_documents=1)) == ["# pure/a.py"]
    paths["platlib"] = paths["purelib"]
    assert list(list_local_files("python-packages") or ()) == ["a.py", "b/one.py"]
