"""--format json and csv where a command prints a table, and tables that nobody's terminal cuts."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_source as small

TABLES = {
    "status": ([], "stage"),
    "quality": ([], "value"),
    "calibrate": (["--second", "CONFIG"], "leak"),
    "audit": ([], "check"),
    "plan": ([], "stage"),
    "explain": (["--anchor", "q0"], "fate"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", TABLES)
def test_json_and_csv(command: str, finished: Path) -> None:
    config = str(finished / "config.yaml")
    options, column = TABLES[command]
    words = [command, config, *(config if word == "CONFIG" else word for word in options)]
    as_json = small.run(*words, "--format", "json")
    assert as_json.code == 0, as_json.err
    assert json.loads(as_json.out)
    as_csv = small.run(*words, "--format", "csv")
    rows = [*csv.DictReader(io.StringIO(as_csv.out))]
    assert len(rows) > 1
    assert all(None not in row and row[column] is not None for row in rows)
    assert small.run(*words, "--format", "xml").code == 2


@pytest.mark.slow
def test_doctor() -> None:
    rows = [*csv.DictReader(io.StringIO(small.run("doctor", "--format", "csv").out))]
    assert {"Python", "Libraries"} <= {row[column] for row in rows for column in ("about", "name")}
    assert json.loads(small.run("doctor", "--format", "json").out)


def test_plan_of_a_cluster(finished: Path) -> None:
    nodes = str(Path(__file__).parents[2] / "configs/cluster/nodes.yaml")
    words = ["plan", str(finished / "config.yaml"), "--cluster", nodes, "--nodes", "1,8"]
    rows = [*csv.DictReader(io.StringIO(small.run(*words, "--format", "csv").out))]
    assert [(row["nodes"], row["stage"]) for row in rows if row["stage"] == "search"] == [
        ("1", "search"),
        ("8", "search"),
    ]
    assert json.loads(small.run(*words, "--format", "json").out)


def test_diff(finished: Path) -> None:
    rows = [*csv.DictReader(io.StringIO(small.run("diff", finished / "run", finished / "run", "--format", "csv").out))]
    assert rows[0]["added"] == "0"


@pytest.mark.slow
def test_a_table_in_a_file_is_as_wide_as_what_it_holds(finished: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    words = [sys.executable, "-m", "negpipe", "explain", str(finished / "config.yaml"), "--anchor", "q0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60, env=environment)
    lines = done.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["rank", "score"])
    rules = [
        row["rule"]
        for row in csv.DictReader(
            io.StringIO(
                subprocess.run(
                    [*words, "--format", "csv"], capture_output=True, text=True, check=True, env=environment
                ).stdout
            )
        )
    ]
    assert max(map(len, lines)) > 80
    assert [rule in line for rule, line in zip(rules, lines[head + 1 :], strict=False)] == [True] * len(rules)
