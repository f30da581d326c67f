import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims, grow_checkpoint, grow_model
from slop_hf.errors import GrowthError

DIMS = ModelDims(32, 48, 2, 4)


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(DIMS.to_config(LlamaConfig(vocab_size=50))).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_equals_growth_in_memory(source, tmp_path):
    receipt = grow_checkpoint(source, tmp_path / "grown", "layer", 5, seed=3)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    expected = grow_model(AutoModelForCausalLM.from_pretrained(source), "layer", 5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(grown.parameters(), expected.parameters(), strict=True))
    assert receipt.parameters == grown.num_parameters() and receipt.inits == {"layer": "stack"}
    assert json.loads((tmp_path / "grown" / "growth.json").read_text())["dims"]["num_hidden_layers"] == 5


def test_loads_without_slop_hf(source, tmp_path):
    grow_checkpoint(source, tmp_path / "grown", "ffn", 64)
    code = (
        "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert m.config.intermediate_size == 64 and not any('slop' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "grown")], check=True)


def test_nothing_is_overwritten_or_left_behind(source, tmp_path, monkeypatch):
    with pytest.raises(GrowthError, match="exists already"):
        grow_checkpoint(source, source, "ffn", 64)
    with pytest.raises(GrowthError, match="is not a checkpoint that transformers can read"):
        grow_checkpoint(tmp_path / "none", tmp_path / "grown", "ffn", 64)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        grow_checkpoint(source, tmp_path / "grown", "ffn", 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
