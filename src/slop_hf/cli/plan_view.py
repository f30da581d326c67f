"""What `slop plan` shows: schedules side by side, other ways to the target, and the reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..baselines import Arm, compare_at_equal_flops, favours_growth
from ..cost.flops import count_parameters
from ..planning.explain import Choice, explain
from ..planning.objectives import OBJECTIVES
from ..planning.planner import SlopPlanner
from ..schedule import GrowthSchedule


@dataclass(frozen=True)
class Answer:
    """All that was found.

    Args:
        planner: that found it.
        schedules: best first.
        arms: the first of them beside other ways to its target; empty without tokens.
        choices: what each growth of the first was chosen over; empty where nobody asked.
    """

    planner: SlopPlanner
    schedules: Sequence[GrowthSchedule]
    arms: Sequence[Arm]
    choices: Sequence[Choice]

    @classmethod
    def of(
        cls,
        planner: SlopPlanner,
        schedules: Sequence[GrowthSchedule],
        already_seen: float,
        *,
        with_arms: bool,
        explained: bool,
    ) -> Answer:
        """What is to be shown of schedules."""
        space, best = planner.space, schedules[0]
        arms: Sequence[Arm] = ()
        if with_arms:
            arms = compare_at_equal_flops(
                best, space.config, space.sequence_length, planner.cost_model, planner.law, already_seen=already_seen
            )
        return cls(planner, schedules, arms, explain(planner, best, already_seen) if explained else ())

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return {
            "objective": self.planner.objective,
            "schedules": self.schedules,
            "arms": self.arms,
            "favours_growth": favours_growth(self.arms) if self.arms else None,
            "choices": self.choices,
        }

    @property
    def config(self) -> Any:
        """What growth leaves alone."""
        return self.planner.space.config


def show(answer: Answer) -> None:
    """Print it."""
    console = Console()
    console.print(_schedules(answer))
    best = answer.schedules[0]
    steps = [f"{dims} {_tokens(count)}".strip() for dims, count in zip(best.structures, best.tokens, strict=True)]
    console.print("1: " + " → ".join(steps), highlight=False)
    if answer.choices:
        console.print(_reasons(answer))
    if answer.arms:
        console.print(_arms(answer))
        console.print(verdict(answer.arms), highlight=False)


def _schedules(answer: Answer) -> Table:
    """Schedules side by side, best first."""
    first = answer.schedules[0]
    size = count_parameters(first.initial, answer.config) / 1e6
    table = Table(
        box=SIMPLE,
        collapse_padding=True,
        title=f"Growth from {first.initial}, {size:,.1f}M parameters",
        caption=f"target: (hidden, ffn, layers, heads); ranked by {answer.planner.objective}, best first",
    )
    table.add_column("", justify="right")
    table.add_column("order", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for name in ("params", *(OBJECTIVES[name].title for name in first.scores)):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, schedule in enumerate(answer.schedules, start=1):
        size = count_parameters(schedule.target, answer.config) / 1e6
        scores = [f"{value:.3g}" for value in schedule.scores.values()]
        table.add_row(str(rank), schedule.sequence, str(schedule.target), f"{size:,.1f}M", *scores)
    return table


def _reasons(answer: Answer) -> Table:
    """Each growth of the best schedule, and the best of those that it could have made instead."""
    objective = OBJECTIVES[answer.planner.objective]
    table = Table(
        box=SIMPLE,
        collapse_padding=True,
        title=f"Why this order: {objective.title} of the best schedule that goes on with each growth",
        caption=f"the {objective.best} is best; same target, same number of stages",
    )
    for name in ("stage", "growth", "to"):
        table.add_column(name, no_wrap=True)
    table.add_column(objective.title, justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for number, choice in enumerate(answer.choices, start=1):
        table.add_row(
            str(number),
            f"[bold]{choice.taken.stage.label}",
            str(choice.taken.stage.dims),
            f"{choice.taken.value:.4g}",
            "",
        )
        for other in choice.others:
            ratio = f"× {other.value / choice.taken.value:.3g}" if choice.taken.value else ""
            table.add_row("", other.stage.label, str(other.stage.dims), f"{other.value:.4g}", ratio)
    return table


def _arms(answer: Answer) -> Table:
    """The best schedule beside its control arms."""
    table = Table(
        box=SIMPLE,
        collapse_padding=True,
        title="Other ways to the same target, at the same training FLOPs",
        caption="hours: device hours by the cost model; loss: by a scaling law, under growth that keeps the loss",
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("stages", no_wrap=True)
    for name in ("tokens", "FLOPs", "hours", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in answer.arms:
        hours = "" if arm.hours is None else f"{arm.hours:,.4g}"
        loss = "unknown" if arm.loss is None else f"{arm.loss:.4f}"
        table.add_row(
            arm.name.replace("_", " "),
            arm.schedule.sequence or "–",
            _tokens(arm.tokens),
            f"{arm.flops:.3g}",
            hours,
            loss,
        )
    return table


def verdict(arms: Sequence[Arm]) -> str:
    """What the prediction says of growing at all."""
    favoured = favours_growth(arms)
    losses = {arm.name: arm.loss for arm in arms}
    if favoured is None:
        return "Whether growth pays is unknown: say what the initial model was trained on with --already-seen."
    plan, scratch = losses["plan"], losses["from_scratch"]
    assert plan is not None and scratch is not None
    if favoured:
        return f"The prediction favours growth: loss {plan:.4f}, from scratch {scratch:.4f} at the same FLOPs."
    return (
        f"The prediction favours no growth: from scratch reaches a loss of {scratch:.4f} with the same FLOPs, this "
        f"schedule {plan:.4f}."
    )


def _tokens(count: float) -> str:
    return f"{count / 1e9:.3g}B" if count else ""
