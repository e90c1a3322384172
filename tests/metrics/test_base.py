"""How metrics add up, refuse and are found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allostasis.metrics.accuracy import Accuracy
from allostasis.metrics.base import Metric, Place, Snapshot, discover
from allostasis.metrics.margin import margin


class _Heads(Metric):
    symbol, unit, needs = "G", "bit", ("blocks.*.attn.hook_pattern",)
    axes, parts = ("layer", "head", "position"), ("share", "radius_*")
    part_units = {"share": "1"}
    scale_law, direction, source = {}, "none", "a test"

    def update(self, snapshot: Snapshot) -> None:
        for layer, pattern in snapshot.layers("attn.hook_pattern"):
            self.add(pattern.mean(0), n=len(pattern), over=("head", "position"), layer=layer)


def _patterns(**layers: Tensor) -> Snapshot:
    acts = {f"blocks.{name[1:]}.attn.hook_pattern": value for name, value in layers.items()}
    return Snapshot(step=0, acts=acts)


def test_means_are_weighted_by_n_and_indexed_by_layer_head_and_position() -> None:
    metric = _Heads()
    metric.update(_patterns(L10=torch.ones(1, 2, 3), L2=torch.zeros(1, 1, 1)))
    metric.update(_patterns(L10=torch.full((3, 2, 3), 5.0)))
    readings = metric.readings()
    assert [(r.layer, r.head, r.position) for r in readings] == [
        (2, 0, 0),
        *((10, head, position) for head in range(2) for position in range(3)),
    ]
    assert [(r.value, r.n) for r in readings] == [(0.0, 1), *6 * [(4.0, 4)]]


def test_a_given_index_is_where_an_axis_starts() -> None:
    metric = _Heads()
    metric.add(torch.tensor([3.0, 4.0]), n=1, over=("position",), position=1, part="share")
    found = [(r.part, r.position, r.value, r.unit) for r in metric.readings()]
    assert found == [("share", 1, 3.0, "1"), ("share", 2, 4.0, "1")]


def test_an_undefined_value_is_counted_and_does_not_spoil_the_mean() -> None:
    metric = _Heads()
    nan = float("nan")
    metric.add(torch.tensor([nan, 2.0]), n=torch.tensor([0, 4]), over=("head",), otherwise="empty")
    metric.add(torch.tensor([nan, 5.0]), n=torch.tensor([0, 2]), over=("head",), otherwise="empty")
    metric.add(nan, n=0, part="share", otherwise=None)
    assert [(r.head, r.value, r.n) for r in metric.readings()] == [(1, 3.0, 6)]
    assert metric.skipped == {"empty": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_defined_value_that_is_not_finite_raises(value: float) -> None:
    metric = _Heads()
    metric.add(torch.tensor([1.0, value]), n=1, over=("head",), layer=3)
    with pytest.raises(ValueError, match="must be added with n=0"):
        metric.readings()


def test_a_part_that_was_not_declared_is_refused() -> None:
    with pytest.raises(AssertionError, match="shear"):
        _Heads().add(1.0, n=1, part="shear")
    _Heads().add(1.0, n=1, part="radius_embed")


def test_a_metric_works_in_a_lightning_loop() -> None:
    metric = Accuracy()
    logits = torch.eye(4)
    right, wrong = torch.arange(4), (torch.arange(4) + 1) % 4
    first = metric(Snapshot(step=0, logits=logits, labels=right))
    second = metric(Snapshot(step=1, logits=logits[:2], labels=wrong[:2]))
    assert first[Place()].value == 1
    assert second[Place()].value == 0
    assert metric.compute()[Place()].value.item() == pytest.approx(4 / 6)


def test_what_metrics_share_is_computed_once_a_snapshot() -> None:
    snapshot = Snapshot(step=0, logits=torch.eye(2), labels=torch.tensor([0, 1]))
    assert snapshot.once(margin, "logits", "labels") is snapshot.once(margin, "logits", "labels")


def test_a_snapshot_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="no `labels`, which the metric needs"):
        Accuracy().update(Snapshot(step=0, logits=torch.eye(2)))
    with pytest.raises(ValueError, match="needs `n_classes`"):
        Snapshot(step=0, classes=torch.tensor([0, 1]))


def test_pairs_join_a_layer_with_its_own_past() -> None:
    now, then = torch.ones(1), torch.zeros(1)
    snapshot = Snapshot(
        step=1,
        acts={"blocks.1.hook_z": now, "blocks.0.hook_z": 2 * now, "blocks.0.hook_q": 3 * now},
        earlier={"blocks.1.hook_z": then},
    )
    assert [layer for layer, _ in snapshot.layers("hook_z")] == [0, 1]
    assert list(snapshot.pairs("hook_z")) == [(1, now, then)]
    assert list(snapshot.pairs("hook_z", then="initial")) == []


METRIC = """
from allostasis.metrics.base import Metric
class {name}(Metric):
    pass
"""


@pytest.mark.parametrize("classes", [(), ("One", "Two")])
def test_a_file_without_exactly_one_metric_is_named(
    classes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / f"with_{len(classes)}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "lonely.py").write_text("".join(METRIC.format(name=name) for name in classes))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match=rf"lonely\.py holds {len(classes)} metrics"):
        discover(package.name)


@pytest.mark.slow
def test_metrics_are_imported_only_when_they_are_looked_for() -> None:
    code = """
import sys
from allostasis.metrics.base import discover
assert "allostasis.metrics.accuracy" not in sys.modules
assert "allostasis.metrics.accuracy" in {cls.__module__ for cls in discover().values()}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
