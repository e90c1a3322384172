"""Feature splitting: over how many latents a concept is spread."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, held_out, precise


def feature_split(
    fires: Bool[Tensor, "row latent"], members: Bool[Tensor, " row"]
) -> Float[Tensor, "3"]:
    """Rows by what a group of latents says of them: any of them fires, or none.

    Args:
        fires: Whether each latent of the group is on.
        members: Whether a row is of the concept; labels are mandatory.

    Returns:
        Hits, false alarms and misses, each >= 0; F1 = 2 hits / (2 hits + the others), high is good.

    Source:
        Chanin et al. (2024), A is for Absorption, arXiv:2409.14507; with the union of latents that
        fire in place of a logistic probe.

    Example:
        >>> fires = torch.tensor([[True, False], [False, True], [False, False]])
        >>> feature_split(fires, torch.tensor([True, True, True]))
        tensor([2., 0., 1.], dtype=torch.float64)
    """
    said = fires.any(dim=1)
    hits, alarms, misses = (said & members).sum(), (said & ~members).sum(), (~said & members).sum()
    return precise(torch.stack([hits, alarms, misses]))


class FeatureSplit(Metric):
    """Latents of a concept's group, as training rows chose it; the mean over concepts.

    Parts:
        f1: Of the groups on held-out rows.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding", "members", "matches")
    parts = ("f1",)
    scale_law = {"resid": "invariant"}
    direction = "1: one latent a concept; high: split"
    source = "Chanin et al. (2024)"

    def update(self, snapshot: Snapshot) -> None:
        """Add what the groups say of a snapshot's rows."""
        coding, members, known, matches = held_out(snapshot)
        self.groups = matches.groups
        counts = []
        for concept, group in enumerate(matches.groups):
            rows = known[:, concept]
            fires = coding.codes[rows][:, list(group)] > 0
            counts.append(feature_split(fires, members[rows, concept]))
        self.accumulate("counts", torch.stack(counts))

    def means(self) -> dict[Place, Mean]:
        """Give both means over the concepts that any latent stands for."""
        found: dict[Place, Mean] = {}
        for _, counts in self.kept("counts"):
            sizes = [len(group) for group in self.groups if group]
            mean = counts.new_tensor(sum(sizes) / max(len(sizes), 1))
            found[Place()] = Mean(mean, len(sizes), "no concept has a latent")
            there = counts.new_tensor([len(group) for group in self.groups]) > 0
            there &= counts[:, 0] + counts[:, 2] > 0
            f1 = 2 * counts[:, 0] / (counts * counts.new_tensor([2, 1, 1])).sum(1).clamp(min=1)
            mean = (f1 * there).sum() / there.sum().clamp(min=1)
            found[Place("f1")] = Mean(mean, there.sum(), "no row is of a concept with a latent")
        return found
