"""Negatives that the source brings, and documents judged not relevant, are taken before others, by a plain program."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.errors import ConfigError
from negpipe.review import finished, measures
from negpipe.review.audit import AuditOptions

pytestmark = pytest.mark.cases

DOCUMENTS, QUERIES, ALL = 60, 24, 40
Lists = dict[str, tuple[list[str], list[str], dict[str, float]]]
"""Query → positives, given negatives, and grades of what is judged not relevant."""


def judged_lists(seed: int) -> Lists:
    draw = random.Random(seed)
    found: Lists = {}
    for number in range(QUERIES):
        some = draw.sample([f"d{n}" for n in range(DOCUMENTS)], 14)
        given, judged = draw.choice([(0, 0), (2, 3), (5, 0), (0, 6), (4, 5)])
        grades = {name: draw.choice([0.0, -1.0, 0.5]) for name in some[8 : 8 + judged]}
        found[f"q{number}"] = some[: draw.randint(1, 3)], some[3 : 3 + given], grades
    return found


def built(folder: Path, lists: Lists, *, given: bool) -> Run:
    """A BEIR folder with judgments, or Tevatron's rows with negatives, and vectors that are given."""
    small.build(folder, small.documents(DOCUMENTS), small.queries(len(lists) if given else QUERIES))
    config: dict[str, Any] = small.settings(folder)
    if given:
        rows = [
            {
                "query_id": q,
                "query_text": f"query {q[1:]}",
                "positive_document_ids": own,
                "negative_document_ids": brought,
            }
            for q, (own, brought, _) in lists.items()
        ]
        small.write_rows(folder / "rows.jsonl", rows)
        config["data"] |= {"path": str(folder / "rows.jsonl"), "corpus": str(folder / "data/corpus.jsonl")}
        config["data"]["columns"] = {"corpus_id": "_id"}
    else:
        judged: list[tuple[str, str, float]] = [(q, d, 1) for q, (own, *_) in lists.items() for d in own]
        judged += [(q, d, grade) for q, (*_, grades) in lists.items() for d, grade in grades.items()]
        small.write_qrels(folder / "data/qrels/train.tsv", judged)
    config["mining"] = {"range_max": ALL, "relative_margin": None, "max_depth": None, "num_negatives": 4}
    config["search"] = {"depth": DOCUMENTS}
    return Run(config)


def negatives(run: Run) -> dict[str, list[tuple[str, str | None, float]]]:
    """Each anchor's negatives in the order of its rows, of its first positive."""
    found: dict[str, list[tuple[str, str | None, float]]] = defaultdict(list)
    first: dict[str, str] = {}
    for row in pq.read_table(run.folder / "triplets").to_pylist():
        if first.setdefault(row["anchor_id"], row["positive_id"]) == row["positive_id"]:
            found[row["anchor_id"]].append((row["negative_id"], row.get("source"), row["negative_score"]))
    return found


def cosine(run: Run) -> dict[tuple[str, str], float]:
    folder = Path(run.config["encoder"]["corpus_vectors"]).parent
    corpus, asked = np.load(folder / "corpus.npy"), np.load(folder / "anchors.npy")
    corpus, asked = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (corpus, asked))
    return {(f"q{q}", f"d{d}"): float(asked[q] @ corpus[d]) for q in range(QUERIES) for d in range(DOCUMENTS)}


def expected(
    lists: Lists, scores: dict[tuple[str, str], float], mode: str, wanted: int
) -> dict[str, list[tuple[str, str]]]:
    found = {}
    for q, (positives, given, grades) in lists.items():
        ranked = sorted((f"d{n}" for n in range(DOCUMENTS)), key=lambda d: -scores[q, d])
        before = given if mode in ("first", "keep") else [*grades]
        source = "given" if mode in ("first", "keep") else "judged"
        taken = [(d, source) for d in ranked if d in before]
        taken = taken if mode == "keep" else taken[:wanted]
        room = wanted if mode == "keep" else wanted - len(taken)
        rest = [d for d in ranked if d not in positives and d not in {name for name, _ in taken}][:ALL]
        found[q] = taken + ([] if mode == "only" else [(d, "mined") for d in rest[:room]])
    return {q: rows for q, rows in found.items() if rows}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["first", "keep", "prefer", "only"])
