"""It grows: a ladder of depths at micro scale compared with the target from scratch, arm after arm."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time

from common import Settings
from measuring import ROOT

import slop_hf
from slop_hf import Experiment, GrowthSchedule, GrowthStage, ModelDims
from slop_hf.io.serialization import Json

EXPERIMENT = ROOT / "recipes/experiments/depth_ladder.yaml"
#: Changes that make the experiment run on a CPU within seconds.
REHEARSAL: dict[str, Json] = {
    "scales.micro.structures": {"initial": "16,32,1,2", "target": "16,32,4,2"},
    "scales.micro.flops": 3.0e8,
    "run.model.max_position_embeddings": 32,
    "run.data.vocab_size": 300,
    "run.data.block_size": 32,
    "run.data.held_out": 0.2,
    "run.training.batch_tokens": [128],
    "run.training.per_device_train_batch_size": 4,
    "run.training.per_device_eval_batch_size": 4,
    "run.training.use_cpu": True,
    "run.training.eval_steps": 1000,
}
REHEARSED_ARMS = 2
#: The ladder of the rehearsal.
TOY = GrowthSchedule(
    ModelDims(16, 32, 1, 2),
    (GrowthStage(("layer",), ModelDims(16, 32, 2, 2), 10), GrowthStage(("layer",), ModelDims(16, 32, 4, 2), 10)),
    25,
)


def run(settings: Settings) -> None:
    """Train as many arms as the time allows, in the experiment's order; the record holds those that have ended."""
    began = time.monotonic()
    changes: dict[str, Json] = dict(REHEARSAL) if settings.rehearses else {}
    if settings.rehearses:
        changes |= {**write_texts(settings), "arms.ladder.schedule": json.loads(TOY.to_json())}
    if settings.text is not None:
        changes["run.data.source"] = settings.text
    if settings.cache is not None:
        changes["run.data.cache_dir"] = settings.cache
    experiment = Experiment.from_yaml(EXPERIMENT, "micro", changes)
    names = list(experiment.arms)[: REHEARSED_ARMS if settings.rehearses else None]
    longest = 0.0
    for count in range(1, len(names) + 1):
        arm_began = time.monotonic()
        if arm_began - began + longest > settings.seconds:  # it would be cut off
            break
        arms = {name: experiment.arms[name] for name in names[:count]}
        reference = experiment.reference if experiment.reference in arms else None
        some = dataclasses.replace(experiment, arms=arms, reference=reference)
        slop_hf.compare_arms(some, settings.workdir / "runs").save(settings.output)
        longest = max(longest, time.monotonic() - arm_began)
        print(f"  {names[count - 1]}: {time.monotonic() - arm_began:.0f} s", flush=True)
    shutil.rmtree(settings.workdir / "runs", ignore_errors=True)


def write_texts(settings: Settings) -> dict[str, Json]:
    """Write a few documents to rehearse with, and return the changes that name them."""
    texts = settings.workdir / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"file {number}: " + " ".join(str(number * k) for k in range(60)))
    return {"run.data.source": str(texts), "run.data.cache_dir": str(settings.workdir / "cache")}
