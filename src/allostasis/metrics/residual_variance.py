"""Residual variance (sigma^2): how far residual vectors scatter, between and within classes."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from allostasis.metrics.amplitude_activation import INERT, before_norm
from allostasis.metrics.base import Mean, Metric, Place, Snapshot, given, invariant, precise


def residual_variance(
    resid: Float[Tensor, "batch d_model"], classes: Int[Tensor, " batch"], *, n_classes: int
) -> dict[str, Tensor]:
    """Variance per feature of residual vectors, split by class.

    total   = tr Cov(r) / d = between + within, exactly
    between = sum_c n_c ||mu_c - mu||^2 / (n d)
    within  = sum_c sum_{i in c} ||r_i - mu_c||^2 / (n d)

    Classes with fewer than two examples are left out of all of it.

    Args:
        resid: One residual vector for each example, at a site that no norm has just passed.
        classes: The class of each example, in 0..n_classes - 1.
        n_classes: How many classes there are.

    Returns:
        Squared residual units, all >= 0 but the unbiased ones, by name: `total`; `between`, high:
        classes lie apart; `within`, low: each class is tight; `between_unbiased` =
        ((MSB - MSW) / n0) / d and `within_unbiased` = MSW / d, which do not grow with the number of
        classes; `common` = ||mu||^2 / d, the square of what all examples share. The three that
        compare classes are missing where fewer than two classes are left, all where none is.

    Source:
        One-way analysis of variance: Searle, Casella & McCulloch (1992), Variance Components.

    Example:
        >>> resid = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> parts = residual_variance(resid, torch.tensor([0, 0, 1, 1]), n_classes=2)
        >>> parts["total"].item(), parts["between"].item(), parts["within"].item()
        (26.0, 25.0, 1.0)
    """
    return _variances(_moments(resid, classes, n_classes))


def _moments(
    resid: Float[Tensor, "batch d_model"], classes: Int[Tensor, " batch"], n_classes: int
) -> Float[Tensor, "classes moment"]:
    """Count, sum of squares and sum of vectors of each class, side by side."""
    rows = precise(resid)
    squares = rows.square().sum(dim=-1, keepdim=True)
    members = functional.one_hot(classes, n_classes).to(rows)
    return members.T @ torch.cat([torch.ones_like(squares), squares, rows], dim=-1)


def _variances(moments: Float[Tensor, "classes moment"]) -> dict[str, Tensor]:
    kept = moments[moments[:, 0] >= 2]
    if len(kept) == 0:
        return {}
    counts, squares, sums = kept[:, 0], kept[:, 1], kept[:, 2:]
    n, d = counts.sum(), sums.shape[-1]
    centre = sums.sum(dim=0) / n
    common = centre.square().sum()
    spread = squares.sum() - n * common
    within = (squares - sums.square().sum(dim=-1) / counts).sum()
    parts = {
        "total": spread / (n * d),
        "within": within / (n * d),
        "within_unbiased": within / ((n - len(counts)) * d),
        "common": common / d,
    }
    if len(counts) >= 2:
        between = (counts * (sums / counts[:, None] - centre).square().sum(dim=-1)).sum()
        n_0 = (n - counts.square().sum() / n) / (len(counts) - 1)
        excess = between / (len(counts) - 1) - within / (n - len(counts))
        parts |= {"between": between / (n * d), "between_unbiased": excess / (n_0 * d)}
    return parts


class ResidualVariance(Metric):
    """Variance over examples at the readout position of each layer's `hook_resid_post`.

    The main value is the total. Where the site is a norm's output the sum before the norm is read,
    if the model has a hook for it. Without classes only `published` is given.

    Parts:
        between: Variance of the class means; likewise `between_unbiased`, without the part that
            scatter within classes adds.
        within: Variance around the class means; likewise `within_unbiased`, over n - C.
        common: ||mu||^2 / d, the square of the mean vector.
        excluded: Share of examples left out because their class has no other.
        mid: The total at `hook_resid_mid`, between attention and MLP.
        published: (mean over all tokens of the standard deviation over a token's features)^2. It is
            A^2 / (d - 1) wherever the feature mean is 0, so that amplitude and variance become one
            number, and a squared mean of deviations is not a variance.
    """

    symbol = "sigma2"
    unit = "resid^2"
    needs = ("blocks.*.hook_resid_mid", "blocks.*.hook_resid_post")
    reads_also = ("blocks.*.hook_attn_sum", "blocks.*.hook_mlp_sum")
    axes = ("layer",)
    parts = (
        "between",
        "within",
        "between_unbiased",
        "within_unbiased",
        "common",
        "excluded",
        "mid",
        "published",
    )
    part_units = {"excluded": "1"}
    audit_key = "sigma_sq"
    scale_law = {
        **invariant("vo", "qk", "relu", "gain", "rotation"),
        "resid": 2,
        "stream": 2,
        "excluded.resid": "invariant",
        "excluded.stream": "invariant",
        "published.rotation": "changes",
    }
    functional = False
    direction = "high between: classes lie apart; low within: each class is tight"
    source = "One-way analysis of variance: Searle, Casella & McCulloch (1992), Variance Components"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        if snapshot.classes is not None:
            self._add_classes(snapshot, snapshot.classes, given(snapshot.n_classes, "n_classes"))
        for layer, resid in snapshot.layers("hook_resid_post"):
            tokens = precise(resid)
            centred = tokens - tokens.mean(dim=-1, keepdim=True)
            spread = centred.norm(dim=-1) / math.sqrt(tokens.shape[-1] - 1)
            count = torch.full_like(spread.sum(), spread.numel())
            self.accumulate("spread", torch.stack([spread.sum(), count]), layer=layer)

    def _add_classes(self, snapshot: Snapshot, classes: Tensor, n_classes: int) -> None:
        for site, parts in SITES.items():
            for layer, resid in snapshot.layers(f"hook_resid_{site}"):
                free = before_norm(snapshot, layer, site, resid)
                if free is None:
                    for part in parts:
                        self.add(0.0, n=0, part=part, layer=layer, otherwise=INERT)
                else:
                    moments = _moments(free[:, snapshot.readout], classes, n_classes)
                    self.accumulate(site, moments, layer=layer)

    def means(self) -> dict[Place, Mean]:
        """Give the variances of the moments over all batches and devices."""
        means = super().means()
        for layer, moments in self.kept("mid"):
            means[Place("mid", layer)] = _means(moments)["total"]
        for layer, moments in self.kept("post"):
            for part, mean in _means(moments).items():
                means[Place("" if part == "total" else part, layer)] = mean
        for layer, (total, count) in self.kept("spread"):
            means[Place("published", layer)] = Mean((total / count).square(), count)
        return means


SITES: dict[Literal["mid", "post"], tuple[str, ...]] = {
    "mid": ("mid",),
    "post": ("", *ResidualVariance.parts[:6]),
}


def _means(moments: Float[Tensor, "classes moment"]) -> dict[str, Mean]:
    counts = moments[:, 0]
    n, kept = counts.sum(), counts[counts >= 2].sum()
    variances = _variances(moments)
    undefined = Mean(torch.zeros_like(n), 0, "too few classes with two examples")
    parts = ("total", "between", "within", "between_unbiased", "within_unbiased", "common")
    means = {p: Mean(variances[p], kept) if p in variances else undefined for p in parts}
    return means | {"excluded": Mean(1 - kept / n, n)}
