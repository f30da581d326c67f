"""`recipes/grow_1b.py` as a rank of a launch; its settings are `output` and `words`, the other words to it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "recipes" / "grow_1b.py"


def main(settings: dict[str, Any]) -> None:
    sys.argv = [str(SCRIPT), "--output-dir", settings["output"], *settings["words"]]
    runpy.run_path(str(SCRIPT), run_name="__main__")
