"""From one number a unit to an estimate, its interval and one-sided tests against any bound."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from allostasis.analysis import statistics as st
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.intervals import Interval
from allostasis.analysis.suppressors import GeometricRatio, exponential
from allostasis.analysis.text import bracket, number

BOOTSTRAP_FROM = 50  # units: below, BCa covers less than t
RATIO_BOOTSTRAP_FROM = 100
FLIPS_DRAWN_FROM = 20  # units: 2 ** 20 sign flips are more than are enumerated
LEAST_FOR_BCA = 3
LEAST_FOR_IQM = 4

Times = tuple[np.ndarray, np.ndarray]
"""Times, and whether each is censored."""


@dataclass(frozen=True)
class Inference:
    """What the units say about an estimand.

    Attributes:
        estimate: None where a median was not reached.
        n: Units.
        interval: Interval at a level.
        above: One-sided p of "at most the bound".
        below: One-sided p of "at least the bound".
        standardised: Makes `effect`, which is worth computing where it is printed only.
        sd: Standard deviation between units, on the scale of the test; pooled over two arms.
        noted: Makes `beside`, likewise.
        untestable: Why there is neither interval nor test, where there is none.
    """

    estimate: float | None
    n: int
    interval: Callable[[float], Interval]
    above: Callable[[float], float]
    below: Callable[[float], float]
    standardised: Callable[[], st.Effect | None] = lambda: None
    sd: float | None = None
    noted: Callable[[], dict[str, str]] = dict
    untestable: str = ""

    @cached_property
    def effect(self) -> st.Effect | None:
        """Standardised distance from the bound, where units have a spread."""
        return self.standardised()

    @cached_property
    def beside(self) -> dict[str, str]:
        """What is printed beside it and decides nothing, by name."""
        return self.noted()


def generator(claim_id: str) -> np.random.Generator:
    """A claim's own stream of randomness, so that a report is the same when it is made again."""
    digest = hashlib.sha256(f"{claim_id}:bootstrap".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def mean(
    values: np.ndarray,
    bound: float,
    rng: np.random.Generator,
    *,
    counts: np.ndarray | None = None,
    flips: bool = False,
) -> Inference:
    """Mean over units: t below 50 of them, BCa from there.

    Error rates at a nominal 5 %, 4,000 data sets: t 4.7 % at 8 normal units, 5.3 % at 3, TOST at a
    bound 5.3 %, BCa at 60 units 6.1 %. The t interval of 5 units covers 95.5 %.

    Args:
        values: One a unit.
        bound: From which the effect size is told.
        rng: Where randomness comes from.
        counts: Of shares: how many trials each is of. Where all units are equal, so that they have
            no spread, the outermost limits of their own binomial intervals stand for the interval.
        flips: Test by flipping signs, whatever the number of units.
    """
    if alone := _untestable(values.mean(), values):
        if counts is None or len(values) == 1:
            return alone
        return _equal_shares(values, counts)
    n = len(values)
    sd, estimate = float(values.std(ddof=1)), float(values.mean())
    own = rng.spawn(1)[0]  # so that what is printed beside moves no draw of the verdict's

    def standardised() -> st.Effect | None:
        return st.one_sample_effect(values, bound) if n > 2 else None

    if flips:
        test = st.flipped_signs(values, rng)
        return Inference(
            estimate, n, test.interval, test.above, test.below, standardised, sd,
            lambda: {"t interval": _interval(st.t_interval(values))} | _middle(values, own),
        )  # fmt: skip
    # with many units the flips are drawn, before the bootstrap; with few they are enumerated
    drawn = f"{st.sign_flip(values, bound, rng):.3g}" if n >= FLIPS_DRAWN_FROM else ""

    def noted() -> dict[str, str]:
        flipped = drawn or f"{st.sign_flip(values, bound, own):.3g}"
        other = (
            _bca_beside((values,), np.mean, own)
            if n < BOOTSTRAP_FROM
            else {"t interval": _interval(st.t_interval(values))}
        )
        return {"sign-flip p (two-sided)": flipped} | other | _middle(values, own)

    if n < BOOTSTRAP_FROM:
        return Inference(
            estimate, n, lambda level: st.t_interval(values, level=level),
            lambda b: st.t_above(values, b), lambda b: st.t_above(-values, -b),
            standardised, sd, noted,
        )  # fmt: skip
    boot = st.Bootstrap((values,), np.mean, rng)
    return Inference(
        estimate, n, boot.interval, boot.p_above, lambda b: 1 - boot.p_above(b),
        standardised, sd, noted,
    )  # fmt: skip


def _interval(interval: Interval) -> str:
    return f"{interval.level:.0%} {bracket(interval)}"


def _bca_beside(
    columns: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], rng: np.random.Generator
) -> dict[str, str]:
    """The BCa interval that is printed beside a t or Fieller interval; it covers less."""
    if len(columns[0]) < LEAST_FOR_BCA or any(np.ptp(np.sign(c)) > 0 for c in columns[1:]):
        return {}
    return {"BCa interval": _interval(st.Bootstrap(columns, statistic, rng).interval())}


