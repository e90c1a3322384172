"""Explained variance: how much of the activations' variance an autoencoder gives back."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Coding, Mean, Metric, Place, Snapshot, given, precise


def explained_variance(
    x: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"]
) -> Float[Tensor, ""]:
    """Share of the variance about the mean that is reconstructed.

    1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, both sums over all rows

    Args:
        x: Activations.
        reconstruction: What stands for them, in the same units.

    Returns:
        In (-inf, 1]. 1: perfect; 0: no better than the mean.

    Source:
        Karvonen et al. (2025), SAEBench, arXiv:2503.09532.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> explained_variance(x, x / 2)
        tensor(0.7500)
    """
    return 1 - (x - reconstruction).square().sum() / (x - x.mean(dim=0)).square().sum()


class ExplainedVariance(Metric):
    """Explained variance of all rows together, never a mean of batches'.

    Moments are kept about each process's own mean and merged, so that a mean far from 0 costs no
    digits.

    Parts:
        parents: Of what the parents alone give back.
        fvu: 1 - the main value: fraction of variance unexplained.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding",)
    parts = ("parents", "fvu")
    scale_law = {"resid": "invariant"}
    direction = "1: perfect; 0: no better than the mean"
    source = "Karvonen et al. (2025), SAEBench, arXiv:2503.09532"

    def update(self, snapshot: Snapshot) -> None:
        """Merge the moments of a snapshot's rows into those seen before."""
        row = _moments(given(snapshot.coding, "coding"))
        for _, seen in list(self.kept("moments")):
            row = _merged(torch.cat([seen, row]))
        self._kept.pop(("moments", None), None)
        if hasattr(self, "moments.None"):
            getattr(self, "moments.None").clear()
        self.collect("moments", row)

    @staticmethod
    def per_example(snapshot: Snapshot) -> dict[str, Tensor]:
        """Squared error of each row, over the mean row's squared distance from the mean."""
        coding = given(snapshot.coding, "coding")
        x = precise(coding.x)
        spread = (x - x.mean(dim=0)).square().sum(dim=1).mean()
        return {"fvu": (x - precise(coding.reconstruction)).square().sum(dim=1) / spread}

    def means(self) -> dict[Place, Mean]:
        """Give the shares, from the merged moments of all processes."""
        found: dict[Place, Mean] = {}
        for _, rows in self.kept("moments"):
            n, total, error, parents_error, with_parents = _merged(rows)[0, :5]
            defined = (n > 1) & (total > 0)
            count = torch.where(defined, n, torch.zeros_like(n)).long()
            safe = total.clamp(min=torch.finfo(total.dtype).tiny)
            why = "the activations do not vary"
            found[Place()] = Mean(1 - error / safe, count, why)
            found[Place("fvu")] = Mean(error / safe, count, why)
            has = count * (with_parents == n)
            found[Place("parents")] = Mean(1 - parents_error / safe, has, None)
        return found


def _moments(coding: Coding) -> Float[Tensor, "1 moment"]:
    """Rows, their spread, both errors, rows with parents, and the mean."""
    x = precise(coding.x)
    mean = x.mean(dim=0)
    error = (x - precise(coding.reconstruction)).square().sum()
    if coding.parents_only is None:
        parents, n_parents = torch.zeros_like(error), 0
    else:
        parents, n_parents = (x - precise(coding.parents_only)).square().sum(), len(x)
    spread = (x - mean).square().sum()
    counts = (x.new_tensor(len(x)), spread, error, parents, x.new_tensor(n_parents))
    return torch.cat([torch.stack(counts), mean])[None]


def _merged(rows: Float[Tensor, "part moment"]) -> Float[Tensor, "1 moment"]:
    """Moments of all parts together, by the rule of Chan et al. (1979)."""
    n, mean = rows[:, :1], rows[:, 5:]
    shift = mean[0]
    about = (n * (mean - shift)).sum(dim=0) / n.sum()
    between = (n * (mean - shift - about).square()).sum()
    sums = rows[:, :5].sum(dim=0)
    sums[1] += between
    return torch.cat([sums, shift + about])[None]
