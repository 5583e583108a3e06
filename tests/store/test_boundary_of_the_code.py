"""Only `negpipe/store` knows what a file system does when files are published, locked or mapped, or reads vectors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import negpipe

PACKAGE = Path(negpipe.__file__).parent
OF_THE_STORE = {"rename", "fsync", "flock", "lockf", "symlink", "symlink_to", "hardlink_to"}
OF_THE_STORE |= {"memory_map", "memmap", "mmap"}
KEYWORDS = {"mmap_mode", "memory_map"}
MODULES = {"fcntl", "mmap", "filelock"}
READERS = {
    PACKAGE / "ann/vectors.py": "fromfile",  # vectors, for all others
    PACKAGE / "ann/exact.py": "load",  # its checkpoint: several arrays in one file, none of which is vectors
}


def uses(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in OF_THE_STORE:
            yield f"{node.attr}, line {node.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in ("replace", "link"):
                yield f"os.{node.attr}, line {node.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
            if node.attr in ("load", "fromfile"):
                yield f"np.{node.attr}, line {node.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shutil":
            if node.attr == "move":
                yield f"shutil.move, line {node.lineno}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
            if (
                len(node.args) == 1 and not node.keywords
            ):  # a text's has two, those of dataclasses and columns have names
                yield f"replace, line {node.lineno}"
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            yield f"{node.arg}, line {node.value.lineno}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {name.name for name in node.names} | {getattr(node, "module", None)}
            yield from (f"import of {name}, line {node.lineno}" for name in names & MODULES)


def test_nothing_outside_the_store_publishes_locks_or_maps() -> None:
    outside = [path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "store")]
    assert len(outside) > 100
    found = [(path, use) for path in outside for use in uses(path.read_text(encoding="utf-8"))]
    assert sorted(path for path, use in found) == sorted(READERS), found
    assert all(use.startswith(f"np.{READERS[path]},") for path, use in found), found


USES = ["os.replace(a, b)", "p.rename(b)", "os.fsync(h)", "import fcntl", "np.load(p, mmap_mode='r')", "np.memmap(p)"]
USES += ["np.load(p)", "np.fromfile(p)", "p.replace(q)", "shutil.move(p, q)", "pq.read_table(p, memory_map=True)"]


@pytest.mark.parametrize("line", USES)
def test_the_check_sees(line: str) -> None:
    assert list(uses(line))
