"""A grown model in memory holds and saves what its source does: names, dtypes and buffers."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM, LlamaForCausalLM

from slop_hf import grow_checkpoint, grow_model
from slop_hf.architectures import ARCHITECTURES
from slop_hf.errors import GrowthError
from slop_hf.testing import build_tiny_model, compute_logit_error
from slop_hf.testing.models import MHA


def list_stored_names(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


#: The families with names of their own; those of the others are Llama's.
FAMILIES = [(family, tied) for family in ("llama", "gpt_neox", "gpt2", "phi3", "mixtral") for tied in (False, True)]
OTHERS = [(family, tied) for family in ARCHITECTURES for tied in (False, True) if (family, tied) not in FAMILIES]


@pytest.mark.parametrize(
    ("family", "tied"), [*FAMILIES, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_files_have_the_names_of_the_source(family, tied, tmp_path):
    """transformers 4 reads `embed_out.weight` and gives a model without it a random head."""
    model = build_tiny_model(family, MHA, tied=tied)
    model.save_pretrained(tmp_path / "source")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    grown = grow_model(model, "ffn", 60)
    grown.save_pretrained(tmp_path / "grown")
    grow_model(loaded, "ffn", 60).save_pretrained(tmp_path / "grown from files")
    grow_checkpoint(tmp_path / "source", tmp_path / "grown on disk", "ffn", 60, progress=False)
    names = {path.name: list_stored_names(path) for path in tmp_path.iterdir()}
    assert len(names) == 4 and all(stored == names["source"] for stored in names.values())
    assert ("embed_out.weight" in names["grown"]) == (family == "gpt_neox" and not tied)
    assert compute_logit_error(grown, AutoModelForCausalLM.from_pretrained(tmp_path / "grown")) == 0


def test_a_checkpoint_without_the_base_models_name_grows(tmp_path):
    """As GPT-2 was published: no `transformer.` before the names, and masks among the tensors."""
    model = build_tiny_model("gpt2", MHA, tied=True)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, file, metadata={"format": "pt"})
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", "layer", 4, init="preserving", progress=False)
    assert "transformer.h.3.attn.c_attn.weight" in list_stored_names(tmp_path / "grown")
    grown, info = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and compute_logit_error(model, grown) < 1e-6


def test_a_subclass_keeps_its_output_embeddings():
    """transformers converts no names for classes other than its own."""

    class Subclass(GPTNeoXForCausalLM):
        pass

    stock = build_tiny_model("gpt_neox", MHA)
    model = Subclass(stock.config).eval()
    model.load_state_dict(stock.state_dict())
    grown = grow_model(model, "layer", 4, init="preserving")
    assert type(grown) is Subclass and compute_logit_error(model, grown) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_each_parameter_keeps_its_dtype(tied, tmp_path):
    model = build_tiny_model("llama", tied=tied, dtype=torch.bfloat16)
    model.model.norm.float()
    model.model.layers[1].mlp.double()
    grown = grow_model(model, "layer", 4, init="stack")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, parameter in grown.named_parameters():
        source = name.replace("layers.3.", "layers.1.").replace("layers.2.", "layers.0.")
        assert parameter.dtype == dtypes[source], name
        assert torch.equal(parameter, model.get_parameter(source)), name
    model.save_pretrained(tmp_path / "source")
    grow_checkpoint(tmp_path / "source", tmp_path / "on disk", "layer", 4, init="stack", progress=False)
    grown.save_pretrained(tmp_path / "in memory")
    files = [tmp_path / name / "model.safetensors" for name in ("on disk", "in memory")]
    assert files[0].read_bytes() == files[1].read_bytes()


class WithBuffers(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("temperature", torch.tensor([2.0, 3.0], dtype=torch.float64))
        self.register_buffer("counter", torch.tensor([5]), persistent=False)
        self.model.register_buffer("of_ffn", torch.ones(config.intermediate_size))
        for layer in self.model.layers:
            layer.register_buffer("mark", torch.zeros(3))
        self.post_init()


@pytest.fixture
def with_buffers():
    model = WithBuffers(build_tiny_model("llama").config)
    model.temperature += 1
    model.counter += 1
    for number, layer in enumerate(model.model.layers):
        layer.mark += number
    return model


def test_buffers_of_a_subclass_are_copied(with_buffers, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    grown = grow_model(with_buffers, "layer", 4, init="stack")
    assert grown.temperature.tolist() == [3.0, 4.0] and grown.temperature.dtype == torch.float64
    assert grown.counter.tolist() == [6] and grown.model.of_ffn.tolist() == [1.0] * 40
    assert [layer.mark.tolist() for layer in grown.model.layers] == [[0.0] * 3, [1.0] * 3] * 2
    grown.temperature += 1
    assert with_buffers.temperature.tolist() == [3.0, 4.0], "shared with the source"
    assert "temperature" in grown.state_dict() and "counter" not in grown.state_dict()
    assert not caplog.records


def test_buffers_that_would_be_lost_are_refused(with_buffers):
    with pytest.raises(GrowthError, match=r"model.of_ffn has shape \[40\] and would need \[60\]"):
        grow_model(with_buffers, "ffn", 60)
    with_buffers.model.layers[0].register_buffer("extra", torch.ones(2))
    with pytest.raises(GrowthError, match=r"WithBuffers does not register the buffer model.layers.0.extra"):
        grow_model(with_buffers, "layer", 4)
