"""Purity: how well the latent that stands for a concept tells its tokens from others."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from allostasis.analysis.matching import auroc
from allostasis.metrics.base import Mean, Metric, Place, Snapshot, held_out

FEWEST = 3  # rows of a concept, and rows that are not, from which on it is scored


def purity(codes: Float[Tensor, " row"], members: Bool[Tensor, " row"]) -> float:
    """AUROC of a latent for a concept.

    P(code of a member > code of another) + P(they are equal) / 2

    Args:
        codes: Of the one latent that training rows chose.
        members: Whether a row is of the concept; labels are mandatory.

    Returns:
        In [0, 1]. 1: every member's code is above all others'; 0.5: the latent says nothing.

    Source:
        PH, with AUROC on held-out rows in place of a precision on those that chose the latent.

    Example:
        >>> purity(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([True, True, False]))
        0.75
    """
    return auroc(codes.double().cpu().numpy(), members.cpu().numpy())


class Purity(Metric):
    """Purity of the concepts' latents on held-out rows, their mean.

    Parts:
        precision: Share of members among the rows whose code is beyond training's best threshold.
        recall: Share of the members whose code is.
        one_to_one: The main value with no latent for two concepts.
        parents: Of concepts with none above them.
        children: Of the others.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding", "members", "matches")
    parts = ("precision", "recall", "one_to_one", "parents", "children")
    scale_law = {"resid": "invariant"}
    direction = "1: the latent is the concept; 0.5: it says nothing"
    source = "PH"

    def update(self, snapshot: Snapshot) -> None:
        """Keep the codes of the concepts' latents."""
        coding, members, known, matches = held_out(snapshot)
        self.matches = matches
        for name, chosen in (("best", matches.best), ("latent", matches.latent)):
            index = torch.from_numpy(chosen).to(coding.codes.device)
            codes = coding.codes[:, index.clamp(min=0)].float() * (index >= 0)
            self.collect(name, codes)
        self.collect("truth", members.to(torch.int8) + 2 * known.to(torch.int8))

    def means(self) -> dict[Place, Mean]:
        """Give means over the concepts that have enough rows."""
        kept = {name: rows.cpu() for name in ("best", "latent", "truth")
                for _, rows in self.kept(name)}  # fmt: skip
        if not kept:
            return {}
        members, known = (kept["truth"] % 2) > 0, kept["truth"] >= 2
        found: dict[str, list[float]] = {part: [] for part in ("", *self.parts)}
        for concept, threshold in enumerate(self.matches.threshold):
            rows = known[:, concept]
            truth = members[rows, concept]
            if min(int(truth.sum()), int((~truth).sum())) < FEWEST:
                continue
            codes = kept["best"][rows, concept]
            area = purity(codes, truth)
            found[""].append(area)
            found["children" if self.matches.parent[concept] >= 0 else "parents"].append(area)
            found["one_to_one"].append(purity(kept["latent"][rows, concept], truth))
            said = codes >= float(threshold) if self.matches.best[concept] >= 0 else codes > 1
            if said.any():
                found["precision"].append(float(truth[said].double().mean()))
            found["recall"].append(float(said[truth].double().mean()))
        why = f"no concept with {FEWEST} rows"
        return {
            Place(part): Mean(
                torch.tensor(float(np.mean(values)) if values else 0.0, dtype=torch.float64),
                len(values),
                why if part in ("", "precision") else None,
            )
            for part, values in found.items()
        }
