"""Small models on disk, and helpers that read them back."""

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims

DIMS = ModelDims(32, 48, 2, 4)
SHARD = "20KB"


def save(path, make=LlamaForCausalLM, config=LlamaConfig, dtype=torch.float32, shard="5GB", dims=DIMS, **settings):
    torch.manual_seed(0)
    model = make(dims.to_config(config(vocab_size=50, initializer_range=0.1, **settings))).to(dtype)
    for name, value in model.named_parameters():
        if value.dim() == 1:  # gains and biases of different values
            torch.nn.init.normal_(value, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


def assert_same(path, expected):
    grown = load(path)
    weights, others = dict(grown.named_parameters()), dict(expected.named_parameters())
    assert weights.keys() == others.keys()
    different = [name for name in weights if not torch.equal(weights[name], others[name])]
    assert not different and {value.dtype for value in weights.values()} == {expected.dtype}
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert {**grown.config.to_dict(), "_name_or_path": ""} == {**expected.config.to_dict(), "_name_or_path": ""}


def in_the_open(path):
    return sorted(entry.name for entry in path.iterdir())


def change(source, edit):
    """Rewrite the only file of weights."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
