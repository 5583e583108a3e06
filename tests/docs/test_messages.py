"""All messages, printed as templates to be read as a stranger would: `pytest -s tests/docs/test_messages.py`."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache

import pytest
from doc_pages import ROOT

from negpipe import errors

NAMED = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)}
LOGGED = {"debug", "info", "warning", "error"}
MAKERS = {"ValueError", "BadParameter", "RowError", "_wrong", "_problem", "_refusal", "broken"}
"""What else makes an error of a message: two exceptions of libraries, one of rows, and helpers of some modules."""


def template(node: ast.expr) -> str:
    """A message with `{…}` for what is only known when it is said; empty if nothing of it is known."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "{…}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "{…}") + (template(node.right) or "{…}")
    if isinstance(node, ast.IfExp):
        return " | ".join(filter(None, map(template, (node.body, node.orelse))))
    return ""


def spoken(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Errors that are made and lines that are logged: kind, line and template."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        logs = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "logger" and name in LOGGED
        if logs or name in NAMED or name in MAKERS:
            said = " · ".join(filter(None, map(template, [*node.args, *(one.value for one in node.keywords)])))
            if said.strip(" {…}·:"):
                yield ("log" if logs else name), node.lineno, said


@cache
def messages() -> list[tuple[str, str, str]]:
    """All of the package: kind, place and template."""
    return [
        (kind, f"{path.relative_to(ROOT)}:{line}", said)
        for path in sorted(ROOT.glob("negpipe/**/*.py"))
        for kind, line, said in sorted(spoken(ast.parse(path.read_text(encoding="utf-8"))), key=lambda one: one[1])
    ]


def test_all_messages_are_printed() -> None:
    sys.stdout.writelines(f"{place:52} {kind:14} {said}\n" for kind, place, said in messages())
    assert len({kind for kind, *_ in messages()}) > 8 and len(messages()) > 400


FORM = {
    "no end of a sentence: another message often follows": r"\A[^\n]*[^.\n]\.\Z",
    "nobody is shouted at": r"!(?!=)|\bplease\b|\bsorry\b|\boops\b",
    "a space too many": r"(?<=\S)  +(?=\S)| ,| \.(?=\s)",
}


@pytest.mark.parametrize("fault", FORM)
def test_the_form_of_messages(fault: str) -> None:
    found = [f"{place}: {said}" for _, place, said in messages() if re.search(FORM[fault], said)]
    assert not found, "\n".join(found)
