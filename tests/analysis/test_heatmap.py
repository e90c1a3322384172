"""Layer-by-head maps, drawn and as a page."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy.stats import percentileofscore

from allostasis.analysis import canvas, heatmap
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.heatmap import HeadMap

VALUES = np.array([[0.0, 2.0, -1.0], [np.nan, 0.5, -4.0]])


@pytest.fixture
def one() -> HeadMap:
    return HeadMap(
        "direct effect", "logit", VALUES, VALUES - 0.1, VALUES + 0.1, marked=[(0, 1), (1, 2)]
    )


class Cells(HTMLParser):
    """Tags, attributes that address something, and the text and style of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = {name: value or "" for name, value in attrs}
        self.addresses += [v for k, v in named.items() if k in {"src", "href", "action", "data"}]
        assert not any(name.startswith("on") for name in named)
        if tag == "td":
            self.cells.append(named | {"text": ""})

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "span" and self.cells:
            self.cells[-1]["text"] += data.strip()


def test_every_cell_tells_value_interval_and_percentile(one: HeadMap) -> None:
    page = Cells()
    page.feed(heatmap.page([one]))
    assert len(page.cells) == 6
    assert page.cells[1]["text"].startswith(
        "head 0.1, direct effect: 2 logit, 95 % [1.9, 2.1], percentile 100 of all heads"
    )
    assert page.cells[3]["text"] == "head 1.0, direct effect: not measured"
    assert "missing" in page.cells[3]["class"]
    assert [("marked" in cell["class"]) for cell in page.cells] == [
        False, True, False, False, False, True,
    ]  # fmt: skip


def test_a_head_without_an_interval_says_none(one: HeadMap) -> None:
    bare = replace(one, low=np.full((2, 3), np.nan))
    assert bare.describe(0, 1) == "head 0.1, direct effect: 2 logit, percentile 100 of all heads"


def test_percentiles_are_shares_of_the_other_heads_below() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 4)).round(1)  # with ties
    found = HeadMap("x", "1", values, values, values).percentiles
    for value, percentile in zip(values.ravel(), found.ravel(), strict=True):
        others = np.delete(values.ravel(), np.flatnonzero(values.ravel() == value)[0])
        assert percentile == pytest.approx(percentileofscore(others, value, kind="mean"))


def test_the_page_runs_nothing_asks_for_nothing_and_escapes_every_text(one: HeadMap) -> None:
    text = heatmap.page([replace(one, title="<script>alert(1)</script>", unit="<b>&")])
    page = Cells()
    page.feed(text)
    assert not {"script", "b", "iframe", "link", "img"} & set(page.tags)
    assert page.addresses == []
    assert "url(" not in text
    assert "&lt;script&gt;" in text


def test_colours_are_centred_on_0_and_run_to_the_largest_value(one: HeadMap) -> None:
    page = Cells()
    page.feed(heatmap.page([one]))
    styles = [re.search(r"#\w{6}", cell.get("style", "")) for cell in page.cells]
    shown = [None if style is None else to_rgb(style[0]) for style in styles]
    assert shown[3] is None
    assert shown[0] == pytest.approx((0.97, 0.97, 0.97), abs=0.02)  # 0 is white
    red, blue = shown[1], shown[5]
    assert red is not None
    assert blue is not None
    assert red[0] > red[2]  # above 0
    assert blue[2] > blue[0]  # below 0
    assert sum(blue) < sum(red)  # -4 is darker than 2


def test_the_picture_hatches_what_is_missing_and_shares_the_limits(one: HeadMap) -> None:
    with canvas.style() as plt:
        drawn = heatmap.draw([one, replace(one, values=np.abs(VALUES))])
        left = drawn.axes[0]
        hatched = [patch for patch in left.patches if patch.get_hatch()]
        assert [patch.get_xy() for patch in hatched] == [(-0.5, 0.5)]
        assert left.collections[0].get_clim() == (-4.0, 4.0)
        assert left.get_ylim() == (1.5, -0.5)  # layer 0 on top
        told = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert told == ["ablated", "well below 0", "not measured"]
        minus = [line for line in left.lines if line.get_marker() == "_"]
        assert [line.get_xydata().tolist() for line in minus] == [[[2.0, 0.0]], [[2.0, 1.0]]]
        plt.close(drawn)


def test_a_map_without_any_value_is_not_drawn(one: HeadMap) -> None:
    empty = replace(one, values=np.full((2, 3), np.nan))
    for make in (heatmap.draw, heatmap.page):
        with pytest.raises(UndefinedError, match="no head has a value"):
            make([empty])
