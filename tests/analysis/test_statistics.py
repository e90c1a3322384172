"""Statistics against scipy, statsmodels, closed forms and their own simulated error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as draws
from numpy.testing import assert_allclose
from scipy import ndimage, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower
from statsmodels.stats.weightstats import DescrStatsW, ttost_ind, ttost_paired

from allostasis.analysis import estimands
from allostasis.analysis import statistics as st
from allostasis.analysis.curves import UndefinedError

SEEDS = np.array([2.20, 2.45, 2.38])


@pytest.fixture(params=[500, pytest.param(4_000, marks=pytest.mark.slow)], ids=["smoke", "full"])
def sets(request: pytest.FixtureRequest) -> int:
    """Simulated data sets: a smoke test by default, the calibration itself where slow ones run."""
    return request.param


def margin(sets: int, share: float = 0.05, band: float = 0.015) -> float:
    """The registered band, widened by what fewer than 4,000 sets add to the Monte Carlo error."""
    se = [math.sqrt(share * (1 - share) / n) for n in (sets, 4_000)]
    return band + 3 * (se[0] - se[1])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


# ---------------------------------------------------------------- against other libraries


def test_t_interval_gives_the_published_check_value() -> None:
    interval = st.t_interval(SEEDS)
    assert_allclose([interval.low, interval.high], [2.02295, 2.66371], atol=5e-6)
    limits = DescrStatsW(SEEDS).tconfint_mean()
    assert_allclose([interval.low, interval.high], limits, rtol=1e-10)


def test_welch_interval_and_p_equal_scipys(rng: np.random.Generator) -> None:
    left, right = rng.normal(1, 1, 6), rng.normal(0, 3, 9)
    test = stats.ttest_ind(left, right, equal_var=False)
    interval = st.welch_interval(left, right, level=0.9)
    assert_allclose([interval.low, interval.high], test.confidence_interval(0.9), rtol=1e-10)
    two_sided = 2 * min(st.welch_above(left, right, 0.0), st.welch_above(right, left, 0.0))
    assert_allclose(two_sided, test.pvalue, rtol=1e-10)


def test_t_test_equals_scipys(rng: np.random.Generator) -> None:
    values = rng.normal(size=7)
    expected = stats.ttest_1samp(values, 0.3, alternative="greater").pvalue
    assert_allclose(st.t_above(values, 0.3), expected, rtol=1e-10)


def test_two_one_sided_t_tests_equal_statsmodels_tost(rng: np.random.Generator) -> None:
    values = rng.normal(1.0, 0.05, 8)
    inference = estimands.mean(values, 1.0, rng)
    ours = max(inference.above(0.9), inference.below(1.1))
    assert_allclose(ours, DescrStatsW(values).ttost_mean(0.9, 1.1)[0], rtol=1e-10)


def test_two_one_sided_tests_of_two_arms_equal_statsmodels_tost(rng: np.random.Generator) -> None:
    left, right = rng.normal(0.02, 0.05, 8), rng.normal(0.0, 0.05, 8)
    paired = estimands.mean(left - right, 0.0, rng)
    ours = max(paired.above(-0.1), paired.below(0.1))
    assert_allclose(ours, ttost_paired(left, right, -0.1, 0.1)[0], rtol=1e-10)
    unpaired = estimands.difference(left, right[:6], rng)
    ours = max(unpaired.above(-0.1), unpaired.below(0.1))
    theirs = ttost_ind(left, right[:6], -0.1, 0.1, usevar="unequal")[0]
    assert_allclose(ours, theirs, rtol=1e-10)


def test_equivalence_power_equals_its_simulation(rng: np.random.Generator) -> None:
    for effect in (0.0, 0.3):
        exact = st.exact_power(effect, 10, sd=0.8, half_width=1.0)
        simulated = st.power(effect, 10, rng, sd=0.8, half_width=1.0)
        assert simulated == pytest.approx(exact, abs=3.5 * math.sqrt(exact * (1 - exact) / 4_000))


def test_flipped_signs_equal_scipys_at_any_bound(rng: np.random.Generator) -> None:
    values = rng.normal(0.5, 1, 7)
    test = st.flipped_signs(values, rng)
    for bound in (-0.4, 0.0, 0.5, 1.3):
        for side, ours in (("greater", test.above(bound)), ("less", test.below(bound))):
            theirs = stats.permutation_test(
                (values - bound,), np.mean, permutation_type="samples", alternative=side
            ).pvalue  # fmt: skip
            assert_allclose(ours, theirs, rtol=1e-10)


def test_permuted_labels_equal_scipys_at_any_bound(rng: np.random.Generator) -> None:
    left, right = rng.normal(0.5, 1, 5), rng.normal(0, 1, 4)
    test = st.permuted_labels(left, right, rng)
    for bound in (-0.4, 0.0, 0.5, 1.3):
        for side, ours in (("greater", test.above(bound)), ("less", test.below(bound))):
            theirs = stats.permutation_test(
                (left - bound, right), lambda x, y: x.mean() - y.mean(), alternative=side
            ).pvalue
            assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("n", [3, 6, 8])
def test_intervals_by_relabelling_hold_what_their_tests_do_not_reject(
    n: int, rng: np.random.Generator
) -> None:
    left, right = rng.normal(size=n), rng.normal(size=n)
    for test in (st.flipped_signs(left, rng), st.permuted_labels(left, right, rng)):
        interval = test.interval(0.95)
        if 2 / test.labellings > 0.05:
            assert (interval.low, interval.high) == (None, None)
            continue
        assert interval.low is not None
        assert interval.high is not None
        assert test.above(interval.low) >= 0.025 > test.above(interval.low - 1e-9)
        assert test.below(interval.high) >= 0.025 > test.below(interval.high + 1e-9)


def test_many_units_are_relabelled_at_random_with_one_added(rng: np.random.Generator) -> None:
    values = rng.normal(0.4, 1, 24)
    exact = stats.ttest_1samp(values, 0.0, alternative="greater").pvalue
    flipped = st.flipped_signs(values, rng)
    assert flipped.labellings == 100_000
    assert flipped.above(0.0) == pytest.approx(exact, abs=0.01)
    permuted = st.permuted_labels(values, rng.normal(size=24), rng)
    assert permuted.labellings == 100_000
    assert permuted.above(-50.0) == 1 / 100_000


def test_the_largest_t_of_one_column_is_its_sign_flip_p(rng: np.random.Generator) -> None:
    values = rng.normal(0.5, 1, 9)
    alone = st.max_t(values[:, None], rng, flips=40_000)[0]
    assert alone == pytest.approx(st.sign_flip(values, 0.0, rng), abs=0.01)
    among = st.max_t(np.column_stack([values, rng.normal(size=(9, 30))]), rng)
    assert among[0] > alone


def test_the_interquartile_mean_is_rliables(rng: np.random.Generator) -> None:
    metrics = pytest.importorskip("rliable.metrics")
    scores = rng.normal(size=(10, 3))
    assert_allclose(st.iqm(scores), metrics.aggregate_iqm(scores), rtol=1e-12)


def test_the_interval_of_the_interquartile_mean_resamples_runs_within_tasks() -> None:
    """By rliable's rule, one run of one task at a time; its own code needs arch < 6."""
    scores = np.random.default_rng(7).normal(size=(10, 3)) * [1.0, 5.0, 0.2] + [0.0, 2.0, -1.0]
    resamples, rng = 20_000, np.random.default_rng(8)
    columns = [rng.choice(task, size=(resamples, len(task))) for task in scores.T]
    drawn = np.sort(np.concatenate(columns, axis=1), axis=1)[:, 7:23].mean(axis=1)
    theirs = np.quantile(drawn, [0.025, 0.975])
    ours = st.iqm_interval(scores, np.random.default_rng(9), resamples=resamples)
    # of a quantile at 2.5 % of a nearly normal distribution; of both ends, so times sqrt(2)
    se = math.sqrt(0.025 * 0.975 / resamples) / stats.norm.pdf(1.96) * drawn.std()
    assert_allclose([ours.low, ours.high], theirs, atol=3 * math.sqrt(2) * se)


