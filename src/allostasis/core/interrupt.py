"""Ctrl-C and SIGTERM as one exception that no `except Exception` swallows."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The user or the system asked this process to stop.

    A BaseException, so that Lightning and Hydra let it through: both turn KeyboardInterrupt and
    SIGTERM into exits of their own (status 1 and 0).

    Attributes:
        exit_status: 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_status = 128 + number
        super().__init__(f"stopped by {self.signal.name}")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        """Pickle by the number, so that a launcher's worker can hand it to its parent."""
        return Interrupted, (int(self.signal),)


def _raise(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signature of a handler)
    raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise `Interrupted` where the process stands.

    Outside the main thread signals cannot be caught; there this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
