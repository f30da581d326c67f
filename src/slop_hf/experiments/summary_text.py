"""What a comparison found, in plain sentences: also where growth did not pay, and what cannot be told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from ..io.units import format_power
from ..io.units import format_count
from .comparison import Comparison
from .results import ArmResult, Spread, compute_arm_results, find_baseline, is_below
from .tables import format_spread

_NAMES = 5  # that a sentence lists at most


def summarize_comparison(comparison: Comparison) -> list[str]:
    """What a comparison found: the lowest loss at an equal budget, whether growth paid, what it saved, how sure it is.

    Losses count as different *beyond the spread of seeds* where each run of one arm ends below each run of the other.

    >>> summarize_comparison(Comparison("x", "nano", "", "flops", 1.0, {"slop": ""}, missing=("slop, seed 0",)))
    ['No run at the full budget has finished.', 'One run has not finished: slop, seed 0.']
    """
    against = find_baseline(comparison)
    results = compute_arm_results(dataclasses.replace(comparison, reference=against))
    found = sorted((one for one in results if one.budget == 1), key=_place)
    if not found:
        return ["No run at the full budget has finished.", *_left_out(comparison)]
    beside = next((one for one in found if one.arm == against), None)
    grown = [one for one in found if one.sequence]
    told = [_lowest(comparison, found)]
    if beside is not None and len(found) > 1:
        paid = beside.arm == comparison.reference and not beside.sequence and bool(grown)
        told += [_growth(grown, beside)] if paid else _others([one for one in found if one is not beside], beside)
    if comparison.reference is not None and comparison.of(comparison.reference):
        told += _saving(comparison, [one for one in found if one.arm != comparison.reference])
    return [*told, _effort(comparison, found), *_left_out(comparison)]


def _lowest(comparison: Comparison, found: Sequence[ArmResult]) -> str:
    best, others = found[0], found[1:]
    spend = (
        f"FLOPs ({format_power(comparison.budget)})"
        if comparison.equal == "flops"
        else f"tokens ({format_count(comparison.budget)})"
    )
    loss = f"held-out loss {format_spread(best.loss, 4)} nats a token"
    if not others:
        return f"At equal {spend} only {_named(best.arm)} has finished: {loss}."
    sentence = f"At equal {spend}, {_named(best.arm)} ends lowest of {len(found)} arms: {loss}"
    if _is_single(found[:2]):
        return (
            f"{sentence}, {_apart(best, others[0])} below {_named(others[0].arm)}; with one seed, that may be chance."
        )
    if len(others) == 1:
        sure = "beyond" if is_below(best.loss, others[0].loss) else "within"
        return f"{sentence}, {_apart(best, others[0])} below {_named(others[0].arm)}, {sure} the spread of seeds."
    close = [one.arm for one in others if not is_below(best.loss, one.loss)]
    if not close:
        return f"{sentence}, below every other arm beyond the spread of seeds."
    return f"{sentence}, but not beyond the spread of seeds of {_listed(close)}."


def _growth(grown: Sequence[ArmResult], beside: ArmResult) -> str:
    """Whether growth paid against training from scratch."""
    best, scratch = grown[0], _named(beside.arm)
    below = best.loss.mean < beside.loss.mean
    ends = f"ends {_apart(best, beside)} {'below' if below else 'above'} {scratch}"
    who = _named(best.arm) if below or len(grown) == 1 else f"the best of the grown arms, {_named(best.arm)},"
    if _is_single((best, beside)):
        verdict = "With one seed growth seems to pay" if below else "With one seed growth did not pay"
        return f"{verdict}: {who} {ends}."
    sure = is_below(best.loss, beside.loss) or is_below(beside.loss, best.loss)
    verdict = ("Growth paid" if sure else "Whether growth paid cannot be told") if below else "Growth did not pay"
    sentence = f"{verdict}: {who} {ends}, {'beyond' if sure else 'within'} the spread of seeds"
    if len(grown) == 1:
        return f"{sentence}."
    lower = sum(is_below(one.loss, beside.loss) for one in grown)
    higher = sum(is_below(beside.loss, one.loss) for one in grown)
    counts = f"{lower or 'none'} end below {scratch} beyond that spread, {higher or 'none'} above"
    return f"{sentence}. Of {len(grown)} grown arms {counts}."


def _others(others: Sequence[ArmResult], beside: ArmResult) -> list[str]:
    """Which variants differ from the arm they are variants of."""
    if _is_single([*others, beside]):
        return []
    lower = [one.arm for one in others if is_below(one.loss, beside.loss)]
    higher = [one.arm for one in others if is_below(beside.loss, one.loss)]
    sides = (("lower", lower), ("higher", higher))
    parts = [f"{side} beyond the spread of seeds: {_listed(arms)}" for side, arms in sides if arms]
    if rest := len(others) - len(lower) - len(higher):
        parts.append(f"within that spread: {rest} of {len(others)}" if parts else "all within the spread of seeds")
    return [f"Beside {_named(beside.arm)}, {'; '.join(parts)}."]


def _saving(comparison: Comparison, others: Sequence[ArmResult]) -> list[str]:
    """FLOPs to the reference's final loss."""
    goal = f"{_named(comparison.reference or '')}'s final loss"
    reached = [(one.flops_saved, one) for one in others if one.flops_saved is not None]
    if not others:
        return []
    if not reached:
        return [f"No other arm gets to {goal} with every seed."]
    saved, best = max(reached, key=lambda pair: pair[0].mean)
    seeds = f" ({saved.low:.1%} to {saved.high:.1%} by seed)" if _seeds(saved) > 1 else ""
    most = ", the most of all arms" if len(others) > 1 else ""
    if saved.mean > 0:
        sentence = f"To {goal} {_named(best.arm)} saves {saved.mean:.1%} of the FLOPs{seeds}{most}"
    else:
        sentence = f"No arm saves FLOPs to {goal}; {_named(best.arm)} comes closest with {abs(saved.mean):.1%} more"
    never = [one.arm for one in others if one.flops_saved is None]
    return [sentence + (f"; not every seed of {_listed(never)} gets there." if never else ".")]


