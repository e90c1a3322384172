"""The LightningModule of `hsae_train`: autoencoders that begin with concepts, or without them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import pandas as pd
import pyarrow as pa
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from allostasis.core.records import RunRecord, write_table
from allostasis.core.seeding import derive
from allostasis.experiments.hsae import arms
from allostasis.experiments.hsae.scoring import Activations, Scoring
from allostasis.experiments.hsae.stages import Losses, Stage, StageA, rate, stages
from allostasis.metrics.base import Snapshot
from allostasis.models.hsae import HierarchicalSAE, KernelChoice
from allostasis.models.hsae_losses import ORTHO_ROWS, ConfigError, Dead, losses, refusal
from allostasis.models.sae import FlatSAE, SyntheticModel, export
from allostasis.models.teacher import FILE, Teacher, read_teacher
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.concepts import Selection, read_table
from allostasis.tasks.planted_hierarchy import PlantedHierarchy

log = logging.getLogger(__name__)

Kind = Literal["hsae", "topk", "batchtopk", "matryoshka"]
TEACHER = "hsae_teacher"
AT_MINIMUM = 1e-12  # a loss this small may have no gradient
MAX_NORM = 1.0  # of the gradient


class HsaeTrain(L.LightningModule):
    """A sparse autoencoder of activations, from concept vectors or from other beginnings.

    Every arm reads the same rows in the same order, for the same number of updates, at the same
    rates and weights. One that begins with given atoms holds them fixed in stage A.

    Args:
        model: The language model, or what planted activations are drawn from.
        task: Its activations, or planted ones.
        kind: `hsae`, or a flat autoencoder of SAELens.
        start: Where the first atoms begin: `random`; `teacher`; `rotated`, the teacher under a
            random rotation of the whitened coordinates; `random_projectors`, the teacher with
            subspaces that know nothing of its children; `pca`; `kmeans`.
        teacher: Which arm of `hsae_teacher` concepts come from; its labels are all arms' alike.
        reads: Arms of the same seed that are read: a flat autoencoder takes its L0 from one.
        reads_of: Runs of other experiments that are read: `hsae_teacher`, for a language model.
        selection: How many concepts, for the teacher's run.
        noise_deg: Degrees by which a planted task's true directions are turned before they teach.
        m: Parents.
        c: Children of a parent.
        s: Width of a parent's subspace.
        k: Active parents of a token.
        k_child: Active children of a parent.
        kernel: See `HierarchicalSAE`.
        match: What a flat autoencoder's width makes equal.
        max_steps: Updates.
        losses: Weights of the losses.
        stage_a: The stage in which given atoms are frozen.
        l1_warmup_steps: Updates over which the weight of `l1` rises.
        lr: Learning rate.
        weight_decay: Decoupled decay.
        warmup_steps: Updates over which the rate rises.
        decoder_lr_mult: Factor on the rate of tensors that were frozen.
        dead_after_tokens: Tokens without firing after which a latent is dead.
        n_watch: Rows that are looked at on the way.
        n_match: Rows of train on which concepts are matched to latents.
        n_test: Rows of test.
        n_loss: Rows of test whose next token is predicted.
        chunk: Updates between two looks at which latents are dead.
        eval_every: Updates between evaluations; a multiple of `chunk`.
        log_grad_every: Updates between looks at each loss and its gradient; likewise.
        evaluate_at: Updates after which concepts are scored too, and weights kept.

    Raises:
        ConfigError: A stage enables a loss that can move nothing.
        ValueError: Settings do not go together.
    """

    hindsight: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        model: LanguageModel | SyntheticModel,
        task: Activations,
        kind: Kind = "hsae",
        start: arms.Start = "random",
        teacher: Literal["causal", "euclidean", "shuffled"] = "causal",
        reads: Sequence[str] = (),
        reads_of: Mapping[str, str] | None = None,
        selection: Selection | None = None,
        noise_deg: Annotated[float, Ge(0), Le(90)] = 0.0,
        m: Annotated[int, Gt(0)] = 16,
        c: Annotated[int, Gt(0)] = 8,
        s: Annotated[int, Gt(0)] = 32,
        k: Annotated[int, Gt(0)] = 1,
        k_child: Annotated[int, Ge(1)] = 1,
        kernel: KernelChoice = "auto",
        match: arms.Match = "params",
        max_steps: Annotated[int, Gt(0)] = 10_000,
        losses: Losses | None = None,
        stage_a: StageA | None = None,
        l1_warmup_steps: Annotated[int, Ge(0)] = 2000,
        lr: Annotated[float, Gt(0)] = 3e-4,
        weight_decay: Annotated[float, Ge(0)] = 1e-4,
        warmup_steps: Annotated[int, Ge(0)] = 1000,
        decoder_lr_mult: Annotated[float, Gt(0)] = 0.3,
        dead_after_tokens: Annotated[int, Gt(0)] = 1_000_000,
        n_watch: Annotated[int, Gt(1)] = 4096,
        n_match: Annotated[int, Gt(1)] = 32_768,
        n_test: Annotated[int, Gt(1)] = 32_768,
        n_loss: Annotated[int, Gt(1)] = 2048,
        chunk: Annotated[int, Gt(0)] = 10,
        eval_every: Annotated[int, Gt(0)] = 500,
        log_grad_every: Annotated[int, Gt(0)] = 100,
        evaluate_at: Sequence[int] = (),
    ) -> None:
        super().__init__()
        del selection  # of the run that is read
        if isinstance(task, PlantedHierarchy) and teacher != "causal":
            raise ValueError(
                f"{teacher=}: planted activations are taught by their true directions, so that "
                "this arm would be teacher_init; take a language model's activations"
            )
        self.automatic_optimization = False
        self.task, self.start = task, start
        self.kind: Kind = kind
        self.match: arms.Match = match
        self.is_planted = isinstance(task, PlantedHierarchy)
        self.max_steps, self.chunk, self.eval_every = max_steps, chunk, eval_every
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.l1_warmup_steps, self.decoder_lr_mult = l1_warmup_steps, decoder_lr_mult
        self.dead_after_tokens, self.log_grad_every = dead_after_tokens, log_grad_every
        self.noise_deg, self.evaluate_at = noise_deg, tuple(evaluate_at)
        self.shape = {"m": m, "c": c, "s": s, "k": k, "k_child": k_child}
        staged = stage_a if kind == "hsae" and start != "random" else None
        self.stages = stages(losses or Losses(), staged, max_steps=max_steps)
        self._check(reads, reads_of)
        task.prepare(model)
        language_model = model if isinstance(model, LanguageModel) else None
        self.hook = task.hook
        self.model_name = self.hook if language_model is None else language_model.title
        self.scoring = Scoring(
            task, language_model, n_watch=n_watch, n_match=n_match, n_test=n_test, n_loss=n_loss
        )
        self.model = self._made(kernel)
        self.register_buffer("quiet", torch.zeros(self.model.d_sae, dtype=torch.int64))
        self.sigma: Tensor | None = None
        self.beginning: arms.Directions | None = None
        self.teacher: Teacher | None = None
        self.n_random: int | None = None
        self.updates, self._entered = 0, ""
        self._latest: dict[tuple[str, str | None], float] = {}
        self._milestones: dict[int, dict[str, Tensor]] = {}
        self.curves: list[dict[str, Any]] = []
        self.offers = frozenset({"coding", "decoder", "members", "matches"})
        self.offers |= {"truth"} if self.is_planted else set()
        self.offers |= {"token_losses"} if self.hook == "unembed_input" else set()
        self.model.start_at(task.mean(), task.scale)
        if self.is_planted or start not in arms.TAUGHT:
            self._begin()

    def _check(self, reads: Sequence[str], reads_of: Mapping[str, str] | None) -> None:
        for name, steps in (
            ("eval_every", self.eval_every),
            ("log_grad_every", self.log_grad_every),
            ("max_steps", self.max_steps),
            ("stage_a.steps", self.stages[0].end),
        ):
            if steps % self.chunk:
                raise ValueError(f"{name}={steps} is no multiple of chunk={self.chunk}")
        if self.kind != "hsae" and not reads:
            raise ValueError(
                f"kind={self.kind} takes its L0 from a hierarchical arm; set reads=[baseline]"
            )
        if self.is_planted and reads_of:
            raise ValueError(
                "planted activations have a truth of their own and no language model to teach; "
                "set module.reads_of=null"
            )
        if not self.is_planted and TEACHER not in (reads_of or {}):
            raise ValueError(
                "concepts are read from a run of hsae_teacher; set module.reads_of={hsae_teacher: "
                "causal}"
            )
        if not self.is_planted and self.start in arms.TAUGHT:
            hook = self.task.hook
            if hook != "unembed_input":
                raise ValueError(
                    f"a teacher's vectors are directions of what the unembedding reads, not of "
                    f"{hook}; set task.hook=unembed_input"
                )

    def _made(self, kernel: KernelChoice) -> HierarchicalSAE | FlatSAE:
        if self.kind == "hsae":
            return HierarchicalSAE(
                seed=self.task.seed, d_model=self.task.d_model, kernel=kernel, **self.shape
            )
        return self._flat(float(self.shape["k"] * (1 + self.shape["k_child"])))

    def _flat(self, l0: float) -> FlatSAE:
        width = arms.flat_width(self.match, d=self.task.d_model, l0=l0, **self.shape)
        assert self.kind != "hsae"
        return FlatSAE(
            kind=self.kind, seed=self.task.seed, d_model=self.task.d_model, d_sae=width,
            k=min(l0, width),
        )  # fmt: skip

    # ------------------------------------------------------------------ beginnings

    def take(self, earlier: Mapping[str, RunRecord]) -> dict[str, Any]:
        """Take concepts from a teacher's run, and a flat autoencoder's L0 from another arm's.

        Returns:
            What run.json says of it.
        """
        facts: dict[str, Any] = {}
        if TEACHER in earlier:
            folder = earlier[TEACHER].folder
            self.teacher = read_teacher(folder / FILE)
            table = read_table(folder, tokenizer_sha256=self.teacher.tokenizer_sha256)
            self.scoring.use(table, self.teacher)
            self.sigma = self.teacher.metric.sigma.float().to(self.device)
            facts["teacher"] = {
                "parents": len(self.teacher.synsets), "children": int(self.teacher.mask.sum()),
            }  # fmt: skip
        arm = next((record for name, record in earlier.items() if name != TEACHER), None)
        if arm is not None and self.kind != "hsae":
            l0 = float(arm.run["summary"]["l0"])
            self.model = self._flat(l0).to(self.device)
            self.model.start_at(self.task.mean().to(self.device), self.task.scale)
            self.quiet = torch.zeros(self.model.d_sae, dtype=torch.int64, device=self.device)
            facts["matched"] = {"l0": l0, "d_sae": self.model.d_sae}
        if self.beginning is None and self.start != "random":
            self._begin()
        facts["random_slots"] = self.n_random
        return facts

    def _begin(self) -> None:
        """Plant the first atoms."""
        if not isinstance(self.model, HierarchicalSAE) or self.start == "random":
            return
        m, c = self.shape["m"], self.shape["c"]
        if self.start in ("pca", "kmeans"):
            x = self.task.split("train", 16_384).x
            self.beginning = (
                arms.of_pca(x, m=m, c=c)
                if self.start == "pca"
                else arms.of_kmeans(x, m=m, c=c, seed=self.task.seed)
            )
        elif isinstance(self.task, PlantedHierarchy):
            parents, children = self.task.directions(self.noise_deg)
            mask = torch.ones(children.shape[:2], dtype=torch.bool)
            self.beginning = arms.Directions(parents[:m], children[:m, :c], mask[:m, :c])
            if self.start == "rotated":
                self.beginning = arms.rotated(self.beginning, self.task.seed)
        else:
            assert self.teacher is not None
            seed = self.task.seed if self.start == "rotated" else None
            self.beginning = arms.of_teacher(self.teacher, m=m, c=c, seed=seed)
        start = self.beginning
        device = self.model.D.device
        self.n_random = self.model.plant(
            start.parents.to(device), start.children.to(device), start.mask.to(device),
            is_turned=self.start != "random_projectors",
        )  # fmt: skip

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

    # ------------------------------------------------------------------ training

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
        return losses(
            self.model, run, stage.enabled, dead=dead, sigma=self.sigma, rows=self._some_parents()
        )

    def _some_parents(self) -> Tensor | None:
        """Parents that losses on the dictionary look at, where there are too many for all pairs."""
        if self.shape["m"] <= ORTHO_ROWS:
            return None
        seed = (derive(self.task.seed, "order") + self.updates) % 2**63
        drawn = torch.randperm(self.shape["m"], generator=torch.Generator().manual_seed(seed))
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
            metric = None if self.teacher is None else self.teacher.metric
            pairs = zip(
                ("parents", "children"),
                arms.cosines(self.model, self.beginning, metric),
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

    # ------------------------------------------------------------------ what recorders see

    def probe_accuracy(self, *, is_followed: bool = False) -> float:
        """No accuracy: an autoencoder answers nothing, and is recorded every `sparse_every`."""
        del is_followed
        return 0.0

    def snapshots(self, hooks: Sequence[str], *, full: bool) -> Iterator[Snapshot]:
        """Rows of train and val; at the end, and where asked for, test rows and their concepts."""
        del hooks
        yield from self.scoring.watch(self.model, self.updates)
        if full and (self.is_finished or self.updates in self.evaluate_at):
            yield from self.scoring.whole(self.model, self.updates)

    def evaluated(self, readings: Mapping[tuple[str, str | None], float]) -> None:
        """Keep the readings for the summary."""
        self._latest = dict(readings)

    def milestones(self) -> dict[int, dict[str, Tensor]]:
        """Weights at `evaluate_at`, by step, each handed out once."""
        due, self._milestones = self._milestones, {}
        return due

    def hindsight_snapshots(self, weights: Mapping[str, Tensor], step: int) -> Iterator[Snapshot]:
        """None: nothing waits for the end."""
        del weights, step
        yield from ()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Held-out rows, for the table of single examples."""
        del batch, batch_idx
        return {"snapshot": next(iter(self.scoring.whole(self.model, self.updates)))}

    def on_test_end(self) -> None:
        """Write the curves, the matches and the autoencoder in SAELens's layout."""
        folder = Path(self.trainer.default_root_dir)
        run_id = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run_id"]
        tables = {"training": pd.DataFrame(self.curves), "matches": self._match_table()}
        for name, frame in tables.items():
            table = pa.Table.from_pandas(frame.assign(run_id=run_id), preserve_index=False)
            write_table(folder / f"{name}.parquet", table, table.schema, nullable=True)
        export(
            self.model, folder / "sae", hook_name=self.hook, model_name=self.model_name,
            run_id=run_id,
        )  # fmt: skip

    def _match_table(self) -> pd.DataFrame:
        matches = self.scoring.matches
        assert matches is not None
        return pd.DataFrame({
            "concept": list(self.scoring.names),
            "parent": matches.parent,
            "latent": matches.best,
            "latent_one_to_one": matches.latent,
            "auroc_train": matches.auroc,
        })

    def data(self) -> dict[str, Any]:
        """Which rows the run used."""
        return {"activations": self.task.facts()}

    def summary(self) -> dict[str, Any]:
        """The run in scalars: how sparse, how well, how large."""
        test = {metric: value for (metric, split), value in self._latest.items() if split == "test"}
        return {
            "steps": self.updates,
            "l0": test.get("l0"),
            "explained_variance": test.get("explained_variance"),
            "d_sae": self.model.d_sae,
            "n_parameters": sum(tensor.numel() for tensor in self.model.parameters()),
            "explained_variance_pca": self.scoring.pca(self.shape["m"]),
        }

    # ------------------------------------------------------------------ survival

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what decides the rest of the run beside weights and optimiser."""
        checkpoint["hsae"] = {"updates": self.updates, "curves": list(self.curves)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where `on_save_checkpoint` left off."""
        self.updates = checkpoint["hsae"]["updates"]
        self.curves = list(checkpoint["hsae"]["curves"])
        self._entered = ""
