"""`diff` counts what a plain program counts, whatever the format, and shows what really changed."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reviewed_run
from small_source import run as negpipe

from negpipe.errors import InputError
from negpipe.review.diff import compare, source_of

Negatives = dict[str, dict[str, tuple[float, int]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one source: as it is, harder, in other formats, and with other queries."""
    folder = tmp_path_factory.mktemp("compared")
    config = reviewed_run.build(folder)
    settings = {
        "a": [],
        "b": [
            "mining.relative_margin=0.3",
            "mining.num_negatives=4",
            "mining.min_score=0.4",
            "mining.on_shortage=drop",
        ],
        "n-tuple": ["output.format=n-tuple"],
        "labeled-pair": ["output.format=labeled-pair"],
        "labeled-list": ["output.format=labeled-list"],
        "texts": ["output.ids=false"],
        "spelled": [f"data.queries={folder}/data/../data/queries.jsonl"],
    }
    for name, changes in settings.items():
        every = [*changes, f"run_dir={folder / name}", "output.report=false"]
        done = negpipe("mine", config, *(word for change in every for word in ("--set", change)))
        assert done.code == 0, done.err
    return folder


def negatives(folder: Path) -> Negatives:
    """Anchor → document → score and rank, of triplets."""
    found: Negatives = defaultdict(dict)
    for path in (folder / "triplets").glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            found[row["anchor_id"]][row["negative_id"]] = (row["negative_score"], row["negative_rank"])
    return found


@pytest.mark.slow
def test_counts_are_those_of_a_plain_program(runs: Path) -> None:
    a, b = negatives(runs / "a"), negatives(runs / "b")
    found = compare(source_of(str(runs / "a")), source_of(str(runs / "b")), examples=3)
    common = a.keys() & b.keys()
    assert (found.common, found.lost, found.gained) == (len(common), len(a.keys() - b.keys()), 0)
    assert found.lost > 0 and found.common > 0
    assert set(found.lost_ids) <= a.keys() - b.keys()
    kept = {(anchor, document) for anchor in common for document in a[anchor].keys() & b[anchor].keys()}
    assert found.kept == len(kept)
    assert found.removed == sum(len(a[anchor]) for anchor in common) - len(kept)
    assert found.added == sum(len(b[anchor]) for anchor in common) - len(kept)
    overlaps = {anchor: len(a[anchor].keys() & b[anchor].keys()) / len({*a[anchor], *b[anchor]}) for anchor in common}
    assert found.overlap == pytest.approx(sum(overlaps.values()) / len(common))
    assert found.disjoint == sum(not overlap for overlap in overlaps.values())
    assert found.same == sum(overlap == 1 for overlap in overlaps.values())
    for side, of in ((found.a, a), (found.b, b)):
        every = [value for documents in of.values() for value in documents.values()]
        assert (side.anchors, side.negatives) == (len(of), len(every))
        assert side.score == pytest.approx(sum(score for score, _ in every) / len(every))
        assert side.rank == pytest.approx(sum(rank for _, rank in every) / len(every))
    assert found.settings == {
        "mining.num_negatives": (3, 4),
        "mining.relative_margin": (None, 0.3),
        "mining.min_score": (None, 0.4),
        "mining.on_shortage": ("keep", "drop"),
    }
    assert [one.overlap for one in found.examples] == sorted(overlaps.values())[:3]
    for one in found.examples:
        assert one.anchor_id is not None
        removed = a[one.anchor_id].keys() - b[one.anchor_id].keys()
        added = b[one.anchor_id].keys() - a[one.anchor_id].keys()
        assert [{change.id for change in some} for some in (one.removed, one.added)] == [removed, added]
        for change in one.removed:
            assert (change.score, change.rank) == a[one.anchor_id][str(change.id)]
            assert change.text


def test_another_spelling_of_a_path_is_no_difference(runs: Path) -> None:
    assert compare(source_of(str(runs / "a")), source_of(str(runs / "spelled"))).settings == {}


@pytest.mark.parametrize("other", ["n-tuple", "labeled-pair", "labeled-list", "texts"])
def test_the_same_negatives_in_another_format_are_the_same(runs: Path, other: str) -> None:
    found = compare(source_of(str(runs / "a")), source_of(str(runs / other)))
    every = sum(len(documents) for documents in negatives(runs / "a").values())
    assert (found.kept, found.added, found.removed, found.gained, found.lost) == (every, 0, 0, 0, 0)
    assert (found.a.score, found.a.rank) == (found.b.score, found.b.rank)
    assert (found.score_shift, found.rank_shift, found.overlap) == (0, 0, 1)
    assert found.by_id == (other != "texts")
    assert found.settings and set(found.settings) <= {"output.format", "output.ids"}
    changed = compare(source_of(str(runs / "b")), source_of(str(runs / other)), examples=2)
    assert all(change.text for one in changed.examples for change in [*one.removed, *one.added])
    assert changed.examples[0].removed and changed.examples[0].added


