"""`PathRules`: which structures and which growths a path may use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..dims import ModelDims
from .space import ConfigSpace
from .structures import DimsArray, Structures


@dataclass(frozen=True)
class PathRules:
    """What paths keep to.

    Args:
        space: its limits hold for every structure on the way.
        max_factor: largest growth of the parameters in one stage; None for any.
        through: structures that a path has to pass.
    """

    space: ConfigSpace
    max_factor: float | None = None
    through: tuple[ModelDims, ...] = ()

    def vertices(self, structures: Structures) -> np.ndarray:
        """Whether a path may use each structure."""
        return self.space.allows(structures.dims)

    def edges(self, before: Structures, after: Structures) -> np.ndarray:
        """Whether a path may grow each structure into the other."""
        allowed = np.ones(len(before), dtype=bool)
        if self.max_factor is not None:
            allowed &= after.parameters <= before.parameters * self.max_factor
        for waypoint in self.through:
            # A path all of whose growths end below the waypoint or begin above it has been at the waypoint.
            allowed &= within(after.dims, waypoint) | beyond(before.dims, waypoint)
        return allowed


def within(structures: DimsArray, bound: ModelDims) -> np.ndarray:
    """Whether no size of a structure is above the bound's."""
    return np.logical_and.reduce([getattr(structures, name) <= size for name, size in bound.as_dict().items()])


def beyond(structures: DimsArray, bound: ModelDims) -> np.ndarray:
    """Whether no size of a structure is below the bound's."""
    return np.logical_and.reduce([getattr(structures, name) >= size for name, size in bound.as_dict().items()])
