"""The command line: exit codes, what goes where, and that nothing in a file steers the terminal."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest
import small_source as small
from rich.console import Console

from negpipe.cli import console
from negpipe.engine import pipeline
from negpipe.store.lock import run_lock

HELP = """
import contextlib, io, sys
import typer
from negpipe import cli

def walk(command, words):
    if not getattr(command, "commands", None):
        yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, [*words, name])

commands = list(walk(typer.main.get_command(cli.app), []))
for words in [[], ["config"], *commands]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.app([*words, "--help"], standalone_mode=False)
    if words in commands and f"Example: negpipe {' '.join(words)}" not in out.getvalue():
        print("no example:", *words)
print(len(commands), "commands")
heavy = {"torch", "faiss", "pyarrow", "datasets", "duckdb", "FlagEmbedding", "sentence_transformers", "transformers",
         "numpy", "fsspec", "huggingface_hub"}
print("heavy:", *sorted(heavy & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    small.build(folder)
    assert small.run("mine", folder / "config.yaml").code == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a complete run."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    small.write_config(tmp_path / "copy")
    return tmp_path / "copy"


def entries(err: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in err.splitlines()]


def test_help_has_an_example_everywhere_and_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, timeout=60)
    count, heavy = done.stdout.splitlines()
    assert re.fullmatch(r"[12]\d commands", count)
    assert heavy == "heavy:"


# --- exit codes ---------------------------------------------------------------------------------------


def test_0_done_and_nothing_to_do(folder: Path) -> None:
    before = small.made(folder / "run")
    again = small.run("mine", folder / "config.yaml")
    assert again.code == 0
    assert again.out.startswith("Nothing to do: every stage is up to date.")
    assert str(folder / "run/triplets") in again.out
    assert small.made(folder / "run") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine"], "Missing argument 'CONFIG'."),
        (["diff", "A"], "Missing argument 'B'. Example: negpipe diff "),
        (["mine", "CONFIG", "--set", "seed", "3"], "--set seed=3"),
        (["mine", "CONFIG", "--set", "data.text={title}", "{text}"], "'data.text={title} {text}'"),
        (["mine", "CONFIG", "--depht", "3"], "No such option: --depht"),
        (["mien", "CONFIG"], "No such command 'mien'"),
        (["mine", "CONFIG", "--set"], "Option '--set' requires an argument."),
        (["mine", "CONFIG", "--set", "seed"], "expected key=value"),
        (["mine", "CONFIG", "--set", "seed=x"], "seed: "),
        (["mine", "CONFIG", "--log-format", "xml"], "expected plain or json"),
        (["mine", "nowhere.yaml"], "no config 'nowhere.yaml'"),
        (["status", "CONFIG", "--set", "sed=1"], "Did you mean 'seed'?"),
    ],
)
def test_2_usage_and_config(arguments: list[str], message: str, folder: Path) -> None:
    words = [str(folder / "config.yaml") if word == "CONFIG" else word for word in arguments]
    outcome = small.run(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("negpipe: ")
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_2_without_a_command_the_help_is_shown() -> None:
    outcome = small.run()
    assert outcome.code == 2
    assert "Exit codes: 0 done" in outcome.out
    assert outcome.err == ""


def test_3_a_stage_without_its_input_says_which_command_makes_it(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    for before, stage in (("ingest", "encode"), ("encode", "index"), ("index", "search"), ("search", "triplets")):
        outcome = small.run(stage, config)
        assert outcome.code == 3
        assert f"{stage} needs the output of {before}, which is missing" in outcome.err
        assert f"Run `negpipe {before} {config}` first, or `negpipe mine {config}`" in outcome.err
        made = small.run(before, config)
        assert made.code == 0
        assert re.fullmatch(rf"\s*Next: .*negpipe {stage} {tmp_path}/run\n", made.out)
        assert f"next: {stage}" in " ".join(small.run(before, "--help").out.split()).lower()
    other = tmp_path / "a run"
    overrides = ("--set", f"run_dir={other}", "--set", "seed=7")
    outcome = small.run("encode", *overrides, config)
    assert f"Run `negpipe ingest {config} --set 'run_dir={other}' --set seed=7` first" in outcome.err
    last = small.run("triplets", config)
    assert last.code == 0
    assert "36 rows in 2 Parquet files" in last.out


def test_the_next_command_of_shards_and_slices(tmp_path: Path) -> None:
    config, sliced = small.build(tmp_path), ("--set", "search.slice_documents=20")
    for stage in ("ingest", "encode", "index"):
        done = small.run(stage, config, *sliced)
    assert done.out.split("negpipe ")[1].split()[0] == "slices"
    assert f"negpipe commit slices {tmp_path}/run" in small.run("work", "slices", config, *sliced).err
    assert re.search(
        rf"Next: .*negpipe work search {tmp_path}/run\n", small.run("commit", "slices", config, *sliced).out
    )


def test_ingest_tells_each_count_once(tmp_path: Path) -> None:
    corpus = [*small.documents(), {"_id": "copy", "title": "Title 0", "text": "document 0"}]
    config = small.build(tmp_path, corpus, small.queries(14))
    outcome = small.run("ingest", config, "--log-format", "json")
    (done,) = (line["message"] for line in entries(outcome.err) if ": done" in line["message"])
    assert done.partition(" (")[2] == (
        "documents 40, anchors 12, positives 12, duplicate documents merged 1,"
        " queries without a positive in data.split 2)"
    )
    assert re.search(r"^ingest +current +\d+ +40 documents ", small.run("status", config).out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["quality", "audit", "report", "verify", "export", "calibrate", "diff", "mine --repair"]
)
def test_long_commands_say_at_once_what_they_do(command: str, finished: Path, tmp_path: Path) -> None:
    config = finished / "config.yaml"
    options = {
        "export": ("--to", "jsonl", "--out", tmp_path / "rows.jsonl"),
        "calibrate": ("--second", config),
        "diff": (finished / "run",),
        "report": ("--out", tmp_path / "report.html"),
    }
    name, *rest = command.split()
    outcome = small.run(name, config, *rest, *options.get(name, ()))
    assert outcome.code == 0, outcome.err
    said = f"{name if name != 'mine' else 'ingest'}: (measuring|reading|writing|trying)"
    assert re.search(said, outcome.err.splitlines()[0])


def test_4_a_run_directory_in_use(folder: Path) -> None:
    with run_lock(folder / "run"):
        outcome = small.run("mine", folder / "config.yaml")
        looked = small.run("status", folder / "config.yaml")
    assert outcome.code == 4
    assert re.search(r"run is in use by process \d+ on .+, running since 20.+: wait for it or stop it", outcome.err)
    assert looked.code == 0  # looking needs no lock
    assert small.run("mine", folder / "config.yaml").code == 0


def test_5_damage_is_found_named_and_made_good(folder: Path) -> None:
    config, run_dir = folder / "config.yaml", folder / "run"
    whole = small.output(run_dir)
    assert re.fullmatch(rf"\d+ files in {run_dir} are intact\.\n", small.run("verify", config).out)
    part = next((run_dir / "search").iterdir())
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    found = small.run("verify", config)
    assert found.code == 5
    assert f"search/{part.name} has changed since it was written" in found.err

    part.unlink()
    status = small.run("status", config)
    assert status.code == 0
    assert f"search: search/{part.name} is missing (1 file in all)" in status.out
    assert small.run("mine", config).code == 0
    assert small.output(run_dir) == whole
    assert small.run("verify", config).code == 0


def test_5_a_damaged_manifest_is_named_and_its_parts_are_kept(folder: Path) -> None:
    config, run_dir = folder / "config.yaml", folder / "run"
    inodes = {path.name: path.stat().st_ino for path in (run_dir / "encode").iterdir()}
    manifest = run_dir / ".negpipe/encode/manifest.json"
    manifest.write_text("{")
    found = small.run("verify", config)
    assert found.code == 5
    assert f"{manifest} is not a manifest" in found.err
    outcome = small.run("mine", config)
    assert outcome.code == 0
    assert "encode: starting, " in outcome.err
    assert {path.name: path.stat().st_ino for path in (run_dir / "encode").iterdir()} == inodes


def explode(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("boom \x1b[31m")


def test_1_an_unexpected_error_is_one_short_paragraph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "mine", explode)
    monkeypatch.setattr(pipeline, "status", explode)
    for command in ("mine", "status"):
        outcome = small.run(command, folder / "config.yaml")
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err == (
            "negpipe: unexpected RuntimeError: boom \\x1b[31m. This is a bug; finished parts are kept."
            " Run the same command with --debug for the traceback.\n"
        )
        traced = small.run(command, folder / "config.yaml", "--debug")
        assert traced.code == 1
        assert "Traceback (most recent call last):" in traced.err
        assert "in explode" in traced.err
        assert "--debug" not in traced.err.splitlines()[-1]


def test_an_explained_error_keeps_its_exit_code_with_debug(folder: Path) -> None:
    outcome = small.run("mine", folder / "config.yaml", "--set", "data.path=./nowhere", "--debug")
    assert outcome.code == 3
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("negpipe: ./nowhere: file or folder not found")


def test_130_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "mine", interrupt)
    outcome = small.run("mine", folder / "config.yaml")
    assert outcome.code == 130
    assert "Interrupted. Finished parts are kept: run the same command again to resume." in outcome.err


def test_a_run_directory_that_is_a_file(folder: Path) -> None:
    outcome = small.run("mine", folder / "config.yaml", "--set", f"run_dir={folder / 'config.yaml'}")
    assert outcome.code == 1
    assert "cannot write" in outcome.err
    assert "part of its path is a file" in outcome.err


# --- logs ---------------------------------------------------------------------------------------------


def test_json_logs_are_one_object_a_line(tmp_path: Path) -> None:
    outcome = small.run("mine", small.build(tmp_path), "--log-format", "json")
    assert (outcome.code, outcome.out) == (0, "")
    lines = entries(outcome.err)
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    assert lines[-1]["message"] == "done"
    assert lines[-1]["ran"] == ["ingest", "encode", "index", "search", "triplets"]
    assert lines[-1]["stats"]["triplets"]["rows"] == 36


@pytest.mark.parametrize(
    ("arguments", "error", "exit_code"),
    [
        (["--set", "data.path=./nowhere"], "input", 3),
        (["--set", "sed=1"], "config", 2),
        (["--depht=3"], "usage", 2),
    ],
)
def test_json_logs_end_in_the_error(arguments: list[str], error: str, exit_code: int, folder: Path) -> None:
    for flag in (["--log-format", "json"], ["--log-format=json"]):
        outcome = small.run("mine", folder / "config.yaml", *flag, *arguments)
        last = entries(outcome.err)[-1]
        assert (outcome.code, last["exit_code"], last["error"], last["level"]) == (exit_code, exit_code, error, "error")
        assert last["message"]
        assert "trace" not in last


def test_json_logs_hold_warnings_of_libraries_and_the_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any, **__: Any) -> NoReturn:
        warnings.warn("careful\nnow", stacklevel=1)
        raise ValueError("odd")

    monkeypatch.setattr(pipeline, "mine", warn)
    outcome = small.run("mine", folder / "config.yaml", "--log-format", "json", "--debug")
    warned, last = entries(outcome.err)
    assert warned["level"] == "warning"
    assert "careful\nnow" in warned["message"]
    assert (last["error"], last["exit_code"]) == ("unexpected", 1)
    assert "ValueError: odd" in last["trace"]


