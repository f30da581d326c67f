"""The cases of a family and what is checked about each one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..architectures import get_architecture
from ..cost.flops import count_parameters
from ..dims import ModelDims
from ..errors import DimsError, GrowthError
from ..growth import INITS, GrowthPlan, grow_model, grow_weights, hide_progress_bars, plan_growth
from ..growth.axes import AxisMap
from ..growth.plan import ParameterPlan
from ..operators import get_operator
from ..schedule import GrowthStage
from .models import GQA, MHA, MQA, WINDOW, logit_error, logits, probe, tiny_model

#: Largest relative error of logits that counts as exact; in float64, of `logit_error`'s float64 throughout.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
#: In half precision, exact growth errs at most this many times as much as casting the float32 model, before or after.
ROUNDING_FLOORS = 4.0

#: Under tied embeddings and norms behind each block (Gemma 2) it takes three steps until a gradient has found its way
#: from the embedding to the last norm.
STEPS_TO_LIFE = 3

#: The inits that leave old entries as they are.
IN_PLACE = frozenset({"random", "stack", "interleave"})


@dataclass(frozen=True)
class Case:
    """One growth of one small model.

    Args:
        family: its `model_type`.
        operator: the operator; a tuple of several grows them in one stage.
        new_dims: the structure to grow to.
        init: its name; for several operators, also a mapping.
        dims: the structure to grow from.
        tied: whether output and input embeddings share their weights.
        dtype: of the weights.
        settings: further fields of the config.

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
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        operator = self.operator if isinstance(self.operator, str) else "+".join(self.operator)
        init = self.init if isinstance(self.init, str) else "+".join(self.init.values())
        marks = ["tied"] * self.tied + [f"{name}={value}" for name, value in self.settings.items()]
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([self.family, operator, init, f"{self.dims} -> {self.new_dims}", dtype, *marks])

    @property
    def request(self) -> tuple[str | GrowthStage, ModelDims | None, str | None]:
        """`operator`, `new_dims` and `init` of `grow_model`."""
        if isinstance(self.operator, str) and isinstance(self.init, str):
            return self.operator, self.new_dims, self.init
        operators = (self.operator,) if isinstance(self.operator, str) else self.operator
        init = self.init if isinstance(self.init, str) else dict(self.init)
        return GrowthStage(operators, self.new_dims, init=init), None, None


@dataclass(frozen=True)
class Result:
    """What a case showed.

    Args:
        case: the case.
        refused: why the library would not grow it; "" where it did, and then the rest holds.
        preserves: whether the plan says that the function stays.
        error: `logit_error` of the growth; nan where it was refused.
        floor: that of casting the float32 source to the case's dtype or, where that does not explain the error, the
            larger one of casting the float32 grown model; 0 for float32 and wider.
        live: share of new entries that have a gradient at once, of 1; nan where that was not measured.
    """

    case: Case
    refused: str = ""
    preserves: bool = False
    error: float = math.nan
    floor: float = 0.0
    live: float = math.nan

    @property
    def tolerance(self) -> float:
        """The error up to which the growth counts as exact."""
        return TOLERANCE.get(self.case.dtype, ROUNDING_FLOORS * self.floor)


