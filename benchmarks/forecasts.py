"""Forecasts of each experiment by a growth law fitted to the others, in docs/planning.md.

python benchmarks/forecasts.py            # fits one law per record: a minute of one core
python benchmarks/forecasts.py --check    # changes nothing; exits 1 if the page does not show the records
python benchmarks/forecasts.py --new EXPERIMENT.yaml --anchor COMPARISON.json    # before its runs are trained

The record is benchmarks/results/forecasts.json, with the fingerprints of the comparisons that it rests on; the table
is made from it. benchmarks/results/growth_law.yaml is the law fitted to all records but `HELD_OUT`; the figure shows
its errors.

`--new` forecasts the runs of an experiment by the law as it is in the repository, and writes them to
benchmarks/results/NAME_SCALE_forecasts.json, to commit before the runs are trained. If the experiment has a text that
the law does not know, train its shortest run first: `--anchor` takes the level from the comparison of that run. Once
benchmarks/results/NAME_SCALE.json exists, the page shows forecasts and measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from results import read_records

from slop_hf.cost.growth_law import GrowthLaw
from slop_hf.cost.scaling_law import ScalingLaw
from slop_hf.cost.staged_run import StagedRun
from slop_hf.errors import RunError, SlopError
from slop_hf.experiments.comparison import Comparison, RunResult
from slop_hf.experiments.config import Experiment
from slop_hf.experiments.jobs import build_jobs
from slop_hf.experiments.planner_accuracy import compute_predictions
from slop_hf.experiments.results import compute_rank_correlation
from slop_hf.experiments.staged_runs import draw_residuals, list_staged_runs, plan_staged_run
from slop_hf.io.files import write_text
from slop_hf.io.record import Record
from slop_hf.io.serialization import hash_json, to_plain
from slop_hf.io.units import NOTHING
from slop_hf.report.tables import TextTable

ROOT = Path(__file__).parents[1]
RECORD, PAGE, LAW = "benchmarks/results/forecasts.json", "docs/planning.md", "benchmarks/results/growth_law.yaml"
FIGURE = "docs/images/results/growth_law_residuals.png"
BEGIN, END = "<!-- forecasts -->\n", "<!-- end of forecasts -->\n"
#: Markers of the forecasts made before measuring.
EARLY_BEGIN, EARLY_END = "<!-- forecasts before measuring -->\n", "<!-- end of forecasts before measuring -->\n"
EARLY = "_forecasts.json"

#: The form of the law was chosen by its forecasts of these records. A claim rests on the others alone.
CHOSEN_ON = ("best_nano", "longer_nano", "study_course_nano", "study_learning_rate_nano")
#: Records that no law is fitted to, to test the law in the repository on: it forecast the runs of the first before
#: they were trained; the second has another scale, another text and more tokens per parameter.
HELD_OUT = ("unseen_nano112", "crossing_pilot")
#: Records whose budgets are tokens; the goals are for arms at equal FLOPs.
AT_EQUAL_TOKENS = ("crossing_pilot",)
#: Fewest arms at one budget for a rank correlation.
LEAST_ARMS = 5
PREDICTORS = ("growth law", "total FLOPs", "paper's objective", "scaling law")


@dataclass(frozen=True)
class ArmForecast(Record, error=RunError):
    """One arm at one budget, measured and predicted by laws that know nothing of its experiment.

    Args:
        losses: measured losses at the end, by seed.
        low, high: central 80% interval of the growth law.
        predicted: prediction by predictor. The paper's objective predicts no loss: the smaller, the better.
    """

    arm: str
    budget: float
    losses: tuple[float, ...]
    low: float
    high: float
    predicted: dict[str, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


@dataclass(frozen=True)
class RecordForecast(Record, error=RunError):
    """The forecasts of one record.

    Args:
        fingerprint: fingerprint of the comparison.
        fitted_runs: number of runs that the law was fitted to.
        anchor: run that the level was taken from; empty if the other records have the same text.
    """

    name: str
    fingerprint: str
    fitted_runs: int
    anchor: str
    arms: tuple[ArmForecast, ...]


@dataclass(frozen=True)
class Forecasts(Record, error=RunError, if_missing="`python benchmarks/forecasts.py` writes it"):
    """Forecasts of all records."""

    records: tuple[RecordForecast, ...]


@dataclass(frozen=True)
class EarlyArm(Record, error=RunError):
    """One run, forecast before it was trained.

    Args:
        parameters, tokens: parameters and tokens of each stage.
        low, high: central 80% interval of the growth law.
        predicted: prediction by predictor, as in `ArmForecast`.
    """

    arm: str
    budget: float
    parameters: tuple[int, ...]
    tokens: tuple[int, ...]
    low: float
    high: float
    predicted: dict[str, float]


@dataclass(frozen=True)
class EarlyForecasts(Record, error=RunError):
    """Forecasts of an experiment's runs, made before they were trained.

    Args:
        text: text of the runs.
        law: hash of the law.
        fitted_runs: number of runs that the law was fitted to.
        anchor: name of the run that the level was taken from, and its loss; empty if the law knew the text.
    """

    text: str
    law: str
    fitted_runs: int
    anchor: str
    anchor_loss: float | None
    arms: tuple[EarlyArm, ...]


def read_comparisons(root: Path) -> dict[str, Comparison]:
    """Read the records with finished runs and the config of these."""
    return {
        name: comparison
        for name, comparison in read_records(root).items()
        if "run" in comparison.settings and any(run.is_finished for run in comparison.runs)
    }


class Measured(NamedTuple):
    """One run, as its record has it and as the law sees it."""

    result: RunResult
    run: StagedRun


def forecast_records(comparisons: Mapping[str, Comparison]) -> tuple[Forecasts, GrowthLaw, list[StagedRun]]:
    """Return the forecasts of all records, the law fitted to all but `HELD_OUT`, and the runs it was fitted to."""
    measured = {
        name: [Measured(*pair) for pair in zip(comparison.runs, list_staged_runs(comparison), strict=True)]
        for name, comparison in comparisons.items()
    }
    records = []
    for name, comparison in comparisons.items():
        others = [one for other in comparisons if other not in (name, *HELD_OUT) for one in measured[other]]
        records.append(forecast_record(name, comparison, measured[name], others))
    known = [one for name, group in measured.items() if name not in HELD_OUT for one in group]
    runs = [one.run for one in _drop_repeated(known)]
    return Forecasts(tuple(records)), GrowthLaw.fit(runs), runs


def forecast_record(
    name: str, comparison: Comparison, measured: Sequence[Measured], others: Sequence[Measured]
) -> RecordForecast:
    """Return the forecasts of one record by laws fitted to runs of other records.

    Runs of other records that have a configuration of this record are left out, whatever their seed.
    """
    configurations = {_describe_configuration(one.run) for one in measured}
    fitted = _drop_repeated([one for one in others if _describe_configuration(one.run) not in configurations])
    law = GrowthLaw.fit([one.run for one in fitted])
    anchor = None
    if measured[0].run.text not in law.offsets:
        anchor = _find_anchor(comparison)
        law = law.anchor([one.run for one in measured if _is_arm(one.result, anchor)])
    all_forecasts = law.predict_all([one.run for one in measured])
    forecasts = {(one.result.arm, one.result.budget): all_forecasts[number] for number, one in enumerate(measured)}
    ends = [one.result for one in fitted if one.result.is_finished]
    line = _fit_line([end.flops for end in ends], [end.eval_loss for end in ends])
    products = {prediction.arm: prediction.products for prediction in compute_predictions(comparison)}
    arms = []
    for arm in comparison.arms:
        for budget in comparison.budgets(arm):
            results = comparison.runs_of(arm, budget)
            if (anchor is not None and _is_arm(results[0], anchor)) or not results[0].is_finished:
                continue
            forecast = forecasts[arm, budget]
            predicted = {
                "growth law": forecast.loss,
                "total FLOPs": line(_get_flops(comparison, results[0])),
                "scaling law": _predict_by_scaling_law(results[0]),
            }
            if arm in products and budget == 1:
                predicted["paper's objective"] = products[arm]
            losses = tuple(result.eval_loss for result in results)
            arms.append(
                ArmForecast(arm, budget, losses, round(forecast.low, 4), round(forecast.high, 4), _round(predicted))
            )
    named = "" if anchor is None else f"{anchor.arm} ×{anchor.budget:g}"
    return RecordForecast(name, comparison.fingerprint, len(fitted), named, tuple(arms))


def forecast_experiment(
    experiment: Experiment, law: GrowthLaw, comparisons: Mapping[str, Comparison], anchor: Comparison | None
) -> EarlyForecasts:
    """Return forecasts of an experiment whose runs are not trained yet.

    Args:
        experiment: the experiment.
        law: law that was fitted to other runs.
        comparisons: other records, for the line of losses over FLOPs.
        anchor: comparison with the only trained run of the experiment; None if the law knows the text.

    Raises:
        RunError: if the law or a record knows runs of the experiment.
    """
    jobs = [job for job in build_jobs(experiment) if job.seed == experiment.sizes.seeds[0]]
    runs = [plan_staged_run(job.config, experiment=experiment.name) for job in jobs]
    if any(comparison.name == experiment.name for comparison in comparisons.values()):
        raise RunError(f"{experiment.name} has a record already: give an experiment that has not been run")
    known = "" if anchor is None else _name_anchor(anchor)
    digest = hash_json(to_plain(law))
    if anchor is not None:
        law = law.anchor(list_staged_runs(anchor))
    ends = [run for comparison in comparisons.values() for run in comparison.runs if run.is_finished]
    line = _fit_line([end.flops for end in ends], [end.eval_loss for end in ends])
    arms = []
    for job, run, forecast in zip(jobs, runs, law.predict_all(runs), strict=True):
        if job.name == known:
            continue
        sizes, tokens = [stage.parameters for stage in run.stages], [stage.tokens for stage in run.stages]
        predicted = {
            "growth law": forecast.loss,
            "total FLOPs": line(job.flops),
            "scaling law": ScalingLaw().staged_losses(sizes, tokens)[-1],
        }
        bounds = round(forecast.low, 4), round(forecast.high, 4)
        arms.append(
            EarlyArm(job.arm, job.budget, tuple(map(int, sizes)), tuple(map(int, tokens)), *bounds, _round(predicted))
        )
    loss = None if anchor is None else anchor.runs[0].eval_loss
    return EarlyForecasts(runs[0].text, digest, law.runs, known, loss, tuple(arms))


def _name_anchor(anchor: Comparison) -> str:
    """Return the name of the only run of a comparison, as its job has it."""
    if len(anchor.runs) != 1:
        raise RunError(
            f"--anchor has {len(anchor.runs)} runs, expected one: forecasts must not know the others. Train the "
            "shortest run alone: slop compare … --arm NAME"
        )
    (run,) = anchor.runs
    return f"{run.arm}{f' ×{run.budget:g}' if run.budget != 1 else ''}, seed {run.seed}"


def read_early_forecasts(root: Path) -> dict[str, EarlyForecasts]:
    """Read the forecasts made before measuring, by the name of the record that they forecast."""
    paths = sorted((root / RECORD).parent.glob(f"*{EARLY}"))
    return {path.name.removesuffix(EARLY): EarlyForecasts.from_json(path) for path in paths}


def join_measurements(name: str, early: EarlyForecasts, comparison: Comparison) -> RecordForecast:
    """Return the forecasts with the measured losses.

    Raises:
        RunError: if a measured run differs from the forecast one in the parameters or tokens of a stage.
    """
    arms = []
    for arm in early.arms:
        results = comparison.runs_of(arm.arm, arm.budget)
        for result in results:
            stages = [(stage.parameters, stage.tokens) for stage in result.stages]
            if stages != list(zip(arm.parameters, arm.tokens, strict=True)):
                raise RunError(
                    f"{name}: {arm.arm} ×{arm.budget:g} was run with other stages than forecast: got {stages}, "
                    f"expected parameters {arm.parameters} and tokens {arm.tokens}"
                )
        if results:
            losses = tuple(result.eval_loss for result in results)
            arms.append(ArmForecast(arm.arm, arm.budget, losses, arm.low, arm.high, arm.predicted))
    return RecordForecast(name, comparison.fingerprint, early.fitted_runs, early.anchor, tuple(arms))


def _round(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{number:.5g}") for name, number in numbers.items()}


def _describe_configuration(run: StagedRun) -> str:
    stages = [dataclasses.replace(stage, losses=()) for stage in run.stages]
    return repr((stages, run.text))


def _drop_repeated(measured: Sequence[Measured]) -> list[Measured]:
    """Return each run once, if several records share it."""
    return list({repr((one.run.stages, one.run.text)): one for one in measured}.values())


def _find_anchor(comparison: Comparison) -> RunResult:
    """Return the shortest finished run, without growth if there is one."""
    return min(
        (run for run in comparison.runs if run.is_finished), key=lambda run: (bool(run.schedule.stages), run.flops)
    )


def _is_arm(run: RunResult, other: RunResult) -> bool:
    return (run.arm, run.budget) == (other.arm, other.budget)


def _get_flops(comparison: Comparison, run: RunResult) -> float:
    """Return the FLOPs of a run; those of runs at equal FLOPs are the same, although runs have whole steps."""
    return comparison.budget * run.budget if comparison.equal == "flops" else run.flops


def _fit_line(flops: Sequence[float], losses: Sequence[float]) -> Callable[[float], float]:
    """Return the loss as a function of the FLOPs: a line over their logarithm."""
    slope, level = np.polyfit(np.log(flops), losses, 1)
    return lambda value: float(level + slope * math.log(value))


def _predict_by_scaling_law(run: RunResult) -> float:
    stages = [stage for stage in run.stages if stage.tokens]
    return ScalingLaw().staged_losses([stage.parameters for stage in stages], [stage.tokens for stage in stages])[-1]


@dataclass(frozen=True)
class Score:
    """How well a predictor did on some records; None if it makes no such prediction."""

    spearman: float | None
    error: float | None
    pairs: int
    right: int
    inside: float | None


def score_record(record: RecordForecast, predictor: str, deviation: float) -> Score:
    """Return the score of a predictor on one record.

    Args:
        record: the forecasts.
        predictor: one of `PREDICTORS`.
        deviation: standard deviation of the losses of one arm over seeds, in nats.
    """
    arms = [arm for arm in record.arms if predictor in arm.predicted]
    errors = [abs(arm.predicted[predictor] - arm.mean) for arm in arms] if predictor != "paper's objective" else []
    correlations = []
    for budget in {arm.budget for arm in arms}:
        group = [arm for arm in arms if arm.budget == budget]
        means, predicted = [arm.mean for arm in group], [arm.predicted[predictor] for arm in group]
        if len(group) >= LEAST_ARMS and statistics.stdev(means) > deviation:
            correlations.append(compute_rank_correlation(predicted, means))
    pairs = list(_list_pairs(arms, deviation))
    right = sum((a.mean - b.mean) * (a.predicted[predictor] - b.predicted[predictor]) > 0 for a, b in pairs)
    runs = [arm.low <= loss <= arm.high for arm in arms for loss in arm.losses]
    return Score(
        spearman=statistics.fmean(correlations) if correlations else None,
        error=statistics.fmean(errors) if errors else None,
        pairs=len(pairs),
        right=right,
        inside=statistics.fmean(runs) if predictor == "growth law" and runs else None,
    )


def _list_pairs(arms: Sequence[ArmForecast], deviation: float) -> Iterator[tuple[ArmForecast, ArmForecast]]:
    """Yield the pairs at one budget that differ by more than two standard errors of the difference."""
    for a, b in combinations(arms, 2):
        error = deviation * math.sqrt(1 / len(a.losses) + 1 / len(b.losses))
        if a.budget == b.budget and abs(a.mean - b.mean) > 2 * error:
            yield a, b


def measure_deviation(records: Sequence[RecordForecast]) -> float:
    """Return the pooled standard deviation of losses over seeds."""
    several = [arm.losses for record in records for arm in record.arms if len(arm.losses) > 1]
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    return math.sqrt(squares / sum(len(losses) - 1 for losses in several))


def average(scores: Sequence[Score]) -> Score:
    """Return the score over several records: means over records, pairs together."""
    means = [
        statistics.fmean(values) if (values := [v for v in map(attribute, scores) if v is not None]) else None
        for attribute in (lambda score: score.spearman, lambda score: score.error, lambda score: score.inside)
    ]
    return Score(means[0], means[1], sum(s.pairs for s in scores), sum(s.right for s in scores), means[2])


def tabulate_forecasts(forecasts: Forecasts) -> TextTable:
    """Return the table: one row per record and predictor, and means over each group of records."""
    names = "record", "predictor", "arms", "Spearman", "error (nats)", "pairs", "right verdicts", "in the 80% interval"
    rows = []
    for title, group in (("claimed on", False), ("form chosen on", True)):
        records = _select_records(forecasts, chosen_on=group)
        scores = score_records(forecasts, records)
        for number, record in enumerate(records):
            anchor = f", anchored at {record.anchor}" if record.anchor else ""
            for predictor in PREDICTORS:
                score = scores[predictor][number]
                rows.append(_format_row(f"{record.name}{anchor}", predictor, str(len(record.arms)), score))
        for predictor in PREDICTORS if records else ():
            rows.append(_format_row(f"mean, {title}", predictor, "", average(scores[predictor])))
    return TextTable(tuple((name, number >= 2) for number, name in enumerate(names)), tuple(rows))


def _select_records(forecasts: Forecasts, *, chosen_on: bool) -> list[RecordForecast]:
    return [record for record in forecasts.records if (record.name in CHOSEN_ON) == chosen_on]


def score_records(forecasts: Forecasts, records: Sequence[RecordForecast]) -> dict[str, list[Score]]:
    """Return the score of each predictor on some of the records, in their order."""
    deviation = measure_deviation(forecasts.records)
    return {name: [score_record(record, name, deviation) for record in records] for name in PREDICTORS}


def describe_goals(forecasts: Forecasts) -> str:
    """Return how the growth law does against its goals, on the records that its form was not chosen on."""
    claimed = _select_records(forecasts, chosen_on=False)
    at_equal_flops = [record for record in claimed if record.name not in AT_EQUAL_TOKENS]
    sentences = [_compare_with_goals("records claimed on", forecasts, claimed)]
    if len(at_equal_flops) < len(claimed):
        sentences.append(_compare_with_goals("those of them at equal FLOPs", forecasts, at_equal_flops))
    return textwrap.fill(" ".join(sentences), 119) + "\n"


def _compare_with_goals(which: str, forecasts: Forecasts, records: Sequence[RecordForecast]) -> str:
    """Return the mean scores of the growth law on some records, each with its goal."""
    mean = average(score_records(forecasts, records)["growth law"])
    right = mean.right / mean.pairs if mean.pairs else None
    goals = (
        ("Spearman", mean.spearman, "{:.2f}", 0.8, math.inf, "0.8 or more"),
        ("mean error in nats", mean.error, "{:.3f}", 0.0, 0.05, "0.05 or less"),
        ("right verdicts", right, "{:.0%}", 0.9, math.inf, "90% or more"),
        ("losses in the 80% interval", mean.inside, "{:.0%}", 0.7, 0.9, "70% to 90%"),
    )
    parts = []
    for name, value, form, least, most, goal in goals:
        verdict = "unknown" if value is None else "met" if least <= value <= most else "missed"
        parts.append(f"{name} {'–' if value is None else form.format(value)} (goal: {goal}; {verdict})")
    return f"Growth law, {which}: {', '.join(parts)}."


def _format_row(record: str, predictor: str, arms: str, score: Score) -> tuple[str, ...]:
    is_defined = score.spearman is not None and math.isfinite(score.spearman)
    return (
        record,
        predictor,
        arms,
        f"{score.spearman:.2f}" if is_defined else "–",
        "–" if score.error is None else f"{score.error:.3f}",
        str(score.pairs),
        f"{score.right / score.pairs:.0%}" if score.pairs else "–",
        "–" if score.inside is None else f"{score.inside:.0%}",
    )


def tabulate_early_forecasts(early: EarlyForecasts, joined: RecordForecast | None) -> TextTable:
    """Return the table of forecasts made before measuring; measurements are blank until there are any."""
    names = "run", "million parameters", "million tokens", "forecast", "80% interval", "measured", "error"
    measured = {(arm.arm, arm.budget): arm for arm in joined.arms} if joined is not None else {}
    rows = []
    for arm in early.arms:
        result, loss = measured.get((arm.arm, arm.budget)), arm.predicted["growth law"]
        rows.append(
            (
                f"{arm.arm}{f' ×{arm.budget:g}' if arm.budget != 1 else ''}",
                " → ".join(f"{count / 1e6:.2f}" for count in arm.parameters),
                " + ".join(f"{count / 1e6:.2f}" for count in arm.tokens),
                f"{loss:.3f}",
                f"{arm.low:.3f} to {arm.high:.3f}",
                NOTHING if result is None else f"{result.mean:.3f}",
                NOTHING if result is None else f"{loss - result.mean:+.3f}",
            )
        )
    return TextTable(tuple((name, number >= 3) for number, name in enumerate(names)), tuple(rows))


def describe_early_forecasts(early: EarlyForecasts, joined: RecordForecast | None, deviation: float) -> str:
    """Return in sentences what the forecasts knew, and how well each predictor did."""
    known = (
        f"and the loss of {early.anchor}, {early.anchor_loss:.3f}" if early.anchor_loss is not None else "and no other"
    )
    sentences = [f"The law knew {early.fitted_runs} runs of other experiments {known}."]
    scores = {} if joined is None else {name: score_record(joined, name, deviation) for name in PREDICTORS}
    for predictor, score in scores.items():
        parts = []
        if score.spearman is not None and math.isfinite(score.spearman):
            parts.append(f"Spearman {score.spearman:.2f}")
        if score.error is not None:
            parts.append(f"mean error {score.error:.3f} nats")
        if score.pairs:
            parts.append(f"the right verdict in {score.right} of {score.pairs} pairs")
        if score.inside is not None:
            parts.append(f"{score.inside:.0%} of the losses in the 80% interval")
        if parts:
            sentences.append(f"{predictor[0].upper()}{predictor[1:]}: {', '.join(parts)}.")
    return textwrap.fill(" ".join(sentences), 119) + "\n"


def build_block(forecasts: Forecasts) -> str:
    """Return the table and the goals, as the page shows them."""
    return f"{tabulate_forecasts(forecasts).markdown()}\n{describe_goals(forecasts)}"


def build_early_block(root: Path, forecasts: Forecasts, comparisons: Mapping[str, Comparison]) -> str:
    """Return the tables of forecasts made before measuring, as the page shows them."""
    deviation = measure_deviation(forecasts.records)
    parts = []
    for name, early in read_early_forecasts(root).items():
        joined = join_measurements(name, early, comparisons[name]) if name in comparisons else None
        parts.append(tabulate_early_forecasts(early, joined).markdown())
        parts.append(describe_early_forecasts(early, joined, deviation))
    return "\n".join(parts)


def fill_page(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """Return a page with a block of text between its markers.

    Raises:
        RunError: if the page lacks a marker.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise RunError(f"{PAGE} lacks {begin.strip()} or {end.strip()}: put both where the table belongs")
    return before + first + block.rstrip("\n") + "\n" + last + after


