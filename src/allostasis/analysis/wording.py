"""What the report says about a claim, line by line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from allostasis.analysis import summaries
from allostasis.analysis.aggregate import Arm, Sample, selected
from allostasis.analysis.claims import Claim, Select
from allostasis.analysis.confounds import confounds
from allostasis.analysis.families import units_of
from allostasis.analysis.text import bracket, counted, number
from allostasis.analysis.verdicts import CHANGED, Result

OF = {
    "mean": "mean over {units} of",
    "difference": "difference of means over {units} of",
    "paired_difference": "mean difference, paired by {unit}, of",
    "log_ratio": "geometric mean over {units} of",
    "proportion": "share of {units} with",
    "unanimous": "share of {units} (all needed) with",
    "median_time": "median over {units} of",
    "rmst": "restricted mean over {units} of",
    "kappa": "ratio of sums over {units} (kappa) of",
    "ratio_of_sums": "ratio of sums over {units} of",
    "log_ratio_of_sums": "logarithm of the ratio of sums over {units} of",
    "geometric_ratio": "geometric mean over layers of ratios of sums over {units} of",
    "hedges_g": "standardised difference over {units} (Hedges's g) of",
    "log_hazard_ratio": "log hazard ratio over {units} (Peto) of",
}
TESTS = {
    "t": "one-sided t tests",
    "tost": "two one-sided t tests (TOST)",
    "binomial": "exact binomial tests",
    "bootstrap": "the BCa bootstrap of the logarithm, inverted",
    "sign_flip": "exact tests by flipping signs",
    "permutation": "exact tests by permuting labels",
    "log_rank": "log-rank tests by relabelling, exact up to 10^6 labellings",
}
FIELLER = "the tests that Fieller inverts"
TESTS_OF = {
    "median_time": "sign tests of the median",
    "kappa": FIELLER,
    "ratio_of_sums": FIELLER,
    "log_ratio_of_sums": FIELLER,
    "hedges_g": "tests by the noncentral t",
}


@dataclass(frozen=True)
class Block:
    """What the report prints of one claim.

    Attributes:
        result: The result that it words.
        lines: Pairs of a label and a text.
        strip: The units' values, drawn in report.html; None where there are none.
    """

    result: Result
    lines: tuple[tuple[str, str], ...]
    strip: Strip | None


@dataclass(frozen=True)
class Strip:
    """Values of units on a line, with the bound.

    Attributes:
        points: Place in [0, 1], label, whether censored.
        bounds: Places of the bounds.
        unit: What has a point each.
    """

    points: tuple[tuple[float, str, bool], ...]
    bounds: tuple[float, ...]
    unit: str


def blocks(results: Sequence[Result], arms: Sequence[Arm]) -> list[Block]:
    """Word every result."""
    by_id = {result.claim.id: result for result in results}
    return [Block(r, tuple(_lines(r, by_id, arms)), _strip(r)) for r in results]


def _lines(
    result: Result, by_id: Mapping[str, Result], arms: Sequence[Arm]
) -> list[tuple[str, str]]:
    claim = result.claim
    lines = [("source", claim.source), ("status", claim.status)]
    lines += [] if claim.remark is None else [("remark", claim.remark)]
    if claim.all_of:
        parts = ", ".join(f"{a.claim.id} ({a.verdict.word})" for a in result.atoms)
        lines.append(("claimed", f"all of {parts}"))
    else:
        lines += [("claimed", claimed(claim)), ("definition", definition(claim))]
        lines += _measured(result)
    if claim.confounds:
        named = confounds(result, by_id.values(), arms)
        lines.append(("confounds", "; ".join(f"{c.name}: {c.told}" for c in named)))
    lines += _parametrisation(result)
    lines += _looks(result)
    lines += _beside(result, by_id)
    lines.append(("claim sha256", result.hash))
    if result.changed:
        lines.append((CHANGED, f"these runs froze another text of it: {', '.join(result.changed)}"))
    return lines


def claimed(claim: Claim) -> str:
    """The registered estimand, bound and test in a sentence."""
    assert claim.estimand is not None
    assert claim.arms is not None
    estimand = claim.estimand
    metric = "" if claim.select is None else _selected(claim.select)
    split = "" if estimand.split is None or claim.select is None else f" ({estimand.split})"
    arms = claim.arms.treatment
    if claim.arms.control is not None:
        arms += f" against {claim.arms.control}"
    bound = list(claim.bound) if isinstance(claim.bound, tuple) else [claim.bound]
    written = " to ".join(number(x) for x in bound)
    where = {"greater": "greater than", "less": "less than"}.get(
        claim.direction or "", claim.direction
    )
    settings = ", ".join(f"{key}={value}" for key, value in claim.settings.items())
    units = units_of(claim)
    of = OF[estimand.of].format(units=units, unit=estimand.unit)
    refuted = "" if claim.refuted_at is None else f", refuted beyond {number(claim.refuted_at)}"
    return (
        f"{of} {estimand.summary}{metric}{split} in {arms}: {where} {written}{refuted}"
        + (f", differences under {number(claim.negligible)} negligible" if claim.negligible else "")
        + f"; level {claim.alpha:g}, at least {claim.min_seeds} {units}"
        + (f"; at {settings}" if settings else "")
    )


def _selected(select: Select) -> str:
    """Which curve, or which intervention at which depth, a claim reads."""
    if select.metric is not None:
        return f" of {select.metric}"
    heads = {
        "all": "all chosen heads", "single": "each chosen head", "pair": "each pair of them",
        "random": "random sets of heads", "published": "the published heads",
        "suppressor": "the head of layer 0 with the largest effect on train",
        "named": "the named set", "named pair": "each pair of the named set",
        "restored": "the named set but for each of its heads",
        "writer": "the head that writes most against the target on train",
        "head": "each head", "layer": "each layer", "neuron": "each neuron",
        "window": "layers patched together", "early": "the first third of the layers",
        "middle": "the middle third of the layers", "late": "the last third of the layers",
    }  # fmt: skip
    patched = {"denoise": "denoising patch of", "noise": "noising patch of"}
    words = []
    if select.ablation is not None:
        words = [patched.get(select.ablation, f"{select.ablation} ablation of")]
    words += [heads[select.set]] if select.set is not None else []
    words += [select.intervention] if select.intervention is not None else []
    where = {None: "", "late": ", at every late depth"}.get(select.depth, f", depth {select.depth}")
    return f", {' '.join(words)}{where},"


def definition(claim: Claim) -> str:
    """What the claim's summary is, from its own docstring."""
    assert claim.estimand is not None
    text = inspect.getdoc(summaries.parse(claim.estimand.summary).function) or ""
    return " ".join(text.partition("\n\nReturns:")[0].split())


