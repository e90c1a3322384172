"""What `device=` means: auto, cpu, cuda, cuda:1 or mps."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """A device that is there, in the words of torch and of Lightning.

    Attributes:
        name: torch's name, for example `cuda:1`.
        accelerator: Lightning's `Trainer(accelerator=)`.
        devices: Lightning's `Trainer(devices=)`.
        model: The hardware's own name.
    """

    name: str
    accelerator: str
    devices: int | list[int]
    model: str

    @property
    def torch(self) -> torch.device:
        """The torch device."""
        return torch.device(self.name)


def resolve(device: str) -> Device:
    """Find the device that a config asks for.

    Args:
        device: `auto` (CUDA, else MPS, else the CPU), `cpu`, `cuda`, `cuda:<index>` or `mps`.

    Raises:
        ValueError: There is no such device here.
    """
    match = re.fullmatch(r"auto|cpu|mps|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"device='{device}': allowed are auto, cpu, cuda, cuda:<index> and mps")
    if device == "auto":
        present = "cuda" if torch.cuda.is_available() else "cpu"
        return resolve("mps" if present == "cpu" and torch.backends.mps.is_available() else present)
    if device == "cpu":
        return Device(name="cpu", accelerator="cpu", devices=1, model=_processor())
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device=mps: this machine has no Apple GPU; use device=cpu or auto")
        return Device(name="mps", accelerator="mps", devices=1, model=_processor())
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise ValueError(
            f"device={device}: this machine has {count} CUDA device{'s' if count != 1 else ''}"
            f"{f', cuda:0 to cuda:{count - 1}' if count else ''}; use device=cpu or auto"
        )
    name = f"cuda:{index}"
    return Device(name, "cuda", [index], torch.cuda.get_device_name(index))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
