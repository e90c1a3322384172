"""Head-write variance (sigma^2): how far what a head writes to the residual stream scatters."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, given, invariant, precise


def deviations(
    z: Float[Tensor, "sequence position head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],  # noqa: N803
) -> Float[Tensor, "sequence position head"]:
    """How far each token's write lies from the head's mean write.

    ||(z - mean z) W_O||^2 / d_model

    Args:
        z: Heads' values.
        W_O: Output weights, by head.

    Returns:
        Squared residual units, >= 0. The mean over tokens is the head's variance; larger: the head
        writes different things.

    Source:
        tr Cov(w) / d_model, token by token.

    Example:
        >>> z = torch.tensor([[[[0.0]], [[2.0]]]])
        >>> deviations(z, torch.ones(1, 1, 4)).flatten()
        tensor([1., 1.], dtype=torch.float64)
    """
    values = precise(z)
    centred = values - values.mean(dim=(0, 1))
    weights = precise(W_O)
    products = weights @ weights.mT / weights.shape[-1]
    return torch.einsum("sphk,hkl,sphl->sph", centred, products, centred)


def class_variances(
    z: Float[Tensor, "token head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],  # noqa: N803
    classes: Int[Tensor, " token"],
) -> dict[str, Float[Tensor, " head"]]:
    """Variance of the class means of a head's write, and around them.

    between = sum_c n_c ||mu_c - mu||^2 / (n d)
    within  = sum_c sum_{i in c} ||w_i - mu_c||^2 / (n d)

    Args:
        z: Heads' values.
        W_O: Output weights, by head.
        classes: The class of each token; those that have no other of their class are left out.

    Returns:
        `between` and `within`, squared residual units, both >= 0. High between: what is written
        tells classes apart. Empty where no class has two tokens.

    Source:
        One-way analysis of variance: Searle, Casella & McCulloch (1992), Variance Components.

    Example:
        >>> z = torch.tensor([0.0, 2.0, 10.0, 12.0])[:, None, None]
        >>> parts = class_variances(z, torch.ones(1, 1, 1), torch.tensor([0, 0, 1, 1]))
        >>> parts["between"].item(), parts["within"].item()
        (25.0, 1.0)
    """
    _, index, counts = classes.unique(return_inverse=True, return_counts=True)
    kept = counts[index] >= 2
    if not kept.any():
        return {}
    values, index = precise(z)[kept], index[kept]
    size = (len(counts), *values.shape[1:])
    sums = torch.zeros(size, dtype=values.dtype, device=z.device).index_add_(0, index, values)
    means = (sums / counts[:, None, None])[index]
    weights = precise(W_O)
    products = weights @ weights.mT / weights.shape[-1]

    def energy(off: Tensor) -> Float[Tensor, " head"]:
        return torch.einsum("thk,hkl,thl->h", off, products, off) / len(off)

    return {"between": energy(means - values.mean(dim=0)), "within": energy(values - means)}


class HeadWriteVariance(Metric):
    """V_h = tr Cov(what head h writes) / d_model over tokens, from the moments of z.

    Parts:
        between: Variance of the means of classes of tokens; given by whoever knows the classes of
            all tokens, never by a snapshot.
        within: Variance around them, likewise.
        ratio_*: Mean over suppressors over mean over clean heads, geometric mean over layers
            (E1), where <group> is what stood in the heads' place: `ratio_<group>`; likewise
            `layer_ratio_<group>` of one layer.
        trained: The main value along training, on held-out sequences.
        with_first: The main value with position 0, which it leaves out on pretrained models:
            attention sinks there are 10 to 1000 times as large. Likewise `<part>_with_first`.
    """

    symbol = "sigma2"
    unit = "resid^2"
    needs = ("blocks.*.attn.hook_z", "params")
    axes = ("layer", "head")
    parts = ("between", "within", "ratio_*", "layer_ratio_*", "trained", "with_first")
    part_units = {"ratio_*": "1", "layer_ratio_*": "1"}
    scale_law = {**invariant("vo", "qk", "relu", "gain", "rotation"), "stream": 2}
    functional = False
    direction = "high: the head writes different things at different tokens"
    source = "tr Cov(w) / d_model"

    def update(self, snapshot: Snapshot) -> None:
        """Add the tokens of a snapshot."""
        weights = given(snapshot.weights, "params")
        for layer, z in snapshot.layers("attn.hook_z"):
            values = precise(z).flatten(0, 1).transpose(0, 1)
            W_O = precise(weights.layers[layer].W_O)  # noqa: N806
            products = W_O @ W_O.mT / W_O.shape[-1]
            count = torch.full((len(values), 1), float(values.shape[1])).to(values)
            squares = torch.einsum("htk,hkl,htl->h", values, products, values)[:, None]
            writes = (values.sum(dim=1)[:, None] @ W_O)[:, 0] / W_O.shape[-1] ** 0.5
            self.accumulate("moments", torch.cat([count, squares, writes], dim=1), layer=layer)

    def means(self) -> dict[Place, Mean]:
        """Give the variances of the moments over all batches and devices."""
        means = super().means()
        for layer, moments in self.kept("moments"):
            n, squares, writes = moments[:, 0], moments[:, 1], moments[:, 2:]
            variance = squares / n - (writes / n[:, None]).square().sum(dim=-1)
            means[Place("", layer, 0, over=("head",))] = Mean(variance.clamp(min=0), n)
        return means
