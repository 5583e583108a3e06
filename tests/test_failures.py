"""Every failure is one short paragraph for a person, and an error code with an exit code for a scheduler."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_source as small

from negpipe import errors, pipeline
from negpipe.config import load_config
from negpipe.errors import NegpipeError
from negpipe.lock import run_lock

Arguments = list[str]
Provoke = Callable[[Path], Iterator[Arguments]]


def classes(kind: type[NegpipeError] = NegpipeError) -> Iterator[type[NegpipeError]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from classes(inner)


def config_error(folder: Path) -> Iterator[Arguments]:
    yield ["mine", "--set", "mining.num_negativs=3"]


def input_error(folder: Path) -> Iterator[Arguments]:
    path = folder / "data/corpus.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    yield ["mine"]


def missing_stage(folder: Path) -> Iterator[Arguments]:
    yield ["search"]


def storage_error(folder: Path) -> Iterator[Arguments]:
    (folder / "run").write_text("", encoding="utf-8")
    yield ["mine"]


def locked(folder: Path) -> Iterator[Arguments]:
    with run_lock(folder / "run"):
        yield ["mine"]


def damaged(folder: Path) -> Iterator[Arguments]:
    pipeline.mine(load_config(str(folder / "config.yaml")), only="ingest")
    path = next((folder / "run/ingest").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    yield ["verify"]


def failed_audit(folder: Path) -> Iterator[Arguments]:
    pipeline.mine(load_config(str(folder / "config.yaml")))
    yield ["audit", "--fail-on", "shortage=0", "--negatives", "39"]


def usage(folder: Path) -> Iterator[Arguments]:
    yield ["mine", "--no-such-option"]


def unexpected(folder: Path) -> Iterator[Arguments]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("negpipe.pipeline.run_lock", lambda _: 1 / 0)
        yield ["mine"]


# code: how it is provoked, the exit code, and words for where it is and what to do
FAILURES: dict[str, tuple[Provoke, int, list[str]]] = {
    "config": (config_error, 2, ["mining.num_negativs: unknown key", "Did you mean"]),
    "input": (input_error, 3, ["corpus.jsonl, row 41: broken JSON", "Write one JSON object a line"]),
    "missing-stage": (missing_stage, 3, ["search needs the output of ingest", "negpipe ingest", "first"]),
    "storage": (storage_error, 1, ["cannot write", "run", "then run the same command again"]),
    "locked": (locked, 4, ["run is in use by process", str(os.getpid()), "wait for it or stop it"]),
    "damaged": (damaged, 5, ["files in", "are damaged", "--repair"]),
    "failed": (failed_audit, 1, ["the audit of", "failed: shortage"]),
    "usage": (usage, 2, ["No such option"]),
    "unexpected": (unexpected, 1, ["unexpected ZeroDivisionError", "This is a bug", "--debug"]),
}
ELSEWHERE = {
    "task-failed": "test_crash.py: workers that are killed",
    "vanished": "test_crash.py: files that are taken away",
    "recall": "where an approximate index misses its recall",
}


@pytest.mark.parametrize("code", FAILURES)
def test_a_failure_is_short_for_people_and_structured_for_schedulers(code: str, tmp_path: Path) -> None:
    provoke, exit_code, words = FAILURES[code]
    config = small.build(tmp_path)
    for verb, *options in provoke(tmp_path):
        plain = small.run(verb, config, *options)
        debug = small.run(verb, config, *options, "--debug") if code != "usage" else None
        machine = small.run(verb, config, *options, "--log-format", "json")
    assert plain.code == exit_code
    at = plain.err.index("negpipe: ")
    message = plain.err[at:].removeprefix("negpipe: ").rstrip("\n")
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in plain.err
    assert len(message) < 900
    assert "\n\n" not in message
    if debug is not None:
        assert "Traceback (most recent call last)" in debug.err
        assert debug.code == exit_code
    lines = [json.loads(line) for line in machine.err.splitlines()]
    assert (lines[-1]["level"], lines[-1]["error"], lines[-1]["exit_code"]) == ("error", code, exit_code)
    assert [word for word in words if word not in lines[-1]["message"]] == []
    assert machine.code == exit_code
    assert "trace" not in lines[-1]


def test_no_class_of_errors_is_forgotten() -> None:
    codes = {kind.code for kind in classes() if kind.__module__ == errors.__name__}
    assert codes - FAILURES.keys() == ELSEWHERE.keys()
    assert len({kind.code for kind in classes()}) == len(list(classes()))


def test_every_class_comes_back_from_a_worker_as_it_was() -> None:
    for kind in classes():
        back = errors.error_of(errors.message_of(kind("what. where. what to do")))
        assert (type(back), str(back)) == (kind, "what. where. what to do")


def test_the_exit_codes_of_the_help_are_those_of_the_errors() -> None:
    shown = re.sub(r"\s+", " ", small.run("--help").out.replace("│", ""))
    kinds: list[type[NegpipeError]] = [NegpipeError, *classes()]
    for kind in kinds:
        assert re.search(rf"\b{kind.exit_code} (failed|usage or config|bad input|run directory in use|damaged)", shown)