def conformance_cases(model_type: str, dtype: torch.dtype = torch.float32, *, every: bool = True) -> list[Case]:
    """The cases of a family: operators × inits × {MHA, GQA, MQA} × {untied, tied} × {double, half as much again}.

    Optional parameters, such as biases, exist in the uneven ones. Families whose key/value heads are fused with the
    query heads have MHA alone. Registered operators and inits are all there, also a third party's.

    Args:
        model_type: a family with an axis table.
        dtype: of the weights.
        every: False takes one case for each operator and init, with size, attention and tying in rotation.
    """
    table = get_architecture({"model_type": model_type})
    grouped = any("key_value" in row.axes for row in table.parameters)
    flags = sorted({row.exists_if for row in table.parameters if row.exists_if})
    sources = [(dims, tied) for tied in (False, True) for dims in ((MHA, GQA, MQA) if grouped else (MHA,))]
    cases = []
    pairs = [(operator, init) for operator, inits in INITS.items() for init in inits]
    for number, (operator, init) in enumerate(pairs):
        for uneven in (False, True) if every else (number % 2 == 0,):
            chosen = sources if every else [sources[number % len(sources)]]
            for dims, tied in chosen:
                own = get_operator(operator).fields[0]
                changes = {own: getattr(dims, own) * (3 if uneven else 4) // 2}
                if own == "num_attention_heads" and dims.num_key_value_heads == dims.num_attention_heads:
                    changes["num_key_value_heads"] = changes[own]
                if own == "hidden_size" and not table.has_own_head_dim:
                    heads = changes[own] // dims.head_dim
                    changes.update(num_attention_heads=heads, num_key_value_heads=heads)
                settings = dict.fromkeys(flags, uneven)
                cases.append(Case(model_type, operator, dims.replace(**changes), init, dims, tied, dtype, settings))
    return cases


def conformance(model_type: str, dtype: torch.dtype = torch.float32, *, every: bool = True) -> list[Result]:
    """The results of all cases of a family; arguments as for `conformance_cases`.

    Raises:
        AssertionError: for the first case that fails, naming the case and the fact.
    """
    return [check(case) for case in conformance_cases(model_type, dtype, every=every)]


def check(case: Case, *, seed: int = 0) -> Result:
    """Grow a case's model and check all that growth promises about it.

    * Names, shapes and number of parameters are those of the table; the config has the new dims.
    * The source is untouched, and so is torch's generator; the same seed gives the same weights, another one others.
    * Inits that keep old entries have them in place; where the plan says that the function stays, `logit_error` is
      within `Result.tolerance`, and where it is, the plan says so.
    * The model saves, loads in stock transformers with the same logits, and generates alike with and without cache.
    * Within `STEPS_TO_LIFE` steps every new slot of every parameter has a gradient: none is dead for ever.

    Args:
        case: what to grow.
        seed: of the source's weights and of the growth.

    Raises:
        AssertionError: naming the case and the fact that fails.

    >>> result = check(Case("llama", "hidden", MHA.replace(hidden_size=72), "preserving"))
    >>> result.preserves, result.error < 1e-5
    (True, True)
    """
    source, plan = _plan(case, seed)
    if isinstance(plan, str):
        return Result(case, refused=plan)
    operator, new_dims, init = case.request
    before, config, state = _snapshot(source), source.config.to_dict(), torch.get_rng_state()
    grown = grow_model(source, operator, new_dims, init=init, seed=seed)
    after = _snapshot(grown)
    same, other = (
        grow_weights(before, plan_growth(source.config, operator, new_dims, init=init, seed=number))
        for number in (seed, seed + 1)
    )
    _fact(torch.equal(state, torch.get_rng_state()), case, "growth moved torch's global generator")
    _fact(_equal(before, _snapshot(source)) and source.config.to_dict() == config, case, "the source has changed")
    _fact(_equal(after, same), case, f"seed {seed} gives other weights the second time")
    draws = any(p.noise or any(run.old is None for axis in p.maps for run in axis.runs) for p in plan.parameters())
    _fact(_equal(after, other) != draws, case, "new entries do not depend on the seed")
    _check_shapes(case, plan, grown)
    if set(plan.inits.values()) <= IN_PLACE:
        _check_old_entries(case, plan, before, after)
    result = _measured(case, plan, source, grown, seed)
    _check_reload(case, grown)
    return replace(result, live=_check_gradients(case, plan, grown))


def measure(case: Case, *, seed: int = 0) -> Result:
    """The logit error of a case, and the check of what the plan says about it; `check` without the rest.

    Raises:
        AssertionError: where the plan claims that the function stays, and it does not, or the other way round.
    """
    source, plan = _plan(case, seed)
    if isinstance(plan, str):
        return Result(case, refused=plan)
    operator, new_dims, init = case.request
    return _measured(case, plan, source, grow_model(source, operator, new_dims, init=init, seed=seed), seed)


def _plan(case: Case, seed: int) -> tuple[PreTrainedModel, GrowthPlan | str]:
    """The source of a case and the plan of its growth, or why it is refused."""
    source = tiny_model(case.family, case.dims, case.dtype, case.tied, seed=seed, **case.settings)
    operator, new_dims, init = case.request
    try:
        return source, plan_growth(source.config, operator, new_dims, init=init, seed=seed)
    except (GrowthError, DimsError) as refusal:
        return source, str(refusal)


def _measured(case: Case, plan: GrowthPlan, source: PreTrainedModel, grown: PreTrainedModel, seed: int) -> Result:
    error, floor = logit_error(source, grown), 0.0
    if case.dtype not in TOLERANCE:
        wide = tiny_model(case.family, case.dims, torch.float32, case.tied, seed=seed, **case.settings)
        floor = logit_error(wide, source)
        if plan.preserves and error > ROUNDING_FLOORS * floor:
            # One error of rounding is one draw of the dice: the grown model's own is a second one.
            operator, new_dims, init = case.request
            wide = grow_model(wide, operator, new_dims, init=init, seed=seed)
            floor = max(floor, logit_error(wide, deepcopy(wide).to(case.dtype)))
    result = Result(case, "", plan.preserves, error, floor)
    within = result.error <= result.tolerance
    if plan.preserves:
        _fact(within, case, f"is said to keep the function, but logits differ by {result.error:.1e} of the largest")
    elif case.dtype in TOLERANCE:  # a small change of the function drowns in the rounding of half precision
        _fact(not within, case, "keeps the function, but GrowthPlan.preserves denies it; is the init in EXACT?")
    return result


def _fact(holds: bool, case: Case, fact: str) -> None:
    if not holds:
        raise AssertionError(f"{case}: {fact}")


def _snapshot(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _check_shapes(case: Case, plan: GrowthPlan, grown: PreTrainedModel) -> None:
    found = {name: tuple(parameter.shape) for name, parameter in grown.named_parameters()}
    planned = {p.name: tuple(axis.new_size for axis in p.maps) for p in plan.parameters()}
    odd = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
    if odd:
        _fact(False, case, f"{odd[0]} has shape {found.get(odd[0])}, by the table {planned.get(odd[0])}")
    count = int(count_parameters(plan.new, grown.config))
    _fact(count == grown.num_parameters(), case, f"has {grown.num_parameters()} parameters, by the table {count}")
    dims = ModelDims.from_config(grown.config)
    _fact(dims == case.new_dims, case, f"the config says {dims}")
    _fact({p.dtype for p in grown.parameters()} == {case.dtype}, case, "the dtype has changed")
    embeddings = grown.get_input_embeddings().weight, grown.get_output_embeddings().weight
    _fact((embeddings[0] is embeddings[1]) == case.tied, case, "embeddings are not tied as the source's are")


def _check_old_entries(
    case: Case, plan: GrowthPlan, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> None:
    for p in plan.parameters():
        sources = [axis.source for axis in p.maps]
        slots = [torch.tensor([slot for slot, old in enumerate(axis) if old is not None]) for axis in sources]
        olds = [torch.tensor([old for old in axis if old is not None]) for axis in sources]
        old = before[p.source][torch.meshgrid(*olds, indexing="ij")]
        new = after[p.name][torch.meshgrid(*slots, indexing="ij")]
        _fact(torch.equal(new, old), case, f"old entries of {p.name} are not in place")


def _check_reload(case: Case, grown: PreTrainedModel) -> None:
    with tempfile.TemporaryDirectory() as directory, hide_progress_bars():
        grown.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, dtype=case.dtype, attn_implementation=grown.config._attn_implementation
        )
    _fact(torch.equal(logits(grown, probe()), logits(loaded, probe())), case, "logits differ after saving and loading")
    if case.dtype not in TOLERANCE:
        loaded = loaded.float()  # half precision rounds differently with a cache, and near-ties then fall otherwise
    # The prompt ends inside the sliding window and what is generated leaves it.
    prompt = probe(WINDOW - 1)[:1]
    texts = [
        loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False, use_cache=c)
        for c in (True, False)
    ]
    _fact(torch.equal(*texts), case, "generates other tokens with its cache than without")


def _check_gradients(case: Case, plan: GrowthPlan, grown: PreTrainedModel) -> float:
    """The share of new entries that have a gradient at once; after some steps, each new slot must have had one."""
    live = _live_entries(grown)
    new = {p.name: _new_entries(p) for p in plan.parameters()}
    total = sum(int(entries.sum()) for entries in new.values())
    at_once = sum(int((entries & live[name]).sum()) for name, entries in new.items())
    silent = [p.name for p in plan.parameters() if p.silent and not live[p.name].any()]
    if silent:
        _fact(False, case, f"{silent[0]} of an inserted layer has no gradient")
    for _ in range(STEPS_TO_LIFE):
        if not (dead := _dead(plan, live)):
            break
        live = {name: entries | live[name] for name, entries in _live_entries(grown).items()}
    _fact(not dead, case, f"new slots of {dead} have no gradient in {STEPS_TO_LIFE} steps")
    return at_once / total if total else 1.0


def _live_entries(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Which entries have a gradient on the probe; and a step against it, of one size for all parameters."""
    tokens = probe()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    live = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            live[name] = gradient != 0
            parameter.sub_(gradient * (0.05 / gradient.abs().max().clamp(min=1e-30)))
    return live


def _new_slots(axis: AxisMap) -> torch.Tensor:
    return torch.tensor([slot for slot, old in enumerate(axis.source) if old is None], dtype=torch.long)


def _new_entries(parameter: ParameterPlan) -> torch.Tensor:
    """Where a parameter does not hold old entries; everywhere in what an inserted layer keeps silent."""
    new = torch.full([axis.new_size for axis in parameter.maps], parameter.silent)
    for dimension, axis in enumerate(parameter.maps):
        new.index_fill_(dimension, _new_slots(axis), True)
    return new


def _dead(plan: GrowthPlan, live: Mapping[str, torch.Tensor]) -> str:
    """The first parameter with a new slot in which nothing is live; "" where there is none."""
    for p in plan.parameters():
        for dimension, axis in enumerate(p.maps):
            slots = _new_slots(axis)
            by_slot = live[p.name].index_select(dimension, slots).movedim(dimension, 0)
            if len(slots) and not bool(by_slot.reshape(len(slots), -1).any(1).all()):
                return f"{p.name} (dimension {dimension})"
    return ""
