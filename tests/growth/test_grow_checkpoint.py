import filecmp
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import DIMS, SHARD, assert_same, change, in_the_open, load, save
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)

from slop_hf import GrowthReceipt, GrowthStage, ModelDims, grow_checkpoint, grow_model, plan_checkpoint_growth
from slop_hf.errors import GrowthError
from slop_hf.growth import checkpoint, hash_weights

GROWTHS = [
    ("layer", 5, None),
    ("layer", 3, "preserving"),
    ("layer", 11, "interleave"),
    ("mha", 6, "random"),
    ("mha", 6, "preserving"),
    ("ffn", 100, "random"),
    ("ffn", 96, "copy"),
    ("hidden", 40, "preserving"),
    ("hidden", 80, "copy"),
    ("head_dim", 12, "preserving"),
    ("head_dim", 16, "spread"),
]


@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize(("operator", "size", "init"), GROWTHS)
def test_equals_growth_in_memory(tmp_path, operator, size, init, shards):
    small = SHARD if shards == "many" else "5GB"
    dims = DIMS.replace(hidden_size=36, num_attention_heads=4) if operator == "mha" else DIMS
    source = save(tmp_path / "source", shard=small, dims=dims)
    receipt = grow_checkpoint(source, tmp_path / "grown", operator, size, init=init, seed=3, max_shard_size=small)
    expected = grow_model(load(source), operator, size, init=init, seed=3)
    assert_same(tmp_path / "grown", expected)
    assert (tmp_path / "grown" / "model.safetensors").exists() == (shards == "one")
    assert receipt.parameters == expected.num_parameters()
    assert receipt.source_hash == hash_weights(load(source).named_parameters())
    assert receipt.bytes_written == 4 * receipt.parameters and receipt.peak_memory_bytes > 2**20
    record = json.loads((tmp_path / "grown" / "growth_receipt.json").read_text())
    assert record["dims"] == receipt.dims.as_dict() and record["seed"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("make", "config", "settings", "operator", "size"),
    [
        (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, "hidden", 64),
        (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}, "ffn", 96),
        (Qwen2ForCausalLM, Qwen2Config, {}, "hidden", 48),
        (Gemma2ForCausalLM, Gemma2Config, {}, "hidden", 64),
        (GPTNeoXForCausalLM, GPTNeoXConfig, {}, "hidden", {"hidden_size": 40, "num_attention_heads": 5}),
        (GPTNeoXForCausalLM, GPTNeoXConfig, {"tie_word_embeddings": True}, "layer", 3),
    ],
)
def test_families_and_dtypes(tmp_path, make, config, settings, operator, size, dtype):
    source = save(tmp_path / "source", make, config, dtype, SHARD, **settings)
    grow_checkpoint(source, tmp_path / "grown", operator, size, init="preserving", max_shard_size=SHARD)
    assert_same(tmp_path / "grown", grow_model(load(source), operator, size, init="preserving"))


def test_files_equal_those_of_transformers(tmp_path):
    source = save(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=True)
    for size in ("5GB", SHARD):
        grow_checkpoint(source, tmp_path / size, "layer", 12, max_shard_size=size)
        grow_model(load(source), "layer", 12).save_pretrained(tmp_path / "expected", max_shard_size=size)
        files = in_the_open(tmp_path / "expected")
        assert in_the_open(tmp_path / size) == sorted([*files, "growth_receipt.json"])
        assert filecmp.cmpfiles(tmp_path / size, tmp_path / "expected", files, shallow=False)[0] == files
        shutil.rmtree(tmp_path / "expected")


def stages_of(*dims, init=None):
    names = {"num_hidden_layers": "layer", "intermediate_size": "ffn", "hidden_size": "hidden"}
    return [
        GrowthStage(
            tuple(name for field, name in names.items() if getattr(a, field) != getattr(b, field)), b, init=init
        )
        for a, b in pairwise((DIMS, *dims))
    ]


CHAINS = {
    "three operators": stages_of(
        ModelDims(32, 48, 5, 4), ModelDims(32, 80, 5, 4), ModelDims(48, 80, 5, 4, head_dim=8)
    ),
    "one, twice": stages_of(ModelDims(32, 80, 2, 4), ModelDims(32, 112, 2, 4), init="preserving"),
    "copies of copies": stages_of(ModelDims(32, 96, 2, 4), ModelDims(32, 192, 2, 4), init="copy"),
    "zeroed layers": stages_of(ModelDims(32, 48, 3, 4), ModelDims(32, 48, 7, 4), init="preserving"),
    "several at once": [
        GrowthStage(("layer", "ffn"), ModelDims(32, 64, 3, 4), init={"layer": "interleave", "ffn": "copy"}),
        GrowthStage(("hidden", "layer"), ModelDims(64, 64, 4, 4, head_dim=8), init={"hidden": "preserving"}),
    ],
}


