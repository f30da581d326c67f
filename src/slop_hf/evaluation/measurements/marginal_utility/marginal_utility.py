"""Marginal utility of a growth schedule (Eq. 2 of the SLOP paper), as a measurement of the library `evaluate`.

Load it by its path, without a network: `evaluate.load(slop_hf.evaluation.measurements.path_of("marginal_utility"))`.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from slop_hf.report.summary import marginal_utility

_DESCRIPTION = """
What each stage took off the perplexity for an hour of its training, summed over the stages of a growth schedule.
"""

_INPUTS = """
Args:
    data (list of float): perplexity after training of each structure, the initial one first.
    hours (list of float): device hours of each growth stage, one less.
Returns:
    marginal_utility (float): in perplexity a device hour.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MarginalUtility(evaluate.Measurement):
    """See above."""

    def _info(self) -> Any:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation="SLOP, Eq. 2",
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("float64")}),
        )

    def _compute(self, data: list[float], hours: list[float]) -> dict[str, float]:
        return {"marginal_utility": marginal_utility(list(data), list(hours))}
