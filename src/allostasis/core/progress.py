"""How far something long is, and how much time is left."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)


class Ticker:
    """Logs one line every `interval` seconds: how many of a known number of things are done.

    Args:
        name: Names the run.
        noun: What is counted, in the plural.
        interval: Seconds between lines.
    """

    def __init__(self, name: str, *, noun: str, interval: float = 10.0) -> None:
        self.name, self.noun, self.interval = name, noun, interval
        self._began = self._said = time.monotonic()

    def __call__(self, done: int, planned: int) -> None:
        """Say a line if one is due, or all is done."""
        now = time.monotonic()
        if now - self._said < self.interval and done < planned:
            return
        self._said = now
        left = (now - self._began) / max(1, done) * (planned - done)
        end = "done" if done == planned else f"about {duration(left)} left"
        log.info("%s | %s of %s %s | %s", self.name, done, planned, self.noun, end)


def spaced(number: int) -> str:
    """An integer with its thousands apart."""
    return f"{number:,}".replace(",", " ")


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
