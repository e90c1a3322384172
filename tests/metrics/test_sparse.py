"""Metrics of sparse autoencoders against closed forms, scikit-learn and their symmetries."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch.testing import assert_close

from allostasis.analysis.matching import (
    Matches,
    aurocs,
    best_threshold,
    csc_array,
    implied_parents,
    match_latents,
)
from allostasis.instrument import on_two_devices, read
from allostasis.metrics.base import Coding, Snapshot
from allostasis.metrics.explained_variance import ExplainedVariance, explained_variance
from allostasis.metrics.hierarchy_recovery import HierarchyRecovery
from allostasis.metrics.leakage import Leakage
from allostasis.metrics.mcc_truth import MccTruth
from allostasis.metrics.purity import Purity

SCORED = ("purity", "leakage", "feature_split", "absorption", "hierarchy_recovery")


def planted(
    m: int = 3, c: int = 2, n: int = 400, *, seed: int = 0, order: Any = None
) -> tuple[Snapshot, Matches]:
    """Codes that are the features, with some noise; both levels may be permuted."""
    rng = np.random.default_rng(seed)
    parents = rng.random((n, m)) < 0.4
    which = rng.integers(-1, c, (n, m))
    children = (which[..., None] == np.arange(c)) & parents[..., None]
    members = np.concatenate([parents, children.reshape(n, m * c)], axis=1)
    codes = members * rng.uniform(0.5, 1.5, members.shape)
    codes += (rng.random(members.shape) < 0.05) * rng.uniform(0, 0.6, members.shape)
    if order is not None:
        codes = codes[:, order]
    parent = (*[-1] * m, *np.repeat(np.arange(m), c).tolist())
    known = np.ones_like(members)
    half = n // 2
    matches = match_latents(codes[:half], members[:half], known[:half], parent=parent, n_parents=m)
    x = torch.from_numpy(codes[half:])
    coding = Coding(x=x, reconstruction=x / 2, codes=x, n_parents=m, parents_only=x / 4)
    truth = torch.eye(len(parent))
    snapshot = Snapshot(
        step=0, split="test", coding=coding, members=torch.from_numpy(members[half:]),
        known=torch.ones(half, len(parent), dtype=torch.bool), matches=matches,
        decoder=truth if order is None else truth[order], truth=truth, truth_parent=parent,
    )  # fmt: skip
    return snapshot, matches


def classes() -> dict[str, Any]:
    from allostasis.metrics.base import discover

    return discover()


# ---- explained variance


def coded(x: torch.Tensor, reconstruction: torch.Tensor) -> Snapshot:
    return Snapshot(step=0, coding=Coding(x=x, reconstruction=reconstruction, codes=x.clamp(min=0)))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_explained_variance_is_the_whole_sets_whatever_the_batches(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 7, generator=generator, dtype=torch.float64) + offset
    reconstruction = x + 0.3 * torch.randn(300, 7, generator=generator, dtype=torch.float64)
    centred = (x - offset).numpy()
    error = (reconstruction - x).square().sum().item()
    expected = 1 - error / (len(x) * centred.var(axis=0).sum())
    by_sklearn = r2_score(
        centred, (reconstruction - offset).numpy(), multioutput="variance_weighted"
    )
    assert expected == pytest.approx(by_sklearn, abs=1e-9)
    for sizes in ([300], [1, 299], [100, 100, 100], [7] * 42 + [6]):
        pairs = zip(x.split(sizes), reconstruction.split(sizes), strict=True)
        found = read(ExplainedVariance(), *(coded(*pair) for pair in pairs))
        assert found["", None, None, None] == pytest.approx(expected, abs=1e-9)
    assert explained_variance(x, reconstruction).item() == pytest.approx(expected, abs=1e-9)
    two = on_two_devices(
        ExplainedVariance, coded(x[:90], reconstruction[:90]), coded(x[90:], reconstruction[90:])
    )
    assert read(two)["", None, None, None] == pytest.approx(expected, abs=1e-9)


def test_explained_variance_is_one_for_the_rows_and_zero_for_their_mean() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)) + 10_000
    exact = read(ExplainedVariance(), coded(x, x))
    assert exact["", None, None, None] == 1.0
    mean = x.double().mean(dim=0, keepdim=True).expand_as(x)
    only = read(ExplainedVariance(), coded(x.double(), mean))
    assert only["", None, None, None] == pytest.approx(0, abs=1e-9)
    assert only["fvu", None, None, None] == pytest.approx(1, abs=1e-9)


# ---- matching


def test_aurocs_are_scikit_learns_with_ties_and_unknown_rows() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (200, 5)) * (rng.random((200, 5)) < 0.4).astype(float)
    codes[:, 4] = 0
    members, known = rng.random((200, 3)) < 0.3, rng.random((200, 3)) < 0.8
    found = aurocs(csc_array(codes), members, known)
    for latent, concept in np.ndindex(found.shape):
        rows = known[:, concept]
        expected = roc_auc_score(members[rows, concept], codes[rows, latent])
        assert found[latent, concept] == pytest.approx(expected, abs=1e-12)


def test_the_best_threshold_has_the_best_f1_of_all() -> None:
    rng = np.random.default_rng(1)
    codes, truth = np.round(rng.random(80), 1), rng.random(80) < 0.3

    def f1(threshold: float) -> float:
        said = (codes >= threshold) & (codes > 0)
        return 2 * (said & truth).sum() / (said.sum() + truth.sum())

    assert f1(best_threshold(codes, truth)) == max(f1(value) for value in np.unique(codes))


def test_planted_latents_are_matched_and_their_levels_recovered() -> None:
    snapshot, matches = planted()
    assert matches.latent.tolist() == list(range(9))
    assert matches.best.tolist() == list(range(9))
    assert matches.parent_of_latent.tolist() == [-1, -1, -1, 0, 0, 1, 1, 2, 2]
    assert all(len(group) == 1 for group in matches.groups)
    found = read(HierarchyRecovery(), snapshot)
    assert found["", None, None, None] == 1.0
    assert found["chance", None, None, None] == pytest.approx(1 / 3)
    flat = implied_parents(csc_array(snapshot.members.numpy().astype(float)), len(snapshot.members))
    assert flat.tolist() == [-1, -1, -1, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", [*SCORED, "mcc_truth", "dead_fraction", "l0"])
def test_no_metric_sees_the_order_of_parents_or_of_their_children(name: str) -> None:
    order = [2, 0, 1, 8, 7, 3, 4, 6, 5]  # parents, and with them their children, which swap too
    before, after = (planted(order=chosen)[0] for chosen in (None, order))
    cls = classes()[name]
    first, second = read(cls(), before), read(cls(), after)
    assert first.keys() == second.keys()
    for place, value in first.items():
        assert second[place] == pytest.approx(value, abs=1e-12), place


def test_a_child_may_stand_for_a_parent_in_one_part_and_not_in_the_other() -> None:
    """A true parent that only a child latent writes is found, but not as a parent."""
    snapshot, _ = planted()
    assert snapshot.coding is not None
    decoder = torch.eye(9)[[0, 1, 5, 3, 4, 2, 6, 7, 8]]  # a parent and a child are swapped
    there = read(MccTruth(), replace(snapshot, decoder=decoder))
    found = {place[0]: value for place, value in there.items()}
    assert found["parents"] == found["children"] == 1
    assert found["parents_alone"] == pytest.approx(2 / 3)
    assert found["children_alone"] == pytest.approx(5 / 6)
    flat = replace(snapshot, coding=replace(snapshot.coding, n_parents=0))
    assert "parents_alone" not in {place[0] for place in read(MccTruth(), flat)}


# ---- what is not to be had without labels


@pytest.mark.parametrize("name", SCORED[:-1])
def test_labels_are_mandatory_and_training_rows_are_refused(name: str) -> None:
    snapshot, _ = planted()
    metric = classes()[name]()
    with pytest.raises(ValueError, match="split `train`"):
        metric.update(replace(snapshot, split="train"))
    with pytest.raises(ValueError, match="no `members`"):
        metric.update(replace(snapshot, members=None))
    with pytest.raises(ValueError, match="no `matches`"):
        metric.update(replace(snapshot, matches=None))


def test_leakage_counts_what_others_say_and_not_the_parent_of_the_row() -> None:
    codes = torch.tensor([[2.0, 1.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    members = torch.tensor([[True, False, True], [True, False, False], [False, True, False]])
    one = np.arange(3)
    matches = Matches(one, one, np.ones(3), np.ones(3), ((0,),) * 3, np.array([-1, -1, 0]), one)
    snapshot = Snapshot(
        step=0, coding=Coding(x=codes, reconstruction=codes, codes=codes), members=members,
        matches=matches,
    )  # fmt: skip
    found = read(Leakage(), snapshot)
    # concept 0: 1 of 10 in its two rows; concept 1: silent; concept 2: 1 of 6
    assert found["", None, None, None] == pytest.approx((1 / 10 + 1 / 6) / 2)
    assert found["silent", None, None, None] == pytest.approx(1 / 4)


def test_a_latent_that_says_nothing_has_purity_one_half() -> None:
    rng = np.random.default_rng(3)
    codes = torch.from_numpy(rng.random((5000, 2)) * (rng.random((5000, 2)) < 0.3))
    members = torch.from_numpy(rng.random((5000, 2)) < 0.2)
    one = np.arange(2)
    matches = Matches(one, one, np.ones(2), np.full(2, 0.5), ((0,),) * 2, np.full(2, -1), one)
    snapshot = Snapshot(
        step=0, coding=Coding(x=codes, reconstruction=codes, codes=codes), members=members,
        matches=matches,
    )  # fmt: skip
    found = read(Purity(), snapshot)
    assert found["", None, None, None] == pytest.approx(0.5, abs=0.03)
    assert found["precision", None, None, None] == pytest.approx(0.2, abs=0.03)


def test_absorbed_children_are_counted_and_folded_away() -> None:
    """The parent's latent is silent wherever the child's fires."""
    rng = np.random.default_rng(4)
    parent = rng.random(2000) < 0.5
    child = parent & (rng.random(2000) < 0.5)
    members = torch.from_numpy(np.stack([parent, child], axis=1))
    codes = torch.from_numpy(np.stack([parent & ~child, child], axis=1).astype(float))
    one = np.arange(2)
    for above, excluded in (([-1, 0], None), ([-1, -1], 1.0)):
        matches = Matches(
            one, one, np.ones(2), np.ones(2), ((0,), (1,)), np.array([-1, 0]), np.array(above)
        )
        snapshot = Snapshot(
            step=0, coding=Coding(x=codes, reconstruction=codes, codes=codes), members=members,
            matches=matches, truth=torch.eye(2),
        )  # fmt: skip
        found = read(classes()["absorption"](), snapshot)
        assert found["", None, None, None] == 1.0
        assert found["folded", None, None, None] == 1.0 - (above[1] == 0)
        assert found.get(("excluded", None, None, None)) == excluded


def test_random_directions_have_the_mcc_of_the_null() -> None:
    generator = torch.Generator().manual_seed(5)
    decoder, truth = (torch.randn(n, 64, generator=generator) for n in (80, 80))
    snapshot = Snapshot(step=0, decoder=decoder, truth=truth, truth_parent=(-1,) * 16 + (0,) * 64)
    found = read(MccTruth(), snapshot)
    assert found["", None, None, None] == pytest.approx(found["null", None, None, None], abs=0.02)
    exact = read(MccTruth(), replace(snapshot, decoder=-3 * truth))
    assert exact["parents", None, None, None] == pytest.approx(1)
    assert_close(torch.tensor(exact["", None, None, None]), torch.tensor(1.0))
