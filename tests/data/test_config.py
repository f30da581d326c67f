from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slop_hf.data.config import DataConfig, Mixture, Source
from slop_hf.errors import DataError
from slop_hf.io.serialization import parse, to_plain, to_yaml

TWO = {"web": Source("web/", weight=0.9), "books": Source(["a.txt", "b/"], weight=0.1, format="lines")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ()}, "source must name"),
        ({"source": ["a.txt", ""]}, "source must name"),
        (
            {"source": 5},
            r"source must name a corpus .* got 5: give 'python-stdlib', 'python-packages', a local path, a URL",
        ),
        ({"split": ""}, "split must not be empty; the default is 'train'"),
        ({"text_column": ""}, "text_column must not be empty"),
        ({"max_documents": 0}, "max_documents must be a whole number, 1 or more, got 0"),
        ({"max_documents": True}, "max_documents"),
        ({"format": "csv"}, "format must be one of text, lines, jsonl, parquet, got 'csv'"),
    ],
)
def test_a_value_of_a_source_out_of_range_is_refused_there_and_in_the_data(
    settings: dict[str, Any], message: str
) -> None:
    for kind in (Source, DataConfig):
        with pytest.raises(DataError, match=message):
            kind(**settings)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "half", True])
def test_a_weight_is_a_number_above_0(weight: Any) -> None:
    with pytest.raises(DataError, match=r"weight must be a number above 0, got .*; to leave a source out, delete it"):
        Source("a", weight=weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": ""}, "tokenizer must be"),
        ({"tokenizer_kind": "words"}, "tokenizer_kind must be one of bpe, sentencepiece, got 'words'"),
        ({"vocab_size": 256}, "vocab_size must be a whole number of at least 257"),
        ({"vocab_size": True}, "vocab_size"),
        ({"block_size": 1}, "block_size must be a whole number, 2 or more"),
        ({"held_out": 1}, "held_out"),
        ({"held_out": -0.1}, "held_out"),
        ({"held_out": float("nan")}, "held_out"),
        ({"held_out": "some"}, "held_out"),
    ],
)
def test_a_value_of_the_data_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataConfig(**settings)


def test_a_given_tokenizer_makes_the_vocabulary_size_irrelevant() -> None:
    assert DataConfig(tokenizer="owner/name", vocab_size=1).tokenizer == "owner/name"


def test_weights_are_shares_or_percent() -> None:
    percent = Mixture({"a": Source("a", weight=75), "b": Source("b", weight=25)})
    assert percent.weights == {"a": 0.75, "b": 0.25}
    thirds = Mixture({name: Source(name, weight=0.3333333) for name in "abc"})
    assert sum(thirds.weights.values()) == pytest.approx(1, abs=1e-12)


def test_weights_that_do_not_add_up_are_refused_with_the_factor() -> None:
    message = r"add up to 80, expected 1 or 100 \(a 60, b 20\); multiplied by 1\.25 they would add up to 100"
    with pytest.raises(DataError, match=message):
        Mixture({"a": Source("a", weight=60), "b": Source("b", weight=20)})


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "-a", "a.b", 5])
def test_a_name_that_could_not_be_part_of_a_file_name_is_refused(name: Any) -> None:
    with pytest.raises(DataError, match="cannot name a source: use letters, digits, _ and -"):
        Mixture({name: Source("a")})


def test_a_share_too_small_to_draw_is_refused() -> None:
    with pytest.raises(DataError, match="b has a share of 1e-07, less than 1e-06; leave it out"):
        Mixture({"a": Source("a", weight=1 - 1e-7), "b": Source("b", weight=1e-7)})


def test_a_mixture_without_sources_is_refused() -> None:
    with pytest.raises(DataError, match="a mixture needs sources"):
        Mixture({})


def test_a_single_source_is_the_corpus() -> None:
    config = DataConfig(["a", "b"], split="test", text_column="body", format="jsonl", max_documents=3)
    source = Source(("a", "b"), split="test", text_column="body", format="jsonl", max_documents=3)
    assert config.sources == {"corpus": source}
    assert config.weights == {"corpus": 1.0}
    assert source.places == ("a", "b") and Source("a").places == ("a",)


def test_a_mixture_gives_the_sources_and_their_shares() -> None:
    config = DataConfig(mixture=Mixture(TWO))
    assert config.sources == TWO
    assert config.weights == {"web": pytest.approx(0.9), "books": pytest.approx(0.1)}


@pytest.mark.parametrize(
    "settings", [{"source": "a"}, {"split": "test"}, {"text_column": "x"}, {"format": "text"}, {"max_documents": 2}]
)
def test_fields_of_a_single_source_do_not_go_with_a_mixture(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(DataError, match=f"{name} .* is for data of one source; set it for sources of the mixture"):
        DataConfig(mixture=Mixture(TWO), **settings)


def test_a_mixture_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(to_yaml(Mixture(TWO)))
    assert Mixture.from_yaml(path) == Mixture(TWO)
    assert DataConfig(mixture=str(path)).sources == TWO
    path.write_text("sources: {web: {source: a, wait: 1}}")
    with pytest.raises(DataError, match=r"mixture\.yaml: unknown key 'sources\.web\.wait'"):
        Mixture.from_yaml(path)
    path.write_text("")
    with pytest.raises(DataError, match=r"mixture\.yaml: missing key 'sources'"):
        Mixture.from_yaml(path)
    path.unlink()
    with pytest.raises(DataError, match=r"mixture\.yaml: no such file"):
        DataConfig(mixture=str(path))


@pytest.mark.parametrize(
    "config", [DataConfig(["a", "b"], held_out=0, document_mask=True), DataConfig(mixture=Mixture(TWO))]
)
def test_the_data_survive_yaml(config: DataConfig) -> None:
    import yaml

    assert parse(DataConfig, yaml.safe_load(to_yaml(config)), where="data", error=DataError) == config
    assert parse(DataConfig, to_plain(config), where="data", error=DataError) == config


def test_a_configuration_is_parsed_strictly() -> None:
    config = parse(DataConfig, {"source": ["a", "b"], "held_out": 0}, where="data", error=DataError)
    assert config == DataConfig(("a", "b"), held_out=0.0)
    for data, message in (
        ({"blocksize": 3}, r"data: unknown key 'blocksize'; did you mean 'block_size'\?"),
        ({"block_size": 0}, "block_size must be a whole number"),
        ({"mixture": {"sources": {"web": {"source": "a", "weight": 2}}}}, "data: .*weights add up to 2, expected 1"),
        ({"mixture": {"sources": {"web": {"sauce": "a"}}}}, r"unknown key 'mixture.*sauce'; did you mean 'source'\?"),
        ({"mixture": {"sources": {"a b": {"source": "a"}}}}, "'a b' cannot name a source"),
    ):
        with pytest.raises(DataError, match=message):
            parse(DataConfig, data, where="data", error=DataError)
