"""What an unknown name was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was most likely meant, or None if nothing is near.

    Example:
        >>> nearest("weight_decy", ["lr", "weight_decay"])
        'weight_decay'
    """
    known = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.6)
    return known[close[0]] if close else None


def suggest(name: str, names: Iterable[str]) -> str:
    """What to say of an unknown name: what may have been meant, else all that there is."""
    names = sorted(names)
    near = nearest(name, names)
    if near is not None:
        return f"did you mean '{near}'?"
    return f"there are {', '.join(names)}" if names else "there are none"
