"""Routing stability (G): how much of attention has stayed since the last recorded step."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.attention_entropy import attention_entropy, visible_keys
from allostasis.metrics.base import GAUGES, Metric, Snapshot, invariant, precise
from allostasis.metrics.routing_drift import jensen_shannon, routing_drift


def routing_stability(
    now: Float[Tensor, "*rows key"], before: Float[Tensor, "*rows key"]
) -> Float[Tensor, ""]:
    """One minus the routing drift.

    1 - JSD(now, before), averaged over rows

    Args:
        now: Attention pattern; each row over `key` sums to 1.
        before: The same prompts' pattern at the earlier step.

    Returns:
        Pure number, in [0, 1]. 1: frozen. 0: no row shares a key with its past.

    Source:
        Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37.

    Example:
        >>> import torch
        >>> pattern = torch.eye(2)[None]
        >>> routing_stability(pattern, pattern).item()
        1.0
    """
    return 1 - routing_drift(now, before)


def published_stability(
    now: Float[Tensor, "query key"], before: Float[Tensor, "query key"]
) -> Float[Tensor, ""]:
    """One minus the Jensen-Shannon distance in nats between two whole matrices.

    1 - sqrt(JSD(now / sum, before / sum))

    Args:
        now: One head's attention pattern on one example.
        before: The same head's pattern at the earlier step.

    Returns:
        Pure number, in [0.1674, 1]: 1 - sqrt(ln 2) at the least. 1: frozen.

    Source:
        The Conservation of Separability v2.1, with scipy's `jensenshannon`.

    Example:
        >>> import torch
        >>> left, right = torch.eye(2)[:1], torch.eye(2)[1:]
        >>> published_stability(left, right).item()
        0.1674
    """
    p, q = (pattern.flatten() / pattern.sum() for pattern in (now, before))
    nats = attention_entropy((p + q) / 2) - (attention_entropy(p) + attention_entropy(q)) / 2
    return 1 - nats.clamp(min=0).sqrt()  # round-off leaves equal matrices a hair below 0


class RoutingStability(Metric):
    """One minus the routing drift, for each head.

    Parts:
        published: `published_stability` of the batch's first example and head 0; 1.0 at step 0,
            where there is nothing to compare with. The distance's ceiling keeps it above 0.1674,
            one example stands for all, and its high values, which the source calls plastic, mean
            frozen. Over several devices it is the mean of their first examples.
    """

    symbol = "G"
    unit = "1"
    needs = ("blocks.*.attn.hook_pattern", "earlier.blocks.*.attn.hook_pattern")
    axes = ("layer", "head")
    parts = ("published",)
    audit_key = "G"
    scale_law = invariant(*GAUGES)
    direction = "high: frozen; 0: routing shares no key with its past"
    source = (
        "Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the patterns of a snapshot."""
        for layer, now in snapshot.layers("attn.hook_pattern"):
            nothing, why = now.new_zeros(now.shape[1]), "no snapshot one lag earlier"
            self.add(nothing, n=0, over=("head",), layer=layer, otherwise=why)
            if snapshot.step == 0:
                self._add_published(1.0, layer)
        for layer, now, before in snapshot.pairs("attn.hook_pattern"):
            rows = visible_keys(now) >= 2
            drift = jensen_shannon(precise(now[:, :, rows]), precise(before[:, :, rows]))
            self.add(
                1 - drift.mean((0, 2)),
                n=len(now) * rows.any(),
                over=("head",),
                layer=layer,
                otherwise="no row sees two keys",
            )
            first = published_stability(precise(now[0, 0]), precise(before[0, 0]))
            self._add_published(first, layer)

    def _add_published(self, value: Tensor | float, layer: int) -> None:
        is_first = int(self.update_count == 1)
        self.add(value, n=is_first, part="published", layer=layer, head=0, otherwise=None)
