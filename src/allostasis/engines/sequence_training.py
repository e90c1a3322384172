"""Training a small transformer on sequences: what experiments on a toy model share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge, Gt, Len, Lt
from jaxtyping import Bool, Float
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn import functional

from allostasis.metrics.base import Score, Snapshot
from allostasis.models.readout import readout_loss
from allostasis.models.toy_transformer import ToyTransformer
from allostasis.tasks.sequences import Sequences, SequenceTask

Schedule = Literal["constant", "sqrt_decay"]
CELLS = 2**24
"""Logits that are looked at together: 64 MB in float32."""
BAND = (0.15, 0.85)
"""Held-out accuracy at which weights are kept on the way in and out."""
LEAK = 4.0
"""Standard errors above what any predictor can expect, from which a model saw its answers."""


class LeakError(RuntimeError):
    """A model that is better than any predictor can be has seen what it should predict."""


class SequenceTraining(L.LightningModule):
    """Next-token training of a toy transformer, a fresh batch an update.

    `updates` counts updates and is the `step` of all records; one `training_step` does `chunk` of
    them. The batch of an update is a function of its number, so that a resumed run sees what an
    uninterrupted one would. An experiment derives from this class and puts its treatment into
    `after_backward` and `after_update`, or as hooks on the model.

    Args:
        model: The model to train.
        task: Where batches, held-out sequences and probes come from.
        max_steps: Updates.
        chunk: Updates between two looks at the probe.
        eval_every: Updates between evaluations; a multiple of `chunk`.
        lr: Learning rate.
        betas: Adam's moment decay rates.
        weight_decay: Decoupled decay.
        warmup_steps: Updates over which the learning rate rises linearly.
        schedule: What it does after that: stay, or fall as sqrt(1 - step / max_steps).

    Raises:
        ValueError: eval_every is no multiple of chunk.
    """

    offers = frozenset({"logits", "labels", "classes", "params", "before", "grads"})
    hindsight: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        model: ToyTransformer,
        task: SequenceTask,
        max_steps: Annotated[int, Gt(0)],
        chunk: Annotated[int, Gt(0)] = 10,
        eval_every: Annotated[int, Gt(0)] = 100,
        lr: Annotated[float, Gt(0)] = 1e-3,
        betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.98),
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] = 20,
        schedule: Schedule = "constant",
    ) -> None:
        super().__init__()
        if eval_every % chunk:
            raise ValueError(f"{eval_every=} is no multiple of {chunk=}")
        self.automatic_optimization = False
        self.model, self.task = model, task
        self.max_steps, self.chunk, self.eval_every = max_steps, chunk, eval_every
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.updates = 0
        self._before: dict[str, Tensor] = {}
        self._crossed: dict[str, int] = {}
        self._milestones: dict[int, dict[str, Tensor]] = {}
        self._excess: list[Float[Tensor, " sequence"]] = []
        self._final: dict[str, tuple[int, int]] = {}

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do the next chunk of updates."""
        del batch, batch_idx
        wrapped = self.optimizers()
        assert isinstance(wrapped, LightningOptimizer)
        optimiser = wrapped.optimizer  # Lightning's wrapper costs as much as fused AdamW itself
        self._before = _copy(dict(self.model.named_parameters()))
        for _ in range(min(self.chunk, self.max_steps - self.updates)):
            for group in optimiser.param_groups:
                group["lr"] = self.rate(self.updates)
            optimiser.zero_grad()
            self.loss(self.task.train_batch(self.updates)).backward()
            self.after_backward()
            optimiser.step()
            self.after_update()
            self.updates += 1

    def rate(self, update: int) -> float:
        """Learning rate of an update."""
        rate = self.lr * min(1.0, (update + 1) / max(1, self.warmup_steps))
        if self.schedule == "sqrt_decay":
            rate *= math.sqrt(1 - update / self.max_steps)
        return rate

    def loss(self, batch: Sequences) -> Float[Tensor, ""]:
        """Mean cross-entropy over the scored positions, in nats."""
        batch = batch.to(self.device)
        self.prepare(batch)
        states = self.model.encode(batch.tokens)
        return readout_loss(states, self.model.W_U, batch.targets, batch.scored)

    def prepare(self, batch: Sequences) -> None:
        """What an arm must know of a batch before the model reads it."""

    def after_backward(self) -> None:
        """What an arm does to the gradients."""

    def after_update(self) -> None:
        """What an arm does to the weights after each update."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Stop once no further update is wanted; runs after all callbacks."""
        self.trainer.should_stop = self.is_finished

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused AdamW, which is Adam where there is no decay."""
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            weight_decay=self.weight_decay,
            fused=True,
        )

    @property
    def last_step(self) -> int:
        """The update after which the run ends."""
        return self.max_steps

    @property
    def is_finished(self) -> bool:
        """Whether no further update is wanted."""
        return self.updates >= self.last_step

    def prove_effect(self) -> dict[str, float]:
        """Show before training that the loss has a gradient.

        Raises:
            RuntimeError: It has none.
        """
        self.model.zero_grad()
        self.loss(self.task.train_batch(0).part(slice(8))).backward()
        norm = math.sqrt(
            sum(float(p.grad.square().sum()) for p in self.model.parameters() if p.grad is not None)
        )
        self.model.zero_grad()
        if norm <= 1e-8:
            raise RuntimeError(
                f"the loss has a gradient of norm {norm:.1e} at step 0; it cannot train"
            )
        return {"gradient_norm": norm}

    # ------------------------------------------------------------------ what recorders see

    @torch.no_grad()
    def probe_accuracy(self, *, is_followed: bool = False) -> float:
        """Accuracy at the headline positions of the watched held-out sequences."""
        del is_followed  # snapshots share no forward pass with it
        right = total = 0
        for part in self._pieces(self.task.watched):
            mask = part.groups[part.headline]
            hits = self.model(part.tokens).argmax(dim=-1) == part.targets
            right += int((hits & mask).sum())
            total += int(mask.sum())
        return right / total

    def _pieces(self, sequences: Sequences, width: int | None = None) -> Iterator[Sequences]:
        """Some sequences at a time, each ready to be read."""
        size = self.at_once(sequences.tokens.shape[1] * (width or self.model.vocab_size))
        for begin in range(0, len(sequences), size):
            part = sequences.part(slice(begin, begin + size)).to(self.device)
            self.prepare(part)
            yield part

    def at_once(self, cells: int) -> int:
        """How many sequences of so many numbers each are read together."""
        return max(1, CELLS // cells)

    def snapshots(self, hooks: Sequence[str], *, full: bool) -> Iterator[Snapshot]:
        """Train and held-out tokens; with `full` also the probe, the class probe and the weights.

        The whole held-out set is read when the run ends, its watched part before.
        """
        test = self.task.held_out if self.is_finished else self.task.watched
        train = self.task.train_batch(max(self.updates - 1, 0)).part(slice(len(self.task.watched)))
        for split, sequences in (("train", train), ("test", test)):
            yield from self._answered(split, sequences)
        if not full:
            return
        weights = self.model.weights()
        sites = self.model.normalised_sites
        with torch.no_grad():
            caches = [
                self.model.run_with_cache(part.tokens, names_filter=list(hooks))[1]
                for part in self._pieces(self.task.probe, width=self.model.d_model)
            ]
        acts = {name: torch.cat([cache[name] for cache in caches]) for name in caches[0]}
        yield Snapshot(
            step=self.updates, split="probe", acts=acts, weights=weights, normalised_sites=sites
        )
        yield self._class_snapshot([hook for hook in hooks if _is_stream(hook)])
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        yield Snapshot(
            step=self.updates, split=None, weights=weights, before=self._before, grads=grads
        )

    def _answered(self, split: str, sequences: Sequences) -> Iterator[Snapshot]:
        """Every answer of some sequences, a few of them at a time."""
        reached = self.task.ceiling(sequences)
        ceiling = {name: best.accuracy for name, best in reached.items()}
        is_watched = split == "test"
        if is_watched:
            self._final = {}
        for part in self._pieces(sequences):
            with torch.no_grad():
                logits = self.model(part.tokens)
            hits = logits.argmax(dim=-1) == part.targets
            flat = logits.flatten(0, 1)
            losses = functional.cross_entropy(flat, part.targets.flatten(), reduction="none")
            losses = losses.unflatten(0, hits.shape)
            if is_watched:
                self._note_excess(part, hits)
                self._count(part, hits)
            at = part.groups[part.headline]
            yield Snapshot(
                step=self.updates,
                split=split,
                logits=logits[at],
                labels=part.targets[at],
                weights=self.model.weights(),
                scores={
                    name: Score(hits[mask], losses[mask], reached[name].cross_entropy)
                    for name, mask in part.groups.items()
                },
                hits=hits if is_watched and self.is_finished else None,
                ceiling=ceiling | {"": ceiling[sequences.headline]},
                floor=reached[sequences.headline].cross_entropy,
            )
        if is_watched:
            self._refuse_leaks()

    def _note_excess(self, part: Sequences, hits: Bool[Tensor, "sequence position"]) -> None:
        best = self.task.expected_accuracy(part).to(hits.device)
        counted = part.scored
        difference = torch.where(counted, hits.to(best.dtype) - best, 0.0)
        self._excess.append(difference.sum(dim=1) / counted.sum(dim=1))

    def _count(self, part: Sequences, hits: Bool[Tensor, "sequence position"]) -> None:
        for name, mask in part.groups.items():
            right, total = self._final.get(name, (0, 0))
            self._final[name] = right + int((hits & mask).sum()), total + int(mask.sum())

    def _refuse_leaks(self) -> None:
        """Fail where the model is right more often than anything that sees the past alone can be.

        Raises:
            LeakError: By sequences, mean excess over the best predictor is above LEAK standard
                errors.
        """
        excess, self._excess = torch.cat(self._excess), []
        mean, error = float(excess.mean()), float(excess.std() / math.sqrt(len(excess)))
        if mean > LEAK * error and mean > 1e-9:
            raise LeakError(
                f"leak_suspected: accuracy over all positions is {mean:.3f} (standard error "
                f"{error:.3f}) above what the best possible predictor expects on the same "
                f"sequences at step {self.updates}; the model sees its answers. Check the causal "
                "mask and the inputs."
            )

    @torch.no_grad()
    def _class_snapshot(self, hooks: list[str]) -> Snapshot:
        probe = self.task.class_probe
        found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        for part in self._pieces(probe, width=self.model.d_model):
            for hook, acts in streams(self.model, part.tokens, hooks).items():
                found[hook].append(acts[:, -1:])
        assert probe.classes is not None
        return Snapshot(
            step=self.updates,
            split="classes",
            acts={hook: torch.cat(acts) for hook, acts in found.items()},
            classes=probe.classes.to(self.device),
            n_classes=probe.n_classes,
            weights=self.model.weights(),
            normalised_sites=self.model.normalised_sites,
        )

    def evaluated(self, readings: Mapping[tuple[str, str | None], float]) -> None:
        """Keep the weights where held-out accuracy first enters and leaves the band."""
        accuracy = readings["accuracy", "test"]
        for name, level in zip(("t_low", "t_high"), BAND, strict=True):
            if accuracy >= level and name not in self._crossed:
                self._crossed[name] = self.updates
                self._milestones[self.updates] = _copy(self.model.state_dict())

    def milestones(self) -> dict[int, dict[str, Tensor]]:
        """Weights at the edges of the band, by step, each handed out once."""
        due, self._milestones = self._milestones, {}
        return due

    @torch.no_grad()
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The last position of every held-out sequence, for the table of single examples."""
        del batch, batch_idx
        logits, labels = [], []
        for part in self._pieces(self.task.held_out):
            logits.append(self.model.encode(part.tokens)[:, -1] @ self.model.W_U)
            labels.append(part.targets[:, -1])
        snapshot = Snapshot(
            step=self.updates, split="test", logits=torch.cat(logits), labels=torch.cat(labels),
            weights=self.model.weights(),
        )  # fmt: skip
        return {"snapshot": snapshot}

    def data(self) -> dict[str, Any]:
        """Which sequences the run used."""
        return self.task.data()

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        ceiling = self.task.ceiling(self.task.held_out)
        return {
            "steps": self.updates,
            **{f"accuracy_{name}": right / n for name, (right, n) in self._final.items()},
            **{f"ceiling_{name}": best.accuracy for name, best in ceiling.items()},
            **{f"floor_{name}": best.cross_entropy for name, best in ceiling.items()},
        }

    # ------------------------------------------------------------------ survival

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what decides the rest of the run beside weights and optimiser."""
        checkpoint["sequence_training"] = {
            "updates": self.updates,
            "before": self._before,
            "crossed": dict(self._crossed),
            "final": dict(self._final),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where `on_save_checkpoint` left off."""
        state = checkpoint["sequence_training"]
        self.updates, self._before = state["updates"], state["before"]
        self._crossed, self._final = dict(state["crossed"]), dict(state["final"])


def streams(model: ToyTransformer, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
    """Values at hooks, by name, without a readout."""
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value

    with model.hooks(fwd_hooks=[(hook, keep) for hook in hooks]):
        model.encode(tokens)
    return kept


def _is_stream(hook: str) -> bool:
    return "hook_resid_" in hook or hook.endswith(("_sum", "ln_final.hook_normalized"))


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