def _effort(comparison: Comparison, found: Sequence[ArmResult]) -> str:
    """How much training, and how many seeds, all of this rests on."""
    runs = {one.arm: comparison.of(one.arm)[0] for one in found}
    target = max(run.stages[-1].parameters for run in runs.values())
    ratios = {arm: run.tokens / target for arm, run in runs.items() if run.stages[-1].parameters == target}
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    low, high = f"{ratios[least]:.2g}", f"{ratios[most]:.2g}"
    tokens = low if low == high else f"{low} ({_named(least)}) to {high} ({_named(most)})"
    fewest, many = min(len(one.seeds) for one in found), max(len(one.seeds) for one in found)
    seeds = "one seed" if many == 1 else f"{many} seeds" if fewest == many else f"{fewest} to {many} seeds"
    return f"This rests on {seeds} an arm, and on {tokens} tokens per parameter of the target ({format_count(target)})."


def _left_out(comparison: Comparison) -> list[str]:
    told = []
    for what, names in (("diverged", comparison.diverged), ("not finished", comparison.missing)):
        if names:
            who = "One run has" if len(names) == 1 else f"{len(names)} runs have"
            told.append(f"{who} {what}: {'; '.join(names[:_NAMES])}{'; …' if len(names) > _NAMES else ''}.")
    return told


def _place(one: ArmResult) -> float:
    """What arms are ranked by; a diverged one comes last."""
    return one.loss.mean if math.isfinite(one.loss.mean) else math.inf


def _apart(one: ArmResult, other: ArmResult) -> str:
    return f"{abs(one.loss.mean - other.loss.mean):.4f}"


def _is_single(results: Iterable[ArmResult]) -> bool:
    """Whether some arm has no spread over seeds."""
    return any(_seeds(one.loss) < 2 for one in results)


def _seeds(spread: Spread) -> int:
    return len(spread.values)


def _named(arm: str) -> str:
    """An arm's name; in quotes where it would read like more of the sentence."""
    return f"“{arm}”" if " " in arm or "," in arm else arm


def _listed(arms: Sequence[str]) -> str:
    """Names with commas between them.

    >>> _listed(["a", "b"]), _listed("abcdefg")
    ('a and b', 'a, b, c, d and 3 more')
    """
    names = [_named(arm) for arm in arms]
    if len(names) > _NAMES:
        names = [*names[: _NAMES - 1], f"{len(names) - _NAMES + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
