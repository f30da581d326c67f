"""A larger vocabulary: rows of the embedding and the head, with the logits of the old tokens unchanged."""

import json

import pytest
import torch
from saved_models import save
from transformers import AutoModelForCausalLM

from slop_hf import GrowthStage, ModelDims, grow_adamw_state, grow_checkpoint, grow_model
from slop_hf.cli import main
from slop_hf.errors import GrowthError
from slop_hf.growth import plan_growth, probe_growth
from slop_hf.growth.receipt import GrowthReceipt
from slop_hf.testing import MHA, build_tiny_model, make_probe_tokens

OLD, NEW = 64, 80


def compute_logits(model):
    with torch.no_grad():
        return model(make_probe_tokens(), use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["mean", "zeros", "random"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_logits_of_old_tokens_stay(family, init, tied):
    model = build_tiny_model(family, MHA, torch.float64, tied)
    grown = grow_model(model, "vocab", NEW, init=init)
    before, after = compute_logits(model), compute_logits(grown)
    assert after.shape[-1] == NEW == grown.config.vocab_size
    assert (after[..., :OLD] - before).abs().max() < 1e-12 * before.abs().max()
    head, old_head = (item.get_output_embeddings().weight for item in (grown, model))
    table = grown.get_input_embeddings().weight
    assert (head is table) == tied and torch.equal(head[:OLD], old_head)
    if init == "random":
        assert 0.1 < head[OLD:].std() < 0.3 and not torch.equal(head[OLD], head[OLD + 1])
        return
    for rows, old in ((head, old_head), (table, model.get_input_embeddings().weight)):
        expected = old.mean(0) if init == "mean" else torch.zeros_like(old[0])
        assert torch.allclose(rows[OLD:], expected.expand(NEW - OLD, -1), rtol=1e-14)
    if init == "mean" and family != "gemma2":  # which caps its logits
        assert torch.allclose(after[..., OLD:], before.mean(-1, keepdim=True).expand(-1, -1, NEW - OLD))


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_embedding_and_head(tied):
    peft = pytest.importorskip("peft")
    targets = ["embed_tokens", "q_proj"] if tied else ["embed_tokens", "lm_head", "q_proj"]
    base = build_tiny_model("llama", MHA, torch.float64, tied)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    grown = grow_model(model.double(), "vocab", NEW)
    before, after = compute_logits(model), compute_logits(grown)
    assert (after[..., :OLD] - before).abs().max() < 1e-12 * before.abs().max()


def test_all_new_tokens_learn():
    model = build_tiny_model("llama", MHA)
    for init in ("mean", "zeros"):
        grown = grow_model(model, "vocab", NEW, init=init)
        tokens = torch.arange(OLD - 4, NEW)[None]
        grown(input_ids=tokens, labels=tokens).loss.backward()
        for weight in (grown.get_input_embeddings().weight, grown.lm_head.weight):
            assert weight.grad[OLD : NEW - 1].abs().amax(1).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_disk_as_in_memory(tmp_path, dtype):
    source = save(tmp_path / "source", dtype=dtype)
    receipt = grow_checkpoint(source, tmp_path / "grown", "vocab", 70, progress=False, verify=True)
    assert receipt.operators == ("vocab",) and receipt.inits == {"vocab": "mean"} and receipt.preserves
    assert receipt.probe.is_exact and receipt.parameters == receipt.source_parameters + 2 * 20 * 32
    grown = grow_model(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), "vocab", 70)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=dtype)
    assert stored.config.vocab_size == 70
    for (name, one), other in zip(grown.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_moments_of_old_rows_stay():
    model = build_tiny_model("llama", MHA)
    plan = plan_growth(model.config, "vocab", NEW, init="zeros")
    ones = {p.source: {"exp_avg": torch.ones(p.old_shape), "exp_avg_sq": torch.ones(p.old_shape)}
            for p in plan.parameters()}  # fmt: skip
    state = grow_adamw_state(ones, plan)["lm_head.weight"]
    assert state["exp_avg"].sum() == OLD * 48 and not state["exp_avg"][OLD:].any()
    assert (state["exp_avg_sq"] == 1).all()
    probe = probe_growth(model, grow_model(model, "vocab", NEW, init="zeros"), plan)
    assert probe.is_exact and probe.loss_change < 1e-6


def test_the_command(tmp_path, capsys, monkeypatch):
    source = save(tmp_path / "source")

    def run(*options):
        monkeypatch.setattr("sys.argv", ["slop", "grow", str(source), "-o", str(tmp_path / "grown"), *options])
        with pytest.raises(SystemExit) as done:
            raise SystemExit(main())
        printed = capsys.readouterr()
        return done.value.code or 0, printed.out, printed.err

    code, out, _ = run("--vocab-size", "70", "--dry-run")
    assert code == 0 and "vocab by mean -> 70 tokens" in " ".join(out.split())
    code, out, _ = run("--vocab-size", "70", "--dry-run", "--json")
    assert json.loads(out)["vocab_size"] == 70
    code, _, err = run("--vocab-size", "70", "--hidden-size", "64")
    assert code and "--vocab-size grows the vocabulary alone" in err
    code, _, _ = run("--vocab-size", "70", "--init", "zeros")
    assert code == 0 and GrowthReceipt.load(tmp_path / "grown").inits == {"vocab": "zeros"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64,), "vocab_size is 64, and growth can only enlarge it, got 64; ask for more tokens"),
        ((8.5,), "new_dims must be the new vocab_size, a whole number, got 8.5"),
        (({"hidden_size": 96},), "new_dims must be the new vocab_size"),
        ((2**21,), "vocab_size would be 2,097,152, but growth takes at most 1,048,576"),
        ((80, "copy"), r"unknown init 'copy' for operator 'vocab' \(known: mean, zeros, random"),
        ((80, {"ffn": "copy"}), "init names 'ffn', but only the vocabulary grows"),
    ],
    ids=range(6),
)
def test_refusals(arguments, message):
    model = build_tiny_model("llama", MHA)
    size, init = (*arguments, None)[:2]
    with pytest.raises(GrowthError, match=message):
        grow_model(model, "vocab", size, init=init)


def test_no_schedule_grows_the_vocabulary():
    with pytest.raises(ValueError, match="unknown operator 'vocab'"):
        GrowthStage(("vocab",), ModelDims(48, 40, 2, 4))