def _middle(values: np.ndarray, rng: np.random.Generator) -> dict[str, str]:
    """The interquartile mean with its interval, where a quarter is at least one unit."""
    if len(values) < LEAST_FOR_IQM:
        return {}
    interval = st.iqm_interval(values[:, None], rng)
    return {
        "interquartile mean": f"{number(st.iqm(values))}, {_interval(interval)} "
        f"({interval.method}); decides nothing"
    }


def _equal_shares(values: np.ndarray, counts: np.ndarray) -> Inference:
    """Units that all have one share: each unit's own binomial test, the least favourable counts."""
    hits = [(round(float(v * n)), int(n)) for v, n in zip(values, counts, strict=True)]

    def interval(level: float) -> Interval:
        each = [st.clopper_pearson(k, n, level=level) for k, n in hits]
        lows, highs = ([i.low for i in each], [i.high for i in each])
        low, high = min(x for x in lows if x is not None), max(x for x in highs if x is not None)
        return Interval(low, high, level, "binomial, outermost limits of the units' own")

    return Inference(
        float(values.mean()), len(values), interval,
        lambda b: max(st.binomial_above(k, n, b) for k, n in hits),
        lambda b: max(st.binomial_above(n - k, n, 1 - b) for k, n in hits),
        noted=lambda: {"interval": "binomial: all units are equal, so their spread is 0"},
    )  # fmt: skip


def log_ratio(
    ratios: np.ndarray, bound: float, rng: np.random.Generator, *, flips: bool = False
) -> Inference:
    """Geometric mean of positive ratios: `mean` of their logarithms, printed as a ratio."""
    if (ratios <= 0).any():
        raise UndefinedError(f"logarithm of {ratios.min():.3g}, which is not positive")
    logs = mean(np.log(ratios), float(np.log(bound)), rng, flips=flips)
    assert logs.estimate is not None

    def interval(level: float) -> Interval:
        on_logs = logs.interval(level)
        ends = (None if end is None else float(np.exp(end)) for end in (on_logs.low, on_logs.high))
        return Interval(*ends, level=level, method=f"{on_logs.method} on logarithms")

    return Inference(
        float(np.exp(logs.estimate)), logs.n, interval,
        lambda b: logs.above(float(np.log(b))), lambda b: logs.below(float(np.log(b))),
        logs.standardised, logs.sd, logs.noted, logs.untestable,
    )  # fmt: skip


