"""A run's maps show its last readings, or what an ablation changes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from allostasis.analysis.run_maps import head_maps
from allostasis.core.records import read_run

STUDIES = Path(__file__).parents[2] / "experiments"


def record(pattern: str):
    return read_run(next(STUDIES.glob(pattern)))


def test_a_trained_models_map_has_the_last_step_of_every_head() -> None:
    run = record("2026-11-23_grokking_weight_decay/runs/grokking/high_wd/seed=0/*")
    found = head_maps(run, ("amplitude_param", "probe/attention_entropy", "test/logit_diff"))
    assert set(found) == {"amplitude_param", "probe/attention_entropy"}
    rows = pq.read_table(run.folder / "metrics.parquet").to_pylist()
    last = [r for r in rows if r["metric"] == "amplitude_param" and r["step"] == 10_600]
    expected = [r["value"] for r in sorted(last, key=lambda r: r["head"])]
    assert found["amplitude_param"].values.tolist() == [expected]
    assert found["amplitude_param"].title == "amplitude_param, step 10600"


def test_an_ablations_map_has_the_change_of_every_head_on_its_split() -> None:
    run = record("2026-11-26_heads_smollm2/zero/runs/heads_zero/facts/seed=0/*")
    (found,) = head_maps(run, ("test/logit_diff",)).values()
    assert found.values.shape == (30, 9)
    assert np.isfinite(found.values).all()
    assert round(float(found.values[23, 4]), 2) == -1.07  # the study's README
    assert found.title == "change of test/logit_diff"
