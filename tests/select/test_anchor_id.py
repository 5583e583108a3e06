"""A document that is the anchor itself is no negative of it; equal ids alone prove nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.data.tables import open_table
from negpipe.engine.manifest import Books
from negpipe.engine.state import digests_of
from negpipe.review import explain, finished, measures
from negpipe.review.audit import AuditOptions
from negpipe.stages.triplets import open_selection

pytestmark = pytest.mark.cases

COUNT = 30


def build(folder: Path, *, numbered: bool = False) -> Any:
    """As ArguAna has it: queries are documents, here with a title in front; or two numberings that have nothing to do
    with each other, some of whose equal numbers are judged as positives."""
    names = [str(i) for i in range(COUNT)] if numbered else [f"arg-{i}" for i in range(COUNT)]
    topic = [f"argument number {i} about the matter" for i in range(COUNT)]
    corpus = [
        {"_id": name, "title": f"Topic {i}", "text": f"document {i * 7}" if numbered else topic[i].upper()}
        for i, name in enumerate(names)
    ]
    queries = [{"_id": names[i], "text": topic[i]} for i in range(COUNT)]
    small.build(folder, corpus=corpus, asked=queries)
    small.write_qrels(folder / "data/qrels/train.tsv", [(names[i], names[(i + 1) % COUNT], 1) for i in range(COUNT)])
    if numbered:
        small.write_qrels(folder / "data/qrels/train.tsv", [(name, name, 1) for name in names[::2]])
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(COUNT, 16)).astype(np.float32)
    for name in ("corpus", "anchors"):  # the document of an anchor's own id is the nearest of all
        np.save(folder / f"{name}.npy", vectors)
    return small.settings(folder)


def mined(settings: Any, *overrides: str) -> tuple[graph.Result, dict[str, list[str]]]:
    more = ["mining.relative_margin=null", "mining.num_negatives=5", "mining.range_max=20", "output.format=n-tuple"]
    result = graph.mine(load_config(settings, [*more, *overrides]))
    rows = pq.read_table(result.triplets).to_pylist()
    return result, {row["anchor_id"]: [row[f"negative_{i}_id"] for i in range(1, 6)] for row in rows}


def dropped(result: graph.Result) -> int:
    count: int = result.stats["triplets"]["drops"].get("anchor_id", 0)
    return count


def test_an_anchor_that_is_a_document_is_no_negative_of_itself(tmp_path: Path) -> None:
    settings = build(tmp_path)
    result, negatives = mined(settings)
    assert dropped(result) == COUNT
    assert all(name not in own for name, own in negatives.items())
    _, before = mined(settings, "mining.anchor_id=never")
    assert all(own[0] == name for name, own in before.items())


def test_of_two_numberings_equal_ids_say_nothing(tmp_path: Path) -> None:
    settings = build(tmp_path, numbered=True)
    result, negatives = mined(settings)
    assert dropped(result) == 0
    always, kept = mined(settings, "mining.anchor_id=always")
    assert dropped(always) == 0  # here every anchor's equal number is its positive, which is never taken away
    assert kept == negatives


def test_always_takes_equal_ids_at_their_word(tmp_path: Path) -> None:
    settings = build(tmp_path)
    corpus = [{"_id": f"arg-{i}", "title": "", "text": f"something else {i}"} for i in range(COUNT)]
    small.write_rows(tmp_path / "data/corpus.jsonl", corpus)
    assert dropped(mined(settings)[0]) == 0
    assert dropped(mined(settings, "mining.anchor_id=always")[0]) == COUNT


def test_random_draws_keep_to_it(tmp_path: Path) -> None:
    """As many as there are documents but the positive and the anchor itself."""
    settings = build(tmp_path)
    found: dict[str, set[str]] = {}
    for anchor_id in ("contained", "never"):
        overrides = [f"mining.anchor_id={anchor_id}", "mining.num_negatives=0", f"mining.num_random={COUNT - 2}"]
        rows = pq.read_table(graph.mine(load_config(settings, overrides)).triplets).to_pylist()
        assert len(rows) == COUNT * (COUNT - 2)
        found[anchor_id] = {row["anchor_id"] for row in rows if row["anchor_id"] == row["negative_id"]}
    assert not found["contained"] and found["never"]


@pytest.mark.parametrize("preset", ["sentence-transformers", "flagembedding", "nemo", "nv-retriever"])
def test_other_miners_do_not_know_it(preset: str, tmp_path: Path) -> None:
    settings = build(tmp_path)
    settings["mining"] = {"compat": preset}
    assert load_config(settings).mining.anchor_id == "never"


def test_explain_names_it_and_ranks_leave_it_out(tmp_path: Path) -> None:
    settings = build(tmp_path)
    overrides = ["mining.relative_margin=null", "mining.range_max=20"]
    config = load_config(settings, overrides)
    graph.mine(config)
    with digests_of(config) as digests:
        context = finished.searched(config, digests, "explain")
        opened = open_selection(context)
        part, at = explain.find(finished._parts(context)[0], "arg-3", trains=False)
        unit = explain.explain(opened.selector, opened.corpus, part, at).units[0]
    first = unit.candidates[0]
    assert (first.id, first.fate, first.rule) == ("arg-3", "anchor_id", "the anchor itself, by id")
    with_itself = measures.measure_quality(load_config(settings, [*overrides, "mining.anchor_id=never"]))
    without = measures.measure_quality(config)
    assert without.metrics["MRR@10"] > with_itself.metrics["MRR@10"]
    assert without.ranks["0"] > 0 == with_itself.ranks["0"]


def test_calibrate_leaves_it_out_of_ranks(tmp_path: Path) -> None:
    """The anchor's own document is the nearest of all: without it, all is as if the window began behind it."""
    settings = build(tmp_path)
    judged = [(f"arg-{i}", f"arg-{(i + more) % COUNT}", 1) for i in range(COUNT) for more in (1, 2)]
    small.write_qrels(tmp_path / "data/qrels/train.tsv", judged)
    found = {}
    for anchor_id, first in (("contained", 0), ("never", 0), ("never", 1)):
        overrides = [f"mining.anchor_id={anchor_id}", f"mining.range_min={first}", "mining.range_max=20"]
        config = load_config(settings, [*overrides, "mining.relative_margin=null", "mining.num_negatives=1"])
        graph.mine(config)
        found[anchor_id, first] = measures.calibrate_settings(config).estimates[0]
    without, itself, behind = found.values()
    assert itself.score == pytest.approx(1, abs=1e-3) and itself.leak == 0
    assert without.score is not None and without.score < 0.95
    assert (without.leak, without.negatives, without.score) == (behind.leak, behind.negatives, behind.score)
    assert without.rank is not None and behind.rank == without.rank + 1


