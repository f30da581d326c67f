"""What a probe may choose among: schedules of a planner, inits of a stage, or stages that could come next."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..dims import ModelDims
from ..errors import RunError
from ..growth import resolve_inits
from ..io.serialization import hash_json, to_plain
from ..operators import get_operator, find_operators
from ..paper import tables as paper
from ..planning.planner import SlopPlanner
from ..planning.space import ConfigSpace
from ..runs.directory import RunDirectory, RunFacts
from ..schedule import GrowthSchedule, GrowthStage
from ..training import RunConfig
from ..training.config import known_vocab_size


@dataclass(frozen=True)
class Start:
    """Where candidates part: the end of a finished stage of a run.

    Args:
        run: the run.
        stage: its number; 0 is the initial model.
    """

    run: RunDirectory
    stage: int

    @classmethod
    def of(cls, address: str | Path) -> Start:
        """The start that `RUN` or `RUN@STAGE` names, the stage by its number or its directory; default, the last.

        Raises:
            RunError: where there is no run, or no such stage has finished.
        """
        text = str(address)
        path, at, name = text.rpartition("@")
        if not at or RunDirectory(text).exists:
            path, name = text, ""
        run = RunDirectory(path)
        finished = run.schedule.stage_names[: run.finished_stages]
        if not finished:
            raise RunError(f"{path}: no stage has finished yet, there is nothing to begin with")
        numbers = {
            **{str(number): number for number in range(len(finished))},
            **{n: i for i, n in enumerate(finished)},
        }
        if name and name not in numbers:
            raise RunError(f"{path} has no finished stage {name!r}; finished are {', '.join(finished)}")
        return cls(run, numbers[name] if name else len(finished) - 1)

    @property
    def name(self) -> str:
        """What to call it: the run and the stage's directory."""
        return f"{self.run.path}@{self.run.schedule.stage_name(self.stage)}"

    @property
    def schedule(self) -> GrowthSchedule:
        """The run's schedule up to the end of the stage."""
        whole = self.run.schedule
        return GrowthSchedule(whole.initial, whole.stages[: self.stage], whole.initial_tokens)

    @property
    def facts(self) -> RunFacts | None:
        """What all that goes on from the run has to have in common with it."""
        return RunFacts.load(self.run)

    @property
    def key(self) -> str:
        """What tells it from the same stage of a run that was trained otherwise, or once more."""
        facts = self.facts
        return hash_json([facts.run_id if facts else "", to_plain(self.run.records()[: self.stage + 1])])

    @property
    def keeps_optimizer(self) -> bool:
        """Whether AdamW's state at the end of the stage is there; otherwise candidates begin with a new one."""
        return bool(self.run.optimizer_files(self.stage))


@dataclass(frozen=True)
class Candidate:
    """Something to be tried.

    Args:
        name: what to call it.
        schedule: of a whole run, the stages up to the start included.
        stages: growth stages of it that a trial goes through, counted from the beginning; None for all.
        rank: its place by whoever proposed it, from 1; None where their order means nothing.
    """

    name: str
    schedule: GrowthSchedule
    stages: int | None = None
    rank: int | None = None


def continue_schedule(start: Start | None, schedule: GrowthSchedule) -> GrowthSchedule:
    """A schedule as that of a whole run that begins with the stages up to a start.

    Args:
        start: of the candidates; None leaves the schedule as it is.
        schedule: one that begins with the same structures, or with the one at the start.

    Raises:
        RunError: for another one, or one that ends there.
    """
    if start is None:
        begun, rest = GrowthSchedule(schedule.initial, (), schedule.initial_tokens), schedule.stages
    else:
        begun, rest = start.schedule, schedule.stages
        if schedule.structures[: start.stage + 1] == begun.structures:
            rest = rest[start.stage :]
        elif schedule.initial != begun.target:
            raise RunError(
                f"the schedule begins with {schedule.initial} and does not lead through {start.name}, which has "
                f"{begun.target}; give one from there (`slop plan --from {start.run.stage_dir(start.stage)}`)"
            )
    if not rest:
        raise RunError(f"the schedule ends with {begun.target}, where candidates begin: there is nothing to try")
    return dataclasses.replace(begun, stages=(*begun.stages, *rest), scores=schedule.scores)


def build_schedule_candidates(schedules: Sequence[GrowthSchedule], start: Start | None = None) -> list[Candidate]:
    """Schedules in the order of a planner.

    Args:
        schedules: best first.
        start: that all begin with; they may begin with its structure.

    Raises:
        RunError: for schedules that cannot go on from there.
    """
    times = Counter(schedule.sequence for schedule in schedules)
    return [
        Candidate(
            schedule.sequence if times[schedule.sequence] == 1 else f"{schedule.sequence} ({rank})",
            continue_schedule(start, schedule),
            rank=rank,
        )
        for rank, schedule in enumerate(schedules, 1)
    ]


