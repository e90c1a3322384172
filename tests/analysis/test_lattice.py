"""Exact nulls, interactions and recoveries of sets of heads, by hand and by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allostasis.analysis import lattice

A, B, C = (0, 1), (0, 2), (0, 3)


@pytest.mark.parametrize(("n", "size"), [(9, 129), (12, 298), (16, 696)])
def test_a_lattice_has_all_heads_pairs_and_triples(n: int, size: int) -> None:
    sets = lattice.lattice([(0, head) for head in range(n)])
    assert len(sets) == len(set(sets)) == size == n + math.comb(n, 2) + math.comb(n, 3)


def test_lattice_null_has_exactly_the_right_members() -> None:
    """Trap 8: all sets of the same size in the layer, and nothing else."""
    sets = lattice.lattice([(0, h) for h in range(5)]) + lattice.lattice([(1, h) for h in range(5)])
    null = lattice.null_of(((0, 1), (0, 3)), sets)
    assert sorted(null) == [((0, a), (0, b)) for a, b in itertools.combinations(range(5), 2)]
    with pytest.raises(ValueError, match=r"the set 0\.1\+1\.3 was not measured"):
        lattice.null_of(((0, 1), (1, 3)), sets)


def test_the_largest_of_a_null_has_p_one_over_its_size_and_ties_count_half() -> None:
    ten = np.arange(10.0).tolist()
    assert lattice.rank(9.0, ten) == 0.1
    assert lattice.rank(0.0, ten) == 1.0
    assert lattice.rank(1.0, [1.0, 1.0, 0.0]) == pytest.approx((0 + 0.5 + 1) / 3)


def test_a_pair_interacts_by_what_it_does_beyond_its_heads() -> None:
    v = {(A,): 1.0, (B,): 2.0, (A, B): 5.0}
    assert lattice.interaction(v, (A, B)) == 5 - 1 - 2


def test_a_triple_interacts_by_the_moebius_inverse() -> None:
    v = {(A,): 1.0, (B,): 2.0, (C,): 4.0, (A, B): 3.5, (A, C): 5.0, (B, C): 7.0, (A, B, C): 9.0}
    assert lattice.interaction(v, (A, B, C)) == 9 - (3.5 + 5 + 7) + (1 + 2 + 4)


numbers = st.integers(-100, 100).map(lambda n: n / 8)


@given(st.lists(numbers, min_size=7, max_size=7))
def test_effects_are_the_sums_of_the_interactions_below_them(values: list[float]) -> None:
    sets = lattice.lattice([A, B, C])
    interactions = dict(zip(sets, values, strict=True))
    v = {s: sum(interactions[t] for t in lattice.parts_of(s)) for s in sets}
    for heads in sets:
        assert lattice.interaction(v, heads) == pytest.approx(interactions[heads])


def test_restoring_is_the_set_less_the_head() -> None:
    whole, rest = np.array([4.0, 2.0]), np.array([1.0, 1.0])
    v = {(A, B): whole, (B,): rest}
    above, below = lattice.recovery(v, (A, B), A)
    np.testing.assert_allclose(above / below, (rest - whole) / -whole)
    above, below = lattice.recovery({(A,): whole}, (A,), A)  # nothing is left to take away
    np.testing.assert_allclose(above / below, 1)
