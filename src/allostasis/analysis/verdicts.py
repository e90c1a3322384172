"""From estimates to verdicts: supported, refuted, equivalent or undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from allostasis.analysis import clusters, pretrained
from allostasis.analysis import statistics as st
from allostasis.analysis.aggregate import (
    Arm,
    Sample,
    check_distinct,
    check_widths,
    equal_weights,
    one_a_condition,
    pair,
    shown,
    summarise,
)
from allostasis.analysis.claim_files import freeze
from allostasis.analysis.claims import Claim, across_models, by_construction
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.estimands import Inference
from allostasis.analysis.families import adjusted, family_sizes, seeds_needed, units_of
from allostasis.analysis.intervals import Interval
from allostasis.analysis.measures import measure
from allostasis.analysis.text import leveled

Word = Literal["supported", "refuted", "equivalent", "undecided", "supported (vacuous)"]
CHANGED = "CHANGED AFTER RUN"
UNLIKE = "not run at the registered settings"
POSITIVE = ("supported", "equivalent")
VACUOUS = "supported (vacuous)"
UNPAIRED = ("difference", "hedges_g", "log_hazard_ratio", "rmst")
"""Estimands of two arms whose seeds are not matched."""


@dataclass(frozen=True)
class Verdict:
    """A verdict and, in a line, why.

    Attributes:
        word: The verdict.
        reason: What decided it, or what is missing for one.
    """

    word: Word
    reason: str


@dataclass(frozen=True)
class Result:
    """All that a report says about one claim.

    `q` are p-values on the scale of the claim's alpha, twice a one-sided p or TOST's own, adjusted.

    Attributes:
        claim: The claim.
        hash: sha256 of the claim as it stands now.
        verdict: The verdict.
        treatment: One number a unit; None where nothing could be read.
        control: The same of the control arm.
        inference: The estimate; None where it is undefined.
        interval: At 1 - alpha.
        inner: At 1 - 2 alpha, for claims of equality and of negligible effects.
        p_support: One-sided p of "on the wrong side of the bound"; None where nothing is tested.
        p_refute: One-sided p of "as claimed".
        q_support: `p_support` on alpha's scale, adjusted by Holm in the family.
        q_refute: `p_refute`, likewise.
        family_size: Members of the family: compounds and atoms that belong to none.
        seeds_needed: Least units with which the test can decide; None for a compound.
        seeds_for_power: Units for 0.8 power at the registered effect; None: no such effect.
        changed: Runs that froze this claim otherwise, or not at all.
        looks: Numbers of units at which reports judged it, this one last.
        unlike: Registered settings that the runs do not have; then nothing can be decided.
        atoms: Results of a compound's atoms.
    """

    claim: Claim
    hash: str
    verdict: Verdict
    treatment: Sample | None = None
    control: Sample | None = None
    inference: Inference | None = None
    interval: Interval | None = None
    inner: Interval | None = None
    p_support: float | None = None
    p_refute: float | None = None
    q_support: float | None = None
    q_refute: float | None = None
    family_size: int = 1
    seeds_needed: int | None = None
    seeds_for_power: int | None = None
    changed: tuple[str, ...] = ()
    looks: tuple[int, ...] = ()
    unlike: str = ""
    atoms: tuple[Result, ...] = field(default=())

    @property
    def runs(self) -> tuple[str, ...]:
        """Runs whose rows the numbers come from."""
        samples = [sample for sample in (self.treatment, self.control) if sample is not None]
        return tuple(run for sample in samples for run in sample.run_ids)


def rule(
    claim: Claim,
    *,
    q_support: float,
    q_refute: float,
    interval: Interval | None,
    inner: Interval | None,
) -> Verdict:
    """The verdict on an atom whose preconditions are met.

    Args:
        claim: The atom.
        q_support: Level of the test that supports it, on alpha's scale, adjusted.
        q_refute: Level of the test that refutes it.
        interval: At 1 - alpha, for the reason.
        inner: At 1 - 2 alpha, for `negligible`.
    """
    shown = "" if interval is None else f"; {leveled(interval)}"
    if q_support < claim.alpha:
        word: Word = "equivalent" if claim.test == "tost" else "supported"
        return Verdict(word, f"adjusted p {q_support:.2g} for it < {claim.alpha:g}{shown}")
    if q_refute < claim.alpha:
        return Verdict("refuted", f"adjusted p {q_refute:.2g} against it < {claim.alpha:g}{shown}")
    if claim.negligible is not None and inner is not None and isinstance(claim.bound, float):
        low, high = claim.bound - claim.negligible, claim.bound + claim.negligible
        if inner.within(low, high):
            reason = f"{leveled(inner)} is within {claim.negligible:g} of the bound: negligible"
            return Verdict("equivalent", reason)
    both = f"adjusted p {q_support:.2g} for it and {q_refute:.2g} against it"
    return Verdict("undecided", f"{both}, neither < {claim.alpha:g}{shown}")


def judge(
    claims: Sequence[Claim], arms: Sequence[Arm], looks: Mapping[str, Sequence[int]] | None = None
) -> list[Result]:
    """Judge an experiment's claims on its arms.

    Args:
        claims: In file order: atoms and preconditions stand before those that name them.
        arms: Of one experiment.
        looks: Numbers of units at which earlier reports judged a claim, by its id.

    Returns:
        One result a claim, in order.

    Raises:
        IdenticalArmsError: Two conditions are one.
    """
    for left, right in combinations(one_a_condition(arms), 2):
        check_distinct(left, right)
    hashes = freeze(list(claims))["hashes"]
    measured = {
        c.id: _measure(c, arms, hashes[c.id], (looks or {}).get(c.id, ()))
        for c in claims
        if not c.all_of
    }
    # of several models, those that do not do the task are left out one by one
    gate = "" if across_models(claims) else _gate(arms)
    return decide(claims, measured, hashes, gate=gate)


def decide(
    claims: Sequence[Claim],
    measured: Mapping[str, Result],
    hashes: Mapping[str, str],
    *,
    gate: str = "",
) -> list[Result]:
    """From measured atoms to verdicts: families, the rule, preconditions, compounds.

    Args:
        claims: In file order: atoms and preconditions stand before those that name them.
        measured: Every atom's estimate and p-values, by id; its verdict is the reason where it has
            none.
        hashes: sha256 of each claim, by id.
        gate: Why nothing may be decided; empty where nothing says it.

    Returns:
        One result a claim, in order.
    """
    q_support = adjusted(claims, {k: _q(r, "p_support") for k, r in measured.items()}, max)
    q_refute = adjusted(claims, {k: _q(r, "p_refute") for k, r in measured.items()}, min)
    sizes = family_sizes(claims)
    results: dict[str, Result] = {}
    for claim in claims:
        if claim.all_of:
            atoms = tuple(results[name] for name in claim.all_of)
            joined = agreement(atoms) if claim.agree else conjunction(atoms)
            result = Result(claim, hashes[claim.id], joined, atoms=atoms)
            result = replace(result, changed=_changed(claim, hashes[claim.id], _arms_of(atoms)))
        else:
            result = replace(
                measured[claim.id],
                q_support=q_support.get(claim.id),
                q_refute=q_refute.get(claim.id),
                seeds_needed=seeds_needed(measured[claim.id].claim, sizes[claim.family]),
            )
            result = replace(result, verdict=_decide(result))
        result = replace(result, family_size=sizes[claim.family])
        known = _known(result)
        if known is not None:
            results[claim.id] = replace(result, verdict=known)
            continue
        if result.verdict.word == "undecided" and result.inference is not None:
            result = replace(result, seeds_for_power=_seeds_for_power(result))
        result = _conditional(result, results)
        result = replace(result, verdict=Verdict("undecided", gate)) if gate else result
        results[claim.id] = _scoped(result)
    return list(results.values())


def _known(result: Result) -> Verdict | None:
    """What is proved of a claim, where its runs have the settings that the proof takes."""
    known, proved = by_construction(result.claim), result.claim.proved
    if known is None or proved is None:
        return None
    if result.treatment is not None and not result.treatment.arm.has(proved.settings):
        return None
    return Verdict(*known)


def _gate(arms: Sequence[Arm]) -> str:
    """Why nothing may be decided, with the seeds that say so; empty where nothing says it."""
    refused = [run for arm in arms for run in arm.runs if run.gate]
    if not refused:
        return ""
    seeds = ", ".join(map(str, sorted({run.seed for run in refused})))
    return f"{refused[0].gate} (seeds: {seeds})"


def _scoped(result: Result) -> Result:
    """Say of a verdict from prompts that it is about one model on one task."""
    sample = _sample_of_prompts(result)
    if sample is None:
        return result
    run = sample.arm.runs[0]
    reason = f"{result.verdict.reason}; for {run.title} on {run.task} only"
    return replace(result, verdict=replace(result.verdict, reason=reason))


def _sample_of_prompts(result: Result) -> Sample | None:
    """The clusters that a result, or an atom of it, was measured on; None where there are none."""
    if result.inference is not None and result.treatment is not None:
        return result.treatment if result.treatment.unit == "cluster" else None
    found = (_sample_of_prompts(atom) for atom in result.atoms)
    return next((sample for sample in found if sample is not None), None)


def _measure(claim: Claim, arms: Sequence[Arm], digest: str, earlier: Sequence[int] = ()) -> Result:
    """Estimate and test an atom; where it is undefined, the verdict says why."""
    assert claim.arms is not None
    result = Result(claim, digest, Verdict("undecided", ""))
    unlike = ""
    try:
        if claim.estimand is not None and claim.estimand.unit == "model":
            treatment, control, used = pretrained.samples(claim, arms)
            treatments = {"": treatment}
        else:
            arm, unlike = shown(arms, claim.arms.treatment, claim.settings)
            other, control, used = None, None, [arm]
            if claim.arms.control is not None:
                same_device = [other for other in arms if other.device == arm.device]
                other, also_unlike = shown(same_device, claim.arms.control, claim.settings)
                check_widths(claim, arm, other)
                if other is not arm and (text := equal_weights(arm, other)):
                    raise UndefinedError(text)
                unlike = unlike or also_unlike
                used.append(other)
            treatments = _units(claim, arm, arms, other)
            if other is not None:
                control = summarise(claim, other, beside=arm)
                if claim.estimand is not None and claim.estimand.of not in UNPAIRED:
                    treatment, control = pair(treatments[""], control)
                    treatments = {"": treatment}
        changed = _changed(claim, digest, used)
        first = next(iter(treatments.values()))
        result = replace(result, treatment=first, control=control, changed=changed, unlike=unlike)
        for side in used:
            if any(run.is_inert for run in side.runs):
                raise UndefinedError(
                    f"inert: the intervention of {side.name} is undone where it stands, so that "
                    "nothing about it can be told"
                )
            if _reads_accuracy(claim) and any(run.is_argmax_inert for run in side.runs):
                raise UndefinedError(
                    f"argmax_inert: no scale can change a prediction where the intervention of "
                    f"{side.name} stands, so that accuracy tells nothing about it; cross-entropy "
                    "and what training makes of it do"
                )
            if first.unit == "seed" and side.is_inert():
                raise UndefinedError(
                    f"seeds_inert: all {len(side.runs)} seeds of {side.name} gave the same "
                    "readings, so they count as one"
                )
        measured = measure(claim, treatments, control)
    except UndefinedError as error:
        reason = f"{UNLIKE}: {unlike}" if unlike else str(error)
        return replace(result, verdict=Verdict("undecided", reason))
    inference = measured.inference
    looks = (*(n for n in dict.fromkeys(earlier) if n != inference.n), inference.n)
    if claim.lookup:
        claim = claim.model_copy(update={"alpha": claim.alpha / len(looks)})
    is_tested = not unlike and not inference.untestable
    return replace(
        result,
        claim=claim,
        looks=looks,
        treatment=measured.treatment,
        inference=inference,
        interval=_interval(inference, 1 - claim.alpha),
        inner=_interval(inference, 1 - 2 * claim.alpha),
        p_support=measured.p_support if is_tested else None,
        p_refute=measured.p_refute if is_tested else None,
    )


def _reads_accuracy(claim: Claim) -> bool:
    metric = None if claim.select is None else claim.select.metric
    return metric is not None and metric.partition(".")[0] == "accuracy"


def _units(claim: Claim, arm: Arm, arms: Sequence[Arm], beside: Arm | None) -> dict[str, Sample]:
    """What a claim's units are reduced to: one sample, or one a depth, by name."""
    assert claim.estimand is not None
    if claim.estimand.unit == "cluster":
        return clusters.samples(claim, arm)
    cells = [a for a in arms if (a.condition, a.device) == (arm.condition, arm.device)]
    return {"": summarise(claim, arm, cells, beside)}


