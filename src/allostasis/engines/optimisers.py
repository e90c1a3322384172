"""Optimisers of many models at once: rows of parameters, updated in place, one row a replica.

Every number that an update needs lies on the device and every tensor keeps its place, so that a
CUDA graph can hold the update; nothing is summed across rows. One row is a single model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.models.modular_replicas import Layout
from allostasis.models.modular_step import Parameters

Optimiser = Literal["adamw", "adam_l2", "muon", "sgdm"]
HIDDEN = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
"""What Muon orthogonalises; the other parameters get AdamW's update."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration."""
TINY = 1e-30  # a squared norm below which a tensor has no direction


@dataclass(frozen=True)
class Rule:
    """How gradients become updates.

    Attributes:
        optimiser: `adamw`: decoupled decay. `adam_l2`: decay in the gradient. `muon`: for the
            hidden matrices, the rest by AdamW. `sgdm`: momentum, decoupled decay.
        betas: Adam's moment decay rates.
        eps: Added to Adam's root of the second moment.
        momentum: Of `muon` (Nesterov) and of `sgdm`.
        muon_lr: Learning rate of the hidden matrices and of their decay; the others have the usual
            one.
        warmup_steps: Updates over which learning rates rise linearly.
        orthograd: Whether a tensor's gradient loses its part along the tensor and is rescaled to
            the length it had.
        grokfast: Gain of the slow part that is added to the gradient; 0 adds none.
        grokfast_alpha: Decay rate of the running mean that is the slow part.

    Source:
        Muon: Jordan et al. (2024). Orthogonalised gradient: Prieto et al. (2025), arXiv 2501.04697.
        Grokfast: Lee et al. (2024), arXiv 2405.20233.
    """

    optimiser: Optimiser = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    momentum: float = 0.95
    muon_lr: float = 0.02
    warmup_steps: int = 10
    orthograd: bool = False
    grokfast: float = 0.0
    grokfast_alpha: float = 0.98


