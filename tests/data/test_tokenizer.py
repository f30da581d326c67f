from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from slop_hf.data import DataConfig, documents, load_tokenizer, train_tokenizer
from slop_hf.errors import DataError

TEXTS = list(documents(DataConfig("python-stdlib", max_documents=12)))
TOKENIZER = train_tokenizer(TEXTS, 400)


def test_the_vocabulary_has_the_size_asked_for() -> None:
    assert len(TOKENIZER) == 400
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(400))
    assert TOKENIZER.eos_token == TOKENIZER.bos_token == TOKENIZER.pad_token == "<|endoftext|>"
    assert TOKENIZER.eos_token_id == 0


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_every_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_texts_decode_to_themselves_byte_for_byte() -> None:
    for text in [*TEXTS, " leading", "don 't  clean .\r\n\t", "日本語 🙂 \x00\x7f \u202e", "a<|endoftext|>b", ""]:
        assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_merges_shorten_the_texts_they_were_trained_on() -> None:
    text = "".join(TEXTS)
    assert len(TOKENIZER(text).input_ids) < 0.6 * len(text.encode())


def test_a_vocabulary_of_bytes_alone_is_the_smallest() -> None:
    smallest = train_tokenizer(["some text"] * 3, 257)
    assert len(smallest("naïve").input_ids) == len("naïve".encode())
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(["some text"], 256)


def test_training_again_gives_the_same_tokenizer() -> None:
    # test_corpus.py has another process do it, too.
    assert train_tokenizer(iter(TEXTS), 400).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_a_small_corpus_gives_a_smaller_vocabulary_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = train_tokenizer(["abab"], 1000)
    assert 257 < len(tokenizer) < 270
    assert f"vocabulary of {len(tokenizer)} only, 1000 were asked for" in caplog.text


def test_a_saved_tokenizer_loads_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id) == (0, 0, 0)
    assert loaded.decode(loaded(" a , b's <|endoftext|>").input_ids) == " a , b's <|endoftext|>"


@pytest.mark.parametrize("name", ["owner/name", "/no/such/folder"])  # conftest.py sets HF_HUB_OFFLINE
def test_a_tokenizer_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"tokenizer '{name}' cannot be loaded .*: give a folder"):
        load_tokenizer(name)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no eos_token"):
        load_tokenizer(tmp_path)
