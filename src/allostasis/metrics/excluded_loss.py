"""Excluded loss: the loss on trained pairs of what is left without the key frequencies."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise
from allostasis.metrics.cosine_fve import sum_table
from allostasis.metrics.cross_entropy import cross_entropy, log_probabilities
from allostasis.metrics.restricted_loss import key_part, null_sets


def excluded_loss(
    grid: Float[Tensor, "p p p"],
    train_pairs: Bool[Tensor, "p p"],
    frequencies: tuple[int, ...],
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the trained pairs when the key frequencies are removed.

    Args:
        grid: Logits of every pair (a, b) over the p answers.
        train_pairs: Which pairs were trained on.
        frequencies: The frequencies to remove, of 1..(p - 1) / 2.

    Returns:
        Nats, in [0, inf), without a better end. Low: the pairs are memorised; high: the answer to
        trained pairs, too, comes from the key frequencies.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> excluded_loss(torch.zeros(5, 5, 5), torch.eye(5) > 0, (1,)).item()  # ln 5
        1.609438
    """
    logits, sums = _trained(grid, train_pairs)
    return _loss(logits, sums, key_part(sum_table(grid), frequencies))


def _trained(
    grid: Float[Tensor, "p p p"], train_pairs: Bool[Tensor, "p p"]
) -> tuple[Float[Tensor, "pair p"], Int[Tensor, " pair"]]:
    a, b = train_pairs.nonzero(as_tuple=True)
    return precise(grid[a, b]), (a + b) % len(grid)


def _loss(
    logits: Float[Tensor, "pair p"], sums: Int[Tensor, " pair"], removed: Float[Tensor, "p p"]
) -> Float[Tensor, ""]:
    return cross_entropy(log_probabilities(logits - removed[sums]), sums).mean()


class ExcludedLoss(Metric):
    """Loss on the trained pairs without the key frequencies' directions.

    The key frequencies are those of the finished model, which is hindsight, as published.

    Parts:
        null_mean: Mean over 20 random sets of as many frequencies.
        null_sd: Standard deviation over them.
    """

    symbol = "other"
    unit = "nat"
    needs = ("grid_logits", "train_pairs", "key_frequencies")
    parts = ("null_mean", "null_sd")
    scale_law = {
        **invariant("vo", "qk", "relu", "stream", "rotation", "logit_shift"),
        "logit_scale": "changes",
    }
    direction = "low: trained pairs are memorised; high: they are added by the key frequencies"
    source = (
        "Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability, "
        "arXiv 2301.05217"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the logits of every pair."""
        grid = given(snapshot.grid_logits, "grid_logits")
        keys = given(snapshot.key_frequencies, "key_frequencies")
        logits, sums = _trained(grid, given(snapshot.train_pairs, "train_pairs"))
        table = snapshot.once(sum_table, "grid_logits")
        loss, *null = (
            _loss(logits, sums, key_part(table, chosen))
            for chosen in (keys, *null_sets(len(grid), len(keys)))
        )
        values = {
            "": loss,
            "null_mean": torch.stack(null).mean(),
            "null_sd": torch.stack(null).std(),
        }
        why = "no key frequency" if len(sums) else "no trained pair"
        for part, value in values.items():
            self.add(value, n=len(sums) * bool(keys), part=part, otherwise=why)
