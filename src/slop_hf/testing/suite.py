"""The conformance suite: the cases of a family, and the checks of each."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..architectures import get_architecture
from ..cost.flops import count_parameters
from ..dims import ModelDims
from ..errors import DimsError, GrowthError
from ..growth import INITS, GrowthPlan, grow_model, grow_weights, hide_progress_bars, plan_growth
from ..growth.experts import FAMILIES_WITH_EXPERTS
from ..growth.plan import ParameterPlan
from ..operators import EXPERT_INITS, EXPERTS, get_operator, grow_dims
from ..schedule import GrowthStage
from .models import GQA, MHA, MQA, WINDOW, build_tiny_model, compute_logit_error, compute_logits, make_probe_tokens

#: Largest relative error of logits that counts as exact; in float64, `compute_logit_error` is float64 throughout.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
#: In half precision, exact growth errs at most this many times as much as casting the float32 model.
ROUNDING_FLOORS = 4.0

#: With tied embeddings and norms at the end of each branch (Gemma 2), it takes three steps until a gradient has
#: travelled from the embedding to the last norm.
STEPS_TO_LIFE = 3

#: The inits that leave old entries unchanged.
IN_PLACE = frozenset({"random", "stack", "interleave", "middle"})

#: A growth of the number of experts: family before it, new sizes, init.
ExpertGrowthCase: TypeAlias = tuple[str, Mapping[str, int], str]
#: Those whose errors are measured. The small models with experts have 4 of them.
EXPERT_GROWTHS: tuple[ExpertGrowthCase, ...] = (
    *((family, {"num_experts": 4}, "preserving") for family in FAMILIES_WITH_EXPERTS),
    *((family, {"num_experts": 16, "moe_intermediate_size": 10}, "preserving") for family in FAMILIES_WITH_EXPERTS),
    *((family, {"num_experts": 8}, init) for family in ("mixtral", "olmoe", "qwen3_moe") for init in EXPERT_INITS),
)


@dataclass(frozen=True)
class Case:
    """One growth of one small model.

    Args:
        family: `model_type` of the model.
        operator: operator, or a tuple of operators that grow in one stage.
        new_dims: structure after growth.
        init: name of the init; for several operators, also a mapping from operator to name.
        dims: structure before growth.
        tied: whether output and input embeddings share their weights.
        dtype: dtype of the weights.
        settings: further fields of the config.
        sizes: new sizes under the operator `experts`, which takes them in place of `new_dims`.

    >>> print(Case("llama", "ffn", ModelDims(48, 60, 2, 4), "copy"))
    llama ffn copy (48, 40, 2, 4) -> (48, 60, 2, 4) float32
    """

    family: str
    operator: str | tuple[str, ...]
    new_dims: ModelDims
    init: str | Mapping[str, str]
    dims: ModelDims = MHA
    tied: bool = False
    dtype: torch.dtype = torch.float32
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        operator = self.operator if isinstance(self.operator, str) else "+".join(self.operator)
        init = self.init if isinstance(self.init, str) else "+".join(self.init.values())
        marks = ["tied"] * self.tied
        marks += [f"{name}={value}" for name, value in {**self.settings, **self.sizes}.items()]
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([self.family, operator, init, f"{self.dims} -> {self.new_dims}", dtype, *marks])

    @property
    def arguments(self) -> tuple[str | GrowthStage, ModelDims | Mapping[str, int] | None, str | None]:
        """`operator`, `new_dims` and `init` of `grow_model`."""
        if self.sizes and isinstance(self.operator, str) and isinstance(self.init, str):
            return self.operator, self.sizes, self.init
        if isinstance(self.operator, str) and isinstance(self.init, str):
            return self.operator, self.new_dims, self.init
        operators = (self.operator,) if isinstance(self.operator, str) else self.operator
        init = self.init if isinstance(self.init, str) else dict(self.init)
        return GrowthStage(operators, self.new_dims, init=init), None, None

    def build_source(self, seed: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Build the model to grow, in the case's dtype unless another is given."""
        return build_tiny_model(self.family, self.dims, dtype or self.dtype, self.tied, seed=seed, **self.settings)

    def plan(self, source: PreTrainedModel, seed: int) -> GrowthPlan:
        operator, new_dims, init = self.arguments
        return plan_growth(source.config, operator, new_dims, init=init, seed=seed)

    def grow(self, source: PreTrainedModel, seed: int) -> PreTrainedModel:
        operator, new_dims, init = self.arguments
        return grow_model(source, operator, new_dims, init=init, seed=seed)


