"""Grokking many seeds at once against single runs on the same device.

    python benchmarks/replicas.py --device cuda                          needs a GPU
    python benchmarks/replicas.py --device cpu --replicas 2 --steps 20   only whether it works

A block of replicas (p = 113, 30 % of the pairs, AdamW, weight decay 1, float32 products, loss in
float64) is trained until each seed holds 95 % test accuracy over five evaluations, one every 50
updates, or until the budget is spent. A single run does the same updates with the package's own
single-run engine (structured loss, fused AdamW) and the same evaluations; it is timed over
`--single-steps` updates of seed 0, and scaled to the updates that each seed needed: nobody waits
for 64 single runs. Both sides start from the same bits and their first losses must agree.

A replica that is done goes on stepping until the last one is; that waste is in the block's time. On
a GPU one update of the block is a CUDA graph, unless --no-graph says otherwise. Printed at the end:
seconds a seed, milliseconds a step and `ratio: X`, the single runs' time over the block's. The exit
status is 1 if losses disagree.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Lightning sets it for a run

import torch
from torch import Tensor

from allostasis.engines.optimisers import Rule
from allostasis.engines.replicas import Block, Replica
from allostasis.models.modular_loss import pair_losses
from allostasis.models.modular_step import (
    PLAIN,
    PairIndex,
    Parameters,
    StructuredLoss,
    fold,
    initial_parameters,
    logits_of,
)
from allostasis.tasks.modular_pairs import pairs_of, split

P, FRACTION = 113, 0.3
SIZES = {"p": P, "d_model": 128, "n_heads": 4, "d_mlp": 512}
LR, DECAY, BETAS, WARM_UP = 1e-3, 1.0, (0.9, 0.98), 10
EVAL_EVERY, LEVEL, DWELL = 50, 0.95, 5
COMPARED, AGREEMENT = 50, 1e-4  # losses, and how far apart in float32, relative
RESERVE = 15.0  # seconds of the budget that are kept for the single run

began = time.perf_counter()


def replica(seed: int) -> Replica:
    """A seed's initial weights and split."""
    train = pairs_of(split(seed, p=P, train_frac=FRACTION).train, p=P)
    return Replica(initial_parameters(seed, **SIZES), train, lr=LR, weight_decay=DECAY)


class Single:
    """One seed with the single-run engine."""

    def __init__(self, seed: int, device: torch.device) -> None:
        start = replica(seed)
        self.parameters = [torch.nn.Parameter(tensor.to(device)) for tensor in start.theta]
        self.train, heads = start.train.to(device), SIZES["n_heads"]
        self.index = PairIndex(self.train.a, self.train.b, p=P, n_heads=heads)
        every = pairs_of(torch.arange(P * P, device=device), p=P)
        self.grid, self.answer = PairIndex(every.a, every.b, p=P, n_heads=heads), every.answer
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=LR, weight_decay=DECAY, betas=BETAS, fused=True
        )
        self.done = 0

    def update(self) -> Tensor:
        """One update; the loss before it."""
        self.optimiser.param_groups[0]["lr"] = LR * min(1.0, (self.done + 1) / WARM_UP)
        self.optimiser.zero_grad()
        loss = StructuredLoss.apply(
            self.index, self.train.answer[:, None], "float32", PLAIN, *self.parameters
        )
        loss.backward()
        self.optimiser.step()
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Accuracy over all pairs, with the loss computed as well."""
        out = logits_of(fold(Parameters(*self.parameters), self.grid), self.grid)
        pair_losses(out, self.answer).mean()
        return float((out.argmax(dim=-1) == self.answer).double().mean())


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ms_a_step(update: Callable[[], object], evaluate: Callable[[], object], steps: int,
              device: torch.device) -> float:  # fmt: skip
    """Milliseconds an update, with an evaluation every `EVAL_EVERY`, after as many to warm up."""
    for _ in range(min(steps, EVAL_EVERY)):
        update()
    evaluate()
    wait(device)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        update()
        if step % EVAL_EVERY == 0:
            evaluate()
    wait(device)
    return (time.perf_counter() - start) / steps * 1e3


def first_losses(block: Block, device: torch.device, n: int) -> float:
    """Largest relative deviation of the block's first losses from those of a single run."""
    single, worst = Single(0, device), 0.0
    ours, theirs = [], []
    for _ in range(n):
        block.advance(1)
        ours.append(block.losses[0].clone())
        theirs.append(single.update())
    for a, b in zip(ours, theirs, strict=True):
        worst = max(worst, abs(float(a) / float(b) - 1))
    return worst


