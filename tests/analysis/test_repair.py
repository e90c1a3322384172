"""Self-repair and its attribution against closed forms, brute force and published numbers."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from allostasis.analysis import repair, statistics
from allostasis.analysis.curves import UndefinedError

PLAYERS = ("own", "routing", "content", "mlps", "scale")


def contrast(seed: int, n: int = 6) -> dict[str, np.ndarray]:
    """Two runs in which nothing is additive or alike, logits of ordinary size."""
    rng = np.random.default_rng(seed)
    return {
        "attention": rng.normal(0, 20, (n, 2, 2, 2)),
        "mlps": rng.normal(0, 20, (n, 2)),
        "rest": rng.normal(0, 10, n),
        "scale": rng.uniform(0.5, 9, (n, 2)),
        "constant": rng.normal(0, 1, n),
    }


def additive(own: np.ndarray, others: np.ndarray, **other: np.ndarray) -> dict[str, np.ndarray]:
    """Two runs whose own write stands beside the other heads' [routing, content]."""
    return {"attention": own[:, :, None, None] + others[:, None], **other}


def logit_difference(runs: dict[str, np.ndarray], example: int, chosen: set[str]) -> float:
    """What the model would say with the chosen players intervened, one example in plain numbers."""
    own, routing, content, mlps, scale = (int(player in chosen) for player in PLAYERS)
    numerator = runs["attention"][example][own][routing][content]
    numerator += runs["mlps"][example][mlps] + runs["rest"][example]
    return numerator / runs["scale"][example][scale] + runs["constant"][example]


def total_effect(runs: dict[str, np.ndarray]) -> np.ndarray:
    none, every = set(), set(PLAYERS)
    return np.array([
        logit_difference(runs, i, every) - logit_difference(runs, i, none)
        for i in range(len(runs["rest"]))
    ])


# ---------------------------------------------------------------- Shapley values


@given(seed=st.integers(0, 10_000))
def test_shapley_values_add_up_to_the_total_effect(seed: int) -> None:
    runs = contrast(seed)
    phi = repair.shapley(**runs)
    assert list(phi) == [f"phi_{player}" for player in PLAYERS]
    assert_allclose(sum(phi.values()), total_effect(runs), rtol=0, atol=1e-10)


def test_shapley_values_are_the_mean_over_all_orders_of_joining() -> None:
    runs = contrast(3, n=4)
    expected = {player: np.zeros(4) for player in PLAYERS}
    orders = list(permutations(PLAYERS))
    for order in orders:
        for example in range(4):
            joined: set[str] = set()
            for player in order:
                before = logit_difference(runs, example, joined)
                joined.add(player)
                gain = logit_difference(runs, example, joined) - before
                expected[player][example] += gain / len(orders)
    phi = repair.shapley(**runs)
    for player in PLAYERS:
        assert_allclose(phi[f"phi_{player}"], expected[player], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("player", "name", "axis"),
    [("own", "attention", 1), ("routing", "attention", 2), ("content", "attention", 3),
     ("mlps", "mlps", 1), ("scale", "scale", 1)],
)  # fmt: skip
def test_a_player_that_is_the_same_in_both_runs_has_exactly_nothing(
    player: str, name: str, axis: int
) -> None:
    runs = contrast(5)
    runs[name] = runs[name].take([0, 0], axis=axis)
    phi = repair.shapley(**runs)
    assert_array_equal(phi.pop(f"phi_{player}"), 0.0)
    assert all((value != 0).all() for value in phi.values())
    assert_array_equal(repair.in_order(repair.SCALE_FIRST, **runs)[player], 0.0)


def test_players_that_do_the_same_have_the_same_value() -> None:
    runs = contrast(7)
    # patterns and values may be swapped without a change
    runs["attention"] += runs["attention"].swapaxes(2, 3).copy()
    phi = repair.shapley(**runs)
    assert_allclose(phi["phi_routing"], phi["phi_content"], atol=1e-12)


def test_float32_input_is_evaluated_in_float64() -> None:
    runs = {name: value.astype(np.float32) for name, value in contrast(2).items()}
    exact = {name: value.astype(np.float64) for name, value in runs.items()}
    assert_array_equal(repair.shapley(**runs)["phi_scale"], repair.shapley(**exact)["phi_scale"])


# ---------------------------------------------------------------- orders and the residual method


def circuit(seed: int = 11, n: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "own": rng.normal(0, 5, (n, 2)),
        "others": rng.normal(0, 5, (n, 2, 2)),
        "mlps": rng.normal(0, 5, (n, 2)),
        "rest": rng.normal(0, 5, n),
        "scale": rng.uniform(0.5, 4, (n, 2)),
        "constant": np.zeros(n),
    }


