"""What Lightning, the Recorder and a logger cost over a bare loop of the same updates.

    python benchmarks/harness_overhead.py [--updates 1000] [--rounds 3] [--threads 1]

Grokking at full size (p = 113, 30 % of the pairs). Both sides start from the same weights and do
the same updates, ten of the one and then ten of the other, each on its own clock; their final
weights must be equal bit for bit. The harness runs as `run.py` sets it up, with all metrics,
evaluations, resume points and a CSV logger, in the two regimes of its cadence: sparse (a record
every 100 updates) and dense (one every 10); its start and end count too. A full run's cost is their
mean, weighted by the share of updates that its cadence spends in dense stretches: as many as were
counted in the recorded study, of the t_grok + stop_after_grok updates of the full preset (the
study's own runs ended sooner).

Last line: time of the bare loop over ours at the cadence of a full run; 0.91 is 10 % overhead.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

STUDY = Path(__file__).parents[1] / "experiments" / "2026-11-23_grokking_weight_decay" / "runs"


def dense_share(stop_after_grok: int = 10_000) -> float:
    """Share of updates in dense stretches in a full run, mean over the recorded `high_wd` runs."""
    shares = []
    for path in sorted(STUDY.rglob("high_wd/*/*/metrics.parquet")):
        grokked = json.loads((path.parent / "run.json").read_text())["summary"]["t_grok"]
        table = pd.read_parquet(path, columns=["step", "metric"])
        steps = sorted(table.loc[table["metric"] == "logit_scale", "step"].unique())
        gaps = [late - early for early, late in zip(steps, steps[1:], strict=False)]
        dense = sum(gap for gap in gaps if gap == 10)
        shares.append(dense / (grokked + stop_after_grok))
    if not shares:
        sys.exit(f"no recorded run of high_wd under {STUDY}: give --dense-share")
    return statistics.mean(shares)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dense-share", type=float, default=None)
    options = parser.parse_args()
    share = dense_share() if options.dense_share is None else options.dense_share

    import lightning as L
    import torch
    from lightning.pytorch.loggers import CSVLogger
    from threadpoolctl import threadpool_limits

    from allostasis.callbacks.cadence import Plan
    from allostasis.callbacks.checkpoints import Checkpoints
    from allostasis.callbacks.progress import Progress
    from allostasis.callbacks.recorder import Identity, Recorder
    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    threadpool_limits(1, user_api="blas")
    task = ModularAddition(seed=0)
    identity = Identity("benchmark", "grokking", "high_wd", 0, "cpu")

    def fresh() -> Grokking:
        return Grokking(model=ModularTransformer(seed=0), task=task, max_steps=options.updates)

    class Twin(L.Callback):
        """The bare loop, a stretch of it after each of the harness's, on a clock of its own."""

        def __init__(self) -> None:
            self.module = fresh()
            self.optimiser = self.module.configure_optimizers()
            self.updates, self.seconds = 0, 0.0

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object) -> None:
            del trainer
            start = time.perf_counter()
            while self.updates < pl_module.updates:
                rate = self.module.lr * min(1.0, (self.updates + 1) / self.module.warmup_steps)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                self.optimiser.zero_grad()
                self.module.model.loss(task.train).backward()
                self.optimiser.step()
                self.updates += 1
            self.seconds += time.perf_counter() - start

    def measure(low: float, high: float) -> tuple[float, float]:
        """Seconds of the harness and of the bare loop."""
        module, twin = fresh(), Twin()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plan = Plan(
                record=["*", "!trajectory_*"],
                evaluate=["accuracy", "cross_entropy"],
                low=low,
                high=high,
            )
            recorder = Recorder(
                folder=folder, identity=identity, plan=plan, eval_every=module.eval_every
            )
            trainer = L.Trainer(
                max_epochs=-1,
                accelerator="cpu",
                devices=1,
                logger=CSVLogger(folder, name="csv"),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                callbacks=[
                    recorder,
                    Checkpoints(folder=folder, every=plan.checkpoint_every),
                    Progress(identity=identity, recorder=recorder),
                    twin,
                ],
            )
            start = time.perf_counter()
            trainer.fit(module, datamodule=task)
            taken = time.perf_counter() - start - twin.seconds
        for ours, bare in zip(module.parameters(), twin.module.parameters(), strict=True):
            if not torch.equal(ours, bare):
                sys.exit("the final weights differ: the harness changes what is computed")
        return taken, twin.seconds

    bands = {"sparse": (0.15, 0.85), "dense": (0.0, 1.0)}
    over: dict[str, list[float]] = {name: [] for name in bands}
    bare: list[float] = []
    for _ in range(options.rounds):
        for name, band in bands.items():
            taken, plain = measure(*band)
            over[name].append(taken / plain - 1)
            bare.append(1e3 * plain / options.updates)
    print(f"bare {statistics.median(bare):.2f} ms an update")
    added = {name: statistics.median(values) for name, values in over.items()}
    for name, value in added.items():
        spread = ", ".join(f"{each:+.1%}" for each in over[name])
        print(f"{name:7s} {value:+.1%}   ({spread})")
    mixed = share * added["dense"] + (1 - share) * added["sparse"]
    print(f"dense share of a full run {share:.1%}; overhead {mixed:+.1%}")
    print(f"ratio: {1 / (1 + mixed):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
