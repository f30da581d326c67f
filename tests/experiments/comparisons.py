"""Comparisons as experiments leave them, with made-up numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.dims import ModelDims
from slop_hf.experiments.comparison import Comparison, Cost, Curve, RunResult, StageResult
from slop_hf.schedule import GrowthSchedule, GrowthStage

CONFIG = {"model_type": "llama", "vocab_size": 512}
RUN = {"model": {"model_type": "llama"}, "data": {"vocab_size": 512, "block_size": 128}}
FLOPS = 5e12
SPEED = 2e10  # FLOPs a second
INITIAL = ModelDims(24, 64, 3, 3)
LAYER = INITIAL.replace(num_hidden_layers=4)
FFN = LAYER.replace(intermediate_size=240)
HIDDEN = FFN.replace(hidden_size=88, num_attention_heads=11, num_key_value_heads=11)
GROWN = (GrowthStage(("layer",), LAYER), GrowthStage(("ffn",), FFN), GrowthStage(("hidden", "mha"), HIDDEN))
ONE_STAGE = (GrowthStage(("layer", "ffn", "hidden", "mha"), HIDDEN),)

#: Name, stages of growth, final loss without noise, description.
ARMS: tuple[tuple[str, tuple[GrowthStage, ...], float, str], ...] = (
    ("slop", GROWN, 3.20, "the planner's best"),
    ("from-scratch", (), 3.30, ""),
    ("single-stage", ONE_STAGE, 3.25, ""),
    ("msg", GROWN, 3.29, ""),
    ("elle", ONE_STAGE, 3.31, ""),
    ("stacking", (GrowthStage(("layer",), HIDDEN),), 3.27, ""),
    ("copies", GROWN, 3.24, "function-preserving"),
    ("not-grown", (), 3.42, "the initial structure, trained on"),
)


def schedule_of(name: str, stages: Sequence[GrowthStage], flops: float) -> GrowthSchedule:
    """Stages that spend FLOPs alike."""
    initial = INITIAL if stages or name == "not-grown" else HIDDEN
    if name == "stacking":
        initial = HIDDEN.replace(num_hidden_layers=2)
    schedule = GrowthSchedule(initial, tuple(stages))
    each = flops / len(schedule.structures)
    return schedule.with_shares(
        [round(each / count_flops_per_token(dims, CONFIG, 128)) for dims in schedule.structures]
    )


def run_of(
    name: str, stages: Sequence[GrowthStage], loss: float, seed: int = 0, budget: float = 1.0, noise: float = 0.01
) -> RunResult:
    """A run that ends about a loss, noise by its seed."""
    dice = random.Random(f"{name} {seed} {budget}")
    schedule = schedule_of(name, stages, budget * FLOPS)
    end = loss - 0.35 * math.log(budget) + dice.gauss(0, noise)
    results, curve, flops, seconds = [], ([], [], [], []), 0.0, 0.0
    for number, (dims, tokens) in enumerate(zip(schedule.structures, schedule.tokens, strict=True)):
        spent = tokens * count_flops_per_token(dims, CONFIG, 128)
        took = spent / SPEED * dice.uniform(0.95, 1.05)
        for point in range(11):  # at a growth there are two losses: before it, and right after it
            at = (flops + spent * point / 10) / (budget * FLOPS)
            jump = 0.4 * math.exp(-point) if number else 0.0
            value = end + 0.6 * (1 - at) + 4 * math.exp(-12 * at) - 4 * math.exp(-12) + jump + dice.gauss(0, 0.002)
            entry = (number, flops + spent * point / 10, seconds + took * point / 10, value)
            for column, x in zip(curve, entry, strict=True):
                column.append(x)
        flops, seconds = flops + spent, seconds + took
        parameters = count_parameters(dims, CONFIG)
        grown = {"eval_loss_after_growth": curve[3][-11]} if number else {}
        name_of = schedule.stage_name(number)
        results.append(StageResult(name_of, dims, parameters, tokens, spent, took, curve[3][-1], **grown))
    facts = {"end_rate": 0.1, "optimizer_flops": 1e-3 * flops, "passes": 0.25}
    return RunResult(name, budget, seed, schedule, tuple(results), Curve(*map(tuple, curve)), **facts)


def comparison(
    arms: int | Sequence[str] = 8,
    seeds: int = 3,
    *,
    budgets: dict[str, tuple[float, ...]] | None = None,
    losses: dict[str, float] | None = None,
    **changes: Any,
) -> Comparison:
    """The first arms of `ARMS`, each with as many seeds; `changes` are made to the comparison."""
    chosen = [arm for arm in ARMS if arm[0] in arms] if not isinstance(arms, int) else ARMS[:arms]
    runs = [
        run_of(name, stages, (losses or {}).get(name, loss), seed, budget)
        for name, stages, loss, _ in chosen
        for budget in (budgets or {}).get(name, (1.0,))
        for seed in range(seeds)
    ]
    facts: dict[str, Any] = {
        "name": "table2",
        "scale": "nano",
        "title": "SLOP and other ways to the same target",
        "equal": "flops",
        "budget": FLOPS,
        "arms": {name: about for name, _, _, about in chosen},
        "runs": tuple(runs),
        "ledger": (
            Cost("runs", len(runs), sum(r.tokens for r in runs), sum(r.flops for r in runs), 4321.0),
            Cost("trunks", 2, 1_000_000, 3e11, 99.5),
        ),
        "reference": "from-scratch" if any(arm[0] == "from-scratch" for arm in chosen) else None,
        "settings": {"run": RUN},
        "versions": {"slop-hf": "0.1.0", "torch": "2.8.0"},
        "device": "two CPU cores",
    }
    return Comparison(**(facts | changes))
