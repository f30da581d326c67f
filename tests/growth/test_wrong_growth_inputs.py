"""Wrong arguments of the growth API: each is refused in one or two lines, before anything is written."""

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from slop_hf import (
    GrowthReceipt,
    GrowthSchedule,
    GrowthStage,
    ModelDims,
    grow_adamw_state,
    grow_checkpoint,
    grow_model,
)
from slop_hf.errors import SlopError
from slop_hf.growth import (
    GrownStateReader,
    GrowthPlan,
    extract_base_model,
    grow_optimizer_file,
    grow_optimizer_state_dict,
    grow_weights,
    hash_stored_weights,
    load_adamw_file,
    plan_checkpoint_growth,
    plan_growth,
    probe_growth,
    save_adamw_state,
)
from slop_hf.testing import build_tiny_model

DEEP = 100_000
STAGE = GrowthStage(("ffn",), ModelDims(48, 60, 2, 4, 2, 12))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """What the rows pick their arguments from; nothing in it changes."""
    root = tmp_path_factory.mktemp("wrong")
    model = build_tiny_model("llama")
    config = model.config
    with torch.device("meta"):
        on_meta = LlamaForCausalLM(config)
    changed = LlamaForCausalLM(copy.deepcopy(config))
    changed.config.intermediate_size = 48
    integers = build_tiny_model("llama")
    norm = integers.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to(torch.int8), requires_grad=False)
    quantized = {**config.to_dict(), "quantization_config": {"quant_method": "bitsandbytes"}}
    plan = plan_growth(config, "ffn", 60)
    state = {p.source: {"exp_avg": torch.ones(p.old_shape), "step": torch.tensor(1.0)} for p in plan.parameters()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    saved = root / "source"
    model.save_pretrained(saved)
    save_adamw_state(state, saved / "optimizer.safetensors")

    def save(name, **files):
        directory = root / name
        directory.mkdir()
        for file, content in files.items():
            (directory / f"{file}.json").write_text(content)
        return directory

    LlamaForSequenceClassification(config).save_pretrained(root / "classifier")
    shards = root / "shards"
    shards.mkdir()
    save_adamw_state(state, shards / "optimizer-00001-of-00002.safetensors")
    receipt = json.dumps({"source": "small"})
    return SimpleNamespace(
        root=root,
        model=model,
        config=config,
        bare=LlamaModel(config),
        classifier=LlamaForSequenceClassification(config),
        bloom=BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=50)),
        on_meta=on_meta,
        changed=changed,
        integers=integers,
        quantized=quantized,
        plan=plan,
        weights=dict(model.named_parameters()),
        state=state,
        names=[name for name, _ in model.named_parameters()],
        optimizer=optimizer,
        grown=grow_model(model, "ffn", 60),
        other=build_tiny_model("llama", vocab_size=80),
        source=saved,
        target=root / "target",
        shards=shards,
        empty=save("empty"),
        adapter=save("adapter", adapter_config="{}"),
        nested=save("nested", config="[" * DEEP, growth_receipt='{"inits": ' * DEEP),
        listed=save("listed", config="[1]"),
        unknown=save("unknown", config='{"model_type": "nothing"}'),
        partial=save("partial", growth_receipt=receipt),
        classifier_files=root / "classifier",
    )


def model(m, *arguments, **settings):
    return grow_model(m.model, *arguments, **settings)


def checkpoint(m, *arguments, **settings):
    return grow_checkpoint(m.source, m.target, *(arguments or ("ffn", 60)), **settings)


