"""One line an interval: where the run stands, in numbers that carry their names."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from allostasis.callbacks.recorder import Identity, Recorder
from allostasis.core.progress import duration, spaced

log = logging.getLogger(__name__)

# what a line shows if it was recorded: label, metric, split, format
SHOWN = (
    ("train Psi", "accuracy", "train", ".3f"),
    ("test Psi", "accuracy", "test", ".3f"),
    ("test loss", "cross_entropy", "test", ".3g"),
    ("A", "logit_scale", "test", ".3g"),
    ("G", "alignment", "test", ".3f"),
)


class Progress(Callback):
    """Logs one line every `interval` seconds with the last readings and the time left.

    Args:
        identity: Names the run.
        recorder: Holds the last readings.
        interval: Seconds between lines.
    """

    def __init__(self, *, identity: Identity, recorder: Recorder, interval: float = 10.0) -> None:
        self.name = f"{identity.exp} {identity.condition} seed {identity.seed}"
        self.recorder, self.interval = recorder, interval
        self._began = self._said = time.monotonic()
        self._from = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say where the run starts: at step 0, or where it was interrupted."""
        del trainer
        self._began = self._said = time.monotonic()
        self._from = pl_module.updates
        if self._from:
            log.info("%s | resumed at step %s", self.name, spaced(self._from))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object
    ) -> None:
        """Say a line if one is due."""
        del trainer
        if time.monotonic() - self._said >= self.interval or pl_module.is_finished:
            self._said = time.monotonic()
            log.info("%s", self._line(pl_module))

    def _line(self, pl_module: Any) -> str:
        done, last = pl_module.updates, pl_module.last_step
        pace = (time.monotonic() - self._began) / max(1, done - self._from)
        latest = self.recorder.latest
        readings = [
            f"{label} {latest[metric, split]:{form}}"
            for label, metric, split, form in SHOWN
            if (metric, split) in latest
        ]
        left = "done" if pl_module.is_finished else f"at most {duration(pace * (last - done))} left"
        where = f"step {spaced(done)} of {spaced(last)}"
        return " | ".join([self.name, where, *readings, left])
