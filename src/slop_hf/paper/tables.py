"""The numbers that the SLOP paper prints, and a cost model fitted to its GPU hours.

*Model Growth Schedule Learning via Optimal Path (SLOP) for Efficient LLM Pre-Training*, submitted to ICLR 2025,
withdrawn, anonymous. Products of parameter increments are strings as printed, so that a computed product can be
compared digit by digit. `docs/reproduction.md` explains the conventions that the paper does not state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ..cost.flops import count_flops_per_token
from ..cost.hours import CostModel, Measurement
from ..dims import ModelDims

#: Tokens per training sequence. Not printed; with 2048 and Llama's vocabulary, the hours are linear in the FLOPs.
SEQUENCE_LENGTH = 2048

#: Training tokens: initial model, growth stage, whole run (section 4.1).
INITIAL_TOKENS, STAGE_TOKENS, TOTAL_TOKENS = 25 * 10**9, 10 * 10**9, 65 * 10**9

#: The initial structure of Tables 1, 2, 4 and 10, "100M" (section 4.1).
INITIAL = ModelDims(768, 2048, 6, 6)

#: The initial structure of Table 3. Printed as (1024, 4096, 16, 24), which would be 16 layers and 24 heads; but only
#: 24 layers reproduce its products and make the "450M" of the text, and 24 does not divide 1024.
INITIAL_450M = ModelDims(1024, 4096, 24, 16)


@dataclass(frozen=True)
class GrownRun:
    """One row of Tables 1, 3 and 4: growth to a target in one order.

    Args:
        target: structure at the end; with heads of size 128, as in Table 4, if the paper gives no heads.
        sequence: order of growth, one letter per stage.
        product: product of the parameter increments, as printed.
        perplexity: final perplexity.
        stage_hours, stage_tokens: GPU hours and training tokens of each growth stage.
        total_hours: printed sum of these hours and the initial model's.
        recommended: whether the paper recommends this row.
    """

    target: ModelDims
    sequence: str
    product: str
    perplexity: float
    stage_hours: tuple[float, ...]
    total_hours: float
    stage_tokens: tuple[int, ...] = (STAGE_TOKENS,) * 3
    recommended: bool = False

    def path(self, initial: ModelDims) -> tuple[ModelDims, ...]:
        """The structures from `initial` to the target, see `trace_path`."""
        return trace_path(initial, self.target, self.sequence)


@dataclass(frozen=True)
class GrowthTable:
    """One of Tables 1, 3 and 4: its initial structure, the structure's printed GPU hours, and its rows."""

    number: int
    initial: ModelDims
    initial_hours: float
    runs: tuple[GrownRun, ...]

    @property
    def targets(self) -> tuple[ModelDims, ...]:
        """The distinct targets, in the order of the rows."""
        return tuple(dict.fromkeys(run.target for run in self.runs))

    def list_stages(self, initial: ModelDims | None = None) -> list[tuple[ModelDims, int, float]]:
        """Return the structure, tokens and printed GPU hours of each growth stage; `initial` as in `trace_path`."""
        return [
            stage
            for run in self.runs
            for stage in zip(run.path(initial or self.initial)[1:], run.stage_tokens, run.stage_hours, strict=True)
        ]


@dataclass(frozen=True)
class ComparedRun:
    """The results of one method of Tables 2 and 10."""

    perplexity: float
    hours: float


def trace_path(initial: ModelDims, target: ModelDims, sequence: str) -> tuple[ModelDims, ...]:
    """Return the structures along an order of growth, the initial one first.

    Heads and their size have no letter in the paper's tables, and ffn has none in Table 4; dimensions without a letter
    follow `h`. A dimension may shrink, as in Table 3; such a path has a cost, but no model can grow along it.

    >>> [str(dims) for dims in trace_path(INITIAL, ModelDims(1536, 4096, 32, 12), "h-l")]
    ['(768, 2048, 6, 6)', '(1536, 4096, 6, 12)', '(1536, 4096, 32, 12)']
    """
    structures = [initial]
    for letter in sequence.split("-"):
        grown = _GROWN_BY[letter] + (_GROWN_BY["f"] if letter == "h" and "f" not in sequence else ())
        structures.append(structures[-1].replace(**{name: getattr(target, name) for name in grown}))
    return tuple(structures)


_GROWN_BY = {
    "l": ("num_hidden_layers",),
    "f": ("intermediate_size",),
    "h": ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
}