# --- hostile texts ------------------------------------------------------------------------------------

HOSTILE = "[red]loud[/red] \x1b[2J\x1b]0;title\x07 \x9b31m [link=http://x]here[/] \u202egnol\r\x08 \\[bold]"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def hostile_source(folder: Path) -> Path:
    corpus = [{"_id": f"{HOSTILE}{row['_id']}", "text": f"{HOSTILE} {row['text']}"} for row in small.documents()]
    asked = [{"_id": f"{HOSTILE}{row['_id']}", "text": f"{HOSTILE} {row['text']}"} for row in small.queries()]
    config = small.build(folder, corpus, asked)
    pairs = [(HOSTILE + one, HOSTILE + other, grade) for one, other, grade in small.judgments()]
    # A carriage return would end a line of the table.
    quoted = [('"' + one.replace('"', '""') + '"', '"' + other + '"', grade) for one, other, grade in pairs]
    small.write_qrels(folder / "data/qrels/train.tsv", quoted)
    return config


def test_nothing_in_a_text_steers_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(force_terminal=True, color_system="standard", highlight=False, width=200, legacy_windows=False)
    monkeypatch.setattr(console, "out", screen)
    outcome = small.run("mine", hostile_source(tmp_path))
    assert outcome.code == 0, outcome.err
    colours = re.compile(r"\x1b\[[0-9;]*m")  # rich's own
    shown = colours.sub("", outcome.out)
    assert "[red]loud[/red]" in shown  # as text, not as a colour
    assert "[link=http://x]here[/]" in shown
    for text in (shown, outcome.err):
        assert not CONTROL.search(text)
    assert "\x1b[2J" not in outcome.out