def test_the_interquartile_mean_leaves_a_quarter_out_at_each_end(rng: np.random.Generator) -> None:
    values = rng.normal(size=11)
    assert_allclose(st.iqm(values), np.sort(values)[2:9].mean(), rtol=1e-12)
    interval = st.iqm_interval(values[:, None], np.random.default_rng(0), resamples=4_000)
    theirs = stats.bootstrap(
        (values,), lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), method="percentile",
        n_resamples=4_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert_allclose([interval.low, interval.high], [theirs.low, theirs.high], atol=0.06)


def test_exact_permutation_enumerates_all_relabellings(rng: np.random.Generator) -> None:
    left, right = np.array([4.0, 5, 6]), np.array([1.0, 2, 3])
    assert st.permutation(left, right, rng) == pytest.approx(2 / 20, rel=1e-10)
    assert st.permutation(np.arange(4.0) + 9, np.arange(4.0), rng) == pytest.approx(2 / 70)


def test_sign_flip_equals_its_enumeration(rng: np.random.Generator) -> None:
    values = rng.normal(0.5, 1, 6)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    means = signs @ values / 6
    smaller = min((means >= values.mean() - 1e-12).mean(), (means <= values.mean() + 1e-12).mean())
    assert_allclose(st.sign_flip(values, 0.0, rng), 2 * smaller, rtol=1e-10)


