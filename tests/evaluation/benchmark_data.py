"""Data for the paper's benchmarks in the columns of their data sets: a few made-up rows, and lm-eval's for BBH."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

COLOURS = ("red", "blue", "green", "white", "black", "brown")
TEXTS = [" ".join(f"the {name} door {number} was red" for number in range(40)) for name in ("old", "new")]


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


def _bbh() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the few-shot examples of each task of the group, as its questions."""
    import lm_eval.tasks

    found = {}
    for path in (Path(lm_eval.tasks.__file__).parent / "leaderboard" / "bbh_mc").glob("*.yaml"):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "group" not in task:
            shown = task["fewshot_config"]["samples"]
            found[task["task"]] = {"test": [{key: str(one[key]) for key in ("input", "target")} for one in shown]}
    return found


MADE_UP = {"piqa": _piqa, "hellaswag": _hellaswag, "lambada_openai": _lambada, "gsm8k": _gsm8k}


def write_data(directory: Path) -> Path:
    """Write the data of the paper's tasks as `TASK/SPLIT.jsonl`."""
    for task, splits in {**{task: make() for task, make in MADE_UP.items()}, **_bbh()}.items():
        for split, documents in splits.items():
            path = directory / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in documents))
    return directory
