"""The tables of `hsae_teacher`: one row an edge and statistic, one row a unit for the claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from allostasis.experiments.hsae.geometry import Geometry, Precision
from allostasis.models import concept_directions as directions
from allostasis.tasks.concepts import ConceptTable

EXISTS = 1.0  # d' from which on held-out members are told from other tokens
PUBLISHED = 80.0  # degrees, that noise passes where vectors are normalised first
COSINE = 0.174  # of 80 degrees
LEAST_DEFINED = 0.5  # of the edges
CALIBRATED = 0.05  # cosine by which a simulated null may miss its closed form
MIN_SUBTREES = 10
LEVEL = 0.95
OWN = "own"
OF_EDGES = (
    "cosine", "angle", "published_angle", "lco", "lco_null", "n_rest", "norm_parent", "norm_child",
    "n_child", "n_parent", "num", "pp", "dd", "num_squared", "pp_low", "defined", "cross",
    "cross_squared", "independent", "independent_null", "random", "random_null", "null",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One cloud, measured.

    Attributes:
        edges: By child.
        existence: One row a concept.
        siblings: One row a relation of several concepts.
        families: One row a parent.
        pairs: Cosine of each two concepts.
        projections: Held-out tokens of two children along their parent and their difference.
    """

    edges: pd.DataFrame
    existence: pd.DataFrame = field(default_factory=pd.DataFrame)
    siblings: pd.DataFrame = field(default_factory=pd.DataFrame)
    families: pd.DataFrame = field(default_factory=pd.DataFrame)
    pairs: pd.DataFrame = field(default_factory=pd.DataFrame)
    projections: pd.DataFrame = field(default_factory=pd.DataFrame)


def measure(geometry: Geometry, *, deranged: Geometry | None, share: float) -> Measured:
    """Everything there is to ask of a cloud.

    Args:
        geometry: Its concepts.
        deranged: The same with parents of other subtrees, where rows are noise whose cosines have
            closed forms.
        share: Of a concept's tokens, where child and parent are drawn apart.
    """
    edges = _angles(geometry).join(geometry.leave_child_out()).join(geometry.disjoint())
    edges["published_angle"] = geometry.published()
    if deranged is not None:
        drawn = geometry.independent(share)
        edges["independent"], edges["independent_null"] = drawn["cosine"], drawn["null"]
        pairs = _angles(deranged)
        edges["random"], edges["random_null"] = pairs["cosine"], _null_of_pairs(pairs)
    return Measured(
        edges, geometry.existence(), geometry.siblings(), geometry.families(),
        geometry.pairs(), geometry.projections(),
    )  # fmt: skip


def measure_pairs(geometry: Geometry) -> Measured:
    """What there is to ask of children with parents that are not theirs."""
    edges = _angles(geometry).join(geometry.disjoint())
    edges["null"] = _null_of_pairs(edges)
    return Measured(edges)


def _null_of_pairs(edges: pd.DataFrame) -> pd.Series:
    """Cosine of child less parent with a parent that is orthogonal to the child."""
    lengths = edges["norm_child"].to_numpy(), edges["norm_parent"].to_numpy()
    return pd.Series(directions.null_random_parent(*lengths), index=edges.index)


def _angles(geometry: Geometry) -> pd.DataFrame:
    cosine = geometry.whole()
    edges = geometry.norms()
    edges["cosine"] = cosine
    edges["angle"] = np.degrees(np.arccos(cosine.clip(-1, 1)))
    return edges


Statistic = Callable[[np.ndarray], np.ndarray]


