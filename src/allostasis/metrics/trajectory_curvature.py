"""Trajectory curvature (other): by what angle the path over tokens turns at each of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, invariant, precise


def trajectory_curvature(
    resid: Float[Tensor, "*batch position d_model"],
) -> Float[Tensor, "*batch turn"]:
    """Angle between successive steps of the residual stream.

    arccos(s_t . s_{t+1} / (||s_t|| ||s_{t+1}||)), s_t = r_{t+1} - r_t

    Args:
        resid: Residual stream of one layer, tokens in their order; at least three.

    Returns:
        rad, in [0, pi], one a token with neighbours on both sides; larger: a sharper turn. 0: a
        straight line. An angle with a step of length 0 counts as pi / 2.

    Source:
        Henaff et al. (2019), Perceptual straightening of natural videos, Nat. Neurosci. 22

    Example:
        >>> trajectory_curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
        tensor([1.5708])
    """
    steps = resid.diff(dim=-2)
    one, other = steps[..., :-1, :], steps[..., 1:, :]
    cosine = torch.cosine_similarity(one, other, dim=-1)
    return cosine.clamp(-1, 1).arccos()


class TrajectoryCurvature(Metric):
    """Mean turn of the residual stream behind each block.

    Parts:
        no_first: Mean without the turn that position 0 has part in.
    """

    symbol = "other"
    unit = "rad"
    needs = ("blocks.*.hook_resid_post",)
    axes = ("layer",)
    parts = ("no_first",)
    scale_law = invariant("vo", "qk", "relu", "stream", "rotation", "resid")
    direction = "larger: sharper turns; 0: a straight line"
    source = "Henaff et al. (2019), Perceptual straightening of natural videos, Nat. Neurosci. 22"

    def update(self, snapshot: Snapshot) -> None:
        """Add the sequences of a snapshot."""
        for layer, resid in snapshot.layers("hook_resid_post"):
            if resid.shape[1] < 3:
                continue
            turns = trajectory_curvature(precise(resid))
            for part, some in (("", turns), ("no_first", turns[:, 1:])):
                if some.numel():
                    self.add(some.mean(), n=some.numel(), part=part, layer=layer)
