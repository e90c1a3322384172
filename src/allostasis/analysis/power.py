"""How many seeds a claim needs."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy import special, stats

from allostasis.analysis.effects import noncentral_above, spread_nodes

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


def exact_power(
    effect: float,
    n: int,
    *,
    sd: float = 1.0,
    alpha: float = 0.05,
    arms: Literal[1, 2] = 1,
    half_width: float | None = None,
) -> float:
    """What `power` estimates by simulation, integrated over the spread that a study finds.

    Args:
        effect: As for `power`.
        n: Units an arm, at least two.
        sd: Between units.
        alpha: As for `power`.
        arms: As for `power`.
        half_width: As for `power`.

    Source:
        Owen (1965), A special case of a bivariate non-central t-distribution, Biometrika 52;
        Schuirmann (1987), A comparison of the two one-sided tests procedure, J. Pharmacokinet. 15.

    Example:
        >>> [round(exact_power(2.0, n, arms=2), 3) for n in (3, 5, 8)]
        [0.463, 0.791, 0.96]
    """
    df, scale = arms * (n - 1), sd * math.sqrt(arms / n)
    if half_width is None:
        critical = float(stats.t.isf(alpha / 2, df))
        # a two-sided test that comes out on the wrong side does not support the claim
        return noncentral_above(critical, df, effect / scale)
    s, mass = spread_nodes(df)
    reach = float(stats.t.isf(alpha, df)) * s
    above = special.ndtr((half_width - effect) / scale - reach)
    below = special.ndtr(reach - (half_width + effect) / scale)
    return float(mass @ np.maximum(above - below, 0))


def seeds_for_power(
    effect: float,
    *,
    sd: float,
    alpha: float = 0.05,
    arms: Literal[1, 2] = 1,
    half_width: float | None = None,
    target: float = 0.8,
    most: int = 100_000,
) -> int | None:
    """Least n at which the power reaches the target, by doubling and halving; None: over `most`.

    Example:
        >>> seeds_for_power(1.0, sd=1.0), seeds_for_power(2.0, sd=1.0, arms=2)
        (10, 6)
    """

    def reaches(n: int) -> bool:
        found = exact_power(effect, n, sd=sd, alpha=alpha, arms=arms, half_width=half_width)
        return found >= target

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
