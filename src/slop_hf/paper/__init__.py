"""The numbers that the SLOP paper prints, and their reproduction."""

from .tables import fit_cost_model

__all__ = ["fit_cost_model"]
