"""Calibration of the two-answer choice under every intervention, as rows of metrics.parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from allostasis.analysis import resampling
from allostasis.analysis.choice_calibration import calibrate, is_first, limits
from allostasis.core.seeding import derive
from allostasis.experiments.heads.tables import Readings, place

UNITS = {"ece": "1", "equal_mass": "1", "brier": "1", "nll": "nat", "ece_self": "1"}
DRAWS = 999


def metric_rows(
    found: Readings, splits: Mapping[str, np.ndarray], *, seed: int
) -> Iterator[dict[str, Any]]:
    """One row a split, intervention and number; of the clean model with a cluster bootstrap."""
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    for split, at in splits.items():
        if not len(at):
            continue
        first = is_first(len(at), rng)
        clean = asdict(calibrate(found.clean["ld"][at], first))
        ends = _limits(found.clean["ld"][at], first, found.clusters(at))
        base = {
            "symbol": "Psi", "split": split, "n": len(at), "n_unique": found.n_unique(at),
        }  # fmt: skip
        for name, value in clean.items():
            low, high = ends[name]
            yield {
                **base, "metric": f"choice_calibration.{name}", "unit": UNITS[name],
                "value": value, "ci_low": low, "ci_high": high,
            }  # fmt: skip
        for index, each in enumerate(found.interventions):
            now = asdict(calibrate(found.columns["ld"][index, at], first))
            for name, value in now.items():
                yield {
                    **base, **place(each), "metric": f"choice_calibration.{name}",
                    "unit": UNITS[name], "value": value, "value_clean": clean[name],
                    "delta": value - clean[name],
                }  # fmt: skip


def _limits(
    logit_diff: np.ndarray, first: np.ndarray, clusters: list[str]
) -> dict[str, tuple[float, float]]:
    """Intervals of the clean model's numbers over resampled clusters."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    weights = resampling.resamples(len(names), DRAWS)[:, index]
    low, high = (asdict(end) for end in limits(logit_diff, first, weights))
    return {name: (low[name], high[name]) for name in UNITS}
