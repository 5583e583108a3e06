"""The quickstart data is what its script promises, judged by reading the files and by importing the modules."""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FILES = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv")
# Modules without side effects, whose functions stand in the modules they are found in.
IMPORTABLE = ("argparse", "ast", "fractions", "inspect", "pathlib", "shutil", "statistics", "textwrap", "zipfile")


def make(folder: Path, *, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "negpipe.quickstart", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data") / "quickstart"
    result = make(made)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    return made


def rows(path: Path) -> dict[str, dict[str, str]]:
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_id = {row["_id"]: row for row in read}
    assert len(by_id) == len(read)
    return by_id


def qrels(folder: Path, split: str) -> list[tuple[str, str]]:
    with (folder / "qrels" / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        header, *body = csv.reader(file, dialect="excel-tab")
    assert header == ["query-id", "corpus-id", "score"]
    assert {score for _, _, score in body} == {"1"}
    return [(query, document) for query, document, _ in body]


OF_FEW_MODULES = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from negpipe import quickstart

functions = quickstart.choose(quickstart.stdlib_functions(Path(sys.argv[2])), 150)
Path(sys.argv[3]).mkdir()
quickstart.write_beir(functions, Path(sys.argv[3]))
"""


@pytest.mark.torture
def test_same_python_same_bytes_and_nothing_else(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> None:
    """Of the whole library with --torture, of a few modules without."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == sorted(FILES)
    if request.config.getoption("--torture"):
        assert make(tmp_path / "again", hash_seed="1").returncode == 0
        made = [folder, tmp_path / "again"]
    else:
        (tmp_path / "modules").mkdir()
        for name in ("argparse", "inspect", "shutil", "statistics", "tarfile", "zipfile"):
            shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", tmp_path / "modules")
        made = [tmp_path / "0", tmp_path / "1"]
        for out in made:
            command = [sys.executable, "-c", OF_FEW_MODULES, str(ROOT), str(tmp_path / "modules"), str(out)]
            subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": out.name}, check=True)
    for name in FILES:
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes() != b""


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    result = make(tmp_path)
    assert result.returncode == 2
    assert "remove it" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_counts_and_duplicates(folder: Path) -> None:
    corpus, queries = rows(folder / "corpus.jsonl"), rows(folder / "queries.jsonl")
    assert 1500 <= len(corpus) <= 2500
    assert 1500 <= len(queries) <= 2500
    assert len({row["text"] for row in corpus.values()}) == len(corpus)
    assert len({" ".join(row["text"].split()).casefold() for row in queries.values()}) == len(queries)
    assert all(len(row["text"].split()) >= 4 for row in queries.values())


def test_qrels_know_their_ids_and_split_the_queries(folder: Path) -> None:
    corpus, queries = rows(folder / "corpus.jsonl"), rows(folder / "queries.jsonl")
    train, test = qrels(folder, "train"), qrels(folder, "test")
    pairs = train + test
    assert len(set(pairs)) == len(pairs)
    assert {document for _, document in pairs} == set(corpus)
    assert {query for query, _ in pairs} == set(queries)
    assert not {query for query, _ in train} & {query for query, _ in test}
    assert 0.7 < len({query for query, _ in train}) / len(queries) < 0.9
    assert len(pairs) > len(queries), "some docstrings belong to several functions"


def test_code_is_one_function_without_docstrings(folder: Path) -> None:
    for row in rows(folder / "corpus.jsonl").values():
        (function,) = ast.parse(row["text"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert row["title"].split(".")[-1] == function.name
        assert row["title"].startswith(f"{row['module']}.")
        for node in ast.walk(function):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert ast.get_docstring(node) is None, row["_id"]


def test_queries_are_the_docstrings_python_itself_gives(folder: Path) -> None:
    queries = rows(folder / "queries.jsonl")
    texts: dict[str, set[str]] = {}
    for query, document in qrels(folder, "train") + qrels(folder, "test"):
        texts.setdefault(document, set()).add(queries[query]["text"].casefold())
    compared = 0
    for name, row in rows(folder / "corpus.jsonl").items():
        module, *path = name.split(".")
        if module in IMPORTABLE:
            found: Any = reduce(getattr, path, importlib.import_module(module))
            function = inspect.unwrap(getattr(found, "fget", found))
            summary = (inspect.getdoc(function) or "").split("\n\n")[0]
            assert " ".join(summary.split()).casefold() in texts[name]
            assert set(row["text"].split()) <= set(inspect.getsource(function).split())
            compared += 1
    assert compared >= 50
