"""Marginal utility of a growth schedule (Eq. 2 of the SLOP paper), as a measurement of the library `evaluate`.

Load it by its path, without a network: `evaluate.load(slop_hf.evaluation.measurements.path_of("marginal_utility"))`.
"""

from __future__ import annotations

import datasets
import evaluate

from slop_hf.report.summary import compute_marginal_utility

_DESCRIPTION = """
The reduction of perplexity per device hour of a growth stage, summed over the stages of a growth schedule.
"""

_INPUTS = """
Args:
    data (list of float): perplexity after training of each structure, the initial one first.
    hours (list of float): device hours of each growth stage; one value less than `data`.
Returns:
    marginal_utility (float): perplexity per device hour.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MarginalUtility(evaluate.Measurement):
    """Marginal utility, for `evaluate.load`."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation="SLOP, Eq. 2",
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("float64")}),
        )

    def _compute(self, data: list[float], hours: list[float]) -> dict[str, float]:
        return {"marginal_utility": compute_marginal_utility(list(data), list(hours))}