def test_holm_equals_statsmodels(rng: np.random.Generator) -> None:
    p = rng.random(12) ** 3
    assert_allclose(st.holm(p.tolist()), multipletests(p, method="holm")[1], rtol=1e-10)
    assert st.holm([1.0, 1.0]) == [1.0, 1.0]


def test_clopper_pearson_equals_the_beta_quantiles() -> None:
    interval = st.clopper_pearson(5, 8)
    beta = stats.beta.ppf([0.025, 0.975], [5, 6], [4, 3])
    assert_allclose([interval.low, interval.high], beta, rtol=1e-10)


def test_fieller_limits_are_the_roots_of_its_equation(rng: np.random.Generator) -> None:
    num, den = rng.normal(2, 0.3, 9), rng.normal(1, 0.2, 9)
    interval = st.fieller(num, den)
    t = stats.t.ppf(0.975, 8)
    for rho in (interval.low, interval.high):
        assert rho is not None
        rest = num - rho * den
        assert_allclose(rest.mean() ** 2, t**2 * rest.var(ddof=1) / 9, rtol=1e-8)
        tail = min(st.ratio_above(num, den, rho), st.ratio_above(-num, den, -rho))
        assert tail == pytest.approx(0.025, abs=1e-10)


def test_fieller_of_a_negative_denominator_mirrors(rng: np.random.Generator) -> None:
    num, den = rng.normal(2, 0.3, 9), rng.normal(1, 0.2, 9)
    assert_allclose(st.ratio_above(num, den, 1.5), st.ratio_above(-num, -den, 1.5), rtol=1e-12)
    ours, mirrored = st.fieller(num, den), st.fieller(-num, -den)
    assert_allclose([ours.low, ours.high], [mirrored.low, mirrored.high], rtol=1e-12)


def test_bca_equals_scipys_with_the_same_generator() -> None:
    values = np.random.default_rng(1).lognormal(size=60)
    theirs = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=1_999, rng=np.random.default_rng(2)
    ).confidence_interval
    boot = st.Bootstrap((values,), np.mean, np.random.default_rng(2), resamples=1_999)
    ours = boot.interval()
    assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], rtol=1e-10)


def test_bca_p_inverts_its_interval() -> None:
    values = np.random.default_rng(1).lognormal(size=60)
    boot = st.Bootstrap((values,), np.mean, np.random.default_rng(2))
    interval = boot.interval()
    assert interval.low is not None
    assert interval.high is not None
    # the resamples are a grid of 9,999 values
    assert boot.p_above(interval.low) == pytest.approx(0.025, abs=5e-4)
    assert boot.p_above(interval.high) == pytest.approx(0.975, abs=5e-4)


def test_hedges_g_has_the_closed_form_correction_and_limits(rng: np.random.Generator) -> None:
    left, right = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    effect = st.hedges_g(left, right)
    assert st.unbiasing(8) == pytest.approx(0.9027, abs=5e-5)
    assert effect.g == pytest.approx(st.unbiasing(8) * effect.d, rel=1e-12)
    assert effect.d == pytest.approx(
        (left.mean() - right.mean()) / math.sqrt((left.var(ddof=1) + right.var(ddof=1)) / 2)
    )
    t = effect.d / math.sqrt(2 / 5)
    for limit, share in ((effect.interval.low, 0.975), (effect.interval.high, 0.025)):
        assert limit is not None
        noncentrality = limit / st.unbiasing(8) / math.sqrt(2 / 5)
        assert stats.nct.cdf(t, 8, noncentrality) == pytest.approx(share, abs=1e-8)


@pytest.mark.parametrize("distance", [-60.0, 60.0])
def test_an_enormous_effect_has_an_interval_around_it(distance: float) -> None:
    values = distance + np.array([-1.0, 0.5, 0.2, 0.3, -0.4, 0.6])
    effect = st.one_sample_effect(values, 0.0)
    assert effect.interval.low is not None
    assert effect.interval.high is not None
    assert effect.interval.low < effect.g < effect.interval.high


CENSORED = (
    np.array([5.0, 8, 8, 12, 20, 20, 3, 15]),
    np.array([False, False, True, False, True, True, False, False]),
)


def test_kaplan_meier_equals_scipy_and_statsmodels() -> None:
    times, censored = CENSORED
    ours = st.kaplan_meier(times, censored)
    data = stats.CensoredData(uncensored=times[~censored], right=times[censored])
    theirs = stats.ecdf(data).sf
    assert_allclose(ours.survival, theirs.evaluate(ours.times), rtol=1e-10)
    at, low, high = ours.band()
    band = theirs.confidence_interval(0.95, method="log-log")
    assert_allclose(low, band.low.evaluate(at), rtol=1e-10)
    assert_allclose(high, band.high.evaluate(at), rtol=1e-10)
    reference = sm.SurvfuncRight(times, ~censored)
    assert_allclose(ours.survival * np.sqrt(ours.variance), reference.surv_prob_se, rtol=1e-10)
    assert ours.median == reference.quantile(0.5)


