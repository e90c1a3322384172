"""Tables of autoencoders' scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([0.5], "0.5"), ([1.0] * 6, "1"), ([2.20, 2.45, 2.38], "2.343 [2.023, 2.664]")],
)
def test_seeds_that_are_all_alike_have_no_interval(values: list[float], text: str) -> None:
    from allostasis.analysis.train_figures import _cell

    assert _cell(np.array(values)).startswith(text)
    assert ("[" in _cell(np.array(values))) == (len(set(values)) > 1)


def finished(folder: Path, *, condition: str, k: int, seed: int, l0: float, **module: Any) -> None:
    """A run's records: its settings and two readings."""
    from allostasis.core.records import METRICS_SCHEMA, write_json, write_table

    digest = f"{condition}-{k}-{module}"
    about = {"run_id": f"{digest}-{seed}", "exp": "hsae_train", "condition": condition,
             "seed": seed, "device": "cpu", "status": "done", "config_hash": digest}  # fmt: skip
    config = {"task": {"seed": seed}, "model": {}, "module": {"k": k, "match": "params", **module}}
    folder /= f"{digest}-{seed}"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", about)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {**{name: None for name in METRICS_SCHEMA.names}, **about, "step": 10, "split": "test",
         "metric": metric, "symbol": "other", "unit": "1", "value": value, "n": 1}
        for metric, value in (("l0", l0), ("explained_variance", l0 / 10))
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=METRICS_SCHEMA)
    write_table(folder / "metrics.parquet", table, METRICS_SCHEMA)


def test_arms_that_differ_in_k_alone_are_one_line_of_the_frontier(tmp_path: Path) -> None:
    from allostasis.analysis import canvas
    from allostasis.analysis.aggregate import arms
    from allostasis.analysis.curves import RunView
    from allostasis.analysis.train_figures import cells, sweeps
    from allostasis.core.records import read_runs

    for seed in (0, 1):
        for k in (4, 1, 2):
            finished(tmp_path, condition="baseline", k=k, seed=seed, l0=2.0 * k, kind="hsae", c=4)
            finished(tmp_path, condition="topk", k=k, seed=seed, l0=2.0 * k, kind="topk", c=4)
    finished(tmp_path, condition="baseline", k=8, seed=0, l0=16.0, kind="hsae", c=16)
    finished(tmp_path, condition="pca", k=2, seed=0, l0=4.0, kind="hsae", c=4)
    every = arms([RunView(record) for record in read_runs(tmp_path)])
    found = {name: [arm.setting("module.k") for arm in line] for name, line in sweeps(every)}
    assert found == {"baseline": [1, 2, 4], "topk": [1, 2, 4]}  # a lone K is no sweep
    [figure] = cells(every)
    axis = figure.draw().axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    flat = lines["topk, equal parameters"]
    assert flat.get_marker() == "s"
    np.testing.assert_allclose(flat.get_xydata(), [[2, 0.2], [4, 0.4], [8, 0.8]])
    assert [text.get_text() for text in axis.texts] == ["K=1", "K=2", "K=4"]
    assert canvas.png(figure)
    assert cells([arm for arm in every if arm.condition == "pca"]) == []
