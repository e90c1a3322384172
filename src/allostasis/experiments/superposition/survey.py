"""One model's heads: which are suppressors, and how much more they vary than the others."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.suppressors import Comparison, Detection, Energies, detect, reselected
from allostasis.core.progress import Ticker
from allostasis.core.records import write_atomically
from allostasis.core.seeding import derive
from allostasis.engines.subjects import Filling, Head, Subject, Value, filling
from allostasis.experiments.superposition.collected import Collected
from allostasis.interventions.ablate import Op, Unit
from allostasis.metrics.ablation_effect import ablation_effect
from allostasis.metrics.attention_entropy import attention_entropy
from allostasis.metrics.head_write_variance import class_variances, deviations
from allostasis.tasks.sequences import Sequences
from allostasis.tasks.splits import Split

Site = tuple[int, str]
StreamEnergies = dict[str, dict[Site, Float[np.ndarray, " sequence"]]]
OPS: Mapping[Value, Op] = {"zero": "scale", "mean": "mean", "resample": "resample"}
ROWS = 16
"""Sequences whose patterns and streams are held at once."""
PIECE = 32
"""Sequences after which a scan's effects are kept."""


@dataclass(frozen=True)
class Rule:
    """What counts as a suppressor, and how often things are resampled.

    Attributes:
        q: False discovery rate among all heads.
        min_effect: Least mean effect, in nats a token.
        draws: Resamples of an interval.
        outer: Resamples in which selection is repeated.
    """

    q: float = 0.05
    min_effect: float = 0.005
    draws: int = 2_000
    outer: int = 200


