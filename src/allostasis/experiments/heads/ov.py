"""The LightningModule of `heads_ov`: what every head writes, as circuits and on a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt
from jaxtyping import Int

from allostasis.analysis import ov_tokens
from allostasis.core.progress import Ticker
from allostasis.engines import ov
from allostasis.engines.ov import Ends, HeadCircuit, HeadWrite
from allostasis.engines.suffix import sweep
from allostasis.engines.verify import kl_of_a_zeroed_layer
from allostasis.experiments.heads import choices, competence, ov_tables
from allostasis.experiments.heads.asked import Asked
from allostasis.experiments.heads.choices import Layers
from allostasis.experiments.heads.competence import Competence
from allostasis.experiments.heads.ov_tables import Report
from allostasis.experiments.heads.tables import readings
from allostasis.experiments.heads.vocabulary import Vocabulary
from allostasis.interventions.ablate import parse_heads
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.encoded import Encoded
from allostasis.tasks.probes.task import Probes

SPLITS = ("train", "test")
"""Heads are chosen on the first and measured on the second."""

SILENT = 3.0
"""Below this signal-to-noise ratio a head has no measurable direct effect."""


class HeadsOV(L.LightningModule):
    """Reports on what heads write: from weights alone, and on a corpus at the last token.

    Args:
        model: A language model.
        task: The corpus.
        layers: Whose heads: all, a list, or so many from the first to the last.
        heads: All of them, or a list such as ["0.2", "9.6"].
        reports: `circuit`, `write`, or both.
        top_k: Tokens at each end of a list.
        n_inputs: Words that the circuit's logits are averaged over.
        n_clustered: Tokens that are clustered: the most frequent in the lists.
        published: By model name, heads that the source documents name.

    Raises:
        ValueError: No report is asked for, or a layer or head that the model does not have.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: Probes,
        layers: Layers = "all",
        heads: Literal["all"] | list[str] = "all",
        reports: Sequence[Report] = ("circuit", "write"),
        top_k: Annotated[int, Ge(1)] = 50,
        n_inputs: Annotated[int, Gt(0)] = 1000,
        n_clustered: Annotated[int, Ge(3)] = 400,
        published: Mapping[str, list[str]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task, self.decoder = model, task, model.decoder
        if not reports:
            raise ValueError("module.reports is empty; take circuit, write, or both")
        self.heads = choices.heads(self.decoder, heads, layers)
        self.reports = tuple(dict.fromkeys(reports))
        self.n_inputs, self.n_clustered = n_inputs, n_clustered
        self.top_k = min(top_k, self.decoder.n_vocab)
        names = (published or {}).get(model.identity["name"], [])
        size = {"n_layers": self.decoder.n_layers, "n_heads": self.decoder.n_heads}
        self.published = set(parse_heads(names, **size))
        self.vocabulary = Vocabulary(model.tokenizer, self.decoder.n_vocab)
        self.workspace = Path()
        self.facts: dict[str, Any] = {}
        self._data: dict[str, Any] = {}
        self._summary: dict[str, Any] = {}

    def prove_effect(self) -> dict[str, float]:
        """Show that heads are where they are looked for: zeroing a layer's moves the logits.

        Raises:
            RuntimeError: Nothing moves.
        """
        return {"kl_of_a_zeroed_layer": kl_of_a_zeroed_layer(self.model)}

    @torch.no_grad()
    def test_step(self, batch: Probes, batch_idx: int) -> dict[str, Any]:
        """Both reports; gives the tables and documents that the run keeps."""
        del batch_idx
        corpus: Encoded = batch.build(self.model.encode, self.model.tokenizer)
        asked = {name: Asked(corpus, corpus.drawn(name), seed=self.task.seed) for name in SPLITS}
        self._tell(corpus, asked)
        ends = {
            name: ov.ends_of(self.decoder, some.rows, some.clusters) for name, some in asked.items()
        }
        found = self._look(ends)
        marked = min(found["train"], key=lambda one: one.delta)
        self._summary = {
            "heads": len(self.heads),
            "most_negative": f"{marked.layer}.{marked.head}",
            "delta_train": marked.delta,
            "silent": sum(one.snr < SILENT for one in found["test"]),
        }
        listed = {"circuit": found["circuit"], "write": found["test"]}
        return self._collect(
            {report: listed[report] for report in self.reports}, asked, ends, marked
        )

    def _look(self, ends: Mapping[str, Ends]) -> dict[str, list[Any]]:
        """Circuits, and writes by split, of all heads, layer by layer."""
        tick = Ticker(f"heads_ov {self.task.corpus} seed {self.task.seed}", noun="layers")
        found: dict[str, list[Any]] = {name: [] for name in ("circuit", *ends)}
        layers, inputs = sorted({layer for layer, _ in self.heads}), self._inputs()
        for done, layer in enumerate(layers):
            own = [head for at, head in self.heads if at == layer]
            if inputs is not None:
                found["circuit"] += ov.circuits(self.decoder, layer, own, inputs, top_k=self.top_k)
            for name, there in ends.items():
                found[name] += ov.writes(self.decoder, there, layer, own, top_k=self.top_k)
            tick(done + 1, len(layers))
        return found

    def _inputs(self) -> Int[torch.Tensor, " token"] | None:
        if "circuit" not in self.reports:
            return None
        chosen = self.vocabulary.inputs(self.n_inputs)
        self.facts["inputs"] = {"n": len(chosen), "rule": "words after a space, evenly spaced"}
        return torch.tensor(chosen, device=self.decoder.device)

    def _tell(self, corpus: Encoded, asked: Mapping[str, Asked]) -> None:
        self.facts |= {
            "model": {**self.model.identity, "title": self.model.title},
            "tokenizer": self.model.facts,
        }
        self._data = corpus.data() | {"measured": {name: len(asked[name]) for name in asked}}

    def _collect(
        self,
        listed: Mapping[Report, Sequence[HeadCircuit | HeadWrite]],
        asked: Mapping[str, Asked],
        ends: Mapping[str, Ends],
        marked: HeadWrite,
    ) -> dict[str, Any]:
        """Tables, and the reports as documents."""
        n: dict[Report, int] = {"write": len(asked["test"])}
        n["circuit"] = self.facts.get("inputs", {}).get("n", 0)
        name = self.model.identity["name"]
        tokens = pd.concat(
            ov_tables.tokens(report, found, self.vocabulary, name)
            for report, found in listed.items()
        )
        examples = [
            ov_tables.examples(
                asked[split], self._columns(ends[split]), self.heads, self._sets(marked)
            )
            for split in SPLITS
        ]
        rows = [
            row for report in listed for row in ov_tables.rows(report, listed[report], n[report])
        ]
        seen = self._competence(asked["test"])
        tables = {
            "metrics": pd.DataFrame([*rows, *seen.metric_rows()]),
            "baseline": seen.baseline,
            "ov_tokens": tokens.reset_index(drop=True),
            "ov_words": ov_tables.words(tokens),
            "ov_clusters": pd.concat(
                [self._clusters(report, rows) for report, rows in tokens.groupby("report")],
                ignore_index=True,
            ),
            "examples": pd.concat(examples).sort_values(
                ["intervention", "example"], ignore_index=True
            ),
        }
        documents = {
            f"ov_{'report' if report == 'write' else report}": {
                "model": self.model.title,
                "weights_sha256": self.model.identity["weights_sha256"],
                "report": report,
                "corpus": self.task.corpus if report == "write" else None,
                "data_hash": self._data["sha256"] if report == "write" else None,
                "samples": n[report],
                "top_k": self.top_k,
                "heads": ov_tables.listed(report, listed[report], self.vocabulary),
            }
            for report in listed
        }
        return {"tables": tables, "documents": documents}

    def _competence(self, asked: Asked) -> Competence:
        """What the untouched model can do."""
        swept = sweep(self.decoder, asked.rows, [])
        plain = readings(asked, [], swept, with_span=False)
        return competence.of(self.decoder, asked.corpus, plain)

    def _clusters(self, report: Any, tokens: pd.DataFrame) -> pd.DataFrame:
        """Clusters of a report's most frequent tokens, by their rows of the unembedding."""
        sizes = tokens["token_id"].value_counts()
        order = sorted(sizes.index, key=lambda index: (-sizes[index], index))
        ids = np.array(order[: self.n_clustered])
        columns = torch.tensor(ids, device=self.decoder.device)
        rows = self.decoder.W_U[:, columns].T.double().cpu().numpy()
        try:
            found = ov_tokens.cluster(rows)
        except ValueError as error:
            self.facts[f"clusters_{report}"] = str(error)
            return ov_tokens.no_clusters().assign(report=report)
        self.facts[f"clusters_{report}"] = {
            "tokens": len(ids), "of": len(sizes), "clusters": len(set(found.labels)),
            "threshold": found.threshold, "silhouette": found.silhouette,
        }  # fmt: skip
        return ov_tokens.cluster_table(tokens, ids, rows, found).assign(report=report)

    def _columns(self, ends: Ends) -> dict[str, np.ndarray]:
        """What each head adds at each prompt: to its answers, and to words of a lexicon.

        Such words are taken against all words of the vocabulary; `_rest` is the mean over the other
        heads.
        """
        weights = self.decoder.W_U
        read = {"target": weights[:, ends.target].T, "foil": weights[:, ends.foil].T}
        usual = weights[:, self.vocabulary.words].mean(dim=1)
        for name, lexicon in ov_tokens.LEXICONS.items():
            if chosen := self.vocabulary.lexicon(lexicon):
                shift = weights[:, chosen].mean(dim=1) - usual
                read[name] = shift.expand(len(ends.resid), -1)
        columns: dict[str, list[np.ndarray]] = {name: [] for name in read}
        for layer, head in self.heads:
            direct = ov.direct_write(self.decoder, ends, layer, head)
            for name, side in read.items():
                value = torch.linalg.vecdot(direct, side.float())
                columns[name].append(value.double().cpu().numpy())
        found = {name: np.stack(values) for name, values in columns.items()}
        found["delta"] = found["target"] - found["foil"]
        for name in ov_tokens.LEXICONS.keys() & found.keys():
            others = found[name].sum(axis=0) - found[name]
            found[f"{name}_rest"] = others / max(1, len(self.heads) - 1)
        return found

    def _sets(self, marked: HeadWrite) -> list[str]:
        """What claims call each head: as published, by what it does on train, or just `head`."""
        own = marked.layer, marked.head
        return [
            "published" if head in self.published else "writer" if head == own else "head"
            for head in self.heads
        ]

    def data(self) -> dict[str, Any]:
        """Hash and size of the corpus, and what was dropped."""
        return self._data

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        return self._summary