def test_nor_does_an_id_in_an_error_or_a_column_in_its_hint(tmp_path: Path) -> None:
    config = hostile_source(tmp_path)
    rows = [{"_id": f"{HOSTILE}d0", "body": "x", HOSTILE: "y"}]
    for content in ([{"_id": f"{HOSTILE}d0", "text": "x"}] * 2, rows):
        small.write_rows(tmp_path / "data/corpus.jsonl", content)
        outcome = small.run("mine", config)
        assert outcome.code == 3
        assert "\\x1b[2J" in outcome.err
        assert not CONTROL.search(outcome.err)
        logged = small.run("mine", config, "--log-format", "json")
        assert not CONTROL.search(logged.err)


def test_status_and_explain_are_safe_too(tmp_path: Path) -> None:
    config = hostile_source(tmp_path)
    assert small.run("mine", config).code == 0
    shown = small.run("explain", config, "--anchor", f"{HOSTILE}q3")
    assert shown.code == 0, shown.err
    assert "[red]loud[/red]" in shown.out
    assert not CONTROL.search(shown.out)
    unknown = small.run("explain", config, "--anchor", f"{HOSTILE}nobody")
    assert unknown.code in (2, 3)
    assert not CONTROL.search(unknown.err)
    stale = small.run("status", config, "--set", f"data.text={json.dumps('{text}' + HOSTILE)}")
    assert "ingest: data.text changed from" in stale.out
    assert not CONTROL.search(stale.out)


