"""Sentences about a comparison: who won, whether growth paid, what it saved, and how certain that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from ..io.units import format_count, format_power
from .comparison import Comparison
from .results import ArmResult, compute_arm_results, compute_countings, find_baseline, is_below
from .tables import format_spread

_MAX_NAMES = 5  # per sentence
#: Tokens per parameter of compute-optimal training (Hoffmann et al. 2022); a saving measured below it says so.
OPTIMAL_RATIO = 20


def summarise_comparison(comparison: Comparison) -> list[str]:
    """Return sentences on the lowest loss at an equal budget, whether growth paid, what it saved, and how sure it is.

    Losses differ *beyond the spread of seeds* if every run of one arm ends below every run of the other.

    >>> summarise_comparison(Comparison("x", "nano", "", "flops", 1.0, {"slop": ""}, missing=("slop, seed 0",)))
    ['No run at the full budget has finished.', 'One run has not finished: slop, seed 0.']
    """
    baseline_arm = find_baseline(comparison)
    results = compute_arm_results(dataclasses.replace(comparison, reference=baseline_arm))
    ranked = sorted((result for result in results if result.budget == 1), key=_get_rank)
    if not ranked:
        return ["No run at the full budget has finished.", *_describe_absent_runs(comparison)]
    sentences = [_describe_lowest(comparison, ranked)]
    baseline = next((result for result in ranked if result.arm == baseline_arm), None)
    grown = [result for result in ranked if result.sequence]
    if baseline is not None and len(ranked) > 1:
        if baseline.arm == comparison.reference and not baseline.sequence and grown:
            sentences.append(_describe_growth(grown, baseline, comparison.equal))
        else:
            sentences += _describe_variants([result for result in ranked if result is not baseline], baseline)
    if comparison.reference is not None and comparison.runs_of(comparison.reference):
        sentences += _describe_savings(comparison, [result for result in ranked if result.arm != comparison.reference])
    sentences += _describe_best_size(comparison, grown)
    return [
        *sentences,
        *_describe_unfinished(results),
        _describe_effort(comparison, ranked),
        *_describe_absent_runs(comparison),
    ]


def _describe_lowest(comparison: Comparison, ranked: Sequence[ArmResult]) -> str:
    best, others = ranked[0], ranked[1:]
    if comparison.equal == "flops":
        budget = f"FLOPs ({format_power(comparison.budget)})"
    else:
        budget = f"tokens ({format_count(comparison.budget)})"
    loss = f"a held-out loss of {format_spread(best.loss, 4)} nats per token"
    if not others:
        return f"At equal {budget} only {_quote(best.arm)} has finished, with {loss}."
    sentence = f"At equal {budget}, {_quote(best.arm)} has the lowest final loss of {len(ranked)} arms: {loss}"
    second = others[0]
    if _has_single_seed(ranked[:2]):
        return f"{sentence}, {_subtract(best, second)} below {_quote(second.arm)}; with one seed, that may be chance."
    if len(others) == 1:
        sure = "beyond" if is_below(best.loss, second.loss) else "within"
        return f"{sentence}, {_subtract(best, second)} below {_quote(second.arm)}, {sure} the spread of seeds."
    close = [other.arm for other in others if not is_below(best.loss, other.loss)]
    if not close:
        return f"{sentence}, below every other arm beyond the spread of seeds."
    return f"{sentence}, but not beyond the spread of seeds of {_join(close)}."


def _describe_growth(grown: Sequence[ArmResult], scratch: ArmResult, equal: str) -> str:
    """Say whether growth paid, compared with training from scratch; at equal tokens, at which loss and FLOPs."""
    best, name = grown[0], _quote(scratch.arm)
    is_lower = best.loss.mean < scratch.loss.mean
    ends = f"ends {_subtract(best, scratch)} {'below' if is_lower else 'above'} {name}"
    has_fewer_flops = equal == "tokens" and best.flops < scratch.flops
    who = _quote(best.arm)
    if not is_lower and len(grown) > 1:
        who = f"{'The' if has_fewer_flops else 'the'} best grown arm, {who},"
    if has_fewer_flops:
        return f"{who} {ends} with {1 - best.flops / scratch.flops:.0%} fewer FLOPs."
    if _has_single_seed((best, scratch)):
        verdict = "With one seed growth seems to pay" if is_lower else "With one seed growth did not pay"
        return f"{verdict}: {who} {ends}."
    is_sure = is_below(best.loss, scratch.loss) or is_below(scratch.loss, best.loss)
    if is_lower:
        verdict = "Growth paid" if is_sure else "It is uncertain whether growth paid"
    else:
        verdict = "Growth did not pay"
    sentence = f"{verdict}: {who} {ends}, {'beyond' if is_sure else 'within'} the spread of seeds"
    if len(grown) == 1:
        return f"{sentence}."
    lower = sum(is_below(arm.loss, scratch.loss) for arm in grown)
    higher = sum(is_below(scratch.loss, arm.loss) for arm in grown)
    counts = f"{lower} of {len(grown)} grown arms {'ends' if lower == 1 else 'end'} below {name}, {higher} above"
    return f"{sentence}. Beyond that spread, {counts}."


def _describe_variants(others: Sequence[ArmResult], baseline: ArmResult) -> list[str]:
    """Say which variants differ from the arm that they are variants of."""
    if _has_single_seed([*others, baseline]):
        return []
    lower = [other.arm for other in others if is_below(other.loss, baseline.loss)]
    higher = [other.arm for other in others if is_below(baseline.loss, other.loss)]
    sides = (("lower", lower), ("higher", higher))
    parts = [f"{_join(arms)} {'ends' if len(arms) == 1 else 'end'} {side}" for side, arms in sides if arms]
    name, rest = _quote(baseline.arm), len(others) - len(lower) - len(higher)
    if not parts:
        return [f"All other arms stay within the spread of seeds of {name}."]
    remainder = f"; {rest} of {len(others)} arms stay within it" if rest else ""
    return [f"Compared with {name}, {' and '.join(parts)}, beyond the spread of seeds{remainder}."]


def _describe_savings(comparison: Comparison, others: Sequence[ArmResult]) -> list[str]:
    """Say how many FLOPs the arms save on the way to the reference's final loss."""
    if not others:
        return []
    goal = f"the final loss of {_quote(comparison.reference or '')}"
    reaching = [(result.flops_saved, result) for result in others if result.flops_saved is not None]
    if not reaching:
        return [f"No other arm reaches {goal} with every seed."]
    where = _describe_ratio(comparison.runs_of(comparison.reference or "")[0].tokens_per_parameter)
    measured = [(saved, result) for saved, result in reaching if not result.is_bound]
    bounds = [(saved, result) for saved, result in reaching if result.is_bound]
    sentences = []
    if measured:
        saved, best = max(measured, key=lambda pair: pair[0].mean)
        if saved.mean > 0:
            seeds = f" ({saved.low:.1%} to {saved.high:.1%} by seed)" if len(saved.values) > 1 else ""
            most = ", the most of all arms with several budgets" if len(others) > 1 else ""
            sentences.append(
                f"{_quote(best.arm)} reaches {goal} with {saved.mean:.1%} fewer FLOPs{seeds}, {where}{most}."
            )
        else:
            closest = f"{_quote(best.arm)} comes closest, with {abs(saved.mean):.1%} more"
            sentences.append(f"No arm with several budgets reaches {goal} with fewer FLOPs; {closest}.")
    for saved, result in bounds:
        if saved.mean >= 0.001:
            known = f"it saves {saved.mean:.1%} or more, {where}"
            sentences.append(f"{_quote(result.arm)} ends below {goal} at its smallest budget: {known}.")
    if unknown := [result.arm for saved, result in bounds if saved.mean < 0.001]:
        ends = f"{_join(unknown)} {'ends' if len(unknown) == 1 else 'end'} below {goal} at the full budget"
        sentences.append(f"{ends}, and nothing smaller was run, so what that saves is not known.")
    missing = [result.arm for result in others if result.flops_saved is None]
    return [*sentences, *([f"Not every seed of {_join(missing)} reaches {goal}."] if missing else [])]


