"""`PathConstraints`: which structures and which growths a path may use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..dims import ModelDims
from .space import ConfigSpace
from .structures import BoolArray, DimsArray, DimsTable


@dataclass(frozen=True)
class PathConstraints:
    """Constraints on the structures and growths of a path.

    Args:
        space: its limits hold for every structure of the path.
        max_factor: largest growth of the parameters in one stage; None for no limit.
        through: structures that every path passes through.
    """

    space: ConfigSpace
    max_factor: float | None = None
    through: tuple[ModelDims, ...] = ()

    def allow_growths(self, before: DimsTable, after: DimsTable) -> BoolArray:
        """Return whether a path may grow each structure into the other; one True for all without constraints."""
        allowed = np.asarray(True)
        if self.max_factor is not None:
            allowed = allowed & (after.parameters <= before.parameters * self.max_factor)
        for waypoint in self.through:
            # If every growth of a path ends below the waypoint or begins above it, the path visits the waypoint.
            allowed = allowed & (is_at_most(after.dims, waypoint) | is_at_least(before.dims, waypoint))
        return allowed


def is_at_most(structures: DimsArray, bound: ModelDims) -> BoolArray:
    """Return whether no size of each structure is above the bound's."""
    return np.all([getattr(structures, name) <= size for name, size in bound.as_dict().items()], axis=0)


def is_at_least(structures: DimsArray, bound: ModelDims) -> BoolArray:
    """Return whether no size of each structure is below the bound's."""
    return np.all([getattr(structures, name) >= size for name, size in bound.as_dict().items()], axis=0)
