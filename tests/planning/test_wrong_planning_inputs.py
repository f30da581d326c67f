"""Wrong values given to the planner and its parts from Python: one or two lines, at once, and without torch."""

import math
import time
import tracemalloc
from fractions import Fraction

import pytest

from slop_hf import ConfigSpace, GrowthSchedule, GrowthStage, ModelDims, SlopPlanner
from slop_hf.baselines import ArmRequest, compare_at_equal_flops, elle, from_scratch
from slop_hf.cost.device_peaks import look_up_peak_flops
from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.cost.hours import CostModel, Measurement, check_calibration
from slop_hf.cost.memory import MemoryLimit, count_saved_activations, estimate_training_memory
from slop_hf.cost.scaling_law import ScalingLaw
from slop_hf.errors import SlopError
from slop_hf.planning.budget import TokenAllocation, allocate_tokens, share_tokens_by_utility
from slop_hf.schedule import share_tokens

NAN, INF, HUGE = math.nan, math.inf, 10**400
SMALL, LARGE = ModelDims(768, 2048, 6, 6), ModelDims(2816, 7680, 8, 22)
CONFIG = {"model_type": "llama", "vocab_size": 32000}
LAYER = GrowthStage(("layer",), SMALL.replace(num_hidden_layers=8), tokens=1000)
PLAN = GrowthSchedule(SMALL, (LAYER,), initial_tokens=1000)
TIMES = [Measurement("a", 1e9, 1e9, 10.0), Measurement("b", 2e9, 1e9, 20.0)]


def plan(request=None, **planner):
    space = planner.pop("space", ConfigSpace(targets=[LARGE]))
    return SlopPlanner(planner.pop("initial", SMALL), space, **planner).plan(**(request or {}))


def sized(**space):
    """Plan to targets of 1e9 parameters in a space with these settings."""
    return plan(space=ConfigSpace(**{"target_params": 1e9, **space}))


def calibration(**changes):
    settings = dict(sequence_length=32, batch_size=1, steps=1, warmup_steps=0, precision="fp32", config=CONFIG)
    check_calibration([SMALL, LARGE], **{**settings, **changes})