def test_restricted_mean_is_the_area_under_the_curve() -> None:
    times = np.array([2.0, 4.0, 6.0])
    mean, error = st.kaplan_meier(times, np.zeros(3, dtype=bool)).restricted_mean(6.0)
    assert mean == pytest.approx(4.0)
    # without censoring Greenwood's variance is that of a mean, with n for n - 1
    assert error == pytest.approx(times.std() / math.sqrt(3))


def test_restricted_mean_of_censored_times_is_the_integral_of_statsmodels_curve() -> None:
    times, censored = CENSORED
    until = st.common_end((times, censored))
    curve = sm.SurvfuncRight(times, ~censored)
    grid = np.linspace(0, until, 200_001)
    steps = np.concatenate([[1.0], curve.surv_prob])
    heights = steps[np.searchsorted(curve.surv_times, grid[:-1], side="right")]
    mean, error = st.kaplan_meier(times, censored).restricted_mean(until)
    assert mean == pytest.approx(heights.mean() * until, rel=1e-4)
    interval = st.kaplan_meier(times, censored).restricted_interval(until)
    for end, side in ((interval.low, -1), (interval.high, 1)):  # by the delta method on log(-log)
        share = mean / until
        there = math.log(-math.log(end / until)) - math.log(-math.log(share))
        slope = 1 / (share * math.log(share) * until)
        assert there == pytest.approx(side * stats.norm.ppf(0.975) * error * slope, rel=1e-9)


def test_rmst_is_the_mean_of_restricted_times_and_its_difference_scipys(
    rng: np.random.Generator,
) -> None:
    left, right = rng.exponential([[2.0], [4.0]], (2, 6))
    arms = [(np.minimum(x, 5.0), x > 5.0) for x in (left, right)]
    until = st.common_end(*arms)
    one, other = (np.minimum(times, until) for times, _ in arms)
    alone = estimands.rmst(arms[1], 0.0, rng)
    assert alone.estimate == pytest.approx(
        st.kaplan_meier(*arms[1]).restricted_mean(st.common_end(arms[1]))[0]
    )
    assert "log-log Greenwood interval" in alone.beside
    both = estimands.rmst(arms[0], 0.0, rng, control=arms[1], relabel=True)
    theirs = stats.permutation_test(
        (one, other), lambda x, y: x.mean() - y.mean(), alternative="less", n_resamples=np.inf
    )
    assert both.below(0.0) == pytest.approx(theirs.pvalue, rel=1e-10)
    welch = estimands.rmst(arms[0], 0.0, rng, control=arms[1])
    reference = stats.ttest_ind(one, other, equal_var=False)
    found = welch.interval(0.95)
    assert_allclose([found.low, found.high], reference.confidence_interval(0.95), rtol=1e-10)
    assert welch.beside["restricted to"] == both.beside["restricted to"] == "5"
    assert "decides nothing" in welch.beside["bootstrap over seeds"]


def test_rmst_of_arms_that_never_get_there_is_undefined(rng: np.random.Generator) -> None:
    times, all_of_them = np.full(6, 9.0), np.ones(6, dtype=bool)
    with pytest.raises(UndefinedError, match="no run reached the event"):
        estimands.rmst((times, all_of_them), 1.0, rng)
    with pytest.raises(UndefinedError, match="no event before the end"):
        st.kaplan_meier(times, all_of_them).restricted_interval(9.0)


def test_log_rank_equals_statsmodels_chi_square() -> None:
    times, censored = CENSORED
    group = np.array([0, 0, 1, 0, 1, 1, 0, 1])
    sides = [(times[group == g], censored[group == g]) for g in (0, 1)]
    z, p = st.log_rank(sides[0], sides[1])
    chi_square, expected = sm.duration.survdiff(times, ~censored, group)
    assert_allclose([z**2, p], [chi_square, expected], rtol=1e-10)


@pytest.mark.parametrize(("n", "expected"), [(3, 0.463), (5, 0.791), (8, 0.960)])
def test_power_of_two_samples_equals_the_closed_form(
    n: int, expected: float, rng: np.random.Generator
) -> None:
    closed = TTestIndPower().power(2.0, n, 0.05)
    assert closed == pytest.approx(expected, abs=5e-4)
    one_tail = TTestIndPower().power(2.0, n, 0.025, alternative="larger")
    assert_allclose(st.exact_power(2.0, n, arms=2), one_tail, rtol=1e-8)
    simulated = st.power(2.0, n, rng, arms=2)
    assert simulated == pytest.approx(closed, abs=3.5 * math.sqrt(closed * (1 - closed) / 4_000))