@pytest.mark.parametrize("seed", [1, 2])
def test_they_come_before_others(mode: str, seed: int, tmp_path: Path) -> None:
    lists = judged_lists(seed)
    given = mode in ("first", "keep")
    run = built(tmp_path, lists, given=given)
    overrides = [f"mining.{'given_negatives' if given else 'judged'}={mode}"]
    run.mine(*overrides)
    found, scores = negatives(run), cosine(run)
    assert {q: [row[:2] for row in rows] for q, rows in found.items()} == expected(lists, scores, mode, 4)
    for q, rows in found.items():
        assert [score for *_, score in rows] == pytest.approx([scores[q, d] for d, *_ in rows], abs=2e-3)
    (ledger,) = [pq.read_table(run.folder / "ledger")]
    counted = {row["anchor_id"]: row["preferred"] for row in ledger.to_pylist()}
    assert counted == {q: sum(source != "mined" for _, source, _ in found.get(q, [])) for q in counted}
    for row in ledger.to_pylist():
        grades = lists[row["anchor_id"]][2] if not given else {}
        judged = [grades[d] for d, *_ in found.get(row["anchor_id"], []) if d in grades]
        assert row["judged_grades"] == judged
    drops = [name for name in ledger.column_names if name.startswith("dropped_")]
    assert all(
        row["candidates"] - row["taken"] - sum(row[name] for name in drops) in (0, row["preferred"])
        for row in ledger.to_pylist()
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_parts_depth_and_margins_of_each_pair_change_nothing(seed: int, tmp_path: Path) -> None:
    lists = judged_lists(seed)
    run = built(tmp_path, lists, given=False)
    whole = run.at(tmp_path / "whole")
    whole.config["data"] = {**run.config["data"], "part_rows": 1000}
    shallow = run.at(tmp_path / "shallow")
    shallow.config["search"] = {"depth": 45}
    for one in (run, whole, shallow):
        one.mine("mining.judged=prefer")
    assert negatives(run) == negatives(whole)
    same = [q for q, (*_, grades) in lists.items() if len(grades) <= 4]
    for q in same:  # what is judged is taken from beyond the depth too
        assert {row[0] for row in negatives(run)[q]} == {row[0] for row in negatives(shallow)[q]}
    run.mine("mining.judged=prefer", "mining.margin_reference=each", "mining.relative_margin=0.0")
    rows = pq.read_table(run.folder / "triplets").to_pylist()
    judged: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        if row["source"] == "judged":
            judged[row["anchor_id"], row["positive_id"]].add(row["negative_id"])
    for q, (positives, _, grades) in lists.items():
        for positive in positives:
            assert len(judged[q, positive]) == min(4, len(grades)) and judged[q, positive] <= {*grades}


def test_exclusions_hold_and_cutoffs_do_not(tmp_path: Path) -> None:
    lists: Lists = {f"q{n}": (["d0"], ["d1", "d2", "d3"], {}) for n in range(3)}
    run = built(tmp_path, lists, given=True)
    named = tmp_path / "never.jsonl"
    small.write_rows(named, [{"anchor_id": "q1", "document_id": "d2"}])
    cutoffs = ["mining.max_score=-2", "mining.given_negatives=first", f"mining.exclude_file={named}"]
    run.mine(*cutoffs)
    found = {q: {row[0] for row in rows} for q, rows in negatives(run).items()}
    assert found == {"q0": {"d1", "d2", "d3"}, "q1": {"d1", "d3"}, "q2": {"d1", "d2", "d3"}}
    run.mine(*cutoffs, "mining.num_random=2", "mining.num_negatives=3")
    for q, rows in negatives(run).items():
        by_source = [source for _, source, _ in rows]
        assert by_source == ["given"] * len(found[q]) + ["random"] * 2, "random ones are others"
        assert len({row[0] for row in rows}) == len(rows)
    run.mine(*cutoffs, "mining.on_shortage=drop", "mining.num_negatives=3")
    assert set(negatives(run)) == {"q0", "q2"}, "an anchor that lacks one gives up all"


def test_explain_says_where_they_are_from(tmp_path: Path) -> None:
    lists = judged_lists(5)
    run = built(tmp_path, lists, given=False)
    run.mine("mining.judged=prefer")
    anchor = next(q for q, (*_, grades) in lists.items() if len(grades) == 5)
    (unit,) = finished.explain_anchor(load_config(run.config, ["mining.judged=prefer"]), anchor).units
    preferred = {one.id for one in unit.candidates if one.fate == "preferred"}
    assert preferred == {row[0] for row in negatives(run)[anchor] if row[1] == "judged"}
    run.mine("mining.judged=only")
    (unit,) = finished.explain_anchor(load_config(run.config, ["mining.judged=only"]), anchor).units
    assert {one.fate for one in unit.candidates if one.id not in lists[anchor][2]} <= {"not_judged", "positive_id"}


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    run = built(tmp_path, judged_lists(6), given=False)
    for overrides, named in (
        (["mining.given_negatives=keep", "output.format=n-tuple"], "given_negatives"),
        (["mining.judged=only", "mining.num_random=1"], "num_random"),
        (["mining.judged=prefer", "mining.score=teacher"], "mining.score"),
    ):
        with pytest.raises(ConfigError, match=named):
            run.mine(*overrides)


def test_two_splits_that_disagree_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small.build(tmp_path)
    small.write_qrels(tmp_path / "data/qrels/train.tsv", [("q0", "d0", 1), ("q0", "d5", 0), ("q0", "d6", -1)])
    small.write_qrels(tmp_path / "data/qrels/test.tsv", [("q0", "d5", 2), ("q1", "d1", 1)])
    run = Run(small.settings(tmp_path))
    stats = run.mine("mining.judged=prefer", "output.grades=true").stats["ingest"]
    (warning,) = [one.message for one in caplog.records if "relevant in one place" in one.message]
    assert "'d5'" in warning and "'q0'" in warning and "train.tsv, row 3" in warning and "judged 0" in warning
    assert stats["judged_not_relevant"] == 1
    rows = pq.read_table(run.folder / "triplets").to_pylist()
    assert {row["negative_id"]: row["negative_grade"] for row in rows if row["negative_grade"] is not None} == {
        "d6": -1.0
    }
    assert "d5" not in {row["negative_id"] for row in rows}
    assert json.loads(json.dumps(stats))["judgments_read"] == 5


def test_a_condition_holds_for_them_as_far_as_it_names_no_score(tmp_path: Path) -> None:
    lists = judged_lists(7)
    run = built(tmp_path, lists, given=False)
    corpus = [{**row, "kind": "a" if at % 2 else "b"} for at, row in enumerate(small.documents(DOCUMENTS))]
    small.write_rows(tmp_path / "data/corpus.jsonl", corpus)
    run.config["data"]["extra"] = {"corpus": ["kind"]}
    overrides = ["mining.judged=prefer", "mining.where=candidate.kind = 'a' and score < -2"]
    run.mine(*overrides)
    found = {q: {row[0] for row in rows} for q, rows in negatives(run).items()}
    kept = {q: {d for d in grades if int(d[1:]) % 2} for q, (*_, grades) in lists.items()}
    assert {q: len(some) for q, some in found.items()} == {q: min(4, len(some)) for q, some in kept.items() if some}
    assert all(found[q] <= kept[q] for q in found)
    audited = measures.audit_rows(load_config(run.config, overrides), AuditOptions(columns={})).findings
    (where,) = [one for one in audited if one.check == "where"]
    assert where.of and not where.count
