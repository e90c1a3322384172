"""Leakage: how much of the concepts' latents speaks where their concept is not."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, held_out, precise


def leakage(
    codes: Float[Tensor, "row concept"],
    members: Bool[Tensor, "row concept"],
    known: Bool[Tensor, "row concept"],
) -> Float[Tensor, "3 concept"]:
    """Code mass of other concepts' latents, and of all, on each concept's rows.

    For concept c: sum over its rows t and the concepts j that t is not of, of code_j(t); the same
    over all j; and its rows in which all codes are 0. A row that is of c and of what is above c
    leaks to neither.

    Args:
        codes: Of each concept's own latent.
        members: Whether a row is of a concept; labels are mandatory.
        known: Whether that is known; elsewhere the code counts nowhere.

    Returns:
        Two masses, >= 0, and a count; the first over the second is the leakage, lower is better.

    Source:
        PH, with labels in place of its constant.

    Example:
        >>> codes = torch.tensor([[3.0, 1.0]])
        >>> leakage(codes, codes > 2, codes > 0)[:, 0]
        tensor([1., 4., 0.], dtype=torch.float64)
    """
    mass = precise(codes) * known
    others = (mass * ~members).sum(dim=1)
    every = mass.sum(dim=1)
    rows = precise(members & known)
    return torch.stack([others @ rows, every @ rows, precise(every == 0) @ rows])


class Leakage(Metric):
    """Leakage, its mean over concepts; to be compared at equal L0 only.

    Parts:
        silent: Share of the concepts' rows in which no concept's latent fires; they have no
            leakage.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding", "members", "matches")
    parts = ("silent",)
    scale_law = {"resid": "invariant"}
    direction = "0: only the concept's own latents fire on its rows"
    source = "PH"

    def update(self, snapshot: Snapshot) -> None:
        """Add the masses on a snapshot's rows."""
        coding, members, known, matches = held_out(snapshot)
        index = torch.from_numpy(matches.latent).to(coding.codes.device)
        codes = coding.codes[:, index.clamp(min=0)] * (index >= 0)
        masses = leakage(codes, members, known)
        self.accumulate("masses", torch.cat([masses, precise(members & known).sum(dim=0)[None]]))

    def means(self) -> dict[Place, Mean]:
        """Give the mean over concepts whose rows have any mass."""
        found: dict[Place, Mean] = {}
        for _, (others, every, silent, rows) in self.kept("masses"):
            heard = every > 0
            share = torch.where(heard, others / every.clamp(min=1e-300), torch.zeros_like(others))
            found[Place()] = Mean(
                share.sum() / heard.sum().clamp(min=1), heard.sum(), "no concept's latent fires"
            )
            found[Place("silent")] = Mean(
                silent.sum() / rows.sum().clamp(min=1), rows.sum().long(), "no row is of a concept"
            )
        return found
