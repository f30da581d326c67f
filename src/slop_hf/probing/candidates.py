"""Candidates of a probe: schedules of a planner, inits of a stage, or stages that could come next."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError
from ..growth import resolve_inits
from ..io.serialization import hash_json, to_plain
from ..operators import find_operators, get_operator
from ..paper import tables as paper
from ..planning.planner import SlopPlanner
from ..planning.space import ConfigSpace
from ..runs.directory import RunDirectory, RunFacts
from ..schedule import GrowthSchedule, GrowthStage
from ..training.config import RunConfig, find_vocab_size


@dataclass(frozen=True)
class Start:
    """A finished stage of a run, from which all candidates continue; stage 0 is the initial model."""

    run: RunDirectory
    stage: int

    @classmethod
    def parse(cls, address: str | Path) -> Start:
        """Read `RUN` or `RUN@STAGE`; the stage is a number or the name of its directory, by default the last one.

        Raises:
            RunError: if the run does not exist, or the stage is not finished.
        """
        text = str(address)
        path, separator, name = text.rpartition("@")
        if not separator or RunDirectory(text).exists:
            path, separator = text, ""
        run = RunDirectory(path)
        finished = run.schedule.stage_names[: run.finished_stages]
        if not finished:
            raise RunError(f"{path}: no stage has finished yet, so candidates cannot begin with one")
        if not separator:
            return cls(run, len(finished) - 1)
        for number, stage_name in enumerate(finished):
            if name in (str(number), stage_name):
                return cls(run, number)
        raise RunError(f"{path} has no finished stage {name!r}; the finished stages are {', '.join(finished)}")

    @property
    def name(self) -> str:
        """Run and stage, as `parse` reads them."""
        return f"{self.run.path}@{self.run.schedule.stage_name(self.stage)}"

    @property
    def schedule(self) -> GrowthSchedule:
        """The run's schedule up to the end of the stage."""
        whole = self.run.schedule
        return GrowthSchedule(whole.initial, whole.stages[: self.stage], whole.initial_tokens)

    @property
    def facts(self) -> RunFacts | None:
        """Facts of the run that its continuations must share."""
        return RunFacts.load(self.run)

    @property
    def key(self) -> str:
        """A hash that differs for the same stage of another training run."""
        facts = self.facts
        return hash_json([facts.run_id if facts else "", to_plain(self.run.records()[: self.stage + 1])])

    @property
    def has_optimizer_state(self) -> bool:
        """Whether AdamW's state at the end of the stage was kept; otherwise candidates begin with a new one."""
        return bool(self.run.optimizer_files(self.stage))


@dataclass(frozen=True)
class Candidate:
    """One alternative to try.

    Args:
        schedule: schedule of a whole run, including the stages before the start.
        stages: number of growth stages that a trial trains, counted from the beginning of the run; None for all.
        rank: rank given by the planner, from 1; None if the candidates have no order.
    """

    name: str
    schedule: GrowthSchedule
    stages: int | None = None
    rank: int | None = None


def continue_schedule(start: Start | None, schedule: GrowthSchedule) -> GrowthSchedule:
    """Return a whole run's schedule that begins with the stages up to a start, if there is one.

    Args:
        schedule: schedule that begins with the same structures as the run, or with the structure at the start.
    """
    begin, rest = GrowthSchedule(schedule.initial, (), schedule.initial_tokens), schedule.stages
    if start is not None:
        begin = start.schedule
        if schedule.structures[: start.stage + 1] == begin.structures:
            rest = rest[start.stage :]
        elif schedule.initial != begin.target:
            raise RunError(
                f"the schedule begins with {schedule.initial} and does not pass through {start.name}, which has "
                f"{begin.target}; give a schedule from there (`slop plan --from {start.run.stage_dir(start.stage)}`)"
            )
    if not rest:
        raise RunError(f"the schedule ends with {begin.target}, where candidates begin: there is nothing to try")
    return dataclasses.replace(begin, stages=(*begin.stages, *rest), scores=schedule.scores)