def difference(
    left: np.ndarray, right: np.ndarray, rng: np.random.Generator, *, relabel: bool = False
) -> Inference:
    """Difference of the means of two unpaired arms by Welch's t, or by relabelling.

    Error rate at a nominal 5 %, 6 against 9 normal units with twice the spread, 4,000 data sets:
    5.1 % by Welch's t.

    Args:
        left: One a unit.
        right: Of the other arm.
        rng: Where randomness comes from.
        relabel: Test by permuting the units' labels instead.
    """
    spread = np.concatenate([left - left.mean(), right - right.mean()])
    if min(len(left), len(right)) == 1:
        spread = spread[:1]
    if alone := _untestable(left.mean() - right.mean(), spread):
        return alone
    estimate, n = float(left.mean() - right.mean()), min(len(left), len(right))
    sd = float(np.sqrt((spread**2).sum() / (len(spread) - 2)))
    if relabel:
        test = st.permuted_labels(left, right, rng)
        return Inference(
            estimate, n, test.interval, test.above, test.below,
            lambda: st.hedges_g(left, right), sd,
            lambda: {"Welch interval": _interval(st.welch_interval(left, right))},
        )  # fmt: skip
    return Inference(
        estimate, n,
        lambda level: st.welch_interval(left, right, level=level),
        lambda b: st.welch_above(left, right, b), lambda b: st.welch_above(right, left, -b),
        lambda: st.hedges_g(left, right), sd,
        lambda: {"permutation p of 0 (two-sided)": f"{st.permutation(left, right, rng):.3g}"},
    )  # fmt: skip


def standardised_difference(left: np.ndarray, right: np.ndarray) -> Inference:
    """Hedges's g of two arms, tested and bounded by the noncentral t; Cohen's d beside it.

    Error rate at a nominal 5 %, 8 units an arm that differ by 2 standard deviations, 4,000 data
    sets: 5.6 %; the interval of 6 an arm covers 95.7 %.

    Raises:
        UndefinedError: There are too few units, or all are equal.
    """
    found = st.hedges_g(left, right)
    n, m = len(left), len(right)
    df, se = n + m - 2, float(np.sqrt(1 / n + 1 / m))
    t, per_g = found.d / se, 1 / (st.unbiasing(df) * se)
    return Inference(
        found.g, min(n, m),
        lambda level: st.hedges_g(left, right, level=level).interval,
        lambda b: st.noncentral_above(t, df, b * per_g),
        lambda b: 1 - st.noncentral_above(t, df, b * per_g),
        lambda: found, noted=lambda: {"Cohen's d": number(found.d)},
    )  # fmt: skip


def proportion(hits: np.ndarray, *, unanimous: bool = False) -> Inference:
    """Share of units with a 1: exact binomial; `unanimous` supports nothing unless all have it.

    Error rate at a nominal 5 %, 20 units and a share of a half, 4,000 data sets: 3.9 % (attainable:
    4.1 %).
    """
    count, n = int(hits.sum()), len(hits)

    def above(bound: float) -> float:
        return 1.0 if unanimous and count < n else st.binomial_above(count, n, bound)

    return Inference(
        count / n, n, lambda level: st.clopper_pearson(count, n, level=level),
        above, lambda b: st.binomial_above(n - count, n, 1 - b),
    )  # fmt: skip


def median_time(times: np.ndarray, censored: np.ndarray) -> Inference:
    """Median time to an event: Kaplan-Meier's, tested by signs; its Greenwood interval beside."""
    curve = st.kaplan_meier(times, censored)
    greenwood = curve.median_interval()
    return Inference(
        curve.median, len(times),
        lambda level: st.median_interval(times, censored, level=level),
        lambda b: st.median_above(times, b), lambda b: st.median_below(times, censored, b),
        noted=lambda: {
            f"{greenwood.method} interval": f"95 %, of the median: {bracket(greenwood)}"
        },
    )  # fmt: skip


def rmst(
    arm: Times,
    bound: float,
    rng: np.random.Generator,
    *,
    control: Times | None = None,
    relabel: bool = False,
) -> Inference:
    """Restricted mean time to an event, up to the common end T, or its difference of two arms.

    The integral of the survival from 0 to T. No run ends without the event before T, so that it is
    the mean over runs of the lesser of time and T, and is tested as a mean is: by t below 50 runs,
    by Welch's t or by relabelling where there are two arms. The Greenwood interval, and that of a
    difference by a bootstrap over seeds, stand beside: of 8 runs they cover 91 % and 90 %, t 94 %.

    Error rates at a nominal 5 %, 8 exponential times an arm, a fifth of them censored, 4,000 data
    sets: t 5.8 %, Welch's t 5.1 %, relabelling 5.0 %.

    Args:
        arm: Times and whether each is censored.
        bound: From which the effect size is told.
        rng: Where randomness comes from.
        control: Of the other arm.
        relabel: Test by permuting the runs' labels.

    Raises:
        UndefinedError: No run reached the event.
    """
    arms = [arm] if control is None else [arm, control]
    if all(censored.all() for _, censored in arms):
        raise UndefinedError("no run reached the event")
    until = st.common_end(*arms)
    own = rng.spawn(1)[0]
    values, *others = (np.minimum(times, until) for times, _ in arms)
    if others:
        found = difference(values, others[0], rng, relabel=relabel)
        more = partial(_resampled_difference, values, others[0], own)
    else:
        found = mean(values, bound, rng)
        more = partial(_greenwood, arm, until)

    def noted() -> dict[str, str]:
        return {"restricted to": number(until)} | more() | found.beside

    return replace(found, noted=noted)


