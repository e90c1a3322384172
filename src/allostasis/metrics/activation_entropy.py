"""Activation entropy: the log volume that readout states fill, as if they were Gaussian."""

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, invariant, precise

RIDGE = 1e-3


def shrinkage(rows: Float64[np.ndarray, "batch d_model"]) -> float:
    """How far Ledoit and Wolf draw a covariance towards a multiple of the identity.

    s = min(beta, delta) / delta, with m = tr S / d, delta = ||S - m I||^2 / d and
    beta = (mean ||x||^4 - ||S||^2) / (n d), ||.|| Frobenius's norm

    scikit-learn's number, from one product of the rows with themselves in place of two.

    Args:
        rows: One centred vector for each example.

    Returns:
        In [0, 1]; 0: the sample covariance as it is.

    Source:
        Ledoit & Wolf (2004), A well-conditioned estimator for large-dimensional covariance
        matrices.

    Example:
        >>> shrinkage(np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        0.944444
    """
    n, d = rows.shape
    square_norms = np.einsum("nd,nd->n", rows, rows)
    square = np.square(rows.T @ rows).sum() / n**2
    trace = square_norms.sum() / n
    delta = (square - trace**2 / d) / d
    beta = min(delta, (np.square(square_norms).mean() - square) / (n * d))
    return float(beta / delta) if beta > 0 else 0.0


def activation_entropy(resid: Float[Tensor, "batch d_model"]) -> dict[str, float]:
    """Half the log determinant of the residual vectors' shrunk covariance.

    (1/2) log det Sigma, Sigma = (1 - s) S + s (tr S / d) I, s by Ledoit and Wolf, S over n

    Args:
        resid: One residual vector for each example.

    Returns:
        By name: `entropy`, nats, any real number, of which only differences between arms mean
        anything, high: the states fill more volume; `effective_rank` = (sum lambda)^2 /
        sum lambda^2 of Sigma, in [1, d]; `condition` = largest over smallest lambda, in [1, inf);
        `published` = (1/2) log det(S + eps (tr S / d) I), eps = 1e-3. What is undefined is missing:
        all of it where the vectors are equal, `entropy` and `condition` where Sigma is singular.

    Source:
        Ledoit & Wolf (2004), A well-conditioned estimator for large-dimensional covariance
        matrices.

    Example:
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> activation_entropy(corners)["effective_rank"]
        2.0
    """
    rows = precise(resid).cpu().numpy()
    rows = rows - rows.mean(axis=0)
    sample = np.linalg.eigvalsh(rows.T @ rows / len(rows)).clip(min=0)
    level = sample.mean()
    if level == 0:
        return {}
    share = shrinkage(rows)
    shrunk = (1 - share) * sample + share * level
    parts = {
        "effective_rank": shrunk.sum() ** 2 / np.square(shrunk).sum(),
        "published": np.log(sample + RIDGE * level).sum() / 2,
    }
    if shrunk[0] > 0:
        parts["entropy"] = np.log(shrunk).sum() / 2
        parts["condition"] = shrunk[-1] / shrunk[0]
    return {name: float(value) for name, value in parts.items()}


class ActivationEntropy(Metric):
    """Activation entropy at the readout position of each layer's `hook_resid_post`.

    The state keeps the readout vectors: a batch is smaller than the moments it would be summed to.

    Parts:
        effective_rank: Directions in use, (sum lambda)^2 / sum lambda^2.
        condition: Largest over smallest eigenvalue.
        published: The log determinant with a fixed ridge in place of shrinkage. With n far below d,
            which the row's `n` shows, the ridge decides the value.
    """

    symbol = "other"
    unit = "nat"
    needs = ("blocks.*.hook_resid_post",)
    axes = ("layer",)
    parts = ("effective_rank", "condition", "published")
    part_units = {"effective_rank": "1", "condition": "1"}
    scale_law = {
        **invariant("vo", "qk", "relu", "gain", "rotation"),
        "resid": "changes",
        "stream": "changes",
        **invariant("effective_rank.resid", "effective_rank.stream"),
        **invariant("condition.resid", "condition.stream"),
    }
    functional = False
    direction = "high: readout states fill more volume; only differences between arms count"
    source = (
        "Ledoit & Wolf (2004), A well-conditioned estimator for large-dimensional covariance "
        "matrices"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        for layer, resid in snapshot.layers("hook_resid_post"):
            self.collect("resid", resid[:, snapshot.readout], layer=layer)

    def means(self) -> dict[Place, Mean]:
        """Give the entropy of the vectors of all batches and devices."""
        means = {}
        for layer, resid in self.kept("resid"):
            entropy = activation_entropy(resid)
            why = "the covariance is singular" if entropy else "all readout vectors are equal"
            for part in ("entropy", *self.parts):
                value = torch.tensor(entropy.get(part, 0.0), dtype=torch.float64)
                place = Place("" if part == "entropy" else part, layer)
                means[place] = Mean(value, len(resid) if part in entropy else 0, why)
        return means