def _describe_ratio(tokens_per_parameter: float) -> str:
    """Say at how many tokens per parameter a saving was measured, and whether that is few."""
    few = (
        f", fewer than the {OPTIMAL_RATIO} of compute-optimal training" if tokens_per_parameter < OPTIMAL_RATIO else ""
    )
    return f"at {tokens_per_parameter:.2g} tokens per parameter{few}"


def _describe_best_size(comparison: Comparison, grown: Sequence[ArmResult]) -> list[str]:
    """Compare the best grown arm with the best size that is not grown, at equal FLOPs."""
    if not grown:
        return []
    sizes = {run.schedule.initial for run in comparison.runs if not run.schedule.stages}
    counting = next(one for one in compute_countings(comparison) if (one.arm, one.budget) == (grown[0].arm, 1))
    against = counting.against_best_size
    if counting.best_size is None or against is None or not math.isfinite(against.mean):
        return []
    if len(sizes) < 2:
        return [f"No other size than that of {_quote(counting.best_size)} was trained without growth."]
    side = "below" if against.mean < 0 else "above"
    ends = f"{_quote(counting.arm)} ends {abs(against.mean):.4f} {side} {_quote(counting.best_size)}"
    return [f"{ends}, the best of {len(sizes)} sizes without growth at the same FLOPs."]


