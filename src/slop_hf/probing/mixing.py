"""`MixingProbe`: how much the tokens of a small model count once it is grown, measured on trunks at a constant rate.

Growth pays if the tokens of the small stage are worth more in the target than they cost: a stage that replaces the
share x of the target's tokens, at a cost of r per token of the target, changes the FLOPs by the factor
1 − x + x · r / κ. `catch_up` defines κ and the mixing time. Neither needs a decay of the learning rate, but a trunk of
the target and, per growth, a trunk of the small model and a branch that continues it as the grown model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np

from ..dims import ModelDims
from ..errors import RunError
from ..experiments.collect import MIXING_FILE
from ..experiments.comparison import Cost
from ..experiments.config import check_seeds
from ..experiments.jobs import RUNS, SEEDS_APART, Job, add_shared_prefixes, find_diverged
from ..experiments.running import JobEndCallback, check_workers, describe_machine, run_jobs
from ..growth import resolve_inits
from ..io.files import check_output
from ..io.numbers import is_finite_number, is_positive_number, require_whole_number
from ..io.serialization import hash_json, list_versions, to_plain
from ..operators import find_operators, get_operator
from ..runs.directory import RunDirectory
from ..runs.records import EVAL_LOSS
from ..schedule import GrowthSchedule, GrowthStage
from ..training.batches import PER_STAGE, keep_first_stages
from ..training.config import RunConfig, preview_rates, preview_run
from ..training.run_plan import with_inits
from .catch_up import MIN_EVALUATIONS, MIXING_TOLERANCE, LossTrack, estimate_mixing
from .mixing_report import MixingReport, MixingResult
from .probe import DEFAULT_SHARE, PlannedTrial, sum_trials

#: Default of the largest κ that can be measured.
LARGEST_KAPPA = 1.25
#: Evaluations of a grown model; more would cost held-out passes and add little.
_EVALUATIONS = 40
#: Name of the run that growths are compared with.
TRUNK = "target from scratch"


@dataclass(frozen=True)
class MixingGrowth:
    """One growth to measure: from a small model to the target, in one dimension.

    Args:
        dimension: operator that leads the growth; `hidden` takes the heads along.
        factor: size in the target over size in the small model.
        small: structure of the small model.
        target: structure of the target.
        init: init of the growth; None for the config's.
    """

    dimension: str
    factor: float
    small: ModelDims
    target: ModelDims
    init: str | None = None

    @property
    def name(self) -> str:
        """Dimension, factor, and init if there is one, such as `layer ×2 interleave`."""
        return f"{self.dimension} ×{self.factor:.3g}{f' {self.init}' if self.init else ''}"


def build_mixing_growths(
    schedule: GrowthSchedule,
    dimensions: Sequence[str] = (),
    factors: Sequence[float] = (),
    inits: Sequence[str] = (),
) -> list[MixingGrowth]:
    """Return the growths to the end of a schedule, one dimension each.

    Args:
        schedule: schedule with the target's structure at its end.
        dimensions: operators, of which `hidden` takes the heads along, at a fixed size; by default, those that the
            schedule grows.
        factors: factors above 1 that divide the target's size; by default, the schedule's own growth.
        inits: inits to compare; by default, the config's.

    Raises:
        SlopError: for an unknown dimension or init, a factor of 1 or less, or one that does not divide the size.

    >>> schedule = GrowthSchedule(ModelDims(64, 128, 4, 4))
    >>> [growth.small.num_hidden_layers for growth in build_mixing_growths(schedule, ["layer"], [2, 4])]
    [2, 1]
    """
    initial, target = schedule.initial, schedule.target
    names = tuple(dimensions) or _find_leading(initial, target)
    if not names:
        raise RunError(
            "the schedule grows nothing; name the dimensions to grow and their factors, such as layer and 2"
        )
    growths = []
    for name, factor in itertools.product(names, factors or (None,)):
        get_operator(name)
        small = _take_from(initial, target, name) if factor is None else _divide(target, name, factor)
        field = get_operator(name).fields[0]
        ratio = getattr(target, field) / getattr(small, field)
        for init in inits or (None,):
            resolve_inits(find_operators(small, target), init)
            growths.append(MixingGrowth(name, ratio, small, target, init))
    if len({growth.name for growth in growths}) < len(growths):
        raise RunError(
            f"growths must differ, got {', '.join(growth.name for growth in growths)}: leave repeated ones out"
        )
    return growths


def _list_fields(name: str) -> tuple[str, ...]:
    followers = ("mha",) if name == "hidden" else ()
    return tuple(field for operator in (name, *followers) for field in get_operator(operator).fields)


def _find_leading(initial: ModelDims, target: ModelDims) -> tuple[str, ...]:
    grown = find_operators(initial, target)
    return tuple(name for name in grown if not (name == "mha" and "hidden" in grown))


def _take_from(initial: ModelDims, target: ModelDims, name: str) -> ModelDims:
    """Return the target with the schedule's initial size of one dimension."""
    if name not in find_operators(initial, target):
        raise RunError(f"{name} does not grow from {initial} to {target}: leave it out, or give factors")
    return target.replace(**{field: getattr(initial, field) for field in _list_fields(name)})


