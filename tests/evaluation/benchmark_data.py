"""Data of a few benchmarks as their datasets have it, small and made up, and a task of the group that stands for BBH."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green", "white", "black", "brown")
BBH_TASK = "leaderboard_bbh_boolean_expressions"


def _piqa() -> dict[str, list[dict[str, Any]]]:
    rows = [
        {"goal": f"paint the door {name}", "sol1": f"take {name} paint", "sol2": "take a spoon", "label": number % 2}
        for number, name in enumerate(COLOURS)
    ]
    return {"train": rows, "validation": rows}


def _hellaswag() -> dict[str, list[dict[str, Any]]]:
    rows = [
        {
            "ind": number,
            "activity_label": "Painting",
            "ctx_a": f"A man opens a tin of {name} paint.",
            "ctx_b": "he",
            "ctx": f"A man opens a tin of {name} paint. he",
            "endings": ["paints the door.", "[title] eats it.", f"is {name}.", "sleeps."],
            "source_id": f"a~{number}",
            "split": "val",
            "split_type": "indomain",
            "label": str(number % 4),
        }
        for number, name in enumerate(COLOURS)
    ]
    return {"train": rows, "validation": rows}


def _lambada() -> dict[str, list[dict[str, Any]]]:
    return {"test": [{"text": f"the door was {name} and so the house was {name}"} for name in COLOURS]}


def _gsm8k() -> dict[str, list[dict[str, Any]]]:
    rows = [
        {"question": f"{n} doors and {n} more?", "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(1, 9)
    ]
    return {"train": rows, "test": rows[:3]}


def _bbh() -> dict[str, list[dict[str, Any]]]:
    return {"test": [{"input": f"not {value} is", "target": str(not value)} for value in (True, False, True)]}


DATA = {
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "gsm8k": _gsm8k,
    BBH_TASK: _bbh,
}


def write_data(directory: Path, *tasks: str) -> Path:
    """Write the data of tasks, by default of all, as `TASK/SPLIT.jsonl`."""
    for task in tasks or DATA:
        for split, rows in DATA[task]().items():
            path = directory / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