def _greenwood(arm: Times, until: float) -> dict[str, str]:
    try:
        interval = st.kaplan_meier(*arm).restricted_interval(until)
    except UndefinedError as undefined:
        return {"log-log Greenwood interval": str(undefined)}
    return {f"{interval.method} interval": f"{_interval(interval)}; decides nothing"}


def _resampled_difference(
    left: np.ndarray, right: np.ndarray, rng: np.random.Generator
) -> dict[str, str]:
    try:
        interval = st.resampled_difference(left, right, rng)
    except UndefinedError as undefined:
        return {"bootstrap over seeds": str(undefined)}
    return {"bootstrap over seeds": f"{_interval(interval)}; decides nothing"}


def log_hazard_ratio(left: Times, right: Times, rng: np.random.Generator) -> Inference:
    """Log hazard ratio of two arms by Peto's estimate; against 0 its test is the log-rank test.

    By relabelling (`relabelling.permuted_times`, with its error rate); the chi-square that is
    printed beside is eager with few units: at a nominal 5 %, 8 an arm, a fifth of them censored,
    6.6 % of 4,000 data sets without a difference were decided by it.

    Raises:
        UndefinedError: No run of either arm reached the event, or nothing is left to compare.
    """
    z, p = st.log_rank(left, right)
    estimate, _ = st.log_hazard_ratio(left, right)
    test = st.permuted_times(left, right, rng)
    medians = [number(st.kaplan_meier(*side).median) for side in (left, right)]
    return Inference(
        estimate, min(len(left[0]), len(right[0])), test.interval, test.above, test.below,
        noted=lambda: {
            "log-rank": f"z {z:.2f}, two-sided p {test.two_sided():.3g} by relabelling; "
            f"{p:.3g} by chi-square, which decides nothing",
            "medians": f"{medians[0]} and {medians[1]}",
        },
    )  # fmt: skip


def kappa(
    scale_lost: np.ndarray, alignment_gained: np.ndarray, rng: np.random.Generator
) -> Inference:
    """Exchange rate of log logit scale for log alignment, with both terms and their signs beside.

    kappa = - sum of changes of log A / sum of changes of log G; it is the same for "A up, G down"
    and for "A down, G up".
    """
    changes = {
        "log A": -scale_lost.mean(),
        "log G": alignment_gained.mean(),
        "log margin": (alignment_gained - scale_lost).mean(),
    }
    beside = {f"mean change of {name}": number(float(value)) for name, value in changes.items()}
    ratio = ratio_of_sums(scale_lost, alignment_gained, rng)
    return replace(ratio, noted=lambda: beside | ratio.beside)


