"""Matrices over corpora are rebuilt from single runs, and refuse what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from allostasis.analysis import cross_condition as cc
from allostasis.analysis import lab_export
from allostasis.core.records import UNITS_SCHEMA, RunRecord, read_run, write_json, write_table

CONDITIONS = ("facts", "negation", "counterfactual", "logical")
OTHERS = ("kl_divergence", "flip_rate", "prob_drop")
HEADS = [(layer, head) for layer in range(2) for head in range(5)]


def _run(root: Path, condition: str, *, seed: int = 0, **about: Any) -> RunRecord:
    """A run of ten heads; head 0.3 suppresses on every corpus, the others are noise."""
    rng = np.random.default_rng([seed, CONDITIONS.index(condition)])
    folder = root / condition / f"seed={seed}"
    identity = {
        "run_id": f"heads_zero-{condition}-{seed}", "exp": "heads_zero", "condition": condition,
        "seed": seed, "device": "cpu",
    }  # fmt: skip
    n, groups = 12, [f"g{i // 2}" for i in range(12)]
    clean = rng.normal(3, 1, n)
    rows: list[dict[str, Any]] = [{"metric": "logit_diff", "value": clean.mean()}]
    frames = []
    for layer, head in HEADS:
        effect = rng.normal(2.0 if (layer, head) == (0, 3) else 0.0, 0.3, n)
        key = f"zero:{layer}.{head}"
        at = {"intervention": key, "scale": 0.0, "layer": layer, "head": head}
        p = float(stats.ttest_1samp(effect, 0).pvalue)
        rows += [
            {
                **at, "metric": "logit_diff", "value": (clean + effect).mean(),
                "delta": effect.mean(),
            },
            {**at, "metric": "effect.p", "value": p},
            *({**at, "metric": name, "value": 0.1} for name in OTHERS),
        ]  # fmt: skip
        frames.append(pd.DataFrame({
            "example": range(n), "group": groups, "split": "test", "intervention": key,
            "set": "head", "ld": clean + effect, "ld_clean": clean,
        }))  # fmt: skip
    table = pd.DataFrame(rows).assign(**identity, step=0, split="test", symbol="Psi", unit="1", n=n)
    table = pa.Table.from_pandas(
        table.reindex(columns=UNITS_SCHEMA.names), schema=UNITS_SCHEMA, preserve_index=False
    )
    write_table(folder / "metrics.parquet", table, UNITS_SCHEMA, nullable=True)
    pd.concat(frames).assign(**identity).to_parquet(folder / "examples.parquet")
    kinds = pd.DataFrame({"intervention": [f"zero:{a}.{b}" for a, b in HEADS], "site": "z"})
    kinds.to_parquet(folder / "interventions.parquet")
    model = {"weights_sha256": "ab", "prepend_bos": False, "dtype": "float32"}
    status = about.pop("status", "done")
    write_json(folder / "config.yaml", {
        "conditions": dict.fromkeys(CONDITIONS, {}), "module": {"ablation": "zero"},
    })  # fmt: skip
    write_json(folder / "run.json", {
        **identity, "status": status, "commit": "c", "model": {**model, **about},
    })  # fmt: skip
    return read_run(folder)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    root = tmp_path_factory.mktemp("runs")
    return [_run(root, condition) for condition in CONDITIONS]


def test_a_rebuild_is_byte_identical(records: list[RunRecord], tmp_path: Path) -> None:
    files = [cc.write(cc.crossed(records), tmp_path / name) for name in ("one", "two")]
    assert {path.name for path in files[0]} == {
        "head_matrix.parquet", "layer_matrix.parquet", "rank_correlation.parquet",
        "invariants.json", "summary.json",
    }  # fmt: skip
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_a_head_that_is_large_everywhere_is_found(records: list[RunRecord]) -> None:
    found = cc.invariants(cc.effects(cc.crossed(records)), k=2)
    assert "0.3" in found["signed"]["heads"]
    assert found["signed"]["p"] < 0.05
    assert found["first_layer"]["is_one_head"]
    assert set(found["first_layer"]["largest"].values()) == {"0.3"}
    assert found["first_layer"]["p_by_chance"] == pytest.approx(5**-3)


def test_corpora_that_rank_heads_at_random_have_little_in_common() -> None:
    """The permutation p is right: at most 5 % (and what the count's steps leave) below 0.05."""
    small = 0
    for seed in range(40):
        table = pd.DataFrame(
            np.random.default_rng(seed).normal(size=(10, 3)),
            index=pd.MultiIndex.from_tuples(HEADS, names=["layer", "head"]), columns=list("abc"),
        )  # fmt: skip
        small += cc.invariants(table, k=4)["signed"]["p"] <= 0.05
    assert small <= 5


def test_rank_correlations_are_scipys_with_intervals_and_q(records: list[RunRecord]) -> None:
    found = cc.crossed(records)
    table, effects = cc.rank_correlations(found), cc.effects(found)
    assert len(table) == 2 * 6
    row = table.iloc[0]
    pair = effects.loc[row["layer"], [row["first"], row["second"]]]
    assert row["rho"] == pytest.approx(stats.spearmanr(pair.iloc[:, 0], pair.iloc[:, 1]).statistic)
    assert table[["ci_low", "ci_high"]].notna().all(axis=None)
    assert (table["q"] >= table["p"] - 1e-12).all()


def test_q_is_over_all_heads_and_corpora(records: list[RunRecord]) -> None:
    matrix = cc.head_matrix(cc.crossed(records))
    p = matrix[matrix["metric"] == "effect.p"]["value"].to_numpy(float)
    q = matrix[matrix["metric"] == "effect.q_all"]["value"].to_numpy(float)
    assert len(p) == len(q) == 40
    np.testing.assert_allclose(np.sort(q), np.sort(stats.false_discovery_control(p)))


def test_missing_and_failed_conditions_are_listed(tmp_path: Path) -> None:
    made = [_run(tmp_path, "facts"), _run(tmp_path, "negation", status="failed")]
    found = cc.summary(cc.crossed(made))
    assert found["missing"] == ["negation", "counterfactual", "logical"]
    assert found["status"] == "incomplete"
    assert found["facts"]["logit_diff"]["ci95"] is None  # one seed has no interval


def test_runs_of_other_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    made = [_run(tmp_path, "facts"), _run(tmp_path, "logical", weights_sha256="cd")]
    with pytest.raises(cc.MixedRunsError, match="weights_sha256: ab, cd"):
        cc.crossed(made)
    assert cc.crossed(made, allow_mixed=True).mixed == ("weights_sha256: ab, cd",)


def test_equal_values_over_seeds_raise_a_flag() -> None:
    assert cc.over_seeds(np.array([2.0, 2.0]))["ci_degenerate"]


@pytest.mark.parametrize("status", ["done", "interrupted"])
def test_the_export_has_the_documents_shapes(tmp_path: Path, status: str) -> None:
    record = _run(tmp_path, "facts", status=status)
    written = lab_export.export(record, tmp_path / "lab")
    home = tmp_path / "lab" / "heads_zero-facts-0"
    impact = pd.read_parquet(home / "head_impact.parquet")
    assert list(impact) == ["run_id", "seed", "layer", "head", "scale", "metric", "value"]
    # counting only: 4 conditions x 3 seeds x 24 x 16 heads x 1 scale x 4 metrics = 18,432 rows
    assert len(impact) == len(HEADS) * 1 * 4
    assert 4 * 3 * 24 * 16 * (len(impact) // len(HEADS)) == 18_432
    name = "summary.json" if status == "done" else "partial_summary.json"
    said = json.loads((home / name).read_text())
    assert said["status"] == status
    assert said["logit_diff"].keys() == {"mean", "ci95", "values"}
    manifest = json.loads((home / "manifest.json").read_text())
    assert manifest.keys() == {path.name for path in written} - {"manifest.json"}
    assert manifest["head_impact.parquet"]["rows"] == len(impact)
