"""Run files of tiny models over a few text files of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write_run_file(
    home: Path, schedule: Mapping[str, Any], training: Mapping[str, Any], *, texts: int = 20, held_out: float = 0.1
) -> Path:
    """Write texts and `run.yaml` into a directory, and return the path of the file."""
    (home / "texts").mkdir()
    for number in range(texts):
        (home / "texts" / f"{number}.txt").write_text(" ".join(str(number * k) for k in range(60)))
    content = {
        "schedule": schedule,
        "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
        "data": {
            "source": str(home / "texts"),
            "vocab_size": 300,
            "block_size": 32,
            "held_out": held_out,
            "cache_dir": str(home / "cache"),
        },
        "training": {"use_cpu": True, "disable_tqdm": True, **training},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(content))
    return home / "run.yaml"