def test_seeds_for_power_find_the_closed_form() -> None:
    from statsmodels.stats.power import TTestPower

    exact = TTestPower().solve_power(1.0, power=0.8, alpha=0.05)
    assert st.seeds_for_power(1.0, sd=1.0) == math.ceil(exact)


def test_minimum_seeds_are_those_of_the_exact_tests() -> None:
    assert st.attainable_p("unpaired", 3, sides=2) == pytest.approx(0.1)
    assert st.attainable_p("unpaired", 3, sides=1) == pytest.approx(0.05)
    assert st.attainable_p("unpaired", 4, sides=2) == pytest.approx(0.0286, abs=1e-4)
    assert st.attainable_p("unpaired", 5, sides=2) == pytest.approx(0.0079, abs=1e-4)
    flips = [st.attainable_p("sign_flip", n, sides=2) for n in (5, 6, 8)]
    assert flips == [0.0625, 0.03125, 0.0078125]
    assert st.minimum_seeds("unpaired", alpha=0.05, sides=2) == 4
    assert st.minimum_seeds("sign_flip", alpha=0.05, sides=2) == 6
    assert st.minimum_seeds("binomial", alpha=0.05, sides=2, family_size=6) == 8


# ---------------------------------------------------------------- error rates


def test_t_has_its_nominal_error_rate_and_coverage(sets: int, rng: np.random.Generator) -> None:
    for n in (3, 5, 8, 20):
        draws = rng.normal(size=(sets, n))
        p = np.array([st.t_above(row, 0.0) for row in draws])
        rejected = ((p < 0.025) | (p > 0.975)).mean()
        assert abs(rejected - 0.05) <= margin(sets)
        intervals = [st.t_interval(row) for row in draws[:500]]
        covered = np.mean([i.low <= 0 <= i.high for i in intervals])  # type: ignore[operator]
        assert abs(covered - 0.95) <= margin(500)


def test_welch_and_tost_have_their_nominal_error_rates(sets: int, rng: np.random.Generator) -> None:
    p = [st.welch_above(rng.normal(size=6), rng.normal(0, 2, 9), 0.0) for _ in range(sets)]
    assert abs((np.minimum(p, 1 - np.array(p)) < 0.025).mean() - 0.05) <= margin(sets)
    # at the edge of the bounds, far from the other edge
    found = 0
    for _ in range(sets):
        values = rng.normal(1.1, 0.05, 8)
        found += max(st.t_above(values, 0.9), st.t_above(-values, -1.1)) < 0.05
    assert abs(found / sets - 0.05) <= margin(sets)


def test_exact_tests_never_exceed_their_level(sets: int, rng: np.random.Generator) -> None:
    flips = [st.sign_flip(rng.normal(size=7), 0.0, rng) <= 0.05 for _ in range(sets)]
    attainable = np.floor(0.05 * 2**6) / 2**6
    assert abs(np.mean(flips) - attainable) <= margin(sets)
    assert np.mean(flips) <= 0.05 + margin(sets)
    labels = [
        st.permutation(rng.normal(size=4), rng.normal(size=4), rng) <= 0.05 for _ in range(sets)
    ]
    assert abs(np.mean(labels) - 2 / 70) <= margin(sets)


def test_the_median_test_and_interval_keep_their_level(sets: int, rng: np.random.Generator) -> None:
    wrong = missed = 0
    for _ in range(sets):
        times = rng.exponential(1.0, 8)
        censored = times > 1.5
        times = np.minimum(times, 1.5)
        wrong += st.median_above(times, math.log(2)) < 0.025
        wrong += st.median_below(times, censored, math.log(2)) < 0.025
        interval = st.median_interval(times, censored)
        assert interval.low is not None
        high = np.inf if interval.high is None else interval.high
        missed += not interval.low <= math.log(2) <= high
    assert wrong / sets <= 0.05 + margin(sets, band=0.0)
    assert missed / sets <= 0.05 + margin(sets, band=0.0)


def test_holm_holds_the_family_wise_rate(sets: int, rng: np.random.Generator) -> None:
    found = [min(st.holm(rng.random(6).tolist())) < 0.05 for _ in range(sets)]
    assert abs(np.mean(found) - 0.05) <= margin(sets)


@pytest.mark.parametrize("n", [5, 20, 60])
def test_fieller_covers_a_ratio_of_lognormal_clusters(
    n: int, sets: int, rng: np.random.Generator
) -> None:
    covered = 0
    for _ in range(sets):
        size = rng.lognormal(0, 0.5, n)
        try:
            interval = st.fieller(size * rng.normal(0.6, 0.1, n), size)
        except UndefinedError:  # an unbounded set, which holds the ratio
            covered += 1
            continue
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 0.6 <= interval.high
    assert abs(covered / sets - 0.95) <= margin(sets, band=0.02)