ROWS = {
    # kinds of models
    "path": (lambda m: grow_model("runs/small", "ffn", 60), "got the path 'runs/small'; load it with"),
    "Path": (lambda m: grow_model(m.source, "ffn", 60), "got the path .*grow_checkpoint"),
    "None": (lambda m: grow_model(None, "ffn", 60), "got NoneType"),
    "config for a model": (lambda m: grow_model(m.config, "ffn", 60), "got LlamaConfig"),
    "class": (lambda m: grow_model(LlamaForCausalLM, "ffn", 60), "got type; pass the model itself"),
    "plain module": (lambda m: grow_model(torch.nn.Linear(2, 2), "ffn", 60), "got Linear"),
    "state dict": (lambda m: grow_model(m.model.state_dict(), "ffn", 60), "got OrderedDict"),
    "bare model": (lambda m: grow_model(m.bare, "ffn", 60), "LlamaModel has no output embeddings"),
    "classifier": (lambda m: grow_model(m.classifier, "ffn", 60), "LlamaForSequenceClassification has no output"),
    "compiled": (lambda m: grow_model(torch.compile(m.model), "ffn", 60), r"grow model\._orig_mod"),
    "wrapped": (lambda m: grow_model(torch.nn.DataParallel(m.model), "ffn", 60), r"DataParallel; grow model\.module"),
    "meta": (lambda m: grow_model(m.on_meta, "ffn", 60), "on the meta device"),
    "integers": (lambda m: grow_model(m.integers, "ffn", 60), "norm.weight has dtype torch.int8.*quantisation"),
    "family": (lambda m: grow_model(m.bloom, "ffn", 60), "no axis table for model_type 'bloom'"),
    "changed config": (lambda m: grow_model(m.changed, "ffn", 60), r"\[40, 48\], but the model's config makes it"),
    "no adapters": (lambda m: extract_base_model(m.model), "expected a PeftModel, got LlamaForCausalLM"),
    # operators and dims
    "operator": (lambda m: model(m, "fnn", 60), "unknown operator 'fnn'"),
    "operator None": (lambda m: model(m, None, 60), "operator must be one of .* got NoneType"),
    "operator list": (lambda m: model(m, ["ffn"], 60), "operator must be one of .* got list"),
    "schedule": (lambda m: model(m, GrowthSchedule(STAGE.dims)), "got GrowthSchedule"),
    "dims None": (lambda m: model(m, "ffn"), "new_dims must be the new intermediate_size"),
    "dims bool": (lambda m: model(m, "ffn", True), "new_dims .* got True"),
    "dims float": (lambda m: model(m, "ffn", 60.0), "new_dims .* got 60.0"),
    "dims text": (lambda m: model(m, "ffn", "60"), "new_dims .* got '60'"),
    "dims list": (lambda m: model(m, "ffn", [60]), "new_dims must be"),
    "dims negative": (lambda m: model(m, "ffn", -60), "positive whole number, got -60"),
    "dims zero": (lambda m: model(m, "ffn", {"intermediate_size": 0}), "positive whole number, got 0"),
    "dims unknown": (lambda m: model(m, "ffn", {"ffn": 60}), "unknown dimension 'ffn'"),
    "dims number": (lambda m: model(m, "ffn", {5: 60}), "unknown dimension 5"),
    "dims empty": (lambda m: model(m, "ffn", {}), "nothing to grow"),
    "smaller": (lambda m: model(m, "ffn", 20), "would shrink from 40 to 20"),
    "other dims": (lambda m: model(m, "ffn", {"intermediate_size": 60, "num_hidden_layers": 3}), "change layer too"),
    "stage and dims": (lambda m: model(m, STAGE, 60), "leave out new_dims and init"),
    "stage and init": (lambda m: model(m, STAGE, init="copy"), "leave out new_dims and init"),
    "too many layers": (lambda m: model(m, "layer", 10_000_000), r"10,000,000 would make .* at most 65,536"),
    "too wide": (lambda m: model(m, "ffn", 10**9), "intermediate_size would be 1,000,000,000"),
    "too many heads": (
        lambda m: model(m, "hidden", {"hidden_size": 10**6, "num_attention_heads": 10**5}),
        "head_dim would be 1,200,000",
    ),
    # inits, seeds, noise
    "init key": (lambda m: model(m, "ffn", 60, init={"foo": "bar"}), r"unknown key 'init.foo' \(known: layer"),
    "init key misspelt": (lambda m: model(m, "ffn", 60, init={"fnn": "copy"}), "did you mean 'ffn'"),
    "init empty": (lambda m: model(m, "ffn", 60, init=""), "unknown init ''"),
    "init value": (lambda m: model(m, "ffn", 60, init={"ffn": "preservng"}), "unknown init 'preservng'"),
    "init of another": (lambda m: model(m, "ffn", 60, init="stack"), "unknown init 'stack' for operator 'ffn'"),
    "init number": (lambda m: model(m, "ffn", 60, init=5), "unknown init 5"),
    "init of a stage": (lambda m: GrowthStage(("ffn",), STAGE.dims, init=""), "unknown init ''"),
    "init key of a stage": (
        lambda m: GrowthStage(("ffn",), STAGE.dims, init={"fnn": "copy"}),
        "init names 'fnn', but the stage grows ffn",
    ),
    "seed bool": (lambda m: model(m, "ffn", 60, seed=True), "seed must be a whole number, got True"),
    "seed float": (lambda m: model(m, "ffn", 60, seed=1.5), "seed must be a whole number, got 1.5"),
    "seed text": (lambda m: model(m, "ffn", 60, seed="a"), "seed must be a whole number, got 'a'"),
    "noise text": (lambda m: model(m, "ffn", 60, noise="a"), "noise must be a fraction .* got 'a'"),
    "noise huge": (lambda m: model(m, "ffn", 60, noise=1e30), r"from 0 to 100, got 1e\+30"),
    "noise nan": (lambda m: model(m, "ffn", 60, noise=float("nan")), "got nan"),
    "noise negative": (lambda m: model(m, "ffn", 60, noise=-0.1), "got -0.1"),
    # plans
    "plan of None": (lambda m: plan_growth(None, "ffn", 60), "expected the config .* got NoneType"),
    "plan of a model": (lambda m: plan_growth(m.model, "ffn", 60), "expected the config .* got LlamaForCausalLM"),
    "plan of a dict": (lambda m: plan_growth({"model_type": "llama"}, "ffn", 60), "has no .*hidden_size"),
    "quantised": (lambda m: plan_growth(m.quantized, "ffn", 60), r"quantization_config \(bitsandbytes\)"),
    "plan's seed": (lambda m: GrowthPlan(m.plan.architecture, m.config, m.plan.old, m.plan.new, {}, 1.5), "seed must"),
    "plan's inits": (
        lambda m: GrowthPlan(m.plan.architecture, m.config, m.plan.old, m.plan.new, {"fnn": "copy"}, 0),
        "did you mean 'ffn'",
    ),
    # weights
    "weights of None": (lambda m: grow_weights(None, m.plan), "weights must map names to tensors"),
    "weights missing": (lambda m: grow_weights({}, m.plan), "has no lm_head.weight"),
    "weights not tensors": (lambda m: grow_weights(dict.fromkeys(m.weights, 1), m.plan), "must be a tensor, got int"),
    "weights' plan": (lambda m: grow_weights(m.weights, None), "plan must be a GrowthPlan"),
    # checkpoints
    "source None": (lambda m: grow_checkpoint(None, m.target, "ffn", 60), "source must be a path, got NoneType"),
    "source model": (lambda m: grow_checkpoint(m.model, m.target, "ffn", 60), "got LlamaForCausalLM; use grow_model"),
    "source missing": (lambda m: grow_checkpoint(m.root / "no", m.target, "ffn", 60), "no such directory"),
    "source file": (lambda m: grow_checkpoint(m.source / "config.json", m.target, "ffn", 60), "not a model directory"),
    "source empty": (lambda m: grow_checkpoint(m.empty, m.target, "ffn", 60), "it has no config.json"),
    "source adapter": (lambda m: grow_checkpoint(m.adapter, m.target, "ffn", 60), "only an adapter; merge it"),
    "source nested": (lambda m: grow_checkpoint(m.nested, m.target, "ffn", 60), "not a checkpoint that transformers"),
    "source list": (lambda m: grow_checkpoint(m.listed, m.target, "ffn", 60), "not a checkpoint that transformers"),
    "source unknown": (
        lambda m: grow_checkpoint(m.unknown, m.target, "ffn", 60),
        "not a checkpoint that transformers",
    ),
    "source classifier": (
        lambda m: grow_checkpoint(m.classifier_files, m.target, "ffn", 60),
        "it is a LlamaForSequenceClassification, and only causal language models can grow",
    ),
    "target None": (lambda m: grow_checkpoint(m.source, None, "ffn", 60), "target must be a path"),
    "target exists": (lambda m: grow_checkpoint(m.source, m.empty, "ffn", 60), "exists already"),
    "target in a file": (
        lambda m: grow_checkpoint(m.source, m.source / "config.json" / "target", "ffn", 60),
        "could not be written",
    ),
    "no stages": (lambda m: checkpoint(m, []), "operator must be a name, a GrowthStage or several"),
    "stages of names": (lambda m: checkpoint(m, ["ffn"], 60), "operator must be a name"),
    "disk init": (lambda m: checkpoint(m, init={"fnn": "copy"}), "did you mean 'ffn'"),
    "disk seed": (lambda m: checkpoint(m, seed="a"), "seed must be a whole number"),
    "disk noise": (lambda m: checkpoint(m, noise=1e30), "noise must be a fraction"),
    "threads zero": (lambda m: checkpoint(m, threads=0), "threads must be a whole number"),
    "threads text": (lambda m: checkpoint(m, threads="two"), "threads must be a whole number"),
    "shards zero": (lambda m: checkpoint(m, max_shard_size=0), "max_shard_size must be"),
    "shards bool": (lambda m: checkpoint(m, max_shard_size=True), "max_shard_size must be"),
    "shards text": (lambda m: checkpoint(m, max_shard_size="5 parsecs"), "max_shard_size must be"),
    "shards empty": (lambda m: checkpoint(m, max_shard_size=""), "max_shard_size must be"),
    "disk layers": (lambda m: checkpoint(m, "layer", 10**7), "10,000,000 would make"),
    "planned layers": (lambda m: plan_checkpoint_growth(m.source, m.target, "layer", 10**7), "10,000,000 would make"),
    # states of AdamW
    "state None": (lambda m: grow_adamw_state(None, m.plan), "the state must map"),
    "state of torch": (lambda m: grow_adamw_state(m.optimizer, m.plan), "grow_optimizer_state_dict"),
    "state empty": (lambda m: grow_adamw_state({}, m.plan), "holds no state"),
    "state of another": (lambda m: grow_adamw_state({"x": {}}, m.plan), "unlike the model being grown"),
    "state shape": (
        lambda m: grow_adamw_state({"lm_head.weight": {"exp_avg": torch.ones(2)}}, m.plan),
        r"has shape \[2\], the model's has",
    ),
    "state integers": (
        lambda m: grow_adamw_state({"lm_head.weight": {"exp_avg": torch.ones(64, 48, dtype=torch.int8)}}, m.plan),
        "unknown to AdamW",
    ),
    "state key": (lambda m: grow_adamw_state({"lm_head.weight": {"state1": torch.ones(2)}}, m.plan), "'state1'"),
    "state plan": (lambda m: grow_adamw_state(m.state, m.model), "plan must be a GrowthPlan"),
    "state step": (lambda m: grow_adamw_state(m.state, m.plan, step="restart"), "step must be one of keep, reset"),
    "state dict None": (lambda m: grow_optimizer_state_dict(None, m.names, m.plan), "expected the state_dict"),
    "state dict empty": (lambda m: grow_optimizer_state_dict({}, m.names, m.plan), "expected the state_dict"),
    "names few": (lambda m: grow_optimizer_state_dict(m.optimizer, m.names[1:], m.plan), "names; name each one"),
    "names text": (lambda m: grow_optimizer_state_dict(m.optimizer, "lm_head", m.plan), "names must be a list"),
    "names twice": (
        lambda m: grow_optimizer_state_dict(m.optimizer, [*m.names[1:], m.names[1]], m.plan),
        "each once",
    ),
    "names unknown": (
        lambda m: grow_optimizer_state_dict(m.optimizer, [*m.names[1:], "x"], m.plan),
        "has no parameter x",
    ),
    "file None": (lambda m: grow_optimizer_file(None, m.target, m.plan), "source must be a path"),
    "file missing": (lambda m: grow_optimizer_file(m.empty, m.target, m.plan), "has no optimizer state"),
    "file of weights": (
        lambda m: grow_optimizer_file(m.source / "model.safetensors", m.target, m.plan),
        "is not AdamW's state",
    ),
    "file's target": (lambda m: grow_optimizer_file(m.source, None, m.plan), "target must be a path"),
    "file's target exists": (lambda m: grow_optimizer_file(m.source, m.source, m.plan), "exists already"),
    "file's plan": (lambda m: grow_optimizer_file(m.source, m.target, None), "plan must be a GrowthPlan"),
    "file's step": (lambda m: grow_optimizer_file(m.source, m.target, m.plan, step=0), "step must be one of"),
    "shard missing": (lambda m: grow_optimizer_file(m.shards, m.target, m.plan), "has 1 shards of 2"),
    "load missing": (lambda m: load_adamw_file(m.empty), "has no optimizer state"),
    "save text": (lambda m: save_adamw_state({"w": {"step": "3"}}, m.target), "step/w must be a floating-point"),
    "save None": (lambda m: save_adamw_state(m.state, None), "path must be a path"),
    "reader": (lambda m: GrownStateReader(m.empty, m.config, m.plan), "has no weights"),
    # verification and receipts
    "probe a path": (lambda m: probe_growth(str(m.source), m.grown, m.plan), "source must be a model in memory"),
    "probe None": (lambda m: probe_growth(m.model, None, m.plan), "grown must be a model in memory, got NoneType"),
    "probe meta": (lambda m: probe_growth(m.on_meta, m.grown, m.plan), "source is on the meta device"),
    "probe's plan": (lambda m: probe_growth(m.model, m.grown, "ffn"), "plan must be a GrowthPlan"),
    "probe another": (lambda m: probe_growth(m.model, m.model, m.plan), "the plan grows to .* has"),
    "probe vocabularies": (lambda m: probe_growth(m.model, m.other, None), "have 64 and 80 tokens"),
    "tokens list": (lambda m: probe_growth(m.model, m.grown, m.plan, [[1, 2]]), "tokens must be integers"),
    "tokens flat": (lambda m: probe_growth(m.model, m.grown, m.plan, torch.arange(4)), r"got torch.int64 \[4\]"),
    "tokens float": (lambda m: probe_growth(m.model, m.grown, m.plan, torch.ones(1, 4)), "got torch.float32"),
    "tokens none": (
        lambda m: probe_growth(m.model, m.grown, m.plan, torch.zeros(0, 4, dtype=torch.long)),
        "at least two per row",
    ),
    "tokens unknown": (lambda m: probe_growth(m.model, m.grown, m.plan, torch.full((1, 4), 64)), "from 0 to 63"),
    "hash": (lambda m: hash_stored_weights(str(m.empty)), "has no weights"),
    "receipt missing": (lambda m: GrowthReceipt.load(m.empty), "no such file; `slop grow` writes it"),
    "receipt nested": (lambda m: GrowthReceipt.load(m.nested), "not valid JSON"),
    "receipt partial": (lambda m: GrowthReceipt.load(m.partial), "missing key 'operators'"),
}


