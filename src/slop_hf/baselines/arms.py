"""The control arms: from a plan's ends and budget to another schedule between them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

from ..architectures import get_architecture
from ..cost.flops import DEFAULT_CONFIG
from ..errors import PlanError
from ..schedule import GrowthSchedule
from .equal_budget import BudgetKind, Purse, build_schedule
from .intermediate_dims import interpolate_dims

_MSG_SHARES = (1, 1, 1, 1, 1, 5)
_ELLE_SHARES = (25, 8)  # 62,500 steps, then 20,000 in every stage
_STACKING_SHARES = (5, 7, 28)  # 50,000, 70,000 and 280,000 steps


def from_scratch(
    schedule: GrowthSchedule,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    budget: BudgetKind = "flops",
) -> GrowthSchedule:
    """The target of `schedule` trained from random weights with the FLOPs of all its stages.

    The paper's Table 2 gives its from-scratch run equal tokens instead, and so 2.8 times the GPU hours.

    Args:
        schedule, config, sequence_length, budget: as in `single_stage`.

    Raises:
        ScheduleError: for a schedule without tokens.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> grown = GrowthSchedule(small, (GrowthStage(("layer",), large, tokens=10**6),), initial_tokens=10**6)
    >>> scratch = from_scratch(grown)
    >>> 10**6 < scratch.initial_tokens < 2 * 10**6
    True
    """
    purse = Purse.of(schedule, config, sequence_length, budget)
    return GrowthSchedule(schedule.target, initial_tokens=round(purse.total / purse.price(schedule.target)))


def single_stage(
    schedule: GrowthSchedule,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    budget: BudgetKind = "flops",
) -> GrowthSchedule:
    """The initial model, trained as the plan trains it, then grown to the target in one stage that has all the rest.

    SLOP, Table 2 ("SCHL-single stage"). The shares are our reading of its 207.92 GPU hours, which are those of 25B
    tokens of the initial model and 40B of the target.

    Args:
        schedule: a schedule with tokens.
        config: what growth leaves alone, see `cost`.
        sequence_length: tokens of a training sequence.
        budget: spend as many "flops" as the plan, or as many "tokens".

    Raises:
        ScheduleError: for a schedule without tokens.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, middle, large = ModelDims(64, 128, 2, 2), ModelDims(64, 256, 2, 2), ModelDims(64, 256, 8, 2)
    >>> plan = GrowthSchedule(small, (GrowthStage(("ffn",), middle, 40), GrowthStage(("layer",), large, 40)), 100)
    >>> arm = single_stage(plan, budget="tokens")
    >>> arm.sequence, arm.tokens
    ('lf', (100, 80))
    """
    purse = Purse.of(schedule, config, sequence_length, budget)
    tokens = schedule.initial_tokens
    rest = (purse.total - purse.price(schedule.initial) * tokens) / purse.price(schedule.target)
    return build_schedule([schedule.initial, schedule.target], [tokens, rest], purse)


#: Inits of the arm `copies`, by operator.
COPIES = {"layer": "preserving", "mha": "copy", "ffn": "copy", "hidden": "copy", "head_dim": "spread"}


def copies(
    schedule: GrowthSchedule,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    budget: BudgetKind = "flops",
) -> GrowthSchedule:
    """A single stage whose new entries are copies, so that the grown model begins as the small one ended.

    HyperCloning: Samragh et al. 2024, "Scaling Smart: Accelerating Large Language Model Pre-training with Small Model
    Initialization" (arXiv 2409.12903), which tiles a pretrained model's weights to a multiple of its width. Our
    reading for other ends: widths need not be multiples (`docs/exactness.md` tells what becomes of the rest), and new
    layers, which that paper does not add, are copies that begin by adding nothing. Shares as in `single_stage`.

    Args:
        schedule, config, sequence_length, budget: as in `single_stage`.

    Raises:
        ScheduleError: for a schedule without tokens.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> stage = GrowthStage(("hidden", "mha"), ModelDims(128, 128, 2, 4, head_dim=32), tokens=40)
    >>> copies(GrowthSchedule(ModelDims(64, 128, 2, 2), (stage,), 100), budget="tokens").stages[0].init
    {'mha': 'copy', 'hidden': 'copy'}
    """
    arm = single_stage(schedule, config, sequence_length, budget=budget)
    stages = (replace(one, init={name: COPIES[name] for name in one.operators}) for one in arm.stages)
    return replace(arm, stages=tuple(stages))


def msg(
    schedule: GrowthSchedule,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    budget: BudgetKind = "flops",
) -> GrowthSchedule:
    """One dimension a stage: ffn, layers halfway, hidden, heads, layers (MSG, Yao et al. 2023, arXiv 2305.02869).

    The order is that of the authors' scripts (github.com/cofe-ai/MSG, `scripts/grow_bert_base.sh`,
    `grow_bert_large.sh`), where layers go 3 → 6 → 12 and 6 → 12 → 24. So are the shares: a growth after every tenth of
    the steps, half of the steps after the last. The scripts are a quick start; the paper's own steps are in its
    Table 2.

    Our reading for other ends, and for decoders: layers grow by two equal factors. Heads have a stage of their own
    where the family can hold the target's hidden size with the initial heads, and grow together with hidden where it
    cannot. Key/value heads grow with the heads. `head_dim`, which the paper never grows, goes with hidden.

    The SLOP paper does not print its MSG schedules. The GPU hours of its Table 2 are those of ffn, layers, hidden with
    each grown once (101.96; 101.5 by our count), the hours of its Table 10 are not (119; 106.3).

    Args:
        schedule, config, sequence_length, budget: as in `single_stage`.

    Raises:
        ScheduleError: for a schedule without tokens.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(512, 768, 3, 8), ModelDims(768, 3072, 12, 12)
    >>> stage = GrowthStage(("layer", "mha", "ffn", "hidden"), large, tokens=500)
    >>> arm = msg(GrowthSchedule(small, (stage,), initial_tokens=500), budget="tokens")
    >>> arm.sequence, arm.tokens
    ('f-l-h-a-l', (100, 100, 100, 100, 100, 500))
    """
    initial, target = schedule.initial, schedule.target
    heads = {"num_attention_heads": target.num_attention_heads, "num_key_value_heads": target.num_key_value_heads}
    heads_wait = get_architecture(config).has_own_head_dim and target.hidden_size % initial.num_attention_heads == 0
    width = {"hidden_size": target.hidden_size, "head_dim": target.head_dim, **({} if heads_wait else heads)}
    halfway = round(math.sqrt(initial.num_hidden_layers * target.num_hidden_layers))
    structures = [initial, initial.replace(intermediate_size=target.intermediate_size)]
    for change in ({"num_hidden_layers": halfway}, width, heads):
        structures.append(structures[-1].replace(**change))
    purse = Purse.of(schedule, config, sequence_length, budget)
    return build_schedule([*structures, target], _MSG_SHARES, purse)


def elle(
    schedule: GrowthSchedule,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    budget: BudgetKind = "flops",
    stages: int | None = None,
) -> GrowthSchedule:
    """Width and depth together in every stage, by even parts (ELLE, Qin et al. 2022, arXiv 2203.06311, section 3).

    The authors' scripts (github.com/thunlp/ELLE, `train_base_prompt.sh`, `gpt_base_prompt.sh`) take 6 layers and 6
    heads of 64 to 12 and 12 in four stages, one for each new corpus, that add 2, 2, 1 and 1 of both. They train the
    first model for 62,500 steps and after each growth for 20,000. So parts are even with the larger ones first, and
    shares 25 : 8.

    Our reading, as a plan has no new corpora: as many stages as the plan has. Hidden follows the heads, which keep
    their size where both ends have the same; ffn follows hidden, in multiples of 256 where both ends are. The nearest
    structure that loads stands in for one that would not. Their larger model (`train_large_prompt.sh`) widens in
    its first two stages only; we keep to even parts.

    Args:
        schedule, config, sequence_length, budget: as in `single_stage`.
        stages: number of growths; default, the plan's.

    Raises:
        ScheduleError: for a schedule without tokens.
        PlanError: for a number of stages below 1.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(384, 1536, 6, 6), ModelDims(768, 3072, 12, 12)
    >>> stage = GrowthStage(("layer", "mha", "ffn", "hidden"), large, tokens=320)
    >>> arm = elle(GrowthSchedule(small, (stage,), initial_tokens=250), budget="tokens", stages=4)
    >>> arm.tokens, str(arm.stages[0].dims), str(arm.stages[2].dims)
    ((250, 80, 80, 80, 80), '(512, 2048, 8, 8)', '(704, 2816, 11, 11)')
    """
    count = max(len(schedule.stages), 1) if stages is None else stages
    if count < 1:
        raise PlanError(f"stages must be 1 or more, got {stages}; to grow in none, compare with from_scratch")
    structures = [schedule.initial]
    for number in range(1, count):
        structures.append(interpolate_dims(structures[-1], schedule.initial, schedule.target, number, count))
    first, later = _ELLE_SHARES
    purse = Purse.of(schedule, config, sequence_length, budget)
    return build_schedule([*structures, schedule.target], [first] + [later] * count, purse)


def stacking(
    schedule: GrowthSchedule,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    budget: BudgetKind = "flops",
) -> GrowthSchedule:
    """A shallow model of the target's width from random weights, its layers doubled twice by stacking.

    StackBERT: Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking". Its Algorithm 1 begins with
    `L / 2^k` layers; its experiments (section 4; code at github.com/gonglinyuan/StackingBERT) train 3, 6 and 12 layers
    for 50,000, 70,000 and 280,000 steps. Our reading: always two doublings, and halves are rounded up.

    Args:
        schedule, config, sequence_length, budget: as in `single_stage`; only the target and the budget count.

    Raises:
        ScheduleError: for a schedule without tokens.

    >>> from slop_hf import ModelDims
    >>> arm = stacking(GrowthSchedule(ModelDims(768, 3072, 12, 12), initial_tokens=400), budget="tokens")
    >>> [dims.num_hidden_layers for dims in arm.structures], arm.tokens
    ([3, 6, 12], (50, 70, 280))
    """
    depths = [math.ceil(schedule.target.num_hidden_layers / parts) for parts in (4, 2, 1)]
    structures = [schedule.target.replace(num_hidden_layers=depth) for depth in depths]
    purse = Purse.of(schedule, config, sequence_length, budget).from_random({"layer": "stack"})
    return build_schedule(structures, _STACKING_SHARES, purse)


class ControlArm(Protocol):
    """What makes a control arm of a plan."""

    def __call__(
        self, schedule: GrowthSchedule, config: Any = ..., sequence_length: int = ..., *, budget: BudgetKind = ...
    ) -> GrowthSchedule: ...


#: The arms by name.
ARMS: dict[str, ControlArm] = {
    "from_scratch": from_scratch,
    "single_stage": single_stage,
    "copies": copies,
    "msg": msg,
    "elle": elle,
    "stacking": stacking,
}

#: Those that begin with random weights, and not with the plan's initial model.
FROM_RANDOM = ("from_scratch", "stacking")
