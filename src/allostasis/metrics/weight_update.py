"""Weight update: how far the parameters went since the last record, outward and sideways."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, precise


def weight_update(
    now: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, ""]]:
    """Length of a change of parameters, along them and across them.

    radial = (theta - theta_0) . theta_0 / ||theta_0||, tangential = the length of the rest

    Args:
        now: Parameters by name, theta.
        before: The same parameters earlier, theta_0, not all 0.

    Returns:
        Parameter units, by name: `length` in [0, inf); `radial`, any real number, positive: the
        parameters grew; `tangential` in [0, inf), high: they turned. length^2 = radial^2 +
        tangential^2.

    Source:
        Radial and tangential parts of a step: Prieto et al. (2025), Grokking at the edge of
        numerical stability, arXiv 2501.04697.

    Example:
        >>> parts = weight_update({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([1.0, 0.0])})
        >>> parts["radial"].item(), parts["tangential"].item()
        (2.0, 4.0)
    """
    start = _flat(before[name] for name in now)
    change = _flat(now.values()) - start
    outward = start / start.norm()
    radial = change @ outward
    return {
        "length": change.norm(),
        "radial": radial,
        "tangential": (change - radial * outward).norm(),
    }


def descent_cosine(now: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Cosine between the direction of descent and the parameters.

    cos(-grad, theta)

    Args:
        now: Parameters by name, theta, not all 0.
        grads: Their gradients, not all 0.

    Returns:
        Pure number, in [-1, 1]. 1: descent only enlarges the parameters; -1: it only shrinks them;
        0: it turns them.

    Source:
        Prieto et al. (2025), Grokking at the edge of numerical stability, arXiv 2501.04697.

    Example:
        >>> descent_cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-2.0, 0.0])}).item()
        1.0
    """
    theta, grad = _flat(now.values()), _flat(grads[name] for name in now)
    return -(theta @ grad) / (theta.norm() * grad.norm())


def _flat(tensors: Iterable[Tensor]) -> Float[Tensor, " parameter"]:
    return torch.cat([precise(tensor).flatten() for tensor in tensors])


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
        self._add_group("", weights.named, snapshot)
        for group, names in weights.groups.items():
            if names:
                now = {name: weights.named[name] for name in names}
                self._add_group(f"_{group}", now, snapshot)

    def _add_group(self, suffix: str, now: Mapping[str, Tensor], snapshot: Snapshot) -> None:
        has_start = _is_nonzero(now, snapshot.before)
        change = weight_update(now, snapshot.before) if has_start else {}
        for name in ("length", "radial", "tangential"):
            part = "" if name + suffix == "length" else name + suffix
            value, why = change.get(name, 0.0), "no earlier parameters, or all 0"
            self.add(value, n=int(has_start), part=part, otherwise=why)
        has_grad = _is_nonzero(now, snapshot.grads)
        value = descent_cosine(now, snapshot.grads) if has_grad else 0.0
        self.add(value, n=int(has_grad), part=f"cosine{suffix}", otherwise="no gradient")


def _is_nonzero(names: Iterable[str], tensors: Mapping[str, Tensor]) -> bool:
    return bool(tensors) and any(tensors[name].any() for name in names)
