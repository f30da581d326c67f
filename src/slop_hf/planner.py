"""`SlopPlanner`: the best growth schedules through a space of configurations.

With each dimension grown once, a path to a target is an order of the operators; the planner scores every order of
every target in numpy and keeps the best K. This is the exact answer that Algorithm 1 of the paper searches for.
Cost: (number of targets) x (number of operators)! paths, a few dozen bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations

import numpy as np

from .dims import ModelDims
from .errors import PlanError
from .objectives import NEED_TOKENS, OBJECTIVES, Paths, flops
from .operators import OPERATORS, operator_named, operators_between
from .schedule import PAPER_INITIAL_SHARE, GrowthSchedule, GrowthStage, token_shares
from .space import ConfigSpace, DimsArray


@dataclass(frozen=True)
class SlopPlanner:
    """Finds growth schedules from an initial structure to the targets of a space.

    Each operator grows once, in a stage of its own. A dimension without an operator of its own follows `hidden`:
    heads always did in the paper's tables (fixed head_dim), and ffn does in its Table 4. Only structures that
    transformers can load count.

    Args:
        initial: the structure to grow from.
        space: the targets.
        operators: the dimensions to grow, in any order.
        objective: a name in `objectives.OBJECTIVES`.

    Raises:
        PlanError: for an unknown operator or objective.

    >>> space = ConfigSpace(targets=[ModelDims(2816, 7680, 8, 22), ModelDims(1280, 3584, 40, 10)])
    >>> best = SlopPlanner(ModelDims(768, 2048, 6, 6), space).plan(top_k=1)[0]
    >>> best.sequence, str(best.target), f"{best.scores['delta_params']:.3g}"
    ('l-f-h', '(2816, 7680, 8, 22)', '1.69e+24')
    """

    initial: ModelDims
    space: ConfigSpace
    operators: Sequence[str] = ("layer", "ffn", "hidden")
    objective: str = "delta_params"

    def __post_init__(self) -> None:
        if not self.operators or len(set(self.operators)) < len(self.operators):
            raise PlanError(f"operators must be one or more different names, got {list(self.operators)}")
        for name in self.operators:
            operator_named(name)
        if self.objective not in OBJECTIVES:
            raise PlanError(f"unknown objective {self.objective!r}; known: {', '.join(OBJECTIVES)}")

    def plan(
        self,
        top_k: int = 5,
        *,
        tokens: float | None = None,
        initial_share: float = PAPER_INITIAL_SHARE,
    ) -> list[GrowthSchedule]:
        """The best schedules, best first.

        Equal scores are ordered by the FLOPs of stages of equal length, then by target and sequence.

        Args:
            top_k: how many schedules.
            tokens: training tokens of the whole run, shared out by the paper's rule (`GrowthSchedule.with_tokens`).
            initial_share: the initial model's share of the tokens, a growth stage having 1.

        Raises:
            PlanError: where no schedule exists; the message says what stands in the way.
        """
        if top_k < 1:
            raise PlanError(f"top_k must be at least 1, got {top_k}")
        if tokens is None and self.objective in NEED_TOKENS:
            raise PlanError(f"objective {self.objective!r} needs a token budget: give tokens")
        shares = None if tokens is None else token_shares(tokens, len(self.operators), initial_share=initial_share)
        targets = DimsArray.of(self._reachable_targets())
        orders = list(permutations(sorted(self.operators)))
        candidates = [self._paths(targets, order, shares) for order in orders]
        loadable = np.stack([paths.structures.loadable.all(axis=1) for paths in candidates], axis=1)
        if not loadable.any():
            raise PlanError(
                "in every order some structure between initial and target has a hidden size that its heads do not "
                "divide, which transformers refuses; let the heads follow hidden (leave out 'mha') or choose head "
                "counts that divide both hidden sizes"
            )
        scores = np.stack([OBJECTIVES[self.objective](paths) for paths in candidates], axis=1)
        even = np.stack([flops(replace(paths, tokens=np.ones(len(orders[0]) + 1))) for paths in candidates], axis=1)
        best = self._best(np.where(loadable, scores, np.inf), even, top_k)
        return [self._schedule(candidates[order], orders[order], target, shares) for target, order in best]

    @staticmethod
    def _best(scores: np.ndarray, tie_break: np.ndarray, top_k: int) -> list[tuple[int, int]]:
        """Indices (target, order) of the smallest finite `scores` [targets, orders]."""
        # Products of the same factors in another order differ in the last bits: round before ranking.
        ranks = np.round(np.log(scores), 10).ravel()
        chosen = np.lexsort((tie_break.ravel(), ranks))[:top_k]  # stable, so that equal ones keep their order
        return [divmod(int(index), scores.shape[1]) for index in chosen if np.isfinite(ranks[index])]

    def _reachable_targets(self) -> list[ModelDims]:
        """The targets that every operator grows towards, with no dimension left behind."""
        reasons, reachable = [], []
        for target in self.space.structures(self.initial):
            reason = self._obstacle(target)
            if reason is None:
                reachable.append(target)
            else:
                reasons.append(f"{target}: {reason}")
        if not reachable:
            more = f" (and {len(reasons) - 1} more targets)" if len(reasons) > 1 else ""
            raise PlanError(
                f"no target can be reached from {self.initial} by {', '.join(self.operators)}; {reasons[0]}{more}"
            )
        return reachable

    def _obstacle(self, target: ModelDims) -> str | None:
        try:
            needed = operators_between(self.initial, target)
        except ValueError as caught:
            return str(caught)
        idle = [name for name in self.operators if name not in needed]
        if idle:
            return f"{', '.join(idle)} would grow nothing; leave it out of the operators"
        followers = [] if "hidden" not in self.operators else ["mha", "ffn"]
        missing = [name for name in needed if name not in (*self.operators, *followers)]
        if missing:
            return f"needs {', '.join(missing)} among the operators"
        return None

    def _stage_operators(self, name: str) -> tuple[str, ...]:
        """The operators of a stage: one, and with `hidden` those that follow it."""
        followers = [other for other in ("ffn", "mha") if other not in self.operators] if name == "hidden" else []
        return (name, *followers)

    def _paths(self, targets: DimsArray, order: tuple[str, ...], shares: list[int] | None) -> Paths:
        """The path to every target [targets] in one order, as structures of shape [targets, stages + 1]."""
        columns = {}
        for item in fields(DimsArray):
            start = getattr(self.initial, item.name)
            columns[item.name] = np.full((len(targets.hidden_size), len(order) + 1), start, dtype=np.int64)
        for number, name in enumerate(order, start=1):
            for operator in self._stage_operators(name):
                for field in OPERATORS[operator].fields:
                    columns[field][:, number:] = getattr(targets, field)[:, None]
        tokens = None if shares is None else np.array(shares)
        return Paths(DimsArray(**columns), tokens, self.space.config, self.space.sequence_length)

    def _schedule(self, paths: Paths, order: tuple[str, ...], target: int, shares: list[int] | None) -> GrowthSchedule:
        structures = [paths.structures.at((target, number)) for number in range(len(order) + 1)]
        tokens = shares or [0] * len(structures)
        stages = []
        for number, name in enumerate(order, start=1):
            grown = operators_between(structures[number - 1], structures[number])
            operators = (name, *(other for other in grown if other != name))
            stages.append(GrowthStage(operators, structures[number], tokens[number]))
        one = Paths(DimsArray.of(structures).row(), paths.tokens, paths.config, paths.sequence_length)
        names = [name for name in OBJECTIVES if paths.tokens is not None or name not in NEED_TOKENS]
        scores = {name: float(OBJECTIVES[name](one)[0]) for name in names}
        return GrowthSchedule(structures[0], tuple(stages), tokens[0], scores)