def by_residual(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The residual method on the direct effects of a circuit, at the clean scale."""
    clean = parts["scale"][:, 0]
    return repair.residual_shares(
        total_effect=total_effect(additive(**parts)),
        own=(parts["own"][:, 1] - parts["own"][:, 0]) / clean,
        heads=(parts["others"][:, 1, 1] - parts["others"][:, 0, 0]) / clean,
        mlps=(parts["mlps"][:, 1] - parts["mlps"][:, 0]) / clean,
    )


def test_the_order_with_the_scale_last_is_the_residual_method() -> None:
    parts = circuit()
    added = repair.in_order(repair.SCALE_LAST, **additive(**parts))
    shares = by_residual(parts)
    assert_allclose(added["own"], -shares["drop"], atol=1e-10)
    assert_allclose(added["routing"] + added["content"], shares["sr_heads"], atol=1e-10)
    assert_allclose(added["mlps"], shares["sr_mlps"], atol=1e-10)
    assert_allclose(added["scale"], shares["sr_scale"], atol=1e-10)


def test_the_scale_first_multiplies_the_clean_logit_difference() -> None:
    parts = circuit()
    added = repair.in_order(repair.SCALE_FIRST, **additive(**parts))
    clean = parts["own"][:, 0] + parts["others"][:, 0, 0] + parts["mlps"][:, 0] + parts["rest"]
    before, after = parts["scale"].T
    assert_allclose(added["scale"], (before / after - 1) * clean / before, atol=1e-10)
    assert_allclose(added["own"], (parts["own"][:, 1] - parts["own"][:, 0]) / after, atol=1e-10)


def test_total_effect_without_biases_is_the_published_identity() -> None:
    parts = circuit()
    runs, shares = additive(**parts), by_residual(parts)
    clean = np.array([logit_difference(runs, i, set()) for i in range(9)])
    ratio = parts["scale"][:, 0] / parts["scale"][:, 1]
    changes = shares["sr_heads"] + shares["sr_mlps"] - shares["drop"]
    assert_allclose(total_effect(runs), (ratio - 1) * clean + ratio * changes, atol=1e-10)


def test_every_order_adds_up_and_the_shapley_value_lies_within_their_range() -> None:
    runs = contrast(13)
    every = [repair.in_order(order, **runs) for order in permutations(PLAYERS)]
    for added in every:
        assert_allclose(sum(added.values()), total_effect(runs), atol=1e-10)
    for player in PLAYERS:
        values = np.array([added[player] for added in every])
        assert_allclose(repair.shapley(**runs)[f"phi_{player}"], values.mean(axis=0), atol=1e-10)


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"order own, scale: .* own, routing, content, mlps, scale"
    ):
        repair.in_order(("own", "scale"), **contrast(0))


@pytest.mark.parametrize("clean", [1.5, 3.56, 8.0], ids=lambda x: f"LD={x}")
def test_published_head_of_gpt2_small_is_reproduced_whatever_its_logit_difference(
    clean: float,
) -> None:
    # GPT-2 small, 9.9: DE 1.700 -> -0.002, LD -0.231, self-repair 1.471 = 1.109 + 1.017 - 0.655
    after = clean + 1.017 - 0.655 - 1.702
    runs = additive(
        own=np.array([[1.700, -0.002]]),
        others=np.array([[[0.0, 0.4], [0.3, 1.017]]]),
        mlps=np.array([[0.0, -0.655]]),
        rest=np.array([clean - 1.700]),
        scale=np.array([[1.0, after / (clean - 0.231)]]),
        constant=np.zeros(1),
    )
    assert_allclose(total_effect(runs), -0.231, atol=1e-12)
    shares = repair.residual_shares(
        total_effect=total_effect(runs), own=np.array([-1.702]), heads=np.array([1.017]),
        mlps=np.array([-0.655]),
    )  # fmt: skip
    found = {name: float(value[0]) for name, value in shares.items()}
    published = {
        "drop": 1.702, "sr": 1.471, "sr_heads": 1.017, "sr_mlps": -0.655, "sr_scale": 1.109,
    }  # fmt: skip
    assert found == pytest.approx(published, abs=1e-12)
    added = repair.in_order(repair.SCALE_LAST, **runs)
    assert added["scale"][0] == pytest.approx(1.109, abs=1e-12)


# ---------------------------------------------------------------- shares


def test_both_splits_add_up_to_self_repair() -> None:
    parts = circuit()
    shares, phi = by_residual(parts), repair.shapley(**additive(**parts))
    residual = shares["sr_heads"] + shares["sr_mlps"] + shares["sr_scale"]
    assert_allclose(residual, shares["sr"], atol=1e-12)
    split = repair.shapley_shares(phi, drop=shares["drop"])
    assert_allclose(sum(split.values()), shares["sr"], atol=1e-10)


def test_without_a_final_norm_both_splits_agree_and_the_scale_has_none() -> None:
    parts = circuit() | {"scale": np.ones((9, 2))}
    shares, phi = by_residual(parts), repair.shapley(**additive(**parts))
    assert_array_equal(phi["phi_scale"], 0.0)
    split = repair.shapley_shares(phi, drop=shares["drop"])
    assert_allclose(split["heads"], shares["sr_heads"], atol=1e-10)
    assert_allclose(split["mlps"], shares["sr_mlps"], atol=1e-10)
    assert_allclose(split["scale"], 0.0, atol=1e-10)


def test_repair_shares_are_pairs_over_one_denominator_that_add_up_to_one() -> None:
    phi = repair.shapley(**contrast(17))
    shares = repair.repair_shares(phi)
    denominator = phi["phi_routing"] + phi["phi_content"] + phi["phi_mlps"] + phi["phi_scale"]
    for _, below in shares.values():
        assert_allclose(below, denominator, rtol=1e-12)
    assert repair.ratio_of_sums(*shares["A"]) == pytest.approx(
        phi["phi_scale"].sum() / denominator.sum()
    )
    assert sum(repair.ratio_of_sums(*pair) for pair in shares.values()) == pytest.approx(1.0)


def test_ratio_of_sums_on_a_planted_mixture() -> None:
    # in each of three kinds of example the ratio is exact: large drops lose more, small ones gain
    drop = np.repeat([2.0, 0.1, 0.05], [60, 20, 20])
    sr = drop * np.repeat([-0.184, 0.7, 1.0], [60, 20, 20])
    assert repair.ratio_of_sums(sr, drop) == pytest.approx(-0.16)
    assert np.clip(sr / drop, 0, 1).mean() == pytest.approx(0.34)


def test_a_ratio_of_nothing_is_undefined() -> None:
    with pytest.raises(UndefinedError, match="sum is 0"):
        repair.ratio_of_sums(np.ones(2), np.array([1.0, -1.0]))


# ---------------------------------------------------------------- the curve by percentile


def tokens(n: int = 400) -> dict[str, np.ndarray]:
    """Half of the direct effect is repaired in the top 2 %, more is lost elsewhere."""
    rng = np.random.default_rng(23)
    effect = rng.exponential(0.3, n)
    top = np.argsort(-effect)[: n // 50]
    effect[top] += 3
    sr = -0.1 * effect + rng.normal(0, 0.02, n)
    sr[top] = 0.5 * effect[top] + rng.normal(0, 0.02, len(top))
    return {"direct_effect": effect, "self_repair": sr, "drop": effect}


def test_the_curve_depends_on_the_selection_and_says_so_at_every_percent() -> None:
    data, rng = tokens(), np.random.default_rng(0)
    names = [f"c{i % 80}" for i in range(400)]
    curve = repair.percentile_curve(**data, clusters=names, rng=rng)
    assert [(p.percent, p.n) for p in curve] == [
        (1, 4), (2, 8), (5, 20), (10, 40), (25, 100), (50, 200), (100, 400),
    ]  # fmt: skip
    for point in curve:
        top = np.sort(data["direct_effect"])[-point.n :]
        chosen = data["direct_effect"] >= top.min()
        assert point.least == top.min()
        expected = float(data["self_repair"][chosen].sum() / data["drop"][chosen].sum())
        assert point.ratio == pytest.approx(expected)
        assert point.interval is not None
        low, high = point.interval.low, point.interval.high
        assert low is not None
        assert high is not None
        assert expected - 0.3 < low < expected < high < expected + 0.3
    assert curve[1].ratio == pytest.approx(0.5, abs=0.02)
    assert curve[-1].ratio < 0.05


def test_the_curves_interval_is_one_over_clusters() -> None:
    data = {name: np.repeat(column, 5) for name, column in tokens(30).items()}
    names = [f"c{i // 5}" for i in range(150)]
    rng = np.random.default_rng(0)
    (point,) = repair.percentile_curve(**data, clusters=names, rng=rng, percents=[100])
    single = tokens(30)
    expected = statistics.fieller(single["self_repair"], single["drop"])
    assert (point.n, point.n_clusters) == (150, 30)
    assert point.interval is not None
    assert_allclose(
        [point.interval.low, point.interval.high], [expected.low, expected.high], rtol=1e-9
    )


def test_a_point_of_one_cluster_has_a_ratio_and_no_interval() -> None:
    data, rng = tokens(50), np.random.default_rng(0)
    names = [f"c{i}" for i in range(50)]
    point, *_ = repair.percentile_curve(**data, clusters=names, rng=rng)
    assert (point.n, point.n_clusters, point.interval) == (1, 1, None)
    assert "one unit" in point.reason
    assert point.ratio == pytest.approx(0.5, abs=0.05)


def test_a_percentage_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="percent 0: allowed"):
        repair.percentile_curve(
            **tokens(50), clusters=["c"] * 50, rng=np.random.default_rng(0), percents=[0]
        )


def test_a_curve_of_no_examples_is_undefined() -> None:
    none = {name: column[:0] for name, column in tokens(1).items()}
    with pytest.raises(UndefinedError, match="no example"):
        repair.percentile_curve(**none, clusters=[], rng=np.random.default_rng(0))
