"""Weight update: how far the parameters went since the last record, outward and sideways."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, precise


def weight_update(
    now: Float[Tensor, " parameter"], before: Float[Tensor, " parameter"]
) -> dict[str, Float[Tensor, ""]]:
    """Length of a change of parameters, along them and across them.

    radial = (theta - theta_0) . theta_0 / ||theta_0||, tangential = the length of the rest

    Args:
        now: Parameters as one vector, theta.
        before: The same parameters earlier, theta_0, not all 0.

    Returns:
        Parameter units, by name: `length` in [0, inf); `radial`, any real number, positive: the
        parameters grew; `tangential` in [0, inf), high: they turned. length^2 = radial^2 +
        tangential^2.

    Source:
        Radial and tangential parts of a step: Prieto et al. (2025), Grokking at the edge of
        numerical stability, arXiv 2501.04697.

    Example:
        >>> parts = weight_update(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
        >>> parts["radial"].item(), parts["tangential"].item()
        (2.0, 4.0)
    """
    return _lengths(_products([before], [now - before]))


def descent_cosine(
    now: Float[Tensor, " parameter"], grad: Float[Tensor, " parameter"]
) -> Float[Tensor, ""]:
    """Cosine between the direction of descent and the parameters.

    cos(-grad, theta)

    Args:
        now: Parameters as one vector, theta, not all 0.
        grad: Their gradient, not all 0.

    Returns:
        Pure number, in [-1, 1]. 1: descent only enlarges the parameters; -1: it only shrinks them;
        0: it turns them.

    Source:
        Prieto et al. (2025), Grokking at the edge of numerical stability, arXiv 2501.04697.

    Example:
        >>> descent_cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])).item()
        1.0
    """
    return _cosine(_products([now], [grad]))


class WeightUpdate(Metric):
    """Length of the change of all parameters since the last stretch of training began.

    Parts:
        radial: The change along the parameters; positive: they grew.
        tangential: The change across them.
        cosine: cos(-gradient, parameters).
        length_<group>, radial_<group>, tangential_<group>, cosine_<group>: The same for one group
            of parameters: `embed`, `qk`, `ov`, `mlp`, `unembed`.
    """

    symbol = "other"
    unit = "param"
    needs = ("params", "before", "grads")
    parts = (
        "radial",
        "tangential",
        "cosine",
        *("length_*", "radial_*", "tangential_*", "cosine_*"),
    )
    part_units = dict.fromkeys(
        ("cosine", "cosine_embed", "cosine_qk", "cosine_ov", "cosine_mlp", "cosine_unembed"), "1"
    )
    scale_law = dict.fromkeys(set(GAUGES) - {"rotation"}, "changes") | {"rotation": "invariant"}
    functional = False
    direction = "high: the parameters move far; no value is better"
    source = (
        "Radial and tangential parts of a step: Prieto et al. (2025), Grokking at the edge of "
        "numerical stability, arXiv 2501.04697"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the weights and gradients of a snapshot."""
        weights = given(snapshot.weights, "params")
        nothing = precise(weights.W_U.new_zeros(3))
        changes, slopes = [nothing], [nothing]
        for group, names in weights.groups.items():
            tensors = [precise(weights.named[name]) for name in names]
            if not tensors:
                continue
            if snapshot.before:
                starts = [precise(snapshot.before[name]) for name in names]
                steps = [now - start for now, start in zip(tensors, starts, strict=True)]
                changes.append(_products(starts, steps))
            if snapshot.grads:
                slopes.append(_products(tensors, [precise(snapshot.grads[name]) for name in names]))
            self._add_part(f"_{group}", changes[-1], slopes[-1])
        self._add_part("", torch.stack(changes).sum(dim=0), torch.stack(slopes).sum(dim=0))

    def _add_part(self, suffix: str, change: Tensor, slope: Tensor) -> None:
        has_start = int(change[0] > 0)
        for name, length in _lengths(change).items():
            part = "" if name + suffix == "length" else name + suffix
            self.add(length, n=has_start, part=part, otherwise="no earlier parameters, or all 0")
        has_slope = int(slope[0] * slope[2] > 0)
        self.add(_cosine(slope), n=has_slope, part=f"cosine{suffix}", otherwise="no gradient")


def _products(
    a: Iterable[Float[Tensor, "..."]], b: Iterable[Float[Tensor, "..."]]
) -> Float[Tensor, "3"]:
    """The sums a.a, a.b and b.b over tensors; they add up over groups of parameters."""
    pairs = [(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]
    return torch.stack([torch.stack([x @ x, x @ y, y @ y]) for x, y in pairs]).sum(dim=0)


def _lengths(products: Float[Tensor, "3"]) -> dict[str, Float[Tensor, ""]]:
    start, along, change = products
    radial = along / start.sqrt()
    # round-off leaves a change that is wholly radial a hair below 0
    tangential = (change - radial.square()).clamp(min=0).sqrt()
    return {"length": change.sqrt(), "radial": radial, "tangential": tangential}


def _cosine(products: Float[Tensor, "3"]) -> Float[Tensor, ""]:
    theta, along, grad = products
    return -along / (theta * grad).sqrt()