class Updates:
    """The state of a rule for a block of models.

    Args:
        rule: What is done.
        layout: Where in a row each parameter lies.
        theta: The rows; updated in place by `apply`.
        lr: Each replica's learning rate.
        weight_decay: Each replica's decay coefficient.
        norm: The norm of all of a replica's parameters that is restored after each update, or
            None, which lets it move.
    """

    def __init__(
        self,
        rule: Rule,
        layout: Layout,
        theta: Float[Tensor, "replica size"],
        *,
        lr: Float[Tensor, " replica"],
        weight_decay: Float[Tensor, " replica"],
        norm: Float[Tensor, " replica"] | None = None,
    ) -> None:
        self.rule, self.layout, self.theta = rule, layout, theta
        self.lr, self.weight_decay = lr.double()[:, None], weight_decay.double()[:, None]
        self.rate = self.lr  # at which decay acts
        if rule.optimiser == "muon":
            self.rate = self.lr.repeat(1, layout.size)
            for name in HIDDEN:
                getattr(layout.views(self.rate), name).fill_(rule.muon_lr)
        self.norm = None if norm is None else norm.to(theta.dtype)[:, None]
        self.done = torch.zeros((), dtype=torch.float64, device=theta.device)
        names = ["first"] + ["second"] * (rule.optimiser != "sgdm")
        names += ["momentum"] * (rule.optimiser == "muon") + ["slow"] * bool(rule.grokfast)
        self.state = {"done": self.done} | {name: torch.zeros_like(theta) for name in names}

    @torch.no_grad()
    def apply(self, grad: Float[Tensor, "replica size"]) -> None:
        """Do one update; `grad` is left as it is."""
        self.done.add_(1)
        warm = (self.done / max(1, self.rule.warmup_steps)).clamp(max=1)
        decay = self.weight_decay * self.rate * warm
        grad = self._filtered(grad)
        if self.rule.optimiser == "adam_l2":
            grad, decay = grad + self.theta * self._number(self.weight_decay), None
        step = self._momentum(grad, warm) if self.rule.optimiser == "sgdm" else None
        if step is None:
            step = self._adam(grad, warm)
        if self.rule.optimiser == "muon":
            self._orthogonalise(step, grad, warm)
        if decay is not None:
            self.theta.mul_(self._number(1 - decay))
        self.theta.sub_(step)
        if self.norm is not None:
            self.theta.mul_(self.norm / self.theta.norm(dim=1, keepdim=True))

    def _number(self, value: Tensor) -> Tensor:
        """A number of each replica in the precision of the parameters."""
        return value.to(self.theta.dtype)

    def _filtered(self, grad: Tensor) -> Tensor:
        if self.rule.grokfast:
            slow = self.state["slow"].lerp_(grad, 1 - self.rule.grokfast_alpha)
            grad = grad + self.rule.grokfast * slow
        if self.rule.orthograd:
            sides = zip(self.layout.views(self.theta), self.layout.views(grad), strict=True)
            grad = torch.cat([orthogonal(w.flatten(1), g.flatten(1)) for w, g in sides], dim=1)
        return grad

    def _momentum(self, grad: Tensor, warm: Tensor) -> Tensor:
        first = self.state["first"].mul_(self.rule.momentum).add_(grad)
        return first * self._number(self.lr * warm)

    def _adam(self, grad: Tensor, warm: Tensor) -> Tensor:
        beta1, beta2 = self.rule.betas
        first = self.state["first"].lerp_(grad, 1 - beta1)
        second = self.state["second"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        rise1, rise2 = 1 - beta1**self.done, 1 - beta2**self.done
        root = second.sqrt().mul_(self._number(rise2.rsqrt())).add_(self.rule.eps)
        return (first / root).mul_(self._number(self.lr * warm / rise1))

    def _orthogonalise(self, step: Tensor, grad: Tensor, warm: Tensor) -> None:
        """Put Muon's steps in the place of the hidden matrices'; a head's matrices are one."""
        mean = self.state["momentum"].lerp_(grad, 1 - self.rule.momentum)
        wanted = self.layout.views(grad.lerp(mean, self.rule.momentum))
        steps, size = self.layout.views(step), self._number(self.rule.muon_lr * warm)
        for name in HIDDEN:
            target = getattr(steps, name)
            matrix = joined(name, getattr(wanted, name))
            gain = max(1.0, matrix.shape[2] / matrix.shape[1]) ** 0.5  # of outputs over inputs
            target.copy_(parted(name, orthonormal(matrix) * gain, target) * size)


class RowOptimiser(torch.optim.Optimizer):
    """The rule for one model, as torch's optimisers are used: a block of one row.

    Args:
        parameters: The model's parameters, in the order of `Parameters`.
        rule: What is done; the warm-up is the rule's.
        lr: Learning rate.
        weight_decay: Decay coefficient.
        norm: The norm of all parameters that is restored after each update; None lets it move.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rule: Rule,
        *,
        lr: float,
        weight_decay: float,
        norm: float | None = None,
    ) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.own = Parameters(*parameters)
        layout = Layout(self.own)

        def number(value: float) -> Tensor:
            return torch.tensor([value], dtype=torch.float64, device=self.own.W_E.device)

        self.updates = Updates(
            rule,
            layout,
            layout.flat([Parameters(*(tensor.detach() for tensor in self.own))]),
            lr=number(lr),
            weight_decay=number(weight_decay),
            norm=None if norm is None else number(norm),
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do one update with the parameters' gradients."""
        del closure
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.own]
        self.updates.theta.copy_(torch.cat([p.flatten() for p in self.own])[None])
        self.updates.apply(torch.cat([grad.flatten() for grad in grads])[None])
        for parameter, row in zip(
            self.own, self.updates.layout.views(self.updates.theta), strict=True
        ):
            parameter.copy_(row[0])

    def state_dict(self) -> dict[str, Any]:
        """The rule's state; torch's own would round its counter to the parameters' precision."""
        return {"rows": {name: value.clone() for name, value in self.updates.state.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        for name, value in self.updates.state.items():
            value.copy_(state_dict["rows"][name])


def joined(name: str, tensor: Float[Tensor, "replica ..."]) -> Float[Tensor, "replica i o"]:
    """A parameter as the matrix that it is: all heads in one, inputs by outputs."""
    if name == "W_O":
        return tensor.flatten(1, 2)
    return tensor.transpose(1, 2).flatten(2) if tensor.ndim == 4 else tensor


def parted(
    name: str, matrix: Float[Tensor, "replica i o"], like: Float[Tensor, "replica ..."]
) -> Float[Tensor, "replica ..."]:
    """A matrix of all heads in the parameter's own shape."""
    if name == "W_O" or like.ndim == 3:
        return matrix.view_as(like)
    return matrix.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)


def orthonormal(
    matrix: Float[Tensor, "replica i o"], *, steps: int = 5
) -> Float[Tensor, "replica i o"]:
    """The nearest matrix with singular values near 1, by Newton-Schulz iteration.

    Returns:
        A matrix with the singular vectors of the given one and singular values in about
        [0.7, 1.2]: the coefficients trade exactness for few steps. Zero where the matrix is.
    """
    is_tall = matrix.shape[1] > matrix.shape[2]
    wide = matrix.mT if is_tall else matrix
    wide = wide / wide.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)
    linear, cubic, quintic = QUINTIC
    for _ in range(steps):
        gram = torch.bmm(wide, wide.mT)
        inner = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        wide = torch.baddbmm(wide, inner, wide, beta=linear)
    return wide.mT if is_tall else wide


def orthogonal(
    weight: Float[Tensor, "replica entry"], grad: Float[Tensor, "replica entry"]
) -> Float[Tensor, "replica entry"]:
    """A tensor's gradient without its part along the tensor, as long as it was before."""
    along = (weight * grad).sum(dim=1, keepdim=True)
    along /= weight.square().sum(dim=1, keepdim=True).clamp(min=TINY)
    across = grad - along * weight
    length = grad.norm(dim=1, keepdim=True)
    return across * (length / across.norm(dim=1, keepdim=True).clamp(min=TINY))
