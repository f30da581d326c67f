"""Runs the code blocks of a page, or the cells of a notebook, and writes what they print into it.

A block of Python is run in this process, with the names of the blocks before it; a block of bash by bash, with the
`slop` of this environment. A block of YAML that begins with `# NAME.yaml` is written to that file. A block of text
right after code is its output, without what goes to stderr.

    python docs/run_page.py docs/tutorial.md
    python docs/run_page.py notebooks/quickstart.ipynb
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```(python|bash|yaml)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.yaml)\n")
#: Settings of blocks: tables of 80 columns, no network, and quiet libraries.
_ENVIRONMENT = {
    "COLUMNS": "80",
    "DS_ACCELERATOR": "cpu",  # DeepSpeed says on stdout that there is no GPU
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run_page(text: str, directory: Path, names: dict[str, Any] | None = None) -> str:
    """Run the blocks of a page, and return the page with their output in its blocks of text.

    Args:
        text: Markdown of the page.
        directory: working directory of the blocks.
        names: names that blocks of Python find; those that they define are added.

    Raises:
        RuntimeError: if a block of bash fails. What a block of Python raises is raised.
    """
    names = {} if names is None else names
    parts, end = [], 0
    with _enter(directory):
        for block in _BLOCK.finditer(text):
            language, code, shown = block.groups()
            print(code.partition("\n")[0], file=sys.stderr)
            printed = _RUNNERS[language](code, names)
            if shown is not None:
                parts += [text[end : block.start(3)], _tidy(printed)]
                end = block.end(3)
    return "".join([*parts, text[end:]])


def _run_python(code: str, names: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "<block>", "exec"), names)
    return printed.getvalue()


def _run_bash(code: str, names: Mapping[str, Any]) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, env={**os.environ, **_ENVIRONMENT, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"this block ended with code {done.returncode}:\n{code}\n{done.stderr[-2000:]}")
    return done.stdout


def _write_yaml(code: str, names: Mapping[str, Any]) -> str:
    named = _FILE.match(code)
    if named:
        Path(named[1]).write_text(code, encoding="utf-8")
    return ""


_RUNNERS = {"python": _run_python, "bash": _run_bash, "yaml": _write_yaml}


def _tidy(printed: str) -> str:
    """Return output without blanks at the ends of lines, and without blank lines at its ends."""
    text = "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n")
    return f"{text}\n" if text else ""


def run_notebook(text: str, directory: Path) -> str:
    """Run the cells of a notebook in a directory, and return the notebook with their outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    import nbclient
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    resources = {"metadata": {"path": str(directory)}}
    nbclient.NotebookClient(notebook, timeout=None, record_timing=False, resources=resources).execute()
    return nbformat.writes(notebook) + "\n"


@contextlib.contextmanager
def _enter(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    """Run a page or a notebook in an empty directory and rewrite its outputs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("page", type=Path, help="page in Markdown, or notebook")
    page = parser.parse_args().page.resolve()
    os.environ.update(_ENVIRONMENT)
    run = run_notebook if page.suffix == ".ipynb" else run_page
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # as for a new reader
        page.write_text(run(page.read_text(encoding="utf-8"), Path(directory)), encoding="utf-8")


if __name__ == "__main__":
    main()
