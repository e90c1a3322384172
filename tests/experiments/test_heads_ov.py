"""Reports of what heads write, on a tiny model that the corpora can be asked of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from allostasis.analysis import ov_figures
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import rendered
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.core.records import UNITS_SCHEMA, RunRecord, write_table
from allostasis.experiments.heads.ov import HeadsOV
from allostasis.experiments.heads.vocabulary import Vocabulary
from allostasis.models.lens import pretrained
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.task import Probes


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return pretrained(arch="gpt_neox")


@pytest.fixture(scope="module")
def outputs(model: LanguageModel) -> dict[str, Any]:
    task = Probes(seed=0, corpus="facts", n_examples=60)
    module = HeadsOV(
        model=model, task=task, layers=[0, 2], top_k=12, n_inputs=30, n_clustered=60
    )  # fmt: skip
    found = module.test_step(task, 0)
    return {**found, "facts": module.facts, "summary": module.summary()}


def test_the_reports_are_those_of_the_source_documents(outputs: dict[str, Any]) -> None:
    report = json.loads(json.dumps(outputs["documents"]["ov_report"], allow_nan=False))
    assert {"model", "weights_sha256", "corpus", "data_hash", "samples", "top_k", "heads"} <= {
        *report
    }
    assert report["corpus"] == "facts"
    assert [(one["layer"], one["head"]) for one in report["heads"]] == [
        (layer, head) for layer in (0, 2) for head in range(4)
    ]
    first = report["heads"][0]
    assert {"vector_norm", "norm_ratio", "snr", "tokens"} <= {*first}
    assert [len(first["tokens"][end]) for end in ("top", "bottom")] == [12, 12]
    assert {*first["tokens"]["top"][0]} == {"token_id", "token", "logit"}
    circuit = outputs["documents"]["ov_circuit"]
    assert circuit["corpus"] is None
    assert circuit["samples"] == 30


def test_the_tidy_table_holds_the_same(outputs: dict[str, Any]) -> None:
    table, report = outputs["tables"]["ov_tokens"], outputs["documents"]["ov_report"]
    for one in report["heads"]:
        own = table[(table["layer"] == one["layer"]) & (table["head"] == one["head"])]
        own = own[(own["report"] == "write") & (own["end"] == "bottom")].sort_values("rank")
        assert own["logit"].tolist() == [t["logit"] for t in one["tokens"]["bottom"]]
        assert own["logit"].is_monotonic_increasing
        assert (own["snr"] == one["snr"]).all()
    assert table[table["report"] == "circuit"]["snr"].isna().all()
    assert {*outputs["tables"]["ov_clusters"]["report"]} <= {"circuit", "write"}


def test_examples_average_to_the_report_and_others_are_the_mean_of_the_rest(
    outputs: dict[str, Any],
) -> None:
    rows = outputs["tables"]["examples"]
    test = rows[rows["split"] == "test"].groupby(["layer", "head"])
    for one in outputs["documents"]["ov_report"]["heads"]:
        own = test.get_group((one["layer"], one["head"]))
        for name in ("target", "foil", "delta"):
            assert own[name].mean() == pytest.approx(one[name], abs=1e-5)
    assert "hedge" not in rows or np.isfinite(rows["hedge_rest"]).all()


def test_the_writer_is_chosen_on_train_and_stands_in_both_splits(outputs: dict[str, Any]) -> None:
    rows = outputs["tables"]["examples"]
    writer = rows[rows["set"] == "writer"]
    means = rows[rows["split"] == "train"].groupby("intervention")["delta"].mean()
    assert writer["intervention"].unique().tolist() == [means.idxmin()]
    assert {*writer["split"]} == {"train", "test"}
    assert outputs["summary"]["most_negative"] == means.idxmin().removeprefix("write:")


def test_published_heads_are_those_of_the_model_that_is_run(model: LanguageModel) -> None:
    task = Probes(seed=0, corpus="facts", n_examples=60)
    named = {model.identity["name"]: ["2.1"], "another/model": ["9.9"]}
    module = HeadsOV(model=model, task=task, published=named)
    assert module.published == {(2, 1)}
    with pytest.raises(ValueError, match=r"module\.reports is empty"):
        HeadsOV(model=model, task=task, reports=[])


def test_a_token_reads_as_it_does_behind_another(model: LanguageModel) -> None:
    vocabulary = Vocabulary(model.tokenizer, 10_000)
    pieces = vocabulary.pieces
    assert vocabulary.text(pieces.index("▁Mary")) == " Mary"
    assert vocabulary.text(pieces.index("Mary")) == "Mary"
    assert vocabulary.text(9_999) == "<unused 9999>"
    assert pieces.index("▁Mary") in vocabulary.words
    assert pieces.index("Mary") not in vocabulary.words
    chosen = vocabulary.inputs(10)
    assert len(set(chosen)) == 10
    assert vocabulary.inputs(10**6) == vocabulary.words


def _arm(folder: Path, tokens: list[str]) -> Arm:
    """A run with one head that lists some tokens, as it lies on disk."""
    rows = [
        {"report": "write", "layer": 0, "head": 0, "end": end, "rank": rank, "token_id": rank,
         "token": token, "logit": 1.0, "is_fragment": False, "snr": 1.0}
        for end in ("top", "bottom")
        for rank, token in enumerate(tokens)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "ov_tokens.parquet")
    identity = {"run_id": "r", "exp": "heads_ov", "condition": "facts", "seed": 0, "device": "cpu"}
    units = [
        {**identity, "step": 0, "metric": f"ov_write.{name}", "symbol": "other", "unit": "1",
         "layer": 0, "head": 0, "value": 1.0, "n": 1}
        for name in ("vector_norm", "snr", "delta")
    ]  # fmt: skip
    write_table(folder / "metrics.parquet", units, UNITS_SCHEMA, nullable=True)
    run = RunView(RunRecord(folder, {**identity, "status": "done"}))
    return Arm("heads_ov", "facts", "hash", "cpu", (run,), {})


def test_tokens_of_the_page_are_escaped_and_silent_heads_say_so(tmp_path: Path) -> None:
    html = str(ov_figures.page([_arm(tmp_path, ["<script>", "\n", " a&b", "\x0b"])]))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "⏎" in html
    assert "·a&amp;b" in html
    assert "\\x0b" in html
    assert 'class="silent"' in html
    assert "no measurable direct effect" in html


def test_the_picture_shows_the_strongest_heads_with_what_they_write(tmp_path: Path) -> None:
    arm = _arm(tmp_path, ["$a_b$", "漢", "ق", " x"])
    deltas = {"write:0.0": 1.0, "write:3.1": -5.0, "write:2.0": 0.5, "write:9.9": 3.0}
    noise = np.tile([-0.1, 0.1], 10)
    examples = [
        {"example": n, "group": f"g{n}", "split": split, "intervention": key,
         "delta": (mean if split == "test" else 50.0) + noise[n]}
        for split in ("train", "test")
        for key, mean in deltas.items()
        for n in range(20)
    ]  # fmt: skip
    pd.DataFrame(examples).to_parquet(tmp_path / "examples.parquet")
    drawn = ov_figures.draw([arm])
    bars, words = drawn.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["3.1", "9.9", "0.0", "2.0"]
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == pytest.approx([-5.0, 3.0, 1.0, 0.5])
    own = [text for text in words.texts if text.get_position()[1] == 2]
    assert [text.get_text() for text in own] == [
        f"{mark} $a_b$ \\u6f22 \\u0642 ·x" for mark in "▲▼"
    ], "as they are, on one line from left to right"
    rendered(drawn)  # a missing glyph would be a warning, which fails


def test_the_picture_needs_a_write_report() -> None:
    with pytest.raises(UndefinedError, match="write report"):
        ov_figures.draw([])
