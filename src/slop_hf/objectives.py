"""Objectives: what a planner minimises over growth paths.

An objective is a pure function of `Paths` that gives one positive number for each path, smaller being better.
To add one, write it and register it in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cost import flops_per_token, paper_params
from .space import DimsArray


@dataclass(frozen=True)
class Paths:
    """Growth paths side by side.

    Args:
        structures: fields of shape [paths, stages + 1], the initial structure first.
        tokens: training tokens of each structure, shape [stages + 1]; None where no budget was given.
        config: what growth leaves alone (`ConfigSpace.config`).
        sequence_length: tokens of a training sequence.
    """

    structures: DimsArray
    tokens: np.ndarray | None
    config: Mapping[str, Any]
    sequence_length: int


Objective = Callable[[Paths], np.ndarray]


def delta_params(paths: Paths) -> np.ndarray:
    """The product over stages of the parameters added **since the initial model**, Eq. 11 as Tables 1 and 3 take it.

    `prod_k max(1, params(M_{k+1}) - params(M_1))`, with `cost.paper_params`. Eq. 3 of the paper defines the
    increment of a stage instead (`delta_params_eq3`); its Table 1 is reproduced by this one only.
    """
    params = paper_params(paths.structures).astype(np.float64)
    return np.prod(np.maximum(params[:, 1:] - params[:, :1], 1.0), axis=1)


def delta_params_eq3(paths: Paths) -> np.ndarray:
    """The product over stages of the parameters added **by the stage**, Eq. 3 and 11; Table 4 is made by it.

    `prod_k max(1, params(M_{k+1}) - params(M_k))`, with `cost.paper_params`.
    """
    params = paper_params(paths.structures).astype(np.float64)
    return np.prod(np.maximum(np.diff(params, axis=1), 1.0), axis=1)


def flops(paths: Paths) -> np.ndarray:
    """Training FLOPs of all stages, the initial model's included; needs a token budget."""
    assert paths.tokens is not None
    per_token = flops_per_token(paths.structures, paths.config, paths.sequence_length).astype(np.float64)
    return per_token @ paths.tokens.astype(np.float64)


OBJECTIVES: dict[str, Objective] = {
    "delta_params": delta_params,
    "delta_params_eq3": delta_params_eq3,
    "flops": flops,
}

#: Objectives that cannot be told without a token budget.
NEED_TOKENS = frozenset({"flops"})