class Collected:
    """What was measured of a model's concepts, as tables, readings and a summary.

    Args:
        table: The concepts.
        measured: By cloud: `own`, its controls, and `random_parent`.
        precision: How often things are drawn.
        rng: Resamples subtrees.
    """

    def __init__(
        self,
        table: ConceptTable,
        measured: Mapping[str, Measured],
        precision: Precision,
        rng: np.random.Generator,
    ) -> None:
        self.table, self.measured, self.precision, self.rng = table, measured, precision, rng
        self.roots = {
            synset: f"{table.names[table.root(synset)]}.{table.root(synset)}"
            for synset in table.names
        }
        self.readings: list[dict[str, Any]] = []
        self._doses: pd.DataFrame | None = None
        self._facts: dict[str, Any] = {}
        for name, cloud in measured.items():
            self._read(name, cloud)
        self._compare()
        self._calibrate()

    # ------------------------------------------------------------------ readings

    def _add(
        self, metric: str, value: float, n: int, *, control: str = OWN, unit: str = "1",
        interval: tuple[float, float] | None = None, **columns: Any,
    ) -> None:  # fmt: skip
        """One row of metrics.parquet."""
        low, high = interval or (None, None)
        self.readings.append({
            "metric": metric, "symbol": "G", "unit": unit, "split": "all", "value": value, "n": n,
            "intervention": None if control == OWN else control, "ci_low": low, "ci_high": high,
            **columns,
        })  # fmt: skip

    def _mean(
        self, metric: str, values: pd.Series, clusters: pd.Series, *, control: str,
        statistic: Statistic | None = None, unit: str = "1",
    ) -> tuple[float, tuple[float, float] | None]:  # fmt: skip
        """A function of the mean over rows, with its interval over subtrees, as a reading."""
        there = values.dropna()
        if there.empty:
            return math.nan, None
        of = statistic or (lambda means: means)
        value = float(of(there.to_numpy(float).mean(keepdims=True))[0])
        sums = there.astype(float).groupby(clusters.loc[there.index]).agg(["sum", "count"])
        interval = None
        if len(sums) > 1:
            n = len(sums)
            draws = self.rng.multinomial(n, np.full(n, 1 / n), size=self.precision.n_boot)
            means = of(draws @ sums["sum"].to_numpy() / (draws @ sums["count"].to_numpy()))
            low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            interval = float(low), float(high)
        self._add(metric, value, len(there), control=control, unit=unit, interval=interval)
        return value, interval

    def _read(self, name: str, cloud: Measured) -> None:
        edges = cloud.edges
        clusters = pd.Series({child: self.roots[int(child)] for child in edges.index})
        self._add(
            "angle.median", float(edges["angle"].median()), len(edges), control=name, unit="deg"
        )
        off = (edges["angle"] - 90).abs()
        self._add("angle.off_median", float(off.median()), len(edges), control=name, unit="deg")
        if "published_angle" in edges:
            angles = edges["published_angle"]
            median, above = float(angles.median()), float((angles >= PUBLISHED).mean())
            self._add("published_angle.median", median, len(angles), control=name, unit="deg")
            self._add("published_angle.above_80", above, len(angles), control=name)
        self._mean("cosine.mean", edges["cosine"], clusters, control=name)
        defined = edges["defined"].astype(float)
        share, _ = self._mean("disjoint.defined", defined, clusters, control=name)
        rms = self._mean(
            "disjoint.rms", edges["cross_squared"], clusters, control=name,
            statistic=lambda means: np.sqrt(np.maximum(means, 0)),
        )  # fmt: skip
        self._mean("disjoint.cosine", edges["cross"], clusters, control=name)
        if name in (OWN, "random_parent"):
            self._facts |= {f"defined_{name}": share, f"rms_{name}": rms}
        if "lco" in edges:
            self._mean("lco.cosine", edges["lco"], clusters, control=name)
        if not cloud.existence.empty:
            found = cloud.existence.set_index("synset")
            above = pd.Series({synset: self.roots[int(synset)] for synset in found.index})
            dprime = self._mean("existence.dprime", found["dprime"], above, control=name)
            if name == OWN:
                self._facts["dprime"] = dprime
            self._mean("existence.auroc", found["auroc"], above, control=name)
            for metric, column in (("dprime_median", "dprime"), ("projection", "projection")):
                value = float(found[column].median())
                self._add(f"existence.{metric}", value, len(found), control=name)
        for relation, rows in cloud.siblings.groupby("relation") if len(cloud.siblings) else ():
            value = float(rows["cosine"].abs().median())
            self._add(f"relation_{relation}.abs_cosine", value, len(rows), control=name)
        if not cloud.families.empty:
            rows = cloud.families
            for column in ("eta", "eta_null", "furthest", "smallest", "effective_rank",
                           "own_weight", "accuracy", "accuracy_null", "slant"):  # fmt: skip
                values = rows[column].dropna()
                if len(values):
                    value = float(values.median())
                    self._add(f"family.{column}", value, len(values), control=name)

    def _compare(self) -> None:
        """How far real parents without the child's tokens are from what noise gives."""
        for name in self.measured:
            if name == OWN or "lco" not in self.measured[name].edges:
                continue
            other = self.measured[name].edges["lco"].rename("other")
            both = self.measured[OWN].edges[["lco"]].join(other).dropna()
            if len(both):
                gap = 1 - both["lco"].sum() / both["other"].sum()
                self._add("lco.gap", float(gap), len(both), control=name)

    def _calibrate(self) -> None:
        """Nulls beside their closed forms; under Gaussian noise they have to agree."""
        lines: dict[str, tuple[str, pd.Series, pd.Series | float]] = {}
        for name in ("gaussian", "shuffled", "permuted"):
            if name in self.measured:
                edges = self.measured[name].edges
                lines[f"{name} whole"] = (name, edges["cosine"], 0.0)
                if name != "permuted":  # nouns have a mean of their own, which is no noise
                    lines[f"{name} leave-child-out"] = (name, edges["lco"], edges["lco_null"])
                if "random" in edges:
                    lines[f"{name} random parent"] = (name, edges["random"], edges["random_null"])
                if "independent" in edges:
                    pair = edges["independent"], edges["independent_null"]
                    lines[f"{name} independent draws"] = (name, *pair)
        pairs = self.measured["random_parent"].edges
        lines["random parent"] = ("random_parent", pairs["cosine"], pairs["null"])
        self._facts["calibrated"] = True
        for line, (name, simulated, closed) in lines.items():
            there = simulated.dropna()
            wanted = float(
                closed.loc[there.index].mean() if isinstance(closed, pd.Series) else closed
            )
            value = float(there.mean())
            if not len(there):
                continue
            metric = f"null.{line.replace(' ', '_').replace('-', '_')}"
            self._add(
                metric, value, len(there), control=name, value_clean=wanted, delta=value - wanted
            )
            if name == "gaussian" and abs(value - wanted) > CALIBRATED:
                self._facts["calibrated"] = False

    # ------------------------------------------------------------------ tables

    def tables(self) -> dict[str, pd.DataFrame]:
        """By file: `edges` with one row a statistic, and the other frames of `Measured`."""
        names = self.table.names
        edges = []
        for name, cloud in self.measured.items():
            long = cloud.edges.reindex(columns=[c for c in OF_EDGES if c in cloud.edges])
            long = long.astype(float).rename_axis("child").reset_index()
            long = long.melt(id_vars="child", var_name="statistic", value_name="value").dropna()
            edges.append(long.assign(control=name))
        found = pd.concat(edges, ignore_index=True).astype({"child": int})
        own = self.table.edges.set_index("child")
        for column in ("parent", "parent_name", "child_name", "subtree"):
            found[column] = found["child"].map(own[column])
        made = {"edges": found}
        for kind in ("existence", "siblings", "families", "pairs", "projections"):
            shown = (
                (OWN,) if kind == "pairs" else (OWN, "shuffled") if kind == "projections" else ()
            )
            frames = [
                getattr(cloud, kind).assign(control=name)
                for name, cloud in self.measured.items()
                if len(getattr(cloud, kind)) and (not shown or name in shown)
            ]
            if frames:
                made[kind] = pd.concat(frames, ignore_index=True)
        if "existence" in made:
            made["existence"]["concept"] = made["existence"]["synset"].map(names)
        if "families" in made:
            made["families"]["concept"] = made["families"]["parent"].map(names)
        return made

    def examples(self) -> pd.DataFrame:
        """One row an edge, a concept or a dose, the units of the claims; `cluster` is its root."""
        frames = [self._edges(), self._concepts()]
        if self._doses is not None:
            frames.append(self._doses)
        found = pd.concat(frames, ignore_index=True)
        return found.assign(example=np.arange(len(found)), ablation="none", set="named")

    def _edges(self) -> pd.DataFrame:
        rows = self.measured[OWN].edges.drop(columns=["why"], errors="ignore").astype(float)
        rows["off"] = (rows["angle"] - 90).abs()
        for name, cloud in self.measured.items():
            if name == OWN:
                continue
            for column in ("angle", "lco", "defined", "cross_squared"):
                if column in cloud.edges:
                    rows[f"{column}_{name}"] = cloud.edges[column].astype(float)
            rows[f"off_{name}"] = (rows[f"angle_{name}"] - 90).abs()
        # an angle is asked for only where most parents are there at all
        for suffix in ("", *(f"_{name}" for name in self.measured if name != OWN)):
            if rows[f"defined{suffix}"].mean() < LEAST_DEFINED:
                rows[f"cross_squared{suffix}"] = np.nan
        clusters = [self.roots[int(child)] for child in rows.index]
        rows = rows.rename_axis("child").reset_index()
        return rows.assign(intervention="edge", split="all", cluster=clusters)

    def _concepts(self) -> pd.DataFrame:
        rows = self.measured[OWN].existence.set_index("synset")
        for name, cloud in self.measured.items():
            if name != OWN and not cloud.existence.empty:
                other = cloud.existence.set_index("synset")
                rows[f"dprime_{name}"] = other["dprime"]
        clusters = [self.roots[int(synset)] for synset in rows.index]
        rows = rows.reset_index()
        return rows.assign(intervention="concept", split="all", cluster=clusters)

    def add_doses(self, doses: pd.DataFrame, table: ConceptTable) -> None:
        """Take in what adding vectors did; a dose that was not reached has no value."""
        there = doses.reindex(columns=[
            "synset", "subtree", "by", "asked", "reached", "alpha", "gain", "shift",
            "shift_siblings", "shift_random", "shift_random_size", "kl", "kl_median",
            "kl_below_0.2", "kl_random",
        ])  # fmt: skip
        names = [f"{by} {asked:g}" for by, asked in zip(there["by"], there["asked"], strict=True)]
        clusters = [f"{table.names[root]}.{root}" for root in there["subtree"]]
        self._doses = there.drop(columns=["by", "asked", "subtree"]).assign(
            intervention=names,
            split="all",
            cluster=clusters,
            reached=there["reached"].astype(float),
        )
        for name, rows in self._doses.groupby("intervention"):
            for column in ("shift", "shift_siblings", "shift_random", "kl", "kl_random", "reached"):
                values = rows[column].dropna()
                if len(values):
                    unit = {"kl": "nat", "kl_random": "nat", "reached": "1"}.get(column, "logit")
                    metric = f"dose.{column}"
                    self._add(
                        metric, float(values.median()), len(values), control=str(name), unit=unit
                    )

    # ------------------------------------------------------------------ in scalars

    def summary(self) -> dict[str, Any]:
        """The run in scalars, and whether what was measured is a geometry at all."""
        own = self.measured[OWN].edges
        (dprime, of_dprime), (rms, of_rms) = self._facts["dprime"], self._facts["rms_own"]
        _, of_power = self._facts["rms_random_parent"]
        share = self._facts["defined_own"]
        against = []
        if of_dprime is None or of_dprime[0] <= EXISTS:
            against.append("held-out members are not told from other tokens")
        if share < LEAST_DEFINED:
            against.append("most edges have no parent above noise")
        if of_rms is None or of_rms[1] > COSINE:
            against.append("root mean square cosine not shown to be below that of 80 degrees")
        if of_power is None or of_power[0] <= COSINE:
            against.append("no power: random parents are not told from orthogonal ones")
        n_subtrees = len({self.roots[int(child)] for child in own.index})
        if n_subtrees < MIN_SUBTREES:
            against.append(f"{n_subtrees} subtrees, {MIN_SUBTREES} are needed")
        return {
            "concepts": len(self.table.names), "edges": len(own), "subtrees": n_subtrees,
            "angle": float(own["angle"].median()), "dprime": dprime, "defined": share,
            "rms": None if math.isnan(rms) else rms,
            "gate": "passed" if not against else "failed: " + "; ".join(against),
            "checks": {"calibrated": self._facts["calibrated"]},
        }  # fmt: skip
