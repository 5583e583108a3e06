"""`inspect` says what a source is, and the config that it writes mines it."""

from __future__ import annotations

import json
import re
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
    few = inspected(str(tmp_path / "rows.jsonl"), "--rows", "4")
    assert not few["whole"] and few["documents"]["count"] < 14


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


def test_a_run_directory_is_no_source(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    assert small.run("ingest", config).code == 0
    refused = small.run("inspect", tmp_path / "run")
    assert refused.code == 3 and f"negpipe status {tmp_path / 'run'}" in refused.err
