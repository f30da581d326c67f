"""The conformance suite: checks of growth on small random models of any family, offline and without pytest.

After adding a family, an operator or an init, register it and run `check_conformance("its_model_type")`.
`python -m slop_hf.testing --output docs/exactness.md` writes the measured errors as a table.
"""

from .exactness import build_exactness_page
from .models import GQA, MHA, MQA, build_tiny_model, compute_logit_error, make_probe_tokens
from .suite import ROUNDING_FLOORS, TOLERANCE, Case, Result, check, check_conformance, list_conformance_cases, measure

__all__ = [
    "GQA",
    "MHA",
    "MQA",
    "ROUNDING_FLOORS",
    "TOLERANCE",
    "Case",
    "Result",
    "build_exactness_page",
    "build_tiny_model",
    "check",
    "check_conformance",
    "compute_logit_error",
    "list_conformance_cases",
    "make_probe_tokens",
    "measure",
]
