"""What the units of a claim say about it: an estimate, and p-values for and against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from allostasis.analysis import clusters, estimands
from allostasis.analysis import statistics as st
from allostasis.analysis.aggregate import Sample
from allostasis.analysis.claims import Claim
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.estimands import Inference, generator
from allostasis.analysis.text import bracket, number

OF_TIMES = ("median_time", "rmst", "log_hazard_ratio")  # which know what censored is
MIN_TEMPLATES = 8  # with fewer, a bootstrap of templates is not worth its name


@dataclass(frozen=True)
class Measurement:
    """An atom, measured.

    Attributes:
        treatment: The units that the estimate comes from.
        inference: The estimate.
        p_support: One-sided p of "on the wrong side of the bound".
        p_refute: One-sided p of "as claimed".
    """

    treatment: Sample
    inference: Inference
    p_support: float
    p_refute: float


def measure(
    claim: Claim, treatments: Mapping[str, Sample], control: Sample | None = None
) -> Measurement:
    """Estimate and test what an atom is about.

    A claim at several depths is an intersection: it is supported where it holds at each, so the
    weakest depth's p, the largest, decides and no correction is needed. A refutation, which any
    depth can bring, is corrected for their number.

    Args:
        claim: The atom.
        treatments: One sample, or one a depth, by name.
        control: Of the other arm.

    Raises:
        UndefinedError: The units do not define it; the message is the reason.
    """
    parts = {name: infer(claim, sample, control) for name, sample in treatments.items()}
    tested = {name: p_values(claim, inference) for name, inference in parts.items()}

    def strength(name: str) -> tuple[float, float]:  # p-values that are nearly 0 or 1 tie
        return -round(tested[name][0], 6), _margin(claim, parts[name])

    weakest = min(parts, key=strength) if len(parts) > 1 else next(iter(parts))
    inference = parts[weakest]
    if len(parts) > 1:
        every = "; ".join(f"{name} {number(part.estimate)}" for name, part in parts.items())
        beside = {"weakest": f"{weakest}, which decides", "at each": every}
        alone = next((part.untestable for part in parts.values() if part.untestable), "")
        noted = inference.noted
        inference = replace(inference, noted=lambda: beside | noted(), untestable=alone)
    return Measurement(
        treatments[weakest],
        inference,
        max(support for support, _ in tested.values()),
        min(1.0, len(parts) * min(refute for _, refute in tested.values())),
    )


def _margin(claim: Claim, inference: Inference) -> float:
    """How far an estimate lies on the claim's side of its bound; below 0: on the other side."""
    estimate = inference.estimate
    assert estimate is not None, f"{claim.id}: an estimate at several depths is never open-ended"
    match claim.direction, claim.bound:
        case "greater", float(bound):
            return estimate - bound
        case "less", float(bound):
            return bound - estimate
        case "inside", (low, high):
            return min(estimate - low, high - estimate)
        case _, (low, high):
            return max(low - estimate, estimate - high)
        case _:
            raise AssertionError(f"{claim.id}: the schema admits no such bound")


def p_values(claim: Claim, inference: Inference) -> tuple[float, float]:
    """One-sided p-values for and against a claim."""
    match claim.direction, claim.bound:
        case "greater", float(bound):
            return inference.above(bound), inference.below(_refuted_at(claim, bound))
        case "less", float(bound):
            return inference.below(bound), inference.above(_refuted_at(claim, bound))
        case "inside", (low, high):
            inside = max(inference.above(low), inference.below(high))
            return inside, min(inference.below(low), inference.above(high))
        case "outside", (low, high):
            inside = max(inference.above(low), inference.below(high))
            return min(inference.below(low), inference.above(high)), inside
        case _:
            raise AssertionError(f"{claim.id}: the schema admits no such bound")


def _refuted_at(claim: Claim, bound: float) -> float:
    return bound if claim.refuted_at is None else claim.refuted_at


