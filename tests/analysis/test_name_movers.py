"""Choosing heads by their direct effect: what is found, and how often noise is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from statsmodels.stats.multitest import multipletests

from allostasis.analysis import statistics
from allostasis.analysis.name_movers import NameMovers, select_name_movers


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


def one_each(n: int) -> list[str]:
    return [f"c{i}" for i in range(n)]


def choose(effects: np.ndarray, clusters: list[str] | None = None, **settings) -> NameMovers:
    clusters = one_each(len(effects)) if clusters is None else clusters
    return select_name_movers(effects, clusters, rng=np.random.default_rng(7), **settings)


# ---------------------------------------------------------------- what is found


def test_planted_heads_are_found_largest_first_and_negative_ones_never(rng) -> None:
    effects = rng.normal(0, 0.5, (100, 12, 12))
    for (layer, head), size in {(9, 9): 1.5, (9, 6): 1.0, (10, 0): 0.6, (8, 1): 0.4}.items():
        effects[:, layer, head] += size
    effects[:, 10, 7] -= 2.0
    found = choose(effects)
    assert found.heads == [(9, 9), (9, 6), (10, 0)]
    assert choose(effects, k=9).heads == [(9, 9), (9, 6), (10, 0), (8, 1)]
    assert found.q.shape == (12, 12)
    assert found.q[10, 7] == 1.0


def test_one_head_alone_can_pass_among_all_heads_of_a_large_model(rng) -> None:
    effects = rng.normal(size=(60, 24, 16))
    effects[:, 3, 5] += 4
    assert choose(effects).heads == [(3, 5)]


def test_equal_effects_pass_if_they_are_positive() -> None:
    effects = np.zeros((8, 1, 4))
    effects[:, 0, 1], effects[:, 0, 2] = 0.1, -0.1
    effects[:, 0, 3] = [1, -1] * 4
    assert choose(effects).heads == [(0, 1)]


def test_nothing_is_chosen_where_nothing_passes(rng) -> None:
    found = choose(rng.normal(-0.2, 1, (50, 3, 4)))
    assert found.heads == []
    assert (found.q > 0.01).all()


# ---------------------------------------------------------------- p and q


def test_p_of_normal_effects_is_students(rng) -> None:
    ours, students = [], []
    for _ in range(100):
        effects = rng.normal(0.2, 1, (60, 1, 1))
        ours.append(choose(effects, draws=2_000).q[0, 0])
        students.append(statistics.t_above(effects[:, 0, 0], 0.0))
    assert_allclose(ours, students, atol=0.05)  # a sample's own skewness moves a single p
    assert_allclose(np.mean(ours), np.mean(students), rtol=0.05)


def test_q_is_the_correction_of_every_heads_own_p(rng) -> None:
    effects = rng.normal(0.2, 1, (40, 3, 5))
    single = [choose(effects[:, i : i + 1, j : j + 1], draws=4_000).q[0, 0]
              for i in range(3) for j in range(5)]  # fmt: skip
    expected = multipletests(single, method="fdr_bh")[1].reshape(3, 5)
    assert_allclose(choose(effects, draws=4_000).q, expected, rtol=1e-12)


def test_copies_of_an_example_add_no_evidence(rng) -> None:
    effects = rng.normal(0.3, 1, (40, 2, 3))
    copied = [name for name in one_each(40) for _ in range(5)]
    more = choose(effects.repeat(5, axis=0), copied)
    assert_allclose(more.q, choose(effects).q, rtol=1e-12)


def test_clusters_weigh_the_same_whatever_their_size() -> None:
    effects = np.array([-1.0] * 10 + [1.0, 1.1, 0.9, 1.0])[:, None, None]
    clusters = ["large"] * 10 + ["a", "b", "c", "d"]
    assert effects.mean() < 0
    assert choose(effects, clusters).q[0, 0] < 0.5


def test_the_choice_is_the_same_for_the_same_generator_and_unmoved_by_order(rng) -> None:
    effects = rng.normal(0.2, 1, (30, 2, 3))
    assert_allclose(choose(effects).q, choose(effects).q, rtol=0)
    other = select_name_movers(effects, one_each(30), rng=np.random.default_rng(8))
    assert not np.array_equal(other.q, choose(effects).q)


def test_clusters_that_do_not_fit_are_refused(rng) -> None:
    effects = rng.normal(size=(4, 1, 1))
    with pytest.raises(ValueError, match="3 clusters for 4 examples"):
        choose(effects, one_each(3))
    with pytest.raises(ValueError, match="all 4 examples are of cluster c; a test needs two"):
        choose(effects, ["c"] * 4)


# ---------------------------------------------------------------- how often noise is chosen


@pytest.fixture(params=[400, pytest.param(4_000, marks=pytest.mark.slow)], ids=["smoke", "full"])
def sets(request: pytest.FixtureRequest) -> int:
    return request.param


def most(share: float, sets: int) -> float:
    """What a share may come to in so many simulated sets, by three standard errors."""
    return share + 3 * math.sqrt(share * (1 - share) / sets)


def test_noise_is_chosen_in_at_most_six_percent_at_a_level_of_five(rng, sets: int) -> None:
    hits = 0
    for _ in range(sets):
        effects = rng.normal(size=(50, 4, 5)) + rng.normal(size=(50, 1, 1))  # heads correlate
        hits += bool(select_name_movers(effects, one_each(50), rng=rng, q=0.05, draws=400).heads)
    assert hits / sets <= most(0.05, sets)


def test_effects_of_chosen_heads_are_claimed_as_often_as_chance_only_on_other_prompts(
    rng, sets: int
) -> None:
    on_others = on_the_same = 0
    for _ in range(sets):
        discovery, evaluation = rng.normal(size=(2, 40, 5, 6))
        for head in select_name_movers(
            discovery, one_each(40), rng=rng, q=0.99, draws=200, k=1
        ).heads:
            on_others += statistics.t_above(evaluation[:, *head], 0.0) < 0.05
            on_the_same += statistics.t_above(discovery[:, *head], 0.0) < 0.05
    assert on_others / sets <= most(0.05, sets)
    assert on_the_same / sets > 0.5
