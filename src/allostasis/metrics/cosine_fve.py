"""Cosine FVE: the share of the logits that each frequency of the addition circuit explains."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, invariant, precise
from allostasis.metrics.fourier_power import fourier_basis


def sum_table(grid: Float[Tensor, "p p p"]) -> Float[Tensor, "p p"]:
    """Mean logits over the pairs that share their sum.

    T[t, c] = mean of F[a, b, c] over a + b = t (mod p)

    Args:
        grid: Logits of every pair (a, b) over the p answers.

    Returns:
        Logits in float64, any real number, with no direction: the row is a + b, the column c.

    Source:
        Every function of a + b is orthogonal to what this mean leaves out.

    Example:
        >>> sum_table(torch.eye(3)[(torch.arange(3)[:, None] + torch.arange(3)) % 3])
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)
    """
    p = len(grid)
    total, first = torch.arange(p, device=grid.device)[:, None], torch.arange(p, device=grid.device)
    return grid[first, (total - first) % p].mean(dim=1, dtype=torch.float64)


def cosine_fve(grid: Float[Tensor, "p p p"]) -> Float[Tensor, " frequency"]:
    """Share of the logits' variance along cos(w_k (a + b - c)).

    <F, u_k>^2 / ||F||^2, F centred over c, u_k = cos(w_k (a + b - c)) at unit length

    F enters only through its sums over a + b - c, so that one gather takes the place of a sum over
    p^3 terms for each frequency.

    Args:
        grid: Logits of every pair (a, b) over the p answers, p odd; not constant over answers.

    Returns:
        Pure numbers, in [0, 1], for k = 1..(p - 1) / 2; their sum is at most 1. High: the model
        adds by means of this frequency.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> x = torch.arange(5)
        >>> offset = x[:, None, None] + x[:, None] - x
        >>> cosine_fve(torch.cos(2 * torch.pi * 2 * offset / 5))
        tensor([0.0000, 1.0000], dtype=torch.float64)
    """
    along, total = along_and_total(grid)
    return along / total


def along_and_total(
    grid: Float[Tensor, "p p p"],
) -> tuple[Float[Tensor, " frequency"], Float[Tensor, ""]]:
    """Squared length of the logits along each cosine, and their whole squared length.

    <F, u_k>^2 and ||F||^2, F centred over c

    Args:
        grid: Logits of every pair (a, b) over the p answers, p odd.

    Returns:
        Squared logits, >= 0. High: a large component. The second is 0 where no pair's logits differ
        between answers, and then no share is defined.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> along_and_total(torch.ones(3, 3, 3))[1].item()
        0.0
    """
    p = len(grid)
    table = sum_table(grid)
    answer, offset = torch.arange(p)[:, None], torch.arange(p)
    profile = table[(answer + offset) % p, answer].sum(dim=0)  # over c, at each a + b - c
    cosines = fourier_basis(p)[:, 0].to(profile)
    # the p pairs behind each entry of the table turn sqrt(2 / p^3) of u_k into the basis's factor
    along = (cosines @ profile).square()
    centred = grid - grid.mean(dim=-1, keepdim=True)
    return along, precise(centred.norm(dim=-1)).square().sum()


class CosineFve(Metric):
    """Explained share of each frequency; the position column holds k."""

    symbol = "other"
    unit = "1"
    needs = ("grid_logits",)
    axes = ("position",)
    scale_law = {
        **invariant("vo", "qk", "relu", "stream", "rotation"),
        **invariant("logit_scale", "logit_shift"),
    }
    direction = "high: the model adds by means of this frequency"
    source = (
        "Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability, "
        "arXiv 2301.05217"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the logits of every pair."""
        along, total = snapshot.once(along_and_total, "grid_logits")
        self.add(
            along / total,
            n=(total > 0).expand_as(along),
            over=("position",),
            position=1,
            otherwise="the logits do not differ between answers",
        )