def _interval(inference: Inference, level: float) -> Interval | None:
    try:
        return inference.interval(level)
    except UndefinedError:
        return None


def _q(result: Result, which: Literal["p_support", "p_refute"]) -> float:
    """A p-value on alpha's scale; 1 where there is none, so that a family keeps its size."""
    p = getattr(result, which)
    if p is None:
        return 1.0
    both_sides_shown = result.claim.direction == "inside" and which == "p_support"
    return p if both_sides_shown else min(1.0, 2 * p)


def _decide(result: Result) -> Verdict:
    """Preconditions of an atom's own, then the rule."""
    claim, inference = result.claim, result.inference
    if inference is None:
        return result.verdict
    assert result.seeds_needed is not None
    assert result.q_support is not None
    assert result.q_refute is not None
    if result.unlike:
        return Verdict("undecided", f"{UNLIKE}: {result.unlike}")
    if inference.n < claim.min_seeds:
        return Verdict("undecided", f"{inference.n} of {claim.min_seeds} {units_of(claim)}")
    if inference.untestable:
        return Verdict("undecided", inference.untestable)
    verdict = rule(
        claim,
        q_support=result.q_support,
        q_refute=result.q_refute,
        interval=result.interval,
        inner=result.inner,
    )
    if verdict.word == "undecided" and inference.n < result.seeds_needed:
        reason = f"{inference.n} {units_of(claim)} cannot reach the level in its family"
        return Verdict("undecided", f"{reason}, {result.seeds_needed} can")
    return verdict


