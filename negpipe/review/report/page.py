"""The page: one HTML file that makes no network requests and only runs its own script.

All data is escaped: by Jinja in text and attributes, as JSON with `<` escaped where the script
reads it. The Content-Security-Policy allows only this script, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from negpipe.review.wording import size

if TYPE_CHECKING:
    from negpipe.review.report.gather import Report

_ASSETS = files("negpipe.review.report") / "assets"


def render(made: Report) -> str:
    """Render the report as HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = size
    script, style, template = (
        (_ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", "page.css", "page.html.j2")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.from_string(template)
    return page.render(made=made, script=script, script_hash=f"sha256-{digest}", style=Markup(style))
