"""The memory of training: by hand, and against what torch really keeps."""

import weakref
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from slop_hf.architectures import ARCHITECTURES
from slop_hf.cost.memory import MemoryEstimate, MemoryLimit, count_saved_activations, estimate_training_memory
from slop_hf.dims import ModelDims
from slop_hf.errors import PlanError
from slop_hf.planning.structures import DimsArray

DIMS = ModelDims(64, 96, 2, 4)
CONFIG = {"model_type": "llama", "vocab_size": 130}
PARAMETERS = 2 * 130 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Structures, vocabulary, sequences, tokens of each: nearly all logits, nearly all layers, and things between.
CASES = [
    (ModelDims(64, 176, 2, 4), 1000, 2, 64),
    (ModelDims(128, 512, 4, 4), 64, 1, 96),
    (ModelDims(96, 256, 3, 6, 2), 300, 3, 40),
    (ModelDims(64, 96, 6, 8, 1, 16), 50, 1, 128),
    (ModelDims(192, 256, 2, 2, 2), 500, 4, 33),
]


def build(dims, vocabulary, precision, model_type="llama", checkpointing=False, **settings):
    base = AutoConfig.for_model(model_type, vocab_size=vocabulary, pad_token_id=None, **settings)
    config = dims.to_config(base)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision], attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def forward(model, batch, length):
    """The loss, as Trainer keeps it: the model's other outputs go."""
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def kept_for_backward(model, batch, length):
    """Bytes of the storages that autograd holds after a forward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, batch, length)
    assert loss.requires_grad  # the graph, and with it all that it holds, lives until here
    return sum(storage.nbytes() for storage in storages.values())


class Live(TorchDispatchMode):
    """Bytes of the storages made while it is on: how many are alive, and the most at a time."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_of_step(model, batch, length):
    """The most that is alive in a forward and backward pass, parameters and their gradients aside."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tensors = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    with Live([*tensors, *model.buffers()]) as live:
        forward(model, batch, length).backward()
    return live.peak


@pytest.fixture
def like_a_gpu():
    """Sets which implementation of attention a structure gets on a GPU.

    There flash attention serves bf16 and float32 has a kernel of its own, which cannot share key/value heads, so that
    sdpa falls back to plain products. The CPU's kernel, which keeps the same as those two, could.
    """
    with ExitStack() as stack:

        def choose(dims, precision):
            if precision == "fp32" and dims.num_key_value_heads < dims.num_attention_heads:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))

        yield choose


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("dims", "vocabulary", "batch", "length"), CASES, ids=str)
def test_torch_keeps_what_is_estimated(dims, vocabulary, batch, length, precision, like_a_gpu):
    like_a_gpu(dims, precision)
    model = build(dims, vocabulary, precision)
    estimate = count_saved_activations(dims, model.config, length, micro_batch_size=batch, precision=precision)
    assert estimate == pytest.approx(kept_for_backward(model, batch, length), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("dims", "vocabulary", "batch", "length"), CASES, ids=str)
def test_checkpointing_keeps_what_is_estimated(dims, vocabulary, batch, length, precision):
    model = build(dims, vocabulary, precision, checkpointing=True)
    # The tables of the rotation are arguments of the layers that are computed again, which the hooks do not see.
    tables = 2 * length * dims.head_dim * DTYPES[precision].itemsize
    kept = kept_for_backward(model, batch, length) + tables
    estimate = count_saved_activations(
        dims, model.config, length, micro_batch_size=batch, checkpointing=True, precision=precision
    )
    assert estimate == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("dims", "vocabulary", "batch", "length"), CASES, ids=str)
def test_peak_of_a_step_is_estimated(dims, vocabulary, batch, length, precision, checkpointing, like_a_gpu):
    like_a_gpu(dims, precision)
    model = build(dims, vocabulary, precision, checkpointing=checkpointing)
    memory = estimate_training_memory(
        dims, model.config, length, micro_batch_size=batch, checkpointing=checkpointing, precision=precision
    )
    assert memory.activations == pytest.approx(peak_of_step(model, batch, length), rel=0.05)


def test_autocast_takes_as_much_more_as_the_docstring_says():
    dims, batch, length = ModelDims(128, 512, 4, 4), 2, 96
    model = build(dims, 64, "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = kept_for_backward(model, batch, length)
    more = 10 * dims.hidden_size * dims.num_hidden_layers * batch * length + 2 * model.num_parameters()
    bf16 = count_saved_activations(dims, model.config, length, micro_batch_size=batch)
    assert bf16 + more == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize(
    ("family", "precision", "tolerance"),
    [(family, precision, 0.02) for family in ("mistral", "qwen2", "qwen3") for precision in DTYPES]
    + [(family, precision, 0.05) for family in ("mixtral", "qwen3_moe") for precision in DTYPES]
    + [("gpt_neox", precision, 0.1) for precision in DTYPES]
    + [(family, "fp32", 0.1) for family in ("olmo2", "gemma3_text", "phi3", "stablelm", "starcoder2")],
)
def test_other_families(family, precision, tolerance):
    dims = ModelDims(64, 256, 3, 4)
    table = ARCHITECTURES[family]
    model = build(dims, 200, precision, family, **(table.test_settings if table.has_experts else {}))
    estimate = count_saved_activations(dims, model.config, 48, micro_batch_size=2, precision=precision)
    assert estimate == pytest.approx(kept_for_backward(model, 2, 48), rel=tolerance)


def test_state_by_hand():
    assert PARAMETERS == 86592
    bf16 = estimate_training_memory(DIMS, CONFIG, 10)
    assert (bf16.parameters, bf16.gradients, bf16.optimizer) == (173_184, 173_184, 1_039_104)
    fp32 = estimate_training_memory(DIMS, CONFIG, 10, precision="fp32")
    assert (fp32.parameters, fp32.gradients, fp32.optimizer) == (346_368, 346_368, 692_736)
    tied = estimate_training_memory(DIMS, {**CONFIG, "tie_word_embeddings": True}, 10)
    assert tied.parameters == 173_184 - 2 * 130 * 64


@pytest.mark.parametrize(
    ("stage", "state"),
    [
        (0, (173_184, 173_184, 1_039_104)),
        (1, (173_184, 173_184, 207_821)),
        (2, (173_184, 34_637, 207_821)),
        (3, (34_637, 34_637, 207_821)),
    ],
)
def test_zero_shards_state_and_rounds_up(stage, state):
    memory = estimate_training_memory(DIMS, CONFIG, 10, zero_stage=stage, devices=5)
    assert (memory.parameters, memory.gradients, memory.optimizer) == state
    assert memory.activations == estimate_training_memory(DIMS, CONFIG, 10).activations


def test_activations_by_hand():
    """20 tokens: a layer's norms, attention and ffn; the head; the tables of the rotation."""
    layer = 20 * (2 * 8 * 64 + (2 * 4 * 64 + 4 * 4) + 2 * 4 * 96)
    head, logits, tables = 20 * (8 * 64 + 4 * 130), 20 * 4 * 130, 10 * 2 * 2 * 16
    assert count_saved_activations(DIMS, CONFIG, 10, micro_batch_size=2) == 2 * layer + head + tables == 114_080
    memory = estimate_training_memory(DIMS, CONFIG, 10, micro_batch_size=2)
    assert memory.activations == 2 * layer + head + 2 * logits + tables == 134_880
    assert memory.total == 173_184 + 173_184 + 1_039_104 + 134_880