def test_audit_finds_it(tmp_path: Path) -> None:
    settings = build(tmp_path)
    for setting, expected in (("never", COUNT), ("contained", 0)):
        overrides = ["mining.relative_margin=null", f"mining.anchor_id={setting}", "mining.range_max=20"]
        config = load_config(settings, overrides)
        graph.mine(config)
        found = {one.check: one.count for one in measures.audit_rows(config, AuditOptions(columns={})).findings}
        assert found["anchor_id"] == expected


def test_the_row_of_an_anchors_id_is_known_by_any_id_of_its_text(tmp_path: Path) -> None:
    settings = build(tmp_path)
    rows = [{"_id": f"arg-{i}", "title": "", "text": f"argument number {i} about the matter"} for i in range(COUNT)]
    twice = [{"_id": "twin", "title": "", "text": "argument number 4 about the matter"}, *rows]
    small.write_rows(tmp_path / "data/corpus.jsonl", twice)
    np.save(tmp_path / "corpus.npy", np.random.default_rng(1).normal(size=(COUNT + 1, 16)).astype(np.float32))
    result = graph.mine(load_config(settings), only="ingest")
    manifest = Books(result.run_dir, "ingest").manifest()
    assert manifest is not None
    tables = [open_table(result.run_dir / part.file("table").path) for part in manifest.of_kind("anchors")]
    found = {row["id"]: row["same_id"] for table in tables for row in table.to_pylist()}
    assert found["arg-4"] == 0 and found["arg-0"] == 1
