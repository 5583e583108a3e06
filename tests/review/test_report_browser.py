"""report.html in a real browser: it renders, in light, dark and on a phone; marks are made and saved; nothing of the
data is run. Skipped where there is no chromium; `.ci/browser` installs it where it can."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import reviewed_run
from small_source import run as negpipe

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip(f"no browser on PATH, looked for {', '.join(NAMES)}: .ci/browser installs Debian's chromium")
    from playwright.sync_api import sync_playwright

    # A root user, as in containers, has no sandbox to give.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=binary, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviewed")
    config = reviewed_run.build(folder)
    options = ["--near-anchors", "0.1", "--range-min", "0", "--relative-margin", "none", "--absolute-margin", "none"]
    for words in (["mine", config], ["calibrate", config, *options], ["report", config]):
        done = negpipe(*words)
        assert done.code == 0, done.err
    return folder


@dataclass
class Opened:
    """A page, what its console said, and what it asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Any]:
    """Opens the report; every page is closed at the end, and must have been silent."""
    pages: list[Opened] = []

    def open_page(**options: Any) -> Any:
        made = Opened(browser.new_page(**options))
        pages.append(made)
        made.page.on("console", lambda message: made.said.append(message.text))
        made.page.on("pageerror", lambda error: made.said.append(str(error)))
        made.page.on("dialog", lambda dialog: made.said.append(dialog.message))
        made.page.on("request", lambda request: made.asked.append(request.url))
        made.page.goto((folder / "run/report.html").as_uri())
        return made.page

    yield open_page
    for made in pages:
        assert made.said == []
        assert {url.rpartition("/")[2] for url in made.asked if not url.startswith(("data:", "blob:"))} == {
            "report.html"
        }
        assert all(url.startswith(("file:", "data:", "blob:")) for url in made.asked)
        made.page.close()


def mined(folder: Path) -> set[tuple[str, str]]:
    rows = [row for path in (folder / "run/triplets").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {(row["anchor_id"], row["negative_id"]) for row in rows}


def saved(page: Any, how: Any, to: Path) -> list[tuple[str, str]]:
    """Pairs of the file that is saved, in order."""
    with page.expect_download() as download:
        how()
    assert download.value.suggested_filename == "verdicts.jsonl"
    download.value.save_as(to)
    rows = [json.loads(line) for line in to.read_bytes().decode("utf-8").split("\n") if line]
    return [(row["anchor_id"], row["document_id"]) for row in rows]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 375), ("dark", 375)], ids=str)
def test_it_renders(opened: Any, scheme: str, width: int) -> None:
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 800})
    boxes = [figure.bounding_box() for figure in page.locator("figure svg").all()]
    assert len(boxes) == 7
    assert all(box["width"] > 250 and box["height"] > 150 for box in boxes)
    assert page.locator("figure svg path").count() > 50
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Letters stand out from the paper, in figures too (WCAG asks for 4.5).
    contrast = """(place) => {
        const shine = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map((c) => c / 255)
                .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const found = getComputedStyle(document.querySelector(place));
        const svg = document.querySelector(place) instanceof SVGElement;
        const paper = shine(getComputedStyle(document.body).backgroundColor);
        const ink = shine(svg ? found.fill : found.color);
        return (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05);
    }"""
    for place in ("figure svg text", "body", "figcaption", ".about", ".soft", "nav a"):
        assert page.evaluate(contrast, place) > 4.5, place
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")


def test_figures_and_marks_are_seen_as_they_stand_in_the_file(opened: Any, folder: Path) -> None:
    """Lengths of bars and colours of marks as the browser draws them; what they should be is in test_report_values."""
    page = opened(viewport={"width": 1200, "height": 800})
    counts = Counter(name for _, name in mined(folder))
    wanted = [sum(low <= count < 2 * low for count in counts.values()) for low in (1, 2, 4, 8)]
    wanted = wanted[: max(counts.values()).bit_length()]
    hubs = page.locator("figure", has_text="Hubs").locator("svg")
    texts = hubs.locator("text").all_text_contents()
    assert texts[-len(wanted) :] == [str(count) for count in wanted]
    bars = [bar.bounding_box() for bar in hubs.locator("path[style*='--orange']").all()]
    highest = max(bar["height"] for bar in bars)
    assert highest > 50
    assert [bar["height"] for bar in bars] == pytest.approx([highest * n / max(wanted) for n in wanted], abs=1)
    assert len({round(bar["y"] + bar["height"]) for bar in bars}) == 1, "they stand on one line"
    colour = "one => getComputedStyle(one).backgroundColor"
    marks = {kind: page.locator(f"article mark.{kind}") for kind in ("anchor", "positive")}
    shown = page.locator("article.card").first.evaluate(colour)
    assert marks["anchor"].count() > 20
    legend = page.locator("#review ~ p mark")
    colours = [legend.nth(at).evaluate(colour) for at in (0, 1)]
    assert len({*colours, shown, page.locator("body").evaluate(colour)}) >= 3
    for kind, its in zip(marks, colours, strict=True):
        assert {mark.evaluate(colour) for mark in marks[kind].all()[:30]} <= {its}
    assert marks["anchor"].first.is_visible()