def _describe_unfinished(results: Sequence[ArmResult]) -> list[str]:
    """Name the arms whose learning-rate schedules have not ended."""
    arms = list(dict.fromkeys(result.arm for result in results if result.is_finished is False))
    if not arms:
        return []
    return [f"The learning rate of {_join(arms)} is still high at the end: its losses are not read as savings."]


def _describe_effort(comparison: Comparison, ranked: Sequence[ArmResult]) -> str:
    """Say how many seeds and how much training the other sentences rest on."""
    runs = {result.arm: comparison.runs_of(result.arm)[0] for result in ranked}
    target = max(run.stages[-1].parameters for run in runs.values())
    ratios = {arm: run.tokens / target for arm, run in runs.items() if run.stages[-1].parameters == target}
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    low, high = f"{ratios[least]:.2g}", f"{ratios[most]:.2g}"
    tokens = low if low == high else f"{low} ({_quote(least)}) to {high} ({_quote(most)})"
    fewest, many = min(len(result.seeds) for result in ranked), max(len(result.seeds) for result in ranked)
    seeds = "one seed" if many == 1 else f"{many} seeds" if fewest == many else f"{fewest} to {many} seeds"
    return (
        f"This rests on {seeds} per arm, and on {tokens} tokens per parameter of the target ({format_count(target)})."
    )


def _describe_absent_runs(comparison: Comparison) -> list[str]:
    sentences = []
    for what, names in (("diverged", comparison.diverged), ("not finished", comparison.missing)):
        if names:
            who = "One run has" if len(names) == 1 else f"{len(names)} runs have"
            more = "; …" if len(names) > _MAX_NAMES else ""
            sentences.append(f"{who} {what}: {'; '.join(names[:_MAX_NAMES])}{more}.")
    return sentences


def _get_rank(result: ArmResult) -> float:
    """Return the mean loss, by which arms are sorted; a diverged arm comes last."""
    return result.loss.mean if math.isfinite(result.loss.mean) else math.inf


def _subtract(first: ArmResult, second: ArmResult) -> str:
    return f"{abs(first.loss.mean - second.loss.mean):.4f}"


def _has_single_seed(results: Iterable[ArmResult]) -> bool:
    """Whether some arm has only one seed, and so no spread."""
    return any(len(result.loss.values) < 2 for result in results)


def _quote(arm: str) -> str:
    """Return an arm's name, in quotes if it would read like a part of the sentence."""
    return f"“{arm}”" if " " in arm or "," in arm else arm


def _join(arms: Sequence[str]) -> str:
    """Return names separated by commas.

    >>> _join(["a", "b"]), _join("abcdefg")
    ('a and b', 'a, b, c, d and 3 more')
    """
    names = [_quote(arm) for arm in arms]
    if len(names) > _MAX_NAMES:
        names = [*names[: _MAX_NAMES - 1], f"{len(names) - _MAX_NAMES + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