def test_scores_and_ranks_that_shift(runs: Path, tmp_path: Path) -> None:
    table = pa.concat_tables([pq.read_table(path) for path in sorted((runs / "a/triplets").glob("*.parquet"))])
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        row["negative_score"] += 0.25 if number % 2 else -0.05
        row["negative_rank"] += 3
    rows[0]["negative_score"] = math.nan
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "shifted.parquet")
    found = compare(source_of(str(runs / "a")), source_of(str(tmp_path / "shifted.parquet")))
    shifts = [0.25 if number % 2 else -0.05 for number in range(1, len(rows))]
    assert found.score_shift == pytest.approx(sum(shifts) / len(shifts), abs=1e-6)
    assert found.largest_score_shift == pytest.approx(0.25, abs=1e-6)
    assert found.rank_shift == 3
    assert found.settings is None
    json.dumps(found.document(), allow_nan=False)


def test_another_miners_rows_by_text(runs: Path, tmp_path: Path) -> None:
    """A file without ids, with two lines for an anchor and a negative twice."""
    rows: dict[str, dict[str, Any]] = {}
    for path in (runs / "a/triplets").glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            one = rows.setdefault(row["anchor"], {"query": row["anchor"], "pos": [row["positive"]], "neg": []})
            one["neg"].append(row["negative"])
    anchors = list(rows)
    rows[anchors[0]]["neg"] = ["something else"]
    rows[anchors[1]]["neg"] *= 2
    del rows[anchors[2]]
    lines = [*rows.values(), {"query": "new?", "pos": ["yes"], "neg": ["no"]}]
    file = tmp_path / "mined.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    found = compare(source_of(str(runs / "a")), source_of(str(file)))
    assert (found.added, found.removed, found.gained, found.lost) == (1, 3, 1, 1)
    assert found.gained_ids == ["new?"] and not found.by_id
    assert found.b.score is None and found.score_shift is None and found.rank_shift is None
    (example,) = found.examples
    assert [change.text for change in example.added] == ["something else"]


@pytest.mark.slow
def test_on_the_command_line(runs: Path, tmp_path: Path) -> None:
    config = tmp_path / "b.yaml"
    shutil.copy(runs / "config.yaml", config)
    config.write_text(config.read_text("utf-8").replace(str(runs / "run"), str(runs / "b")), "utf-8")
    shown = negpipe("diff", runs / "a", config, "--examples", "2")
    assert shown.code == 0, shown.err
    assert "mining.num_negatives" in shown.out and "negatives removed" in shown.out
    assert "\x1b" not in shown.out and "\u202e" not in shown.out and "\r" not in shown.out
    document = json.loads(negpipe("diff", runs / "a", runs / "b", "--json").out)
    assert document["kept"] == compare(source_of(str(runs / "a")), source_of(str(runs / "b"))).kept
    assert f"{document['kept']:,}" in shown.out


def test_columns_of_the_file_can_be_named(runs: Path, tmp_path: Path) -> None:
    names = {"anchor": "question", "positive": "answer", "negative": "wrong"}
    table = pq.read_table(runs / "a/triplets", columns=[*names]).rename_columns([*names.values()])
    pq.write_table(table, tmp_path / "mined.parquet")
    sides = ("diff", runs / "a", tmp_path / "mined.parquet", "--json", "--columns")
    named = "anchor=question,positive=answer,negative=wrong"
    unnamed = negpipe(*sides[:-1])
    assert unnamed.code == 3 and "--columns anchor=COLUMN,positive=COLUMN,negative=COLUMN" in unnamed.err
    done = negpipe(*sides, named)
    assert done.code == 0, done.err
    assert json.loads(done.out)["overlap"] == 1
    wrong = negpipe(*sides, "anchor")
    assert wrong.code == 2 and "--columns anchor: expected FIELD=COLUMN" in wrong.err
    both = negpipe("diff", runs / "a", runs / "b", "--columns", named)
    assert both.code == 2 and "--columns: both sides are runs" in both.err


def test_what_cannot_be_compared(runs: Path, tmp_path: Path) -> None:
    done = negpipe("diff", "nowhere", runs / "a")
    assert done.code == 2 and "nowhere: expected a run directory, a config, or a file of rows" in done.err
    config = reviewed_run.build(tmp_path)
    assert negpipe("ingest", config).code == 0
    for name in (config, tmp_path / "run"):
        done = negpipe("diff", name, runs / "a")
        assert done.code == 3
        assert f"no triplets in {tmp_path / 'run'}: run `negpipe mine {name}` first" in done.err
    done = negpipe("audit", config)
    assert done.code == 3 and f"Run `negpipe encode {config}` first" in done.err
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"anchor": "x", "positive": "y", "negative": "z"}) + "\n", "utf-8")
    with pytest.raises(InputError, match="have no anchor in common"):
        compare(source_of(str(runs / "a")), source_of(str(other)))
    other.write_text(json.dumps({"question": "x", "positive": "y", "negative": "z"}) + "\n", "utf-8")
    done = negpipe("diff", runs / "a", other)
    assert done.code == 3 and "no column is known to hold the anchor" in done.err
