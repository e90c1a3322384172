"""The readout and its cross-entropy as one operation that never holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

CELLS = {"cpu": 2**20, "cuda": 2**26}
"""Logits at a time. On a CPU 4 MB in float32: smaller blocks fit a core's cache, but two cores then
wait for each other more often. On a GPU 256 MB, since there each block costs a dozen launches."""


class ReadoutLoss(torch.autograd.Function):
    """Mean cross-entropy of `states @ W_U`, with its gradients computed on the way.

    The rows of `logits = states @ W_U` are needed for nothing but their own loss, and the gradient
    by them is softmax(logits) - onehot(target), known as soon as they are. So a block of rows goes
    from logits to gradients while it is in the cache, and nothing of size rows x vocabulary is
    ever written to memory. No term is left out: the gradients are those of autograd but for the
    order of sums.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        states: Float[Tensor, "row d_model"],
        W_U: Float[Tensor, "d_model vocab"],
        targets: Int64[Tensor, " row"],
    ) -> Float[Tensor, ""]:
        """The loss in nats, ready for `backward`."""
        n_rows, vocab = len(states), W_U.shape[1]
        size = max(1, CELLS.get(states.device.type, CELLS["cpu"]) // vocab)
        loss = states.new_zeros(())
        by_state = torch.empty_like(states)
        by_weight = torch.zeros_like(W_U)
        buffer = states.new_empty(min(size, n_rows), vocab)
        transposed = W_U.T.contiguous().T if vocab < W_U.shape[0] else W_U
        for begin in range(0, n_rows, size):
            rows, answer = states[begin : begin + size], targets[begin : begin + size, None]
            logits = torch.mm(rows, transposed, out=buffer[: len(rows)])
            logits.sub_(logits.amax(dim=1, keepdim=True))
            loss -= logits.gather(1, answer).sum()
            logits.exp_()
            total = logits.sum(dim=1, keepdim=True)
            loss += total.log().sum()
            logits.div_(total.mul_(n_rows))
            logits.scatter_add_(1, answer, logits.new_full((len(rows), 1), -1 / n_rows))
            torch.mm(logits, W_U.T, out=by_state[begin : begin + size])
            by_weight.addmm_(rows.T, logits)
        ctx.save_for_backward(by_state, by_weight)
        return loss / n_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """Gradients by states and unembedding."""
        by_state, by_weight = ctx.saved_tensors
        return by_state * grad, by_weight * grad, None


def readout_loss(
    states: Float[Tensor, "sequence position d_model"],
    W_U: Float[Tensor, "d_model vocab"],
    targets: Int64[Tensor, "sequence position"],
    scored: Bool[Tensor, "sequence position"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the scored positions, in nats, ready for `backward`.

    Args:
        states: What the unembedding reads.
        W_U: The unembedding, without bias.
        targets: The next tokens.
        scored: Which positions count.

    Returns:
        Nats, >= 0; down is better.

    Source:
        Cross-entropy; computing it in blocks: Wijmans et al. (2025), Cut Your Losses, ICLR.

    Example:
        >>> states, target = torch.zeros(1, 2, 3), torch.tensor([[1, 0]])
        >>> readout_loss(states, torch.ones(3, 4), target, target > 0).item()  # ln 4
        1.386294
    """
    if bool(scored.all()):
        return ReadoutLoss.apply(states.flatten(0, 1), W_U, targets.flatten())
    return ReadoutLoss.apply(states[scored], W_U, targets[scored])
