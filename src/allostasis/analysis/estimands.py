"""From one number a unit to an estimate, its interval and one-sided tests against any bound."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from allostasis.analysis import statistics as st
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.intervals import Interval
from allostasis.analysis.suppressors import GeometricRatio, exponential
from allostasis.analysis.text import bracket, number

BOOTSTRAP_FROM = 50  # units: below, BCa covers less than t
RATIO_BOOTSTRAP_FROM = 100


@dataclass(frozen=True)
class Inference:
    """What the units say about an estimand.

    Attributes:
        estimate: None where a median was not reached.
        n: Units.
        interval: Interval at a level.
        above: One-sided p of "at most the bound".
        below: One-sided p of "at least the bound".
        effect: Standardised distance from the bound, where units have a spread.
        sd: Standard deviation between units, on the scale of the test.
        beside: What is printed beside it and decides nothing, by name.
        untestable: Why there is neither interval nor test, where there is none.
    """

    estimate: float | None
    n: int
    interval: Callable[[float], Interval]
    above: Callable[[float], float]
    below: Callable[[float], float]
    effect: st.Effect | None = None
    sd: float | None = None
    beside: dict[str, str] = field(default_factory=dict)
    untestable: str = ""


def generator(claim_id: str) -> np.random.Generator:
    """A claim's own stream of randomness, so that a report is the same when it is made again."""
    digest = hashlib.sha256(f"{claim_id}:bootstrap".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def mean(values: np.ndarray, bound: float, rng: np.random.Generator) -> Inference:
    """Mean over units: t below 50 of them, BCa from there."""
    if alone := _untestable(values.mean(), values):
        return alone
    n = len(values)
    effect = st.one_sample_effect(values, bound) if n > 2 else None
    beside = {"sign-flip p (two-sided)": f"{st.sign_flip(values, bound, rng):.3g}"}
    sd = float(values.std(ddof=1))
    if n < BOOTSTRAP_FROM:
        return Inference(
            float(values.mean()), n, lambda level: st.t_interval(values, level=level),
            lambda b: st.t_above(values, b), lambda b: st.t_above(-values, -b),
            effect, sd, beside,
        )  # fmt: skip
    boot = st.Bootstrap((values,), np.mean, rng)
    return Inference(
        float(values.mean()), n, boot.interval, boot.p_above, lambda b: 1 - boot.p_above(b),
        effect, sd, beside,
    )  # fmt: skip


def log_ratio(ratios: np.ndarray, bound: float, rng: np.random.Generator) -> Inference:
    """Geometric mean of positive ratios: `mean` of their logarithms, printed as a ratio."""
    if (ratios <= 0).any():
        raise UndefinedError(f"logarithm of {ratios.min():.3g}, which is not positive")
    logs = mean(np.log(ratios), float(np.log(bound)), rng)
    assert logs.estimate is not None

    def interval(level: float) -> Interval:
        on_logs = logs.interval(level)
        assert on_logs.low is not None
        assert on_logs.high is not None
        low, high = float(np.exp(on_logs.low)), float(np.exp(on_logs.high))
        return Interval(low, high, level, f"{on_logs.method} on logarithms")

    return Inference(
        float(np.exp(logs.estimate)), logs.n, interval,
        lambda b: logs.above(float(np.log(b))), lambda b: logs.below(float(np.log(b))),
        logs.effect, logs.sd, logs.beside,
    )  # fmt: skip


def difference(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> Inference:
    """Difference of the means of two unpaired arms by Welch's t."""
    spread = np.concatenate([left - left.mean(), right - right.mean()])
    if min(len(left), len(right)) == 1:
        spread = spread[:1]
    if alone := _untestable(left.mean() - right.mean(), spread):
        return alone
    return Inference(
        float(left.mean() - right.mean()), min(len(left), len(right)),
        lambda level: st.welch_interval(left, right, level=level),
        lambda b: st.welch_above(left, right, b), lambda b: st.welch_above(right, left, -b),
        st.hedges_g(left, right),
        beside={"permutation p of 0 (two-sided)": f"{st.permutation(left, right, rng):.3g}"},
    )  # fmt: skip


def standardised_difference(left: np.ndarray, right: np.ndarray) -> Inference:
    """Hedges's g of two arms, tested and bounded by the noncentral t; Cohen's d beside it.

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
        found, beside={"Cohen's d": number(found.d)},
    )  # fmt: skip


def proportion(hits: np.ndarray, *, unanimous: bool = False) -> Inference:
    """Share of units with a 1: exact binomial; `unanimous` supports nothing unless all have it."""
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
        beside={f"{greenwood.method} interval": f"95 %, of the median: {bracket(greenwood)}"},
    )  # fmt: skip


def log_hazard_ratio(
    left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]
) -> Inference:
    """Log hazard ratio of two arms by Peto's estimate; against 0 its test is the log-rank test."""
    estimate, error = st.log_hazard_ratio(left, right)
    z, p = st.log_rank(left, right)
    medians = [number(st.kaplan_meier(*side).median) for side in (left, right)]

    def interval(level: float) -> Interval:
        reach = float(stats.norm.ppf((1 + level) / 2)) * error
        return Interval(estimate - reach, estimate + reach, level, "Peto")

    return Inference(
        estimate, min(len(left[0]), len(right[0])), interval,
        lambda b: float(stats.norm.sf((estimate - b) / error)),
        lambda b: float(stats.norm.cdf((estimate - b) / error)),
        beside={
            "log-rank": f"z {z:.2f}, two-sided p {p:.3g}",
            "medians": f"{medians[0]} and {medians[1]}; - where it was not reached",
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
    return replace(ratio_of_sums(scale_lost, alignment_gained, rng), beside=beside)


def ratio_of_sums(
    numerators: np.ndarray, denominators: np.ndarray, rng: np.random.Generator
) -> Inference:
    """Ratio of sums over units: Fieller below 100 units, BCa from there.

    Raises:
        UndefinedError: The denominator's 95 % interval contains 0.
    """
    n = len(numerators)
    estimate = float(numerators.sum() / denominators.sum())
    if alone := _untestable(estimate, numerators - estimate * denominators):
        return alone
    st.fieller(numerators, denominators)
    if n < RATIO_BOOTSTRAP_FROM:
        return Inference(
            estimate, n,
            lambda level: st.fieller(numerators, denominators, level=level),
            lambda b: st.ratio_above(numerators, denominators, b),
            lambda b: st.ratio_above(-numerators, denominators, -b),
            sd=_spread(numerators, denominators, estimate),
        )  # fmt: skip

    def statistic(num: np.ndarray, den: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(num.sum(axis=axis) / den.sum(axis=axis))

    boot = st.Bootstrap((numerators, denominators), statistic, rng)
    fieller = st.fieller(numerators, denominators)
    return Inference(
        estimate, n, boot.interval, boot.p_above, lambda b: 1 - boot.p_above(b),
        sd=_spread(numerators, denominators, estimate),
        beside={"Fieller interval": f"{fieller.level:.0%} {bracket(fieller)}"},
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
        beside={"layers": str(numerators.shape[1])},
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
