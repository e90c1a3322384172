"""A suppressor made by hand: a copy of a head that writes the opposite, to be found."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Heads(Protocol):
    """An attention whose weights have a head axis first."""

    @property
    def W_Q(self) -> Tensor:
        """Query weights."""
        ...

    @property
    def W_K(self) -> Tensor:
        """Key weights."""
        ...

    @property
    def W_V(self) -> Tensor:
        """Value weights."""
        ...

    @property
    def W_O(self) -> Tensor:
        """Output weights."""
        ...

    @property
    def b_Q(self) -> Tensor:
        """Query biases."""
        ...

    @property
    def b_K(self) -> Tensor:
        """Key biases."""
        ...

    @property
    def b_V(self) -> Tensor:
        """Value biases."""
        ...


@torch.no_grad()
def plant(attention: Heads, *, host: int, source: int, alpha: float) -> None:
    """Overwrite a head with a copy of another that writes -alpha times as much.

    Then write(host) = -alpha write(source) at every token, so that its variance is alpha^2 times
    the source's, and zeroing it gives the model without the host exactly.

    Args:
        attention: The layer, changed in place.
        host: The head that is overwritten.
        source: The head that is copied.
        alpha: How strongly the copy undoes the source's write; 1 undoes all of it.

    Raises:
        ValueError: The two are one head, or the layer has no such head.
    """
    n_heads = len(attention.W_Q)
    for name, head in (("host", host), ("source", source)):
        if not 0 <= head < n_heads:
            raise ValueError(f"{name}={head}: the layer has heads 0 to {n_heads - 1}")
    if host == source:
        raise ValueError(f"host and source are both head {host}; a head cannot suppress itself")
    for name in ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V"):
        weight = getattr(attention, name)
        weight[host] = weight[source]
    attention.W_O[host] = -alpha * attention.W_O[source]


def strength(variances: Float[Tensor, " head"], *, host: int, source: int, ratio: float) -> float:
    """The alpha with which a plant's variance is `ratio` times the mean of the other heads'.

    alpha^2 V_source / mean(V_h, h != host) = ratio

    Args:
        variances: V_h of every head of the layer, before planting.
        host: The head that is overwritten; its own variance does not count.
        source: The head that is copied.
        ratio: The ratio that is wanted.

    Returns:
        alpha, >= 0.

    Raises:
        ValueError: The source writes the same at every token.

    Example:
        >>> strength(torch.tensor([9.0, 1.0, 3.0]), host=0, source=1, ratio=2.0)
        2.0
    """
    if variances[source] <= 0:
        raise ValueError(f"head {source} writes the same at every token; no copy of it varies")
    clean = torch.arange(len(variances)) != host
    mean = float(variances[clean].mean())
    return math.sqrt(ratio * mean / float(variances[source]))
