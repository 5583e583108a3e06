"""The words of pages, help, messages, comments and classes: spelling by codespell, words that a reader stumbles over,
and class names with two meanings."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from doc_pages import ROOT

PROSE = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob(".github/**/*.md")}
)
CODE = sorted({*ROOT.glob("negpipe/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("examples/*.py")})
COUNTED = "(negative|positive|row|candidate|text|part|task|token|anchor|document|vector|request|byte)s?|quer(y|ies)"
PER = "anchor|batch|file|part|second|worker|search|task|call|request|run|text|query|document|shard|node|stage"
STUMBLES = {
    r"mend(s|ed|ing)?(?! a puncture)": "fix",
    r"reckon\w*": "estimate",
    r"anew": "again",
    rf"({COUNTED}) an? ({PER})(?! has)": "per anchor",
    r"(?<!there )(is|are|was|were) no (?!more|less|worse|\w+er\b)\w+": "is not",
    r"no(body|ne) of (its|their) own": "none",
    r"told apart": "distinguished",
    r"at hand": "available",
    r"once more": "again",
    r"somebody|whomever": "the process, the user, another run",
    r"taken up again|takes up again": "resumed",
    r"(lies?|lay|lying) (in|on|under|beside|within|together)": "is in",
    r"(stands?|stood) in": "is in, contains",
    # Not where it is an identifier, nor in a model's card, whose bytes are those of a finished stage.
    r"whole(?![\"':]| numbers?\b| corpus\"$)": "entire",
    r"told once": "one warning",
    r"befall\w*|lest|thereof|therein|whereof": "standard English",
}


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page outside of blocks of code."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield number, re.sub(r"`[^`]*`", "``", line)


def said(module: Path) -> Iterator[tuple[int, str]]:
    """Comments and strings of a module, without the identifiers in them, with their lines."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(module.read_text(encoding="utf-8")).readline):
        if token.type in kinds:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, re.sub(r"`[^`]*`|\{[^{}]*\}", "``", line)


@cache
def lines() -> list[tuple[str, str]]:
    """All of them, each with its file and line."""
    read = [(path, *found) for path in PROSE for found in prose(path)]
    read += [(path, *found) for path in CODE for found in said(path)]
    return [(f"{path.relative_to(ROOT)}:{number}", line) for path, number, line in read]


@pytest.mark.parametrize("pattern", STUMBLES)
def test_words_that_a_reader_stumbles_over(pattern: str) -> None:
    word = re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    found = [f"{place}: {line.strip()}" for place, line in lines() if word.search(line)]
    assert not found, f"better: {STUMBLES[pattern]}\n" + "\n".join(found)


def test_texts_of_guarantees_and_benchmarks_are_among_the_lines() -> None:
    read = {place.partition(":")[0]: line for place, line in lines() if line.startswith("|")}
    assert {"docs/evidence/guarantees.md", "docs/evidence/benchmarks.md"} <= {*read}


def test_spelling() -> None:
    # "te" and "tread" are words of cranfield's abstracts, "modell" and the like typing errors that tests make.
    words = [sys.executable, "-m", "codespell_lib", "--ignore-words-list", "te,tread", *map(str, [*PROSE, *CODE])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_class_name_means_one_thing() -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for path in ROOT.glob("negpipe/**/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(str(path.relative_to(ROOT)))
    assert len(modules) > 100
    assert not {name: places for name, places in modules.items() if len(places) > 1}
