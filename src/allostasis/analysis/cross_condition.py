"""One model on several corpora: matrices of heads and layers, what is common, how ranks agree.

Everything is rebuilt from single runs as they lie on disk, and there is no other way to it, so that
building it again gives the same bytes.

    python -m allostasis.report outputs/heads_zero          writes report/cross_condition/
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import stats

from allostasis.analysis import impact, resampling
from allostasis.analysis import statistics as st
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.estimands import generator
from allostasis.core.records import UNITS_SCHEMA, RunRecord, write_json, write_table

TOP = 10
PERMUTATIONS = 9_999
DRAWS = 999
MEASURED = "test"
CORRELATION_SCHEMA = pa.schema([
    ("layer", pa.int64()), ("first", pa.string()), ("second", pa.string()), ("n", pa.int64()),
    ("rho", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()),
    ("p", pa.float64()), ("q", pa.float64()),
])  # fmt: skip


class MixedRunsError(ValueError):
    """Runs that say something of different models, or of one model in different ways."""


@dataclass(frozen=True)
class Crossed:
    """Runs of one experiment on several corpora.

    Attributes:
        runs: Finished runs, in the order of conditions and seeds.
        conditions: Of the design, in its order; also those that no finished run has.
        mixed: In which facts the runs differ although they were allowed to; empty otherwise.
    """

    runs: tuple[RunRecord, ...]
    conditions: tuple[str, ...]
    mixed: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> list[str]:
        """Conditions without a finished run."""
        there = {record.run["condition"] for record in self.runs}
        return [name for name in self.conditions if name not in there]

    def of(self, condition: str) -> list[RunRecord]:
        """Finished runs of a condition."""
        return [record for record in self.runs if record.run["condition"] == condition]


def crossed(records: Sequence[RunRecord], *, allow_mixed: bool = False) -> Crossed:
    """Put runs side by side.

    Args:
        records: Runs of one experiment; unfinished ones are left out.
        allow_mixed: Whether runs may differ in what makes them comparable.

    Raises:
        MixedRunsError: They differ and may not.
        UndefinedError: None is finished.
    """
    done = [record for record in records if record.run["status"] == "done"]
    if not done:
        raise UndefinedError("no finished run")
    design = done[0].config.get("conditions") or {}
    facts: dict[str, set[str]] = {}
    for record in done:
        model = record.run.get("model") or {}
        own = {name: model.get(name) for name in ("weights_sha256", "prepend_bos", "dtype")}
        settings = record.config["module"]
        own |= {name: settings.get(name) for name in ("ablation", "positions", "scales", "sets")}
        for name, value in (own | {"commit": record.run.get("commit")}).items():
            facts.setdefault(name, set()).add(str(value))
    mixed = tuple(f"{name}: {', '.join(sorted(v))}" for name, v in facts.items() if len(v) > 1)
    if mixed and not allow_mixed:
        lines = "\n  ".join(mixed)
        raise MixedRunsError(
            f"{len(done)} runs are not comparable, they differ in\n  {lines}\n"
            "Take runs of one model and commit, or say --allow-mixed, which every title then says."
        )
    return Crossed(tuple(done), tuple(design) or tuple({r.run["condition"] for r in done}), mixed)


def head_matrix(found: Crossed) -> pd.DataFrame:
    """Rows of single heads of all runs, with q over all heads and corpora of a seed."""
    rows = pd.concat([record.units for record in found.runs], ignore_index=True)
    heads = rows[rows["head"].notna() & rows["intervention"].notna()]
    p = heads[heads["metric"] == "effect.p"]
    together = []
    for _, own in p.groupby(["seed", "split"]):
        q = impact.benjamini_hochberg(own["value"].to_numpy(float))
        together.append(own.assign(metric="effect.q_all", value=q))
    return pd.concat([heads, *together], ignore_index=True)


def layer_matrix(found: Crossed) -> pd.DataFrame:
    """Rows of whole layers of all runs, as patching has them."""
    rows = pd.concat([record.units for record in found.runs], ignore_index=True)
    return rows[rows["layer"].notna() & rows["head"].isna() & rows["intervention"].notna()]


def effects(found: Crossed) -> pd.DataFrame:
    """Mean change of the logit difference by head and condition, over seeds, on the test split."""
    rows = head_matrix(found)
    rows = rows[(rows["metric"] == "logit_diff") & (rows["split"] == MEASURED)]
    rows = rows[rows["scale"].isna() | (rows["scale"] == rows["scale"].min())]
    table = rows.pivot_table(
        index=["layer", "head"], columns="condition", values="delta", aggfunc="mean"
    )
    order = [name for name in found.conditions if name in table]
    return table[order].dropna()


def invariants(table: pd.DataFrame, *, k: int = TOP) -> dict[str, Any]:
    """Heads among the k of largest effect in every corpus, and how many there are by chance.

    Args:
        table: Effects by head and condition.
        k: How many of each corpus.

    Returns:
        For `absolute` and `signed` effects: the heads, their number, and a one-sided permutation p
        of as many in common if each corpus ranked heads at random.
    """
    k = min(k, len(table))
    rng = generator("invariants")
    found: dict[str, Any] = {"k": k, "heads": len(table), "conditions": [*table.columns]}
    for name, values in (("absolute", table.abs()), ("signed", table)):
        ranks = values.rank(ascending=False, method="first")
        common = table.index[(ranks <= k).all(axis=1)]
        draws = [
            np.argsort(rng.random((PERMUTATIONS, len(table))), axis=1) < k for _ in table.columns
        ]
        by_chance = np.logical_and.reduce(draws).sum(axis=1)
        found[name] = {
            "heads": [f"{layer}.{head}" for layer, head in common],
            "count": len(common),
            "expected": float(by_chance.mean()),
            "p": float((1 + (by_chance >= len(common)).sum()) / (1 + PERMUTATIONS)),
        }
    top = table.loc[table.index.get_level_values("layer") == table.index[0][0]]
    found["first_layer"] = _common_top(top)
    return found


def _common_top(layer: pd.DataFrame) -> dict[str, Any]:
    """Whether one head of a layer has the largest effect in every corpus: exact p by chance."""
    best = {str(name): layer.index[int(layer[name].argmax())][1] for name in layer}
    same = len(set(best.values())) == 1
    return {
        "layer": int(layer.index[0][0]),
        "largest": {name: f"{layer.index[0][0]}.{head}" for name, head in best.items()},
        "is_one_head": same,
        "p_by_chance": float(len(layer) ** (1 - len(best))),
    }


def rank_correlations(found: Crossed) -> pd.DataFrame:
    """Spearman's rho of heads' effects between corpora, layer by layer, with q over all of them.

    The interval resamples groups of prompts of both corpora, where single examples of all heads
    were kept; p is of a permutation of heads.
    """
    table, rows = effects(found), []
    drawn = {str(name): _drawn(found, str(name), table.index) for name in table}
    for layer in sorted(set(table.index.get_level_values("layer"))):
        own = np.flatnonzero(table.index.get_level_values("layer") == layer)
        if len(own) < 3:
            continue
        for first, second in itertools.combinations(map(str, table.columns), 2):
            pair = table[first].to_numpy()[own], table[second].to_numpy()[own]
            row: dict[str, Any] = {
                "layer": int(layer), "first": first, "second": second, "n": len(own),
                "rho": _spearman(*pair), "p": _permuted(*pair, f"{layer} {first} {second}"),
            }  # fmt: skip
            both = drawn[first], drawn[second]
            if both[0] is not None and both[1] is not None:
                draws = zip(both[0][:, own], both[1][:, own], strict=True)
                rho = [_spearman(x, y) for x, y in draws]
                row["ci_low"], row["ci_high"] = np.quantile(rho, [0.025, 0.975])
            rows.append(row)
    made = pd.DataFrame(rows, columns=CORRELATION_SCHEMA.names)
    return made.assign(q=impact.benjamini_hochberg(made["p"].to_numpy(float)))


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    ranks = [stats.rankdata(values) - (len(values) + 1) / 2 for values in (left, right)]
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / norm) if norm > 0 else 0.0


def _permuted(left: np.ndarray, right: np.ndarray, name: str) -> float:
    rng = generator(f"rank correlation {name}")
    order = np.argsort(rng.random((PERMUTATIONS, len(left))), axis=1)
    x, y = (stats.rankdata(values) - (len(left) + 1) / 2 for values in (left, right))
    drawn = np.abs(x[order] @ y)
    return float((1 + (drawn >= abs(x @ y) - 1e-9).sum()) / (1 + PERMUTATIONS))


def _drawn(found: Crossed, condition: str, heads: pd.Index) -> np.ndarray | None:
    """Effects of all heads on resampled groups, [draw, head]; None where not all were kept."""
    frames = []
    for record in found.of(condition):
        path = record.folder / "examples.parquet"
        if not path.is_file():
            return None
        rows = pd.read_parquet(path)
        rows = rows[(rows["split"] == MEASURED) & rows["set"].isin(["head", "suppressor"])]
        frames.append(rows.assign(effect=rows["ld"] - rows["ld_clean"]))
    rows = pd.concat(frames)
    rows = rows.assign(
        group=rows["group"].astype(str), intervention=rows["intervention"].astype(str)
    )
    sums = rows.pivot_table(
        index="group", columns="intervention", values="effect", aggfunc="sum", observed=True
    )
    sizes = rows.groupby("group")["example"].nunique().loc[sums.index].to_numpy(float)
    names = [_key(sums.columns, layer, head) for layer, head in heads]
    if None in names or sums[names].isna().any(axis=None):
        return None
    counts = resampling.resamples(len(sums), DRAWS)
    return (counts @ sums[names].to_numpy(float)) / (counts @ sizes)[:, None]


def _key(keys: pd.Index, layer: int, head: int) -> str | None:
    """The first intervention on a head alone."""
    wanted = f":{layer}.{head}"
    return next((str(key) for key in keys if str(key).partition("[")[0].endswith(wanted)), None)


def summary(found: Crossed) -> dict[str, Any]:
    """Means of every metric of the untouched model over seeds, and what is missing.

    An interval over seeds is about the drawing of prompts of one fixed model.
    """
    made: dict[str, Any] = {
        "status": "complete" if not found.missing else "incomplete",
        "missing": found.missing,
        "mixed": [*found.mixed],
        "note": "t_over_seeds: prompt-sampling variability of one fixed model; not variability "
        "over trained models. Subsamples overlap, so that it is too narrow",
        "runs": [record.run["run_id"] for record in found.runs],
    }
    for condition in found.conditions:
        rows = [record.units for record in found.of(condition)]
        if not rows:
            continue
        table = pd.concat(rows)
        table = table[table["intervention"].isna() & (table["split"] == MEASURED)]
        made[condition] = {
            str(metric): over_seeds(own.sort_values("seed")["value"].to_numpy(float))
            for metric, own in table.groupby("metric")
        }
    return made


def over_seeds(values: np.ndarray) -> dict[str, Any]:
    """Mean over seeds with Student's t interval, as the documents' summary.json has it.

    Example:
        >>> found = over_seeds(np.array([2.20, 2.45, 2.38]))
        >>> [round(end, 3) for end in found["ci95"]]
        [2.023, 2.664]
    """
    made: dict[str, Any] = {"mean": float(values.mean()), "ci95": None, "values": values.tolist()}
    if len(values) > 1:
        if np.ptp(values) == 0:
            return made | {"ci_degenerate": True}
        interval = st.t_interval(values)
        made["ci95"] = [float(end) for end in (interval.low, interval.high) if end is not None]
    return made


def write(found: Crossed, folder: Path) -> list[Path]:
    """Write head_matrix, layer_matrix, rank_correlation, invariants and summary into a folder."""
    tables: Mapping[str, tuple[pd.DataFrame, pa.Schema]] = {
        "head_matrix": (head_matrix(found), UNITS_SCHEMA),
        "layer_matrix": (layer_matrix(found), UNITS_SCHEMA),
    }
    written = []
    if len({record.run["condition"] for record in found.runs}) > 1 and len(effects(found)):
        tables = {**tables, "rank_correlation": (rank_correlations(found), CORRELATION_SCHEMA)}
        write_json(folder / "invariants.json", invariants(effects(found)))
        written.append(folder / "invariants.json")
    for name, (frame, schema) in tables.items():
        table = pa.Table.from_pandas(
            frame.reindex(columns=schema.names), schema=schema, preserve_index=False
        )
        write_table(folder / f"{name}.parquet", table, schema, nullable=True)
        written.append(folder / f"{name}.parquet")
    write_json(folder / "summary.json", summary(found))
    return [*written, folder / "summary.json"]
