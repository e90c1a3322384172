"""A training step of a hierarchical SAE in each form, beside a flat SAE and SAELens's trainer.

    python benchmarks/hsae_step.py                  2,048 parents x 16 children, 256 tokens
    python benchmarks/hsae_step.py --device cuda    bfloat16 products, 8,192 tokens

Forward and backward of the same losses on the same tokens, all in one process, every form's steps
interleaved with the others'. Last line: time of the flat SAE of as many latents over that of the
kernel that `auto` picks. Beside it, the kernels at the size of the recorded study, 16 parents of
which one is on.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import lightning as L
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from allostasis.experiments.hsae.train import HsaeTrain
from allostasis.models.hsae import HierarchicalSAE
from allostasis.models.hsae_kernels import encode
from allostasis.tasks.activations import ActivationBatch
from allostasis.tasks.interleaved_patterns import Steps

D, M, C, S, K = 576, 2048, 16, 4, 32
WARM, FLAT_L0 = 5, 2 * K
KERNELS = ("sampled", "hybrid", "dense_masked", "naive")


def main() -> None:
    """Print every form's time, what the step is made of, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each form")
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("allostasis").setLevel(logging.ERROR)
    device = torch.device(words.device)
    batch = 8192 if device.type == "cuda" else 256
    x = torch.randn(batch, D, generator=torch.Generator().manual_seed(0)).to(device)
    print(f"{device}, {words.threads} threads, {batch} tokens, d {D}, m {M}, c {C}, s {S}, K {K}")

    steps: dict[str, Callable[[], float]] = {}
    seen: dict[str, float] = {}
    for kernel in KERNELS:
        sae = HierarchicalSAE(seed=0, d_model=D, m=M, c=C, s=S, k=K, kernel=kernel).to(device)
        steps[kernel] = hierarchical(sae, x)
    steps["flat"] = flat(x)
    times = timed(steps, device, words.steps, seen)
    for name, value in times.items():
        print(f"{name:>14} {1e3 * value:9.2f} ms  {batch / value:10,.0f} tokens/s")

    errors = {kernel: abs(seen[kernel] / seen["naive"] - 1) for kernel in KERNELS}
    print(f"losses differ by at most {max(errors.values()):.1e} (relative)")
    assert max(errors.values()) < (1e-5 if device.type == "cpu" else 1e-2), errors

    parts(x, device)
    few_parents(device, words.steps)
    trainer(x, words.steps)
    auto = "hybrid" if device.type == "cuda" else "sampled"
    for kernel in dict.fromkeys((auto, "hybrid")):
        for other in ("naive", "dense_masked", "flat"):
            print(f"{other} / {kernel}: {times[other] / times[kernel]:.2f}")
    print(f"ratio: {times['flat'] / times[auto]:.2f}")


def hierarchical(sae: HierarchicalSAE, x: torch.Tensor) -> Callable[[], float]:
    """Forward and backward of the reconstruction error and of the parents' own."""

    def step() -> float:
        sae.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            run = sae.run(x)
        loss = run.residual.square().sum(dim=-1).mean()
        loss = loss + 0.1 * (run.x0 - run.of_parents).square().sum(dim=-1).mean()
        loss.backward()
        return loss.detach()

    return step


def flat(x: torch.Tensor) -> Callable[[], float]:
    """The same of SAELens's TopK with as many latents and as many on."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=M * (1 + C), k=FLAT_L0)).to(x.device)

    def step() -> float:
        sae.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
        output.loss.backward()
        return output.loss.detach()

    return step


def timed(
    steps: dict[str, Callable[[], Any]], device: torch.device, n: int, seen: dict[str, float]
) -> dict[str, float]:
    """Median seconds of each; one step of each in turn, so that what slows one slows all."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(WARM + n):
        for name, step in steps.items():
            begin = time.perf_counter()
            value = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= WARM:
                found[name].append(time.perf_counter() - begin)
            seen[name] = float(value)
    return {name: statistics.median(values) for name, values in found.items()}


