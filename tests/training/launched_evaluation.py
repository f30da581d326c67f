"""Program that evaluates several numbers of held-out blocks in several batch sizes.

Its settings are `output`, the directory of the run and of one result file per rank, and `use_cpu`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from training_runs import blocks, small_model, trainer
from transformers import EvalPrediction

#: Numbers of held-out blocks, and blocks per batch and device.
CASES = ((1, 4), (7, 2), (8, 8), (12, 2), (13, 4))


def mask_some(rows: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return blocks that predict fewer and fewer of their tokens; the last one predicts none."""
    masked = []
    for number, row in enumerate(rows):
        labels = row["labels"].clone()
        labels[: 1 + len(labels) * (number + 1) // len(rows)] = -100
        masked.append({**row, "labels": labels})
    return masked


def count_rows(prediction: EvalPrediction) -> dict[str, float]:
    """Return facts about all rows that depend on each of them."""
    return {
        "rows": float(len(prediction.label_ids)),
        "labels": float(prediction.label_ids.sum()),
        "tops": float(prediction.predictions.argmax(-1).sum()),
    }


def evaluate_cases(output: Path, use_cpu: bool = True) -> dict[str, dict[str, float]]:
    """Return the metrics of each case, and the number of forward passes that this rank ran."""
    results = {}
    run = trainer(output / "run", model=small_model(dropout=0.0), use_cpu=use_cpu, compute_metrics=count_rows)
    passes: list[int] = []
    run.model.register_forward_hook(lambda *_: passes.append(1))
    for rows, batch in CASES:
        run.args.per_device_eval_batch_size = batch
        data: dict[str, Any] = {"full": blocks(rows, seed=rows)}
        data["masked"] = mask_some(blocks(rows + 1, seed=rows))
        passes.clear()
        metrics = run.evaluate(data)
        results[f"{rows} in {batch}"] = {
            name: value for name, value in metrics.items() if name.endswith(("loss", "rows", "labels", "tops"))
        } | {"passes": len(passes)}
    return results


def main(settings: dict[str, Any]) -> None:
    path = Path(settings["output"])
    found = evaluate_cases(path, settings["use_cpu"])
    (path / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
