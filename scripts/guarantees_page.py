"""Writes docs/evidence/guarantees.md from the marked tests: `python scripts/guarantees_page.py`.

`@pytest.mark.guarantee(WHEN, THEN)` on a test, or in a file's `pytestmark`, states a promise of negpipe and that this
test verifies it. If several tests verify a promise, one states it in full and the others repeat only WHEN.
`section="input"` puts it into another table. The source is read, not run: the page can only name tests that exist.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence" / "guarantees.md"
BEGIN, END = "<!-- guarantees: made by scripts/guarantees_page.py -->\n", "<!-- /guarantees -->"
SECTIONS = {
    "runs": ("When something happens to a run", "when"),
    "input": ("Whatever the input", "input"),
    "rows": ("What the rows are", "promise"),
}


@dataclass
class Guarantee:
    """A promise, and the tests that verify it."""

    when: str
    then: str = ""
    section: str = ""
    tests: list[str] = field(default_factory=list)


def guarantees(folder: Path = ROOT / "tests") -> dict[str, Guarantee]:
    """All promises by WHEN, in the order of the files that state them in full.

    Raises:
        ValueError: a promise is stated in full by no test or by two, or its section does not exist.
    """
    found: dict[str, Guarantee] = {}
    for file in sorted(folder.rglob("test_*.py")):
        for test, mark in _marks(file):
            when, *then = [ast.literal_eval(argument) for argument in mark.args]
            promise = found.setdefault(when, Guarantee(when))
            promise.tests.append(f"{file.relative_to(folder)}{test}")
            if then and promise.then:
                raise ValueError(f"{file}: '{when}' is also stated in full by another test")
            if then:
                promise.then = then[0]
                named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}
                promise.section = named.get("section", "runs")
    for promise in found.values():
        if promise.section not in SECTIONS:
            raise ValueError(f"{promise.tests}: '{promise.when}' is stated in full by no test, or of unknown section")
    return found


def page() -> str:
    """The page with the tables between its markers."""
    lines = []
    for section, (title, head) in SECTIONS.items():
        lines += [f"## {title}\n", f"| {head} | what happens | tests |", "|---|---|---|"]
        for promise in sorted(guarantees().values(), key=lambda one: one.when.casefold().lstrip("…`")):
            if promise.section == section:
                tests = "<br>".join(f"`{test}`" for test in promise.tests)
                lines.append(f"| {promise.when} | {promise.then} | {tests} |")
        lines.append("")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + "\n".join(lines) + END + rest.split(END, 1)[1]


def _marks(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each mark, followed by `::test`, or by nothing if it is the file's."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            marked, test = node.decorator_list, f"::{node.name}"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marked, test = node.value.elts if isinstance(node.value, ast.List) else [node.value], ""
        else:
            continue
        for mark in marked:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.guarantee":
                yield test, mark


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
