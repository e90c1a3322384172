"""The LightningModule of `heads_pairs`: sets of heads against every other set of their size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Le

from allostasis.analysis import impact, lattice
from allostasis.analysis.ablations import ratio_interval
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.lattice import Head, Set
from allostasis.core.records import RunRecord
from allostasis.experiments.heads import calibration, competence, tables
from allostasis.experiments.heads.lab import (
    SPLITS,
    Ablation,
    Engine,
    HeadLab,
    Keep,
    Layers,
    Span,
    Verify,
)
from allostasis.experiments.heads.tables import Planned, Readings
from allostasis.interventions.ablate import parse_heads
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.task import Probes

KINDS = {1: "head", 2: "pair", 3: "triple"}
CERTAIN = 2.0  # standard errors that a denominator has to be away from 0


class HeadsPairs(HeadLab):
    """Sets of heads taken away together: interactions, exact nulls, what restoring one brings back.

    Args:
        model: A language model.
        task: The corpus.
        sets: `lattice`: all heads, pairs and triples of each layer; `pairs`: of the heads that
            `top_k_from` or `members` names; `triples`: triples of them, with their pairs;
            `explicit`: the sets in `members`, with all that lies in them.
        layers: Whose lattices.
        largest: Heads of a lattice's largest sets.
        members: Sets of heads, such as [["0.2", "0.4"]]; they may lie in several layers.
        named: By model name, the set that the literature names; elsewhere the `k` heads of largest
            effect on train are named.
        top_k_from: Experiment whose finished run chooses the heads, on train: `heads_zero`.
        k: How many heads are chosen.
        ablation: What stands in the heads' place.
        n_donors: Prompts that a `resample` averages over.
        positions: Which tokens are changed.
        span: Which readouts of answers of several tokens.
        trajectory: Whether to read the path of the residual stream over tokens.
        keep_examples: Interventions whose single examples are kept.
        engine: How the sweep is computed.
        verify: What of it is re-checked.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: Probes,
        sets: Literal["lattice", "pairs", "triples", "explicit"] = "lattice",
        layers: Layers = 1,
        largest: Annotated[int, Ge(1), Le(3)] = 3,
        members: list[list[str]] | None = None,
        named: Mapping[str, list[str]] | None = None,
        top_k_from: Literal["heads_zero"] | None = None,
        k: Annotated[int, Ge(2)] = 3,
        ablation: Ablation = "zero",
        n_donors: Annotated[int, Ge(1)] = 4,
        positions: Literal["all", "last"] | list[int] = "all",
        span: Sequence[Span] = ("first_token", "full_span"),
        trajectory: bool = False,
        keep_examples: Keep = "all",
        engine: Engine | None = None,
        verify: Verify | None = None,
    ) -> None:
        super().__init__(
            model=model, task=task, name="heads_pairs", span=span, positions=positions,
            trajectory=trajectory, keep_examples=keep_examples, engine=engine, verify=verify,
        )  # fmt: skip
        self.sets, self.k, self.n_donors = sets, k, n_donors
        self.ablation: Ablation = ablation
        self.layers, self.largest = self.chosen_layers(layers), largest
        self.members = [self._parse(names) for names in members or []]
        known = (named or {}).get(str(model.identity["name"]))
        self.known = None if known is None else self._parse(known)
        self.top: list[Head] = []
        self.top_k_from = top_k_from
        if sets == "explicit" and not self.members:
            raise ValueError("module.sets=explicit takes away the sets in module.members; name one")
        if sets in ("pairs", "triples") and not (self.members or top_k_from):
            raise ValueError(
                f"module.sets={sets} combines heads that are given: by "
                "module.top_k_from=heads_zero, or by module.members=[[HEAD, HEAD, ...]]"
            )

    def _parse(self, names: Sequence[str]) -> Set:
        found = parse_heads(names, n_layers=self.decoder.n_layers, n_heads=self.decoder.n_heads)
        return tuple(sorted(set(found)))

    def take(self, earlier: Mapping[str, RunRecord]) -> dict[str, Any]:
        """Take from a finished run the heads of largest effect above 0, on its train split.

        Raises:
            ValueError: That run has fewer than two suppressors.
        """
        (record,) = earlier.values()
        rows = record.units
        rows = rows[(rows["metric"] == "logit_diff") & (rows["split"] == "train")]
        rows = rows[rows["head"].notna() & (rows["delta"] > 0)]
        best = rows.nlargest(self.k, "delta")
        self.top = [(int(a), int(b)) for a, b in zip(best["layer"], best["head"], strict=True)]
        if len(self.top) < 2:
            raise ValueError(
                f"{record.folder}: {len(self.top)} heads suppress on train, and a pair takes two"
            )
        return {"chosen_from": record.run["run_id"]}

    # ------------------------------------------------------------------ the run

    def plan(self) -> list[Planned]:
        """The sets and all that lies in them, each once."""
        wanted: dict[Set, None] = {}
        for heads in self._wanted():
            wanted.update(dict.fromkeys(lattice.parts_of(heads)))
        return [
            planned
            for heads in sorted(wanted, key=lambda some: (min(some), len(some), some))
            for planned in Planned.of(
                self.units_of(heads, self.ablation, n_donors=self.n_donors),
                set=KINDS.get(len(heads), f"set of {len(heads)}"),
                ablation=self.ablation,
            )
        ]

    def _wanted(self) -> Iterator[Set]:
        if self.sets == "lattice":
            for layer in self.layers:
                heads = [(layer, head) for head in range(self.decoder.n_heads)]
                yield from lattice.lattice(heads, sizes=range(1, self.largest + 1))
        elif self.sets == "explicit":
            yield from self.members
        else:
            size = 2 if self.sets == "pairs" else 3
            for pool in self.members or [tuple(sorted(self.top))]:
                yield from itertools.combinations(pool, size)
        if self.known is not None:
            yield self.known

    def read(self, readings: Readings) -> dict[str, pd.DataFrame]:
        """Tables of the run: effects, interactions, exact ranks, recoveries."""
        splits = {split: readings.asked.at(split) for split in SPLITS}
        seen = competence.of(self.decoder, self.corpus, readings)
        splits["test_competent"] = seen.rows(readings, splits["test"])
        rows = [*tables.metric_rows(readings, splits), *seen.metric_rows()]
        rows += calibration.metric_rows(readings, splits, seed=self.task.seed)
        rows += self._interactions(readings, splits)
        rows += self._ranks(readings, splits)
        made = {"metrics": pd.DataFrame(rows), "baseline": seen.baseline} | self.records(readings)
        restored = self._recoveries(readings)
        if len(restored) and "examples" in made:
            made["examples"] = pd.concat([made["examples"], restored], ignore_index=True)
        self._summarise(readings)
        return made

    def _effects(self, readings: Readings) -> dict[Set, np.ndarray]:
        """v(S) of every example."""
        return {
            _heads(each): effect
            for each, effect in zip(readings.interventions, readings.effect, strict=True)
        }

    def _named(self, readings: Readings) -> Set | None:
        """The set that figures mark: the literature's, or the heads of largest effect on train."""
        v = self._effects(readings)
        if self.known is not None:
            return self.known if self.known in v else None
        at = readings.asked.at("train")
        singles = [heads for heads in v if len(heads) == 1]
        best = sorted(singles, key=lambda heads: -v[heads][at].mean())[: self.k]
        chosen = tuple(sorted(head for (head,) in best))
        return chosen if chosen in v else None

    def _interactions(
        self, readings: Readings, splits: Mapping[str, np.ndarray]
    ) -> Iterator[dict[str, Any]]:
        v = self._effects(readings)
        several = [each for each in readings.interventions if len(each.unit.members) > 1]
        if not several:
            return
        every = np.stack([lattice.interaction(v, _heads(each)) for each in several])
        apart = np.stack([sum(v[(head,)] for head in _heads(each)) for each in several])
        whole = np.stack([v[_heads(each)] for each in several])
        for split, at in splits.items():
            if not len(at):
                continue
            clusters = readings.clusters(at)
            low, high = impact.intervals(impact.clustered(every[:, at], clusters))
            base = {"symbol": "Psi", "split": split, "n": len(at)}
            for index, each in enumerate(several):
                where = base | tables.place(each)
                yield where | {
                    "metric": "interaction", "unit": "logit",
                    "value": float(every[index, at].mean()),
                    "ci_low": low[index], "ci_high": high[index],
                }  # fmt: skip
                ratio = _ratio(whole[index, at], apart[index, at], clusters)
                if ratio is not None:
                    yield where | {"metric": "super_additivity", "unit": "1"} | ratio

    def _ranks(
        self, readings: Readings, splits: Mapping[str, np.ndarray]
    ) -> Iterator[dict[str, Any]]:
        """Exact p of every set among all of its size in its layer: whole lattices alone have it."""
        if self.sets != "lattice":
            return
        v = self._effects(readings)
        complete = [heads for heads in v if {at for at, _ in heads} <= {*self.layers}]
        for split, at in splits.items():
            if not len(at):
                continue
            means = {heads: float(v[heads][at].mean()) for heads in complete}
            base = {"symbol": "Psi", "unit": "1", "split": split, "n": len(at)}
            for each in readings.interventions:
                heads = _heads(each)
                if heads not in means or len({at for at, _ in heads}) > 1 or len(heads) > 3:
                    continue
                null = [means[other] for other in lattice.null_of(heads, complete)]
                p = lattice.rank(means[heads], null)
                yield base | tables.place(each) | {
                    "metric": "effect.null_p", "value": p, "n_unique": len(null),
                }  # fmt: skip

    def _recoveries(self, readings: Readings) -> pd.DataFrame:
        """Rows of examples.parquet: the named set taken away and one of its heads put back.

        Read from the set less that head; `ld_set` is with the whole set taken away.
        """
        named, v = self._named(readings), self._effects(readings)
        if named is None or len(named) < 2 or len({layer for layer, _ in named}) > 1:
            return pd.DataFrame()
        at = {heads: index for index, heads in enumerate(v)}
        frames = []
        for head in named:
            rest = lattice.without(named, head)
            key = f"restore:{lattice.name_of((head,))}|{readings.keys[at[named]]}"
            rows = tables.examples(readings, [at[rest]], {})
            frames.append(rows.assign(
                intervention=key, set="restored", ld_set=readings.columns["ld"][at[named]],
            ))  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def mark(self, readings: Readings) -> dict[str, str]:
        """The set of chosen heads, and its pairs, which it may itself be: claims are about them."""
        named = self._named(readings)
        if named is None:
            return {}
        v = self._effects(readings)
        at = {heads: key for heads, key in zip(v, readings.keys, strict=True)}
        pairs = {at[part]: "named pair" for part in lattice.parts_of(named) if len(part) == 2}
        return {at[named]: "named"} | pairs

    def extra_columns(self, readings: Readings) -> dict[str, np.ndarray]:
        """What examples.parquet says of sets beside their readings: their interactions."""
        v = self._effects(readings)
        found = np.full(readings.effect.shape, np.nan)
        for index, each in enumerate(readings.interventions):
            if len(each.unit.members) > 1:
                found[index] = lattice.interaction(v, _heads(each))
        return {"interaction": found}

    def _summarise(self, readings: Readings) -> None:
        named = self._named(readings)
        at, v = readings.asked.at("test"), self._effects(readings)
        ld = readings.clean["ld"][at]
        self._summary = {"logit_diff": float(ld.mean()), "accuracy": float((ld > 0).mean())}
        if named is not None:
            self._summary |= {
                "named": lattice.name_of(named),
                "delta_test": float(v[named][at].mean()),
                "interaction_test": float(lattice.interaction(v, named)[at].mean()),
            }


def _heads(each: Planned) -> Set:
    return tuple(sorted((layer, head) for layer, head in each.unit.members if head is not None))


def _ratio(
    above: np.ndarray, below: np.ndarray, clusters: Sequence[str]
) -> dict[str, float] | None:
    """A set's effect over the sum of its heads' effects; None where it has no interval."""
    sums = impact.clustered(np.stack([above, below]), clusters).sums
    n = sums.shape[1]
    if n < 2 or abs(sums[1].mean()) <= CERTAIN * sums[1].std(ddof=1) / np.sqrt(n):
        return None
    try:
        limits = ratio_interval(sums[0], sums[1])
    except UndefinedError:
        return None
    if limits.low is None or limits.high is None:
        return None
    value = float(sums[0].sum() / sums[1].sum())
    return {"value": value, "ci_low": limits.low, "ci_high": limits.high}
