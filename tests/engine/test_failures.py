"""Every failure is one short paragraph for a person, and an error code with an exit code for a scheduler."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_source as small
import typer

from negpipe import cli, errors, graph
from negpipe.config.file import load_config
from negpipe.errors import NegpipeError
from negpipe.store.lock import run_lock

pytestmark = pytest.mark.guarantee(
    "anything fails",
    "one paragraph; `--debug` for the trace; with `--log-format json`, which every command but `config "
    "schema` takes, one object with a code",
    section="input",
)

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


def memory_error(folder: Path) -> Iterator[Arguments]:
    rows = [{"_id": f"d{i}", "text": f"{i} " + "a long text " * 5_000} for i in range(200)]
    small.write_rows(folder / "data/corpus.jsonl", rows)
    yield ["mine", "--set", "resources.memory_budget=64MiB", "--set", "data.part_rows=1000"]


def missing_stage(folder: Path) -> Iterator[Arguments]:
    yield ["search"]


def storage_error(folder: Path) -> Iterator[Arguments]:
    (folder / "run").write_text("", encoding="utf-8")
    yield ["mine"]


def locked(folder: Path) -> Iterator[Arguments]:
    with run_lock(folder / "run"):
        yield ["mine"]


def damaged(folder: Path) -> Iterator[Arguments]:
    graph.mine(load_config(str(folder / "config.yaml")), only="ingest")
    path = next((folder / "run/ingest").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    yield ["verify"]


def failed_audit(folder: Path) -> Iterator[Arguments]:
    graph.mine(load_config(str(folder / "config.yaml")))
    yield ["audit", "--fail-on", "shortage=0", "--negatives", "39"]


def recall(folder: Path) -> Iterator[Arguments]:
    small.build(folder, corpus=small.documents(100))
    kind = ("index.kind=IVF2,Flat", "index.nprobe=1", "index.min_recall=1")
    yield ["mine", *(word for setting in kind for word in ("--set", setting))]


def rows(folder: Path) -> Iterator[Arguments]:
    yield ["mine", "--set", "mining.max_score=-1"]
    yield ["mine", "--set", "mining.max_score=-1"]  # also where nothing is to be done


def task_failed(folder: Path) -> Iterator[Arguments]:
    """Every worker is killed as it starts."""
    (folder / "sitecustomize.py").write_text("import os\n\nos.kill(os.getpid(), 9)\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield ["mine", "--set", "executor.kind=local", "--set", "executor.workers=2"]


def usage(folder: Path) -> Iterator[Arguments]:
    yield ["mine", "--no-such-option"]


def unexpected(folder: Path) -> Iterator[Arguments]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("negpipe.engine.pipeline.run_held", lambda *_, **__: 1 / 0)
        yield ["mine"]


# code: how it is provoked, the exit code, and words for where it is and what to do
FAILURES: dict[str, tuple[Provoke, int, list[str]]] = {
    "config": (config_error, 2, ["mining.num_negativs: unknown key", "Did you mean"]),
    "memory": (
        memory_error,
        2,
        ["needs", "MiB per worker, 32 are available: raise", "or lower data.part_rows"],
    ),
    "input": (input_error, 3, ["corpus.jsonl, row 41: broken JSON", "Write one JSON object per line"]),
    "missing-stage": (missing_stage, 3, ["search needs the output of ingest", "negpipe ingest", "first"]),
    "storage": (storage_error, 1, ["cannot write", "run", "then run the same command again"]),
    "locked": (locked, 4, ["run is in use by process", str(os.getpid()), "wait for it or stop it"]),
    "damaged": (damaged, 5, ["files in", "are damaged", "--repair"]),
    "failed": (failed_audit, 1, ["the audit of", "failed: shortage"]),
    "recall": (recall, 1, ["does not reliably reach index.min_recall 1.0", "nprobe 1: recall 0.", "kind: stream"]),
    "rows": (rows, 1, ["0 rows, but output.min_rows is 1", "mining.max_score", "output.min_rows=0"]),
    "task-failed": (task_failed, 1, ["encode: the worker for part", "died 3 times", "signal SIGKILL", "Its log, "]),
    "usage": (usage, 2, ["No such option"]),
    "unexpected": (unexpected, 1, ["unexpected ZeroDivisionError", "This is a bug", "--debug"]),
}
ELSEWHERE = {
    "vanished": "test_rivals.py::test_a_worker_refuses_manifests…",
    "missing-parts": "test_shards.py::test_commit_names_what_is_missing",
    "versions": "test_shards.py::test_other_versions_of_libraries_within_a_run_are_refused",
}


@pytest.mark.slow
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


# Every verb but those that run stages, which FAILURES has; with what makes it fail before it reads anything.
READERS = (
    *("audit", "calibrate", "clean", "config check", "config show", "explain"),
    *("export", "plan", "quality", "report", "status", "verify"),
)
MORE = {"explain": ["--anchor", "q1"], "export": ["--to", "nemo", "--out", "nowhere"]}


@pytest.mark.parametrize("verb", READERS)
def test_every_verb_tells_schedulers_what_went_wrong(verb: str, tmp_path: Path) -> None:
    command = [*verb.split(), small.build(tmp_path), *MORE.get(verb, []), "--set", "mining.num_negativs=3"]
    told(small.run(*command, "--log-format", "json"), "config", 2, "mining.num_negativs: unknown key")
    told(small.run(*command[:-2], "--log-format", "jsonl"), None, 2, "--log-format jsonl: expected plain or json")


def test_reading_a_run_that_is_not_there_or_damaged_tells_schedulers(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    as_json = ("--log-format", "json")
    told(small.run("explain", config, "--anchor", "q1", *as_json), "missing-stage", 3, "explain needs the output of")
    told(small.run("report", config, *as_json), "missing-stage", 3, "report needs the output of ingest")
    told(small.run("diff", tmp_path / "a", tmp_path / "b", *as_json), "config", 2, str(tmp_path / "a"))
    graph.mine(load_config(str(config)))
    told(small.run("explain", config, "--anchor", "nobody", *as_json), "input", 3, "has the id 'nobody'")
    (tmp_path / "run/.negpipe/search/manifest.json").write_text("{", encoding="utf-8")
    told(small.run("clean", config, "--yes", *as_json), "damaged", 5, "search/manifest.json is not a manifest")
    # What goes well is for people, as before: nothing on standard error is anything but a JSON line.
    looked = small.run("status", config, *as_json)
    assert (looked.code, looked.err) == (0, "")
    assert "is not a manifest" in looked.out


def told(outcome: small.Outcome, code: str | None, exit_code: int, words: str) -> None:
    """Standard error is one JSON object, or with `code` None one paragraph; standard output says nothing."""
    assert (outcome.code, outcome.out) == (exit_code, "")
    if code is None:
        assert outcome.err.startswith("negpipe: ") and words in outcome.err
        return
    (line,) = outcome.err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["error"], entry["exit_code"]) == ("error", code, exit_code)
    assert words in entry["message"]


def test_no_verb_is_without_a_format_for_schedulers() -> None:
    def walk(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
        for inner, one in getattr(command, "commands", {}).items():
            yield from walk(one, f"{name} {inner}".strip())
        if not hasattr(command, "commands"):
            yield name, {option for parameter in command.params for option in parameter.opts}

    options = dict(walk(typer.main.get_command(cli.app), ""))
    assert options.keys() > set(READERS) | {"mine", "diff"}
    assert [name for name, own in options.items() if "--log-format" not in own] == ["config schema"]
    assert [name for name, own in options.items() if "--debug" not in own] == ["config schema"]


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