def _conditional(result: Result, earlier: Mapping[str, Result]) -> Result:
    """Withhold a verdict whose precondition is not supported or whose claim changed."""
    if result.changed and result.verdict.word != "undecided":
        reason = f"{CHANGED}: exploratory ({result.verdict.word} as it stands now)"
        return replace(result, verdict=Verdict("undecided", reason))
    unmet = [n for n in result.claim.requires if earlier[n].verdict.word not in POSITIVE]
    if unmet and result.verdict.word != "undecided":
        reason = "; ".join(f"requires {n}, which is {earlier[n].verdict.word}" for n in unmet)
        reason = f"{reason} (on its own: {result.verdict.word})"
        return replace(result, verdict=Verdict("undecided", reason))
    return result


def conjunction(atoms: Sequence[Result]) -> Verdict:
    """Supported where all atoms are, refuted where any is, else undecided.

    Vacuous atoms count as nothing; where all are, so is the compound.
    """
    words = {a.claim.id: a.verdict.word for a in atoms if a.verdict.word != VACUOUS}
    if not words:
        return Verdict(VACUOUS, f"all of {', '.join(atom.claim.id for atom in atoms)}")
    against = [name for name, word in words.items() if word == "refuted"]
    open_ones = [name for name, word in words.items() if word == "undecided"]
    if against:
        return Verdict("refuted", f"refuted: {', '.join(against)}")
    if open_ones:
        return Verdict("undecided", f"not decided: {', '.join(open_ones)}")
    return Verdict("supported", f"all of {', '.join(words)}")