def _measured(result: Result) -> list[tuple[str, str]]:
    claim, inference, units = result.claim, result.inference, units_of(result.claim)
    assert claim.estimand is not None
    lines: list[tuple[str, str]] = []
    if inference is not None:
        measured = number(inference.estimate)
        for interval in (result.interval, result.inner if claim.direction == "inside" else None):
            if interval is not None:
                measured += f", {interval.level:.0%} {bracket(interval)} ({interval.method})"
        lines.append(("measured", measured))
    for role, sample in (("units", result.treatment), ("control", result.control)):
        if sample is not None:
            lines.append((role, _units(sample)))
    if inference is not None and result.p_support is not None:
        test = TESTS_OF.get(claim.estimand.of, TESTS[claim.test or "t"])
        if result.interval is not None and result.interval.method.startswith("BCa"):
            test = "the tests that the BCa bootstrap inverts"
        scale = "support as it is, against doubled" if claim.direction == "inside" else "doubled"
        lines.append((
            "test",
            f"{test}: p_support {result.p_support:.3g}, p_refute {result.p_refute:.3g}; "
            f"on alpha's scale ({scale}) and adjusted by Holm over the {result.family_size} of "
            f"family '{claim.family}': {result.q_support:.3g} and {result.q_refute:.3g}",
        ))
        if inference.effect is not None:
            g = inference.effect
            lines.append((
                "effect size",
                f"g = {number(g.g)} {bracket(g.interval)} ({g.interval.method}), "
                f"d = {number(g.d)}; distance from the bound in SD between {units}",
            ))
        lines += inference.beside.items()
        lines += _dwell(result)
        if result.seeds_needed is not None and inference.n < result.seeds_needed:
            lines.append((
                f"minimum {units}",
                f"{result.seeds_needed} {units} are the least that could support it; "
                f"there are {inference.n}",
            ))
        if result.seeds_for_power is not None:
            lines.append((
                f"{units} for 0.8 power",
                f"{result.seeds_for_power} at the registered effect and the observed spread",
            ))
    return lines


def _dwell(result: Result) -> list[tuple[str, str]]:
    """Whether curves whose `final` is above a bound may be called stable there."""
    claim, sample = result.claim, result.treatment
    is_final = claim.estimand is not None and claim.estimand.summary == "final"
    if not is_final or sample is None or claim.direction != "greater" or result.control is not None:
        return []
    curves = [selected(claim, run) for run in sample.arm.runs if run.seed in sample.units]
    kept = [summaries.stable(curve, str(claim.bound)) for curve in curves if curve is not None]
    told = f"above the bound for the last {summaries.DWELL} steps or more: {sum(kept):.0f} of "
    word = "stable" if all(kept) else "not to be called stable"
    return [("dwell", f"{told}{counted(len(kept), 'seeds')}; {word}")]


def _units(sample: Sample) -> str:
    if sample.unit == "cluster":
        return _clusters(sample)
    if sample.unit == "model":
        return _models(sample)
    n, censored = len(sample.units), int(sample.censored.sum())
    values = ", ".join(
        f"{seed}: {'> ' if late else ''}{number(value)}"
        for seed, value, late in zip(sample.units, sample.values, sample.censored, strict=True)
    )
    if sample.denominators is not None:
        pairs = zip(sample.units, sample.values, sample.denominators, strict=True)
        values = ", ".join(f"{seed}: {number(a)} / {number(b)}" for seed, a, b in pairs)
    text = f"{n} seeds of {sample.arm.name}, a unit is one seed (one model)"
    text += f"; {censored} censored" if censored else ""
    text += f"; by seed {values}" if values else ""
    reasons = [f"seed {seed}: {reason}" for seed, reason in sample.undefined.items()]
    reasons += list(sample.arm.left_out.values())
    return f"{text}; left out: {'; '.join(reasons)}" if reasons else text


