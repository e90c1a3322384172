"""Updates of an autoencoder: stages, losses with their weights, dead latents, going on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int64
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from allostasis.core.seeding import derive
from allostasis.core.spaces import CausalMetric
from allostasis.experiments.hsae import arms
from allostasis.experiments.hsae.scoring import Activations
from allostasis.experiments.hsae.stages import Stage, rate
from allostasis.models.hsae import HierarchicalSAE
from allostasis.models.hsae_losses import ORTHO_ROWS, ConfigError, Dead, losses, refusal
from allostasis.models.sae import FlatSAE

log = logging.getLogger(__name__)

AT_MINIMUM = 1e-12  # a loss this small may have no gradient
MAX_NORM = 1.0  # of the gradient


class Training(L.LightningModule):
    """Trains an autoencoder on a task's rows, a chunk of updates at a time.

    Args:
        task: The rows; those of an update are a function of its number.
        stages: When what is trained, on which losses.
        max_steps: Updates.
        l1_warmup_steps: Updates over which the weight of `l1` rises.
        lr: Learning rate.
        weight_decay: Decoupled decay.
        warmup_steps: Updates over which the rate rises.
        decoder_lr_mult: Factor on the rate of tensors that were frozen.
        dead_after_tokens: Tokens without firing after which a latent is dead.
        chunk: Updates between two looks at which latents are dead.
        log_grad_every: Updates between looks at each loss and its gradient.
        evaluate_at: Updates after which weights are kept.
    """

    model: HierarchicalSAE | FlatSAE
    quiet: Int64[Tensor, " latent"]

    def __init__(
        self,
        *,
        task: Activations,
        stages: Sequence[Stage],
        max_steps: int,
        l1_warmup_steps: int,
        lr: float,
        weight_decay: float,
        warmup_steps: int,
        decoder_lr_mult: float,
        dead_after_tokens: int,
        chunk: int,
        log_grad_every: int,
        evaluate_at: Sequence[int],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.task, self.stages = task, tuple(stages)
        self.max_steps, self.chunk, self.log_grad_every = max_steps, chunk, log_grad_every
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.l1_warmup_steps, self.decoder_lr_mult = l1_warmup_steps, decoder_lr_mult
        self.dead_after_tokens, self.evaluate_at = dead_after_tokens, tuple(evaluate_at)
        self.metric: CausalMetric | None = None
        self.sigma: Tensor | None = None
        self.beginning: arms.Directions | None = None
        self.updates, self._entered = 0, ""
        self._milestones: dict[int, dict[str, Tensor]] = {}
        self.curves: list[dict[str, Any]] = []

    def hold(self, model: HierarchicalSAE | FlatSAE) -> None:
        """Take the autoencoder that is to be trained; none of its latents has been quiet yet."""
        self.model = model
        quiet = torch.zeros(model.d_sae, dtype=torch.int64, device=self.device)
        self.register_buffer("quiet", quiet)

    def prove_effect(self) -> dict[str, float]:
        """Show before training that every enabled loss moves something, in every stage.

        Returns:
            Norm of each loss's gradient on what its stage trains, by stage.

        Raises:
            ConfigError: A loss that is not at its minimum has none.
        """
        found: dict[str, float] = {}
        x = self.task.batch(0, self.device).x
        for stage in self.stages:
            self._enter(stage)
            for name, (value, norm) in self._gradients(x, stage).items():
                found[f"{stage.name}.{name}"] = norm
                if norm > 0:
                    continue
                if abs(value) >= AT_MINIMUM:
                    raise ConfigError(refusal(stage.name, name, stage.frozen))
                log.warning(
                    "stage %s: '%s' is %.1e on the first batch and has no gradient there",
                    stage.name, name, value,
                )  # fmt: skip
        self._entered = ""
        return found

    def _gradients(self, x: Tensor, stage: Stage) -> dict[str, tuple[float, float]]:
        """Each enabled loss of a batch, and the norm of its gradient on what is trained."""
        moving = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        found = {}
        for name, value in self._raw(x, stage, self._dead()).items():
            norm = 0.0
            if value.requires_grad:
                grads = torch.autograd.grad(value, moving, retain_graph=True, allow_unused=True)
                squares = [grad.square().sum() for grad in grads if grad is not None]
                norm = math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
            found[name] = (float(value.detach()), norm)
        return found

    @property
    def stage(self) -> Stage:
        """The stage that the next update is of."""
        return next((one for one in self.stages if self.updates < one.end), self.stages[-1])

    def _enter(self, stage: Stage) -> None:
        for name, tensor in self.model.named_parameters():
            tensor.requires_grad_(name not in stage.frozen)
        self._entered = stage.name

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do the next chunk of updates, all of one stage."""
        del batch, batch_idx
        wrapped = self.optimizers()
        assert isinstance(wrapped, LightningOptimizer)
        stage, begin = self.stage, self.updates
        if self._entered != stage.name:
            self._enter(stage)
        dead, totals = self._dead(), []
        while self.updates < min(begin + self.chunk, stage.end):
            totals.append(self._update(wrapped.optimizer, stage, dead))
        finite = torch.stack(totals).isfinite().tolist()
        if not all(finite):
            step = begin + finite.index(False)
            ids = self.task.batch(step).ids[:4].tolist()
            raise RuntimeError(
                f"the loss of update {step} is not finite; the batch begins with rows {ids}"
            )
        if self.updates in self.evaluate_at:
            weights = self.model.state_dict()
            self._milestones[self.updates] = {n: w.detach().clone() for n, w in weights.items()}

    def _update(self, optimiser: torch.optim.Optimizer, stage: Stage, dead: Dead) -> Tensor:
        x = self.task.batch(self.updates, self.device).x
        factor = rate(self.updates, warmup_steps=self.warmup_steps, max_steps=self.max_steps)
        for group in optimiser.param_groups:
            group["lr"] = self.lr * factor * (group["mult"] if stage.name == "B" else 1.0)
        if self.updates % self.log_grad_every == 0:
            self._note(x, stage)
        optimiser.zero_grad()
        raw = self._raw(x, stage, dead, counted=True)
        weights = self._weights(stage, raw)
        total = torch.stack([weights[name] * value for name, value in raw.items()]).sum()
        total.backward()
        if isinstance(self.model, HierarchicalSAE):
            self.model.project_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        optimiser.step()
        if isinstance(self.model, HierarchicalSAE):
            self.model.renormalise()
        self.updates += 1
        return total.detach()

    def _weights(self, stage: Stage, names: Iterable[str]) -> dict[str, float]:
        """What each loss counts for; SAELens weighs its own."""
        if isinstance(self.model, FlatSAE):
            return dict.fromkeys(names, 1.0)
        rise = min(1.0, (self.updates + 1) / max(1, self.l1_warmup_steps))
        return stage.weights | {"l1": stage.weights["l1"] * rise}

    def _raw(
        self, x: Float[Tensor, "row d"], stage: Stage, dead: Dead, *, counted: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses of a batch; `counted`, its latents count as having fired."""
        if isinstance(self.model, FlatSAE):
            mask = dead.parents if dead.n_parents else None
            raw, codes = self.model.losses(x, mask, self.updates)
            if counted:
                self._fired((codes.detach() > 0).any(dim=0), len(x))
            return raw
        run = self.model.run(x)
        if counted:
            index, value = self.model.codes(run.found).latents()
            fired = torch.zeros(self.model.d_sae + 1, dtype=torch.bool, device=x.device)
            off = torch.full_like(index, self.model.d_sae)
            fired.index_fill_(0, torch.where(value > 0, index, off).flatten(), True)
            self._fired(fired[:-1], len(x))
        rows = self._some_parents(self.model.m)
        return losses(self.model, run, stage.enabled, dead=dead, sigma=self.sigma, rows=rows)

    def _some_parents(self, m: int) -> Tensor | None:
        """Parents that losses on the dictionary look at, where there are too many for all pairs."""
        if m <= ORTHO_ROWS:
            return None
        seed = (derive(self.task.seed, "order") + self.updates) % 2**63
        drawn = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
        return drawn[:ORTHO_ROWS].to(self.device, non_blocking=True)

    def _fired(self, fired: Tensor, n_tokens: int) -> None:
        self.quiet.add_(n_tokens).masked_fill_(fired, 0)

    def _dead(self) -> Dead:
        """Latents that have been quiet for too long; asked for once a chunk, for it waits."""
        silent = self.quiet > self.dead_after_tokens
        if isinstance(self.model, FlatSAE):
            n = int(silent.sum())
            return Dead(silent, silent[:0, None], n, 0)
        parents = silent[: self.model.m]
        children = silent[self.model.m :].view(self.model.m, -1) & ~parents[:, None]
        counts = torch.stack([parents.sum(), children.sum()]).tolist()
        return Dead(parents, children, *counts)

    def _note(self, x: Tensor, stage: Stage) -> None:
        """Keep each loss with its gradient, and how near atoms are to where they began."""
        about = {"step": self.updates, "stage": stage.name}
        found = self._gradients(x, stage)
        weights = self._weights(stage, found)
        for name, (value, norm) in found.items():
            self.curves += [
                about | {"name": name, "kind": kind, "value": number}
                for kind, number in (
                    ("raw", value), ("weighted", weights[name] * value), ("gradient_norm", norm),
                )
            ]  # fmt: skip
        if self.beginning is not None and isinstance(self.model, HierarchicalSAE):
            pairs = zip(
                ("parents", "children"),
                arms.cosines(self.model, self.beginning, self.metric),
                strict=True,
            )
            self.curves += [
                about | {"name": name, "kind": "cosine_to_start", "value": v} for name, v in pairs
            ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused AdamW; what stage A freezes is a group of its own."""
        frozen = self.stages[0].frozen
        own = dict(self.model.named_parameters())
        groups = [
            {"params": [t for n, t in own.items() if n not in frozen], "mult": 1.0},
            {"params": [t for n, t in own.items() if n in frozen], "mult": self.decoder_lr_mult},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr, betas=(0.9, 0.999), weight_decay=self.weight_decay, fused=True,
        )  # fmt: skip

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Stop once no further update is wanted; runs after all callbacks."""
        self.trainer.should_stop = self.is_finished

    @property
    def is_finished(self) -> bool:
        """Whether no further update is wanted."""
        return self.updates >= self.max_steps

    @property
    def last_step(self) -> int:
        """The update after which the run ends."""
        return self.max_steps

    # ------------------------------------------------------------------ survival

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what decides the rest of the run beside weights and optimiser."""
        checkpoint["hsae"] = {"updates": self.updates, "curves": list(self.curves)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where `on_save_checkpoint` left off."""
        self.updates = checkpoint["hsae"]["updates"]
        self.curves = list(checkpoint["hsae"]["curves"])
        self._entered = ""
