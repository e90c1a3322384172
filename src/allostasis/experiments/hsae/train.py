"""The LightningModule of `hsae_train`: autoencoders that begin with concepts, or without them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from allostasis.core.records import RunRecord, write_table
from allostasis.core.spaces import CausalMetric, UnembVec, causal_metric
from allostasis.experiments.hsae import arms
from allostasis.experiments.hsae.carried import RidgeMap, ridge_map
from allostasis.experiments.hsae.clouds import kept_tokens, unembedding
from allostasis.experiments.hsae.scoring import Activations, Scoring, Split
from allostasis.experiments.hsae.stages import Losses, StageA, stages
from allostasis.experiments.hsae.training import Training
from allostasis.metrics.base import Snapshot
from allostasis.models.hsae import HierarchicalSAE, KernelChoice, check_flat
from allostasis.models.sae import FlatSAE, SyntheticModel, export
from allostasis.models.teacher import FILE, Teacher, read_teacher
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.activations import ActivationDataModule
from allostasis.tasks.concepts import Selection, read_table
from allostasis.tasks.harvest import UNEMBED_INPUT
from allostasis.tasks.planted_hierarchy import PlantedHierarchy

Kind = Literal["hsae", "topk", "batchtopk", "matryoshka"]
TEACHER = "hsae_teacher"


class HsaeTrain(Training):
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
        n_test: Rows of test; `dead_fraction` needs 100,000, a twentieth of 2 million in all.
        n_loss: Rows of test whose next token is predicted.
        chunk: Updates between two looks at which latents are dead.
        eval_every: Updates between evaluations; a multiple of `chunk`.
        log_grad_every: Updates between looks at each loss and its gradient; likewise.
        evaluate_at: Updates after which concepts are scored too, and weights kept; multiples of
            `eval_every`.
        allow_weak_map: Whether concepts may be carried to an earlier hook that tells less than half
            of the variance of what the unembedding reads.

    Raises:
        ConfigError: A stage enables a loss that can move nothing.
        UnsupportedExport: What is trained could not be written at the end.
        ValueError: Settings do not go together, or the task holds fewer batches than updates.
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
        allow_weak_map: bool = False,
    ) -> None:
        del selection  # of the run that is read
        if isinstance(task, PlantedHierarchy) and teacher != "causal":
            raise ValueError(
                f"{teacher=}: planted activations are taught by their true directions, so that "
                "this arm would be teacher_init; take a language model's activations"
            )
        staged = stage_a if kind == "hsae" and start != "random" else None
        super().__init__(
            task=task,
            stages=stages(losses or Losses(), staged, max_steps=max_steps),
            max_steps=max_steps,
            l1_warmup_steps=l1_warmup_steps,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            decoder_lr_mult=decoder_lr_mult,
            dead_after_tokens=dead_after_tokens,
            chunk=chunk,
            log_grad_every=log_grad_every,
            evaluate_at=evaluate_at,
        )
        self.start, self.noise_deg, self.eval_every = start, noise_deg, eval_every
        self.kind: Kind = kind
        self.match: arms.Match = match
        self.is_planted = isinstance(task, PlantedHierarchy)
        self.shape = {"m": m, "c": c, "s": s, "k": k, "k_child": k_child}
        self._check(reads, reads_of, teacher)
        language_model = model if isinstance(model, LanguageModel) else None
        if kind == "hsae":
            decoder = task if language_model is None else language_model.decoder
            check_flat(m * (1 + c), decoder.d_model)
        task.prepare(model)
        if isinstance(task, ActivationDataModule) and max_steps > task.n_batches:
            raise ValueError(
                f"module.max_steps={max_steps}: {task.n_train:,} rows of train hold "
                f"{task.n_batches:,} batches of {task.batch_size} in task.epochs={task.epochs}. "
                "Harvest more with task.n_tokens, or read them more often"
            )
        self.hook = task.hook
        self.model_name = self.hook if language_model is None else language_model.title
        self.scoring = Scoring(
            task, language_model, n_watch=n_watch, n_match=n_match, n_test=n_test, n_loss=n_loss
        )
        self.hold(self._made(kernel))
        self.teacher: Teacher | None = None
        self.teacher_arm = teacher
        self.n_random: int | None = None
        self.allow_weak_map = allow_weak_map
        self.map: RidgeMap | None = None
        self._latest: dict[tuple[str, str | None], float] = {}
        self.offers = frozenset({"coding", "decoder", "members", "matches"})
        self.offers |= {"truth"} if self.is_planted else set()
        self.offers |= set() if language_model is None else {"token_losses"}
        self.model.start_at(task.mean(), task.scale)
        if self.is_planted or start not in arms.TAUGHT:
            self._begin()

    def _check(
        self, reads: Sequence[str], reads_of: Mapping[str, str] | None, teacher: str
    ) -> None:
        for name, steps in (
            ("eval_every", self.eval_every),
            ("log_grad_every", self.log_grad_every),
            ("max_steps", self.max_steps),
            ("stage_a.steps", self.stages[0].end),
        ):
            if steps % self.chunk:
                raise ValueError(f"{name}={steps} is no multiple of chunk={self.chunk}")
        for step in self.evaluate_at:
            if step % self.eval_every or not 0 < step <= self.max_steps:
                raise ValueError(
                    f"module.evaluate_at={list(self.evaluate_at)}: nothing is evaluated at {step}, "
                    f"only at multiples of eval_every={self.eval_every} up to "
                    f"max_steps={self.max_steps}; name some of those, or none with []"
                )
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
        if reads_of and reads_of[TEACHER] != teacher:
            raise ValueError(
                f"module.teacher={teacher}, and the run that is read is {reads_of[TEACHER]}'s; set "
                "module.teacher alone"
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
            self.metric = self._metric(self.teacher)
            facts["teacher"] = {
                "parents": len(self.teacher.synsets), "children": int(self.teacher.mask.sum()),
            }  # fmt: skip
            if self.kind == "hsae" and self.hook != UNEMBED_INPUT:
                self.map = self._map()
                self.metric = self.map.metric(self.metric)
                facts["map"] = {"r2": self.map.r2, "penalty": self.map.penalty}
            self.sigma = self.metric.sigma.float().to(self.device)
        arm = next((record for name, record in earlier.items() if name != TEACHER), None)
        if arm is not None and self.kind != "hsae":
            l0 = float(arm.run["summary"]["l0"])
            self.hold(self._flat(l0).to(self.device))
            self.model.start_at(self.task.mean().to(self.device), self.task.scale)
            facts["matched"] = {"l0": l0, "d_sae": self.model.d_sae}
        if self.beginning is None and self.start != "random":
            self._begin()
        facts["random_slots"] = self.n_random
        return facts

    def _metric(self, teacher: Teacher) -> CausalMetric:
        """The causal inner product, in which losses and curves are of every arm alike."""
        model = self.scoring.model
        if self.teacher_arm != "euclidean" or model is None:
            return teacher.metric  # that of shuffled rows is the model's own, too
        return causal_metric(UnembVec(unembedding(model)[torch.from_numpy(kept_tokens(model))]))

    def _map(self) -> RidgeMap:
        """The map from the task's hook to what the unembedding reads, from its own rows."""
        assert isinstance(self.task, ActivationDataModule)
        sizes: dict[Split, int] = {"train": self.scoring.n_match, "test": self.scoring.n_test}
        train, test = (
            (self.task.split(split, n).x, self.task.unembed_input(split, n))
            for split, n in sizes.items()
        )
        found = ridge_map(train, test)
        found.check(self.hook, allow_weak=self.allow_weak_map)
        return found

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
            if self.map is not None:
                self.beginning = self.map.back(self.beginning)
        start = self.beginning
        device = self.model.D.device
        self.n_random = self.model.plant(
            start.parents.to(device), start.children.to(device), start.mask.to(device),
            is_turned=self.start != "random_projectors",
        )  # fmt: skip

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the readings that the summary tells."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hsae"]["latest"] = dict(self._latest)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where `on_save_checkpoint` left off."""
        super().on_load_checkpoint(checkpoint)
        self._latest = dict(checkpoint["hsae"]["latest"])

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
        """Write the curves, matches, latents, and the autoencoder in SAELens's layout."""
        folder = Path(self.trainer.default_root_dir)
        run_id = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run_id"]
        tables = {
            "training": pd.DataFrame(self.curves),
            "matches": self._match_table(),
            "latents": self.scoring.latents(self.model),
        }
        for name, frame in tables.items():
            table = pa.Table.from_pandas(frame.assign(run_id=run_id), preserve_index=False)
            write_table(folder / f"{name}.parquet", table, table.schema, nullable=True)
        self.write_sae(folder / "sae", run_id)

    def write_sae(self, folder: Path, run_id: str) -> None:
        """Write the autoencoder in SAELens's layout, with the hook that it is for."""
        export(
            self.model, folder, hook_name=self.hook, model_name=self.model_name, run_id=run_id
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
