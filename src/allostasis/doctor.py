"""Which models, devices and precisions are usable here: `python -m allostasis.doctor`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from allostasis.core.config import conf_dir

if TYPE_CHECKING:
    import torch
    from rich.console import Console

PRECISIONS = ("float32", "bfloat16", "float16")
UNITS = ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16", "bf16", "fphp")
"""Words of a processor for what multiplies in half precision without a detour."""


@dataclass(frozen=True)
class State:
    """How a model stands here.

    Attributes:
        model: What `model=` takes.
        is_ready: Whether it can be used now.
        words: Why, or why not.
        remedy: What would make it usable, if it is not.
    """

    model: str
    is_ready: bool
    words: str
    remedy: str | None = None


def main() -> int:
    """Print all of it; nothing that is missing is an error."""
    parser = argparse.ArgumentParser(prog="python -m allostasis.doctor", description=__doc__)
    parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

    from rich.console import Console

    console = Console(highlight=False)
    _models(console)
    _devices(console)
    return 0


def states(*, hub_answers: bool) -> Iterator[State]:
    """Every file of conf/model that names a language model, in the order of their names."""
    for path in sorted((conf_dir() / "model").glob("*.yaml")):
        config: Any = OmegaConf.load(path)
        if str(config.get("_target_")).endswith(".lens.pretrained"):
            yield _state(path.stem, config, hub_answers=hub_answers)


def _state(model: str, config: Any, *, hub_answers: bool) -> State:
    from allostasis.models import conversion, hub, packages

    if config.get("arch") is not None:
        return State(model, is_ready=True, words="random weights, made on the spot")
    name = config.get("name")
    if name is None:
        words = "give model.source=<folder> or model.name=<owner/name>"
        return State(model, is_ready=True, words=words)
    packaged = packages.PACKAGED.get(name)
    if packaged is not None:
        folder = conversion.converted_folder(packaged.key, packaged.sha256, "float32")
        if folder.is_dir():
            return State(model, is_ready=True, words=f"{packaged.quantisation}, converted")
        if packages.installed(packaged):
            words = f"{packaged.quantisation}, installed; the first run converts it"
            return State(model, is_ready=True, words=words)
    if hub.fetched(name):
        return State(model, is_ready=True, words="fetched from the hub")
    if packaged is not None:
        remedy = f"{packaged.command}        ({packaged.terms})"
        return State(model, is_ready=False, words="not installed", remedy=remedy)
    if hub_answers:
        return State(model, is_ready=True, words="the first run fetches it from the hub")
    remedy = f"hf download {name}        (where the hub answers)"
    return State(model, is_ready=False, words="not here", remedy=remedy)


def _models(console: Console) -> None:
    from rich.table import Table

    from allostasis.models import conversion, hub

    answers = hub.is_reachable()
    table = Table(title="Models", title_justify="left", box=None, pad_edge=False)
    for column in ("model=", "usable", "because"):
        table.add_column(column, no_wrap=column != "because")
    found = [*states(hub_answers=answers)]
    for state in found:
        usable = "[green]yes[/]" if state.is_ready else "[red]no[/]"
        table.add_row(state.model, usable, state.words)
    console.print(table)
    remedies = [(state.model, state.remedy) for state in found if state.remedy]
    if remedies:
        console.print("\nWhat would make the others usable:")
    for model, remedy in remedies:
        console.print(f"  {model}: {remedy}", soft_wrap=True, markup=False)
    console.print(f"The hub {'answers' if answers else 'does not answer'}. ", end="")
    console.print(f"Conversions lie in {conversion.cache_folder()}.\n", soft_wrap=True)


def _devices(console: Console) -> None:
    import torch
    from rich.table import Table

    from allostasis.core import devices

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names += ["mps"] if torch.backends.mps.is_available() else []
    found = [devices.resolve(name) for name in names]

    table = Table(title="Devices", title_justify="left", box=None, pad_edge=False)
    for column in ("device=", "hardware", *(f"{name}, GFLOP/s" for name in PRECISIONS)):
        table.add_column(column, justify="right" if "GFLOP" in column else "left")
    for device in found:
        speeds = [f"{gigaflops(device.torch, dtype):,.0f}" for dtype in PRECISIONS]
        table.add_row(device.name, device.model, *speeds)
    console.print(table)
    console.print(
        f"{torch.get_num_threads()} threads; half-precision units of the CPU: "
        f"{', '.join(half_precision_units()) or 'none named'}.\n"
    )

    table = Table(title="Is it the same again?", title_justify="left", box=None, pad_edge=False)
    questions = ("the same call twice", "a row alone and in a batch", "one thread and all", "CPU")
    for column in ("device=", *questions):
        table.add_column(column)
    for device in found:
        table.add_row(device.name, *(_difference(value) for value in probe(device.name)))
    console.print(table)
    console.print("Largest difference of a logit, in float32; 'exact' is bit for bit.")


def gigaflops(device: torch.device, dtype: str) -> float:
    """Speed of a product of square matrices, the best of a few, 10^9 operations a second."""
    import torch

    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    best, spent = float("inf"), 0.0
    for _ in range(10):
        start = time.perf_counter()
        _ = (matrix @ matrix)[0, 0].item()  # waits for the device
        taken = time.perf_counter() - start
        best, spent = min(best, taken), spent + taken
        if spent > 0.5:
            break
    return 2 * size**3 / best / 1e9


def half_precision_units() -> list[str]:
    """What the processor says it has for half precision, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text("utf-8"), re.MULTILINE)
    return [unit for unit in UNITS if flags and unit in flags[1].split()]


def probe(device: str) -> tuple[float | None, ...]:
    """Where a small model's logits differ though nothing of the model does.

    Args:
        device: As `devices.resolve` takes it.

    Returns:
        Largest differences: of the same call twice; of a row alone and in a batch of 8; of one
        thread and all, on a CPU; of the device and the CPU. None where there is nothing to compare.
    """
    import torch

    from allostasis.models import lens
    from allostasis.models.tiny import tiny_checkpoint

    def logits(name: str, rows: torch.Tensor) -> torch.Tensor:
        model = lens.pretrained(source=folder, device=name)
        with torch.no_grad():
            return model.hf(rows.to(model.decoder.device), use_cache=False).logits.cpu()

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one - other).abs().max().item()

    with tempfile.TemporaryDirectory() as folder:
        tiny_checkpoint(Path(folder), "llama", n_heads=8, d_model=256)
        ids = torch.arange(8 * 16).reshape(8, 16) % 200
        whole = logits(device, ids)
        again, alone = logits(device, ids), logits(device, ids[:1])
        one_thread = None
        if device == "cpu":
            n_threads = torch.get_num_threads()
            torch.set_num_threads(1)
            one_thread = apart(logits(device, ids), whole)
            torch.set_num_threads(n_threads)
        on_cpu = None if device == "cpu" else apart(whole, logits("cpu", ids))
        return apart(whole, again), apart(alone[0], whole[0]), one_thread, on_cpu


def _difference(value: float | None) -> str:
    return "-" if value is None else "exact" if value == 0 else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