@dataclass(frozen=True)
class Result:
    """The outcome of a case.

    Args:
        refused: reason why the library did not grow it; "" if it did, and only then do the other fields have a value.
        preserves: whether the plan says that the function is preserved.
        error: `compute_logit_error` of the growth; nan if it was refused.
        floor: error of casting the float32 source to the case's dtype or, if that does not explain `error`, the larger
            error of casting the float32 grown model; 0 for float32 and wider.
        live: fraction of the new entries with a gradient at once; nan if not measured.
    """

    case: Case
    refused: str = ""
    preserves: bool = False
    error: float = math.nan
    floor: float = 0.0
    live: float = math.nan

    @property
    def tolerance(self) -> float:
        """The largest error with which the growth counts as exact."""
        return TOLERANCE.get(self.case.dtype, ROUNDING_FLOORS * self.floor)


def list_conformance_cases(model_type: str, dtype: torch.dtype = torch.float32, *, every: bool = True) -> list[Case]:
    """Return the cases of a family: operators × inits × {MHA, GQA, MQA} × {untied, tied} × {factor 2, factor 1.5}.

    Optional parameters, such as biases, exist in the cases with factor 1.5. Two cases more grow the first layers of a
    model without any. Families whose key/value heads are fused
    with the query heads have MHA only. All registered operators and inits are covered, including a third party's.

    Args:
        model_type: family with an axis table.
        dtype: dtype of the weights.
        every: False for one case per operator and init, in which factor, attention and tying take turns.
    """
    table = get_architecture({"model_type": model_type})
    heads = (MHA, GQA, MQA) if table.has_grouped_heads else (MHA,)
    sources = [(dims, tied) for tied in (False, True) for dims in heads]
    # In half precision, rounding decides near-ties of the router, and another expert changes the logits at once.
    is_rounded = table.has_experts and dtype not in TOLERANCE
    routing = {"num_experts_per_tok": table.read(table.test_settings, "num_experts")} if is_rounded else {}
    cases = []
    pairs = ((operator, init) for operator, inits in INITS.items() for init in inits)
    for number, (operator, init) in enumerate(pairs):
        for is_uneven in (False, True) if every else (number % 2 == 0,):
            for dims, tied in sources if every else [sources[number % len(sources)]]:
                name = get_operator(operator).fields[0]
                changes = {name: getattr(dims, name) * (3 if is_uneven else 4) // 2}
                if name == "hidden_size" and not table.has_own_head_dim:
                    changes["num_attention_heads"] = changes[name] // dims.head_dim
                    changes["num_key_value_heads"] = (
                        changes["num_attention_heads"] * dims.num_key_value_heads // dims.num_attention_heads
                    )
                settings = {**dict.fromkeys(table.flags, is_uneven), **routing}
                cases.append(Case(model_type, operator, grow_dims(dims, changes), init, dims, tied, dtype, settings))
    for init, tied in (("random", False), ("preserving", True)):
        flagged = {**dict.fromkeys(table.flags, True), **routing}
        empty = MHA.replace(num_hidden_layers=0)
        cases.append(Case(model_type, "layer", MHA, init, empty, tied, dtype, flagged))
    return cases


def list_expert_cases(family: str, sizes: Mapping[str, int], init: str, dtype: torch.dtype) -> list[Case]:
    """Return the cases of a growth of the number of experts: {MHA, GQA, MQA} × {untied, tied}.

    Args:
        family, sizes, init: an entry of `EXPERT_GROWTHS`.
    """
    settings: dict[str, object] = {}
    if dtype not in TOLERANCE:  # all experts are active, as in `list_conformance_cases`
        table = get_architecture({"model_type": family})
        settings = {"num_experts_per_tok": table.read(table.test_settings, "num_experts")} if table.has_experts else {}
        sizes = {**sizes, "num_experts_per_tok": sizes["num_experts"]}
    sources = [(dims, tied) for tied in (False, True) for dims in (MHA, GQA, MQA)]
    return [Case(family, EXPERTS, dims, init, dims, tied, dtype, settings, sizes) for dims, tied in sources]


def check_conformance(model_type: str, dtype: torch.dtype = torch.float32, *, every: bool = True) -> list[Result]:
    """Check all cases of a family and return their results; arguments as for `list_conformance_cases`.

    Saving, loading and generating depend on a model's config and not on its weights, so they are checked with the
    first init that gives a config.

    Raises:
        AssertionError: for the first case that fails, naming the case and the fact that does not hold.
    """
    reloaded: set[str] = set()
    return [_check(case, 0, reloaded) for case in list_conformance_cases(model_type, dtype, every=every)]


def check(case: Case, *, seed: int = 0) -> Result:
    """Grow a case's model and check everything that growth promises about it.

    * Names, shapes and number of parameters agree with the table; the config has the new dims.
    * The source and torch's generator are unchanged; the same seed gives the same weights, another seed other weights.
    * Inits that keep old entries have them in place. If the plan says that the function is preserved,
      `compute_logit_error` is within `Result.tolerance`, and vice versa.
    * The model saves, loads in stock transformers with the same logits, and generates alike with and without cache.
    * Within `STEPS_TO_LIFE` steps, every new slot of every parameter gets a gradient: none is dead.

    Args:
        case: growth to check.
        seed: random seed of the source's weights and of the growth.

    Raises:
        AssertionError: naming the case and the fact that does not hold.

    >>> result = check(Case("llama", "hidden", MHA.replace(hidden_size=72), "preserving"))
    >>> result.preserves, result.error < 1e-5
    (True, True)
    """
    return _check(case, seed, set())


def _check(case: Case, seed: int, reloaded: set[str]) -> Result:
    """Check a case; saving, loading and generating only if the grown model's config is not yet in `reloaded`."""
    source = case.build_source(seed)
    try:
        plan = case.plan(source, seed)
    except (GrowthError, DimsError) as refusal:
        return Result(case, refused=str(refusal))
    before, config, state = _snapshot(source), source.config.to_dict(), torch.get_rng_state()
    grown = case.grow(source, seed)
    after = _snapshot(grown)
    same, other = (grow_weights(before, case.plan(source, number)) for number in (seed, seed + 1))
    _require(torch.equal(state, torch.get_rng_state()), case, "growth moved torch's global generator")
    is_unchanged = _are_equal(before, _snapshot(source)) and source.config.to_dict() == config
    _require(is_unchanged, case, "the source has changed")
    _require(_are_equal(after, same), case, f"seed {seed} gives other weights the second time")
    has_random = any(p.noise or any(axis.new_slots for axis in p.maps) for p in plan.parameters())
    _require(_are_equal(after, other) != has_random, case, "new entries do not depend on the seed")
    _check_shapes(case, plan, grown)
    if set(plan.inits.values()) <= IN_PLACE:
        _check_old_entries(case, plan, before, after)
    result = _measure_error(case, plan, source, grown, seed)
    if (config_text := grown.config.to_json_string(use_diff=False)) not in reloaded:
        _check_reload(case, grown)
        reloaded.add(config_text)
    return replace(result, live=_check_gradients(case, plan, grown))


def measure(case: Case, *, seed: int = 0) -> Result:
    """Measure the logit error of a case and check the plan's claim about it: `check` without the rest.

    Raises:
        AssertionError: if the plan says that the function is preserved and it is not, or vice versa.
    """
    source = case.build_source(seed)
    try:
        plan = case.plan(source, seed)
    except (GrowthError, DimsError) as refusal:
        return Result(case, refused=str(refusal))
    return _measure_error(case, plan, source, case.grow(source, seed), seed)


def _measure_error(case: Case, plan: GrowthPlan, source: PreTrainedModel, grown: PreTrainedModel, seed: int) -> Result:
    error, floor = compute_logit_error(source, grown), 0.0
    if case.dtype not in TOLERANCE:
        wide = case.build_source(seed, torch.float32)
        floor = compute_logit_error(wide, source)
        if plan.preserves and error > ROUNDING_FLOORS * floor:
            # A rounding error is one throw of the dice: the grown model's own rounding is a second one.
            wide = case.grow(wide, seed)
            floor = max(floor, compute_logit_error(wide, deepcopy(wide).to(case.dtype)))
    result = Result(case, "", plan.preserves, error, floor)
    is_exact = error <= result.tolerance
    if plan.preserves:
        fault = f"the plan says that the function is preserved, but logits differ by {error:.1e} of the largest"
        _require(is_exact, case, fault)
    elif case.dtype in TOLERANCE:  # a small change of the function drowns in the rounding of half precision
        fault = "the function is preserved, but GrowthPlan.preserves denies it; is the init in EXACT?"
        _require(not is_exact, case, fault)
    return result


def _require(holds: bool, case: Case, fault: str) -> None:
    if not holds:
        raise AssertionError(f"{case}: {fault}")


def _snapshot(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _check_shapes(case: Case, plan: GrowthPlan, grown: PreTrainedModel) -> None:
    actual = {name: tuple(parameter.shape) for name, parameter in grown.named_parameters()}
    planned = {parameter.name: parameter.new_shape for parameter in plan.parameters()}
    for name in sorted(actual.keys() | planned.keys()):
        shapes = actual.get(name), planned.get(name)
        _require(shapes[0] == shapes[1], case, f"{name} has shape {shapes[0]}, by the table {shapes[1]}")
    count = int(count_parameters(plan.new, grown.config))
    _require(count == grown.num_parameters(), case, f"has {grown.num_parameters()} parameters, by the table {count}")
    dims = ModelDims.from_config(grown.config)
    _require(dims == case.new_dims, case, f"the config has the dims {dims}")
    _require({p.dtype for p in grown.parameters()} == {case.dtype}, case, "the dtype has changed")
    is_tied = grown.get_input_embeddings().weight is grown.get_output_embeddings().weight
    _require(is_tied == case.tied, case, "embeddings are not tied as the source's are")


def _check_old_entries(
    case: Case, plan: GrowthPlan, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> None:
    for p in plan.parameters():
        if p.takes_nothing:
            continue
        sources = [axis.source for axis in p.maps]
        kept = [[(slot, old) for slot, old in enumerate(source) if old is not None] for source in sources]
        slots = [torch.tensor([slot for slot, _ in pairs], dtype=torch.long) for pairs in kept]
        olds = [torch.tensor([old for _, old in pairs], dtype=torch.long) for pairs in kept]
        old = before[p.source][torch.meshgrid(*olds, indexing="ij")]
        new = after[p.name][torch.meshgrid(*slots, indexing="ij")]
        _require(torch.equal(new, old), case, f"old entries of {p.name} are not in place")


def _check_reload(case: Case, grown: PreTrainedModel) -> None:
    tokens = make_probe_tokens()
    with tempfile.TemporaryDirectory() as directory, hide_progress_bars():
        grown.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=case.dtype,
            attn_implementation=grown.config._attn_implementation,
            experts_implementation=grown.config._experts_implementation,
            trust_remote_code=False,
        )
    is_same = torch.equal(compute_logits(grown, tokens), compute_logits(loaded, tokens))
    _require(is_same, case, "logits differ after saving and loading")
    if case.dtype not in TOLERANCE:
        loaded = loaded.float()  # half precision rounds differently with a cache, which can decide near-ties
    # The prompt ends inside the sliding window, and the generated text leaves it.
    prompt = make_probe_tokens(WINDOW - 1)[:1]
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3, "do_sample": False}
    texts = [loaded.generate(prompt, use_cache=use_cache, **settings) for use_cache in (True, False)]
    _require(torch.equal(*texts), case, "generates other tokens with its cache than without")


def _check_gradients(case: Case, plan: GrowthPlan, grown: PreTrainedModel) -> float:
    """Return the fraction of new entries with a gradient at once; check that each new slot gets one soon."""
    live = _step_and_find_live(grown)
    is_live = torch.cat([live[p.name][_mask_new_entries(p)] for p in plan.parameters()])
    for p in plan.parameters():
        _require(not p.zeroed or bool(live[p.name].any()), case, f"{p.name} of an inserted layer has no gradient")
    for _ in range(STEPS_TO_LIFE):
        if not _find_dead_slots(plan, live):
            break
        live = {name: entries | live[name] for name, entries in _step_and_find_live(grown).items()}
    dead = _find_dead_slots(plan, live)
    _require(not dead, case, f"new slots of {dead} have no gradient in {STEPS_TO_LIFE} steps")
    return float(is_live.double().mean()) if len(is_live) else 1.0


def _step_and_find_live(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return which entries have a gradient on the probe; then take a gradient step of equal size in all parameters."""
    tokens = make_probe_tokens()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    live = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            live[name] = gradient != 0
            parameter.sub_(gradient * (0.05 / gradient.abs().max().clamp(min=1e-30)))
    return live


def _mask_new_entries(parameter: ParameterPlan) -> torch.Tensor:
    """Return a mask of new entries: those in new slots, or all of a zeroed parameter."""
    new = torch.full(parameter.new_shape, parameter.zeroed)
    for dimension, axis in enumerate(parameter.maps):
        new.index_fill_(dimension, torch.tensor(axis.new_slots, dtype=torch.long), True)
    return new


def _find_dead_slots(plan: GrowthPlan, live: Mapping[str, torch.Tensor]) -> str:
    """Return the first parameter with a new slot without a live entry; "" if all have one."""
    for p in plan.parameters():
        for dimension, axis in enumerate(p.maps):
            by_slot = live[p.name].movedim(dimension, 0)[axis.new_slots]
            if not all(bool(slot.any()) for slot in by_slot):
                return f"{p.name} (dimension {dimension})"
    return ""
