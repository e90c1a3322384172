"""Fourier power: how much of the embedding lies on each frequency of addition modulo p."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise


@cache
def fourier_basis(p: int) -> Float[Tensor, "frequency 2 p"]:
    """The real Fourier basis of the integers modulo p, without the constant.

    sqrt(2 / p) cos(w_k x) and sqrt(2 / p) sin(w_k x), w_k = 2 pi k / p, k = 1..(p - 1) / 2

    Args:
        p: The modulus, odd.

    Returns:
        Orthonormal rows in float64, in [-1, 1], with no direction: frequency k is at index k - 1,
        cos before sin.

    Raises:
        ValueError: The modulus is even.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> fourier_basis(5).shape
        torch.Size([2, 2, 5])
    """
    if p % 2 == 0:
        raise ValueError(
            f"the modulus p must be odd, got {p}: frequency p / 2 has a cosine and no sine"
        )
    turns = torch.outer(torch.arange(1, (p + 1) // 2), torch.arange(p)) % p
    angle = 2 * torch.pi / p * turns.double()
    return (2 / p) ** 0.5 * torch.stack([angle.cos(), angle.sin()], dim=1)


def fourier_power(table: Float[Tensor, "p feature"]) -> Float[Tensor, " frequency"]:
    """Length of a table's component on each frequency.

    ||(cos_k . W, sin_k . W)||, over features

    Args:
        table: One row for each residue 0..p - 1, p odd.

    Returns:
        Parameter units, >= 0, for k = 1..(p - 1) / 2. High: the frequency is in use.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> fourier_power(fourier_basis(5)[1].T)  # cos and sin of frequency 2
        tensor([0.0000, 1.4142], dtype=torch.float64)
    """
    rows = precise(table)
    basis = fourier_basis(len(rows)).to(rows)
    return (basis @ rows).flatten(start_dim=1).norm(dim=1)


def residue_tables(snapshot: Snapshot) -> dict[str, Float[Tensor, "p feature"]]:
    """The weights that are indexed by residue, one row for each of 0..p - 1.

    Args:
        snapshot: A snapshot with the weights of a modular-addition model.

    Returns:
        By part, of any real values and without direction: "" is the embedding W_E without the row
        of '='; `logits` the neurons' map to logits, (W_out W_U)^T, without the output '='.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> from allostasis.core.spaces import Weights
        >>> named = {"W_E": torch.ones(6, 4), "W_out": torch.ones(8, 4), "W_U": torch.ones(4, 6)}
        >>> weights = Weights((), named["W_U"], None, named, {})
        >>> tables = residue_tables(Snapshot(step=0, weights=weights))
        >>> tables[""].shape, tables["logits"].shape
        (torch.Size([5, 4]), torch.Size([5, 8]))
    """
    named = given(snapshot.weights, "params").named
    to_logits = precise(named["W_out"]) @ precise(named["W_U"])
    return {"": precise(named["W_E"])[:-1], "logits": to_logits[:, :-1].T}


class FourierPower(Metric):
    """Length of the embedding's component on each frequency; the position column holds k.

    Parts:
        logits: The same for the neurons' map to logits, W_out W_U.
    """

    symbol = "other"
    unit = "param"
    needs = ("params", "modulus")
    axes = ("position",)
    parts = ("logits",)
    scale_law = {
        **invariant("vo", "qk", "relu", "rotation"),
        "stream": 1,
        "logits.stream": "invariant",
        "logits.relu": "changes",
    }
    functional = False
    direction = "high: the frequency is in use"
    source = (
        "Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability, "
        "arXiv 2301.05217"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the weights of a snapshot."""
        for part, table in residue_tables(snapshot).items():
            self.add(fourier_power(table), n=1, part=part, over=("position",), position=1)