def test_bca_under_covers_at_five_units_and_not_at_a_hundred(rng: np.random.Generator) -> None:
    def covers(n: int, sets: int) -> float:
        found = 0
        for _ in range(sets):
            interval = st.Bootstrap((rng.normal(size=n),), np.mean, rng, resamples=499).interval()
            assert interval.low is not None
            assert interval.high is not None
            found += interval.low <= 0 <= interval.high
        return found / sets

    assert covers(5, 400) < 0.90
    assert covers(100, 300) == pytest.approx(0.95, abs=0.04)


def test_clopper_pearson_covers_at_least_its_level() -> None:
    for n in (5, 8, 20):
        for share in np.linspace(0.05, 0.95, 10):
            counts = np.arange(n + 1)
            limits = [st.clopper_pearson(int(k), n) for k in counts]
            inside = [i.low <= share <= i.high for i in limits]  # type: ignore[operator]
            assert stats.binom.pmf(counts, n, share)[inside].sum() >= 0.95


def smooth_series(rng: np.random.Generator) -> np.ndarray:
    """105 samples of a stationary series whose correlation length is 10 samples."""
    noise = ndimage.gaussian_filter1d(rng.normal(size=185), 10 / math.sqrt(2))
    return noise[40:145]


def test_surrogate_p_on_independent_smooth_series() -> None:
    """The source's own p finds a correlation in most independent pairs; surrogates seldom do."""
    rng = np.random.default_rng(0)
    naive, source, phase, shift = 0, 0, 0, 0
    pairs = 600
    for _ in range(pairs):
        left, right = smooth_series(rng), smooth_series(rng)
        rho, p = st.rank_correlation(left, right)
        naive += p < 0.05
        source += rho < -0.3 and p < 0.01
        phase += st.phase_randomised_p(left, right, rng, surrogates=199) <= 0.05
        shift += st.circular_shift_p(left, right) <= 0.05
    assert naive / pairs > 0.4
    assert 0.15 < source / pairs < 0.35
    assert 0.04 <= phase / pairs <= 0.10
    assert shift / pairs < naive / pairs / 2


# ---------------------------------------------------------------- degenerate data


def test_surrogates_refuse_a_monotone_series(rng: np.random.Generator) -> None:
    rising, other = np.arange(50.0), rng.normal(size=50)
    for surrogate in (
        lambda: st.phase_randomised_p(rising, other, rng),
        lambda: st.circular_shift_p(rising, other),
    ):
        with pytest.raises(
            UndefinedError, match="surrogate not applicable: the series is monotone"
        ):
            surrogate()


def test_a_phase_surrogate_keeps_the_amplitude_spectrum(rng: np.random.Generator) -> None:
    series = smooth_series(rng)
    assert st.phase_randomised_p(series, series, rng) == pytest.approx(1 / 1_000)


@pytest.mark.parametrize(
    ("values", "reason"),
    [([1.0], "one unit has no interval"), ([2.0, 2.0, 2.0], "ci_degenerate")],
)
def test_one_unit_or_equal_units_have_an_estimate_and_no_interval(
    values: list[float], reason: str, rng: np.random.Generator
) -> None:
    inference = estimands.mean(np.array(values), 0.0, rng)
    assert inference.estimate == values[0]
    assert inference.untestable.startswith(reason)
    with pytest.raises(UndefinedError, match=reason):
        inference.interval(0.95)
    with pytest.raises(UndefinedError, match=reason):
        st.t_interval(np.array(values))


def test_equal_shares_have_the_outermost_of_their_own_binomial_limits(
    rng: np.random.Generator,
) -> None:
    found = estimands.mean(np.ones(5), 0.95, rng, counts=np.array([2_000, 100, 2_000, 2_000, 500]))
    interval = found.interval(0.95)
    assert_allclose([interval.low, interval.high], [0.025 ** (1 / 100), 1.0], rtol=1e-10)
    assert found.above(0.95) == pytest.approx(0.95**100)
    assert not found.untestable
    assert found.beside["interval"].startswith("binomial")
    assert estimands.mean(np.ones(1), 0.95, rng, counts=np.array([9])).untestable


def test_what_stands_beside_a_mean_decides_nothing_and_moves_nothing() -> None:
    values = np.random.default_rng(5).normal(size=60)
    read, unread = (estimands.mean(values, 0.0, np.random.default_rng(1)) for _ in range(2))
    assert {"t interval", "interquartile mean", "sign-flip p (two-sided)"} == set(read.beside)
    assert read.interval(0.95) == unread.interval(0.95)
    few = estimands.mean(values[:8], 0.0, np.random.default_rng(1)).beside
    assert {"BCa interval", "interquartile mean", "sign-flip p (two-sided)"} == set(few)
    ratio = estimands.ratio_of_sums(values[:8] ** 2, np.ones(8), np.random.default_rng(1))
    assert set(ratio.beside) == {"BCa interval"}