# Rows of one function: value of one argument, and what the message says.
PLANNER = [
    ("initial", None, "initial must be a ModelDims, got None"),
    ("initial", (768, 2048, 6, 6), "initial must be a ModelDims"),
    ("space", LARGE, "space must be a ConfigSpace"),
    ("operators", (), "operators must be one or more"),
    ("operators", "layer", r"operators must be a list of names, got 'layer': give \['layer'\]"),
    ("operators", ["depth"], "unknown operator 'depth'"),
    ("objective", "luck", "unknown objective 'luck'"),
    ("mode", "twice", "mode must be"),
    ("cost_model", "paper", "cost_model must be a CostModel"),
    ("law", None, "law must be a ScalingLaw"),
    ("stages", 0, "stages must be a whole number, 1 or more, got 0"),
    ("stages", 2.5, "stages must be a whole number"),
    ("stages", "3", "stages must be a whole number"),
    ("max_stages", -1, "max_stages must be a whole number"),
    ("max_stages", NAN, "max_stages must be a whole number"),
    ("stage_price", -1.0, "stage_price must be 0 or more"),
    ("stage_price", NAN, "stage_price must be 0 or more"),
    ("stage_price", "much", "stage_price must be 0 or more"),
    ("max_factor", 1, "max_factor must be a number above 1"),
    ("max_factor", INF, "max_factor must be a number above 1"),
    ("max_factor", HUGE, "max_factor must be a number above 1"),
    ("through", LARGE, "through must be a list of structures"),
    ("through", ["768,2048,6,6"], "through must be a list of ModelDims"),
]
SPACE = [
    ("target_params", 0, "target_params must be a positive number, got 0"),
    ("target_params", -1e9, "target_params must be a positive number"),
    ("target_params", INF, "target_params must be a positive number"),
    ("target_params", HUGE, "target_params must be a positive number"),
    ("target_params", "1B", "target_params must be a positive number"),
    ("tolerance", NAN, "tolerance must be a share"),
    ("tolerance", 1, "tolerance must be a share"),
    ("tolerance", "5%", "tolerance must be a share"),
    ("count", "papers", "count must be"),
    ("heads", "many", "heads must be"),
    ("config", {"model_type": "llama"}, "vocab_size must be a whole number, 1 or more, got None"),
    ("config", {"model_type": "llama", "vocab_size": 0}, "vocab_size must be a whole number, 1 or more, got 0"),
    ("config", {"model_type": "llama", "vocab_size": -5}, "vocab_size must be a whole number"),
    ("config", {"model_type": "llama", "vocab_size": 10**12}, "vocab_size must be a whole number from 1 to"),
    ("config", {"model_type": "bert", "vocab_size": 100}, "no axis table for model_type 'bert'"),
    ("sequence_length", 0, "sequence_length must be a whole number"),
    ("sequence_length", 2048.0, "sequence_length must be a whole number"),
    ("hidden_multiple", 0, "hidden_multiple must be a whole number"),
    ("hidden_multiple", 10**30, "hidden_multiple must be a whole number from 1 to"),
    ("ffn_multiple", -256, "ffn_multiple must be a whole number"),
    ("ffn_ratios", (), "ffn_ratios must be one or more positive numbers"),
    ("ffn_ratios", (NAN,), "ffn_ratios must be one or more positive numbers"),
    ("ffn_ratios", (Fraction(-1, 2),), "ffn_ratios must be one or more positive numbers"),
    ("min_layers", -1, "min_layers must be a whole number"),
    ("max_layers", "64", "max_layers must be a whole number"),
    ("min_aspect", 0, "min_aspect must be a positive number"),
    ("min_aspect", 500, "bounds contradict: min_aspect 500 and max_aspect 384"),
    ("max_aspect", INF, "max_aspect must be a positive number"),
    ("max_hidden", 0, "max_hidden must be a whole number"),
    ("kv_heads", 0, "kv_heads must be a whole number"),
    ("tensor_parallel", 0, "tensor_parallel must be a whole number"),
    ("memory", 80e9, "memory must be a MemoryLimit"),
]
REQUEST = [
    ("top_k", 0, "top_k must be a whole number"),
    ("top_k", 1.5, "top_k must be a whole number"),
    ("top_k", 10**9, "top_k must be a whole number from 1 to 10,000"),
    ("tokens", 0, "tokens must be positive numbers"),
    ("tokens", NAN, "tokens must be positive numbers"),
    ("tokens", "65e9", "tokens must be a number, or one number per stage, got '65e9'"),
    ("tokens", True, "tokens must be positive numbers"),
    ("tokens", {1e9}, "tokens must be a number, or one number per stage"),
    ("tokens", [], "tokens must be positive numbers"),
    ("tokens", [1e9, 1e9], "tokens has 2 numbers"),
    ("tokens", 0.1, "less than one per stage"),
    ("tokens", 1e300, "tokens must be at most"),
    ("already_seen", -1, "already_seen must be a number, 0 or more"),
    ("already_seen", 1e300, "already_seen must be at most"),
    ("initial_share", NAN, "initial_share must be a number, 0 or more"),
    ("sharing", "fair", "sharing must be"),
]
MEMORY = [
    ("bytes_per_device", 0, "bytes_per_device must be a positive number"),
    ("bytes_per_device", HUGE, "bytes_per_device must be a positive number"),
    ("zero_stage", 7, "zero_stage must be 0, 1, 2 or 3"),
    ("devices", 0, "devices must be a whole number"),
    ("micro_batch_size", -1, "micro_batch_size must be a whole number"),
    ("precision", "int8", "precision must be 'bf16' or 'fp32', got 'int8'"),
    ("optimizer", "adam", "optimizer must be 'adamw' or 'muon', got 'adam'"),
]
CALIBRATION = [
    ("sequence_length", 0, "sequence_length must be a whole number, 2 or more"),
    ("batch_size", 0, "batch_size must be a whole number"),
    ("batch_size", -1, "batch_size must be a whole number"),
    ("steps", 0, "steps must be a whole number"),
    ("warmup_steps", -1, "warmup_steps must be a whole number, 0 or more"),
    ("seed", -1, "seed must be a whole number, 0 or more"),
    ("precision", "int4", "precision must be one of bf16, fp32, got 'int4'"),
    ("config", {"model_type": "llama", "vocab_size": 1}, "vocab_size must be a whole number, 2 or more"),
]
ROWS = [
    *(
        (f"planner {name}={value!r:.30}", lambda n=name, v=value: plan(**{n: v}), text)
        for name, value, text in PLANNER
    ),
    *((f"space {name}={value!r:.60}", lambda n=name, v=value: sized(**{n: v}), text) for name, value, text in SPACE),
    *((f"plan {name}={value!r:.30}", lambda n=name, v=value: plan({n: v}), text) for name, value, text in REQUEST),
    *(
        (f"memory {name}={value!r:.30}", lambda n=name, v=value: MemoryLimit(**{"bytes_per_device": 1e9, n: v}), text)
        for name, value, text in MEMORY
    ),
    *(
        (f"calibrate {name}={value!r:.30}", lambda n=name, v=value: calibration(**{n: v}), text)
        for name, value, text in CALIBRATION
    ),
    ("targets text", lambda: ConfigSpace(targets=["768,2048,6,6"]), "targets must be a list of ModelDims"),
    ("targets one", lambda: ConfigSpace(targets=LARGE), "targets must be a list of structures, got one"),
    ("targets number", lambda: ConfigSpace(targets=7), "targets must be a list of ModelDims, got 7"),
    ("targets none", lambda: ConfigSpace(), "either targets or target_params"),
    ("dims huge", lambda: ModelDims(2**40, 2048, 6, 8), "hidden_size must be at most 2,147,483,647, got 1.1e"),
    ("dims negative", lambda: ModelDims(768, 2048, -6, 6), "num_hidden_layers must be a whole number, 0 or more"),
    ("dims NaN", lambda: ModelDims(768, NAN, 6, 6), "intermediate_size must be a positive whole number"),
    ("allocation sharing", lambda: TokenAllocation([1, 2], sharing="utility"), "give one number"),
    ("split shares", lambda: allocate_tokens([1, -1], 100), "do not split tokens"),
    ("split NaN", lambda: allocate_tokens([1, NAN], 100), "do not split tokens"),
    ("split nothing", lambda: allocate_tokens([1, 1], 0), "must be a positive number, got 0"),
    ("split costs", lambda: allocate_tokens([1], 100, [1.0, 2.0]), "do not split tokens between 2"),
    ("utility costs", lambda: share_tokens_by_utility(1e9, [1e8, 1e9], [1.0]), "one positive cost for each"),
    ("utility free", lambda: share_tokens_by_utility(1e9, [1e8, 1e9], [0.0, 1.0]), "one positive cost for each"),
    ("utility nothing", lambda: share_tokens_by_utility(0, [1e8], [1.0]), "tokens must be a positive number"),
    ("shares NaN", lambda: share_tokens(NAN, 3), "tokens must be positive"),
    ("shares huge", lambda: share_tokens(HUGE, 3), "tokens must be positive"),
    ("shares of stages", lambda: share_tokens(1e9, 10**9), "stages must be a whole number from 0 to"),
    ("shares of -1 stages", lambda: share_tokens(1e9, -1), "stages must be a whole number, 0 or more"),
    ("stage text", lambda: GrowthStage("layer", LARGE), r"operators must be a tuple of names, got 'layer'"),
    ("stage dims", lambda: GrowthStage(("layer",), None), "dims of a stage must be a ModelDims"),
    ("stage tokens", lambda: GrowthStage(("layer",), LARGE, NAN), "tokens must be a whole number"),
    ("schedule initial", lambda: GrowthSchedule((768, 2048, 6, 6)), "initial must be a ModelDims"),
    ("schedule stages", lambda: GrowthSchedule(SMALL, (LARGE,)), "stages must be a tuple of GrowthStage"),
    ("schedule tokens", lambda: GrowthSchedule(SMALL, (), 1.5), "initial_tokens must be a whole number"),
    ("schedule total", lambda: PLAN.with_tokens(INF), "tokens must be positive"),
    ("schedule shares", lambda: PLAN.with_shares([1]), "give one for each"),
    ("cost zero", lambda: CostModel(0), "hours_per_flop must be a positive number"),
    ("cost text", lambda: CostModel("fast"), "hours_per_flop must be a positive number"),
    ("cost NaN", lambda: CostModel(1e-18, NAN), "hours_per_token must be 0 or more"),
    ("cost one time", lambda: CostModel.fit(TIMES[:1]), "at least 2 measurements"),
    ("time zero", lambda: Measurement("a", 1e9, 1e9, 0), "hours must be a positive number"),
    ("time infinite", lambda: Measurement("a", INF, 1e9, 1), "flops_per_token must be a positive number"),
    ("law constant", lambda: ScalingLaw(params_scale=-1), "params_scale of a scaling law must be a positive"),
    ("law of nothing", lambda: ScalingLaw().loss(0, 1e9), "params must be positive"),
    ("law of fewer tokens", lambda: ScalingLaw().loss(1e9, -1), "tokens must be 0 or more"),
    ("law stages", lambda: ScalingLaw().staged_losses([1e8, 1e9], [1e9]), "2 models and 1 numbers of tokens"),
    ("law costs", lambda: ScalingLaw().handover_loss(1e8, 0, 1e9, 1), "costs per token must be positive"),
    ("peak", lambda: look_up_peak_flops("A100", "int8"), "dtype must be one of"),
    ("parameters", lambda: count_parameters(SMALL, {"model_type": "llama"}), "vocab_size must be a whole number"),
    ("FLOPs", lambda: count_flops_per_token(SMALL, CONFIG, 0), "sequence_length must be a whole number"),
    ("memory of 0 tokens", lambda: estimate_training_memory(SMALL, CONFIG, 0), "sequence_length must be"),
    ("activations", lambda: count_saved_activations(SMALL, CONFIG, -1), "sequence_length must be"),
    ("activations batch", lambda: count_saved_activations(SMALL, CONFIG, 8, micro_batch_size=0), "micro_batch_size"),
    ("arms budget", lambda: ArmRequest(PLAN, budget="hours"), "unknown budget 'hours'"),
    ("arms schedule", lambda: ArmRequest("plan.yaml"), "schedule must be a GrowthSchedule"),
    ("arms tokens", lambda: from_scratch(GrowthSchedule(SMALL)), "no tokens to compare at"),
    ("arms seen", lambda: compare_at_equal_flops(PLAN, already_seen=-1), "already_seen must be a number"),
    ("elle stages", lambda: elle(ArmRequest(PLAN), stages=1.5), "stages must be a whole number"),
]


