"""Sparse features: each is absent, or uniform on [0, 1]; fresh ones for every update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from allostasis.core.seeding import derive


class ToyFeatures:
    """Examples for several models at once, each with its own density of features.

    Args:
        seed: The run's seed.
        n_features: Features of an example.
        densities: P(x_i != 0) of each model.
        batch_size: Examples of a batch, for each model.

    Source:
        Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652.

    Example:
        >>> task = ToyFeatures(seed=0, n_features=4, densities=[1.0, 0.1], batch_size=1000)
        >>> (task.batch(0) > 0).float().mean(dim=(1, 2))
        tensor([1.0000, 0.1...])
    """

    def __init__(
        self,
        *,
        seed: int,
        n_features: Annotated[int, Gt(0)],
        densities: Sequence[Annotated[float, Gt(0), Le(1)]],
        batch_size: Annotated[int, Gt(0)] = 1024,
    ) -> None:
        self.seed, self.n_features, self.batch_size = seed, n_features, batch_size
        self.densities = tuple(densities)

    def batch(
        self, step: int, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "model example feature"]:
        """The examples of an update, a function of its number and the device alone."""
        generator = torch.Generator(device).manual_seed(derive(self.seed, "data") // 2 + step)
        shape = (len(self.densities), self.batch_size, self.n_features)
        drawn = torch.rand(shape, generator=generator, device=device)
        density = torch.tensor(self.densities, device=device)[:, None, None]
        # given that it lies below the density, a uniform number over the density is uniform again
        return torch.where(drawn < density, drawn / density, 0.0)