def test_a_median_with_too_few_units_or_all_censored_is_said_so() -> None:
    times, none = np.arange(1.0, 6.0), np.zeros(5, dtype=bool)
    with pytest.raises(UndefinedError, match="needs at least 6 units, there are 5"):
        st.median_interval(times, none)
    inference = estimands.median_time(np.full(8, 9.0), np.ones(8, dtype=bool))
    assert inference.estimate is None
    interval = inference.interval(0.95)
    assert (interval.low, interval.high) == (9.0, None)
    assert inference.below(20.0) == 1.0
    with pytest.raises(UndefinedError, match="no run of either arm reached the event"):
        st.log_rank((times, ~none), (times, ~none))


def test_ties_and_no_censoring_give_a_curve_down_to_zero() -> None:
    curve = st.kaplan_meier(np.array([3.0, 3.0, 3.0]), np.zeros(3, dtype=bool))
    assert curve.survival.tolist() == [0.0]
    assert curve.median == 3.0
    assert len(curve.band()[0]) == 0


def test_kappa_is_undefined_where_the_denominators_interval_holds_0(
    rng: np.random.Generator,
) -> None:
    with pytest.raises(UndefinedError, match="denominator's 95% interval contains 0"):
        estimands.kappa(np.array([1.0, 1.1, 0.9, 1.0]), np.array([0.5, -0.4, 0.1, -0.2]), rng)


def test_kappa_prints_the_sign_of_both_terms(rng: np.random.Generator) -> None:
    lost, gained = np.array([0.5, 0.6, 0.55]), np.array([0.9, 1.0, 0.8])
    down_up = estimands.kappa(lost, gained, rng)
    up_down = estimands.kappa(-lost, -gained, rng)
    assert down_up.estimate == pytest.approx(up_down.estimate)
    assert down_up.beside["mean change of log A"] == "-0.55"
    assert up_down.beside["mean change of log A"] == "0.55"
    assert down_up.beside["mean change of log margin"] == "0.35"


def test_unanimity_asks_for_all_of_them() -> None:
    hits = np.array([1.0] * 7 + [0.0])
    assert estimands.proportion(hits).above(0.5) < 0.05
    assert estimands.proportion(hits, unanimous=True).above(0.5) == 1.0
    assert estimands.proportion(np.ones(8), unanimous=True).above(0.5) == pytest.approx(0.5**8)


TENTHS = draws.integers(-30, 60).map(lambda number: number / 10)


@given(
    left=draws.lists(TENTHS, min_size=4, max_size=8), shift=TENTHS,
    bound=draws.sampled_from((-1.0, 0.3, 2.0, 5.0)),
)  # fmt: skip
def test_the_tests_of_a_standardised_difference_invert_its_interval(
    left: list[float], shift: float, bound: float
) -> None:
    one = np.array(left) + np.arange(len(left)) * 0.1
    other = one[::-1] * 0.7 - shift
    found = estimands.standardised_difference(one, other)
    interval = found.interval(0.95)
    assert interval.low is not None
    assert interval.high is not None
    assert found.above(interval.low) == pytest.approx(0.025, abs=1e-6)
    assert found.below(interval.high) == pytest.approx(0.025, abs=1e-6)
    assert found.above(bound) + found.below(bound) == pytest.approx(1.0)
    assert (found.above(bound) < 0.025) == (interval.low > bound)


@pytest.mark.parametrize(
    ("t", "df", "delta"), [(2.0, 6, 1.0), (5.0, 10, 4.0), (0.5, 4, -1.0), (3.0, 30, 2.5), (0, 2, 1)]
)
def test_the_noncentral_t_is_scipys_where_scipys_is_right(t: float, df: int, delta: float) -> None:
    wanted = stats.nct.sf(t, df, delta)
    assert st.noncentral_above(float(t), df, float(delta)) == pytest.approx(wanted, abs=1e-11)
    mirrored = st.noncentral_above(-float(t), df, -float(delta))
    assert mirrored == pytest.approx(1 - wanted, abs=1e-11)


def test_the_noncentral_t_is_sampled_where_scipy_gives_up() -> None:
    rng = np.random.default_rng(0)
    for t, df, delta in ((6.9, 6, -10.0), (60.0, 3, 40.0), (29.0, 5, 33.0)):
        s = np.sqrt(rng.chisquare(df, 400_000) / df)
        share = np.mean((rng.normal(size=400_000) + delta) / s >= t)
        assert st.noncentral_above(t, df, delta) == pytest.approx(share, abs=0.003)


def test_a_standardised_difference_of_equal_units_is_not_tested() -> None:
    with pytest.raises(UndefinedError, match="effect size needs"):
        estimands.standardised_difference(np.ones(5), np.zeros(5))


