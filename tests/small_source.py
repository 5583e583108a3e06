"""A small BEIR folder with vectors beside it, its config, and the command line run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from negpipe import cli
from negpipe.store.files import file_digest

DOCUMENTS, QUERIES, DIMENSION = 40, 12, 8


def documents(count: int = DOCUMENTS) -> list[dict[str, Any]]:
    return [{"_id": f"d{i}", "title": f"Title {i}", "text": f"document {i}"} for i in range(count)]


def queries(count: int = QUERIES) -> list[dict[str, Any]]:
    return [{"_id": f"q{i}", "text": f"query {i}"} for i in range(count)]


def judgments(count: int = QUERIES) -> list[tuple[str, str, int]]:
    return [(f"q{i}", f"d{3 * i}", 1) for i in range(count)]


def vectors(count: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_qrels(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in (("query-id", "corpus-id", "score"), *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(folder: Path, corpus: list[Any] | None = None, asked: list[Any] | None = None) -> Path:
    """Write source, vectors and config; returns the config. Vectors: one a row, drawn by row."""
    corpus, asked = corpus or documents(), asked or queries()
    write_rows(folder / "data/corpus.jsonl", corpus)
    write_rows(folder / "data/queries.jsonl", asked)
    write_qrels(folder / "data/qrels/train.tsv", judgments())
    np.save(folder / "corpus.npy", vectors(len(corpus), 1))
    np.save(folder / "anchors.npy", vectors(len(asked), 2))
    return write_config(folder)


def settings(folder: Path) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "data": {"path": str(folder / "data"), "part_rows": 8},
        "encoder": {
            "backend": "precomputed",
            "corpus_vectors": str(folder / "corpus.npy"),
            "anchor_vectors": str(folder / "anchors.npy"),
        },
        "mining": {"range_max": 10, "relative_margin": None},
        "output": {"report": False},
        "executor": {"kind": "inline"},
        "resources": {"cpus": 1},
    }


def write_config(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder), sort_keys=False), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(*arguments: object) -> Outcome:
    """`negpipe ARGUMENTS`, in this process; what it changes in the process is put back."""
    root, package = logging.getLogger(), logging.getLogger("negpipe")
    handlers, levels, argv = root.handlers[:], (root.level, package.level), sys.argv
    handler = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    sys.argv = ["negpipe", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])
    return Outcome(code, out.getvalue(), err.getvalue())


def made(run_dir: Path) -> dict[str, str]:
    """Digest of every file that a run made, by path; the lock, logs and the cache of digests left out."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    books = run_dir / ".negpipe"
    kept = (path for path in files if path.parent not in (books, books / "logs"))
    return {str(path.relative_to(run_dir)): file_digest(path) for path in kept}


def output(run_dir: Path) -> dict[str, str]:
    """The same for data files alone."""
    return {name: digest for name, digest in made(run_dir).items() if not name.startswith(".negpipe/")}
