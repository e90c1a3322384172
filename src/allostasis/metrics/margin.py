"""Margin (Psi): by how much the true answer's logit leads the best of the others."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise

EXACT = "donot_use_mm_for_euclid_dist"  # torch's name; the short way rounds small distances off


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
    return rivalry(logits, labels).runner_up


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
    return rivalry(logits, labels).margin


class Rivalry(NamedTuple):
    """The true answer against the best wrong one, as `margin` and `runner_up` define them."""

    margin: Float[Tensor, " batch"]
    runner_up: Int[Tensor, " batch"]


def rivalry(logits: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]) -> Rivalry:
    """Margin and runner-up of each example, in one search.

    m = l_y - max_{k != y} l_k, and the k that attains the maximum

    Args:
        logits: Logits at the readout position.
        labels: The true answers.

    Returns:
        The margin in logits, any real number, up is better; and answer ids, in [0, V).

    Source:
        Bartlett et al. (2017), Spectrally-normalized margin bounds for neural networks.

    Example:
        >>> rivalry(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).margin.item()
        1.0
    """
    right = logits.gather(-1, labels[:, None])[:, 0]
    wrong, others = logits.scatter(-1, labels[:, None], -torch.inf).max(dim=-1)
    return Rivalry(precise(right) - precise(wrong), others)


def answer_distance(
    unembed: Float[Tensor, "d_model vocab"],
    labels: Int[Tensor, " batch"],
    others: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Distance between the unembedding columns of two answers.

    ||u_y - u_j||

    Args:
        unembed: The unembedding; u_v is its column v.
        labels: One answer of each pair.
        others: The other.

    Returns:
        Logits per residual unit, >= 0. Larger: the readout tells the two apart more strongly.

    Source:
        Elsayed et al. (2018), Large margin deep networks for classification.

    Example:
        >>> answer_distance(2 * torch.eye(2), torch.tensor([0]), torch.tensor([1])).item()
        2.828427
    """
    columns = precise(unembed).T
    return torch.cdist(columns, columns, compute_mode=EXACT)[labels, others]


class Margin(Metric):
    """Mean margin against the runner-up.

    Parts:
        geometric: m / ||u_y - u_j||, the readout state's distance from the border between the two
            answers in residual units, which no rescaling of the unembedding can raise.
    """

    symbol = "Psi"
    unit = "logit"
    needs = ("logits", "labels", "params")
    parts = ("geometric",)
    part_units = {"geometric": "resid"}
    scale_law = {
        **invariant(*GAUGES, "logit_shift"),
        "logit_scale": 1,
        "geometric.gain": "changes",
        "geometric.stream": 1,
    }
    direction = "up is better; positive where the answer is right"
    source = "Bartlett et al. (2017), Spectrally-normalized margin bounds for neural networks"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        labels, unembed = given(snapshot.labels, "labels"), given(snapshot.weights, "params").W_U
        lead, others = snapshot.once(rivalry, "logits", "labels")
        distance = answer_distance(unembed, labels, others)
        apart = distance > 0
        self.add(lead.mean(), n=len(lead))
        self.add(
            (lead[apart] / distance[apart]).mean(),
            n=apart.sum(),
            part="geometric",
            otherwise="the runner-up shares the answer's unembedding column",
        )

    @staticmethod
    def per_example(snapshot: Snapshot) -> dict[str, Tensor]:
        """Give the value of each example, by part."""
        return {"": snapshot.once(rivalry, "logits", "labels").margin}
