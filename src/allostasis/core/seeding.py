"""One seed, split into named integer seeds that never meet."""

from __future__ import annotations

import hashlib

NAMES = ("init", "data", "order", "probe", "bootstrap", "donor", "control", "verify", "split")


def derive(seed: int, name: str) -> int:
    """The seed that `name` gets from a run's seed.

    A hash of both, so that a new name shifts no other and seeds 0, 1, 2 are as unlike as any.

    Args:
        seed: The run's seed, at least 0.
        name: What the randomness is for: one of `NAMES`.

    Returns:
        An integer in [0, 2^63).

    Raises:
        ValueError: The seed is negative or the name unknown.

    Example:
        >>> derive(0, "init") == derive(0, "init"), derive(0, "init") == derive(1, "init")
        (True, False)
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: a seed is an integer of at least 0")
    if name not in NAMES:
        raise ValueError(f"no randomness is called '{name}'; there are {', '.join(NAMES)}")
    digest = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