@pytest.mark.parametrize("stages", CHAINS.values(), ids=list(CHAINS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_equals_growths_in_memory_one_after_the_other(tmp_path, stages, dtype):
    source = save(tmp_path / "source", dtype=dtype)
    receipt = grow_checkpoint(source, tmp_path / "grown", stages, seed=5, noise=0.2, max_shard_size="30KB")
    expected = load(source)
    for number, stage in enumerate(stages):
        expected = grow_model(expected, stage, seed=5 + number, noise=0.2)
    assert_same(tmp_path / "grown", expected)
    assert receipt.dims == stages[-1].dims and receipt.source_hash == hash_weights(load(source).named_parameters())


def merge_by_passthrough(source, target, slices):
    """Write a checkpoint whose layers are those of ranges of a source, as mergekit's `passthrough` does."""
    tensors = load_file(source / "model.safetensors")
    merged = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    for new, old in enumerate(layer for start, stop in slices for layer in range(start, stop)):
        begin, replacement = f"model.layers.{old}.", f"model.layers.{new}."
        merged |= {
            replacement + name.removeprefix(begin): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith(begin)
        }
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = new + 1
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][old] for start, stop in slices for old in range(start, stop)]
    (target / "config.json").write_text(json.dumps(config))
    save_file(merged, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("layers", "init", "slices"),
    [
        (6, "stack", [(0, 4), (0, 2)]),
        (9, "stack", [(0, 4), (0, 4), (0, 1)]),
        (6, "middle", [(0, 2), (1, 3), (2, 4)]),
        (5, "interleave", [(0, 1), (0, 4)]),
    ],
)
@pytest.mark.parametrize(
    ("make", "config", "settings"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (
            Olmo3ForCausalLM,
            Olmo3Config,
            {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        (SeedOssForCausalLM, SeedOssConfig, {"attention_out_bias": True}),
    ],
)
def test_deeper_checkpoints_equal_a_passthrough_merge(tmp_path, make, config, settings, layers, init, slices):
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    dims = DIMS.replace(num_hidden_layers=4)
    source = save(tmp_path / "source", make, config, torch.bfloat16, dims=dims, **settings, **special)
    merged = load(merge_by_passthrough(source, tmp_path / "merged", slices))
    grow_checkpoint(source, tmp_path / "grown", "layer", layers, init=init)
    grown = load(tmp_path / "grown")
    assert_same(tmp_path / "grown", merged)
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(grown(tokens).logits, merged(tokens).logits)


def test_growths_of_a_chain_draw_different_numbers(source, tmp_path):
    stages = stages_of(ModelDims(32, 80, 2, 4), ModelDims(32, 112, 2, 4))
    grow_checkpoint(source, tmp_path / "grown", stages)
    gate = load(tmp_path / "grown").model.layers[0].mlp.gate_proj.weight
    assert not torch.equal(gate[48:80], gate[80:112])


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_the_memory_limit_change_the_weights(sharded, tmp_path, threads, monkeypatch):
    monkeypatch.setattr(checkpoint, "IN_FLIGHT_BYTES", 1)
    grow_checkpoint(sharded, tmp_path / "grown", "ffn", 64, threads=threads, max_shard_size=4000, progress=False)
    assert_same(tmp_path / "grown", grow_model(load(sharded), "ffn", 64))
    with pytest.raises(GrowthError, match="threads must be a whole number, 1 or more, got 0"):
        grow_checkpoint(sharded, tmp_path / "x", "ffn", 64, threads=0)


@pytest.mark.slow
def test_loads_without_slop_hf(source, tmp_path):
    grow_checkpoint(source, tmp_path / "grown", "ffn", 64)
    code = (
        "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert m.config.intermediate_size == 64 and not any('slop' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "grown")], check=True)


def test_tokenizer_and_generation_config_are_copied(source, tmp_path):
    texts = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
             "chat_template.jinja", "additional_chat_templates/tools.jinja", "spiece.model", "README.md",
             "training_args.bin"]  # fmt: skip
    (source / "additional_chat_templates").mkdir()
    for name in texts:
        (source / name).write_text(f"content of {name}")
    (source / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    grow_checkpoint(source, tmp_path / "grown", "layer", 3)
    for name in texts[:-2]:
        assert (tmp_path / "grown" / name).read_text() == f"content of {name}"
    assert not {"README.md", "training_args.bin"} & set(in_the_open(tmp_path / "grown"))
    assert load(tmp_path / "grown").generation_config.temperature == 0.25


def test_plan_reads_no_weight(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_tensor", None)
    stages = stages_of(ModelDims(32, 48, 5, 4), ModelDims(32, 80, 5, 4))
    plan = plan_checkpoint_growth(sharded, tmp_path / "grown", stages, max_shard_size=SHARD)
    assert not (tmp_path / "grown").exists() and plan.weight_bytes == 4 * plan.parameters
    text = str(plan)
    for part in (
        "growth 1: layer by stack",
        "growth 2: ffn by random",
        "model-00001-of-",
        "generation_config",
        "free",
    ):
        assert part in text
    assert json.loads(json.dumps(plan.as_dict()))["needed_bytes"] == plan.needed_bytes
    monkeypatch.undo()
    grow_checkpoint(sharded, tmp_path / "grown", stages, max_shard_size=SHARD)
    written = sum(path.stat().st_size for path in (tmp_path / "grown").iterdir())
    assert plan.needed_bytes - 2**16 < written <= plan.needed_bytes


def test_redundant_tensors_are_left_out(tmp_path):
    source = save(tmp_path / "source", tie_word_embeddings=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change(source, add)
    grow_checkpoint(source, tmp_path / "grown", "hidden", 64, init="preserving")
    stored = load_file(tmp_path / "grown" / "model.safetensors")
    assert not any("inv_freq" in name or "lm_head" in name for name in stored)
    assert_same(tmp_path / "grown", grow_model(load(source), "hidden", 64, init="preserving"))
    change(source, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(GrowthError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        grow_checkpoint(source, tmp_path / "other", "hidden", 64)
    assert in_the_open(tmp_path) == ["grown", "source"]


def test_from_the_hub(source, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        asked[repo_id, revision] = allow_patterns, ignore_patterns
        return str(source)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    receipt = grow_checkpoint("someone/small@step1000", tmp_path / "grown", "ffn", 64)
    allowed, ignored = asked["someone/small", "step1000"]
    assert receipt.source == "someone/small@step1000"
    assert "model*.safetensors" in allowed and {"*.bin", "*.py"} <= {*ignored}


#: Peak memory beyond the idle interpreter: one tensor pair in each of two threads, and what torch itself takes.
PEAK_MIB = 128


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path):
    dims = ModelDims(512, 2048, 18, 8)
    config = dims.to_config(LlamaConfig(vocab_size=2000, dtype="float32"))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(tmp_path / "source")
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, tmp_path / "source/model.safetensors")
    assert 300e6 < (tmp_path / "source/model.safetensors").stat().st_size < 320e6
    code = """
import sys
from slop_hf import grow_checkpoint
from slop_hf.growth.checkpoint import measure_peak_memory
before = measure_peak_memory()
receipt = grow_checkpoint(sys.argv[1], sys.argv[2], "hidden", 768, threads=2, progress=False)
print(receipt.bytes_written, (receipt.peak_memory_bytes - before) / 2**20)
"""
    command = [sys.executable, "-c", code, tmp_path / "source", tmp_path / "grown"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    written, mib = map(float, done.stdout.split())
    assert written > 450e6 and mib < PEAK_MIB, f"{mib:.0f} MiB beyond the idle interpreter"


def test_receipt_of_a_chain_names_every_init(source, tmp_path):
    stages = [
        GrowthStage(("layer",), ModelDims(32, 48, 3, 4)),
        GrowthStage(("layer",), ModelDims(32, 48, 4, 4), init="preserving"),
    ]
    receipt = grow_checkpoint(source, tmp_path / "grown", stages, seed=3, noise=0.5)
    assert isinstance(receipt, GrowthReceipt) and not receipt.preserves
    assert receipt.operators == ("layer",) and receipt.inits == {"layer": "stack, preserving"}
    assert (receipt.seed, receipt.noise) == (3, 0.5)


def test_verify_measures_and_refuses(tmp_path, monkeypatch):
    from slop_hf.growth import tensors

    source = tmp_path / "verified-source"
    torch.manual_seed(0)
    LlamaForCausalLM(ModelDims(32, 48, 2, 4).to_config(LlamaConfig(vocab_size=50))).save_pretrained(source)
    kept = grow_checkpoint(source, tmp_path / "kept", "ffn", 96, init="preserving", verify=True)
    changed = grow_checkpoint(source, tmp_path / "changed", "ffn", 96, verify=True)
    assert kept.probe.is_exact and kept.probe.live_share == pytest.approx(1 / 3, abs=0.05)
    assert not changed.preserves and changed.probe.max_logit_change > kept.probe.max_logit_change
    assert json.loads((tmp_path / "kept" / "growth_receipt.json").read_text())["probe"]["tokens"] == kept.probe.tokens

    monkeypatch.setattr(
        tensors.ParameterPlan, "choose_distribution", lambda self, operators: tensors.InitDistribution(0.0, 0.5)
    )
    with pytest.raises(GrowthError, match="has not preserved its function"):
        grow_checkpoint(source, tmp_path / "broken", "ffn", 96, init="preserving", verify=True)
    assert not (tmp_path / "broken").exists()


def test_receipts_are_read_also_those_of_an_earlier_release(source, tmp_path):
    receipt = grow_checkpoint(source, tmp_path / "grown", "ffn", 64)
    assert GrowthReceipt.load(tmp_path / "grown") == receipt
    earlier = GrowthReceipt.load(Path(__file__).parents[1] / "runs" / "earlier_release" / "grown")
    assert earlier.source == "whole/stage-2-ffn" and earlier.dims == ModelDims(16, 48, 4, 2)
    assert earlier.probe.is_exact and earlier.inits == {"layer": "preserving"}
    with pytest.raises(GrowthError, match=r"growth_receipt.json: no such file; `slop grow` writes it"):
        GrowthReceipt.load(source)