class Survey:
    """Effects on one split, variances on another, and their comparison.

    Args:
        subject: The model.
        splits: Sequences.
        heads: Which heads are looked at.
        seed: The run's seed.
        rule: What counts as a suppressor.
        keep: Where finished pieces of the scan over all heads lie, so that one that was cut short
            goes on; None keeps none.
    """

    def __init__(
        self,
        subject: Subject,
        splits: Mapping[Split, Sequences],
        heads: Sequence[Head],
        *,
        seed: int,
        rule: Rule,
        keep: Path | None = None,
    ) -> None:
        self.subject, self.splits, self.heads, self.rule = subject, splits, tuple(heads), rule
        self.keep = keep
        self.rng = np.random.default_rng(derive(seed, "bootstrap"))
        self.generator = torch.Generator().manual_seed(derive(seed, "donor"))

    # ------------------------------------------------------------------ what is computed

    @cached_property
    def reference(self) -> list[Tensor]:
        """Heads' values on the split that replacements come from, by layer."""
        return self.subject.z(self.splits["calibrate"].tokens)

    def filling(self, value: Value, split: Split) -> Filling:
        """What stands in the heads' place on a split."""
        return filling(value, self.reference, len(self.splits[split]), self.generator)

    @torch.no_grad()
    def effects(
        self, value: Value, split: Split, heads: Sequence[Head] | None = None
    ) -> Float[np.ndarray, "sequence head"]:
        """Loss clean - loss ablated of each sequence and head."""
        batch, chosen = self.splits[split], self.heads if heads is None else heads
        here, pieces = self.filling(value, split), []
        keep = self.keep if heads is None else None
        places = {
            begin: None if keep is None else keep / f"{value}-{split}-{begin}.npy"
            for begin in range(0, len(batch), PIECE)
        }
        there = {begin for begin, place in places.items() if place is not None and place.is_file()}
        lacking = sum(len(batch.tokens[b : b + PIECE]) for b in places if b not in there)
        say = self._ticker(f"{value} ablation of {len(chosen)} heads", lacking * len(chosen))
        for begin, place in places.items():
            if place is not None and begin in there:
                pieces.append(np.load(place))
                continue
            rows = slice(begin, begin + PIECE)
            part = batch.part(rows)
            ablated = self._ablated(part, chosen, here.rows(rows), say)
            effect = ablation_effect(self.subject.losses(part), ablated)
            pieces.append(effect.double().cpu().numpy().T)
            if place is not None:
                write_atomically(place, partial(_save, pieces[-1]), is_durable=False)
        return np.concatenate(pieces)

    def _ablated(
        self, part: Sequences, heads: Sequence[Head], here: Filling, say: Callable[[int], None]
    ) -> Float[Tensor, "head sequence"]:
        """Losses with each head ablated alone, a layer at a time: one may take half a minute."""
        found = []
        for _, some in itertools.groupby(heads, key=lambda head: head[0]):
            of_layer = list(some)
            found.append(self.subject.ablated_losses(part, of_layer, here))
            say(len(part) * len(of_layer))
        return torch.cat(found)

    def _ticker(self, name: str, planned: int) -> Callable[[int], None]:
        """Counts ablated sequences, where the scan is one that takes long."""
        if self.keep is None:
            return lambda _: None
        tick, done = Ticker(name, noun="ablated sequences"), 0

        def say(n: int) -> None:
            nonlocal done
            done += n
            tick(done, planned)

        return say

    def detect(self, effects: Float[np.ndarray, "sequence head"]) -> Detection:
        """The suppressors among all heads that were looked at."""
        rule = self.rule
        return detect(effects, self.rng, q=rule.q, min_effect=rule.min_effect)

    @cached_property
    @torch.no_grad()
    def values(self) -> list[Tensor]:
        """Heads' values on the split that results are read on, by layer."""
        return self.subject.z(self.splits["measure"].tokens)

    @cached_property
    def scopes(self) -> dict[str, int]:
        """First position of each reading of variances, by what its name ends in.

        A pretrained model's position 0 is left out of the main readings; those that end in
        `_with_first` have it.
        """
        return {"": self.subject.first} | ({"_with_first": 0} if self.subject.first else {})

    @cached_property
    def energies(self) -> dict[str, Energies]:
        """How far the heads' writes lie from their means, by scope."""
        return {scope: self._energies(first) for scope, first in self.scopes.items()}

    @torch.no_grad()
    def _energies(self, first: int) -> Energies:
        by_layer = {
            layer: deviations(self.values[layer][:, first:], self.subject.W_O(layer)).sum(dim=1)
            for layer in {layer for layer, _ in self.heads}
        }
        columns = [by_layer[layer][:, head].cpu().numpy() for layer, head in self.heads]
        n_sequences, n_positions = self.splits["measure"].tokens.shape
        tokens = np.full(n_sequences, float(n_positions - first))
        layers = np.array([layer for layer, _ in self.heads])
        return Energies(np.stack(columns, axis=1), tokens, layers)

    @torch.no_grad()
    def stream_energies(self, heads: Sequence[Head], value: Value | None) -> StreamEnergies:
        """Sum over tokens of ||r - mean r||^2 / d_model, by scope and site, of each sequence."""
        batch = self.splits["measure"]
        here = None if value is None else self.filling(value, "measure")
        sums: dict[tuple[str, Site], list[Tensor]] = {}
        squares: dict[tuple[str, Site], list[Tensor]] = {}
        for begin in range(0, len(batch), ROWS):
            rows = slice(begin, begin + ROWS)
            part = None if here is None else here.rows(rows)
            for site, stream in self.subject.streams(batch.part(rows), heads, part).items():
                for scope, first in self.scopes.items():
                    precise = stream[:, first:].double()
                    sums.setdefault((scope, site), []).append(precise.sum(dim=1))
                    squares.setdefault((scope, site), []).append(precise.square().sum(dim=(1, 2)))
        found: StreamEnergies = {scope: {} for scope in self.scopes}
        for scope, site in sums:
            total, square = torch.cat(sums[scope, site]), torch.cat(squares[scope, site])
            n = batch.tokens.shape[1] - self.scopes[scope]
            mean = total.sum(dim=0) / (n * len(total))
            off = square - 2 * total @ mean + n * mean.square().sum()
            found[scope][site] = (off / self.subject.d_model).cpu().numpy()
        return found

    # ------------------------------------------------------------------ what is recorded

    def record(self, values: Sequence[Value], found: Collected) -> dict[str, Any]:
        """Do everything for each ablation value; gives what run.json says of it."""
        self._record_heads(found)
        facts: dict[str, Any] = {}
        intact: StreamEnergies = {}
        for value in values:
            effects = self.effects(value, "select")
            seen = self.detect(effects)
            self._record_effects(value, effects, seen, found)
            facts[value] = self._facts(value, seen)
            try:
                compared = self.energies[""].compared(seen.selected)
            except UndefinedError as error:
                facts[value] |= {"undefined": str(error)}
                continue
            facts[value] |= self._record_ratio(value, effects, seen, compared, found)
            intact = intact or self.stream_energies([], None)
            self._record_streams(value, seen, intact, found)
        return facts

    def _chosen(self, seen: Detection) -> list[Head]:
        return [head for head, is_one in zip(self.heads, seen.selected, strict=True) if is_one]

    def _facts(self, value: Value, seen: Detection) -> dict[str, Any]:
        chosen = self._chosen(seen)
        again = {}
        if chosen:
            fresh = self.effects(value, "measure", chosen).mean(axis=0)
            again = {_name(h): float(e) for h, e in zip(chosen, fresh, strict=True)}
        heads = [
            {"head": _name(head), "effect": float(e), "p": float(p), "q": float(q),
             "selected": bool(s)}
            for head, e, p, q, s in zip(
                self.heads, seen.effect, seen.p, seen.q, seen.selected, strict=True
            )
        ]  # fmt: skip
        return {
            "granularity": "head", "component": "z", "value": value, "positions": "all",
            "direction": "the replacement is put into the intact model", "set": "each head alone",
            "n_heads": len(self.heads), "n_selected": seen.count,
            "selected": [_name(head) for head in chosen], "effect_on_measure": again,
            "heads": heads,
        }  # fmt: skip

    def _record_heads(self, found: Collected) -> None:
        """What every head is on the split that results are read on, whatever is selected."""
        for scope in self.scopes:
            self._record_variances(scope, found)
        batch, entropy = self.splits["measure"], self._entropies()
        for layer, head in self.heads:
            found.read(
                "attention_entropy.nats", float(entropy[layer][head]), layer=layer, head=head,
                split="measure", n=batch.n_tokens, symbol="G", unit="nat",
            )  # fmt: skip

    def _record_variances(self, scope: str, found: Collected) -> None:
        first, energies = self.scopes[scope], self.energies[scope]
        classes = self.splits["measure"].targets[:, first:].flatten()
        total = {"": "head_write_variance", "_with_first": "head_write_variance.with_first"}[scope]
        variances = dict(zip(self.heads, energies.variances, strict=True))
        for layer in sorted({layer for layer, _ in self.heads}):
            flat = self.values[layer][:, first:].flatten(0, 1)
            parts = class_variances(flat, self.subject.W_O(layer), classes)
            for head in [h for at, h in self.heads if at == layer]:
                at: dict[str, Any] = {"layer": layer, "head": head, "split": "measure"}
                at |= {"symbol": "sigma2", "unit": "resid^2", "n": len(classes)}
                found.read(total, variances[layer, head], **at)
                for part, value in parts.items():
                    found.read(f"head_write_variance.{part}{scope}", float(value[head]), **at)

    @torch.no_grad()
    def _entropies(self) -> Float[Tensor, "layer head"]:
        """Mean entropy of the heads' attention rows, in nats."""
        tokens = self.splits["measure"].tokens
        total = torch.zeros(self.subject.n_layers, self.subject.n_heads, dtype=torch.float64)
        for begin in range(0, len(tokens), ROWS):
            for layer, pattern in enumerate(self.subject.patterns(tokens[begin : begin + ROWS])):
                rows = attention_entropy(pattern.double()).mean(dim=-1).sum(dim=0)
                total[layer] += rows.cpu()
        return total / len(tokens)

    def _record_effects(
        self, value: Value, effects: np.ndarray, seen: Detection, found: Collected
    ) -> None:
        n = len(effects)
        clean = float(self.subject.losses(self.splits["select"]).mean())
        names = sequence_names(self.splits["select"])
        error = effects.std(axis=0, ddof=1) / np.sqrt(n)
        for index, (layer, head) in enumerate(self.heads):
            key = Unit(members=((layer, head),), op=OPS[value]).key
            at: dict[str, Any] = {"layer": layer, "head": head, "split": "select", "n": n}
            effect = float(seen.effect[index])
            found.read(
                "ablation_effect", effect, symbol="Psi", unit="nat", intervention=key,
                value_clean=clean, delta=-effect, ci_low=effect - 1.96 * error[index],
                ci_high=effect + 1.96 * error[index], **at,
            )  # fmt: skip
            for part, number in (("p", seen.p[index]), ("q", seen.q[index])):
                found.read(
                    f"ablation_effect.{part}", float(number), symbol="Psi", unit="1",
                    intervention=key, **at,
                )  # fmt: skip
            found.add({
                "example": range(n), "cluster": names, "split": "select", "ablation": value,
                "intervention": key, "set": "single", "layer": layer, "head": head,
                "effect": effects[:, index],
            })  # fmt: skip

    def _record_ratio(
        self,
        value: Value,
        effects: np.ndarray,
        seen: Detection,
        compared: Comparison,
        found: Collected,
    ) -> dict[str, Any]:
        """E1 with its interval, by layer and pooled, and selection repeated."""
        batch, rule = self.splits["measure"], self.rule
        interval = compared.interval(self.rng, draws=rule.draws)
        at = {"symbol": "sigma2", "unit": "1", "split": "measure", "n": len(batch)}
        name = f"head_write_variance.ratio_{value}"
        found.read(name, compared.ratio, interval=interval, **at)
        facts: dict[str, Any] = {"ratio": compared.ratio}
        if "_with_first" in self.scopes:
            with_first = self.energies["_with_first"].compared(seen.selected).ratio
            found.read(f"{name}_with_first", with_first, **at)
            facts["ratio_with_first"] = with_first
        for layer, ratio in zip(compared.layers, compared.by_layer, strict=True):
            found.read(f"head_write_variance.layer_ratio_{value}", ratio, layer=layer, **at)
        names = sequence_names(batch)
        for index, layer in enumerate(compared.layers):
            found.add({
                "example": range(len(batch)), "cluster": names, "split": "measure",
                "ablation": value, "intervention": f"{value}:suppressors", "set": "all",
                "layer": layer, "energy": compared.above[:, index],
                "energy_clean": compared.below[:, index],
            })  # fmt: skip
        try:
            again = reselected(
                effects, self.energies[""], self.rng, q=rule.q, min_effect=rule.min_effect,
                draws=rule.outer,
            )  # fmt: skip
        except UndefinedError as error:
            return facts | {"reselected": str(error)}
        return facts | {"reselected": vars(again)}

    def _record_streams(
        self,
        value: Value,
        seen: Detection,
        intact: StreamEnergies,
        found: Collected,
    ) -> None:
        """E2: variance of the residual stream with the suppressors ablated over intact."""
        chosen, batch = self._chosen(seen), self.splits["measure"]
        first = min(layer for layer, _ in chosen)
        ablated = self.stream_energies(chosen, value)
        at = {"symbol": "sigma2", "unit": "1", "split": "measure", "n": len(batch)}
        last = (self.subject.n_layers - 1, "post")
        for scope, energies in ablated.items():
            ratios = {site: e.sum() / intact[scope][site].sum() for site, e in energies.items()}
            for (layer, site), ratio in ratios.items():
                if layer >= first:
                    name = f"residual_variance.{site}_ratio_{value}{scope}"
                    found.read(name, ratio, layer=layer, **at)
            found.read(f"residual_variance.ratio_{value}{scope}", ratios[last], **at)
        found.add({
            "example": range(len(batch)), "cluster": sequence_names(batch), "split": "measure",
            "ablation": value, "intervention": f"{value}:suppressors", "set": "all",
            "stream": ablated[""][last], "stream_clean": intact[""][last],
        })  # fmt: skip


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def sequence_names(batch: Sequences) -> list[str]:
    """A name for each sequence: one cluster of tokens, the same wherever it occurs."""
    rows = batch.tokens.cpu().numpy().astype("<i8")
    return [f"sequence:{hashlib.sha256(row.tobytes()).hexdigest()[:12]}" for row in rows]


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"
