"""Margin (Psi): by how much the true answer's logit leads the best of the others."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise


def runner_up(
    logits: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The answer with the largest logit among the wrong ones.

    j = argmax_{k != y} l_k

    Args:
        logits: Logits at the readout position.
        labels: The true answers.

    Returns:
        Answer ids, in [0, V); they have no direction.

    Source:
        Standard.

    Example:
        >>> runner_up(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).item()
        2
    """
    return logits.scatter(-1, labels[:, None], -torch.inf).argmax(dim=-1)


def margin(
    logits: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Lead of the true answer over the runner-up.

    m = l_y - max_{k != y} l_k

    Args:
        logits: Logits at the readout position.
        labels: The true answers.

    Returns:
        Logits, any real number; up is better. Positive exactly where the answer is right.

    Source:
        Bartlett et al. (2017), Spectrally-normalized margin bounds for neural networks.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).item()
        1.0
    """
    answers = torch.stack([labels, runner_up(logits, labels)], dim=-1)
    right, wrong = precise(logits.gather(-1, answers)).unbind(dim=-1)
    return right - wrong


def geometric_margin(
    logits: Float[Tensor, "batch vocab"],
    labels: Int[Tensor, " batch"],
    unembed: Float[Tensor, "d_model vocab"],
) -> Float[Tensor, " batch"]:
    """Distance of the readout state from the border between the true answer and the runner-up.

    m / ||u_y - u_j||

    Args:
        logits: Logits at the readout position.
        labels: The true answers.
        unembed: The unembedding; u_v is its column v.

    Returns:
        Residual units, any real number; up is better. Infinite or NaN where two answers share one
        unembedding column.

    Source:
        Elsayed et al. (2018), Large margin deep networks for classification.

    Example:
        >>> geometric_margin(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), 2 * torch.eye(2)).item()
        1.0606602
    """
    columns = precise(unembed)
    between = columns[:, labels] - columns[:, runner_up(logits, labels)]
    return margin(logits, labels) / between.norm(dim=0)


class Margin(Metric):
    """Mean margin against the runner-up.

    Parts:
        geometric: The margin in residual units, which no rescaling of the unembedding can raise.
    """

    symbol = "Psi"
    unit = "logit"
    needs = ("logits", "labels", "params")
    parts = ("geometric",)
    part_units = {"geometric": "resid"}
    scale_law = {
        **invariant(*GAUGES, "logit_shift"),
        "logit_scale": 1,
        "geometric.stream": 1,
    }
    direction = "up is better; positive where the answer is right"
    source = "Bartlett et al. (2017), Spectrally-normalized margin bounds for neural networks"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        example = self.per_example(snapshot)
        self.add(example[""].mean(), n=len(example[""]))
        distances = example["geometric"]
        defined = distances.isfinite()
        self.add(
            distances[defined].mean(),
            n=defined.sum(),
            part="geometric",
            otherwise="two answers share one unembedding column",
        )

    @staticmethod
    def per_example(snapshot: Snapshot) -> dict[str, Tensor]:
        """Give each part's value for each example."""
        logits, labels = given(snapshot.logits, "logits"), given(snapshot.labels, "labels")
        unembed = given(snapshot.weights, "params").W_U
        return {
            "": margin(logits, labels),
            "geometric": geometric_margin(logits, labels, unembed),
        }
