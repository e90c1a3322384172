"""Separation d' (Psi): how far apart the readout holds two answers, in units of its own noise."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from allostasis.metrics.activation_entropy import shrinkage
from allostasis.metrics.base import GAUGES, Mean, Metric, Place, Snapshot, given, invariant, precise

MAX_PAIRS = 16


class Separation(NamedTuple):
    """d' of each class pair, and the four terms of its logarithm.

    Attributes:
        d_prime: d' itself, of any sign.
        mean_shift: log ||Dmu||.
        read_alignment: log cos(w, Dmu).
        noise_level: -(1/2) log(tr Sigma / d).
        noise_alignment: -(1/2) log(d w'Sigma w / (||w||^2 tr Sigma)).
        positive: Where d' and the cross-fitted ||Dmu||^2 are positive; elsewhere the terms have no
            value.
    """

    d_prime: Float[Tensor, " pair"]
    mean_shift: Float[Tensor, " pair"]
    read_alignment: Float[Tensor, " pair"]
    noise_level: Float[Tensor, " pair"]
    noise_alignment: Float[Tensor, " pair"]
    positive: Bool[Tensor, " pair"]


def dprime(
    resid: Float[Tensor, "batch d_model"],
    classes: Int[Tensor, " batch"],
    folds: Int[Tensor, " batch"],
    read: Float[Tensor, "d_model vocab"],
) -> Separation:
    """Separation d' of adjacent answers along the model's own read direction.

    d' = w.Dmu / sqrt(w' Sigma w), w = u_y - u_{y+1}, Dmu = mu_y - mu_{y+1}
    log d' = log||Dmu|| + log cos(w, Dmu) - (1/2) log(tr Sigma / d)
             - (1/2) log(d w'Sigma w / (||w||^2 tr Sigma)), exactly

    ||Dmu||^2 is the product of two folds' shifts, which noise does not inflate; w.Dmu is the mean
    over the two folds. Sigma is the covariance within classes over n - C, shrunk by Ledoit and Wolf
    where n < 5 d. The pairs are the first 16 (y, y + 1) with two examples of each in each fold.

    Args:
        resid: One readout vector for each example: the last residual, or with a final norm the
            normalised stream before its gain.
        classes: The class of each example: class c is the answer with logit c.
        folds: 0 or 1 for each example.
        read: The map from that site to logits: u_v, times the gain if there is one, is column v.

    Returns:
        d' is a pure number, any real; up is better, 0: the answers cannot be told apart. The terms
        are signed as they enter log d'. Without a pair, or without scatter, everything is empty.

    Source:
        Green & Swets (1966), Signal Detection Theory and Psychophysics.

    Example:
        >>> noise = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> rows = noise.repeat_interleave(2, 0)
        >>> both = torch.cat([rows + torch.tensor([4.0, 0.0]), rows])
        >>> classes, folds = torch.arange(2).repeat_interleave(8), torch.arange(16) % 2
        >>> dprime(both, classes, folds, torch.eye(2)).d_prime  # 4 / sqrt(8 / 7)
        tensor([3.7417], dtype=torch.float64)
    """
    rows, columns = precise(resid), precise(read)
    n_answers = columns.shape[-1]
    cells = functional.one_hot(2 * classes + folds, 2 * n_answers).to(rows)
    counts = cells.sum(dim=0).view(n_answers, 2)
    sums = (cells.T @ rows).view(n_answers, 2, -1)

    fold_means = sums / counts[..., None].clamp(min=1)
    means = sums.sum(dim=1) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    noise = _Noise(rows - means[classes], n_classes=len(classes.unique()))

    enough = (counts >= 2).all(dim=1)
    answer = (enough[:-1] & enough[1:]).nonzero()[:MAX_PAIRS, 0]
    if noise.trace == 0:
        answer = answer[:0]
    w = (columns[:, answer] - columns[:, answer + 1]).T
    shift = fold_means[answer] - fold_means[answer + 1]
    square = (shift[:, 0] * shift[:, 1]).sum(dim=-1)
    signal = (w * shift.mean(dim=1)).sum(dim=-1)
    length, spread, level = w.norm(dim=-1), noise.along(w), noise.trace / rows.shape[-1]
    return Separation(
        d_prime=signal / spread.sqrt(),
        mean_shift=square.log() / 2,
        read_alignment=(signal / (length * square.sqrt())).log(),
        noise_level=-level.log().expand_as(signal) / 2,
        noise_alignment=-(spread / (length.square() * level)).log() / 2,
        positive=(square > 0) & (signal > 0),
    )


class _Noise:
    """Covariance of residuals around class means, never formed: only its quadratic form is read."""

    def __init__(self, residuals: Float[Tensor, "batch d_model"], *, n_classes: int) -> None:
        n, self.d = residuals.shape
        self.residuals, self.freedom = residuals, max(n - n_classes, 1)
        self.trace = residuals.square().sum() / self.freedom
        self.shrinkage = 0.0
        if n < 5 * self.d and self.trace > 0:
            self.shrinkage = shrinkage(residuals.cpu().numpy())

    def along(self, w: Float[Tensor, "pair d_model"]) -> Float[Tensor, " pair"]:
        sample = (self.residuals @ w.T).square().sum(dim=0) / self.freedom
        sphere = self.trace / self.d * w.square().sum(dim=-1)
        return (1 - self.shrinkage) * sample + self.shrinkage * sphere


class DPrime(Metric):
    """Mean log d' over class pairs at the last layer's readout.

    The main value is log d'. Its four terms sum to it, over the pairs for which all are defined.
    The state keeps the readout vectors: shrinkage needs their fourth moments around class means,
    which are larger than a probe. Even and odd examples of a batch are the two folds.

    Parts:
        mean_shift: log ||Dmu||, signal amplitude.
        read_alignment: log cos(w, Dmu), how well the readout looks along the signal; an estimate,
            which noise can lift above 0.
        noise_level: Minus half the log of the noise's variance per feature.
        noise_alignment: Minus half the log of the noise along the readout relative to its mean.
        accuracy_pred: Phi(d'/2), accuracy of a midpoint decision on one sample under Gaussian
            noise; over all pairs, whatever the sign of d'.
        auroc_pred: Phi(d'/sqrt(2)), the two-sample forced choice; likewise.
    """

    symbol = "Psi"
    unit = "1"
    needs = ("blocks.*.hook_resid_post", "classes", "params")
    reads_also = ("ln_final.hook_normalized",)
    axes = ("layer",)
    parts = (
        "mean_shift",
        "read_alignment",
        "noise_level",
        "noise_alignment",
        "accuracy_pred",
        "auroc_pred",
    )
    part_symbols = {
        "mean_shift": "A",
        "read_alignment": "G",
        "noise_level": "sigma2",
        "noise_alignment": "G",
    }
    scale_law = {
        **invariant(*GAUGES, "resid"),
        **dict.fromkeys(("mean_shift.resid", "mean_shift.stream"), "changes"),
        **dict.fromkeys(("noise_level.resid", "noise_level.stream"), "changes"),
    }
    direction = "up is better; 0 is d' = 1"
    source = "Green & Swets (1966), Signal Detection Theory and Psychophysics"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        weights, classes = given(snapshot.weights, "params"), given(snapshot.classes, "classes")
        layer, resid = list(snapshot.layers("hook_resid_post"))[-1]
        self.read = weights.W_U.detach()
        if weights.final_gain is not None:
            hook = "ln_final.hook_normalized"
            resid = given(snapshot.acts.get(hook), hook)
            self.read = weights.final_gain[:, None] * self.read
        self.collect("resid", resid[:, snapshot.readout], layer=layer)
        self.collect("classes", classes, layer=layer)
        self.collect("folds", torch.arange(len(classes), device=classes.device) % 2, layer=layer)

    def means(self) -> dict[Place, Mean]:
        """Give d' of the vectors of all batches and devices."""
        means = {}
        states = (self.kept(name) for name in ("resid", "classes", "folds"))
        for (layer, resid), (_, classes), (_, folds) in zip(*states, strict=True):
            found = dprime(resid, classes, folds, self.read)
            why = "no two adjacent answers have two examples in each fold"
            for part, scale in (("accuracy_pred", 2.0), ("auroc_pred", math.sqrt(2))):
                share = torch.special.ndtr(found.d_prime / scale)
                means[Place(part, layer)] = Mean(share.mean(), len(share), why)
            if len(found.positive):
                why = "no class pair has a positive cross-fitted shift along the readout"
            terms = {"": found.d_prime.log()} | {p: getattr(found, p) for p in self.parts[:4]}
            for part, term in terms.items():
                value = term[found.positive].mean()
                means[Place(part, layer)] = Mean(value, found.positive.sum(), why)
        return means
