"""Concepts at an earlier hook: the linear map from there to what the unembedding reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.core.spaces import CausalMetric
from allostasis.experiments.hsae.arms import Directions

WEAK = 0.5
"""Explained variance below which a map says too little of what the unembedding reads."""
PENALTIES = tuple(10.0**power for power in range(-6, 2))
"""Ridge penalties that are tried, as multiples of the rows' number times their mean square."""
FOLDS = 5


@dataclass(frozen=True)
class RidgeMap:
    """lambda ~ M r + b: what the unembedding reads, from the stream at an earlier hook.

    Attributes:
        weight: M.
        penalty: The ridge penalty that cross-validation chose, one of `PENALTIES`.
        r2: Explained variance of test rows, over all coordinates together.
    """

    weight: Float[Tensor, "d_model d_hook"]
    penalty: float
    r2: float

    def back(self, start: Directions) -> Directions:
        """Directions of what the unembedding reads as those of the hook that M takes to them."""
        inverse = torch.linalg.pinv(self.weight)
        carry = [(part.double() @ inverse.T).float() for part in (start.parents, start.children)]
        return Directions(carry[0], carry[1], start.mask)

    def metric(self, later: CausalMetric) -> CausalMetric:
        """The causal inner product at the hook: <a, b> = (M a)^T Sigma (M b)."""
        sigma = self.weight.T @ later.sigma.double() @ self.weight
        mean = self.weight.T @ later.mean.double()
        return CausalMetric((sigma + sigma.T) / 2, mean, later.shrinkage)

    def check(self, hook: str, *, allow_weak: bool) -> None:
        """Refuse a map that says too little.

        Raises:
            ValueError: `r2` is below 0.5 and that is not allowed.
        """
        if self.r2 < WEAK and not allow_weak:
            raise ValueError(
                f"{hook} tells {self.r2:.2f} of the variance of what the unembedding reads (ridge "
                f"map, test rows), less than {WEAK}: concepts of the unembedding would be guesses "
                "there. Take a later hook, or module.allow_weak_map=true"
            )


def ridge_map(
    train: tuple[Float[Tensor, "train d_hook"], Float[Tensor, "train d_model"]],
    test: tuple[Float[Tensor, "test d_hook"], Float[Tensor, "test d_model"]],
) -> RidgeMap:
    """Fit the map on train rows; its penalty by 5-fold cross-validation among them.

    Args:
        train: Rows at the hook and, of the same tokens, of what the unembedding reads.
        test: Others, which r2 is of.

    Returns:
        The map; r2 is at most 1, and below 0 where the mean of the test rows would do better.

    Source:
        Hoerl & Kennard (1970), Ridge regression.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> found = ridge_map((x[:150], 2 * x[:150]), (x[150:], 2 * x[150:]))
        >>> found.r2 > 0.999
        True
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold

    (x, y), (x_test, y_test) = ([side.double().numpy() for side in pair] for pair in (train, test))
    unit = len(x) * float(np.mean(np.square(x - x.mean(axis=0))))
    found = RidgeCV(
        [unit * penalty for penalty in PENALTIES],
        cv=KFold(FOLDS),
        scoring="neg_mean_squared_error",
    ).fit(x, y)
    r2 = r2_score(y_test, found.predict(x_test), multioutput="variance_weighted")
    weight = torch.from_numpy(np.ascontiguousarray(found.coef_))
    chosen: Any = found.alpha_
    return RidgeMap(weight, float(chosen) / unit, float(r2))
