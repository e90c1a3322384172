"""Clusters of prompts as units: how prompts add up, what decides, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from allostasis.analysis import claim_files, clusters, estimands, measures, prompts, summaries
from allostasis.analysis import statistics as st
from allostasis.analysis.aggregate import Arm, Sample
from allostasis.analysis.claims import Claim, ClaimError
from allostasis.analysis.curves import UndefinedError

ARM = Arm("ioi", "critical", "abc", "cpu", runs=(), left_out={})
STUDIES = Path(__file__).parents[2] / "experiments"

ATOM = """
- id: X1
  source: own
  text: "it is repaired"
  estimand: {summary: self_repair, of: ratio_of_sums, unit: cluster}
  arms: {treatment: critical}
  select: {ablation: zero, set: all}
  direction: greater
  bound: 0.8
  test: t
  family: x
  status: own
"""


def claim(**changes: object) -> Claim:
    (read,) = claim_files.read(ATOM, origin="claims.yaml")
    return Claim.model_validate(read.model_dump(exclude_none=True) | changes)


def sample(num: np.ndarray, den: np.ndarray | None = None, templates: int = 1) -> Sample:
    names = tuple(f"t{i % templates}:A{i}|B{i}" for i in range(len(num)))
    return Sample(ARM, names, ("run",), num, np.zeros(len(num), dtype=bool), den, unit="cluster")


def table(rows: list[tuple[str, int, int, float]], intervention: str = "zero:0.0") -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["cluster", "seed", "example", "value"])
    return frame.assign(intervention=intervention)


# ---------------------------------------------------------------- adding up


def test_a_cluster_that_two_seeds_drew_counts_once() -> None:
    rows = table([("t0:A|B", 0, 0, 1.0), ("t0:A|B", 1, 5, 3.0), ("t1:A|C", 1, 6, 10.0)])
    totals = clusters.add_up(rows, rows["value"].to_numpy())
    assert totals.names == ("t0:A|B", "t1:A|C")
    assert totals.means.tolist() == [2.0, 10.0]  # each cluster weighs the same in a mean
    assert totals.n_prompts == 3


def test_interventions_of_one_kind_are_averaged_in_each_prompt_first() -> None:
    # prompt 0 saw three random sets, prompt 1 saw one: each prompt weighs the same
    rows = pd.concat([
        table([("t0:A|B", 0, 0, value)], f"zero:0.{i}") for i, value in enumerate([0.0, 3.0, 6.0])
    ] + [table([("t0:A|B", 0, 1, 9.0)], "zero:0.0")])  # fmt: skip
    totals = clusters.add_up(rows, rows["value"].to_numpy())
    assert totals.means.tolist() == [6.0]  # (3 + 9) / 2
    pair = clusters.add_up(rows, (rows["value"].to_numpy(), np.full(4, 2.0)))
    assert (pair.numerators.tolist(), pair.denominators.tolist()) == ([12.0], [4.0])


def test_prompts_without_a_value_are_left_out_and_counted() -> None:
    rows = table([("t0:A|B", 0, 0, np.nan), ("t1:A|C", 0, 1, 2.0)])
    totals = clusters.add_up(rows, rows["value"].to_numpy())
    assert (totals.names, totals.n_prompts, totals.n_left_out) == (("t1:A|C",), 1, 1)
    with pytest.raises(UndefinedError, match="no prompt has a value"):
        clusters.add_up(rows, np.full(2, np.nan))


@pytest.mark.parametrize(("layers", "first"), [(12, 10), (6, 5), (24, 20), (30, 25), (36, 30)])
def test_late_depths_are_10_to_12_of_12(layers: int, first: int) -> None:
    assert list(clusters.late_depths(layers)) == list(range(first, layers + 1))


def test_ratio_of_sums_on_a_planted_mixture_has_the_sign_that_clipping_turns() -> None:
    # many prompts with a tiny drop and a ratio clipped to 1, few with a large one and a loss
    drop = np.array([0.01] * 40 + [2.0] * 20)
    repaired = np.array([0.05] * 40 + [-0.4] * 20)
    found = estimands.ratio_of_sums(repaired, drop, np.random.default_rng(0))
    clipped = np.clip(repaired / drop, 0, 1).mean()
    assert found.estimate == pytest.approx(-6.0 / 40.4)
    assert clipped > 0.3


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("n", "method"), [(99, "Fieller"), (100, "BCa, 9999 resamples")])
def test_ratios_take_fieller_below_100_clusters_and_bca_from_there(n: int, method: str) -> None:
    rng = np.random.default_rng(1)
    drop = rng.lognormal(0, 0.5, n)
    found = measures.infer(claim(), sample(0.3 * drop + rng.normal(0, 0.2, n), drop))
    assert found.interval(0.95).method == method
    assert ("Fieller interval" in found.beside) == (n >= 100)


def test_the_fast_bootstrap_is_the_slow_one_with_other_draws() -> None:
    rng = np.random.default_rng(9)
    drop = rng.lognormal(0, 0.5, 120)
    repaired = 0.3 * drop + rng.normal(0, 0.3, 120)
    fast = st.RatioBootstrap(repaired, drop)
    slow = estimands.ratio_of_sums(repaired, drop, rng)
    assert fast.estimate == slow.estimate == repaired.sum() / drop.sum()
    left, right = fast.interval(0.95), slow.interval(0.95)
    for a, b in ((left.low, right.low), (left.high, right.high)):
        assert a == pytest.approx(b, abs=0.003)  # three Monte Carlo errors of a limit
    assert fast.p_above(0.25) == pytest.approx(slow.above(0.25), abs=0.01)
    of_mean = st.RatioBootstrap(repaired, np.ones(120)).interval(0.95)
    t = st.t_interval(repaired)
    assert of_mean.low == pytest.approx(t.low, abs=0.01)


def test_bca_covers_a_ratio_of_sums_over_100_lognormal_clusters() -> None:
    rng, held, sets = np.random.default_rng(10), 0, 250
    for _ in range(sets):
        size = rng.lognormal(0, 0.5, 100)
        interval = st.RatioBootstrap(0.3 * size + rng.normal(0, 0.3, 100) * size, size).interval()
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 0.3 <= interval.high
    assert held / sets == pytest.approx(0.95, abs=0.02 + 3 * np.sqrt(0.95 * 0.05 / sets))


def test_beyond_all_resamples_p_falls_on_with_the_distance() -> None:
    boot = st.RatioBootstrap(np.random.default_rng(11).normal(1, 0.1, 100), np.ones(100))
    near, nearer, far = (boot.p_above(bound) for bound in (0.95, 0.953, 0.8))
    assert near < nearer < 1e-4  # 10,000 resamples alone would stop there
    assert (far, 1 - boot.p_above(1.2)) == pytest.approx((1e-9, 1e-9))


def test_the_logarithm_of_a_ratio_has_the_ratios_tests_and_limits() -> None:
    rng = np.random.default_rng(2)
    null = rng.uniform(280, 320, 40)
    now = null * np.exp(rng.normal(0.02, 0.03, 40))
    ratio = estimands.ratio_of_sums(now, null, rng)
    logs = estimands.log_ratio_of_sums(now, null, rng)
    assert logs.estimate == pytest.approx(np.log(now.sum() / null.sum()))
    assert logs.above(0.0) == ratio.above(1.0)
    assert logs.interval(0.95).low == pytest.approx(np.log(ratio.interval(0.95).low or 0))
    with pytest.raises(UndefinedError, match="not positive"):
        estimands.log_ratio_of_sums(-now, null, rng)


def test_templates_resampled_too_give_the_wider_interval_where_templates_differ() -> None:
    rng = np.random.default_rng(3)
    names = np.repeat([f"t{i}" for i in range(8)], 20)
    values = np.repeat(rng.normal(0, 1, 8), 20) + rng.normal(0, 0.3, 160)
    nested = st.nested_interval(values, np.ones(160), names, rng)
    of_means = stats.sem(values.reshape(8, 20).mean(axis=1)) * np.sqrt(7 / 8)
    assert nested.low is not None
    assert nested.high is not None
    assert nested.high - nested.low == pytest.approx(2 * 1.96 * of_means, rel=0.15)
    plain = st.t_interval(values)
    assert plain.low is not None
    assert plain.high is not None
    assert nested.high - nested.low > 2 * (plain.high - plain.low)


def test_eight_templates_are_resampled_beside_the_verdicts_interval_and_seven_are_not() -> None:
    rng = np.random.default_rng(4)
    drop = rng.lognormal(0, 0.3, 56)
    for count, is_there in ((8, True), (7, False)):
        beside = measures.infer(claim(), sample(0.3 * drop + 0.01, drop, templates=count)).beside
        assert (f"{count} templates resampled too" in beside) == is_there


def test_a_share_of_a_sum_whose_interval_holds_0_is_undefined() -> None:
    rng = np.random.default_rng(5)
    with pytest.raises(UndefinedError, match="denominator's 95% interval contains 0"):
        measures.infer(claim(), sample(rng.normal(0, 1, 40), rng.normal(0, 1, 40)))


# ---------------------------------------------------------------- every late depth


def depths(*means: float) -> dict[str, Sample]:
    rng = np.random.default_rng(6)
    clean = rng.uniform(280, 320, 50)
    noise = rng.normal(0, 0.01, 50)
    return {f"depth {i}": sample(clean * (m + noise), clean) for i, m in enumerate(means)}


@pytest.mark.parametrize(
    ("means", "weakest", "supports", "refutes"),
    [
        ((1.4, 1.5, 1.35), "depth 2", True, False),
        ((1.4, 1.2, 1.5), "depth 1", False, True),
        ((1.4, 1.3, 1.5), "depth 1", False, False),
        ((0.98, 0.99, 0.97), "depth 2", False, True),
    ],
)
def test_the_weakest_depth_decides(
    means: tuple[float, ...], weakest: str, supports: bool, refutes: bool
) -> None:
    found = measures.measure(claim(bound=1.3), depths(*means))
    assert found.inference.beside["weakest"] == f"{weakest}, which decides"
    assert found.inference.estimate == pytest.approx(min(means), abs=0.005)
    assert (found.p_support < 0.025) == supports
    assert (found.p_refute < 0.025) == refutes


def test_the_weakest_of_depths_far_beyond_all_resamples_is_told_by_its_distance() -> None:
    rng = np.random.default_rng(12)
    clean = rng.uniform(280, 320, 150)
    parts = {
        f"depth {i}": sample(clean * (m + rng.normal(0, 0.01, 150)), clean)
        for i, m in enumerate((0.99, 0.95, 0.98))
    }
    found = measures.measure(claim(bound=1.3), parts)
    assert found.inference.beside["weakest"] == "depth 1, which decides"
    assert found.inference.estimate == pytest.approx(0.95, abs=0.005)


def test_a_refutation_by_any_of_several_depths_is_corrected_and_support_is_not() -> None:
    parts = depths(1.302, 1.302, 1.302)
    alone = measures.measure(claim(bound=1.3), {"depth 0": parts["depth 0"]})
    together = measures.measure(claim(bound=1.3), parts)
    assert together.p_support == pytest.approx(alone.p_support)
    assert together.p_refute == pytest.approx(min(1.0, 3 * alone.p_refute))


@pytest.mark.slow
def test_under_a_null_at_every_depth_neither_verdict_comes_more_often_than_its_level() -> None:
    rng, at = np.random.default_rng(7), {"support": 0, "refute": 0}
    for _ in range(250):
        clean = rng.uniform(280, 320, 30)
        parts = {
            f"depth {i}": sample(clean * (1.3 + rng.normal(0, 0.02, 30)), clean) for i in range(3)
        }
        found = measures.measure(claim(bound=1.3), parts)
        at["support"] += found.p_support < 0.025
        at["refute"] += found.p_refute < 0.025
    assert at["support"] / 250 <= 0.035
    assert at["refute"] / 250 <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 250)


def test_a_band_at_every_depth_is_left_where_one_depth_leaves_it() -> None:
    band = {"direction": "inside", "bound": (0.9, 1.1), "test": "tost"}
    inside = measures.measure(claim(**band), depths(0.98, 1.0, 1.02))
    assert inside.p_support < 1e-10
    left = measures.measure(claim(**band), depths(0.98, 1.2, 1.02))
    assert left.p_support > 0.9
    assert left.p_refute < 1e-10
    assert left.inference.beside["weakest"] == "depth 1, which decides"


@pytest.mark.parametrize(("share", "word"), [(0.9, "for"), (0.65, "open"), (0.3, "against")])
def test_between_the_bound_and_refuted_at_a_claim_stays_open(share: float, word: str) -> None:
    rng = np.random.default_rng(8)
    repair = rng.lognormal(0, 0.3, 80)
    parts = {"": sample(share * repair + rng.normal(0, 0.05, 80), repair)}
    found = measures.measure(claim(refuted_at=0.5), parts)
    assert (found.p_support < 0.025) == (word == "for")
    assert (found.p_refute < 0.025) == (word == "against")
    assert measures.measure(claim(), parts).p_refute < 0.025 or word == "for"


# ---------------------------------------------------------------- the schema


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unit: cluster", "unit: seed", "summary 'self_repair' reads prompts, which is not unit"),
        ("summary: self_repair", "summary: final", "reads a run, which is not unit: cluster"),
        ("of: ratio_of_sums", "of: log_ratio", "of: log_ratio does not fit unit: cluster"),
        ("critical}", "critical, control: baseline}", "unit: cluster takes one arm"),
        (", set: all", "", "unit: cluster needs `select: {ablation: ..., set: ...}`"),
        ("set: all", "set: all, depth: late", "reads no depths and takes no"),
        ("summary: self_repair", "summary: norm_ratio(end)", "needs `select: {depth: ...}`"),
        ("set: all", "set: some", "select.set='some': Input should be 'single'"),
        ("  test: t", "  test: t\n  refuted_at: 0.9", "lies on the side that supports the claim"),
    ],
)
def test_a_wrong_claim_about_clusters_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ClaimError) as caught:
        claim_files.read(ATOM.replace(old, new), origin="claims.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted(STUDIES.rglob("claims.json")), ids=lambda p: p.parent.name)
def test_claims_frozen_by_recorded_studies_keep_their_bytes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    there = [Claim.model_validate(content) for content in json.loads(text)]
    frozen = claim_files.freeze(there)
    assert frozen["text"] == text
    run = json.loads(path.with_name("run.json").read_text(encoding="utf-8"))
    assert run["claims"] == frozen["hashes"]


def test_a_field_that_is_not_set_is_not_frozen() -> None:
    (content,) = json.loads(claim_files.freeze([claim()])["text"])
    assert "refuted_at" not in content
    assert content["select"] == {"ablation": "zero", "set": "all"}
    assert "refuted_at" in claim_files.freeze([claim(refuted_at=0.5)])["text"]


def test_every_summary_of_prompts_names_its_table() -> None:
    words = {"mean_of": "(a)", "share_above": "(a, 1)"}
    words |= dict.fromkeys(("difference_of", "gap_of", "ratio_of"), "(a, b)")
    words |= {"excess_of": "(a, b, 3)"}
    words |= dict.fromkeys(("norm_ratio", "norm_excess"), "(end)")
    found = {
        name: summaries.parse(name + words.get(name, "")).prompts
        for name in summaries.functions()
        if hasattr(prompts, name)
    }
    assert found == {
        "total_effect": "examples", "effect_over_clean": "examples", "self_repair": "examples",
        "amplitude_share": "examples", "exchange_rate": "examples", "norm_ratio": "depths",
        "norm_excess": "depths", "head_variance": "examples", "stream_variance": "examples",
        "logit_diff_change": "examples", "interaction": "examples", "recovery": "examples",
        "direct_effect": "examples", "hedge_shift": "examples", "patch_asymmetry": "examples",
        "patch_recovery": "examples", "mean_of": "examples", "share_above": "examples",
        "difference_of": "examples", "gap_of": "examples", "ratio_of": "examples",
        "excess_of": "examples",
    }  # fmt: skip


def test_kappa_is_over_prompts_that_lead_before_and_after() -> None:
    rows = pd.DataFrame({
        "log_margin": [0.0, np.nan, -1.0], "log_margin_clean": [1.0, 1.0, np.nan],
        "log_amplitude": [3.1, 3.1, 3.1], "log_amplitude_clean": [3.0, 3.0, 3.0],
        "log_alignment": [-3.1, np.nan, -4.1], "log_alignment_clean": [-2.0, -2.0, np.nan],
    })  # fmt: skip
    lost, gained = prompts.exchange_rate(rows)
    assert lost.tolist() == pytest.approx([-0.1, np.nan, np.nan], nan_ok=True)
    assert gained.tolist() == pytest.approx([-1.1, np.nan, np.nan], nan_ok=True)
    with pytest.raises(UndefinedError, match="phi_scale was not recorded"):
        prompts.amplitude_share(rows)


def test_an_excess_over_a_multiple_holds_where_a_ratio_turns_negative() -> None:
    """Members gain 5 logits and siblings lose 1: a ratio of -5 would refute "three times"."""
    rows = pd.DataFrame({"shift": [5.0, 6.0, np.nan], "shift_siblings": [-1.0, 2.5, 1.0]})
    values, counts = prompts.excess_of(rows, "shift", "shift_siblings", "3")
    assert values.tolist() == pytest.approx([8.0, -1.5, np.nan], nan_ok=True)
    assert counts.tolist() == pytest.approx([1.0, 1.0, np.nan], nan_ok=True)
