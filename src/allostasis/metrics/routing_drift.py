"""Routing drift (G): how far attention has moved since the last recorded step."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.attention_entropy import attention_entropy, visible_keys
from allostasis.metrics.base import GAUGES, Mean, Metric, Place, Snapshot, invariant, precise


def jensen_shannon(
    p: Float[Tensor, "*rows key"], q: Float[Tensor, "*rows key"]
) -> Float[Tensor, "*rows"]:
    """Jensen-Shannon divergence of each row.

    JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, over keys

    Args:
        p: Distributions; each row over `key` sums to 1.
        q: The distributions to compare with.

    Returns:
        Bits, in [0, 1]. 0: the two are equal. 1: they share no key.
        This is the divergence, not its square root (which scipy's `jensenshannon` returns).

    Source:
        Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37.

    Example:
        >>> jensen_shannon(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]])).item()
        0.0
    """
    mixed = attention_entropy((p + q) / 2)
    return (mixed - (attention_entropy(p) + attention_entropy(q)) / 2) / math.log(2)


def routing_drift(
    now: Float[Tensor, "*rows key"], before: Float[Tensor, "*rows key"]
) -> Float[Tensor, ""]:
    """Mean Jensen-Shannon divergence between two attention patterns.

    Args:
        now: Attention pattern; each row over `key` sums to 1.
        before: The same prompts' pattern at the earlier step.

    Returns:
        Bits, in [0, 1]. 0: routing has not moved. 1: no row shares a key with its past.

    Source:
        Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37.

    Example:
        >>> left, right = torch.eye(2)[None, :1], torch.eye(2)[None, 1:]
        >>> routing_drift(left, right).item()
        1.0
    """
    return jensen_shannon(now, before).mean()


class RoutingDrift(Metric):
    """Mean over examples and rows with two or more visible keys, for each head.

    Parts:
        from_init: Drift since step 0 in place of the last lag.
        content: Divergence, at this step, between probe example 2i and its neighbour 2i + 1: what a
            change of content alone does to the head. The probe is in random order.
        relative: Drift divided by `content`; 1 means that training moved the head as much as
            another prompt would.
    """

    symbol = "G"
    unit = "bit"
    needs = (
        "blocks.*.attn.hook_pattern",
        "earlier.blocks.*.attn.hook_pattern",
        "initial.blocks.*.attn.hook_pattern",
    )
    axes = ("layer", "head")
    parts = ("from_init", "content", "relative")
    part_units = {"relative": "1"}
    scale_law = invariant(*GAUGES)
    direction = "high: routing still moving (plastic); 0: frozen"
    source = (
        "Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the patterns of a snapshot."""
        for layer, now in snapshot.layers("attn.hook_pattern"):
            nothing = now.new_zeros(now.shape[1])
            absent = {"": "no snapshot one lag earlier", "from_init": "no snapshot at step 0"}
            for part, why in absent.items():
                self.add(nothing, n=0, part=part, over=("head",), layer=layer, otherwise=why)
            paired = len(now) // 2 * 2
            self._compare("content", layer, now[0:paired:2], now[1:paired:2])
        for layer, now, before in snapshot.pairs("attn.hook_pattern"):
            self._compare("", layer, now, before)
        for layer, now, before in snapshot.pairs("attn.hook_pattern", then="initial"):
            self._compare("from_init", layer, now, before)

    def _compare(self, part: str, layer: int, now: Tensor, before: Tensor) -> None:
        rows = visible_keys(now) >= 2
        drift = jensen_shannon(precise(now[:, :, rows]), precise(before[:, :, rows]))
        self.add(
            drift.mean((0, 2)),
            n=len(now) * rows.any(),
            part=part,
            over=("head",),
            layer=layer,
            otherwise="no row sees two keys",
        )

    def means(self) -> dict[Place, Mean]:
        """Give the means, and drift as a share of what a change of content does."""
        means = super().means()
        relative = {}
        for place, content in means.items():
            if place.part == "content":
                drift = means[place._replace(part="")]
                n = torch.where(content.value > 0, drift.n, 0)
                why = "no snapshot one lag earlier, or a change of content does not move the head"
                ratio = Mean(drift.value / content.value, n, why)
                relative[place._replace(part="relative")] = ratio
        return means | relative