def agreement(atoms: Sequence[Result]) -> Verdict:
    """The word that all atoms have; undecided where they differ or are undecided themselves."""
    words = {atom.claim.id: atom.verdict.word for atom in atoms}
    first = atoms[0].verdict.word
    if all(word == first for word in words.values()):
        verb = "not decided" if first == "undecided" else "all of"
        return Verdict(first, f"{verb}: {', '.join(words)}")
    told = ", ".join(f"{name} {word}" for name, word in words.items())
    return Verdict("undecided", f"they do not agree: {told}")


def _changed(claim: Claim, digest: str, arms: Sequence[Arm]) -> tuple[str, ...]:
    runs = [run for arm in arms for run in arm.runs]
    return tuple(r.run_id for r in runs if (r.run.get("claims") or {}).get(claim.id) != digest)


def _arms_of(results: Sequence[Result]) -> list[Arm]:
    samples = [s for r in results for s in (r.treatment, r.control) if s is not None]
    nested = [arm for result in results for arm in _arms_of(result.atoms)]
    return [sample.arm for sample in samples] + nested


def _seeds_for_power(result: Result) -> int | None:
    """Units for 0.8 power at the registered effect and the observed spread, in the whole family.

    The registered effect is `negligible` beyond the bound, or the middle of the bounds; without
    either there is none. Shares and medians have no spread to plan with. The level is that of
    Holm's first step, at which a claim is decided whatever its family does.
    """
    claim, inference = result.claim, result.inference
    if inference is None or not inference.sd or claim.estimand is None or claim.bound is None:
        return None
    scale = math.log if claim.estimand.of == "log_ratio" else float
    planned: dict[str, Any] = {
        "sd": inference.sd,
        "alpha": claim.alpha / result.family_size,
        "arms": 2 if claim.estimand.of in {"difference", "rmst"} and result.control else 1,
    }
    if isinstance(claim.bound, tuple):
        low, high = map(scale, claim.bound)
        inside = claim.direction == "inside"
        return st.seeds_for_power(0.0, half_width=(high - low) / 2, **planned) if inside else None
    if claim.negligible is None:
        return None
    beyond = claim.bound + claim.negligible * (1 if claim.direction == "greater" else -1)
    return st.seeds_for_power(abs(scale(beyond) - scale(claim.bound)), **planned)