def test_checkpointing_by_hand():
    inputs, tables = 2 * 20 * 2 * 64, 10 * 2 * 2 * 16
    settings = {"micro_batch_size": 2, "checkpointing": True}
    saved = count_saved_activations(DIMS, CONFIG, 10, **settings)
    assert saved == inputs + 20 * (8 * 64 + 4 * 130) + tables
    # With many words the peak is the loss, with few a layer that is computed again.
    many = estimate_training_memory(DIMS, {**CONFIG, "vocab_size": 5000}, 10, **settings)
    assert many.activations == inputs + tables + 20 * (8 * 64 + 3 * 4 * 5000)
    few = estimate_training_memory(DIMS, {**CONFIG, "vocab_size": 5}, 10, **settings).activations
    assert few > inputs + tables + 20 * (2 * 8 * 64 + (2 * 4 * 64 + 4 * 4) + 2 * 4 * 96)


def test_scores_are_kept_in_float32_with_shared_heads_only():
    def growth(dims, precision):
        short, long = (count_saved_activations(dims, CONFIG, length, precision=precision) for length in (512, 1024))
        return long / short

    shared = ModelDims(64, 96, 2, 4, 2)
    assert growth(shared, "fp32") > 3
    assert growth(shared, "bf16") == growth(DIMS, "bf16") == growth(DIMS, "fp32") == 2


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_arrays_answer_like_single_structures(model_type, precision, checkpointing):
    config = {"model_type": model_type, "vocab_size": 130}
    settings = {"zero_stage": 2, "devices": 3, "checkpointing": checkpointing, "precision": precision}
    structures = [case[0] for case in CASES]
    many = estimate_training_memory(DimsArray.of(structures), config, 100, **settings)
    singles = [estimate_training_memory(dims, config, 100, **settings) for dims in structures]
    for name in ("parameters", "gradients", "optimizer", "activations", "total"):
        assert [getattr(single, name) for single in singles] == list(getattr(many, name))
        assert all(type(getattr(single, name)) is int for single in singles)
    square = DimsArray.of(structures[:4])[np.arange(4).reshape(2, 2)]
    assert estimate_training_memory(square, config, 100, **settings).total.shape == (2, 2)
    limit = MemoryLimit(sorted(single.total for single in singles)[2], **settings)
    fits = limit.fits(DimsArray.of(structures), config, 100)
    assert fits.dtype == bool
    assert list(fits) == [bool(limit.fits(dims, config, 100)) for dims in structures]
    assert fits.sum() == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"zero_stage": -1}, "zero_stage must be 0, 1, 2 or 3, got -1"),
        ({"zero_stage": 1.0}, "zero_stage must be 0, 1, 2 or 3, got 1.0"),
        ({"devices": 0}, "devices must be a whole number, 1 or more, got 0"),
        ({"devices": True}, "devices must be a whole number, 1 or more, got True"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number, 1 or more, got 0"),
        ({"precision": "fp16"}, "precision must be 'bf16' or 'fp32', got 'fp16'"),
    ],
)
def test_settings_that_training_does_not_know(settings, message):
    for refused in (
        lambda: estimate_training_memory(DIMS, CONFIG, 10, **settings),
        lambda: MemoryLimit(1e9, **settings),
    ):
        with pytest.raises(PlanError) as error:
            refused()
        assert str(error.value) == message


