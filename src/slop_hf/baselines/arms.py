"""The control arms: each builds another schedule between the ends of a plan, with the plan's budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ..architectures import get_architecture
from ..cost.flops import DEFAULT_CONFIG
from ..dims import ModelConfig
from ..errors import PlanError
from ..io.numbers import require_whole_number
from ..schedule import MOST_STAGES, GrowthSchedule
from .equal_budget import ArmRequest, BudgetKind
from .intermediate_dims import interpolate_dims


def from_scratch(
    schedule: GrowthSchedule,
    config: ModelConfig = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    budget: BudgetKind = "flops",
) -> GrowthSchedule:
    """Return the training of a plan's target from random weights, with the training FLOPs of all its stages.

    The paper's Table 2 gives its from-scratch run equal tokens instead, and therefore 2.8 times the GPU hours.

    Args:
        schedule: plan with tokens.
        config: settings that growth does not change, see `slop_hf.cost.flops`.
        sequence_length: tokens per training sequence.
        budget: spend as many "flops" as the plan, or as many "tokens".

    Raises:
        ScheduleError: if the plan has no tokens.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> grown = GrowthSchedule(small, (GrowthStage(("layer",), large, tokens=10**6),), initial_tokens=10**6)
    >>> scratch = from_scratch(grown)
    >>> 10**6 < scratch.initial_tokens < 2 * 10**6
    True
    """
    return _train_target(ArmRequest(schedule, config, sequence_length, budget))


def _train_target(request: ArmRequest) -> GrowthSchedule:
    target = request.schedule.target
    tokens = round(request.total / request.cost_per_token(target))
    return replace(request.schedule, initial=target, stages=(), initial_tokens=tokens, scores={})


def single_stage(request: ArmRequest) -> GrowthSchedule:
    """Return the plan's initial model, trained as in the plan, then grown to the target in one stage with the rest.

    SLOP, Table 2 ("SCHL-single stage"). The shares are our reading of its 207.92 GPU hours, which are the hours of
    25B tokens of the initial model and 40B of the target.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, middle, large = ModelDims(64, 128, 2, 2), ModelDims(64, 256, 2, 2), ModelDims(64, 256, 8, 2)
    >>> plan = GrowthSchedule(small, (GrowthStage(("ffn",), middle, 40), GrowthStage(("layer",), large, 40)), 100)
    >>> arm = single_stage(ArmRequest(plan, budget="tokens"))
    >>> arm.sequence, arm.tokens
    ('lf', (100, 80))
    """
    initial, target, tokens = request.schedule.initial, request.schedule.target, request.schedule.initial_tokens
    rest = (request.total - request.cost_per_token(initial) * tokens) / request.cost_per_token(target)
    return request.build_schedule([initial, target], [tokens, rest])


def copies(request: ArmRequest) -> GrowthSchedule:
    """Return a single stage whose new entries are copies, so that the grown model starts where the small one ended.

    HyperCloning: Samragh et al. 2024, "Scaling Smart: Accelerating Large Language Model Pre-training with Small Model
    Initialization" (arXiv 2409.12903), which tiles a pretrained model's weights to a multiple of its width. Our
    reading for other ends: widths need not be multiples (`docs/exactness.md` describes the remainder), and new layers,
    which that paper does not add, are copies that add nothing at first. Shares as in `single_stage`.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> stage = GrowthStage(("hidden", "mha"), ModelDims(128, 128, 2, 4, head_dim=32), tokens=40)
    >>> plan = GrowthSchedule(ModelDims(64, 128, 2, 2), (stage,), 100)
    >>> copies(ArmRequest(plan, budget="tokens")).stages[0].init
    {'mha': 'copy', 'hidden': 'copy'}
    """
    arm = single_stage(request)
    inits = {"layer": "preserving", "mha": "copy", "ffn": "copy", "hidden": "copy", "head_dim": "spread"}
    stages = (replace(stage, init={name: inits[name] for name in stage.operators}) for stage in arm.stages)
    return replace(arm, stages=tuple(stages))


def msg(request: ArmRequest) -> GrowthSchedule:
    """Return growth by one dimension per stage: ffn, layers halfway, hidden, heads, layers.

    MSG: Yao et al. 2023, arXiv 2305.02869. The order is the one of the authors' scripts (github.com/cofe-ai/MSG,
    `scripts/grow_bert_base.sh`, `grow_bert_large.sh`), where layers go 3 → 6 → 12 and 6 → 12 → 24. So are the shares:
    a growth after every tenth of the steps, and half of the steps after the last. The scripts are a quick start; the
    paper's own steps are in its Table 2.

    Our reading for other ends, and for decoders: layers grow by two equal factors. Heads have a stage of their own if
    the family can hold the target's hidden size with the initial heads, and otherwise grow together with hidden.
    Key/value heads grow with the heads. `head_dim`, which the paper never grows, grows with hidden.

    The SLOP paper does not print its MSG schedules. The GPU hours of its Table 2 agree with ffn, layers, hidden, each
    grown once (101.96; 101.5 by our count), the hours of its Table 10 do not (119; 106.3).

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(512, 768, 3, 8), ModelDims(768, 3072, 12, 12)
    >>> stage = GrowthStage(("layer", "mha", "ffn", "hidden"), large, tokens=500)
    >>> arm = msg(ArmRequest(GrowthSchedule(small, (stage,), initial_tokens=500), budget="tokens"))
    >>> arm.sequence, arm.tokens
    ('f-l-h-a-l', (100, 100, 100, 100, 100, 500))
    """
    initial, target = request.schedule.initial, request.schedule.target
    heads = {"num_attention_heads": target.num_attention_heads, "num_key_value_heads": target.num_key_value_heads}
    family = get_architecture(request.config)
    has_heads_stage = family.has_own_head_dim and target.hidden_size % initial.num_attention_heads == 0
    width = {"hidden_size": target.hidden_size, "head_dim": target.head_dim, **({} if has_heads_stage else heads)}
    halfway = round(math.sqrt(initial.num_hidden_layers * target.num_hidden_layers))
    structures = [initial, initial.replace(intermediate_size=target.intermediate_size)]
    for change in ({"num_hidden_layers": halfway}, width, heads):
        structures.append(structures[-1].replace(**change))
    return request.build_schedule([*structures, target], (1, 1, 1, 1, 1, 5))


def elle(request: ArmRequest, *, stages: int | None = None) -> GrowthSchedule:
    """Return growth of width and depth together in every stage, in even parts.

    ELLE: Qin et al. 2022, arXiv 2203.06311, section 3. The authors' scripts (github.com/thunlp/ELLE,
    `train_base_prompt.sh`, `gpt_base_prompt.sh`) grow 6 layers and 6 heads of 64 to 12 and 12 in four stages, one per
    new corpus, which add 2, 2, 1 and 1 of both. They train the first model for 62,500 steps, and for 20,000 after each
    growth. So parts are even with the larger ones first, and shares are 25 : 8.

    Our reading, as a plan has no new corpora: as many stages as the plan has. Hidden follows the heads, which keep
    their size if both ends have the same; ffn follows hidden, in multiples of 256 if both ends are multiples. A
    structure that would not load is replaced by the nearest one that does. The authors' larger model
    (`train_large_prompt.sh`) widens in its first two stages only; we keep to even parts.

    Args:
        request: plan and budget.
        stages: number of growths; default, the plan's.

    Raises:
        PlanError: if `stages` is below 1.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(384, 1536, 6, 6), ModelDims(768, 3072, 12, 12)
    >>> stage = GrowthStage(("layer", "mha", "ffn", "hidden"), large, tokens=320)
    >>> plan = GrowthSchedule(small, (stage,), initial_tokens=250)
    >>> arm = elle(ArmRequest(plan, budget="tokens"), stages=4)
    >>> arm.tokens, str(arm.stages[0].dims), str(arm.stages[2].dims)
    ((250, 80, 80, 80, 80), '(512, 2048, 8, 8)', '(704, 2816, 11, 11)')
    """
    plan = request.schedule
    count = max(len(plan.stages), 1) if stages is None else stages
    require_whole_number(count, "stages", most=MOST_STAGES, error=PlanError)
    structures = [plan.initial]
    for number in range(1, count):
        structures.append(interpolate_dims(structures[-1], plan.initial, plan.target, number, count))
    return request.build_schedule([*structures, plan.target], [25] + [8] * count)


def stacking(request: ArmRequest) -> GrowthSchedule:
    """Return a shallow model of the target's width from random weights, its layers doubled twice by stacking.

    StackBERT: Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking". Its Algorithm 1 begins with
    `L / 2^k` layers; its experiments (section 4; code at github.com/gonglinyuan/StackingBERT) train 3, 6 and 12 layers
    for 50,000, 70,000 and 280,000 steps. Our reading: always two doublings, and halves are rounded up.

    Of the plan, only the target and the budget count.

    >>> from slop_hf import ModelDims
    >>> plan = GrowthSchedule(ModelDims(768, 3072, 12, 12), initial_tokens=400)
    >>> arm = stacking(ArmRequest(plan, budget="tokens"))
    >>> [dims.num_hidden_layers for dims in arm.structures], arm.tokens
    ([3, 6, 12], (50, 70, 280))
    """
    target = request.schedule.target
    structures = [target.replace(num_hidden_layers=math.ceil(target.num_hidden_layers / parts)) for parts in (4, 2, 1)]
    return request.build_schedule(structures, (5, 7, 28), {"layer": "stack"}, from_random=True)


#: Builders of control arms, by name.
ARMS: dict[str, Callable[[ArmRequest], GrowthSchedule]] = {
    "from_scratch": _train_target,
    "single_stage": single_stage,
    "copies": copies,
    "msg": msg,
    "elle": elle,
    "stacking": stacking,
}

#: Arms that begin with random weights instead of the plan's initial model.
FROM_RANDOM = ("from_scratch", "stacking")
