"""Dead latents: the share of an autoencoder's latents that never fire."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, given, precise

ENOUGH = 100_000  # rows without a firing, from which on a latent is dead


def dead_fraction(firings: Int[Tensor, " latent"]) -> Float[Tensor, ""]:
    """Share of latents that fired in no row.

    Args:
        firings: In how many rows each latent was not 0.

    Returns:
        In [0, 1]. 0: every latent is used; better low.

    Source:
        Gao et al. (2024), Scaling and evaluating sparse autoencoders, arXiv:2406.04093.

    Example:
        >>> dead_fraction(torch.tensor([3, 0]))
        tensor(0.5000, dtype=torch.float64)
    """
    return precise(firings == 0).mean()


class DeadFraction(Metric):
    """Dead latents; undefined below 100,000 rows, in which a rare latent may just not have fired.

    No preset of `hsae_train` reads as many test rows; module.n_test=100_000 does, of 2 million rows
    of activations or of planted ones, whose number is task.n_rows.

    Parts:
        parents: Of the parents, where there are levels.
        children: Of the children.
        silent: Share of latents that fired in none of the rows seen, however few they were.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding",)
    parts = ("parents", "children", "silent")
    scale_law = {"resid": "invariant"}
    direction = "0: every latent is used"
    source = "Gao et al. (2024)"

    def update(self, snapshot: Snapshot) -> None:
        """Count a snapshot's firings."""
        coding = given(snapshot.coding, "coding")
        fires = (coding.codes != 0).sum(dim=0)
        self.accumulate("firings", fires)
        self.accumulate("rows", fires.new_tensor(len(coding.codes)))
        self.levels = coding.levels

    def means(self) -> dict[Place, Mean]:
        """Give the shares, from the counts of all processes."""
        found: dict[Place, Mean] = {}
        for (_, firings), (_, rows) in zip(self.kept("firings"), self.kept("rows"), strict=True):
            n = torch.where(rows >= ENOUGH, rows, torch.zeros_like(rows))
            found[Place("silent")] = Mean(dead_fraction(firings), rows)
            why = f"fewer than {ENOUGH} rows"
            for part, latents in self.levels.items():
                found[Place(part)] = Mean(dead_fraction(firings[latents]), n, why)
        return found
