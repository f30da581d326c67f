"""How exact growth is, measured: a table of families, operators and inits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import __version__ as transformers_version

from ..growth import INITS
from .suite import ROUNDING_FLOORS, TOLERANCE, Result, conformance_cases, measure

COMMAND = "python -m slop_hf.testing --output docs/exactness.md"
COLUMNS = ("family", "operator", "init", "keeps the function", "float64", "float32", "bfloat16", "casting", "refused")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

_DOUBLE, _SINGLE = f"{TOLERANCE[torch.float64]:.0e}", f"{TOLERANCE[torch.float32]:.0e}"

_HEAD = f"""# How exact growth is

<!-- Written by `{COMMAND}`; run it again instead of editing. -->

The largest difference of logits between the grown model and its source, as a share of the largest logit, on small
random models that show mistakes (`slop_hf.testing.tiny_model`). Each number is the worst of all cases of the row:
multi-head, grouped-query and multi-query attention, embeddings tied and untied, a dimension doubled and one half as
large again, with and without the optional biases.

* An init that keeps the function is exact up to {_DOUBLE} in float64 and {_SINGLE} in float32, and in bfloat16 up to
  {ROUNDING_FLOORS:g} times the error of *casting* the float32 source (or the grown model, if more). The
  command fails where one is not.
* float64 is float64 throughout: what transformers computes in float32 whatever the dtype (most norms, the softmax,
  rotary angles) is computed in float64 too, so that its rounding, about 1e-6, hides nothing.
* *refused*: how many of the row's cases the library does not grow, and why; the numbers are those of the others.

"""


def exactness_page(families: Iterable[str]) -> str:
    """The page `docs/exactness.md`: a row for each family, operator and init, with measured logit errors.

    Args:
        families: model types with an axis table.

    Raises:
        AssertionError: where an error contradicts what the library claims.
    """
    reasons: list[str] = []
    rows = []
    for family in families:
        results = [[measure(case) for case in conformance_cases(family, dtype)] for dtype in DTYPES]
        for operator in INITS:
            for init in INITS[operator]:
                of_row = [[r for r in many if (r.case.operator, r.case.init) == (operator, init)] for many in results]
                rows.append((family, operator, init, *_cells(of_row, reasons)))
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]
    versions = f"Measured with torch {torch.__version__} and transformers {transformers_version} on CPU."
    parts = (
        [_HEAD + "\n".join(lines), "Reasons to refuse:\n\n" + "\n".join(notes)]
        if notes
        else [_HEAD + "\n".join(lines)]
    )
    return "\n\n".join([*parts, versions]) + "\n"


def _cells(by_dtype: Sequence[Sequence[Result]], reasons: list[str]) -> tuple[str, ...]:
    """The cells of a row after its name; new reasons to refuse are added to `reasons`."""
    grown = [[result for result in results if not result.refused] for results in by_dtype]
    why = [result.refused for result in by_dtype[0] if result.refused]
    reasons.extend(reason for reason in dict.fromkeys(why) if reason not in reasons)
    numbers = ", ".join(str(reasons.index(reason) + 1) for reason in dict.fromkeys(why))
    refused = f"{len(why)} of {len(by_dtype[0])} ({numbers})" if why else ""
    if not grown[0]:
        return ("", *[""] * (len(DTYPES) + 1), refused)
    errors = [f"{max(result.error for result in results):.0e}" for results in grown]
    floor = f"{max(result.floor for result in grown[-1]):.0e}"
    return ("yes" if grown[0][0].preserves else "no", *errors, floor, refused)
