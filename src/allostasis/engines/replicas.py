"""Many seeds of one model at once: a block of replicas that are trained side by side.

A replica has its own initial weights, split, learning rate, weight decay, temperature and norm; it
shares nothing with its neighbours but the time of a step. A block always has the same width, empty
slots being filled with copies of the first replica, so that what a replica does is a function of
its seed, the settings, the width, the device and the versions.

On a GPU one update is captured as a CUDA graph and replayed: every tensor keeps its place, and the
host reads nothing until a chunk of updates is done. On a CPU an update is the same code, run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from allostasis.engines.optimisers import Rule, Updates
from allostasis.models.modular_loss import Loss, pair_losses
from allostasis.models.modular_replicas import Layout, Questions, grid_logits, logits
from allostasis.models.modular_step import Parameters
from allostasis.tasks.modular_pairs import Op, Pairs, pairs_of

WARM_UP = 3  # updates before the capture: libraries make their handles and workspaces then


@dataclass(frozen=True)
class Replica:
    """One replica: where it starts, what it is trained on, and how.

    Attributes:
        theta: Initial weights.
        train: Pairs trained on; as many as any other replica of the block has.
        lr: Learning rate.
        weight_decay: Decay coefficient.
        temperature: What the logits are divided by in the loss.
        norm: The norm of all parameters that is restored after each update; None lets it move.
    """

    theta: Parameters
    train: Pairs
    lr: float = 1e-3
    weight_decay: float = 1.0
    temperature: float = 1.0
    norm: float | None = None


class Evaluation(NamedTuple):
    """Each replica's answers to all pairs, those trained on and the others."""

    train_accuracy: Float64[Tensor, " replica"]
    test_accuracy: Float64[Tensor, " replica"]
    train_loss: Float64[Tensor, " replica"]
    test_loss: Float64[Tensor, " replica"]


