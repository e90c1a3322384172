"""The report over several experiments as a reader meets it: a page in a headless browser.

Needs Playwright and a Chromium of the machine's; `make .venv/browser` provides both where it can.
With REQUIRE_BROWSER set, a machine without them fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from allostasis import report
from allostasis.analysis import registry

Writer = Callable[..., Path]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = (
    "</style></td><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload=alert(3) x='"
)
SHORT = "<img src=x onerror=alert(4)>"  # figures have room for no more

pytestmark = pytest.mark.slow


@dataclass
class Seen:
    """A page that was opened, and what it did that it should not.

    Attributes:
        page: Playwright's.
        said: Console messages, errors, dialogs.
        asked: Addresses that it asked for.
    """

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def written(
    write_run: Writer, write_audit: Writer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A report over two experiments, one of whose records was written by an enemy."""
    root = tmp_path_factory.mktemp("page") / "outputs"
    for seed in range(2):
        write_run(root, "high_wd", seed)
        write_run(root, "no_wd", seed)
    about = {"symbol": HOSTILE, "unit": HOSTILE, "source": HOSTILE, "direction": HOSTILE}
    write_run(
        root, SHORT, device_name=HOSTILE, command=HOSTILE, commit=HOSTILE,
        versions={"python": HOSTILE}, metrics={HOSTILE: about, "accuracy": about},
    )  # fmt: skip
    error = {"type": HOSTILE, "message": HOSTILE, "traceback": ""}
    write_run(root, "high_wd", 9, status="failed", error=error, run_id=HOSTILE, summary=None)
    for condition in ("baseline", "critical", "random_control"):
        write_audit(root, condition, model={"title": SHORT})
    assert report.main([str(root)]) == 0
    return root / "report"


@pytest.fixture(scope="module")
def opened(written: Path) -> Iterator[Seen]:
    """The page, opened from disk."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if path is None or sync_playwright is None:
        lacks = "Playwright" if path else "a browser"
        tell = pytest.fail if "REQUIRE_BROWSER" in os.environ else pytest.skip
        tell(f"{lacks} is missing; `make .venv/browser` provides it on Debian, as root")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        seen = Seen(browser.new_page(viewport={"width": 1200, "height": 900}))
        seen.page.on("console", lambda message: seen.said.append(message.text))
        seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
        seen.page.on("dialog", lambda dialog: (seen.said.append(dialog.message), dialog.dismiss()))
        seen.page.on("request", lambda request: seen.asked.append(request.url))
        seen.page.goto((written / "report.html").as_uri())
        yield seen
        browser.close()


@pytest.fixture(scope="module")
def verdicts(written: Path) -> list[str]:
    """The word of every claim of every study, from the report's other file."""
    studies = json.loads((written / "verdicts.json").read_text())
    return [claim["verdict"] for claims in studies.values() for claim in claims]


def test_page_asks_for_nothing_and_the_console_is_silent(opened: Seen, written: Path) -> None:
    opened.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    opened.page.wait_for_load_state("networkidle")
    outside = [url for url in opened.asked if not url.startswith("data:image/png;base64,")]
    assert outside == [(written / "report.html").as_uri()]
    assert opened.said == []
    images = opened.page.evaluate("[...document.images].map(one => one.naturalWidth)")
    assert len(images) >= 12
    assert min(images) > 300


def test_claims_table_comes_first_and_holds_every_claim(opened: Seen, verdicts: list[str]) -> None:
    rows = opened.page.locator("table.claims tr[data-verdict]")
    every = sum(map(len, registry.registered().values()))
    assert rows.count() == every > len(verdicts) > 50  # the rest: not run here
    words = opened.page.locator("table.claims .verdict").all_inner_texts()
    assert words[: len(verdicts)] == verdicts
    assert opened.page.locator("h2").first.inner_text() == "Claims"
    total = opened.page.locator("table.totals tbody tr").all_inner_texts()
    assert sum(int(row.split()[-1]) for row in total) == every
    links = opened.page.locator("table.claims td:first-child a")
    there = opened.page.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')]"
        ".filter(one => !document.getElementById(decodeURIComponent(one.hash.slice(1)))).length"
    )
    assert links.count() == len(verdicts)
    assert there == 0  # every link inside the page leads somewhere


