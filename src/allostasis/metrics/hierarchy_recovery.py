"""Hierarchy recovery: whether the latents of child concepts hang below that of their parent."""

import torch
from jaxtyping import Int
from torch import Tensor

from allostasis.analysis.matching import Matches
from allostasis.metrics.base import Metric, Snapshot, given


def hierarchy_recovery(matches: Matches) -> tuple[Int[Tensor, " child"], Int[Tensor, " child"]]:
    """The latent above each child concept's latent, and the latent of its parent concept.

    Args:
        matches: Of concepts and latents, made on training rows.

    Returns:
        Two latents each, in [-1, latents); equal and not -1: larger shares of these are better.

    Source:
        Bussmann et al. (2025), Matryoshka SAEs, arXiv:2503.17547, for planted hierarchies.

    Example:
        >>> import numpy as np
        >>> one = np.array([0, 1])
        >>> score, above = np.ones(2), np.array([-1, 0])
        >>> found, wanted = hierarchy_recovery(Matches(one, one, score, score, (), above, above))
        >>> found.tolist(), wanted.tolist()
        ([0], [0])
    """
    children = matches.parent >= 0
    own = matches.latent[children]
    found = torch.from_numpy(matches.parent_of_latent[own]).where(torch.from_numpy(own) >= 0, -1)
    return found, torch.from_numpy(matches.latent[matches.parent[children]])


class HierarchyRecovery(Metric):
    """Share of child concepts that are assigned to their parent; one without a latent is wrong.

    Parts:
        chance: What is expected when the children's assignments are dealt anew among them.
        matched: Share of concepts, of both levels, that have a latent of their own.
    """

    symbol = "other"
    unit = "1"
    needs = ("matches",)
    parts = ("chance", "matched")
    scale_law = {"resid": "invariant"}
    direction = "1: every child hangs below its parent"
    source = "Bussmann et al. (2025)"

    def update(self, snapshot: Snapshot) -> None:
        """Add the child concepts of a snapshot's matches."""
        matches = given(snapshot.matches, "matches")
        found, wanted = hierarchy_recovery(matches)
        right = (found == wanted) & (found >= 0)
        dealt = (found[:, None] == wanted[None]) & (found >= 0)[:, None]
        n = len(found)
        no_child = torch.zeros(1, dtype=torch.float64)
        self.add((right.double() if n else no_child).mean(), n=n, otherwise="no child concept")
        self.add((dealt.double() if n else no_child).mean(), n=n, part="chance", otherwise=None)
        share = (torch.from_numpy(matches.latent) >= 0).double().mean()
        self.add(share, n=len(matches.latent), part="matched")