class Block:
    """Replicas that are trained side by side.

    Args:
        replicas: Those wanted, at most `width`.
        width: Slots; those that are left over repeat the first replica.
        rule: How gradients become updates.
        loss: What a pair costs.
        op: The task's operation.
        sphere: Whether the final residual and W_U's columns are normalised.
        is_uniform: Whether attention is fixed at 1/3.
        device: Where.
        is_captured: Whether an update is a CUDA graph; needs a GPU.

    Raises:
        ValueError: There are no replicas or too many, they do not fit each other, or a graph is
            wanted without a GPU.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        width: int,
        rule: Rule,
        loss: Loss = "cross_entropy",
        op: Op = "add",
        sphere: bool = False,
        is_uniform: bool = False,
        device: torch.device | str = "cpu",
        is_captured: bool = False,
    ) -> None:
        device = torch.device(device)
        _check(replicas, width, device, is_captured)
        self.width = width
        self.loss: Loss = loss
        self.sphere, self.is_uniform = sphere, is_uniform
        slots = [*replicas, *[replicas[0]] * (width - len(replicas))]
        self.layout = Layout(replicas[0].theta)
        self.theta = self.layout.flat([slot.theta for slot in slots]).to(device)
        self.grad = torch.zeros_like(self.theta)
        self.losses = torch.zeros(width, dtype=torch.float64, device=device)
        self._leaves = [
            leaf.detach().requires_grad_() for leaf in self.layout.views(self.theta)
        ]  # share the rows' memory

        def numbers(values: Sequence[float]) -> Float64[Tensor, " replica"]:
            return torch.tensor(values, dtype=torch.float64, device=device)

        norms = [slot.norm for slot in slots if slot.norm is not None]
        self.updates = Updates(
            rule,
            self.layout,
            self.theta,
            lr=numbers([slot.lr for slot in slots]),
            weight_decay=numbers([slot.weight_decay for slot in slots]),
            norm=numbers(norms) if norms else None,
        )
        self.temperature: Tensor | None = None
        if any(slot.temperature != 1 for slot in slots):
            temperature = numbers([slot.temperature for slot in slots])
            self.temperature = temperature.to(self.theta.dtype)[:, None, None]

        p = replicas[0].train.p
        self.p, dtype = p, self.theta.dtype
        fields = (torch.stack([getattr(s.train, f) for s in slots]) for f in ("a", "b", "answer"))
        self.questions = Questions.of(*(field.to(device) for field in fields), p=p, dtype=dtype)
        is_train = torch.zeros(width, p * p, dtype=torch.bool)
        for row, slot in zip(is_train, slots, strict=True):
            row[(slot.train.a * p + slot.train.b).cpu()] = True
        self.is_train = is_train.to(device)
        self.answers = pairs_of(torch.arange(p * p), p=p, op=op).answer.to(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if is_captured:
            self._capture()

    # ------------------------------------------------------------------ training

    def advance(self, n_updates: int) -> None:
        """Do updates; `losses` holds each replica's loss before the last of them."""
        for _ in range(n_updates):
            if self._graph is None:
                self._update()
            else:
                self._graph.replay()

    def _update(self) -> None:
        theta = Parameters(*self._leaves)
        out = logits(theta, self.questions, sphere=self.sphere, is_uniform=self.is_uniform)
        each = pair_losses(
            out, self.questions.answer, loss=self.loss, temperature=self.temperature
        ).mean(dim=1)
        grads = torch.autograd.grad(each.sum(), self._leaves)
        flat = [grad.flatten(1) for grad in grads]
        torch.cat(flat, dim=1, out=self.grad)
        self.losses.copy_(each.detach())
        self.updates.apply(self.grad)

    def _capture(self) -> None:
        """Record one update; what the warm-up changes is put back."""
        kept = {name: tensor.clone() for name, tensor in self._tensors().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._update()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update()
        self.load_state_dict(kept)
        self._graph = graph

    # ------------------------------------------------------------------ looking

    @property
    def parameters(self) -> Parameters:
        """All replicas' parameters, with a leading axis; the block's own memory."""
        return self.layout.views(self.theta)

    @torch.no_grad()
    def grid_logits(self) -> Float[Tensor, "replica p p d_vocab"]:
        """Logits at '=' of every pair, by a and b, as they stand."""
        return grid_logits(self.parameters, sphere=self.sphere, is_uniform=self.is_uniform)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Accuracy and loss of each replica on its training pairs and on the others."""
        grid = self.grid_logits().flatten(1, 2)
        is_train, answer = self.is_train, self.answers.expand(self.width, -1)
        hits = (grid.argmax(dim=-1) == answer).double()
        losses = pair_losses(grid, answer, loss=self.loss, temperature=self.temperature)
        readings = []
        for values in (hits, losses):
            for chosen in (is_train, ~is_train):
                readings.append((values * chosen).sum(dim=1) / chosen.sum(dim=1))
        return Evaluation(*readings)

    # ------------------------------------------------------------------ survival

    def _tensors(self) -> dict[str, Tensor]:
        own = {"theta": self.theta, "grad": self.grad, "losses": self.losses}
        return own | {f"updates.{name}": value for name, value in self.updates.state.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What decides all further updates, and the last gradient."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` left off; tensors keep their places."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state[name])


def _check(
    replicas: Sequence[Replica], width: int, device: torch.device, is_captured: bool
) -> None:
    if not 0 < len(replicas) <= width:
        raise ValueError(f"{len(replicas)} replicas do not fit in width={width}; take 1 to {width}")
    sizes = {len(replica.train) for replica in replicas}
    if len(sizes) > 1:
        raise ValueError(
            f"replicas train on {', '.join(map(str, sorted(sizes)))} pairs; in one block all train "
            "on as many"
        )
    if len({replica.norm is None for replica in replicas}) > 1:
        raise ValueError(
            "some replicas hold their norm and some do not; in one block all do or none"
        )
    if is_captured and device.type != "cuda":
        raise ValueError(f"device={device} has no CUDA graphs; take is_captured=False")
