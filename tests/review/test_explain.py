"""What `explain` says of an anchor is what the ledger counts and the rows hold."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from beir_data import tricky_folder, write_vectors
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.errors import InputError, MissingStageError
from negpipe.review import finished
from negpipe.review.explain import Explanation, Unit
from negpipe.rows.exports import ExportOptions

_NUMBER = r"-?\d+(?:\.\d+)?"
_NOT_FATES = {"anchor_id", "positive_id", "candidates", "deepest_rank", "random", "short", "shortage_reason"}


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder full of traps, with random vectors; q3's text would steer a terminal."""
    folder = tmp_path_factory.mktemp("explain")
    data = tricky_folder(folder / "beir")
    queries = data / "queries.jsonl"
    lines = queries.read_text("utf-8").splitlines()
    lines[3] = json.dumps({"_id": "q3", "text": "\x1b[31m[red]up[/red]\x07 \u202etxet"})
    queries.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = len((data / "corpus.jsonl").read_text("utf-8").splitlines())
    write_vectors(data, rows, len(lines), seed=1)
    run = Run(
        {
            "run_dir": str(folder / "run"),
            "data": {"path": str(data), "part_rows": 24},
            "encoder": {
                "backend": "precomputed",
                "normalize": False,
                "corpus_vectors": str(data / "corpus.npy"),
                "anchor_vectors": str(data / "queries.npy"),
            },
            "mining": {"range_min": 1, "range_max": 40, "num_negatives": 3, "max_depth": None},
            "executor": {"kind": "inline"},
        }
    )
    run.mine()
    return run


def explained(run: Run, anchor: str, *overrides: str) -> Explanation:
    return finished.explain_anchor(load_config(run.config, list(overrides)), anchor)


