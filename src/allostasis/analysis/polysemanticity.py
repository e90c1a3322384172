"""How amplitude goes with polysemanticity where nothing else differs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from allostasis.analysis.curves import UndefinedError


@dataclass(frozen=True)
class Slope:
    """A slope within groups.

    Attributes:
        estimate: Change of y for a change of x by 1.
        n: Rows of groups in which x varies.
        n_groups: Such groups.
    """

    estimate: float
    n: int
    n_groups: int


def within_slope(
    x: Float[np.ndarray, " row"], y: Float[np.ndarray, " row"], groups: Sequence[Hashable]
) -> Slope:
    """Least-squares slope of y on x with an intercept for each group.

    Args:
        x: What may explain.
        y: What is explained.
        groups: The group of each row; a group with one row, or in which x is one number, says
            nothing of the slope.

    Raises:
        UndefinedError: x varies within no group.

    Source:
        The within estimator: Wooldridge (2010), Econometric Analysis of Cross Section and Panel
        Data, 10.5.

    Example:
        >>> within_slope(np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.0, 2.0, 5.0, 7.0]), "aabb")
        Slope(estimate=2.0, n=4, n_groups=2)
    """
    table = pd.DataFrame({"x": x, "y": y, "group": pd.factorize(pd.Series(list(groups)))[0]})
    centred = table[["x", "y"]] - table.groupby("group")[["x", "y"]].transform("mean")
    spread = centred["x"].abs().groupby(table["group"]).max()
    varying = spread[spread > 1e-9].index
    kept = centred[table["group"].isin(varying)]
    if kept.empty:
        raise UndefinedError("polysemanticity differs between no two features of one cell")
    estimate = float((kept["x"] * kept["y"]).sum() / (kept["x"] ** 2).sum())
    return Slope(estimate, len(kept), len(varying))
