from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from slop_hf.data import Source, load_tokenizer, read_documents, train_tokenizer
from slop_hf.data.tokenizer import convert_sentencepiece, train_sentencepiece
from slop_hf.errors import DataError

TEXTS = list(read_documents(Source("python-stdlib", max_documents=12)))
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
    assert f"vocabulary of only {len(tokenizer)} tokens, vocab_size is 1000" in caplog.text


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


@pytest.fixture(scope="module")
def processor() -> Any:
    pytest.importorskip("sentencepiece")
    return train_sentencepiece(TEXTS, 600)


@pytest.fixture(scope="module")
def tokenizer(processor: Any) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 600, "sentencepiece")


class TestSentencePiece:
    """Needs the extra `sentencepiece`."""

    def test_ids_are_sentencepieces_own(self, processor: Any) -> None:
        converted = convert_sentencepiece(processor)
        for text in [*TEXTS, "  two  spaces ", "a\tb\r\n\n", "naïve ☕ 日本語", "2026", "<0x41> <s> <unk>", ""]:
            assert converted.encode(text).ids == processor.encode(text)

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet="  =_seltf0\n\t☕é") | st.text().filter(lambda text: "▁" not in text))
    def test_ids_are_sentencepieces_own_for_any_text(self, processor: Any, text: str) -> None:
        assert convert_sentencepiece(processor).encode(text).ids == processor.encode(text)

    @settings(max_examples=50, deadline=None)
    @given(st.text())
    def test_every_text_decodes_to_itself(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_the_vocabulary_is_laid_out_as_llamas(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert len(tokenizer) == 600
        assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
        assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == ("<unk>", "<s>", "</s>")
        digits = tokenizer.convert_ids_to_tokens(tokenizer("x = 2026").input_ids)[-4:]
        assert digits == list("2026")
        assert any(set(token) == {" "} and len(token) > 3 for token in tokenizer.get_vocab())

    def test_training_again_gives_the_same_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        again = train_tokenizer(iter(TEXTS), 600, "sentencepiece")
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()

    @pytest.mark.slow
    def test_it_loads_without_the_package_and_this_library(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        """Also next to a Llama config, which names another class of tokenizers."""
        tokenizer.save_pretrained(tmp_path)
        LlamaConfig().save_pretrained(tmp_path)
        code = f"""
import sys
sys.modules["sentencepiece"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
assert "slop_hf" not in sys.modules
text = "▁ def f(x):  return 12 ☕\\n"
print(tokenizer.decode(tokenizer(text).input_ids) == text, *tokenizer(text).input_ids, tokenizer.eos_token_id)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        expected = [True, *tokenizer("▁ def f(x):  return 12 ☕\n").input_ids, 2]
        assert done.stdout.split() == list(map(str, expected))
        assert load_tokenizer(tmp_path).eos_token_id == 2

    def test_a_vocabulary_below_the_characters_is_refused(self, processor: Any) -> None:
        with pytest.raises(DataError, match=r"vocab_size 257 is too small for SentencePiece: 26\d tokens are needed"):
            train_tokenizer(["some text"], 257, "sentencepiece")

    def test_texts_without_content_are_refused(self, processor: Any) -> None:
        with pytest.raises(DataError, match="give more text"):
            train_tokenizer(["\n"], 600, "sentencepiece")

    def test_the_error_of_a_source_is_its_own(self, processor: Any) -> None:
        def texts() -> Iterator[str]:
            yield "some text"
            raise DataError("the network is gone")

        with pytest.raises(DataError, match="the network is gone"):
            train_tokenizer(texts(), 600, "sentencepiece")


def test_sentencepiece_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"pip install 'slop-hf\[sentencepiece\]'"):
        train_tokenizer(["some text"], 600, "sentencepiece")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DataError, match="'bpe' or 'sentencepiece', got 'unigram'"):
        train_tokenizer(["some text"], 600, "unigram")  # type: ignore[arg-type]