@pytest.mark.parametrize("row", ROWS)
def test_wrong_inputs_are_refused(row, make):
    call, message = ROWS[row]
    before = sorted(make.root.rglob("*"))
    with pytest.raises(SlopError) as refusal:
        call(make)
    text = str(refusal.value)
    assert re.search(message, text), text
    assert len(text.splitlines()) <= 2 and len(text) < 400, text
    assert sorted(make.root.rglob("*")) == before, "something was written"


def test_numbers_of_numpy_are_numbers(make):
    expected = grow_model(make.model, "ffn", 60, seed=3, noise=0.5)
    sizes = {"intermediate_size": np.int32(60)}
    for dims, noise in ((np.int64(60), np.float64(0.5)), (sizes, np.float32(0.5))):
        grown = grow_model(make.model, "ffn", dims, seed=np.int64(3), noise=noise)
        assert all(torch.equal(grown.get_parameter(name), value) for name, value in expected.named_parameters())
        json.dumps(grown.config.to_dict())


def test_receipts_hold_numbers_of_numpy(make, tmp_path):
    settings = {"seed": np.int64(3), "noise": np.float32(0.5), "threads": np.int8(1), "max_shard_size": np.int64(9000)}
    receipt = grow_checkpoint(make.source, tmp_path / "grown", "ffn", np.int64(60), progress=False, **settings)
    assert GrowthReceipt.load(tmp_path / "grown") == receipt and (receipt.seed, receipt.noise) == (3, 0.5)
