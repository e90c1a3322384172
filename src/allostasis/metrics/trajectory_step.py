"""Trajectory step (other): how far the residual stream moves from token to token."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, invariant, precise


def trajectory_step(
    resid: Float[Tensor, "*batch position d_model"],
) -> Float[Tensor, "*batch step"]:
    """Distance between the residual streams of neighbouring tokens.

    ||r_{t+1} - r_t||

    Args:
        resid: Residual stream of one layer, tokens in their order; at least two.

    Returns:
        resid, in [0, inf), one a pair of neighbours; larger: they lie further apart. The first one
        spans position 0, whose norm is an outlier in most models.

    Source:
        Tiny Ablation Lab, which calls it curvature; a distance, not an angle: see
        trajectory_curvature

    Example:
        >>> import torch
        >>> trajectory_step(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]))
        tensor([5., 0.])
    """
    return resid.diff(dim=-2).norm(dim=-1)


class TrajectoryStep(Metric):
    """Mean step of the residual stream behind each block.

    Parts:
        first5: Mean of the first five steps.
        rest: Mean of the later ones.
        no_first: Mean without the step from position 0.
    """

    symbol = "other"
    unit = "resid"
    needs = ("blocks.*.hook_resid_post",)
    axes = ("layer",)
    functional = False
    parts = ("first5", "rest", "no_first")
    scale_law = {**invariant("vo", "qk", "relu", "rotation"), "stream": "changes", "resid": 1}
    direction = "larger: neighbouring tokens lie further apart"
    source = "Tiny Ablation Lab"

    def update(self, snapshot: Snapshot) -> None:
        """Add the sequences of a snapshot."""
        for layer, resid in snapshot.layers("hook_resid_post"):
            if resid.shape[1] < 2:
                continue
            steps = trajectory_step(precise(resid))
            whole = {"": steps, "first5": steps[:, :5], "rest": steps[:, 5:]}
            for part, some in {**whole, "no_first": steps[:, 1:]}.items():
                if some.numel():
                    self.add(some.mean(), n=some.numel(), part=part, layer=layer)