def _target(hidden: int, ffn: int, layers: int) -> ModelDims:
    """Return a target as the tables name it, with heads of size 128 as in the text on Table 4."""
    return ModelDims(hidden, ffn, layers, hidden // 128)


#: The target of the recommended rows of Tables 1, 2 and 4.
TARGET = _target(2816, 7680, 8)

#: Orders of growth from 100M to four structures of about 1B parameters.
TABLE_1 = GrowthTable(
    1,
    INITIAL,
    34.38,
    (
        GrownRun(TARGET, "l-h-f", "6.59E+24", 31.43, (8.65, 27.53, 43.39), 113.94),
        GrownRun(TARGET, "f-h-l", "4.14E+25", 33.48, (11.21, 34.01, 43.39), 123.09),
        GrownRun(TARGET, "h-f-l", "1.81E+26", 39.84, (22.12, 34.01, 43.39), 133.89),
        GrownRun(_target(1280, 3584, 40), "h-f-l", "4.66E+24", 31.1, (10.32, 11.80, 45.22), 101.72),
        GrownRun(_target(1280, 3584, 40), "l-h-f", "1.65E+26", 38.65, (19.66, 35.39, 45.22), 134.66),
        GrownRun(_target(1536, 4096, 32), "f-h-l", "4.24E+24", 31.43, (9.14, 14.1, 49.94), 107.62),
        GrownRun(_target(1536, 4096, 32), "l-h-f", "1.52E+26", 39.85, (16.91, 37.36, 49.94), 138.59),
        GrownRun(_target(2560, 6912, 10), "f-l-h", "8.53E+24", 32.99, (10.76, 14.01, 44.40), 103.55),
        GrownRun(_target(2560, 6912, 10), "h-f-l", "1.24E+26", 38.65, (19.66, 29.00, 44.40), 127.44),
        GrownRun(TARGET, "l-f-h", "1.69E+24", 30.61, (8.65, 12.97, 43.39), 99.39, recommended=True),
    ),
)

#: Results by method of training `TARGET`.
TABLE_2 = {
    "from scratch": ComparedRun(26.43, 282.01),
    "single stage": ComparedRun(28.76, 207.92),
    "MSG": ComparedRun(31.18, 101.96),
    "ELLE": ComparedRun(30.6, 121.86),
    "SLOP": ComparedRun(30.61, 99.39),
}

#: Orders of growth from 450M.
TABLE_3 = GrowthTable(
    3,
    INITIAL_450M,
    102.67,
    (
        GrownRun(_target(1152, 3072, 50), "f-l-h", "1.59E+17", 35.08, (8.55, 28.02, 44.61), 183.85),
        GrownRun(_target(1152, 3072, 50), "l-h-f", "1.53E+26", 35.48, (23.10, 37.24, 44.61), 207.62),
        GrownRun(_target(1152, 3072, 50), "f-h-l", "4.76E+8", 32.2, (8.55, 10.54, 44.61), 166.37, recommended=True),
        GrownRun(_target(1152, 4608, 40), "h-f-l", "4.71E+24", 33.01, (9.66, 11.87, 45.71), 169.92),
        GrownRun(_target(1152, 4608, 40), "l-h-f", "5.54E+25", 34.02, (19.66, 29.49, 45.71), 197.54),
        GrownRun(_target(1152, 4608, 40), "f-h-l", "2.28E+24", 33.01, (9.44, 11.87, 45.71), 169.69, recommended=True),
    ),
)

#: Orders of growth in two dimensions, hidden and layer; ffn follows hidden. The 20B tokens of one stage per row are
#: not printed; the stage's hours are twice the hours in Table 1 for the same structure.
TABLE_4 = GrowthTable(
    4,
    INITIAL,
    34.38,
    (
        GrownRun(TARGET, "h-l", "1.41E+17", 38.65, (68.03, 43.39), 145.8, (2 * STAGE_TOKENS, STAGE_TOKENS)),
        GrownRun(TARGET, "l-h", "1.38E+16", 38.65, (8.65, 86.77), 139.8, (STAGE_TOKENS, 2 * STAGE_TOKENS), True),
    ),
)

#: The tables that print products of parameter increments.
GROWTH_TABLES = (TABLE_1, TABLE_3, TABLE_4)

#: The target of Table 10, and SLOP's order of growth to it (Table 8, sch3).
TABLE_10_TARGET, TABLE_10_SEQUENCE = _target(2048, 5632, 16), "l-f-h"

#: Results by method of training `TABLE_10_TARGET`.
TABLE_10 = {
    "single stage": ComparedRun(32, 172),
    "MSG": ComparedRun(36, 119),
    "ELLE": ComparedRun(34, 114),
    "SLOP": ComparedRun(34, 108),
}


def list_stage_hours(table: GrowthTable, initial: ModelDims | None = None) -> dict[tuple[ModelDims, int], float]:
    """Return the printed GPU hours of a table's growth stages, keyed by structure and number of tokens.

    `initial` is the structure from which the stages are assumed to have grown; default, the table's.

    >>> list_stage_hours(TABLE_1)[TARGET, STAGE_TOKENS]
    43.39
    """
    return {(dims, tokens): hours for dims, tokens, hours in table.list_stages(initial)}


@cache
def fit_cost_model() -> CostModel:
    """Fit the paper's GPU hours as a function of FLOPs and tokens, to the 30 growth stages of its Table 1.

    This is an example of a cost model, and good for comparing schedules with each other. It is far too optimistic as a
    forecast: the hours are fewer than one A100 could take (`docs/reproduction.md`); `slop calibrate` measures your own
    hardware. The initial model's hours are left out, because they do not lie on a line with the others.

    >>> round(fit_cost_model().hours(count_flops_per_token(TARGET), STAGE_TOKENS), 1)
    43.1
    """
    measurements = [
        Measurement(str(dims), count_flops_per_token(dims, sequence_length=SEQUENCE_LENGTH), tokens, hours)
        for dims, tokens, hours in TABLE_1.list_stages()
    ]
    return CostModel.fit(measurements, hardware="A100, by the paper's Table 1")
