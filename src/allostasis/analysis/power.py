"""How many seeds a claim needs."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy import stats

Design = Literal["unpaired", "sign_flip", "binomial", "t"]


def attainable_p(design: Design, n: int, *, sides: int = 1, share: float = 0.5) -> float:
    """Smallest p that a test can give with n units (n an arm where unpaired).

    Args:
        design: `unpaired` is the exact permutation of two arms, `sign_flip` that of paired ones,
            `binomial` the exact test of a share; `t` has no least p.
        n: Units.
        sides: 1 or 2.
        share: The share that a binomial test has as its null.

    Example:
        >>> attainable_p("unpaired", 3, sides=2), attainable_p("sign_flip", 5, sides=2)
        (0.1, 0.0625)
    """
    match design:
        case "unpaired":
            return sides / math.comb(2 * n, n)
        case "sign_flip":
            return sides / 2**n
        case "binomial":
            return sides * share**n
        case "t":
            return 0.0 if n >= 2 else 1.0


def minimum_seeds(
    design: Design, *, alpha: float, sides: int, family_size: int = 1, share: float = 0.5
) -> int:
    """Least n whose attainable p is at most alpha / family_size.

    Example:
        >>> minimum_seeds("sign_flip", alpha=0.05, sides=2)
        6
    """
    n = 2
    while attainable_p(design, n, sides=sides, share=share) > alpha / family_size:
        n += 1
    return n


def power(
    effect: float,
    n: int,
    generator: np.random.Generator,
    *,
    sd: float = 1.0,
    alpha: float = 0.05,
    arms: Literal[1, 2] = 1,
    half_width: float | None = None,
    simulations: int = 4_000,
) -> float:
    """Share of simulated normal studies in which the t test comes out as claimed.

    Args:
        effect: True distance from the bound, towards support; from the middle with `half_width`.
        n: Units an arm.
        generator: Where the studies come from.
        sd: Between units.
        alpha: Two-sided level of a directional test; level of each side of an equivalence test.
        arms: One sample (or pairs), or two samples by Student's t.
        half_width: Half the width of an equivalence test's bounds; None for a directional test.
        simulations: Studies.
    """
    drawn = generator.normal(0.0, sd, (arms, simulations, n))
    sides = [effect] if half_width is None else [half_width + effect, half_width - effect]
    level = alpha / 2 if half_width is None else alpha
    found = np.ones(simulations, dtype=bool)
    for sign, distance in zip((1, -1), sides, strict=False):
        difference = sign * (drawn[0] - drawn[1]) if arms == 2 else sign * drawn[0]
        spread = np.sqrt((drawn.var(axis=-1, ddof=1) / n).sum(axis=0))
        t = (difference.mean(axis=-1) + distance) / spread
        found &= stats.t.sf(t, arms * (n - 1)) < level
    return float(found.mean())


def seeds_for_power(
    effect: float,
    generator: np.random.Generator,
    *,
    sd: float,
    alpha: float = 0.05,
    half_width: float | None = None,
    target: float = 0.8,
    most: int = 1_000,
) -> int | None:
    """Least n at which `power` reaches the target, by doubling and halving; None: over `most`."""

    def reaches(n: int) -> bool:
        return power(effect, n, generator, sd=sd, alpha=alpha, half_width=half_width) >= target

    high = 2
    while not reaches(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
