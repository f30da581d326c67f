"""Reading a model's config without transformers, from a file or from the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..dims import ModelDims
from ..errors import PlanError
from ..io.hub_address import Address

_CARRIED_OVER = ("model_type", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias")


def read_config(source: str, option: str) -> tuple[ModelDims, dict[str, Any]]:
    """The structure of a model, and what growth leaves alone.

    Args:
        source: a model directory, a `config.json`, or a Hub id, also with a revision (`user/name@stage-1-layer`), of
            which nothing but the config is fetched.
        option: that named it, for messages.

    Raises:
        PlanError: where there is no readable config.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            path = path / "config.json"
        elif not path.exists() and (address := Address.find(source)) is not None:
            path = _from_hub(address)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as caught:
        reason = str(caught).strip().partition("\n")[0]
        raise PlanError(f"{option} {source}: no readable config.json there, nor on the Hub ({reason})") from None
    if not isinstance(found, dict):
        raise PlanError(f"{option} {source}: config.json is not an object of settings")
    return ModelDims.from_config(found), {name: found[name] for name in _CARRIED_OVER if name in found}


def _from_hub(address: Address) -> Path:
    from ..hub.access import fetch_file  # the Hub's client is not needed for files

    return fetch_file(address, "config.json")
