"""Calibration (Psi): whether the model is right as often as it is confident."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.accuracy import is_right
from allostasis.metrics.base import GAUGES, Mean, Metric, Place, Snapshot, given, invariant, precise
from allostasis.metrics.cross_entropy import cross_entropy, distribution

N_BINS = 15
N_CELLS = 4096


def calibration(
    confidence: Float[Tensor, " batch"], correct: Float[Tensor, " batch"], *, n_bins: int = N_BINS
) -> Float[Tensor, ""]:
    """Expected calibration error of the top prediction, with bins of equal width.

    ECE = sum_b (n_b / N) |acc_b - conf_b|, bins (lo, hi]

    Args:
        confidence: Probability of the predicted answer, in (0, 1].
        correct: 1 where the prediction is right, else 0.
        n_bins: Number of bins on (0, 1].

    Returns:
        Pure number, in [0, 1]; down is better. 0: right as often as confident.

    Source:
        Guo et al. (2017), On calibration of modern neural networks, arXiv 1706.04599.

    Example:
        >>> calibration(torch.tensor([0.9, 0.9]), torch.tensor([1.0, 0.0])).item()
        0.4
    """
    return _error(_histogram(confidence, correct, n_bins))


def brier(
    p: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Squared distance between the predicted distribution and the truth.

    sum_v (p_v - 1[v = y])^2

    Args:
        p: The predicted probabilities.
        labels: The true answers.

    Returns:
        Pure number, in [0, 2]; down is better.

    Source:
        Brier (1950), Verification of forecasts expressed in terms of probability.

    Example:
        >>> brier(torch.tensor([[0.5, 0.5]]), torch.tensor([0])).item()
        0.5
    """
    truth = p.new_ones(len(labels), 1)
    return p.scatter_add(-1, labels[:, None], -truth).norm(dim=-1).square()


def _histogram(
    confidence: Float[Tensor, " batch"], correct: Float[Tensor, " batch"], n_bins: int
) -> Float[Tensor, "3 bins"]:
    confidence = precise(confidence)
    bins = (confidence * n_bins).ceil().long().sub(1).clamp(0, n_bins - 1)
    rows = (torch.ones_like(confidence), confidence, correct.to(confidence))
    return torch.stack([row.new_zeros(n_bins).index_add_(0, bins, row) for row in rows])


def _error(histogram: Float[Tensor, "3 bins"]) -> Float[Tensor, ""]:
    n, confidence, correct = histogram
    return (correct - confidence).abs().sum() / n.sum()


def _equal_mass(cells: Float[Tensor, "3 cells"]) -> Float[Tensor, "3 bins"]:
    n = cells[0].long()
    middle = 2 * n.cumsum(0) - n  # twice the mean rank in each cell, in integers
    bins = (middle * N_BINS // (2 * n.sum())).clamp(max=N_BINS - 1)
    return cells.new_zeros(3, N_BINS).index_add_(1, bins, cells)


class Calibration(Metric):
    """Expected calibration error of the top prediction, against the true answers.

    Parts:
        brier: Mean Brier score, in [0, 2].
        nll: Mean negative log-likelihood.
        equal_mass: The error with 15 bins that hold equal numbers of examples. Confidences within
            1/4096 of each other stay together, so bins are only as equal as that allows.
        published: The error against the model's own choice in place of the truth. Every prediction
            is then right, the value is 1 - mean confidence (with two answers, mean min(p, 1 - p))
            identically, and any sharpening of the logits "improves" it.
    """

    symbol = "Psi"
    unit = "1"
    needs = ("logits", "labels")
    parts = ("brier", "nll", "equal_mass", "published")
    part_units = {"nll": "nat"}
    scale_law = {**invariant(*GAUGES, "logit_shift"), "logit_scale": "changes"}
    direction = "down is better; 0: right as often as confident"
    source = "Guo et al. (2017), On calibration of modern neural networks, arXiv 1706.04599"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        labels = given(snapshot.labels, "labels")
        predicted = snapshot.once(distribution, "logits")
        confidence = predicted.p.amax(dim=-1)
        correct = is_right(snapshot).to(confidence)
        own_choice = torch.ones_like(correct)
        self.accumulate("bins", _histogram(confidence, correct, N_BINS))
        self.accumulate("cells", _histogram(confidence, correct, N_CELLS))
        self.accumulate("own", _histogram(confidence, own_choice, N_BINS))
        self.add(brier(predicted.p, labels).mean(), n=len(labels), part="brier")
        self.add(cross_entropy(predicted.log_p, labels).mean(), n=len(labels), part="nll")

    def means(self) -> dict[Place, Mean]:
        """Give the errors of the histograms over all batches and devices."""
        means = super().means()
        for part, name in (("", "bins"), ("equal_mass", "cells"), ("published", "own")):
            for _, histogram in self.kept(name):
                bins = _equal_mass(histogram) if name == "cells" else histogram
                means[Place(part)] = Mean(_error(bins), histogram[0].sum())
        return means
