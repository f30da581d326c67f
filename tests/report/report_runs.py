"""Run directories as training writes them, with made-up numbers and no weights."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.dims import ModelDims
from slop_hf.io.serialization import to_json
from slop_hf.runs.directory import EVAL_FILE, RECORD_FILE, SCHEDULE_FILE, STATE_FILE, RunDirectory
from slop_hf.runs.records import ConsumedTokens, EvalRecord, StageRecord
from slop_hf.schedule import GrowthSchedule, GrowthStage

CONFIG = {"model_type": "llama", "vocab_size": 512}
TOKENS_PER_STEP = 4096
STEPS = 100
INITIAL = ModelDims(64, 176, 2, 2)
LAYER = INITIAL.replace(num_hidden_layers=4)
FFN = LAYER.replace(intermediate_size=352)
HIDDEN = FFN.replace(hidden_size=128, num_attention_heads=4)

GROWN = GrowthSchedule(
    INITIAL,
    (
        GrowthStage(("layer",), LAYER, STEPS * TOKENS_PER_STEP),
        GrowthStage(("ffn",), FFN, STEPS * TOKENS_PER_STEP),
        GrowthStage(("hidden", "mha"), HIDDEN, STEPS * TOKENS_PER_STEP),
    ),
    initial_tokens=2 * STEPS * TOKENS_PER_STEP,
    scores={"delta_params": 1.69e14},
)
OTHER_ORDER = GrowthSchedule(
    INITIAL,
    (
        GrowthStage(
            ("hidden", "mha"), INITIAL.replace(hidden_size=128, num_attention_heads=4), STEPS * TOKENS_PER_STEP
        ),
        GrowthStage(
            ("ffn",),
            INITIAL.replace(hidden_size=128, num_attention_heads=4, intermediate_size=352),
            STEPS * TOKENS_PER_STEP,
        ),
        GrowthStage(("layer",), HIDDEN, STEPS * TOKENS_PER_STEP),
    ),
    initial_tokens=2 * STEPS * TOKENS_PER_STEP,
    scores={"delta_params": 9.3e14},
)
SCRATCH = GrowthSchedule(HIDDEN, initial_tokens=3 * STEPS * TOKENS_PER_STEP)


def write_run(
    path: Path,
    schedule: GrowthSchedule = GROWN,
    *,
    stages: int | None = None,
    seconds: float = 36.0,
    devices: int = 1,
    **changes: Any,
) -> RunDirectory:
    """Write a run whose first `stages` stages have finished; `changes` replace fields of every record."""
    path.mkdir(parents=True)
    schedule.to_yaml(path / SCHEDULE_FILE)
    noise = random.Random(len(schedule.stages))
    history: list[dict[str, Any]] = []
    step, tokens, flops = 0, 0, 0.0
    for number, (dims, stage_tokens) in enumerate(zip(schedule.structures, schedule.tokens, strict=True)):
        if number == (len(schedule.structures) if stages is None else stages):
            break
        per_token = count_flops_per_token(dims, CONFIG, 128)
        steps, floor = stage_tokens // TOKENS_PER_STEP, 4.2 - 0.12 * math.log(count_parameters(dims, CONFIG))
        before, losses = flops, {}
        for done in sorted({*range(0, steps, 5), steps}):
            at = {
                "step": step + done,
                "stage": number,
                "tokens": tokens + done * TOKENS_PER_STEP,
                "train_flops": flops + done * TOKENS_PER_STEP * per_token,
            }
            loss = floor + (3.4 if not number else 0.6) * math.exp(-done / 30) + 30 / (50 + step + done)
            if done:
                history.append({"loss": loss + noise.gauss(0, 0.03), "learning_rate": 1e-3, "grad_norm": 1.0, **at})
            if done % 50 == 0 or done == steps:
                losses[done] = loss + 0.05
                history.append({"eval_loss": loss + 0.05, "perplexity": math.exp(loss + 0.05), **at})
        history.append({"train_runtime": seconds, "train_loss": 3.0, "step": step + steps})
        step, tokens, flops = step + steps, tokens + stage_tokens, flops + stage_tokens * per_token
        record = StageRecord(
            stage=number,
            name=schedule.stage_name(number),
            dims=dims,
            parameters=count_parameters(dims, CONFIG),
            tokens=stage_tokens,
            total_tokens=tokens,
            first_token=tokens - stage_tokens,
            steps=steps,
            global_step=step,
            flops=flops - before,
            total_flops=flops,
            seconds=seconds * (number + 1),
            operators=schedule.stages[number - 1].operators if number else (),
            devices=devices,
            eval_loss=losses[steps],
            eval_loss_after_growth=losses[0] if number else None,
            perplexity=math.exp(losses[steps]),
            versions={"slop_hf": "0.1.0", "torch": "2.8.0"},
        )
        stage_dir = path / record.name
        stage_dir.mkdir()
        (stage_dir / RECORD_FILE).write_text(replace(record, **changes).to_json(), encoding="utf-8")
        (stage_dir / STATE_FILE).write_text(json.dumps({"log_history": history}), encoding="utf-8")
    return RunDirectory(path)


def write_evaluations(run: RunDirectory, tasks: Mapping[str, float], **facts: Any) -> RunDirectory:
    """Add evaluations to every finished stage: `tasks` are the scores of the last one, earlier scores are lower."""
    last = run.finished_stages - 1
    for record in run.records():
        share = 1 - 0.2 * (last - record.stage) / max(last, 1)
        scores = [
            EvalRecord(task, {"acc": score * share, "acc_norm": 1.1 * score * share}, {"acc": 0.01}, **facts)
            for task, score in tasks.items()
        ]
        scores.append(EvalRecord("perplexity", {"perplexity": record.perplexity or 0.0}))
        (run.stage_dir(record.stage) / EVAL_FILE).write_text(to_json(scores), encoding="utf-8")
    return run


def write_sources(run: RunDirectory, shares: Mapping[str, float]) -> RunDirectory:
    """Change the records to those of training on a mixture of sources, each of a million tokens."""
    for record in run.records():
        data = tuple(
            ConsumedTokens(name, int(record.first_token * share), int(record.total_tokens * share), 10**6, share)
            for name, share in shares.items()
        )
        losses = {name: (record.eval_loss or 3.0) + share - 0.5 for name, share in shares.items()}
        changed = replace(record, data=data, eval_losses=losses)
        (run.stage_dir(record.stage) / RECORD_FILE).write_text(changed.to_json(), encoding="utf-8")
    return run
