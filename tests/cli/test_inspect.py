"""`inspect` says what a source is, and the config that it writes mines it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_source as small
import yaml

from negpipe.config.file import load_config
from negpipe.sources import recognized

pytestmark = pytest.mark.cases


def inspected(*words: str) -> dict[str, Any]:
    outcome = small.run("inspect", *words, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def triplets(path: Path, rows: int) -> None:
    lines = [{"anchor": f"q{n % 3}", "positive": f"p{n}", "negative": f"other {n}"} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"anchor": "q0", "positive": 5}]))


def test_what_is_in_a_source(tmp_path: Path) -> None:
    triplets(tmp_path / "rows.jsonl", 7)
    found = inspected(str(tmp_path / "rows.jsonl"))
    assert found["data"] == {"format": "pairs", "path": str(tmp_path / "rows.jsonl")}
    assert found["documents"]["count"] == 14 and found["documents"]["most"] == len("other 0")
    assert (found["judgments"], found["given"], found["odd"]) == ({"train": 7}, 7, {"type": 1})
    assert found["positives"] == {"2": 2, "3": 1} and found["whole"]
    assert "row 8" in found["examples"][0]
    assert json.loads(small.run("inspect", tmp_path / "rows.jsonl", "--format", "json").out) == found
    assert small.run("inspect", tmp_path / "rows.jsonl", "--format", "csv").code == 2
    few = inspected(str(tmp_path / "rows.jsonl"), "--rows", "4")
    assert not few["whole"] and few["documents"]["count"] < 14


def _pairs(folder: Path) -> list[Path]:
    lines = [{"anchor": f"q{n % 3}", "positive": f"p{n // 2}", "negative": f"p{n}"} for n in range(8)]
    small.write_rows(folder / "pairs.jsonl", lines)
    return [folder / "pairs.jsonl"]


def _beir_with_copies(folder: Path) -> list[Path]:
    copies = [{"_id": f"copy{n}", "title": f"Title {n}", "text": f"document {n}"} for n in range(4)]
    small.build(folder, [*small.documents(), *copies], small.queries(14))
    with (folder / "data/qrels/train.tsv").open("a") as file:
        file.write("q0\tcopy0\t1\nq1\tcopy1\t1\n")  # q0's positive again, and another one of q1
    return [folder / "data"]


@pytest.mark.parametrize("source", [_pairs, _beir_with_copies])
def test_it_counts_as_ingest_does(source: Callable[[Path], list[Path]], tmp_path: Path) -> None:
    written = str(tmp_path / "my.yaml")
    (path,) = source(tmp_path)
    found, shown = inspected(str(path)), small.run("inspect", str(path), "--write", written).out
    outcome = small.run("ingest", written, "--set", f"run_dir={tmp_path / 'run'}")
    said = re.findall(r"ingest: done .* \((.*)\)", outcome.err)[0].split(", ")
    counts = {name: int(count) for name, _, count in (one.rpartition(" ") for one in said)}
    documents, queries = found["documents"], found["queries"]
    assert documents["count"] == counts["documents"]
    assert documents["rows"] - documents["count"] == counts["duplicate documents merged"]
    assert queries["count"] == counts["anchors"] + counts.get("queries without a positive in data.split", 0)
    assert sum(found["positives"].values()) == counts["anchors"]
    assert sum(int(many) * anchors for many, anchors in found["positives"].items()) == counts["positives"]
    assert f"documents: {documents['count']} in {documents['rows']} rows (of rows with the same text, one)" in shown
    assert f"anchors in data.split train: {counts['anchors']}, positives: {counts['positives']}," in shown


def test_a_split_that_is_not_there_gives_way(tmp_path: Path) -> None:
    small.build(tmp_path)
    folder = Path(small.settings(tmp_path)["data"]["path"])
    (folder / "qrels" / "train.tsv").rename(folder / "qrels" / "dev.tsv")
    assert inspected(str(folder))["data"]["split"] == "dev"


def test_the_written_config_reads_the_source(tmp_path: Path) -> None:
    triplets(tmp_path / "rows.jsonl", 9)
    written = tmp_path / "my.yaml"
    outcome = small.run("inspect", str(tmp_path / "rows.jsonl"), "--write", str(written))
    assert outcome.code == 0 and f"negpipe mine {written}" in outcome.out
    config = load_config(written)
    assert recognized(config.data) == config.data and yaml.safe_load(written.read_text())["run_dir"]
    outcome = small.run("ingest", str(written), "--set", f"run_dir={tmp_path / 'run'}", "--max-bad-rows", "1")
    assert outcome.code == 0, outcome.err
    again = small.run("inspect", str(tmp_path / "rows.jsonl"), "--write", str(written))
    assert again.code == 2 and load_config(written) == config


def test_init_writes_what_inspect_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triplets(tmp_path / "my rows.v1.jsonl", 9)
    monkeypatch.chdir(tmp_path)
    outcome = small.run("init", "my rows.v1.jsonl")
    assert outcome.code == 0 and "negpipe mine myrows.yaml" in outcome.out
    small.run("inspect", "my rows.v1.jsonl", "--write", "other.yaml")
    assert Path("myrows.yaml").read_text("utf-8") == Path("other.yaml").read_text("utf-8")
    assert small.run("init", "my rows.v1.jsonl").code == 2, "a config is not written over"


@pytest.mark.parametrize("path", ["nowhere/at/all", "letters.md"])
def test_what_cannot_be_read_is_named(path: str, tmp_path: Path) -> None:
    (tmp_path / "letters.md").write_text("x")
    outcome = small.run("inspect", str(tmp_path / path))
    assert outcome.code == 3 and path in outcome.err


def test_the_next_command_runs_as_printed_without_a_path(tmp_path: Path) -> None:
    script = tmp_path / "bin/negpipe"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom negpipe.cli import main\nmain()\n")
    script.chmod(0o755)
    (tmp_path / "rows.csv").write_text("anchor,positive\na,b\n")
    environment = os.environ | {"PATH": "/usr/bin:/bin"}
    words = [str(script), "inspect", "rows.csv", "--write", "rows.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"written to rows.yaml: {script} mine rows.yaml"


def test_init_without_a_name_writes_a_first_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("negpipe.quickstart.stdlib_functions", lambda stdlib: iter(()))  # takes 10 s
    outcome = small.run("init")
    assert (outcome.code, outcome.out) == (0, "written to quickstart.yaml: negpipe mine quickstart.yaml\n")
    assert load_config("quickstart.yaml").data.path == "data/quickstart"
    assert (tmp_path / "data/quickstart/corpus.jsonl").is_file()
    assert small.run("init").code == 2, "a config is not written over"


def _advised(words: list[str]) -> dict[str, Any]:
    """What `inspect` finds with the arguments that its error for `words` advises."""
    refused = small.run("inspect", *words)
    assert refused.code == 3, refused.out
    if command := re.search(r"\(negpipe inspect (.+?)\)", refused.err):
        return inspected(*command[1].split())
    settings = re.findall(r"--set \S+?(?=,? )", refused.err)
    assert settings, refused.err
    return inspected(*words, *(word for setting in settings for word in setting.split()))


@pytest.mark.parametrize(
    "names",
    [("collection", "queries.train", "qrels.train"), ("docs", "topics", "qrels"), ("passages", "questions", "links")],
)
def test_a_folder_of_three_tables_is_told_how_to_be_read(names: tuple[str, str, str], tmp_path: Path) -> None:
    lines = ("docid\ttext\nd1\ta text\nd2\tanother\n", "qid\ttext\nq1\ta query\n", "qid\tdocid\nq1\td2\n")
    for name, text in zip(names, lines, strict=True):
        (tmp_path / f"{name}.tsv").write_text(text)
    (tmp_path / "queries.dev.tsv").write_text("qid\ttext\nq2\ta query\nq3\tnone\n")
    if names[1] != "queries.train":
        (tmp_path / "queries.dev.tsv").unlink()
    found = _advised([str(tmp_path)])
    assert (found["documents"]["count"], found["queries"]["count"], found["judgments"]) == (2, 1, {"train": 1})
    assert "path" not in found["data"]


def test_a_corpus_beside_pairs_is_told_how_to_be_read(tmp_path: Path) -> None:
    triplets(tmp_path / "pairs.jsonl", 2)
    (tmp_path / "pool.jsonl").write_text('{"text": "a text"}\n{"text": "another"}\n')
    found = _advised([str(tmp_path)])
    assert found["documents"]["count"] == 6 and found["data"]["corpus"]["path"] == str(tmp_path / "pool.jsonl")


def test_what_lies_deeper_in_a_folder_is_told(tmp_path: Path) -> None:
    small.write_rows(tmp_path / "data" / "train.jsonl", [{"frage": "wer", "antwort": "ich"}])
    assert "columns: frage, antwort" in small.run("inspect", tmp_path).err.replace("\n", " ")
    (tmp_path / "data").rename(tmp_path / "other")
    assert "Name the folder that contains files" in small.run("inspect", tmp_path).err.replace("\n", " ")


def test_passages_in_place_of_names_of_columns_are_told(tmp_path: Path) -> None:
    """The triples of MS MARCO: no header."""
    (tmp_path / "triples.train.tsv").write_text("".join(f"query {n}\t{'long ' * 20}{n}\tno\n" for n in range(3)))
    assert "data.table.header" in small.run("inspect", tmp_path).err
    table = "data.table={header: [anchor, positive, negative], quoting: none}"
    assert inspected(str(tmp_path), "--set", table)["given"] == 3


def test_a_run_directory_is_no_source(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    assert small.run("ingest", config).code == 0
    refused = small.run("inspect", tmp_path / "run")
    assert refused.code == 3 and f"negpipe status {tmp_path / 'run'}" in refused.err


def test_a_hub_that_is_not_there_is_asked_once(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen: connections are refused
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-m", "negpipe", "inspect", "nobody/nothing"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    warnings, error = done.stderr.splitlines()
    assert "the hub is not reachable (Connection refused); reading its local cache only" in warnings
    assert error.startswith("negpipe: nobody/nothing: ") and "offline, use a local folder" in error


def test_what_would_stop_the_next_command_is_odd(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    ids = [f"d{n}" for n in range(6)]
    small.write_rows(folder / "corpus.jsonl", [{"_id": name, "text": f"text of {name}"} for name in [*ids, "d2"]])
    small.write_rows(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(3)])
    small.write_qrels(folder / "qrels/train.tsv", [("q0", "d0", 1), ("q1", "d1|d2", 1), ("q9", "d3", 1)])
    assert inspected(str(folder))["odd"] == {"unknown_id": 2}  # the same text twice under an id is no other text
    small.write_rows(
        folder / "corpus.jsonl", [{"_id": name, "text": f"text {n}"} for n, name in enumerate([*ids, "d2"])]
    )
    found = inspected(str(folder))
    assert found["odd"] == {"id_with_two_texts": 1, "unknown_id": 2}
    assert "corpus.jsonl, row 7: the id 'd2' has another text" in found["examples"][0]
    assert "row 3: the relevance judgment names an unknown document id 'd1|d2'" in found["examples"][1]
    assert found["examples"][1].endswith("Several ids in one cell? Write one judgment per line")
    assert "row 4: the relevance judgment names an unknown query id 'q9'" in found["examples"][2]
    # Rows that were not read may have them.
    assert "unknown_id" not in inspected(str(folder), "--rows", "3")["odd"]


def test_a_source_without_anything_to_mine_is_an_error_after_its_description(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("anchor,positive\n")
    outcome = small.run("inspect", str(tmp_path / "empty.csv"), "--write", str(tmp_path / "c.yaml"))
    assert outcome.code == 3 and "documents: 0" in outcome.out
    assert "empty.csv: nothing can be mined: it has no usable documents" in outcome.err
    assert not (tmp_path / "c.yaml").exists()


def test_a_split_that_is_asked_for_is_not_replaced(tmp_path: Path) -> None:
    small.build(tmp_path)
    outcome = small.run("inspect", str(tmp_path / "data"), "--split", "dev")
    assert outcome.code == 3 and "no judgments for the split 'dev'. Available splits: train" in outcome.err


def test_ids_in_place_of_texts_are_told(tmp_path: Path) -> None:
    small.write_rows(tmp_path / "rows.jsonl", [{"anchor": f"which {n}", "positive": f"D{n}"} for n in range(5)])
    assert "look like ids" in small.run("inspect", str(tmp_path / "rows.jsonl")).out
    triplets(tmp_path / "rows.jsonl", 7)
    assert "look like ids" not in small.run("inspect", str(tmp_path / "rows.jsonl")).out


def test_a_folder_that_cannot_be_read_yet_leads_to_one_that_can(tmp_path: Path) -> None:
    (tmp_path / "articles_dump.csv").write_text("Art. No;Headline\n1;a\n2;b\n")
    (tmp_path / "tickets.jsonl").write_text('{"ticket": "q1", "question": "a query", "solved": 1}\n')
    refused = small.run("inspect", tmp_path)
    assert refused.code == 3 and "ticket, question, solved" in refused.err
    setting = re.search(r"data\.table\.delimiter: (\w+)", refused.err)
    assert setting, refused.err
    delimiter = f"data.table.delimiter={setting[1]}"
    both = small.run("inspect", tmp_path / "articles_dump.csv", tmp_path / "tickets.jsonl", "--set", delimiter)
    for columns in ("articles_dump.csv: Art. No, Headline;", "tickets.jsonl: ticket, question, solved."):
        assert columns in both.err.replace("\n", " "), "each file with its own"
    corpus, rest = tmp_path / "articles_dump.csv", tmp_path / "tickets.jsonl"
    named = [f"data.corpus={corpus}", f"data.queries={rest}", f"data.qrels={rest}", "data.text={Headline}", delimiter]
    named += ["data.format=columns", "data.columns.corpus_id=Art. No", "data.columns.query_id=ticket"]
    named += ["data.columns.query_text=question", "data.columns.qrels_query_id=ticket"]
    named += ["data.columns.qrels_corpus_id=solved"]
    found = inspected(str(tmp_path), *(word for one in named for word in ("--set", one)))
    assert (found["documents"]["count"], found["judgments"], found["odd"]) == (2, {"train": 1}, {})


def test_a_path_that_leads_nowhere_says_where_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"beneath {tmp_path}" in small.run("inspect", "source/corpus.jsonl").err.replace("\n", " ")
    assert str(tmp_path / "configs/my.yaml") in small.run("mine", "my.yaml").err.replace("\n", " ")
    config = small.build(tmp_path)
    assert small.run("ingest", config).code == 0
    assert str(tmp_path / "run") in small.run("mine", tmp_path).err.replace("\n", " "), "a folder of runs names them"


def test_a_written_config_says_where_it_stops_and_what_a_pool_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extra corpus whose ids are in a column of another name, and pairs of which two have an empty side."""
    monkeypatch.chdir(tmp_path)
    small.write_rows(Path("pool.jsonl"), [{"number": f"n{n}", "text": f"document {n}"} for n in range(9)])
    pairs = [{"anchor": f"q{n}", "positive": f"p{n}"} for n in range(7)]
    small.write_rows(Path("pairs.jsonl"), [*pairs, {"anchor": "", "positive": "p"}, {"anchor": "q", "positive": ""}])
    pool = ["--set", "data.corpus=pool.jsonl"]
    said = small.run("inspect", "pairs.jsonl", *pool, "--write", "my.yaml").out
    assert "pool.jsonl has no column _id: ids are made of the texts, or set data.columns.corpus_id" in said
    assert said.endswith("It stops at the bad rows; to reject them, add --max-bad-rows 2\n")
    assert small.run("ingest", "my.yaml").code == 3
    outcome = small.run("ingest", "my.yaml", "--max-bad-rows", "2")
    assert outcome.code == 0, outcome.err
    named = small.run("inspect", "pairs.jsonl", *pool, "--set", "data.columns.corpus_id=number").out
    assert "has no column" not in named
