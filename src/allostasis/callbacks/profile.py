"""What a run takes of the machine while it works: profile.json, a sample every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from allostasis.core.records import write_json

INTERVAL = 2.0
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
"""Energy counter of the first processor package, which root alone may read on most machines."""


@contextmanager
def sampled(folder: Path, *, interval: float = INTERVAL) -> Iterator[None]:
    """Sample this process while the block runs, and write profile.json however it ends.

    A sample has `t`, seconds since the start; `rss_bytes`; `cpu_pct`, 100 a core; on a GPU
    `gpu_mem_bytes`; and `power_w` of the processor, where it may be read without root.
    """
    samples: list[dict[str, Any]] = []
    stopped = threading.Event()
    watcher = threading.Thread(target=_watch, args=(samples, stopped, interval), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()
        write_json(folder / "profile.json", {"interval_s": interval, "samples": samples})


def _watch(samples: list[dict[str, Any]], stopped: threading.Event, interval: float) -> None:
    process, begun = psutil.Process(), time.monotonic()
    process.cpu_percent()  # of the time since the call before
    energy = _energy()
    while True:
        has_ended = stopped.wait(interval)
        now = time.monotonic() - begun
        sample: dict[str, Any] = {
            "t": round(now, 3),
            "rss_bytes": process.memory_info().rss,
            "cpu_pct": process.cpu_percent(),
        }
        if torch.cuda.is_available():
            sample["gpu_mem_bytes"] = torch.cuda.memory_allocated()
        before, energy = energy, _energy()
        if before is not None and energy is not None and energy > before:  # it wraps around
            last = samples[-1]["t"] if samples else 0.0
            sample["power_w"] = (energy - before) / 1e6 / max(now - last, 1e-3)
        samples.append(sample)
        if has_ended:
            return


def _energy() -> int | None:
    try:
        return int(ENERGY.read_text(encoding="ascii"))
    except OSError:
        return None
