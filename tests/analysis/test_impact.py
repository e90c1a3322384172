"""Many interventions at once against one at a time, against scipy, and in a null simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from allostasis.analysis import impact
from allostasis.analysis.impact import Clustered, clustered
from allostasis.analysis.resampling import RatioBootstrap

RNG = np.random.default_rng


def _effects(n_units: int, n_clusters: int, *, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    rng = RNG(seed)
    sizes = rng.integers(1, 4, n_clusters)
    clusters = [f"c{i}" for i, size in enumerate(sizes) for _ in range(size)]
    return rng.normal(0.3, 1, (n_units, len(clusters))), clusters


def test_sums_by_cluster_are_those_of_a_loop() -> None:
    values, clusters = _effects(3, 5)
    found = clustered(values, clusters)
    for place, name in enumerate(sorted(set(clusters))):
        own = [i for i, cluster in enumerate(clusters) if cluster == name]
        np.testing.assert_allclose(found.sums[:, place], values[:, own].sum(1))
        assert found.sizes[place] == len(own)
    np.testing.assert_allclose(found.means, values.mean(axis=1))


def test_intervals_of_many_are_the_bca_of_each() -> None:
    found = clustered(*_effects(4, 60))
    low, high = impact.intervals(found)
    for index in range(4):
        alone = RatioBootstrap(found.sums[index], found.sizes).interval(0.95)
        assert low[index] == pytest.approx(alone.low, abs=1e-9)
        assert high[index] == pytest.approx(alone.high, abs=1e-9)


def test_of_few_equal_clusters_the_interval_is_students() -> None:
    values = RNG(1).normal(size=(2, 12))
    low, high = impact.intervals(clustered(values, [f"c{i}" for i in range(12)]))
    for index in range(2):
        ends = stats.t.interval(0.95, 11, values[index].mean(), stats.sem(values[index]))
        assert (low[index], high[index]) == pytest.approx(ends)


def test_without_a_spread_there_is_no_interval() -> None:
    low, high = impact.intervals(Clustered(np.ones((1, 60)), np.ones(60)))
    assert np.isnan([low, high]).all()


def test_sign_flips_are_scipys_exact_test() -> None:
    values = RNG(2).normal(0.4, 1, (3, 9))
    flips = impact.sign_flips(Clustered(values, np.ones(9)), RNG(0))
    for index in range(3):
        exact = stats.permutation_test(
            (values[index],), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert flips.p[index] == pytest.approx(exact.pvalue)
    assert (flips.p_max >= flips.p).all()


def test_random_sign_flips_come_near_the_exact_ones() -> None:
    values = RNG(3).normal(0.5, 1, (2, 18))
    near = impact.sign_flips(Clustered(values, np.ones(18)), RNG(0), draws=40_000).p
    for index in range(2):
        exact = stats.permutation_test(
            (values[index],), np.mean, permutation_type="samples", n_resamples=2**18
        ).pvalue
        assert near[index] == pytest.approx(exact, abs=0.01)


def test_percentiles_are_ranks_and_ties_count_half() -> None:
    np.testing.assert_allclose(impact.percentile(np.array([3.0, 1.0, 2.0])), [100, 0, 50])
    np.testing.assert_allclose(impact.percentile(np.ones(4)), 50)


def test_selecting_on_noise_and_testing_on_other_noise_claims_nothing() -> None:
    """Trap 16: the largest of 50 heads on train, tested on test, is false in 5 % of the cases."""
    claims = 0
    for seed in range(300):
        rng = RNG(seed)
        train, test = rng.normal(size=(2, 50, 12))
        chosen = train.mean(axis=1).argmax()
        p = impact.sign_flips(Clustered(test[chosen][None], np.ones(12)), rng).p[0]
        claims += p <= 0.05
    assert claims / 300 <= 0.06 + 1.64 * np.sqrt(0.05 * 0.95 / 300)
