"""Attention entropy (G): how widely a head spreads its attention."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, invariant, precise


def attention_entropy(pattern: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows"]:
    """Entropy of each attention row.

    -sum_k p_k ln p_k

    Args:
        pattern: Attention pattern; each row over `key` sums to 1.

    Returns:
        Nats, in [0, ln keys]. 0: one key is read. ln keys: all are read alike.

    Source:
        Shannon (1948), A mathematical theory of communication, Bell Syst. Tech. J. 27.

    Example:
        >>> attention_entropy(torch.tensor([[0.5, 0.5]])).item()  # ln 2
        0.693147
    """
    return -torch.xlogy(pattern, pattern).sum(dim=-1)


def visible_keys(pattern: Float[Tensor, "batch head query key"]) -> Int[Tensor, " query"]:
    """How many keys each query may attend to.

    Query q sees q + 1 keys where the pattern is causal, which is read from its zeros, else all.

    Args:
        pattern: Attention pattern with its head axis, without padding.

    Returns:
        Counts, in [1, keys]; they have no direction.

    Raises:
        ValueError: The pattern was averaged over heads.

    Source:
        Vaswani et al. (2017), Attention is all you need.

    Example:
        >>> visible_keys(torch.eye(3)[None, None])
        tensor([1, 2, 3])
    """
    if pattern.ndim != 4:
        raise ValueError(
            f"an attention pattern has the axes batch, head, query, key; got {pattern.ndim} axes. "
            "A pattern averaged over heads says nothing about any of them."
        )
    n_queries, n_keys = pattern.shape[-2:]
    if torch.any(pattern.triu(diagonal=1)):
        return torch.full((n_queries,), n_keys, device=pattern.device)
    return torch.arange(1, n_queries + 1, device=pattern.device)


class AttentionEntropy(Metric):
    """Mean over examples and rows with two or more visible keys, as a share of the highest value.

    Parts:
        nats: The same mean without division by ln(visible keys).
        published: Entropy in nats of the pattern averaged over heads. By concavity it is at least
            the heads' mean entropy, and it is high where sharp heads read different keys.
    """

    symbol = "G"
    unit = "1"
    needs = ("blocks.*.attn.hook_pattern",)
    axes = ("layer", "head")
    parts = ("nats", "published")
    part_units = {"nats": "nat", "published": "nat"}
    audit_key = "G_entropy"
    scale_law = invariant(*GAUGES)
    direction = "1: all visible keys read alike; 0: one key"
    source = "Shannon (1948), A mathematical theory of communication, Bell Syst. Tech. J. 27"

    def update(self, snapshot: Snapshot) -> None:
        """Add the patterns of a snapshot."""
        for layer, pattern in snapshot.layers("attn.hook_pattern"):
            visible = visible_keys(pattern)
            open_rows = visible >= 2
            rows = precise(pattern[:, :, open_rows])
            nats = attention_entropy(rows)
            share = nats / precise(visible[open_rows]).log()
            merged = attention_entropy(rows.mean(dim=1))
            n, why = len(rows) * open_rows.any(), "no row sees two keys"
            heads = {"over": ("head",), "layer": layer, "otherwise": why}
            self.add(share.mean((0, 2)), n=n, **heads)
            self.add(nats.mean((0, 2)), n=n, part="nats", **heads)
            self.add(merged.mean(), n=n, part="published", layer=layer, otherwise=why)