@pytest.mark.parametrize("room", [0, -1.0, float("nan"), float("inf"), True, None, "80GB"])
def test_a_device_has_a_positive_number_of_bytes(room):
    with pytest.raises(PlanError, match=r"^bytes_per_device must be a positive number, got .*: give bytes"):
        MemoryLimit(room)


def test_fits_up_to_the_last_byte():
    total = estimate_training_memory(DIMS, CONFIG, 10).total
    assert MemoryLimit(total).fits(DIMS, CONFIG, 10)
    assert not MemoryLimit(total - 1).fits(DIMS, CONFIG, 10)


LLAMA_7B = ModelDims(4096, 11008, 32, 32)
LLAMA_CONFIG = {"model_type": "llama", "vocab_size": 32000}


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"bytes_per_device": 121e9}, "it fits"),
        ({"bytes_per_device": 130e9, "micro_batch_size": 4}, "checkpointing or micro_batch_size 1 would make it fit"),
        ({"bytes_per_device": 130e9, "micro_batch_size": 5}, "checkpointing or micro_batch_size 1 would make it fit"),
        ({"bytes_per_device": 150e9, "micro_batch_size": 5}, "checkpointing or micro_batch_size 2 would make it fit"),
        ({"bytes_per_device": 120e9, "devices": 8}, "checkpointing or zero_stage 1 would make it fit"),
        ({"bytes_per_device": 40e9, "devices": 8}, "zero_stage 2 would make it fit"),
        (
            {"bytes_per_device": 16e9, "devices": 16, "zero_stage": 1, "micro_batch_size": 4},
            "zero_stage 3, micro_batch_size 1 and checkpointing together would make it fit",
        ),
        (
            {"bytes_per_device": 80e9, "zero_stage": 1},
            "it would not fit even with checkpointing (then 109 GB): "
            "take a smaller structure, shorter sequences or more devices to shard over",
        ),
        (
            {"bytes_per_device": 80e9, "checkpointing": True},
            "it would not fit: take a smaller structure, shorter sequences or more devices to shard over",
        ),
    ],
)
def test_explain_tells_what_would_help(settings, advice):
    explained = MemoryLimit(**settings).explain(LLAMA_7B, LLAMA_CONFIG, 2048)
    assert explained.split("; ")[1] == advice


def test_explain_names_every_part():
    limit = MemoryLimit(72e9)
    explained = limit.explain(LLAMA_7B, LLAMA_CONFIG, 2048)
    need = limit.estimate(LLAMA_7B, LLAMA_CONFIG, 2048)
    assert isinstance(need, MemoryEstimate)
    assert explained.startswith(
        f"needs {need.total / 1e9:.0f} GB per device (parameters 13.5 GB, gradients 13.5 GB, optimizer 80.9 GB, "
        f"activations {need.activations / 1e9:.1f} GB), has 72 GB; "
    )
    assert "\n" not in explained
    assert "has 1.2 MB; " in MemoryLimit(1.2e6).explain(DIMS, CONFIG, 10)
