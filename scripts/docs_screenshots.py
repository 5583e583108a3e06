"""Take the pictures of report.html that README and the docs show, from a run of the quickstart.

    make mine && python scripts/docs_screenshots.py runs/quickstart/report.html

Needs chromium on PATH and playwright (extra test).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, MARGIN = 1100, 32


SHORT = "section:has(#audit), .figures > :nth-child(n+3), .figures ~ *, section:has(#review) > :not(.card)"
"""What the picture in README leaves out, between two figures and an anchor's card."""


def main(report: Path) -> None:
    """Write report.png, report-figures.png and report-review.png."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def opened(height: int, scheme: Literal["light", "dark"], at: str) -> Any:
            page = browser.new_page(viewport={"width": 1100, "height": height}, color_scheme=scheme)
            page.goto(report.absolute().as_uri())
            page.locator(at).first.evaluate("element => element.scrollIntoView()")
            return page

        opened(900, "light", "#figures").screenshot(path=IMAGES / "report-figures.png")
        page = opened(760, "dark", ".card:visible")
        page.keyboard.press("j")
        page.locator(".card:visible input[type=checkbox]").nth(1).check()
        page.screenshot(path=IMAGES / "report-review.png")
        page = opened(1166, "light", "#figures")
        page.add_style_tag(content=f"{SHORT} {{ display: none }}")
        page.locator("#figures").evaluate("element => element.scrollIntoView()")
        page.screenshot(path=IMAGES / "report.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
