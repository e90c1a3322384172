"""What a pair's logits cost, in float64: cross-entropy, StableMax, squared error."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import nll_loss

Loss = Literal["cross_entropy", "stablemax", "mse"]


def pair_losses(
    logits: Float[Tensor, "*replica pair d_vocab"],
    answer: Int64[Tensor, "*replica pair"],
    *,
    loss: Loss = "cross_entropy",
    temperature: Tensor | float | None = None,
) -> Float64[Tensor, "*replica pair"]:
    """Each pair's loss, in float64, where a confident pair's loss does not underflow.

    cross_entropy: -log softmax(logits / temperature)[answer].
    stablemax: -log(s(l)[answer] / sum s(l)), s(x) = x + 1 for x >= 0, 1 / (1 - x) below.
    mse: mean over outputs of (l - sqrt(d_vocab) onehot)^2; zero logits cost 1.

    Args:
        logits: Over all outputs, the '=' included.
        answer: The right output.
        loss: Which one.
        temperature: What logits are divided by first, one number or something that broadcasts;
            None leaves them.

    Returns:
        Nats, or the squared error's own unit; at least 0.

    Source:
        StableMax: Prieto et al. (2025), Grokking at the edge of numerical stability.

    Example:
        >>> pair_losses(torch.zeros(1, 4), torch.tensor([2]), loss="mse").item()
        1.0
    """
    if temperature is not None:
        logits = logits / temperature
    if loss == "mse":
        size = logits.shape[-1]
        is_right = torch.arange(size, device=logits.device) == answer[..., None]
        target = is_right * math.sqrt(size)
        return (logits.double() - target).square().mean(dim=-1)
    log_prob = log_softmax(logits) if loss == "cross_entropy" else log_stablemax(logits)
    picked = nll_loss(log_prob.flatten(0, -2), answer.flatten(), reduction="none")
    return picked.view(answer.shape)


def log_softmax(logits: Float[Tensor, "*pair d_vocab"]) -> Float64[Tensor, "*pair d_vocab"]:
    """Log-probabilities in float64."""
    return logits.log_softmax(dim=-1, dtype=torch.float64)


def log_stablemax(logits: Float[Tensor, "*pair d_vocab"]) -> Float64[Tensor, "*pair d_vocab"]:
    """Log-probabilities in float64 with s(x) in the place of exp(x): no underflow of the loss."""
    log_s = logits.double().abs().log1p() * logits.sign()  # log(1 / (1 - x)) = -log(1 + |x|)
    return log_s - log_s.logsumexp(dim=-1, keepdim=True)
