"""Toy models of superposition: many small tied autoencoders, trained side by side."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn

from allostasis.core.seeding import derive


class ToyModel(nn.Module):
    """x' = ReLU(W^T W x + b), several models of one shape on a leading axis.

    No model sees another: the loss is the sum of their losses, and Adam works entry by entry, so
    that each trains as it would alone. All start from the same weights, N(0, 2 / (m + n)), so that
    what tells them apart is what they are shown.

    Args:
        seed: The run's seed.
        n_models: Models.
        d_hidden: Hidden dimensions, m.
        n_features: Features, n.

    Source:
        Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652.

    Example:
        >>> model = ToyModel(seed=0, n_models=3, d_hidden=2, n_features=5)
        >>> model(torch.rand(3, 7, 5)).shape
        torch.Size([3, 7, 5])
    """

    def __init__(
        self,
        *,
        seed: int,
        n_models: Annotated[int, Gt(0)],
        d_hidden: Annotated[int, Gt(0)],
        n_features: Annotated[int, Gt(0)],
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derive(seed, "init"))
        drawn = torch.randn(d_hidden, n_features, generator=generator)
        drawn *= math.sqrt(2 / (d_hidden + n_features))
        self.W = nn.Parameter(drawn.repeat(n_models, 1, 1))
        self.b = nn.Parameter(torch.zeros(n_models, n_features))

    def hidden(
        self, x: Float[Tensor, "model example feature"]
    ) -> Float[Tensor, "model example d_hidden"]:
        """W x."""
        return x @ self.W.mT

    def forward(
        self, x: Float[Tensor, "model example feature"]
    ) -> Float[Tensor, "model example feature"]:
        """Every model's reconstruction of its own examples."""
        return torch.baddbmm(self.b[:, None], self.hidden(x), self.W).relu()

    def losses(
        self,
        x: Float[Tensor, "model example feature"],
        importance: Float[Tensor, "model feature"],
    ) -> Float[Tensor, " model"]:
        """sum_i I_i (x_i - x'_i)^2, mean over examples, of each model."""
        off = (x - self(x)).square().mean(dim=1)
        return (importance * off).sum(dim=-1)
