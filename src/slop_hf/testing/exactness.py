"""The page `docs/exactness.md`: measured errors of growth for every family, operator and init."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import __version__ as transformers_version

from ..growth import INITS
from ..growth.experts import FAMILIES_WITH_EXPERTS
from .suite import (
    EXPERT_GROWTHS,
    ROUNDING_FLOORS,
    TOLERANCE,
    ExpertGrowthCase,
    Result,
    list_conformance_cases,
    list_expert_cases,
    measure,
)

COLUMNS = ("family", "operator", "init", "keeps the function", "float64", "float32", "bfloat16", "casting", "refused")
EXPERT_COLUMNS = ("family", "becomes", "experts", "width of an expert", "init", *COLUMNS[3:])
MEASURED_DTYPES = (torch.float64, torch.float32, torch.bfloat16)

_DOUBLE, _SINGLE = f"{TOLERANCE[torch.float64]:.0e}", f"{TOLERANCE[torch.float32]:.0e}"

_HEAD = f"""# How exact growth is

<!-- Written by `python -m slop_hf.testing --output docs/exactness.md`; run it again instead of editing. -->

The numbers are the largest differences between the logits of the grown model and its source, divided by the largest
logit. The models are small and random, and built so that mistakes show (`slop_hf.testing.build_tiny_model`).
Each number is the worst over all cases of its row: multi-head, grouped-query and multi-query attention, tied and
untied embeddings, the dimension multiplied by 2 and by 1.5, with and without the optional biases. The inits `random`
and `preserving` of layers also grow the first layers of a model that has none.
[growth.md](growth.md) explains the operators and inits.

* An init that keeps the function is exact up to {_DOUBLE} in float64 and {_SINGLE} in float32. In bfloat16 the
  growth errs at most {ROUNDING_FLOORS:g} times as much as *casting* the float32 source, or the float32 grown model, to
  bfloat16. If an error is larger, the command fails.
* float64 means float64 throughout. transformers computes most norms, the softmax and rotary angles in float32 whatever
  the dtype, and their rounding, about 1e-6, would hide small errors; here they are computed in float64 too.
* In bfloat16, every expert of a model with experts is active. Otherwise rounding would decide between experts that a
  router scores alike, before growth and after it.
* *if whole*: the function stays if the dimension is multiplied by a whole number; the errors are of the other cases.
* *refused* is the number of cases in the row that the library refuses to grow, with the number of the reason below;
  the errors are measured on the other cases.

"""

_EXPERTS_HEAD = """## Experts

The operator `experts` gives a dense model experts, and a model with 4 experts 8 of them. Unless a width is given,
experts are as wide as the networks before growth, which are 40 wide. A dense model keeps its function because the
shares of the active experts are normalised (Mixtral, and Qwen3-MoE with `norm_topk_prob`). A model with experts keeps
it with normalised shares and without (OLMoE), if all copies of the active experts are active. Under `noisy`, and if
utilities decide on the copies, the function changes.

"""


def build_exactness_page(families: Iterable[str]) -> str:
    """Return the page `docs/exactness.md`: one row of measured logit errors per family, operator and init.

    Raises:
        AssertionError: if an error contradicts what the library claims.
    """
    families = list(families)
    reasons: list[str] = []
    rows = []
    for family in families:
        by_dtype = [[measure(case) for case in list_conformance_cases(family, dtype)] for dtype in MEASURED_DTYPES]
        for row in [(operator, init) for operator, inits in INITS.items() for init in inits]:
            of_row = [[item for item in items if (item.case.operator, item.case.init) == row] for items in by_dtype]
            rows.append((family, *row, *_format_cells(of_row, reasons)))
    table = [_format_row(cells) for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    parts = [_HEAD + "\n".join(table)]
    if growths := [growth for growth in EXPERT_GROWTHS if growth[0] in families]:
        parts.append(_EXPERTS_HEAD + "\n".join(_format_row(cells) for cells in _list_expert_rows(growths, reasons)))
    if reasons:
        notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]
        parts.append("Reasons to refuse:\n\n" + "\n".join(notes))
    parts.append(f"Measured with torch {torch.__version__} and transformers {transformers_version} on CPU.")
    return "\n\n".join(parts) + "\n"


def _list_expert_rows(growths: Sequence[ExpertGrowthCase], reasons: list[str]) -> Iterator[Sequence[str]]:
    """Yield the head of the table of the operator `experts`, and the cells of one row per growth."""
    yield from (EXPERT_COLUMNS, ["---"] * len(EXPERT_COLUMNS))
    for family, sizes, init in growths:
        results = [
            [measure(case) for case in list_expert_cases(family, sizes, init, dtype)] for dtype in MEASURED_DTYPES
        ]
        name, width = FAMILIES_WITH_EXPERTS.get(family, family), str(sizes.get("moe_intermediate_size", "as before"))
        yield (family, name, str(sizes["num_experts"]), width, init, *_format_cells(results, reasons))


def _format_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _format_cells(by_dtype: Sequence[Sequence[Result]], reasons: list[str]) -> tuple[str, ...]:
    """Return the cells of a row after its name, and add new reasons to refuse to `reasons`."""
    grown = [[result for result in results if not result.refused] for results in by_dtype]
    refusals = [result.refused for result in by_dtype[0] if result.refused]
    reasons.extend(reason for reason in dict.fromkeys(refusals) if reason not in reasons)
    numbers = ", ".join(str(reasons.index(reason) + 1) for reason in dict.fromkeys(refusals))
    refused = f"{len(refusals)} of {len(by_dtype[0])} ({numbers})" if refusals else ""
    if not grown[0]:
        return (*[""] * (len(MEASURED_DTYPES) + 2), refused)
    errors = [f"{max(result.error for result in results):.0e}" for results in grown]
    floor = f"{max(result.floor for result in grown[-1]):.0e}"
    preserves = {result.preserves for result in grown[0]}
    keeps = "yes" if preserves == {True} else "if whole" if True in preserves else "no"
    return (keeps, *errors, floor, refused)
