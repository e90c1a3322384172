"""Figures of steering and of features: what is drawn together belongs together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from allostasis.analysis import steer_figures
from allostasis.analysis.curves import UndefinedError


def arm(root: Path, condition: str, **tables: dict[int, pd.DataFrame]) -> Any:
    """An arm with a run a seed, each with its tables on disk."""
    runs = []
    for seed in next(iter(tables.values())):
        folder = root / condition / str(seed)
        folder.mkdir(parents=True)
        for name, frames in tables.items():
            frames[seed].to_parquet(folder / f"{name}.parquet")
        record = SimpleNamespace(folder=folder)
        runs.append(SimpleNamespace(record=record, run_id=f"{condition}-{seed}", seed=seed))
    return SimpleNamespace(condition=condition, runs=runs)


def test_latents_of_two_seeds_with_one_number_are_two_features(tmp_path: Path) -> None:
    """Seed 0's latent 7 does much and lies in head 0; seed 1's does little and lies in head 1."""
    impact, aligned = {}, {}
    for seed, effect in ((0, 4.0), (1, -1.0)):
        impact[seed] = pd.DataFrame({
            "feature": [7], "kind": "zero", "metric": "logit_diff", "value": effect
        })  # fmt: skip
        shares = [0.9, 0.1] if seed == 0 else [0.2, 0.8]
        aligned[seed] = pd.DataFrame({
            "feature": 7, "layer": 0, "head": [0, 1], "share": shares, "share_null": 0.1
        })  # fmt: skip
    arms = [arm(tmp_path, "features", feature_impact=impact, feature_head_alignment=aligned)]
    axis = steer_figures.matrix(arms).axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[9, 1], [2, 8]])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0: 7", "1: 7"]


def steering(leakage: float, fails: tuple[str, ...]) -> pd.DataFrame:
    """Two parents and a child at two doses; a concept of `fails` does not reach the larger one."""
    rows = [
        {
            "source": "sae", "level": level, "synset": synset, "draw": 0, "asked": asked,
            "reached": asked < 1 or str(synset) not in fails,
            "leakage": leakage * asked * synset, "success": asked / 2,
        }
        for level, synset in (("parent", 1), ("parent", 100), ("child", 5))
        for asked in (0.5, 1.0)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_leakage_is_shown_at_the_gain_of_the_claims_though_more_reach_a_smaller_one(
    tmp_path: Path,
) -> None:
    arms = [arm(tmp_path, "teacher_init", steering={0: steering(0.1, ("100", "5"))})]
    parents, *others = steer_figures.leakage(arms).axes
    assert not others  # no child reached it
    assert parents.get_title(loc="left") == "parent concepts, gain 1 nat"
    (points,) = [line.get_ydata() for line in parents.lines]
    np.testing.assert_allclose(points, [0.1])
    none = [arm(tmp_path, "rotated", steering={0: steering(0.1, ("1", "100", "5"))})]
    axis = steer_figures.leakage(none).axes[0]
    assert axis.get_title(loc="left") == "parent concepts, gain 0.5 nat"


def test_success_is_a_line_an_arm_and_level_of_concepts_that_reach_every_dose(
    tmp_path: Path,
) -> None:
    arms = [
        arm(tmp_path, "teacher_init", steering={0: steering(0.1, ("100",))}),
        arm(tmp_path, "no_teacher", steering={0: steering(0.3, ())}),
    ]
    parents, children = steer_figures.success(arms).axes
    lines = {str(line.get_label()): line.get_xydata() for line in parents.lines}
    np.testing.assert_allclose(lines["sae of teacher_init"], [[0.05, 0.25], [0.1, 0.5]])
    np.testing.assert_allclose(lines["sae of no_teacher"], [[7.575, 0.25], [15.15, 0.5]])
    assert len(children.lines) == 2
    none = [arm(tmp_path, "rotated", steering={0: steering(0.1, ("1", "100", "5"))})]
    with pytest.raises(UndefinedError, match="no direction reached every gain"):
        steer_figures.success(none)


def test_a_direction_that_arms_have_in_common_is_drawn_once_and_an_autoencoder_is_ones_own() -> (
    None
):
    """Two arms of one teacher, whose leakage differs in last digits; the third has its own."""
    rows = [
        {
            "arm": arm, "seed": 0, "level": "parent", "source": source, "synset": 1, "draw": 0,
            "asked": 1.0, "leakage": leakage,
        }
        for arm, source, leakage in (
            ("one", "teacher", 0.1), ("two", "teacher", 0.1 + 1e-12), ("third", "teacher", 0.2),
            ("one", "sae", 0.3), ("two", "sae", 0.3),
        )
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    drawn = steer_figures.once(table)
    assert list(zip(drawn["arm"], drawn["source"], strict=True)) == [
        (steer_figures.SHARED, "teacher"), ("third", "teacher"), ("one", "sae"), ("two", "sae"),
    ]  # fmt: skip
    assert list(table["arm"]) == [row["arm"] for row in rows]  # the caller's is as it was
    later = pd.concat([table, table.assign(seed=1)])
    assert len(steer_figures.once(later)) == 8
