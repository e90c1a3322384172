"""The toy transformer of this experiment: trained here, and watched on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from allostasis.core.progress import Ticker
from allostasis.core.records import write_atomically
from allostasis.engines.sequence_training import Schedule, SequenceTraining
from allostasis.engines.subjects import ToySubject
from allostasis.experiments.superposition.collected import Collected
from allostasis.metrics.head_write_variance import deviations
from allostasis.models.toy_transformer import ToyTransformer
from allostasis.tasks.interleaved_patterns import InterleavedPatterns
from allostasis.tasks.sequences import Sequences, SequenceTask
from allostasis.tasks.splits import Split, divide

LOOKS = 20
"""How often a model is looked at while it trains, beside step 0."""


def held_out(task: InterleavedPatterns, n_sequences: int) -> dict[Split, Sequences]:
    """Held-out sequences in three splits by their content; predictable positions are scored."""
    pool = task.sequences("test", range(2 * n_sequences + 64))
    whole = torch.cat([pool.tokens, pool.targets[:, -1:]], dim=1)
    return {
        split: Sequences(
            pool.tokens[chosen],
            pool.targets[chosen],
            pool.groups["predictable"][chosen],
            {"predictable": pool.groups["predictable"][chosen]},
            headline="predictable",
        )
        for split, chosen in divide(whole, n_sequences).items()
    }


@dataclass(frozen=True)
class Score:
    """What a model reaches on predictable positions.

    Attributes:
        accuracy: Share that is right.
        ceiling: The same of the best predictor there is.
        loss: Nats a token.
    """

    accuracy: float
    ceiling: float
    loss: float


@torch.no_grad()
def score(model: ToyTransformer, batch: Sequences, ceiling: float) -> Score:
    """Accuracy and loss on the scored positions of some sequences, beside what can be reached."""
    right = (model(batch.tokens).argmax(dim=-1) == batch.targets)[batch.scored]
    loss = float(ToySubject(model).losses(batch).mean())
    return Score(float(right.double().mean()), ceiling, loss)


def train(
    model: ToyTransformer,
    task: InterleavedPatterns,
    *,
    n_steps: int,
    lr: float,
    schedule: Schedule = "constant",
    watch: Sequences,
    found: Collected,
    keep: Path,
    name: str,
) -> None:
    """Train a model in place; how it does and what its heads write goes to the records.

    Args:
        model: Freshly made.
        task: Where batches come from.
        n_steps: Updates.
        lr: Learning rate.
        schedule: What it does after the warm-up.
        watch: Held-out sequences that are looked at on the way.
        found: The records.
        keep: Where the trained weights lie, so that a run that was cut short later need not train.
        name: What lines of progress begin with.
    """
    found.step = n_steps
    if keep.is_file():
        with safe_open(keep, framework="pt") as file:
            found.readings += json.loads(file.metadata()["readings"])
        model.load_state_dict(load_file(keep))
        return
    training = SequenceTraining(
        model=model, task=cast(SequenceTask, task), max_steps=n_steps, lr=lr, schedule=schedule
    )
    training.to(model.W_E.device)
    optimiser = training.configure_optimizers()
    tick = Ticker(name, noun="updates")
    at = {round(n_steps * look / LOOKS) for look in range(LOOKS + 1)}
    rows, ceiling = Collected(), task.ceiling(watch)["predictable"].accuracy
    for step in range(n_steps + 1):
        if step in at:
            _look(model, watch, ceiling, replace(rows, step=step))
        if step == n_steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = training.rate(step)
        optimiser.zero_grad()
        training.loss(task.train_batch(step)).backward()
        optimiser.step()
        tick(step + 1, n_steps)
    optimiser.zero_grad()
    found.readings += rows.readings
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    told = {"readings": json.dumps(rows.readings)}
    write_atomically(keep, lambda path: save_file(weights, path, metadata=told), is_durable=False)


@torch.no_grad()
def _look(model: ToyTransformer, watch: Sequences, ceiling: float, rows: Collected) -> None:
    subject, reached = ToySubject(model), score(model, watch, ceiling)
    n = int(watch.scored.sum())
    at = {"split": "measure", "n": n}
    rows.read("accuracy.predictable", reached.accuracy, symbol="Psi", unit="1", **at)
    rows.read("accuracy.predictable_ceiling", reached.ceiling, symbol="Psi", unit="1", **at)
    rows.read("cross_entropy.predictable", reached.loss, symbol="Psi", unit="nat", **at)
    for layer, z in enumerate(subject.z(watch.tokens)):
        for head, value in enumerate(deviations(z, subject.W_O(layer)).mean(dim=(0, 1))):
            rows.read(
                "head_write_variance.trained", float(value), n=watch.n_tokens, symbol="sigma2",
                unit="resid^2", split="measure", layer=layer, head=head,
            )  # fmt: skip
