"""Absorption: a child's latent fires in place of its parent's."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, held_out, precise


def absorption(
    child_fires: Bool[Tensor, " row"],
    parent_fires: Bool[Tensor, " row"],
    parent: Bool[Tensor, " row"],
    child: Bool[Tensor, " row"],
) -> Float[Tensor, "4"]:
    """Rows of the parent in which the child's latent fires and the parent's is silent.

    Args:
        child_fires: Whether the latent that stands for the child is on.
        parent_fires: Whether that for the parent is.
        parent: Whether the row is of the parent.
        child: Whether it is of the child.

    Returns:
        Such rows with the child and all with it; such rows without the child and all without; each
        >= 0. The first share less the second is the absorption, better low.

    Source:
        Chanin et al. (2024), A is for Absorption, arXiv:2409.14507; on planted truth in place of a
        probe.

    Example:
        >>> on, off = torch.tensor([True, True]), torch.tensor([False, False])
        >>> absorption(on, off, on, torch.tensor([True, False]))
        tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    event = child_fires & ~parent_fires
    both, alone = parent & child, parent & ~child
    return precise(
        torch.stack([(event & both).sum(), both.sum(), (event & alone).sum(), alone.sum()])
    )


class Absorption(Metric):
    """Absorption, its mean over child concepts; of planted truth.

    Parts:
        folded: A parent's latent counts as on where one of its own children is.
        excluded: Pairs whose child latent is a child of the parent's own latent are left out.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding", "members", "matches", "truth")
    parts = ("folded", "excluded")
    scale_law = {"resid": "invariant"}
    direction = "0: a parent's latent fires whether or not a child does"
    source = "Chanin et al. (2024)"

    def update(self, snapshot: Snapshot) -> None:
        """Count a snapshot's rows, for each child concept."""
        coding, members, _, matches = held_out(snapshot)
        fires = coding.codes > 0
        counts = []
        for child, parent in enumerate(matches.parent):
            own, above = int(matches.latent[child]), int(matches.latent[max(parent, 0)])
            if parent < 0 or own < 0 or above < 0:
                counts.append(torch.zeros(3, 4, dtype=torch.float64, device=fires.device))
                continue
            of_parent = [above, *(matches.parent_of_latent == above).nonzero()[0].tolist()]
            truth = members[:, parent], members[:, child]
            counted = absorption(fires[:, own], fires[:, above], *truth)
            folded = absorption(fires[:, own], fires[:, of_parent].any(dim=1), *truth)
            is_own_child = matches.parent_of_latent[own] == above
            counts.append(torch.stack([counted, folded, counted * (not is_own_child)]))
        self.accumulate("counts", precise(torch.stack(counts)))

    def means(self) -> dict[Place, Mean]:
        """Give the means over the child concepts seen with and without the child."""
        found: dict[Place, Mean] = {}
        for _, counts in self.kept("counts"):
            for place, part in enumerate(("", "folded", "excluded")):
                hits, both, others, alone = counts[:, place].T
                there = (both > 0) & (alone > 0)
                share = hits / both.clamp(min=1) - others / alone.clamp(min=1)
                mean = (share * there).sum() / there.sum().clamp(min=1)
                found[Place(part)] = Mean(mean, there.sum(), "no child concept can be judged")
        return found