def ratio_of_sums(
    numerators: np.ndarray, denominators: np.ndarray, rng: np.random.Generator
) -> Inference:
    """Ratio of sums over units: Fieller below 100 units, BCa from there.

    Error rates at a nominal 5 %, 4,000 data sets of log-normal clusters: Fieller at 20 3.9 %, BCa
    at 100 6.0 %; the intervals cover 95.7 % and 93.8 %.

    Raises:
        UndefinedError: The denominator's 95 % interval contains 0.
    """
    n = len(numerators)
    estimate = float(numerators.sum() / denominators.sum())
    if alone := _untestable(estimate, numerators - estimate * denominators):
        return alone
    st.fieller(numerators, denominators)

    def statistic(num: np.ndarray, den: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(num.sum(axis=axis) / den.sum(axis=axis))

    if n < RATIO_BOOTSTRAP_FROM:
        own = rng.spawn(1)[0]
        return Inference(
            estimate, n,
            lambda level: st.fieller(numerators, denominators, level=level),
            lambda b: st.ratio_above(numerators, denominators, b),
            lambda b: st.ratio_above(-numerators, denominators, -b),
            sd=_spread(numerators, denominators, estimate),
            noted=lambda: _bca_beside((numerators, denominators), statistic, own),
        )  # fmt: skip
    boot = st.Bootstrap((numerators, denominators), statistic, rng)
    fieller = st.fieller(numerators, denominators)
    return Inference(
        estimate, n, boot.interval, boot.p_above, lambda b: 1 - boot.p_above(b),
        sd=_spread(numerators, denominators, estimate),
        noted=lambda: {"Fieller interval": _interval(fieller)},
    )  # fmt: skip


def _spread(numerators: np.ndarray, denominators: np.ndarray, estimate: float) -> float:
    """Standard deviation between units of a ratio of sums, linear in the units' deviations."""
    off = numerators - estimate * denominators
    return float(off.std(ddof=1) / abs(denominators.mean()))


def log_ratio_of_sums(
    numerators: np.ndarray, denominators: np.ndarray, rng: np.random.Generator
) -> Inference:
    """Natural logarithm of a ratio of sums of positive numbers; 0 where the sums are equal.

    Raises:
        UndefinedError: A sum is not positive.
    """
    lowest = min(numerators.sum(), denominators.sum())
    if lowest <= 0:
        raise UndefinedError(f"logarithm of a ratio with {lowest:.3g}, which is not positive")
    ratio = ratio_of_sums(numerators, denominators, rng)
    assert ratio.estimate is not None
    sd = None if ratio.sd is None else ratio.sd / ratio.estimate
    return replace(
        ratio,
        estimate=float(np.log(ratio.estimate)),
        interval=lambda level: logarithm(ratio.interval(level)),
        above=lambda bound: ratio.above(float(np.exp(bound))),
        below=lambda bound: ratio.below(float(np.exp(bound))),
        sd=sd,
    )


def geometric_ratio(
    numerators: np.ndarray, denominators: np.ndarray, rng: np.random.Generator
) -> Inference:
    """Geometric mean over layers of ratios of sums over units, by BCa of its logarithm.

    Error rate at a nominal 5 %, 96 units and 3 layers, 4,000 data sets: 5.4 %.

    Args:
        numerators: One row a unit, one column a layer.
        denominators: Likewise.
        rng: Where randomness comes from.
    """
    boot = GeometricRatio(numerators, denominators, rng)

    def below(bound: float) -> float:
        return 1 - boot.p_above(float(np.log(bound)))

    return Inference(
        float(np.exp(boot.estimate)), len(numerators),
        lambda level: exponential(boot.interval(level)),
        lambda b: boot.p_above(float(np.log(b))), below,
        noted=lambda: {"layers": str(numerators.shape[1])},
    )  # fmt: skip


def logarithm(interval: Interval) -> Interval:
    """An interval on the scale of the natural logarithm; open where an end is not positive."""
    low, high = (
        None if end is None or end <= 0 else float(np.log(end))
        for end in (interval.low, interval.high)
    )
    return replace(interval, low=low, high=high, method=f"{interval.method}, logarithm taken")


def _untestable(estimate: float, values: np.ndarray) -> Inference | None:
    """An estimate alone, where the units' spread is unknown or 0; else None."""
    if len(values) > 1 and np.ptp(values) > 0:
        return None
    degenerate = "ci_degenerate: all units are equal, so their spread is 0"
    reason = "one unit has no interval" if len(values) == 1 else degenerate

    def no_interval(level: float) -> Interval:
        raise UndefinedError(f"{reason} at {level:.0%}")

    return Inference(
        float(estimate),
        len(values),
        no_interval,
        lambda _: 1.0,
        lambda _: 1.0,
        untestable=reason,
    )