def _divide(target: ModelDims, name: str, factor: float) -> ModelDims:
    """Return the target with one dimension divided by a factor; grouped key/value heads stay."""
    if not is_finite_number(factor) or factor <= 1:
        raise RunError(f"factors must be above 1, the target's size over the small model's, got {factor!r}")
    sizes = {}
    for field in _list_fields(name):
        whole = getattr(target, field)
        if field == "num_key_value_heads" and whole != target.num_attention_heads:
            continue
        size = round(whole / factor)
        if size < 1 or abs(whole / factor - size) > 0.005 * size:
            nearest = sorted({max(math.floor(whole / factor), 1), min(math.ceil(whole / factor), whole - 1)} - {0})
            options = " or ".join(f"{whole / near:.4g} (size {near})" for near in nearest)
            raise RunError(
                f"{name}: {field} {whole} cannot be divided by the factor {factor:g}; "
                + (f"the nearest factors are {options}" if options else "leave this dimension out")
            )
        sizes[field] = size
    return target.replace(**sizes)


@dataclass(frozen=True)
class MixingProbe:
    r"""Measures κ and the mixing time of growths to one target.

    For each growth the small model trains on `n_s` tokens, and the grown one on `n` further tokens; the target trains
    from scratch on n + 1.25 n_s tokens, so that a κ of up to 1.25 can be read off. All are runs in a directory. Small
    models that several growths share are trained once, and an interrupted probe resumes. All evaluate held-out loss
    at the same steps, about 40 times during `n`.

    Args:
        config: config of the run: model, data and training, under `lr_span: run` and a constant rate with or without
            warm-up. Optimizer, its state at growth, and re-warming are those that κ is measured for.
        output_dir: directory of the runs, `mixing.json` and `mixing.png`.
        at: tokens n_s of the small models at which they grow, one or more. Default: `lag`, or the share.
        lag: tokens n of the grown models. Default: the largest of `at`, or the share.
        share: without both, the tokens of the target from scratch as a share of the schedule's tokens, with n = n_s.
            Default: a tenth.
        largest_kappa: largest κ that can be measured, which decides on the length of the target from scratch. Early in
            training a small model may be ahead of the target, and κ above 1.25.
        tolerance: largest distance of κ(n) from its settled value after the mixing time.
        seeds: seeds; each growth is measured once per seed.
        devices, workers, on_job_end: as in `run_experiment`.

    Raises:
        RunError: if arguments contradict each other or are out of range, no text is held out, or the learning rate
            cannot be constant.

    >>> MixingProbe(RunConfig(), "runs/mixing", lag=0)
    Traceback (most recent call last):
    slop_hf.errors.RunError: lag must be a whole number, 1 or more, got 0
    """

    config: RunConfig
    output_dir: str | Path
    _: KW_ONLY
    at: tuple[int, ...] = ()
    lag: int | None = None
    share: float | None = None
    largest_kappa: float = LARGEST_KAPPA
    tolerance: float = MIXING_TOLERANCE
    seeds: tuple[int, ...] = (0,)
    devices: Sequence[str] = ()
    workers: int = 1
    on_job_end: JobEndCallback | None = None

    def __post_init__(self) -> None:
        for name, value in (*(("at", value) for value in self.at), ("lag", self.lag)):
            if value is not None:
                require_whole_number(value, name, error=RunError)
        if len(set(self.at)) < len(self.at):
            raise RunError(
                f"at must be different numbers of tokens, got {', '.join(map(str, self.at))}: leave repeated ones out"
            )
        if self.share is not None and (self.at or self.lag is not None):
            raise RunError("the length of a mixing probe follows from share, or from at and lag; give one of the two")
        if self.share is not None and not (is_finite_number(self.share) and 0 < self.share <= 1):
            raise RunError(f"share must be above 0 and at most 1, got {self.share}")
        for name in ("tolerance", "largest_kappa"):
            if not is_positive_number(value := getattr(self, name)):
                raise RunError(f"{name} must be positive and finite, got {value!r}")
        check_seeds(self.seeds)
        check_workers(self.devices, self.workers)
        check_output(self.output_dir, "output_dir", RunError, is_directory=True)
        _check_config(self.config)

    def run(self, growths: Sequence[MixingGrowth]) -> MixingReport:
        """Measure growths; the report is also written to `mixing.json`.

        Args:
            growths: different growths to the same target, from `build_mixing_growths`.

        Raises:
            SlopError: if some run cannot begin (checked before any training), if a run fails, or if the target from
                scratch diverges.
        """
        root, jobs = Path(self.output_dir), self.build_jobs(growths)
        run_jobs(jobs, root, devices=self.devices, workers=self.workers, on_job_end=self.on_job_end)
        diverged = find_diverged(jobs, root)
        trunks = {seed: self._build_trunk(growths[0].target, seed) for seed in self.seeds}
        if diverged & {trunk.directory for trunk in trunks.values()}:
            raise RunError(
                "the target from scratch diverged; lower learning_rate, and choose another output directory"
            )
        tracks = {seed: _read_track(trunk, root) for seed, trunk in trunks.items()}
        results, without_result = [], []
        for growth, tokens in itertools.product(growths, self.count_tokens()[0]):
            branches = {seed: self._build_branch(growth, tokens, seed) for seed in self.seeds}
            if diverged & {branch.directory for branch in branches.values()}:
                without_result.append(branches[self.seeds[0]].arm)
                continue
            results.append(self._measure(growth, branches, tracks, root))
        report = MixingReport(
            results=tuple(results),
            trunks=tuple(tracks.values()),
            target=growths[0].target,
            tolerance=self.tolerance,
            seeds=self.seeds,
            cost=sum_trials(jobs, root),
            diverged=tuple(without_result),
            versions=list_versions(),
            device=describe_machine(),
        )
        report.to_json(root / MIXING_FILE)
        return report

    @property
    def report(self) -> MixingReport:
        """Report of the last finished probe in the directory; a `RunError` if there is none."""
        return MixingReport.from_json(Path(self.output_dir) / MIXING_FILE)

    @property
    def ledger(self) -> tuple[Cost, ...]:
        """Cost of the last finished probe, for the ledger of a comparison; empty before one has finished."""
        return (self.report.cost,) if (Path(self.output_dir) / MIXING_FILE).exists() else ()

    def preview(self, growths: Sequence[MixingGrowth]) -> list[PlannedTrial]:
        """Return what `run` would train, in its order, without training or writing anything.

        Raises:
            SlopError: if some run could not begin.
        """
        jobs = self.build_jobs(growths)
        for job in jobs:
            preview_run(job.config, job.sibling_file(Path(self.output_dir), "preview"))  # a path without a run
        return plan_trials(jobs)

    # ---- From growths to jobs ----------------------------------------------------------------------------------

    def count_tokens(self) -> tuple[tuple[int, ...], int]:
        """Return the tokens of the small models, and of the grown ones.

        Raises:
            RunError: without tokens in the schedule that a share could be taken of.
        """
        if self.at or self.lag is not None:
            at = self.at or (self.lag or 0,)
            return at, max(at) if self.lag is None else self.lag
        total = sum(self.config.read_schedule().tokens)
        if not total:
            raise RunError("the schedule has no tokens to take a share of; give it tokens, or give at and lag")
        tokens = max(1, round(total * (self.share or DEFAULT_SHARE) / (1 + self.largest_kappa)))
        return (tokens,), tokens

    def build_jobs(self, growths: Sequence[MixingGrowth]) -> list[Job]:
        """Return the runs, preceded by the trunks that several of them share, with one seed after another.

        Raises:
            RunError: if growths or their settings cannot be measured, or the tokens do not suffice.
        """
        jobs = self.build_runs(growths)
        self._check_lengths(jobs)
        return sorted(add_shared_prefixes(jobs), key=lambda job: job.seed)

    def build_runs(self, growths: Sequence[MixingGrowth]) -> list[Job]:
        """Return `build_jobs` without trunks; their lengths are not checked.

        Raises:
            RunError: without growths, or for several targets.
        """
        if not growths or len({growth.target for growth in growths}) > 1:
            raise RunError("a mixing probe needs one growth or more, all to the same target")
        at, _ = self.count_tokens()
        jobs = []
        for seed in self.seeds:
            branches = [self._build_branch(growth, tokens, seed) for growth in growths for tokens in at]
            jobs += [self._build_trunk(growths[0].target, seed), *branches]
        return jobs

    def _check_lengths(self, jobs: Sequence[Job]) -> None:
        """Refuse runs whose rate is not constant from the growth on, or that are too short to read anything from."""
        trunk, branch = jobs[0], min(jobs[1:], key=lambda job: job.preview.spans[0].steps)
        rates = np.array(trunk.preview.rates[0])
        warmup = int(np.argmax(rates == rates.max()))
        if (rates[warmup:] != rates.max()).any():
            name = trunk.config.training.get("lr_scheduler_type", "linear")
            raise RunError(
                f"the learning rate of {name} does not stay constant, and losses of a decay cannot be compared; set "
                "training.lr_scheduler_type to constant_with_warmup, and training.lr_scheduler_kwargs to {}"
            )
        small, grown = branch.preview.spans
        needed = (
            ("at", "small", small.steps, warmup + 1, "more than their warm-up"),
            ("lag", "grown", grown.steps, MIN_EVALUATIONS, "for as many evaluations"),
        )
        for name, which, steps, least, reason in needed:
            if steps < least:
                remedy = self._describe_length(name, least * grown.tokens // grown.steps)
                raise RunError(
                    f"the {which} models train for {steps} steps, and a mixing probe needs {least} or more "
                    f"({reason}): {remedy}"
                )

    def _describe_length(self, name: str, tokens: int) -> str:
        """Return what gives the runs so many tokens, in an argument or a share."""
        if self.at or self.lag is not None:
            return f"raise {name} to {tokens:,} tokens or more"
        share = math.ceil(1000 * (1 + self.largest_kappa) * tokens / sum(self.config.read_schedule().tokens)) / 1000
        by_share = f"raise share to {share:g} or more, or " if share <= 1 else ""
        return f"{by_share}give {name} {tokens:,} tokens or more"

    def _build_trunk(self, target: ModelDims, seed: int) -> Job:
        at, lag = self.count_tokens()
        tokens = math.ceil(lag + self.largest_kappa * max(at))
        return self.build_job(TRUNK, "target", GrowthSchedule(target, (), tokens), seed)

    def _build_branch(self, growth: MixingGrowth, tokens: int, seed: int) -> Job:
        at, lag = self.count_tokens()
        stage = GrowthStage(find_operators(growth.small, growth.target), growth.target, lag, init=growth.init)
        schedule = with_inits(GrowthSchedule(growth.small, (stage,), tokens), self.config.training.get("growth_init"))
        name = growth.name if len(at) == 1 else f"{growth.name} at {tokens:,}"
        return self.build_job(name, f"{growth.dimension}-{growth.factor:.3g}", schedule, seed)

    def build_job(self, name: str, slug: str, schedule: GrowthSchedule, seed: int) -> Job:
        """Return a run with the settings of the probe, which evaluates as often as the grown models do.

        Args:
            name: name of the run, for messages.
            slug: beginning of the name of its directory.
        """
        _, lag = self.count_tokens()
        training = {
            **keep_first_stages(self.config.training, 1),  # lists of equal numbers
            "eval_strategy": "steps",
            "eval_before_growth": True,
            "eval_after_growth": True,
            "push_to_hub": False,
            "seed": seed,
            "data_seed": seed,
            "growth_seed": seed * SEEDS_APART,
        }
        training.pop("growth_init", None)  # the stages name their inits, so that small models can be shared
        config = dataclasses.replace(self.config, training=training, schedule=schedule, evaluation=None)
        span = preview_rates(config).spans[0]
        training = {**training, "eval_steps": max(1, round(lag * span.steps / span.tokens / _EVALUATIONS))}
        key = hash_json([to_plain(schedule), training["eval_steps"]])
        config = dataclasses.replace(config, training=training)
        return Job(name, 1.0, seed, config, Path(RUNS, f"{slug}-{key[:8]}", f"seed-{seed}"))

    def _measure(
        self, growth: MixingGrowth, branches: dict[int, Job], tracks: dict[int, LossTrack], root: Path
    ) -> MixingResult:
        first = branches[self.seeds[0]]
        small, grown = first.preview.spans
        grown_tracks = [_read_track(branch, root) for branch in branches.values()]
        estimates = [
            estimate_mixing(tracks[seed], track, small.tokens, tolerance=self.tolerance)
            for seed, track in zip(branches, grown_tracks, strict=True)
        ]
        return MixingResult(
            name=first.arm,
            dimension=growth.dimension,
            factor=growth.factor,
            init=growth.init,
            small=growth.small,
            small_tokens=small.tokens,
            cost_ratio=(small.flops / small.tokens) / (grown.flops / grown.tokens),
            tracks=tuple(grown_tracks),
            estimates=tuple(estimates),
            flops=first.flops,
        )


def plan_trials(jobs: Sequence[Job]) -> list[PlannedTrial]:
    """Return what some jobs would train, without the steps that they take over from a trunk."""
    trials = []
    for job in jobs:
        end = job.preview.spans[-1].end_step if job.end_step is None else job.end_step
        (before, paid), (tokens, flops) = job.count_until(job.first_step), job.count_until(end)
        stages = [span.name for span in job.preview.spans if span.first_step < end and span.end_step > job.first_step]
        parent = None if job.parent is None else job.parent.as_posix()
        trials.append(PlannedTrial(job.name, tuple(stages), tokens - before, flops - paid, parent))
    return trials


def _check_config(config: RunConfig) -> None:
    """Refuse settings under which the runs could not be compared."""
    training = config.training
    if not config.data.held_out:
        raise RunError("a mixing probe compares losses on held-out documents; set data.held_out, such as 0.02")
    if "pretrained" in config.model:
        raise RunError("a mixing probe trains its models from random weights; leave model.pretrained out")
    if training.get("lr_span") != "run":
        raise RunError("a mixing probe needs one learning rate over the run; set training.lr_span to run")
    for name in PER_STAGE:
        if isinstance(value := training.get(name), (list, tuple)) and len(set(value)) > 1:
            raise RunError(
                f"training.{name} differs between stages ({value}); give the value that all models train with"
            )
    warmup = training.get("warmup_steps", 0)
    if isinstance(warmup, float) and 0 < warmup < 1:
        raise RunError(
            f"training.warmup_steps is a share ({warmup:g}) of runs of different lengths; give a number of steps"
        )


def _read_track(job: Job, root: Path) -> LossTrack:
    """Return the held-out losses of a finished run's last stage, by tokens since it began."""
    span = job.preview.spans[-1]
    losses = {
        entry["tokens"] - span.first_token: entry[EVAL_LOSS]
        for entry in RunDirectory(root / job.directory).history()
        if EVAL_LOSS in entry and entry["stage"] == span.number and entry["tokens"] > span.first_token
    }
    tokens = sorted(losses)
    return LossTrack(tuple(tokens), tuple(losses[count] for count in tokens))