def _models(sample: Sample) -> str:
    values = ", ".join(
        f"{model}: {number(float(value))}"
        for model, value in zip(sample.units, sample.values, strict=True)
    )
    text = f"{counted(len(sample.units), 'models')} in {sample.arm.condition}, a unit is one model "
    text += f"(name and revision), all its runs averaged; by model {values}"
    reasons = [f"{model}: {reason}" for model, reason in sample.undefined.items()]
    return f"{text}; left out: {'; '.join(reasons)}" if reasons else text


def _clusters(sample: Sample) -> str:
    run = sample.arm.runs[0]
    seeds = ", ".join(map(str, sample.arm.seeds))
    text = (
        f"{len(sample.units)} clusters of {sample.arm.name}, a unit is one cluster of prompts "
        f"(template and pair of names) of one model, {run.title}; "
        f"{sample.n_prompts} prompts of seeds {seeds}"
    )
    left_out = [f"{sample.n_left_out} prompts without a value"] if sample.n_left_out else []
    left_out += list(sample.arm.left_out.values())
    if sample.denominators is None:
        ends = [number(float(q)) for q in np.quantile(sample.values, (0, 0.25, 0.5, 0.75, 1))]
        text += f"; by cluster: least {ends[0]}, quartiles {', '.join(ends[1:4])}, most {ends[4]}"
    return f"{text}; left out: {'; '.join(left_out)}" if left_out else text


def doubts(result: Result, results: Sequence[Result], arms: Sequence[Arm]) -> list[str]:
    """What could still be wrong with a verdict: what is not excluded, in a few words each."""
    if result.claim.all_of:
        parts = [word for atom in result.atoms for word in doubts(atom, results, arms)]
        return list(dict.fromkeys(parts))
    open_ones = [c for c in confounds(result, results, arms) if not c.is_excluded]
    found = [f"{c.name}: {c.told}".removesuffix(": not excluded") for c in open_ones]
    found += [text for _, text in _parametrisation(result)]
    left_out = {} if result.treatment is None else result.treatment.undefined
    if left_out:
        found.append(f"{len(left_out)} {units_of(result.claim)} have no value")
    return found


def _parametrisation(result: Result) -> list[tuple[str, str]]:
    metric = None if result.claim.select is None else result.claim.select.metric
    if metric is None or result.treatment is None or not result.treatment.arm.runs:
        return []
    about = (result.treatment.arm.runs[0].run.get("metrics") or {}).get(
        metric.partition(".")[0], {}
    )
    if about.get("functional", True):
        return []
    text = f"{metric} depends on parametrisation: models that compute the same can differ in it"
    return [("parametrisation", text)]


def _looks(result: Result) -> list[tuple[str, str]]:
    """At how many units earlier reports judged a claim, and what that costs it."""
    if len(result.looks) < 2:
        return []
    told = f"judged at {', '.join(map(str, result.looks))} {units_of(result.claim)}: "
    if result.claim.lookup:
        return [("looks", f"{told}alpha is split over {len(result.looks)} looks")]
    return [("looks", f"{told}allowed only where the number was fixed before the first look, "
                      "since the claim has no `lookup: true`")]  # fmt: skip


def _beside(result: Result, by_id: Mapping[str, Result]) -> list[tuple[str, str]]:
    """The source's own number beside its corrected twin's, where a claim has one."""
    siblings = [r for r in by_id.values() if _stem(r.claim) == _stem(result.claim)]
    if result.claim.all_of or all(r.claim.status != "corrected" for r in siblings):
        return []
    words = [
        f"{r.claim.id} ({r.claim.status}) {number(r.inference.estimate)}, {r.verdict.word}"
        for r in siblings
        if r is not result and r.inference is not None
    ]
    return [("beside it", "; ".join(words))] if words else []


def _stem(claim: Claim) -> str:
    """What a claim shares with its twins: C2 of C2.c.scale, ioi.delta of ioi.delta.relative."""
    first, *rest = claim.id.split(".")
    return ".".join([first, *rest[:1]]) if first.islower() else first


def _strip(result: Result) -> Strip | None:
    sample, bound = result.treatment, result.claim.bound
    if sample is None or bound is None or not sample.units or sample.denominators is not None:
        return None
    bounds = bound if isinstance(bound, tuple) else (bound,)
    low, high = min(*sample.values, *bounds), max(*sample.values, *bounds)
    span = high - low or 1.0
    points = tuple(
        (float((value - low) / span), f"{sample.unit} {unit}: {number(value)}", bool(late))
        for unit, value, late in zip(sample.units, sample.values, sample.censored, strict=True)
    )
    return Strip(points, tuple(float((b - low) / span) for b in bounds), sample.unit)
