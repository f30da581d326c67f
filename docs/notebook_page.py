"""A notebook as Markdown, for a page of the documentation.

A page has a marker `<!-- notebook: PATH -->`, and `conf.py` puts the cells of that notebook in its place.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARKER = re.compile(r"<!-- notebook: (\S+) -->")


def fill_page(text: str) -> str:
    """Return a page with the cells of notebooks in place of its markers."""
    return _MARKER.sub(lambda marker: write_cells((ROOT / marker[1]).read_text(encoding="utf-8")), text)


def write_cells(notebook: str) -> str:
    """Return the cells of a notebook, with their outputs.

    >>> cell = {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"text": ["2"]}]}
    >>> print(write_cells(json.dumps({"cells": [cell]})))
    ```python
    1 + 1
    ```
    <BLANKLINE>
    ```text
    2
    ```
    """
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += map(_write_output, cell.get("outputs", ()))
    return "\n\n".join(parts)


def _write_output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"].split())
        return f'<img alt="Figure of the cell above" src="data:image/png;base64,{picture}">'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"