def test_every_line_of_the_source_documents_has_an_answer(opened: Seen) -> None:
    answers = opened.page.locator("table.criteria td:nth-child(3)").all_inner_texts()
    assert len(answers) == len(registry.criteria())
    known = re.compile("supported|refuted|equivalent|undecided|degenerate")
    assert all(known.search(answer) for answer in answers)


def test_markdown_holds_every_claim_and_what_was_not_run_stands_last(written: Path) -> None:
    text = (written / "REPORT.md").read_text()
    run, sep, not_run = text.partition("\n## What no run here is about\n")
    assert sep
    heads = re.findall(r"^## (.+)$", run, flags=re.MULTILINE)
    assert heads[0] == "Claims"
    assert {head.partition(":")[0] for head in heads[2:]} == {"grokking", "ioi"}
    assert not re.findall(r"^## ", not_run, flags=re.MULTILINE)
    for exp, claims in registry.registered().items():
        part = run if exp in ("grokking", "ioi") else not_run
        for claim in claims:
            assert text.count(f"\n| {claim.id} | ") == part.count(f"\n| {claim.id} | ") >= 1


def test_claims_can_be_narrowed_to_a_verdict(opened: Seen) -> None:
    words = opened.page.locator("table.claims .verdict").all_inner_texts()
    counts = Counter(words)
    for word in ("supported", "refuted", "undecided"):
        opened.page.get_by_label(word, exact=True).check()
        shown = opened.page.locator("table.claims .verdict:visible").all_inner_texts()
        assert shown == [word] * counts[word]
    opened.page.get_by_label("all verdicts").check()
    opened.page.get_by_label("published claims only").check()
    shown = opened.page.locator("table.claims .verdict:visible").count()
    assert 0 < shown < len(words)
    opened.page.get_by_label("published claims only").uncheck()
    assert opened.page.locator("table.claims .verdict:visible").count() == len(words)


def test_every_verdict_is_set_in_the_same_type_size_weight_and_colour(opened: Seen) -> None:
    styles = opened.page.evaluate(
        """[...document.querySelectorAll('.verdict')].map(one => {
            const style = getComputedStyle(one)
            return [one.innerText, one.closest('td, article').tagName, [
                style.fontFamily, style.fontSize, style.fontWeight, style.fontStyle, style.color,
                style.backgroundColor].join()] })"""
    )
    for place in ("TD", "ARTICLE"):  # tables, and headings of the claims in full
        here = {(word, style) for word, where, style in styles if where == place}
        assert {word for word, _ in here} >= {"supported", "refuted", "undecided"}
        assert len({style for _, style in here}) == 1


def test_a_heat_map_says_a_cells_number_to_mouse_and_keyboard(opened: Seen) -> None:
    figure = opened.page.locator("figure:has(.maps)").first
    figure.locator("details").evaluate("one => { one.open = true }")
    cells = figure.locator(".map td[tabindex]")
    assert cells.count() > 20
    first, second = cells.nth(5), cells.nth(6)
    assert not first.locator("span").is_visible()
    first.hover()
    assert first.locator("span").is_visible()
    assert "head 1.1, direct effect: " in first.locator("span").inner_text()
    opened.page.mouse.move(0, 0)
    assert not first.locator("span").is_visible()
    first.focus()
    opened.page.keyboard.press("Tab")
    assert not first.locator("span").is_visible()
    assert second.locator("span").is_visible()


def test_what_an_enemy_wrote_into_records_is_text(opened: Seen) -> None:
    assert opened.page.locator("script, [onload], [onerror], img[src='x']").count() == 0
    text = opened.page.locator("body").inner_text()
    assert text.count("<script>alert(1)</script>") > 5
    assert opened.said == []


def test_page_prints_with_what_is_folded_and_without_controls(opened: Seen) -> None:
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = false })")
    folded = page.locator("details.table").first.locator("li, td").first
    assert not folded.is_visible()
    page.emulate_media(media="print")
    assert folded.is_visible()
    assert not page.locator(".filters").is_visible()
    page.set_viewport_size({"width": 700, "height": 1000})  # of A4's text, in pixels
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.pdf().startswith(b"%PDF")
    page.set_viewport_size({"width": 1200, "height": 900})
    page.emulate_media(media="screen")


def test_page_fits_a_narrow_window(opened: Seen) -> None:
    opened.page.set_viewport_size({"width": 400, "height": 800})
    wide = opened.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    opened.page.set_viewport_size({"width": 1200, "height": 900})
    assert wide <= 0
