"""The LightningModule of `grokking`: full-batch modular addition, its arms and their proof."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge, Gt, Le, Len, Lt
from jaxtyping import Bool, Float
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from allostasis.core.records import RunRecord
from allostasis.engines.optimisers import RowOptimiser, Rule
from allostasis.experiments.grokking import arms
from allostasis.experiments.grokking.phases import Phases
from allostasis.metrics.base import Snapshot
from allostasis.metrics.cosine_fve import cosine_fve
from allostasis.metrics.key_frequencies import key_frequencies
from allostasis.models.modular_loss import Loss
from allostasis.models.modular_step import Objective, Parameters
from allostasis.models.modular_transformer import Engine, Matmul, ModularTransformer
from allostasis.tasks.modular_addition import ModularAddition, Pairs

Optimiser = Literal["adamw", "adam_l2", "muon", "sgdm", "grokfast_ema"]


@dataclass(frozen=True)
class Shared:
    """What a block works out for all its replicas at once, as one of them asks for it.

    Attributes:
        grid_logits: Logits at '=' of every pair, by a and b.
        probe_accuracy: Accuracy on the probe.
    """

    grid_logits: Callable[[], Tensor]
    probe_accuracy: Callable[[], float]


class Grokking(L.LightningModule):
    """Full-batch modular addition with weight decay.

    One `training_step` does `chunk` updates, so that Lightning's own cost is paid once a chunk;
    `updates` counts updates and is the `step` of all records.

    Args:
        model: The model to train.
        task: The pairs; evaluations and the probe come from it.
        max_steps: Updates after which a run ends.
        chunk: Updates between two looks at the probe.
        lr: Learning rate.
        weight_decay: Decay coefficient; `adamw` decouples it from the gradient.
        betas: Adam's moment decay rates.
        warmup_steps: Updates over which the learning rate rises linearly.
        optimiser: `adamw`; `adam_l2`: decay added to the gradient, as in a predecessor's script,
            which at weight decay 1 cannot leave a loss of ln(p + 1); `muon` for the hidden
            matrices, with AdamW for the others; `sgdm`; `grokfast_ema`, AdamW with the slow part
            of the gradient amplified. Decay is decoupled but for `adam_l2`.
        momentum: Of `muon` and `sgdm`.
        muon_lr: Learning rate of the hidden matrices under `muon`.
        loss: `cross_entropy`, `stablemax` or `mse`. What is recorded as a loss is cross-entropy.
        temperature: What logits are divided by in the loss that is trained on.
        orthograd: Whether each tensor's gradient loses its part along the tensor.
        sphere: Whether final residual and unembedding are normalised: there is no amplitude.
        uniform_attention: Whether all attention weights are equal: there is no routing.
        norm_clamp: The norm of all parameters after every update, as a multiple of that which the
            same seed's run of `high_wd` had at its t_grok; null lets it move.
        reads: Arms whose finished run of the same seed this one needs.
        replicas: Width of the block that the run is trained in; 1 trains it alone.
        n_seeds: Seeds of the block from `seed` on; null takes as many as it has slots.
        cuda_graph: Whether an update of a block is captured once and replayed, on a GPU.
        engine: `structured` computes only what '=' reads; `naive` all three positions.
        matmul: Factors of the structured engine's largest products: `float32`, or rounded to
            `bfloat16`, which is faster on CPUs with bfloat16 units and not exact.
        stop_after_grok: Updates after t_grok at which a run ends; null goes on to max_steps.
        eval_every: Updates between evaluations on all pairs; a multiple of `chunk`.
        grok_accuracy: Test accuracy from which a run counts as generalising.
        dwell: Evaluations for which a phase's condition must hold.

    Raises:
        ValueError: eval_every is no multiple of chunk, or settings do not go together.
    """

    offers = frozenset({
        "logits", "labels", "classes", "params", "before", "grads", "modulus", "grid_logits",
        "train_pairs",
    })  # fmt: skip
    hindsight = frozenset({"key_frequencies"})

    def __init__(
        self,
        *,
        model: ModularTransformer,
        task: ModularAddition,
        max_steps: Annotated[int, Gt(0)] = 50_000,
        chunk: Annotated[int, Gt(0)] = 10,
        lr: Annotated[float, Gt(0)] = 1e-3,
        weight_decay: Annotated[float, Ge(0)] = 1.0,
        betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.98),
        warmup_steps: Annotated[int, Ge(0)] = 10,
        optimiser: Optimiser = "adamw",
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.95,
        muon_lr: Annotated[float, Gt(0)] = 0.02,
        loss: Loss = "cross_entropy",
        temperature: Annotated[float, Gt(0)] = 1.0,
        orthograd: bool = False,
        sphere: bool = False,
        uniform_attention: bool = False,
        norm_clamp: Annotated[float, Gt(0)] | None = None,
        reads: Sequence[str] = (),
        replicas: Annotated[int, Ge(1)] = 1,
        n_seeds: Annotated[int, Ge(1)] | None = None,
        cuda_graph: bool = True,
        engine: Engine = "structured",
        matmul: Matmul = "float32",
        stop_after_grok: Annotated[int, Gt(0)] | None = 10_000,
        eval_every: Annotated[int, Gt(0)] = 50,
        grok_accuracy: Annotated[float, Gt(0), Le(1)] = 0.95,
        dwell: Annotated[int, Ge(1)] = 5,
    ) -> None:
        super().__init__()
        if eval_every % chunk:
            raise ValueError(f"{eval_every=} is no multiple of {chunk=}")
        if norm_clamp is not None and arms.REFERENCE not in reads:
            raise ValueError(
                f"{norm_clamp=} is a multiple of a norm that a run of '{arms.REFERENCE}' had; "
                f"set reads=[{arms.REFERENCE}]"
            )
        if n_seeds is not None and n_seeds > replicas:
            raise ValueError(f"{n_seeds=} seeds do not fit in a block of {replicas=}")
        if replicas > 1 and (engine != "structured" or matmul != "float32"):
            raise ValueError(f"{replicas=} take engine=structured and matmul=float32")
        self.automatic_optimization = False
        self.model, self.task = model, task
        model.sphere, model.uniform_attention = sphere, uniform_attention
        self.max_steps, self.chunk, self.eval_every = max_steps, chunk, eval_every
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup_steps, self.optimiser = warmup_steps, optimiser
        self.objective = Objective(loss, temperature)
        self.rule = Rule(
            optimiser="adamw" if optimiser == "grokfast_ema" else optimiser,
            betas=(betas[0], betas[1]),
            momentum=momentum,
            muon_lr=muon_lr,
            warmup_steps=warmup_steps,
            orthograd=orthograd,
            grokfast=arms.GROKFAST if optimiser == "grokfast_ema" else 0.0,
        )
        self.norm_clamp, self.norm = norm_clamp, None
        self.replicas, self.n_seeds, self.cuda_graph = replicas, n_seeds, cuda_graph
        self.shared: Shared | None = None
        self.engine: Engine = engine
        self.matmul: Matmul = matmul
        self.stop_after_grok = stop_after_grok
        self.phases = Phases(grok_accuracy=grok_accuracy, dwell=dwell)
        self.updates = 0
        self.key_frequencies: tuple[int, ...] | None = None
        self._before: dict[str, Tensor] = {}
        self._grid: Tensor | None = None
        self._candidates: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self._milestones: dict[int, dict[str, Tensor]] = {}

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Pairs, batch_idx: int) -> None:
        """Do the next chunk of updates."""
        del batch_idx
        wrapped = self.optimizers()
        assert isinstance(wrapped, LightningOptimizer)
        optimiser = wrapped.optimizer  # Lightning's wrapper costs as much as fused AdamW itself
        self._before = _copy(dict(self.model.named_parameters()))
        loss = torch.zeros(())
        for _ in range(min(self.chunk, self.max_steps - self.updates)):
            rate = self.lr * min(1.0, (self.updates + 1) / max(1, self.warmup_steps))
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad()
            loss = self._loss(self.model, batch)
            loss.backward()
            optimiser.step()
            self.updates += 1
        if not bool(loss.isfinite()):  # and so for all later ones
            raise RuntimeError(
                f"training diverged: the loss of update {self.updates} is {loss.item()}. "
                f"This arm's learning rate is {self.lr:g}; set module.lr to a lower one"
            )

    def _loss(self, model: ModularTransformer, pairs: Pairs) -> Tensor:
        return model.loss(pairs, engine=self.engine, matmul=self.matmul, objective=self.objective)

    def advanced(self, updates: int, *, before: dict[str, Tensor]) -> None:
        """Take note that a block has done this run's next chunk of updates."""
        self.updates, self._before = updates, before

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Stop once no further update is wanted; runs after all callbacks."""
        self.trainer.should_stop = self.is_finished

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused AdamW, or Adam with the decay in its gradient, or the arm's own rule."""
        return self._optimiser(self.model)

    def _optimiser(self, model: ModularTransformer) -> torch.optim.Optimizer:
        kinds = {"adamw": torch.optim.AdamW, "adam_l2": torch.optim.Adam}
        if self.optimiser in kinds and not self.rule.orthograd and self.norm is None:
            return kinds[self.optimiser](
                model.parameters(),
                lr=self.lr,
                weight_decay=self.weight_decay,
                betas=tuple(self.betas),
                fused=True,
            )
        return RowOptimiser(
            [getattr(model, name) for name in Parameters._fields],
            self.rule,
            lr=self.lr,
            weight_decay=self.weight_decay,
            norm=self.norm,
        )

    def take(self, earlier: Mapping[str, RunRecord]) -> dict[str, Any]:
        """Read the norm to be held from the same seed's finished run.

        Returns:
            What run.json says of it.
        """
        if self.norm_clamp is None:
            return {}
        critical = arms.norm_at_grok(earlier[arms.REFERENCE])
        self.norm = self.norm_clamp * critical
        return {"norm": {"at_t_grok": critical, "held": self.norm}}

    @staticmethod
    def together(
        members: Sequence[Grokking], *, open_slots: Sequence[int], device: torch.device
    ) -> L.LightningModule:
        """Several runs as one module that trains them side by side."""
        from allostasis.experiments.grokking.replicas import ReplicaBlock

        return ReplicaBlock(members, open_slots=open_slots, device=device)

    @property
    def last_step(self) -> int:
        """The update after which the run ends, as far as is known: max_steps, or earlier."""
        grokked = self.phases.times["t_grok"]
        if grokked is not None and self.stop_after_grok is not None:
            return min(self.max_steps, grokked + self.stop_after_grok)
        return self.max_steps

    @property
    def is_finished(self) -> bool:
        """Whether no further update is wanted."""
        return self.updates >= self.last_step

    def prove_effect(self) -> dict[str, float]:
        """Show before training that the arm's treatment acts and its loss has a gradient.

        Copies do a few updates: as this arm, without its weight decay, and as plain AdamW on
        cross-entropy with the same decay.

        Returns:
            `gradient_norm` of the loss at step 0; `weight_decay_change` and `treatment_change`, the
            largest change of a parameter that each makes (0 by construction where there is none).

        Raises:
            RuntimeError: The loss has no gradient, or the treatment or the decay changes nothing.
        """
        own = arms.Setting(self.rule, self.objective, self.lr, self.weight_decay, self.norm)
        return arms.prove(own, self.model, self.task.train.to(self.device))

    # ------------------------------------------------------------------ what recorders see

    @torch.no_grad()
    def probe_accuracy(self, *, is_followed: bool = False) -> float:
        """Accuracy on the probe, a fixed part of the held-out pairs.

        Where snapshots follow, the probe is read off the grid of all pairs that they begin with.
        """
        if self.shared is not None:
            return self.shared.probe_accuracy()
        probe = self.task.probe.to(self.device)
        self._grid = grid = self.model.grid_logits() if is_followed else None
        logits = self.model.logits(probe) if grid is None else grid[probe.a, probe.b]
        return float((logits.argmax(dim=-1) == probe.answer).double().mean())

    def grid_logits(self) -> Float[Tensor, "p p d_vocab"]:
        """Logits at '=' of every pair, by a and b."""
        return self.model.grid_logits() if self.shared is None else self.shared.grid_logits()

    @torch.no_grad()
    def snapshots(self, hooks: Sequence[str], *, full: bool) -> Iterator[Snapshot]:
        """Train and test pairs; with `full` also the probe, the whole grid and the weights."""
        grid, self._grid = self.grid_logits() if self._grid is None else self._grid, None
        weights = self.model.weights()
        for split, pairs in (("train", self.task.train), ("test", self.task.test)):
            yield self._logits_snapshot(split, pairs.to(self.device), grid)
        if not full:
            return
        probe = self.task.probe.to(self.device)
        _, cache = self.model.run_with_cache(probe.tokens, names_filter=list(hooks))
        yield Snapshot(
            step=self.updates,
            split="probe",
            classes=probe.answer,
            n_classes=self.task.p,
            acts=dict(cache),
            weights=weights,
            readout=2,
            normalised_sites=self.model.normalised_sites,
        )
        yield Snapshot(
            step=self.updates,
            split="all",
            grid_logits=grid[..., : self.task.p],
            train_pairs=self._train_mask(),
        )
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        yield Snapshot(
            step=self.updates, split=None, weights=weights, before=self._before, grads=grads,
            modulus=self.task.p,
        )  # fmt: skip

    def _logits_snapshot(
        self, split: str, pairs: Pairs, grid: Float[Tensor, "p p d_vocab"]
    ) -> Snapshot:
        return Snapshot(
            step=self.updates,
            split=split,
            logits=grid.flatten(0, 1)[pairs.a * self.task.p + pairs.b],
            labels=pairs.answer,
            classes=pairs.answer,
            n_classes=self.task.p,
            weights=self.model.weights(),
            ceiling={"": 1.0},
            floor=0.0,
        )

    def _train_mask(self) -> Bool[Tensor, "p p"]:
        train = self.task.train.to(self.device)
        mask = torch.zeros(self.task.p, self.task.p, dtype=torch.bool, device=self.device)
        mask[train.a, train.b] = True
        return mask

    def evaluated(self, readings: Mapping[tuple[str, str | None], float]) -> None:
        """Follow the phases; keep the weights at which one may have begun."""
        changes = self.phases.update(
            self.updates,
            train_accuracy=readings["accuracy", "train"],
            test_accuracy=readings["accuracy", "test"],
            test_loss=readings["cross_entropy", "test"],
        )
        for name, change in changes.items():
            if change == "lost":
                del self._candidates[name]
                continue
            if name not in self._candidates:
                self._candidates[name] = (self.updates, _copy(self.model.state_dict()))
            if change == "confirmed":
                step, weights = self._candidates.pop(name)
                self._milestones[step] = weights

    def milestones(self) -> dict[int, dict[str, Tensor]]:
        """Weights at t_mem, t_clean and t_grok, by step, each handed out once."""
        due, self._milestones = self._milestones, {}
        return due

    @torch.no_grad()
    def hindsight_snapshots(self, weights: Mapping[str, Tensor], step: int) -> Iterator[Snapshot]:
        """The grid of earlier weights, with the frequencies that the run ended with."""
        if self.key_frequencies is None:
            share = cosine_fve(self.model.grid_logits()[..., : self.task.p])
            self.key_frequencies = key_frequencies(share)
        earlier = copy.deepcopy(self.model)
        earlier.load_state_dict(dict(weights))
        yield Snapshot(
            step=step,
            split="all",
            grid_logits=earlier.grid_logits()[..., : self.task.p],
            train_pairs=self._train_mask(),
            key_frequencies=self.key_frequencies,
        )

    @torch.no_grad()
    def test_step(self, batch: Pairs, batch_idx: int) -> dict[str, Any]:
        """The held-out pairs under the final weights, for the table of single examples."""
        del batch_idx
        return {"snapshot": self._logits_snapshot("test", batch, self.grid_logits())}

    def data(self) -> dict[str, Any]:
        """Which pairs the run used, so that two runs can prove that theirs were the same."""
        sets = {"train": self.task.train, "test": self.task.test, "probe": self.task.probe}
        return {name: {"n": len(pairs), "sha256": pairs.sha256} for name, pairs in sets.items()}

    def summary(self) -> dict[str, Any]:
        """The run in scalars: which phases came when, and where it is censored if they did not."""
        times = self.phases.times
        return {
            "steps": self.updates,
            "grokked": times["t_grok"] is not None,
            **times,
            "censored_at": self.updates if times["t_grok"] is None else None,
            "key_frequencies": list(self.key_frequencies or ()),
        }

    # ------------------------------------------------------------------ survival

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what decides the rest of the run beside weights and optimiser."""
        checkpoint["grokking"] = {
            "updates": self.updates,
            "phases": self.phases.state_dict(),
            "before": self._before,
            "candidates": {name: list(value) for name, value in self._candidates.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where `on_save_checkpoint` left off."""
        state = checkpoint["grokking"]
        self.updates, self._before = state["updates"], state["before"]
        self.phases.load_state_dict(state["phases"])
        self._candidates = {name: (step, w) for name, (step, w) in state["candidates"].items()}


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
