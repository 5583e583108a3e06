"""Writes docs/evidence/benchmarks.md from the results in benchmarks/: `python scripts/benchmarks_page.py`.

A result is a JSON file; the page shows them in the order of their names. Its fields, none of them empty: `title`,
`machine`, `versions` (of libraries, by name), `command`, `date` (of the measurement; if nobody noted it, "committed"
and when the figures were first committed) and `results`, a list of Markdown paragraphs and of tables, each with
`columns` and `rows` of texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "evidence" / "benchmarks.md"
FIELDS = ("title", "machine", "versions", "command", "date", "results")
HEAD = """# Benchmarks

<!-- Made by scripts/benchmarks_page.py from benchmarks/*.json. -->

Nothing was measured on a GPU. The machines are shared, and their speed changes by a third from minute to minute.
Competing programs are therefore measured in the same run, and only ratios count. "Aim" and "target" are the goals;
missed goals are listed too. A date with "committed" is the day on which the figures came into this repository: when
they were measured was not noted.
"""


def results() -> list[dict[str, Any]]:
    """All results.

    Raises:
        ValueError: the fields of a file are not `FIELDS`, or one is empty or not noted.
    """
    found = []
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if {*result} != {*FIELDS}:
            raise ValueError(f"{file}: has {', '.join(result)}, but a result has {', '.join(FIELDS)}")
        if missing := [name for name, value in result.items() if not value or "not noted" in value]:
            raise ValueError(f"{file}: {', '.join(missing)}: not noted")
        found.append(result)
    return found


def page() -> str:
    """The complete page in Markdown."""
    lines = [HEAD]
    for result in results():
        lines.append(f"## {result['title']}\n")
        for block in result["results"]:
            lines.append(f"{block}\n" if isinstance(block, str) else _table(block["columns"], block["rows"]))
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        facts = [
            ["versions", versions],
            ["command", f"`{result['command']}`"],
            ["date", result["date"]],
        ]
        lines.append(_table(["machine", result["machine"]], facts))
    return "\n".join(lines).rstrip() + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
