"""The LightningModule of `hsae_teacher`: concept vectors, and what noise cannot give of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from allostasis.core import wordnet
from allostasis.core.progress import Ticker
from allostasis.core.records import write_atomically
from allostasis.core.seeding import derive
from allostasis.core.spaces import CausalMetric, Metric, Shrinkage, UnembVec, causal_metric
from allostasis.experiments.hsae import shifts, teacher_tables
from allostasis.experiments.hsae.clouds import Control, Placed, cloud, kept_tokens, unembedding
from allostasis.experiments.hsae.geometry import HELD_OUT, Geometry, Precision
from allostasis.models import concept_directions as directions
from allostasis.models.concept_directions import Estimator
from allostasis.models.teacher import FILE, Teacher, write_teacher
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.concepts import Chosen, Concepts, ConceptTable, Selection, choose

Arm = Literal["none", "shuffled", "gaussian", "random_parent"]
CONTROLS: tuple[Control, ...] = ("shuffled", "gaussian", "permuted", "euclidean")
SHARE = 0.7  # of a concept's tokens, where child and parent are drawn apart


class HSAETeacher(L.LightningModule):
    """Concept vectors of a language model's unembedding, tested, and written for later phases.

    Args:
        model: A language model.
        task: Which nouns are members of what, and which are held out.
        control: What stands in the rows' place, or in the parents'; `none` leaves both.
        metric: The inner product; every vector is estimated under it.
        shrinkage: Of the rows' covariance, see `spaces.causal_metric`.
        estimator: Of a concept's vector.
        controls: Beside the arm's own rows.
        selection: Which concepts the teacher has; null for none, and no interventions.
        alphas: Doses in vectors.
        gains: Doses by mean gain of held-out members' log probability, nats.
        n_contexts: Passages at whose last token logits are read.
        n_boot: Resamples of lemmas and of subtrees.
        n_perm: Permutations of labels.
        n_partitions: Partitions of lemmas into folds.
        n_background: Tokens that held-out members are told from.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: Concepts,
        control: Arm = "none",
        metric: Metric = "causal",
        shrinkage: Annotated[float, Ge(0), Lt(1)] | Literal["auto", "ledoit_wolf"] = "auto",
        estimator: Estimator = "lda",
        controls: Sequence[Control] = CONTROLS,
        selection: Selection | None = None,
        alphas: Sequence[Annotated[float, Gt(0)]] = (0.5, 1.0, 2.0),
        gains: Sequence[Annotated[float, Gt(0)]] = (0.5, 1.0, 2.0),
        n_contexts: Annotated[int, Ge(1)] = 64,
        n_boot: Annotated[int, Ge(100), Le(100_000)] = 2000,
        n_perm: Annotated[int, Ge(100)] = 1000,
        n_partitions: Annotated[int, Ge(1)] = 20,
        n_background: Annotated[int, Ge(100)] = 50_000,
    ) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.control: Arm = control
        self.metric: Metric = metric
        self.estimator: Estimator = estimator
        self.shrinkage: Shrinkage = shrinkage
        self.controls: tuple[Control, ...] = tuple(controls)
        self.selection = selection
        self.alphas, self.gains, self.n_contexts = tuple(alphas), tuple(gains), n_contexts
        self.precision = Precision(
            n_boot=n_boot, n_perm=n_perm, n_partitions=n_partitions, n_background=n_background
        )
        self.kept = kept_tokens(model)
        self.workspace = Path()
        self.facts: dict[str, Any] = {}
        self._data: dict[str, Any] = {}
        self._summary: dict[str, Any] = {}
        self._space: CausalMetric | None = None

    # ------------------------------------------------------------------ the run

    def prove_effect(self) -> dict[str, float]:
        """Show that adding at what the unembedding reads changes logits by exactly the sum.

        Raises:
            RuntimeError: Nothing changes, or something else.
        """
        return shifts.exactness(self.model, shifts.proof_direction(self.space))

    @property
    def space(self) -> CausalMetric:
        """The metric of the model's rows."""
        if self._space is None:
            rows = UnembVec(self.raw[torch.from_numpy(self.kept)])
            self._space = causal_metric(rows, metric=self.metric, shrinkage=self.shrinkage)
        return self._space

    @property
    def raw(self) -> Tensor:
        """Rows of the unembedding, by token."""
        return unembedding(self.model)

    def _rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng([derive(self.task.seed, "control"), *what.encode()])

    @torch.no_grad()
    def test_step(self, batch: Concepts, batch_idx: int) -> dict[str, Any]:
        """Everything; gives the tables that the run keeps, and writes the teacher."""
        del batch_idx
        digest = self.model.identity["tokenizer_sha256"]
        table = batch.build(self.model.tokenizer, tokenizer_sha256=digest)
        self._tell(table)
        size = min(self.precision.n_background, len(self.kept))
        background = np.sort(self._rng("background").choice(self.kept, size, replace=False))
        tick = Ticker(f"hsae_teacher {self.control} {self.metric} seed {self.task.seed}",
                      noun="clouds")  # fmt: skip
        there: list[Control] = [one for one in self.controls if one != self.metric]
        names: list[Control | Literal["own"]] = ["own", *there]
        measured: dict[str, teacher_tables.Measured] = {}
        for done, name in enumerate(names):
            placed = self._placed(table, background, None if name == "own" else name)
            pairs = self._parents(table) if self.control == "random_parent" else None
            geometry = self._geometry(placed, name, pairs)
            deranged = self._geometry(placed, "random", self._parents(table))
            measured[name] = teacher_tables.measure(
                geometry, deranged=deranged if name == "gaussian" else None, share=SHARE
            )
            if name == "own":
                measured["random_parent"] = teacher_tables.measure_pairs(deranged)
            tick(done + 1, len(names))
        rows = teacher_tables.Collected(table, measured, self.precision, self._rng("bootstrap"))
        tables = rows.tables()
        if self.selection is not None:
            tables |= self._teach(batch, self.selection, background, rows)
        self._summary = rows.summary()
        tables["metrics"] = pd.DataFrame(rows.readings)
        tables["examples"] = rows.examples()
        return {"tables": tables}

    def _tell(self, table: ConceptTable) -> None:
        self.facts |= {
            "model": {**self.model.identity, "title": self.model.title},
            "tokenizer": self.model.facts,
            "geometry": {
                "metric": self.metric, "control": self.control, "shrinkage": self.space.shrinkage,
                "condition_of_sigma": self.space.condition,
                "mean_variance": float(self.space.sigma.diagonal().mean()),
                "tokens": len(self.kept),
                "tokens_left_out": self.model.decoder.n_vocab - len(self.kept),
            },
        }  # fmt: skip
        self._data = {"sha256": wordnet.SHA256, **table.facts}

    def _placed(self, table: ConceptTable, background: np.ndarray, name: Control | None) -> Placed:
        """The table's tokens in the arm's own cloud, or in a control of the model's rows."""
        own: Control | None = self.control if self.control in ("shuffled", "gaussian") else None
        control = own if name is None else name
        made = cloud(
            self.raw, self.space, self.kept, background, control=control,
            nouns=np.unique(table.tokens["token_id"].to_numpy()), rng=self._rng(name or "own"),
        )  # fmt: skip
        return Placed.of(table, made)

    def _parents(self, table: ConceptTable) -> dict[int, int]:
        """For each child a parent of another subtree."""
        children = [int(child) for child in table.edges["child"]]
        parents = sorted({int(parent) for parent in table.edges["parent"]})
        roots = {synset: table.root(synset) for synset in table.names}
        return directions.derangement(children, parents, roots, self._rng("parents"))

    def _geometry(self, placed: Placed, name: str, pairs: dict[int, int] | None) -> Geometry:
        return Geometry(
            placed, estimator=self.estimator, precision=self.precision,
            rng=self._rng(f"geometry {name}"), parent_of=pairs,
        )  # fmt: skip

    # ------------------------------------------------------------------ the teacher

    def _teach(
        self,
        batch: Concepts,
        selection: Selection,
        background: np.ndarray,
        rows: teacher_tables.Collected,
    ) -> dict[str, pd.DataFrame]:
        """Write the teacher's vectors; tables of its concepts and of what adding them does."""
        table = batch.build(
            self.model.tokenizer,
            tokenizer_sha256=self.model.identity["tokenizer_sha256"],
            min_lemmas=selection.min_lemmas,
        )
        chosen = choose(table, wordnet.nouns(), selection)
        placed = self._placed(table, background, None)
        parents = [self._estimate(placed, table.ids(one.parent, "train")) for one in chosen]
        if self.control == "random_parent":
            parents = parents[1:] + parents[:1]
        folder = self.workspace.parent
        write_teacher(folder / FILE, self._teacher(placed, chosen, parents))
        write_atomically(
            folder / "concepts.json",
            lambda path: path.write_text(json.dumps(table.facts, indent=2) + "\n", "utf-8"),
        )
        doses = self._shift(table, chosen, parents)
        rows.add_doses(doses, table)
        self.facts["teacher"] = {
            "parents": [table.names[one.parent] for one in chosen],
            "children": [[table.names[child] for child in one.children] for one in chosen],
        }
        return {"concepts": table.tokens, "doses": doses}

    def _estimate(self, placed: Placed, ids: np.ndarray) -> Tensor:
        return directions.vector(placed.at(ids), self.estimator)

    def _teacher(self, placed: Placed, chosen: Sequence[Chosen], parents: list[Tensor]) -> Teacher:
        width, most = len(self.space.mean), max(len(one.children) for one in chosen)
        deltas = torch.zeros(len(chosen), most, width, dtype=torch.float64)
        mask = torch.zeros(len(chosen), most, dtype=torch.bool)
        for row, one in enumerate(chosen):
            for slot, ids in enumerate(one.own):
                deltas[row, slot] = self._estimate(placed, ids) - parents[row]
                mask[row, slot] = True
        return Teacher(
            parents=self.space.from_white(torch.stack(parents)),
            deltas=self.space.from_white(deltas),
            mask=mask,
            synsets=tuple(one.parent for one in chosen),
            child_synsets=tuple(one.children for one in chosen),
            metric=self.space,
            tokenizer_sha256=self.model.identity["tokenizer_sha256"],
            weights_sha256=self.model.identity["weights_sha256"],
        )

    def _shift(
        self, table: ConceptTable, chosen: Sequence[Chosen], parents: list[Tensor]
    ) -> pd.DataFrame:
        """What adding each parent's vector does to the logits of its held-out members."""
        resid = shifts.contexts(self.model, self.n_contexts)
        there = shifts.Shifts(self.model, self.space, resid, self.kept)
        held_out = {one.parent: table.ids(one.parent, *HELD_OUT) for one in chosen}
        tick = Ticker(f"hsae_teacher {self.control} seed {self.task.seed}", noun="concepts added")
        found: list[pd.DataFrame] = []
        for done, (one, vector) in enumerate(zip(chosen, parents, strict=True)):
            own = table.ids(one.parent)
            others = np.unique(np.concatenate([v for k, v in held_out.items() if k != one.parent]))
            concept = shifts.Concept(
                synset=one.parent, cluster=table.root(one.parent), vector=vector,
                targets=held_out[one.parent], members=own, siblings=np.setdiff1d(others, own),
            )  # fmt: skip
            found.append(
                there.measure(
                    concept, alphas=self.alphas, gains=self.gains, rng=self._rng(str(one.parent))
                )
            )
            tick(done + 1, len(chosen))
        return pd.concat(found, ignore_index=True)

    # ------------------------------------------------------------------ what run.json says

    def data(self) -> dict[str, Any]:
        """The table's hash, counts, and what was dropped."""
        return self._data

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        return self._summary