def rebuild_page(root: Path, forecasts: Forecasts, comparisons: Mapping[str, Comparison]) -> tuple[str, str]:
    """Return the text of the page, and the same with both blocks rebuilt."""
    text = (root / PAGE).read_text(encoding="utf-8")
    early = build_early_block(root, forecasts, comparisons)
    return text, fill_page(fill_page(text, build_block(forecasts)), early, EARLY_BEGIN, EARLY_END)


def find_outdated(root: Path, comparisons: Mapping[str, Comparison]) -> list[str]:
    """Return what is out of date: the record, if a comparison is new or has changed, and the page."""
    forecasts = Forecasts.from_json(root / RECORD)
    known = {record.name: record.fingerprint for record in forecasts.records}
    outdated = [RECORD] if known != {name: comparison.fingerprint for name, comparison in comparisons.items()} else []
    text, rebuilt = rebuild_page(root, forecasts, comparisons)
    if rebuilt != text:
        outdated.append(PAGE)
    return outdated


def write_early_forecasts(
    root: Path, config: Path, anchor_path: Path | None, comparisons: Mapping[str, Comparison]
) -> None:
    """Forecast an experiment with the law in the repository; write the forecasts and the page.

    Raises:
        SlopError: if the experiment is malformed or known, or there is a forecast of it already.
    """
    experiment = Experiment.from_yaml(config)
    path = (root / RECORD).with_name(f"{experiment.name}_{experiment.scale}{EARLY}")
    if path.exists():
        raise RunError(f"{path} exists: a forecast is made once, before the runs. Give the experiment another name")
    anchor = None if anchor_path is None else Comparison.load(anchor_path)
    early = forecast_experiment(experiment, GrowthLaw.from_yaml(root / LAW), comparisons, anchor)
    early.to_json(path)
    write_text(root / PAGE, rebuild_page(root, Forecasts.from_json(root / RECORD), comparisons)[1])
    print(tabulate_early_forecasts(early, None).markdown())


def main(arguments: Sequence[str] | None = None) -> int:
    """Forecast or check; return the exit code, 1 if `--check` finds something out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    parser.add_argument("--new", type=Path, help="experiment to forecast before its runs are trained")
    parser.add_argument("--anchor", type=Path, help="comparison.json of the only trained run of that experiment")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository")
    options = parser.parse_args(arguments)
    try:
        comparisons = read_comparisons(options.root)
        if options.check:
            outdated = find_outdated(options.root, comparisons)
            for path in outdated:
                print(f"{path} is out of date; run `python benchmarks/forecasts.py`")
            return int(bool(outdated))
        if options.new is not None:
            write_early_forecasts(options.root, options.new, options.anchor, comparisons)
            return 0
        forecasts, law, runs = forecast_records(comparisons)
        forecasts.to_json(options.root / RECORD)
        law.to_yaml(options.root / LAW)
        draw_residuals(law, runs, options.root / FIGURE)
        write_text(options.root / PAGE, rebuild_page(options.root, forecasts, comparisons)[1])
        print(build_block(forecasts))
    except SlopError as caught:
        print(f"error: {caught}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
