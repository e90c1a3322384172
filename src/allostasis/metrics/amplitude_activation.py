"""Activation amplitude (A): the root-mean-square size of the residual stream."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, invariant, precise

CELLS_PER_OCTAVE = 128
SMALLEST_OCTAVE, LARGEST_OCTAVE = -16, 32
INERT = "amplitude cannot move here: the site is a norm's output"


def amplitude_activation(resid: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens"]:
    """Root mean square over features of each token's residual vector.

    ||r|| / sqrt(d)

    Args:
        resid: Residual stream at a site that no norm has just passed.

    Returns:
        Residual units, >= 0. High: large activations. It can be compared across widths.

    Source:
        The Conservation of Separability v2.1, per feature and at a site where it can move.

    Example:
        >>> amplitude_activation(torch.full((1, 4), 3.0)).item()
        3.0
    """
    return resid.norm(dim=-1) / math.sqrt(resid.shape[-1])


def before_norm(
    snapshot: Snapshot, layer: int, part: Literal["mid", "post"], resid: Tensor
) -> Tensor | None:
    """The stream at a site where its size can move.

    Args:
        snapshot: What was recorded.
        layer: Which layer.
        part: `mid`: between attention and MLP; `post`: behind the MLP.
        resid: The value at `hook_resid_{part}`.

    Returns:
        Residual units, any real number, with no direction: `resid` itself unless a norm has just
        made it; then the sum before that norm, or None where the model has no hook there.

    Source:
        Sites of a post-norm block, LN(x + f(x)).

    Example:
        >>> free = Snapshot(step=0)
        >>> before_norm(free, 0, "mid", torch.ones(1)).item()
        1.0
    """
    if f"blocks.{layer}.hook_resid_{part}" not in snapshot.normalised_sites:
        return resid
    return snapshot.acts.get(f"blocks.{layer}.hook_{'attn' if part == 'mid' else 'mlp'}_sum")


def _cells(amplitude: Float[Tensor, " tokens"]) -> Float[Tensor, "2 cells"]:
    smallest, largest = 2.0**SMALLEST_OCTAVE, 2.0**LARGEST_OCTAVE
    octave = amplitude.clamp(smallest, largest).log2() - SMALLEST_OCTAVE
    n_cells = (LARGEST_OCTAVE - SMALLEST_OCTAVE) * CELLS_PER_OCTAVE + 1
    cell = (octave * CELLS_PER_OCTAVE).long()
    rows = torch.stack([torch.ones_like(amplitude), amplitude])
    return rows.new_zeros(2, n_cells).index_add_(1, cell, rows)


def _quantile(cells: Float[Tensor, "2 cells"], share: float) -> Float[Tensor, ""]:
    n = cells[0].long()
    rank = (share * n.sum()).ceil().long().clamp(min=1)
    cell = torch.searchsorted(n.cumsum(0), rank)
    return cells[1, cell] / cells[0, cell]


class AmplitudeActivation(Metric):
    """Mean amplitude over tokens at each layer's `hook_resid_post`.

    Where that site is a norm's output, amplitude cannot move there: the sum before the norm is read
    where the model has a hook for it, else only `published` is given.

    Parts:
        mid: The same mean at `hook_resid_mid`, between attention and MLP.
        median: Median over tokens, as the mean of the histogram cell (1/128 octave) that holds it.
        p99: 99th percentile over tokens, likewise.
        max_share: Mean over tokens of max_i r_i^2 / ||r||^2, the share of the largest feature, in
            [1/d, 1]; tokens whose vector is 0 are left out.
        at_answer: Mean over examples at the readout position alone.
        published: Mean of ||r|| over tokens. At a norm's output it is sqrt(d) times the gain
            whatever happens, and it grows with sqrt(d), so that widths cannot be compared.
    """

    symbol = "A"
    unit = "resid"
    needs = ("blocks.*.hook_resid_mid", "blocks.*.hook_resid_post")
    reads_also = ("blocks.*.hook_attn_sum", "blocks.*.hook_mlp_sum")
    axes = ("layer",)
    parts = ("mid", "median", "p99", "max_share", "at_answer", "published")
    part_units = {"max_share": "1"}
    audit_key = "A_activation"
    scale_law = {
        **invariant("vo", "qk", "relu", "gain", "rotation"),
        "resid": 1,
        "stream": 1,
        "max_share.resid": "invariant",
        "max_share.stream": "invariant",
        "max_share.rotation": "changes",
    }
    functional = False
    direction = "high: large activations; no value is better"
    source = "The Conservation of Separability v2.1, per feature and at a site where it can move"

    def update(self, snapshot: Snapshot) -> None:
        """Add the tokens of a snapshot."""
        for layer, resid in snapshot.layers("hook_resid_mid"):
            free = before_norm(snapshot, layer, "mid", resid)
            if free is None:
                self.add(0.0, n=0, part="mid", layer=layer, otherwise=INERT)
            else:
                amplitude = amplitude_activation(precise(free))
                self.add(amplitude.mean(), n=amplitude.numel(), part="mid", layer=layer)
        for layer, resid in snapshot.layers("hook_resid_post"):
            norm = precise(resid).norm(dim=-1)
            self.add(norm.mean(), n=norm.numel(), part="published", layer=layer)
            free = before_norm(snapshot, layer, "post", resid)
            if free is None:
                for part in ("", "median", "p99", "max_share", "at_answer"):
                    self.add(0.0, n=0, part=part, layer=layer, otherwise=INERT)
            else:
                tokens = precise(free)
                amplitude = amplitude_activation(tokens)
                self._add_free(layer, tokens, amplitude, snapshot.readout)

    def _add_free(self, layer: int, tokens: Tensor, amplitude: Tensor, readout: int) -> None:
        answer = amplitude[:, readout]
        self.add(amplitude.mean(), n=amplitude.numel(), layer=layer)
        self.add(answer.mean(), n=len(answer), part="at_answer", layer=layer)
        self.accumulate("cells", _cells(amplitude.flatten()), layer=layer)
        moving = amplitude > 0
        share = tokens.abs().amax(dim=-1)[moving] / amplitude[moving]
        self.add(
            share.square().mean() / tokens.shape[-1],
            n=moving.sum(),
            part="max_share",
            layer=layer,
            otherwise="every residual vector is 0",
        )

    def means(self) -> dict[Place, Mean]:
        """Give the means, and the quantiles of the histograms."""
        means = super().means()
        for layer, cells in self.kept("cells"):
            for part, share in (("median", 0.5), ("p99", 0.99)):
                means[Place(part, layer)] = Mean(_quantile(cells, share), cells[0].sum())
        return means
