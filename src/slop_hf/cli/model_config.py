"""Structures, model configs and growth laws from command-line options, read without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..architectures import ARCHITECTURES, read_setting
from ..cost.flops import DEFAULT_CONFIG
from ..cost.growth_law import GrowthLaw
from ..cost.law_transfer import load_default_law
from ..dims import ModelConfig, ModelDims
from ..errors import DimsError, PlanError
from ..io.hub_address import Address
from ..io.network_errors import get_first_line
from ..io.numbers import is_whole_number, require_whole_number
from ..io.serialization import read_json

#: Tokens per training sequence, unless a model has fewer positions.
_USUAL_LENGTH = 2048
_KEPT_BY_GROWTH = ("model_type", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias")


def read_config(source: str, option: str) -> tuple[ModelDims, dict[str, object]]:
    """Read the structure of a model, and the part of its config that growth does not change.

    Args:
        source: model directory, `config.json`, or Hub id, also with a revision (`user/name@stage-1-layer`), of which
            only the config is fetched.
        option: option that names the source, for error messages.
    """
    return split_config(read_whole_config(source, option), f"{option} {source}")


def read_whole_config(source: str, option: str) -> dict[str, object]:
    """Read the config of a model; arguments as for `read_config`.

    Raises:
        PlanError: if the config is missing, or not an object of settings.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and (address := Address.find(source)) is not None:
        from ..hub.access import fetch_file  # the Hub's client is not needed for files

        try:
            path = fetch_file(address, "config.json")
        except (OSError, ValueError) as caught:
            reason = get_first_line(caught)
            raise PlanError(f"{option} {source}: no readable config.json there, nor on the Hub ({reason})") from None
    remedy = f"give {option} a model directory, a config.json or a Hub id"
    config = read_json(path, if_missing=remedy, error=PlanError)
    if not isinstance(config, dict):
        raise PlanError(f"{path}: not an object of settings; {remedy}")
    return config


def choose_sequence_length(config: Mapping[str, object], given: int | None) -> int:
    """Return the tokens per training sequence: by default 2048, or as many as the model has positions for.

    Args:
        config: whole config of the model; empty without a model.
        given: value of `--sequence-length`; None if it is not given.

    Raises:
        PlanError: if more are given than the model has positions for.

    >>> choose_sequence_length({"model_type": "gpt2", "n_positions": 1024}, None)
    1024
    """
    family = ARCHITECTURES.get(str(config.get("model_type")))
    positions = None if family is None else family.read(config, "max_position_embeddings")
    if positions is None or not is_whole_number(positions, least=1):
        return _USUAL_LENGTH if given is None else given
    most = int(positions)
    if given is not None and given > most:
        raise PlanError(
            f"--sequence-length {given} is above the model's max_position_embeddings {most}: give "
            f"--sequence-length {most} or less"
        )
    return min(_USUAL_LENGTH, most) if given is None else given


def split_config(config: Mapping[str, object], where: str) -> tuple[ModelDims, dict[str, object]]:
    """Return the structure that a config describes, and the part of the config that growth does not change.

    Args:
        config: config of a model as plain data.
        where: name of the config, for error messages.

    Raises:
        PlanError: if it describes no structure, or one with experts that cannot grow.
    """
    try:
        dims = ModelDims.from_config(config)
    except DimsError as caught:
        raise PlanError(f"{where}: {caught}") from None
    family = ARCHITECTURES.get(str(config.get("model_type")))
    if family is not None and family.has_experts and (reason := family.explain_refusal(config)):
        raise PlanError(f"{where}: {reason}")
    kept = dict.fromkeys((*_KEPT_BY_GROWTH, *_list_family_fields(config)))
    return dims, {name: config[name] for name in kept if name in config}


def _list_family_fields(config: ModelConfig) -> list[str]:
    """Return the fields of a config, other than the dims, that decide on the parameters of its family."""
    family = ARCHITECTURES.get(str(read_setting(config, "model_type")))
    if family is None:
        return []
    has_positions = any("position" in row.axes for row in family.parameters)
    names = ["max_position_embeddings"] if has_positions else []
    names += ["num_experts", "num_experts_per_tok"] if family.has_experts else []
    return [*family.flags, *names, *(family.config_fields.get(name, name) for name in names)]


def read_structure(which: str, text: str | None, source: str | None, *options: str) -> ModelDims:
    """Read a structure, given as numbers by one option or as a model by another.

    Args:
        which: adjective for the structure in error messages, such as "initial".
        text: value of the first option, such as `768,2048,6,6`.
        source: value of the second option, as for `read_config`.
        options: names of the two options, for error messages.
    """
    if text is not None and source is None:
        return parse_structure(text, options[0])
    if source is not None and text is None:
        return read_config(source, options[-1])[0]
    raise PlanError(f"give the {which} structure with either {' or '.join(options)}")


def parse_structure(text: str, option: str) -> ModelDims:
    """Read a structure from numbers, such as `768,2048,6,6`.

    Args:
        option: option that gives them, for error messages.

    Raises:
        PlanError: if they are no structure.
    """
    try:
        return ModelDims.parse(text)
    except DimsError as caught:
        raise PlanError(f"{option} {text}: {caught}") from None


def read_law(path: str | Path | None, option: str = "--law") -> GrowthLaw:
    """Read the growth law that an option names; None is the default law.

    Raises:
        PlanError: if the file holds no law.
    """
    if path is None:
        return load_default_law()
    law = GrowthLaw.from_yaml(path)
    if law == GrowthLaw():
        raise PlanError(
            f"{option} {path}: empty, it holds no constants; give a file that `slop calibrate --loss` wrote"
        )
    return law


def build_config(source: str | None, vocab_size: int | None, *, tied: bool) -> ModelConfig:
    """Build the model config that `--from`, `--vocab-size` and `--tied` describe; by default a Llama's."""
    if vocab_size is not None:
        require_whole_number(vocab_size, "--vocab-size", error=PlanError)
    config = dict(DEFAULT_CONFIG) if source is None else read_config(source, "--from")[1]
    config |= {"vocab_size": vocab_size} if vocab_size is not None else {}
    config |= {"tie_word_embeddings": True} if tied else {}
    return config