def middle(claim: Claim) -> float:
    """The bound from which an effect size is told: the nearer end means nothing, so the middle."""
    assert claim.bound is not None
    return float(np.mean(claim.bound))


def infer(claim: Claim, treatment: Sample, control: Sample | None = None) -> Inference:
    """Estimate what an atom is about, at one depth where it has several.

    Raises:
        UndefinedError: The units do not define it; the message is the reason.
    """
    found = _infer(claim, treatment, control)
    if treatment.unit != "cluster" or found.untestable:
        return found
    return replace(found, noted=lambda: found.beside | _over_templates(claim, treatment))


def _infer(claim: Claim, treatment: Sample, control: Sample | None) -> Inference:
    assert claim.estimand is not None
    values, below, rng = treatment.values, treatment.denominators, generator(claim.id)
    flips = claim.test == "sign_flip"
    if not len(values):
        reasons = "; ".join(f"seed {s}: {r}" for s, r in treatment.undefined.items())
        raise UndefinedError(reasons or "no finished run")
    sides = [treatment] if control is None else [treatment, control]
    late = sum(int(side.censored.sum()) for side in sides)
    if late and claim.estimand.of not in OF_TIMES:  # the end of a run is no time of an event
        allowed = ", ".join(OF_TIMES)
        raise UndefinedError(f"{late} times are censored, which of: {claim.estimand.of} cannot "
                             f"take; these can: {allowed}")  # fmt: skip
    match claim.estimand.of:
        case "proportion" | "unanimous" as share:
            return estimands.proportion(values, unanimous=share == "unanimous")
        case "median_time":
            return estimands.median_time(values, treatment.censored)
        case "rmst":
            times, relabel = (values, treatment.censored), claim.test == "permutation"
            others = None if control is None else (control.values, control.censored)
            return estimands.rmst(times, middle(claim), rng, control=others, relabel=relabel)
        case "log_hazard_ratio":
            assert control is not None
            return estimands.log_hazard_ratio(
                (values, treatment.censored), (control.values, control.censored), rng
            )
        case "kappa":
            assert below is not None
            if control is not None:  # levels of two arms: their changes from control to treatment
                assert control.denominators is not None
                values, below = control.values - values, below - control.denominators
            return estimands.kappa(values, below, rng)
        case "ratio_of_sums":
            assert below is not None
            return estimands.ratio_of_sums(values, below, rng)
        case "log_ratio_of_sums":
            assert below is not None
            return estimands.log_ratio_of_sums(values, below, rng)
        case "log_ratio":
            others = control.values if control is not None else np.ones_like(values)
            return estimands.log_ratio(values / others, middle(claim), rng, flips=flips)
        case "paired_difference":
            assert control is not None
            return estimands.mean(values - control.values, middle(claim), rng, flips=flips)
        case "difference":
            assert control is not None
            relabel = claim.test == "permutation"
            return estimands.difference(values, control.values, rng, relabel=relabel)
        case "geometric_ratio":
            assert below is not None
            return estimands.geometric_ratio(values, below, rng)
        case "hedges_g":
            assert control is not None
            return estimands.standardised_difference(values, control.values)
        case "mean":
            return estimands.mean(values, middle(claim), rng, counts=treatment.counts, flips=flips)


def _over_templates(claim: Claim, sample: Sample) -> dict[str, str]:
    """The interval if templates, too, were a sample: printed beside, deciding nothing."""
    assert claim.estimand is not None
    groups = clusters.templates(sample.units)
    count = len(np.unique(groups))
    if count < MIN_TEMPLATES:
        return {}
    below = np.ones_like(sample.values) if sample.denominators is None else sample.denominators
    nested = st.nested_interval(sample.values, below, groups, generator(claim.id))
    if claim.estimand.of == "log_ratio_of_sums":
        nested = estimands.logarithm(nested)
    return {
        f"{count} templates resampled too": f"{nested.level:.0%} {bracket(nested)} "
        f"({nested.method}); decides nothing"
    }
