"""Restricted loss: the loss of what the key frequencies alone would answer."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant
from allostasis.metrics.cosine_fve import sum_table
from allostasis.metrics.cross_entropy import cross_entropy, log_probabilities
from allostasis.metrics.fourier_power import fourier_basis

N_NULL_SETS = 20
NULL_SEED = 20_301


def key_part(table: Float[Tensor, "p p"], frequencies: tuple[int, ...]) -> Float[Tensor, "p p"]:
    """The part of the logits that lies on some frequencies of the sum.

    Projection, over the (a, b) plane, on cos(w_k (a + b)) and sin(w_k (a + b)): two directions for
    each frequency. It is a function of a + b, and `sum_table` holds all that it depends on.

    Args:
        table: Mean logits by sum and answer, as `sum_table` gives them.
        frequencies: The frequencies to keep, of 1..(p - 1) / 2.

    Returns:
        Logits, any real number, with no direction: the row is a + b, the column the answer.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> wave = torch.outer(fourier_basis(5)[0, 0], torch.ones(5).double())
        >>> torch.allclose(key_part(wave, (1,)), wave), key_part(wave, (2,)).abs().max() < 1e-12
        (True, tensor(True))
    """
    chosen = [k - 1 for k in frequencies]
    waves = fourier_basis(len(table))[chosen].flatten(0, 1).to(table)
    return waves.T @ (waves @ table)


def restricted_loss(
    grid: Float[Tensor, "p p p"], frequencies: tuple[int, ...]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over all pairs when only key frequencies and the mean are kept.

    Args:
        grid: Logits of every pair (a, b) over the p answers.
        frequencies: The frequencies to keep, of 1..(p - 1) / 2.

    Returns:
        Nats, in [0, inf); down is better. Low: the key frequencies do all the work.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> restricted_loss(torch.zeros(5, 5, 5), (1,)).item()  # ln 5
        1.609438
    """
    return _loss(sum_table(grid), frequencies)


def _loss(table: Float[Tensor, "p p"], frequencies: tuple[int, ...]) -> Float[Tensor, ""]:
    # every sum belongs to p pairs, so that the mean over sums is the mean over pairs
    logits = table.mean(dim=0) + key_part(table, frequencies)
    sums = torch.arange(len(table), device=table.device)
    return cross_entropy(log_probabilities(logits), sums).mean()


def null_sets(p: int, size: int) -> list[tuple[int, ...]]:
    """Random sets of frequencies, to tell what any set of that size would do.

    The generator's seed is a constant, so that every run and every arm meets the same sets.

    Args:
        p: The modulus, odd.
        size: Frequencies in each set.

    Returns:
        20 sets of different frequencies in [1, (p - 1) / 2], drawn from all of them, the key ones
        included; they have no direction.

    Source:
        Permutation null of this project.

    Example:
        >>> len(null_sets(113, 5)), len(set(null_sets(113, 5)[0]))
        (20, 5)
    """
    generator = torch.Generator().manual_seed(NULL_SEED)
    draws = (torch.randperm((p - 1) // 2, generator=generator) for _ in range(N_NULL_SETS))
    return [tuple((draw[:size] + 1).tolist()) for draw in draws]


class RestrictedLoss(Metric):
    """Loss on all pairs of the key frequencies' part and the mean.

    The key frequencies are those of the finished model, which is hindsight, as published.

    Parts:
        null_mean: Mean over 20 random sets of as many frequencies.
        null_sd: Standard deviation over them.
    """

    symbol = "other"
    unit = "nat"
    needs = ("grid_logits", "key_frequencies")
    parts = ("null_mean", "null_sd")
    scale_law = {
        **invariant("vo", "qk", "relu", "stream", "rotation", "logit_shift"),
        "logit_scale": "changes",
    }
    direction = "down is better; low: the key frequencies do all the work"
    source = (
        "Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability, "
        "arXiv 2301.05217"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the logits of every pair."""
        table = snapshot.once(sum_table, "grid_logits")
        keys = given(snapshot.key_frequencies, "key_frequencies")
        null = torch.stack([_loss(table, chosen) for chosen in null_sets(len(table), len(keys))])
        values = {"": _loss(table, keys), "null_mean": null.mean(), "null_sd": null.std()}
        for part, value in values.items():
            self.add(value, n=int(bool(keys)), part=part, otherwise="no key frequency")
