"""What Lightning, the Recorder and a logger cost over a bare loop of the same updates.

    python benchmarks/harness_overhead.py [--updates 1000] [--rounds 3] [--threads 2]

Grokking at full size (p = 113, 30 % of the pairs). Both sides start from the same weights and do
the same updates; their final weights must be equal bit for bit. The harness runs as `run.py` sets
it up, with all metrics, evaluations, resume points and a CSV logger, in the two regimes of its
cadence: sparse (a record every 100 updates) and dense (one every 10). A full run's cost is their
mean, weighted by the share of updates that its cadence spends in dense stretches: as many as were
counted in the recorded study, of the t_grok + stop_after_grok updates of the full preset (the
study's own runs ended sooner). Modules are imported, and each side done for 20 updates, before time
is taken.

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
    parser.add_argument("--threads", type=int, default=2)
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

    def fresh(updates: int) -> Grokking:
        return Grokking(model=ModularTransformer(seed=0), task=task, max_steps=updates)

    def bare(updates: int) -> tuple[float, Grokking]:
        module = fresh(updates)
        optimiser = module.configure_optimizers()
        start = time.perf_counter()
        for update in range(updates):
            for group in optimiser.param_groups:
                group["lr"] = module.lr * min(1.0, (update + 1) / module.warmup_steps)
            optimiser.zero_grad()
            module.model.loss(task.train).backward()
            optimiser.step()
        return time.perf_counter() - start, module

    def harness(updates: int, low: float, high: float) -> tuple[float, Grokking]:
        module = fresh(updates)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plan = Plan(record=["*"], evaluate=["accuracy", "cross_entropy"], low=low, high=high)
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
                ],
            )
            start = time.perf_counter()
            trainer.fit(module, datamodule=task)
            return time.perf_counter() - start, module

    sides = {
        "bare": bare,
        "sparse": lambda updates: harness(updates, 0.15, 0.85),
        "dense": lambda updates: harness(updates, 0.0, 1.0),
    }
    for measure in sides.values():
        measure(20)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        ends = {}
        for side, measure in sides.items():
            taken, module = measure(options.updates)
            seconds[side].append(taken)
            ends[side] = torch.cat([p.detach().flatten() for p in module.model.parameters()])
        if not all(torch.equal(ends["bare"], end) for end in ends.values()):
            print("the final weights differ: the harness changes what is computed")
            return 1
    per_update = {k: 1e3 * statistics.median(v) / options.updates for k, v in seconds.items()}
    for side, value in per_update.items():
        over = value / per_update["bare"] - 1
        print(f"{side:7s} {value:7.2f} ms an update   {over:+.1%}")
    mixed = share * per_update["dense"] + (1 - share) * per_update["sparse"]
    print(f"dense share of a full run {share:.1%}; overhead {mixed / per_update['bare'] - 1:+.1%}")
    print(f"ratio: {per_update['bare'] / mixed:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