def train(block: Block, n: int, limit: int, until: float, device: torch.device) -> dict:
    """Train until every seed has grokked, or a limit is reached."""
    since: list[int | None] = [None] * n  # the first evaluation of the current stretch above LEVEL
    found: list[int | None] = [None] * n
    done, said = 0, time.perf_counter()
    wait(device)
    start = time.perf_counter()
    while done < limit and None in found and time.perf_counter() - began < until:
        chunk = min(EVAL_EVERY, limit - done)
        block.advance(chunk)
        done += chunk
        accuracy = block.evaluate().test_accuracy[:n].tolist()
        for i, value in enumerate(accuracy):
            if value < LEVEL:
                since[i] = None
            elif since[i] is None:
                since[i] = done
            start_of = since[i]
            if found[i] is None and start_of is not None:
                is_held = done - start_of >= (DWELL - 1) * EVAL_EVERY
                found[i] = start_of if is_held else None
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            grokked = n - found.count(None)
            print(
                f"step {done:6d} | {grokked} of {n} seeds grokked | test accuracy, median "
                f"{statistics.median(accuracy):.3f} | {(said - start) / done * 1e3:.2f} ms a step",
                flush=True,
            )
    wait(device)
    return {"steps": done, "seconds": time.perf_counter() - start, "t_grok": found}


def main() -> int:
    """Compare, train, time, print; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto: cuda, else a check on the CPU")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20_000, help="updates at most")
    parser.add_argument("--single-steps", type=int, default=500, help="timed updates of one run")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds for everything")
    parser.add_argument("--no-graph", action="store_true", help="run each update, do not replay")
    parser.add_argument("--tf32", action="store_true", help="not exact; never the default")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    if options.device == "auto" and not torch.cuda.is_available():
        print("no GPU here: 2 replicas, 20 updates on the CPU, which says nothing about speed")
        options.device, options.replicas, options.steps = "cpu", 2, 20
    options.device = options.device.replace("auto", "cuda")
    device, n = torch.device(options.device), options.replicas
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.set_flush_denormal(True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    is_captured = device.type == "cuda" and not options.no_graph
    how = "one update a CUDA graph" if is_captured else "updates run one by one"
    precision = "TF32 products" if options.tf32 else "float32 products"
    print(f"{name}, torch {torch.__version__}, {n} replicas, {how}, {precision}", flush=True)

    replicas = [replica(seed) for seed in range(n)]
    rule = Rule(betas=BETAS, warmup_steps=WARM_UP)
    block = Block(replicas, width=n, rule=rule, device=device, is_captured=is_captured)
    start = block.state_dict()
    wait(device)
    print(f"built after {time.perf_counter() - began:.1f} s", flush=True)
    n_compared = min(COMPARED, options.steps)
    limit = 1e-2 if options.tf32 else AGREEMENT
    try:
        apart = first_losses(block, device, n_compared)
    except RuntimeError as error:  # an operation that this device lacks
        print(f"the single-run engine FAILED here: {error}", flush=True)
        apart = float("inf")
    agrees = apart <= limit
    word = "within" if agrees else "BEYOND"
    print(f"largest relative deviation of the first {n_compared} losses of seed 0 from a single "
          f"run's: {apart:.1e} ({word} {limit:.0e})", flush=True)  # fmt: skip

    block.load_state_dict(start)
    made = train(block, n, options.steps, options.budget - RESERVE, device)
    single_steps = min(options.single_steps, options.steps)
    if apart < float("inf"):
        single = Single(0, device)
        single_ms = ms_a_step(single.update, single.evaluate, single_steps, device)
    else:
        print("the single run below is a block of width 1, not captured")
        alone = Block(replicas[:1], width=1, rule=rule, device=device)
        single_ms = ms_a_step(lambda: alone.advance(1), alone.evaluate, single_steps, device)

    grokked = [t for t in made["t_grok"] if t is not None]
    needed = [made["steps"] if t is None else t + (DWELL - 1) * EVAL_EVERY for t in made["t_grok"]]
    block_ms = made["seconds"] / made["steps"] * 1e3
    single_s = sum(needed) * single_ms / 1e3
    print(f"\nblock: {made['steps']} steps in {made['seconds']:.1f} s, {block_ms:.3f} ms a step, "
          f"{block_ms / n:.4f} ms a seed and step, evaluations included")  # fmt: skip
    print(f"single run: {single_ms:.3f} ms a step, evaluations included ({single_steps} timed)")
    if grokked:
        print(f"{len(grokked)} of {n} seeds grokked; t_grok: median "
              f"{statistics.median(grokked):.0f}, {min(grokked)} to {max(grokked)}")  # fmt: skip
    if len(grokked) < n:
        print(f"{n - len(grokked)} seeds had not when it ended: counted with the steps they did")
    print(f"{made['seconds'] / n:.3f} seconds a seed; single runs: {single_s / n:.2f} s a seed, "
          f"{single_s:.0f} s for all, by scaling")  # fmt: skip
    print(f"per step, without the wait for the last seed: {n * single_ms / block_ms:.2f}")
    ratio = single_s / made["seconds"]
    if options.out:
        numbers = {"device": name, "torch": torch.__version__, "captured": is_captured,
                   "tf32": options.tf32, "replicas": n, **made, "block_ms": block_ms,
                   "single_ms": single_ms, "agrees": agrees, "ratio": ratio}  # fmt: skip
        options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(f"ratio: {ratio:.2f}")
    return int(not agrees)


if __name__ == "__main__":
    sys.exit(main())