def build_schedule_candidates(schedules: Sequence[GrowthSchedule], start: Start | None = None) -> list[Candidate]:
    """Return one candidate per schedule of a planner, best first; schedules may begin with the start's structure."""
    counts = Counter(schedule.sequence for schedule in schedules)
    return [
        Candidate(
            schedule.sequence if counts[schedule.sequence] == 1 else f"{schedule.sequence} ({rank})",
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
    """Return the planner's `top_k` best schedules to the target of a schedule, with its dimensions and tokens."""
    first, whole = get_first_stage(start), continue_schedule(start, schedule)
    rest = whole.stages[first - 1 :]
    model = config.model_config(whole.initial, find_vocab_size(config), as_described=True).to_dict()
    space = ConfigSpace(targets=[whole.target], config=model, sequence_length=config.data.block_size)
    operators = _list_leading(rest)
    planner = SlopPlanner(
        whole.structures[first - 1], space, operators=operators, objective=objective, cost_model=paper.fit_cost_model()
    )
    initial = whole.initial_tokens if start is None else 0
    tokens = sum(stage.tokens for stage in rest)
    schedules = planner.plan(
        top_k,
        tokens=float(initial + tokens) if tokens else None,
        initial_share=initial * len(operators) / tokens if tokens else 0.0,
        already_seen=float(sum(whole.tokens[:first]) - initial),
    )
    return build_schedule_candidates(schedules, start)


def build_init_candidates(
    schedule: GrowthSchedule, inits: Sequence[str], start: Start | None = None
) -> list[Candidate]:
    """Return one candidate per init of the next stage; a trial ends with that stage.

    Args:
        inits: names in `growth.inits.INITS` that all operators of the stage support.
    """
    number, whole = get_first_stage(start), continue_schedule(start, schedule)
    stage = whole.stages[number - 1]
    candidates = []
    for init in inits:
        resolve_inits(stage.operators, init)
        stages = (*whole.stages[: number - 1], dataclasses.replace(stage, init=init), *whole.stages[number:])
        candidates.append(Candidate(init, dataclasses.replace(whole, stages=stages, scores={}), stages=number))
    return candidates


def build_next_candidates(
    schedule: GrowthSchedule, operators: Sequence[str], start: Start | None = None
) -> list[Candidate]:
    """Return one candidate per dimension that could grow next, to its size in the target.

    Each has the tokens of the schedule's next stage. Dimensions without a stage of their own in the schedule grow
    together with `hidden`, as in the planner.
    """
    number, whole = get_first_stage(start), continue_schedule(start, schedule)
    dims, tokens = whole.structures[number - 1], whole.stages[number - 1].tokens
    leading = {*_list_leading(whole.stages[number - 1 :]), *operators}
    candidates = []
    for name in operators:
        followers = [other for other in ("ffn", "mha", "head_dim") if name == "hidden" and other not in leading]
        fields = [field for operator in (name, *followers) for field in get_operator(operator).fields]
        grown = dims.replace(**{field: getattr(whole.target, field) for field in fields})
        grows = find_operators(dims, grown)
        if name not in grows:
            raise RunError(f"{name} does not grow from {dims} to {whole.target}; leave it out")
        stage = GrowthStage((name, *(other for other in grows if other != name)), grown, tokens)
        stages = (*whole.stages[: number - 1], stage)
        candidates.append(Candidate(name, dataclasses.replace(whole, stages=stages, scores={})))
    return candidates


def get_first_stage(start: Start | None) -> int:
    """Return the number of the first growth stage after a start, or after the initial model."""
    return 1 if start is None else start.stage + 1


def _list_leading(stages: Sequence[GrowthStage]) -> tuple[str, ...]:
    """Return the dimensions with stages of their own; without the dimensions that grow along with `hidden`."""
    leads = (("hidden",) if stage.operators[0] == "hidden" else stage.label.split("-") for stage in stages)
    return tuple(dict.fromkeys(name for names in leads for name in names))
