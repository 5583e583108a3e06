"""The quickstart: its config, and its data, the Python standard library as a code search task in a BEIR folder.

A document is a function or method of the running Python's standard library: its source, exactly as
written, without docstrings; its title is its dotted name, and `module` is its module. The name is in the
source anyway (`def dedent(`), and makes the mined rows easy to recognize. A query is the first paragraph of
a docstring, and its positives are the functions with that docstring.

Guaranteed:
- No module is imported, nothing is downloaded, and one Python version always gives the same bytes. The
  choice of functions depends on a digest of their names, so that other versions give nearly the same choice.
  - No two documents have the same source, no two queries the same text (ignoring case and whitespace).
  Functions with the same source are one document, under the name of the first, which answers all their
  docstrings; functions with the same docstring make one query with several positives.
- Every document has at least one query. Queries are split about 80 : 20 into train and test.
- The folder is written atomically.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import logging
import os
import sysconfig
import textwrap
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from negpipe.store.files import growing

logger = logging.getLogger(__name__)

CONFIG = Path(__file__).with_suffix(".yaml")
"""The config of the first run, the same as in configs/."""
DATA = Path("data/quickstart")
"""The path of the data in that config."""
_DOCUMENTS = 2000

# Tests and demos are not library code; the rest is not in every Python installation.
SKIPPED_FOLDERS = {
    *("test", "tests", "turtledemo", "__pycache__"),
    *("site-packages", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3"),
}
SOURCE_LINES = range(5, 61)
SUMMARY_WORDS = range(4, 41)


@dataclass(frozen=True)
class Function:
    """A function of the standard library.

    Attributes:
        name: dotted, for example `json.decoder.JSONDecoder.decode`.
        module: its module, for example `json.decoder`.
        source: its lines, decorators first, without indentation and docstrings.
        summary: first paragraph of its docstring, on one line.
    """

    name: str
    module: str
    source: str
    summary: str


Definition = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_functions(stdlib: Path) -> Iterator[Function]:
    """Documented functions and methods of suitable length, by module path and line; names are unique."""
    seen = set()
    for path in _modules(stdlib):
        with tokenize.open(path) as file:
            text = file.read()
        lines = text.split("\n")  # not splitlines, which also splits at form feeds, unlike the parser
        parts = path.relative_to(stdlib).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, node in _definitions(ast.parse(text), module):
            summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if name in seen or len(summary.split()) not in SUMMARY_WORDS:
                continue
            source = _without_docstrings(node, lines)
            if source is not None:
                seen.add(name)
                yield Function(name, module, source, summary)


def _modules(stdlib: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _definitions(scope: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Functions and methods with their names. Inner functions remain part of the outer one."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}.{node.name}")
        elif isinstance(node, Definition):
            yield f"{prefix}.{node.name}", node


def _without_docstrings(function: Definition, lines: list[str]) -> str | None:
    """The function's source without docstrings; None if its length is unsuitable, or if more than docstrings would go.

    Also removes the docstrings from `function`.
    """
    dropped: set[int] = set()
    for node in ast.walk(function):
        # A string after a docstring becomes the docstring when that is removed.
        while isinstance(node, Definition | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body.pop(0)
            dropped.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    kept = [lines[row - 1] for row in range(first, (function.end_lineno or 0) + 1) if row not in dropped]
    if len(kept) not in SOURCE_LINES:
        return None
    source = textwrap.dedent("\n".join(kept))
    try:
        parsed = ast.parse(source).body
    except SyntaxError:
        return None
    return source if [ast.dump(node) for node in parsed] == [ast.dump(function)] else None


def choose(functions: Iterable[Function], count: int) -> list[list[Function]]:
    """At most `count` documents, each the list of functions that share its source, in the order found."""
    by_source: dict[str, list[Function]] = defaultdict(list)
    for function in functions:
        by_source[function.source].append(function)
    chosen = {group[0].name for group in sorted(by_source.values(), key=lambda group: _digest(group[0].name))[:count]}
    return [group for group in by_source.values() if group[0].name in chosen]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write_beir(documents: list[list[Function]], folder: Path) -> int:
    """Write the BEIR files into an existing folder; return the number of queries."""
    queries: dict[str, Function] = {}
    positives: dict[str, dict[str, None]] = defaultdict(dict)
    for group in documents:
        for function in group:
            query = queries.setdefault(function.summary.casefold(), function)
            positives[query.name][group[0].name] = None

    firsts = (group[0] for group in documents)
    corpus = ((one.name, {"title": one.name, "text": one.source, "module": one.module}) for one in firsts)
    _write_jsonl(folder / "corpus.jsonl", corpus)
    _write_jsonl(folder / "queries.jsonl", ((f"q:{q.name}", {"text": q.summary}) for q in queries.values()))
    (folder / "qrels").mkdir()
    for split in ("train", "test"):
        with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, dialect="excel-tab", lineterminator="\n")
            writer.writerow(["query-id", "corpus-id", "score"])
            for name, found in positives.items():
                if split == ("test" if _digest(f"q:{name}")[0] % 5 == 0 else "train"):
                    writer.writerows([f"q:{name}", document, 1] for document in found)
    return len(queries)


def _write_jsonl(path: Path, rows: Iterable[tuple[str, dict[str, str]]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for key, row in rows:
            file.write(json.dumps({"_id": key, **row}, ensure_ascii=False) + "\n")


def write(folder: Path, count: int = _DOCUMENTS) -> None:
    """Create the folder, which must not exist, with at most `count` documents."""
    documents = choose(stdlib_functions(Path(sysconfig.get_path("stdlib"))), count)
    with growing(folder, single=False) as unfinished:
        queries = write_beir(documents, unfinished)
    logger.info("%s: %d functions of the standard library, %d queries", folder, len(documents), queries)


def main() -> None:
    """The command line: python -m negpipe.quickstart OUT_DIR."""
    parser = argparse.ArgumentParser(description="Write the Python standard library as a BEIR code search task.")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="folder to create; it must not exist")
    parser.add_argument("--count", type=int, default=_DOCUMENTS, help="maximum documents (default: %(default)s)")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} already exists: remove it to create it again")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(args.folder, args.count)


if __name__ == "__main__":
    main()