def plan_candidates(
    config: RunConfig,
    schedule: GrowthSchedule,
    top_k: int,
    start: Start | None = None,
    *,
    objective: str = "delta_params",
) -> list[Candidate]:
    """The planner's best ways to the end of a schedule, with its dimensions and tokens.

    Args:
        config: the run.
        schedule: its schedule.
        top_k: how many.
        start: to plan from; default, the initial model.
        objective: what the planner ranks by, a name in `objectives.OBJECTIVES`.

    Raises:
        SlopError: where there is none.
    """
    first, whole = get_first_stage(start), continue_schedule(start, schedule)
    rest = whole.stages[first - 1 :]
    model = config.model_config(whole.initial, known_vocab_size(config), as_described=True).to_dict()
    space = ConfigSpace(targets=[whole.target], config=model, sequence_length=config.data.block_size)
    operators = _own_operators(rest)
    planner = SlopPlanner(
        whole.structures[first - 1], space, operators=operators, objective=objective, cost_model=paper.fit_cost_model()
    )
    initial = whole.initial_tokens if start is None else 0
    tokens = sum(stage.tokens for stage in rest)
    found = planner.plan(
        top_k,
        tokens=float(initial + tokens) if tokens else None,
        initial_share=initial * len(operators) / tokens if tokens else 0.0,
        already_seen=float(sum(whole.tokens[:first]) - initial),
    )
    return build_schedule_candidates(found, start)


def build_init_candidates(schedule: GrowthSchedule, inits: Sequence[str], start: Start | None = None) -> list[Candidate]:
    """The schedule with each init of the next stage; a trial ends with that stage.

    Args:
        schedule: of the run.
        inits: names in `growth.inits.INITS` that all operators of the stage know.
        start: the stage before; default, the initial model.

    Raises:
        SlopError: for an init that an operator of the stage does not know.
    """
    number, whole = get_first_stage(start), continue_schedule(start, schedule)
    before, stage, after = whole.stages[: number - 1], whole.stages[number - 1], whole.stages[number:]
    found = []
    for init in inits:
        resolve_inits(stage.operators, init)
        tried = dataclasses.replace(whole, stages=(*before, dataclasses.replace(stage, init=init), *after), scores={})
        found.append(Candidate(init, tried, stages=number))
    return found


def build_next_candidates(schedule: GrowthSchedule, operators: Sequence[str], start: Start | None = None) -> list[Candidate]:
    """Stages that could come next: each grows one dimension to the schedule's end, for the next stage's tokens.

    What has no stage of its own in the schedule grows with `hidden`, as a planner has it.

    Args:
        schedule: of the run.
        operators: the dimensions.
        start: the stage before; default, the initial model.

    Raises:
        SlopError: for a dimension that has nothing to grow, or a structure that transformers cannot load.
    """
    number, whole = get_first_stage(start), continue_schedule(start, schedule)
    dims, tokens = whole.structures[number - 1], whole.stages[number - 1].tokens
    own = {*_own_operators(whole.stages[number - 1 :]), *operators}
    found = []
    for name in operators:
        followers = [one for one in ("ffn", "mha", "head_dim") if name == "hidden" and one not in own]
        grown = _grown(dims, whole.target, (name, *followers))
        leading = find_operators(dims, grown)
        if name not in leading:
            raise RunError(f"{name} has nothing to grow from {dims} to {whole.target}; leave it out")
        stage = GrowthStage((name, *(one for one in leading if one != name)), grown, tokens)
        tried = dataclasses.replace(whole, stages=(*whole.stages[: number - 1], stage), scores={})
        found.append(Candidate(name, tried))
    return found


def get_first_stage(start: Start | None) -> int:
    """The number of the first growth stage after a start, or after the initial model."""
    return 1 if start is None else start.stage + 1


def _own_operators(stages: Sequence[GrowthStage]) -> tuple[str, ...]:
    """The dimensions that have stages of their own; what grows with hidden, which leads, has none."""
    leads = (("hidden",) if stage.operators[0] == "hidden" else stage.label.split("-") for stage in stages)
    return tuple(dict.fromkeys(name for names in leads for name in names))


def _grown(dims: ModelDims, target: ModelDims, operators: Sequence[str]) -> ModelDims:
    fields = [name for operator in operators for name in get_operator(operator).fields]
    return dims.replace(**{name: getattr(target, name) for name in fields})