def test_log_hazard_ratio_over_its_error_is_the_log_rank_z() -> None:
    times, censored = CENSORED
    group = np.array([0, 0, 1, 0, 1, 1, 0, 1])
    sides = [(times[group == g], censored[group == g]) for g in (0, 1)]
    estimate, error = st.log_hazard_ratio(sides[0], sides[1])
    assert estimate / error == pytest.approx(st.log_rank(sides[0], sides[1])[0], rel=1e-10)
    mirrored, _ = st.log_hazard_ratio(sides[1], sides[0])
    assert mirrored == pytest.approx(-estimate)


def test_log_rank_by_relabelling_equals_scipys_permutation_of_scipys_statistic(
    rng: np.random.Generator,
) -> None:
    times, censored = CENSORED
    group = np.array([0, 0, 1, 0, 1, 1, 0, 1])
    sides = [(times[group == g], censored[group == g]) for g in (0, 1)]

    def z(left: np.ndarray, right: np.ndarray) -> float:
        arms = (
            stats.CensoredData(
                uncensored=times[rows][~censored[rows]], right=times[rows][censored[rows]]
            )
            for rows in (left.astype(int), right.astype(int))
        )
        return float(stats.logrank(*arms).statistic)

    rows = [np.flatnonzero(group == g).astype(float) for g in (0, 1)]
    ours = st.permuted_times(sides[0], sides[1], rng)
    for found, tail in ((ours.above(0.0), "greater"), (ours.below(0.0), "less")):
        theirs = stats.permutation_test(
            rows, z, permutation_type="independent", alternative=tail, n_resamples=np.inf
        )
        assert found == pytest.approx(theirs.pvalue, rel=1e-10)


def test_log_rank_tests_by_many_labellings_agree_with_the_chi_square(
    rng: np.random.Generator,
) -> None:
    times = rng.exponential(1.0, (2, 40)) * np.array([[1.0], [1.5]])
    sides = [(np.minimum(t, 2.0), t > 2.0) for t in times]
    drawn = st.permuted_times(sides[0], sides[1], rng)
    assert drawn.labellings == 100_000
    p = st.log_rank(sides[0], sides[1])[1]
    assert drawn.two_sided() == pytest.approx(p, rel=0.1)
    interval = drawn.interval(0.95)
    estimate, error = st.log_hazard_ratio(sides[0], sides[1])
    assert_allclose(
        [interval.low, interval.high], estimate + np.array([-1.96, 1.96]) * error, atol=0.1 * error
    )


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_arms_that_are_wholly_apart_have_the_least_p_of_the_log_rank_test(
    n: int, rng: np.random.Generator
) -> None:
    none = np.zeros(n, dtype=bool)
    test = st.permuted_times((np.arange(1.0, n + 1), none), (np.arange(1.0, n + 1) + n, none), rng)
    assert test.above(0.0) == pytest.approx(st.attainable_p("unpaired", n))
    alone = np.full(n, 9.0)  # the other arm never gets there
    test = st.permuted_times((np.arange(1.0, n + 1), none), (alone, ~none), rng)
    assert test.above(0.0) == pytest.approx(st.attainable_p("unpaired", n))


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_the_interval_of_a_hazard_ratio_excludes_0_where_its_test_does(level: float) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        times = np.ceil(rng.exponential(1.0, (2, 5)) * np.array([[4.0], [9.0]]))
        sides = [(np.minimum(t, 8.0), t > 8.0) for t in times]
        try:
            test = st.permuted_times(sides[0], sides[1], rng)
        except UndefinedError:
            continue
        interval = test.interval(level)
        says = test.two_sided() < 1 - level - 1e-12
        low = -np.inf if interval.low is None else interval.low
        high = np.inf if interval.high is None else interval.high
        assert says == (low > 0 or high < 0), seed


def test_log_hazard_ratio_is_near_that_of_exponential_times(rng: np.random.Generator) -> None:
    fast, slow = rng.exponential(1.0, 4_000), rng.exponential(1.3, 4_000)
    none = np.zeros(4_000, dtype=bool)
    estimate, error = st.log_hazard_ratio((fast, none), (slow, none))
    assert abs(estimate - math.log(1.3)) < 4 * error
    with pytest.raises(UndefinedError, match="no event came"):
        st.log_hazard_ratio((fast, ~none), (slow, ~none))


def test_log_rank_of_arms_that_leave_nothing_to_compare_says_so() -> None:
    alone = np.array([300.0]), np.array([False])
    with pytest.raises(UndefinedError, match="no event came while both arms had runs left"):
        st.log_rank(alone, alone)


def test_t_interval_of_nearly_equal_values_is_told_without_a_warning() -> None:
    values = 1 + 1e-15 * np.arange(5)
    interval = st.t_interval(values)
    assert interval.low < values.mean() < interval.high
