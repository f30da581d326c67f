"""An experiment small enough for a test: a few seconds a run, over a few text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

#: The two that grow differ in the init of their last stage alone.
ARMS: dict[str, Any] = {
    "slop": {"plan": "best"},
    "preserving": {"plan": "best", "training": {"growth_init": {"hidden": "preserving", "mha": "preserving"}}},
    "from-scratch": {"control": "from_scratch", "budgets": [0.5, 1.0]},
}


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an experiment of three arms at one scale, `tiny`."""
    home = tmp_path_factory.mktemp("experiment")
    (home / "texts").mkdir()
    for number in range(40):
        (home / "texts" / f"{number}.txt").write_text(" ".join(str(number * k) for k in range(60)))
    data = {"source": str(home / "texts"), "vocab_size": 300, "block_size": 32, "held_out": 0.2}
    run = {
        "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
        "data": {**data, "cache_dir": str(home / "cache")},
        "training": {
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_steps": 20,
        },
    }
    scale = {"run": run, "structures": {"initial": "16,32,2,2", "target": "32,64,3,4"}, "flops": 3e8, "seeds": [0]}
    content = {"title": "A tiny experiment", "arms": ARMS, "scales": {"tiny": scale}}
    (home / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return home / "tiny.yaml"