def parts(x: torch.Tensor, device: torch.device) -> None:
    """Where a sparse step's time goes: the parents' encoder, selection, the forward, all of it."""
    kernel = "hybrid" if device.type == "cuda" else "sampled"
    sae = HierarchicalSAE(seed=0, d_model=D, m=M, c=C, s=S, k=K, kernel=kernel).to(device)

    @torch.no_grad()
    def parents() -> torch.Tensor:
        return (x @ sae.E.T).sum()

    @torch.no_grad()
    def coded() -> torch.Tensor:
        return encode(x, sae.weights, k=K, k_child=1, kernel=kernel).v.sum()

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return sae.run(x).residual.sum()

    whole = hierarchical(sae, x)
    steps = {"encoder": parents, "encode": coded, "forward": forward, "step": whole}
    times = timed(steps, device, 10, {})
    share = {name: value / times["step"] for name, value in times.items()}
    print(
        f"of a {kernel} step: parents' encoder {share['encoder']:.0%}, the rest of encoding "
        f"{share['encode'] - share['encoder']:.0%}, decoding "
        f"{share['forward'] - share['encode']:.0%}, backward {1 - share['forward']:.0%}"
    )


def few_parents(device: torch.device, n: int) -> None:
    """The kernels where many tokens share a parent: 16 parents x 8 children, one parent on."""
    x = torch.randn(1024, D, generator=torch.Generator().manual_seed(0)).to(device)
    steps = {
        kernel: hierarchical(
            HierarchicalSAE(seed=0, d_model=D, m=16, c=8, s=32, k=1, kernel=kernel).to(device), x
        )
        for kernel in (*KERNELS, "grouped")
    }
    times = timed(steps, device, n, {})
    each = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in times.items())
    print(f"16 parents, 1,024 tokens: {each}")
    print(f"16 parents: sampled / grouped: {times['sampled'] / times['grouped']:.2f}")


class Memory:
    """Activations that lie in memory: what the experiment's module asks of a task."""

    seed, hook, scale, d_model = 0, "unembed_input", 1.0, D

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def prepare(self, model: object) -> None:
        """Nothing to do."""

    def mean(self) -> torch.Tensor:
        """Of all rows."""
        return self.x.mean(dim=0).cpu()

    def batch(self, step: int, device: torch.device) -> ActivationBatch:
        """The same rows for every update."""
        del step, device
        return ActivationBatch(self.x, self.x)


class Clock(L.Callback):
    """Seconds of every chunk of updates."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())


def trainer(x: torch.Tensor, n: int) -> None:
    """The experiment's Lightning loop and SAELens's trainer, on one flat TopK.

    The same batch in memory, the same losses, nothing dead.
    """
    m, c, chunk, batch = 128, 15, 10, len(x)
    width, chunks = m * (1 + c), max(3, n // 4)
    module = HsaeTrain(
        model=None, task=Memory(x), kind="topk", match="latents", reads=["baseline"], m=m, c=c,
        k=K // 2, reads_of={"hsae_teacher": "causal"}, max_steps=chunk * (chunks + 1),
        eval_every=chunk, log_grad_every=chunk * (chunks + 1), weight_decay=0.0,
    )  # fmt: skip
    clock = Clock()
    loop = L.Trainer(
        max_epochs=-1, accelerator="gpu" if x.is_cuda else "cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[clock], num_sanity_val_steps=0,
    )  # fmt: skip
    loop.fit(module, train_dataloaders=Steps(None))
    ours = statistics.median(b - a for a, b in pairwise(clock.stamps)) / chunk

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=width, k=K)).to(x.device)
    cfg = SAETrainerConfig(
        10**9, batch, lr_end=3e-4, device=str(x.device), dead_feature_window=10**6
    )
    peer = SAETrainer(cfg, sae, data_provider=cycle([x]))

    def step() -> torch.Tensor:
        return peer.step(next(peer.data_provider)).loss.detach()

    theirs = timed({"SAELens": step}, x.device, chunk * chunks, {})["SAELens"]
    print(
        f"flat TopK of {width} latents: {batch / ours:,.0f} tokens/s in our Lightning loop, "
        f"{batch / theirs:,.0f} in SAELens's trainer; ours / SAELens's {theirs / ours:.2f}"
    )


if __name__ == "__main__":
    main()
