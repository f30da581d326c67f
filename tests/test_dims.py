import numpy as np
import pytest
from transformers import LlamaConfig

from slop_hf import ModelDims
from slop_hf.errors import DimsError

BASE = LlamaConfig(vocab_size=100, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, attention_bias=True)


def test_defaults_follow_heads_and_hidden():
    dims = ModelDims(96, 256, 3, 6)
    assert (dims.num_key_value_heads, dims.head_dim) == (6, 16)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 256, 2, 3), "not divisible by num_attention_heads 3"),
        ((96, 256, 2, 6, 4), "not divisible by num_key_value_heads 4"),
        ((96, 256, 2, 32), "head_dim 3 is odd"),
        ((96, 256, 2, 6, 6, 7), "head_dim 7 is odd"),
        ((96, 0, 2, 6), "intermediate_size must be a positive whole number, got 0"),
        ((96, 256, -1, 6), "num_hidden_layers must be a whole number, 0 or more"),
        ((96, 256.0, 2, 6), "intermediate_size must be a positive whole number"),
        ((96, 256, True, 6), "num_hidden_layers must be a whole number, 0 or more"),
        ((96, 256, 2, 0), "num_attention_heads must be a positive"),
        ((96, 256, 2, 6, -2), "num_key_value_heads must be a positive"),
        ((96, 256, 2, 6, 6, 16.0), "head_dim must be a positive whole number, got 16.0"),
        ((96, 256, 2, 6, 6, "16"), "head_dim must be a positive whole number, got '16'"),
    ],
)
def test_structures_that_transformers_refuses(sizes, message):
    with pytest.raises(DimsError, match=message):
        ModelDims(*sizes)


def test_numpy_integers_become_ints():
    dims = ModelDims(*np.array([96, 256, 2, 6, 6, 16]))
    assert dims == ModelDims(96, 256, 2, 6) and {type(size) for size in dims.as_dict().values()} == {int}


def test_config_round_trip_keeps_all_else():
    dims = ModelDims(96, 256, 3, 6, 2, 32)
    config = dims.to_config(BASE)
    assert ModelDims.from_config(config) == dims == ModelDims.from_config(config.to_dict())
    assert config.rope_parameters["rope_theta"] == 5000.0 and config.attention_bias and config.vocab_size == 100
    assert BASE.hidden_size == 4096, "the base config must not change"
    assert type(config) is LlamaConfig


def test_config_without_llamas_fields():
    with pytest.raises(
        DimsError, match=r"the config has no 'hidden_size', .*: expected a config with Llama's field names"
    ):
        ModelDims.from_config({"n_embd": 768})


def test_parse_and_print():
    assert ModelDims.parse("(96, 256, 3, 6, 2)") == ModelDims(96, 256, 3, 6, 2)
    assert str(ModelDims(96, 256, 3, 6, 2, 32)) == "(96, 256, 3, 6, kv 2, head_dim 32)"
    for text in ("96,256,3", "96,256,3,6,2,32,1", "a,b,c,d", ""):
        with pytest.raises(DimsError, match="expected hidden,ffn,layers,heads"):
            ModelDims.parse(text)


def test_replace_refuses_unknown_names():
    with pytest.raises(DimsError, match="unknown dimension 'width'"):
        ModelDims(96, 256, 3, 6).replace(width=3)