def test_of_a_section_that_changed_only_the_changed_keys_are_named(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    assert small.run("ingest", config).code == 0
    stale = small.run("status", config, "--set", "data.columns.query_text=question")
    (line,) = (line for line in stale.out.splitlines() if "changed from" in line)
    assert "data.columns.query_text changed from 'text' to 'question'" in line and "corpus_id" not in line


# --- clean --------------------------------------------------------------------------------------------


def test_clean_lists_asks_and_frees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = folder / "config.yaml"
    assert small.run("clean", config).out == f"Nothing to clean in {folder}/run.\n"
    assert small.run("mine", config, "--set", "mining.range_max=80").code == 0
    current = small.output(folder / "run")
    before = small.made(folder / "run")

    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    asked = small.run("clean", config)
    assert asked.code == 0
    assert "Nothing was deleted." in asked.out
    today = datetime.now().strftime("%Y-%m-%d")
    assert re.search(rf"^search +search +2 +[\d.]+ kB +{today} ", asked.out, re.MULTILINE)
    assert re.search(rf"^search +\.negpipe/search +2 +[\d.]+ kB +{today} ", asked.out, re.MULTILINE)
    assert re.search(rf"^triplets +rows +2 +[\d.]+ kB +{today} ", asked.out, re.MULTILINE)
    assert "made with earlier settings or input, or left by killed runs" in asked.out
    assert small.made(folder / "run") == before

    listed = json.loads(small.run("clean", config, "--format", "json").out)
    assert [(row["stage"], row["folder"], row["files"]) for row in listed][:2] == [
        ("search", ".negpipe/search", 2),
        ("search", "search", 2),
    ]
    assert all(today in datetime.fromisoformat(row["last_written"]).astimezone().isoformat() for row in listed)
    rows = [*csv.DictReader(io.StringIO(small.run("clean", config, "--format", "csv").out))]
    assert rows == [{name: str(value) for name, value in row.items()} for row in listed]
    assert small.made(folder / "run") == before

    freed = small.run("clean", config, "--yes")
    assert freed.code == 0
    assert "Freed " in freed.out
    after = small.made(folder / "run")
    assert after.items() < before.items()
    assert {name for name in current if name.startswith("triplets/")} <= after.keys()
    assert small.run("clean", config).out.startswith("Nothing to clean")
    assert small.run("verify", config).code == 0
    assert "Nothing to do" in small.run("mine", config, "--set", "mining.range_max=80").out
    assert json.loads(small.run("clean", config, "--format", "json").out) == []


def test_clean_for_a_program_deletes_only_with_yes(folder: Path) -> None:
    config = folder / "config.yaml"
    assert small.run("mine", config, "--set", "mining.range_max=80").code == 0
    before = small.made(folder / "run")
    listed = json.loads(small.run("clean", config, "--yes", "--format", "json").out)
    after = small.made(folder / "run")
    assert len(before) - len(after) == sum(row["files"] for row in listed) > 0
    assert small.run("clean", config).out.startswith("Nothing to clean")


@pytest.mark.parametrize(("bad", "said"), [(1, "1 source row rejected"), (2, "2 source rows rejected")])
def test_a_noun_after_a_number_is_in_the_plural_but_for_one(bad: int, said: str, tmp_path: Path) -> None:
    config = small.build(tmp_path, [*small.documents(), *[{"_id": f"empty{n}", "text": ""} for n in range(bad)]])
    outcome = small.run("mine", config, "--max-bad-rows", bad)
    assert f" {said}: {tmp_path}/run/rejected.jsonl" in outcome.err
    assert f"\n{said}: {tmp_path}/run/rejected.jsonl" in outcome.out
    assert f"ingest: {said}, see rejected.jsonl" in small.run("status", tmp_path / "run").out
