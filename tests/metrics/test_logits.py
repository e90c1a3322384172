"""Measures of the logits against closed forms, scipy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor
from torch.testing import assert_close

from allostasis.core.spaces import Weights
from allostasis.instrument import read
from allostasis.metrics.accuracy import Accuracy
from allostasis.metrics.alignment import Alignment, alignment, highest_alignment
from allostasis.metrics.base import Snapshot
from allostasis.metrics.calibration import Calibration, brier, calibration
from allostasis.metrics.cross_entropy import (
    CrossEntropy,
    cross_entropy,
    distribution,
    log_probabilities,
)
from allostasis.metrics.log_margin import LogMargin
from allostasis.metrics.logit_scale import LogitScale, logit_scale
from allostasis.metrics.margin import Margin, answer_distance, margin, runner_up
from allostasis.metrics.output_entropy import output_entropy

MAIN = ("", None, None, None)


def _logits(n: int, n_answers: int, *, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, n_answers, generator=generator, dtype=torch.float64)
    return logits, torch.randint(n_answers, (n,), generator=generator)


def _part(readings: dict[tuple[object, ...], float], part: str) -> float:
    return readings[part, None, None, None]


def test_accuracy_is_shown_beside_the_ceiling() -> None:
    snapshot = Snapshot(
        step=0,
        logits=torch.eye(4),
        labels=torch.tensor([0, 1, 2, 0]),
        ceiling={"": 0.9375},
    )
    readings = read(Accuracy(), snapshot)
    assert readings == {MAIN: 0.75, ("over_ceiling", None, None, None): 0.8}


def test_cross_entropy_equals_scikit_learns_log_loss() -> None:
    logits, labels = _logits(50, 7)
    p = logits.softmax(dim=-1).numpy()
    found = cross_entropy(log_probabilities(logits), labels).mean()
    assert found.item() == pytest.approx(log_loss(labels, p, labels=range(7)), rel=1e-12)


def test_float32_loses_a_loss_that_float64_still_sees() -> None:
    logits = torch.tensor([[25.0, 0.0], [1.0, 0.0]])
    snapshot = Snapshot(step=0, logits=logits, labels=torch.tensor([0, 0]), floor=0.1)
    readings = read(CrossEntropy(), snapshot)
    expected = (math.log1p(math.exp(-25)) + math.log1p(math.exp(-1))) / 2
    assert readings[MAIN] == pytest.approx(expected, rel=1e-12)
    assert _part(readings, "zero_fraction") == 0.5
    assert _part(readings, "excess") == pytest.approx(expected - 0.1)
    assert _part(readings, "floor") == 0.1


def test_output_entropy_equals_scipys() -> None:
    logits, _ = _logits(20, 9)
    expected = stats.entropy(logits.softmax(dim=-1).numpy(), axis=-1)
    assert_close(output_entropy(distribution(logits)), torch.from_numpy(expected))


def test_margin_is_the_lead_over_the_best_wrong_answer() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2])
    assert margin(logits, labels).tolist() == [0.5, -2.0, 0.0]
    assert runner_up(logits, labels).tolist()[:2] == [2, 0]


def test_geometric_margin_is_the_distance_to_the_border_between_two_answers() -> None:
    unembed = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    resid = torch.tensor([[3.0, 1.0]])
    weights = Weights((), unembed, None, {}, {})
    snapshot = Snapshot(step=0, logits=resid @ unembed, labels=torch.tensor([0]), weights=weights)
    normal = unembed[:, 0] - unembed[:, 1]
    foot = resid[0] - normal * (resid[0] @ normal) / (normal @ normal)
    assert ((foot @ unembed)[0] - (foot @ unembed)[1]).abs() < 1e-6  # on the border
    expected = (resid[0] - foot).norm().item()
    assert _part(read(Margin(), snapshot), "geometric") == pytest.approx(expected, rel=1e-6)


def test_answer_distance_stays_exact_between_columns_that_nearly_agree() -> None:
    columns = torch.full((16, 2), 1e3, dtype=torch.float64)
    columns[0, 1] += 1e-6
    found = answer_distance(columns, torch.tensor([0]), torch.tensor([1]))
    assert found.item() == pytest.approx((columns[0, 1] - columns[0, 0]).item(), rel=1e-12)


def test_logit_scale_is_the_largest_margin_that_logits_of_this_length_can_have() -> None:
    logits, _ = _logits(20, 9)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    assert_close(logit_scale(logits), math.sqrt(2) * centred.square().sum(-1).sqrt())
    readings = read(LogitScale(), Snapshot(step=0, logits=logits))
    spread = logits.std(dim=-1, correction=0).mean().item()
    assert _part(readings, "sd") == pytest.approx(spread, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 12).flatmap(
        lambda n: st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=n, max_size=n)
    )
)
def test_alignment_stays_below_its_ceiling(values: list[float]) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    if logit_scale(logits).item() > 1e-6:  # below, the centred logits are round-off
        highest = highest_alignment(len(values))
        for label in range(len(values)):
            found = alignment(logits, torch.tensor([label])).item()
            assert -1 - 1e-12 <= found <= highest + 1e-12


@pytest.mark.parametrize(
    ("n_answers", "highest"), [(2, 1.0), (4, 0.8165), (113, 0.71026), (10**9, 0.7071)]
)
def test_the_ceiling_of_alignment_is_reached_where_wrong_answers_are_level(
    n_answers: int, highest: float
) -> None:
    assert highest_alignment(n_answers) == pytest.approx(highest, abs=5e-5)
    if n_answers < 1000:
        level = torch.zeros(1, n_answers, dtype=torch.float64)
        level[0, 1] = 7.0
        snapshot = Snapshot(step=0, logits=level, labels=torch.tensor([1]))
        assert _part(read(Alignment(), snapshot), "of_ceiling") == pytest.approx(1, rel=1e-14)


def test_log_margin_is_the_sum_of_its_terms_over_the_right_answers_alone() -> None:
    logits, _ = _logits(200, 5)
    labels = torch.where(torch.arange(200) < 150, logits.argmax(-1), logits.argmin(-1))
    readings = read(LogMargin(), Snapshot(step=0, logits=logits, labels=labels))
    total = _part(readings, "scale") + _part(readings, "alignment")
    assert readings[MAIN] == pytest.approx(total, abs=1e-12)
    top = logits[:150].topk(2, dim=-1).values
    assert readings[MAIN] == pytest.approx((top[:, 0] - top[:, 1]).log().mean().item(), rel=1e-12)
    assert _part(readings, "positive") == 0.75


def test_calibration_by_hand() -> None:
    confidence = torch.tensor([0.05, 1 / 15, 0.95, 0.99], dtype=torch.float64)
    correct = torch.tensor([0.0, 1.0, 1.0, 0.0])
    low = abs(0.5 - (0.05 + 1 / 15) / 2)  # bins are (lo, hi], so that 1/15 is in the first
    high = abs(0.5 - 0.97)
    assert calibration(confidence, correct).item() == pytest.approx((low + high) / 2, rel=1e-12)


def test_a_model_that_says_what_it_knows_is_calibrated() -> None:
    """Labels drawn from the prediction itself: the error is sampling noise, 1/sqrt(n) a bin."""
    logits, _ = _logits(20_000, 4, scale=1.0)
    p = logits.softmax(dim=-1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    readings = read(Calibration(), Snapshot(step=0, logits=logits, labels=labels))
    overconfident = read(Calibration(), Snapshot(step=0, logits=3 * logits, labels=labels))
    assert readings[MAIN] < 0.02
    assert _part(readings, "equal_mass") < 0.02
    assert overconfident[MAIN] > 0.1
    # the published value calls the same sharpening an improvement
    assert _part(overconfident, "published") < _part(readings, "published")


def test_equal_mass_bins_equal_quantile_bins() -> None:
    logits, labels = _logits(300, 5)
    confidence, choice = logits.softmax(dim=-1).max(dim=-1)
    order = confidence.argsort()
    blocks = np.array_split(order.numpy(), 15)
    correct = (choice == labels).double()
    expected = sum(abs((correct[b] - confidence[b]).sum().item()) for b in blocks) / 300
    readings = read(Calibration(), Snapshot(step=0, logits=logits, labels=labels))
    # two confidences that share one of the 4096 cells may lie on either side of a border
    assert _part(readings, "equal_mass") == pytest.approx(expected, abs=2 / 300)


def test_brier_equals_twice_scikit_learns_for_two_answers() -> None:
    logits, labels = _logits(40, 2)
    p = logits.softmax(dim=-1)[:, 1].numpy()
    found = brier(distribution(logits).p, labels).mean().item()
    assert found == pytest.approx(2 * brier_score_loss(labels.numpy(), p), rel=1e-12)