def ledger(run: Run) -> list[dict[str, Any]]:
    files = [run.folder / file["path"] for part in run.parts("triplets") for file in part["files"]]
    return [row for file in files if file.parent.name == "ledger" for row in pq.read_table(file).to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("mining.margin_reference=each", "mining.absolute_margin=1.5", "mining.relative_margin=null"),
        ("mining.sampling_strategy=random", "mining.rank_over=raw", "mining.max_score=12", "mining.min_score=3"),
        ("mining.on_shortage=drop", "mining.max_score=7", "mining.min_score=5.5", "mining.strict=true"),
        ("mining.max_depth=293", "mining.num_random=2", "mining.on_shortage=random"),
    ],
)
def test_fates_are_those_the_ledger_counts(mined: Run, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = mined.copied(tmp_path / "run")
    run.mine(*overrides)
    names = ["anchor_id", "positive_id", "negative_id", "negative_rank", "negative_score"]
    rows = pq.read_table(run.folder / "triplets", columns=names).to_pylist()
    booked: dict[str, list[dict[str, Any]]] = {}
    for row in ledger(run):
        booked.setdefault(row["anchor_id"], []).append(row)
    for anchor, units in list(booked.items())[::5]:
        found = explained(run, anchor, *overrides)
        assert len(found.units) == len(units)
        for unit, row in zip(found.units, units, strict=True):
            counts = {name.removeprefix("dropped_"): n for name, n in row.items() if name not in _NOT_FATES and n}
            assert unit.counts == counts
            ranked = [candidate for candidate in unit.candidates if candidate.rank is not None]
            assert Counter(candidate.fate for candidate in ranked) == counts
            assert [candidate.rank for candidate in ranked] == list(range(row["candidates"]))
            positives = {positive.id for positive in unit.positives}
            taken = {(c.id, c.rank, c.score) for c in unit.candidates if c.fate == "taken"}
            own = [row for row in rows if row["anchor_id"] == anchor and row["positive_id"] in positives]
            assert taken == {(row["negative_id"], row["negative_rank"], row["negative_score"]) for row in own}
            check_rules(unit, strict="mining.strict=true" in overrides)


def check_rules(unit: Unit, *, strict: bool) -> None:
    """Every comparison that a rule states is true, and of the candidate's own score."""
    for candidate in unit.candidates:
        assert candidate.rule
        compared = re.match(rf"(?:survivor |rank )?({_NUMBER}) ([<>≤≥]) ({_NUMBER})", candidate.rule)
        if not compared:
            continue
        left, right = float(compared[1]), float(compared[3])
        assert {"<": left < right, ">": left > right, "≤": left <= right, "≥": left >= right}[compared[2]]
        if candidate.fate in ("max_score", "min_score", "absolute_margin", "relative_margin"):
            assert candidate.score is not None
            assert math.isclose(left, candidate.score, abs_tol=1e-3)
            assert (compared[2] in "≤≥") == strict
            assert f"({candidate.fate}" in candidate.rule


def test_positives_reference_and_window(mined: Run) -> None:
    found = explained(mined, "q0")
    (unit,) = found.units
    assert (found.window, found.rank_over) == ((1, 40), "survivors")
    assert {positive.id for positive in unit.positives} == {"d0", "d100"}
    best, lowest = (positive.score for positive in unit.positives)
    assert best is not None and lowest is not None and best > lowest == unit.reference
    by_rank = {candidate.rank: candidate for candidate in unit.candidates}
    for positive in unit.positives:
        if positive.rank is not None:
            assert by_rank[positive.rank].id == positive.id
            assert by_rank[positive.rank].fate == "positive_id"
    each = explained(mined, "q0", "mining.margin_reference=each").units
    assert [[positive.id for positive in unit.positives] for unit in each] == [["d0"], ["d100"]]
    assert [unit.reference for unit in each] == [unit.positives[0].score for unit in each]


def test_a_short_anchor_is_explained_where_the_run_fails(mined: Run) -> None:
    found = explained(mined, "q0", "mining.on_shortage=fail", "mining.min_score=1000")
    assert found.units[0].counts.keys() >= {"min_score"}


def test_rules_other_than_those_of_the_rows_are_told(mined: Run, caplog: pytest.LogCaptureFixture) -> None:
    told = (
        f"the rows in {mined.folder} were made with other settings: mining.num_negatives changed from 3 to 2;"
        f" `negpipe {{}} {mined.folder}` uses those"
    )
    explained(mined, "q0")
    assert not caplog.messages
    explained(mined, "q0", "mining.num_negatives=2")
    config = load_config(mined.config, ["mining.num_negatives=2"])
    finished.export(config, ExportOptions(to="jsonl", out=mined.folder.with_name("two.jsonl")))
    assert [message for message in caplog.messages if "the rows" in message] == [
        told.format("explain"),
        told.format("export"),
    ]


def test_unknown_anchor_names_near_ones(mined: Run) -> None:
    with pytest.raises(InputError, match=r"no.*'q1o0'.*similar ids: .*'q100'") as caught:
        explained(mined, "q1o0")
    assert "train.split" not in str(caught.value)


def test_an_anchor_is_found_by_its_exact_text(mined: Run) -> None:
    by_id = explained(mined, "q5")
    assert explained(mined, by_id.anchor) == by_id
    with pytest.raises(InputError, match="or this text"):
        explained(mined, by_id.anchor + "!")


def test_stage_that_is_not_current_is_named(mined: Run) -> None:
    with pytest.raises(MissingStageError, match=r"negpipe search CONFIG"):
        explained(mined, "q0", "mining.range_max=250")


def command(run: Run, *arguments: str) -> str:
    file = run.folder.with_name("explain.yaml")
    file.write_text(json.dumps(run.config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "negpipe", "explain", str(file), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin"},
    )
    return done.stdout


def test_table_is_clean_and_limited(mined: Run) -> None:
    shown = command(mined, "--anchor", "q3", "--limit", "4")
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "[31m[red]up[/red]" in shown
    assert not [line for line in shown.splitlines() if line != line.rstrip()]
    assert "124 more: --limit 128 shows all" in shown
    (unit,) = explained(mined, "q3").units
    for candidate in unit.candidates[:4]:
        assert re.search(rf"^ *{candidate.rank} .*{candidate.id} .*{re.escape(candidate.rule)}", shown, re.MULTILINE)


def test_the_blocks_of_the_best_positives_are_shown_up_to_the_limit(mined: Run) -> None:
    wanted = "--anchor", "q0", "--set", "mining.margin_reference=each", "--limit"
    positives = r"^positive +-?\d+\.\d+ (?:rank \d+|beyond the depth) (\S+)"
    units = explained(mined, "q0", "mining.margin_reference=each").units
    scores = {one.id: one.score for unit in units for one in unit.positives if one.score is not None}
    best, other = sorted(scores, key=lambda name: -scores[name])
    assert units[0].positives[0].id == other
    shown, every = command(mined, *wanted, "1"), command(mined, *wanted, "2")
    assert re.findall(positives, shown, re.MULTILINE) == [best] and "1 more positive," in shown
    assert re.findall(positives, every, re.MULTILINE) == [best, other] and "more positives" not in every


def test_what_was_taken_is_shown_beyond_the_limit(mined: Run) -> None:
    wanted = "--anchor", "q5", "--limit", "1"
    (unit,) = explained(mined, "q5").units
    first, taken = unit.candidates[0], [candidate for candidate in unit.candidates if candidate.fate == "taken"]
    assert taken and first not in taken
    shown = command(mined, *wanted)
    assert re.findall(r"^ *\d+ +-?\d+\.\d+ +(\S+) ", shown, re.MULTILINE) == [one.id for one in (first, *taken)]
    assert f"{len(unit.candidates) - 1 - len(taken)} more: --limit {len(unit.candidates)} shows all" in shown
    (in_json,) = json.loads(command(mined, *wanted, "--json"))["units"]
    assert in_json["candidates"] == [vars(candidate) for candidate in (first, *taken)]


def test_json_is_one_document(mined: Run) -> None:
    def refused(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    shown = json.loads(command(mined, "--anchor", "q3", "--json", "--limit", "4"), parse_constant=refused)
    found = explained(mined, "q3")
    assert (shown["anchor_id"], shown["anchor"]) == ("q3", found.anchor)
    (unit,) = shown["units"]
    assert unit["counts"] == found.units[0].counts
    assert unit["candidates"] == [vars(candidate) for candidate in found.units[0].candidates[:4]]