def test_what_the_data_hold_is_not_run(opened: Any) -> None:
    page = opened()
    page.wait_for_timeout(200)
    assert page.evaluate("window.harmed === undefined")
    assert page.locator("main script, main img, main iframe, article svg").count() == 0
    text = page.locator("main").text_content()
    assert "<script>window.harmed = 1</script>" in text and "{{ 7 * 7 }}" in text


def test_marking_by_keys(opened: Any, tmp_path: Path, folder: Path) -> None:
    page = opened()
    boxes = page.locator(".negative input")
    assert boxes.count() == 150
    page.keyboard.press("j")
    assert boxes.nth(0).evaluate("box => box === document.activeElement")
    assert page.locator(".negative").nth(0).evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    for key in "xjjxkxx":
        page.keyboard.press(key)
    assert [at for at, box in enumerate(boxes.evaluate_all("boxes => boxes.map((box) => box.checked)")) if box] == [
        0,
        2,
    ]
    assert page.locator("#marked").text_content().startswith("2 of 150 negatives marked")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("x")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("e")
    assert page.locator("#whole").get_attribute("aria-pressed") == "true"
    pairs = saved(page, lambda: page.keyboard.press("s"), tmp_path / "verdicts.jsonl")
    assert len(pairs) == 2 and set(pairs) <= mined(folder)
    assert page.locator("#saved").text_content() == "Saved 2 pairs as verdicts.jsonl, in the download folder."


def test_the_bar_stays_in_front_of_cards(opened: Any) -> None:
    page = opened(viewport={"width": 1280, "height": 900})
    for number in range(3):
        page.locator(".card header").nth(number).evaluate(
            "header => scrollTo(0, header.getBoundingClientRect().top + scrollY - innerHeight + 40)"
        )
        page.locator("#keys").click(timeout=5000)
        page.keyboard.press("Escape")


def test_marks_outlive_the_page(opened: Any) -> None:
    page = opened()
    page.locator(".negative label").nth(4).click()
    page.reload()
    assert page.locator(".negative input:checked").count() == 1
    assert page.locator(".negative input").nth(4).is_checked()


def test_from_clicks_to_rows_without_them(opened: Any, tmp_path: Path, folder: Path) -> None:
    """Every harmful id goes out by the page and comes back by the file, letter for letter."""
    page = opened()
    before = mined(folder)
    boxes = page.locator(".negative input")
    shown = boxes.evaluate_all("boxes => boxes.map((box) => JSON.parse(box.dataset.document))")
    harmful = [at for at, name in enumerate(shown) if any(harm in name for harm in reviewed_run.HARM)]
    assert len(harmful) > 3
    for at in harmful:
        boxes.nth(at).click()
    verdicts = tmp_path / "verdicts.jsonl"
    pairs = set(saved(page, page.locator("#save").click, verdicts))
    assert len(pairs) == len(harmful) and pairs <= before
    settings = ["--set", f"mining.exclude_file={verdicts}", "--set", f"run_dir={tmp_path / 'run'}"]
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    done = negpipe("mine", folder / "config.yaml", *settings)
    assert done.code == 0 and "search: up to date" in done.err and "triplets: done" in done.err
    assert not mined(tmp_path) & pairs
    assert "excluded file" in done.out
    # The next report keeps what was said before.
    page.goto((tmp_path / "run/report.html").as_uri())
    page.locator(".negative input").nth(0).check()
    again = saved(page, page.locator("#save").click, verdicts)
    assert set(again[:-1]) == pairs and again[-1] not in pairs and len(again) == len(pairs) + 1
