"""The conformance suite: what growth promises, checked on small random models of any family, offline.

Whoever adds a family, an operator or an init registers it and runs `conformance("its_model_type")`; pytest is not
needed. `python -m slop_hf.testing --output docs/exactness.md` writes what it measures as a table.
"""

from .exactness import exactness_page
from .models import GQA, MHA, MQA, logit_error, probe, tiny_model
from .suite import ROUNDING_FLOORS, TOLERANCE, Case, Result, check, conformance, conformance_cases, measure

__all__ = [
    "GQA",
    "MHA",
    "MQA",
    "ROUNDING_FLOORS",
    "TOLERANCE",
    "Case",
    "Result",
    "check",
    "conformance",
    "conformance_cases",
    "exactness_page",
    "logit_error",
    "measure",
    "probe",
    "tiny_model",
]