@pytest.mark.parametrize(("make", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_wrong_values_are_refused(make, message):
    with pytest.raises(SlopError, match=message) as caught:
        make()
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def joint(target, initial=SMALL, mode="joint", **planner):
    space = ConfigSpace(targets=[target], hidden_multiple=1, ffn_multiple=1)
    return SlopPlanner(initial, space, mode=mode, **{"stages": 3, **planner}).plan


TOO_LARGE = {
    "wide": (lambda: sized(max_aspect=1e9), r"structures or more, too many to compare \(at most 5,000,000\)"),
    "deep": (lambda: sized(max_layers=10**9), "too many to compare .* lower max_layers"),
    "unbounded": (lambda: sized(max_layers=10**9, max_aspect=1e9, min_aspect=1e-9), "too many to compare"),
    "fine": (lambda: sized(hidden_multiple=1, max_layers=10_000), "too many to compare"),
    "many values": (lambda: joint(ModelDims(2816, 200_000_000, 8, 22))(), "values of intermediate_size from 2048 to"),
    "many layers": (lambda: joint(ModelDims(2816, 7680, 10**8, 22))(), "values of num_hidden_layers from 6 to"),
    "many growths": (lambda: joint(LARGE)(), "growths between them are too many to search"),
}


@pytest.mark.parametrize(("make", "message"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_spaces_that_are_too_large_are_refused_before_they_are_listed(make, message):
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(SlopError, match=message):
        make()
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 200e6


@pytest.mark.parametrize("number", [{"stages": 10**9}, {"stages": None, "max_stages": 10**9, "objective": "flops"}])
def test_a_number_of_stages_above_the_number_of_steps(number):
    """A schedule has no more stages than the grid has steps: more are neither listed nor given tokens."""
    planner = SlopPlanner(
        SMALL,
        ConfigSpace(targets=[SMALL.replace(num_hidden_layers=9)]),
        operators=("layer",),
        mode="repeated",
        **number,
    )
    if number["stages"] is None:
        assert len(planner.plan(1, tokens=1e9)[0].stages) <= 3
    else:
        with pytest.raises(SlopError, match="no schedule of 1000000000 stages"):
            planner.plan(1, tokens=1e9)


def test_sizes_that_would_overflow_are_counted():
    """Costs of absurdly large structures are large, not negative."""
    huge = ModelDims(2**24, 2**26, 2**12, 2**17)
    best = SlopPlanner(SMALL, ConfigSpace(targets=[huge]), objective="flops").plan(1, tokens=1e12)[0]
    assert best.scores["flops"] == pytest.approx(best.flops(), rel=1e-9)
    assert best.scores["delta_params"] > 0
