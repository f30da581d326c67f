"""A small model with its tokenizer, and data for it; made once."""

import socket

import pytest
from benchmark_data import TEXTS, write_data
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from slop_hf.data import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 270)


@pytest.fixture(scope="session")
def model(tokenizer):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.4,  # far from a uniform guess
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, model, tokenizer):
    directory = tmp_path_factory.mktemp("models") / "small"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory):
    pytest.importorskip("lm_eval")
    return write_data(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
