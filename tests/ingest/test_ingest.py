"""What ingest makes of a source, read back from its parts; and where it cuts them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
from hypothesis import given, settings
from hypothesis import strategies as st

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.data.texts import digests, hashes, normalize, text_id
from negpipe.engine.manifest import Books, Part
from negpipe.errors import BudgetError
from negpipe.ingest import joins, spool
from negpipe.stages import ingest

Row = dict[str, Any]


@dataclass(frozen=True)
class Ingested:
    stats: dict[str, Any]
    parts: tuple[Part, ...]
    run_dir: Path

    def rows(self, kind: str) -> list[Row]:
        found: list[Row] = []
        for part in self.parts:
            if part.kind == kind:
                found += pa.ipc.open_file(self.run_dir / part.files[0].path).read_all().to_pylist()
        return found

    @property
    def documents(self) -> list[Row]:
        return self.rows("corpus") + self.rows("added")

    @property
    def anchors(self) -> dict[str, Row]:
        return {row["id"]: row for row in self.rows("anchors")}


def run(folder: Path, name: str = "run", **data: Any) -> Ingested:
    config = load_config(
        small.settings(folder) | {"run_dir": str(folder / name)}, [f"data.{k}={v}" for k, v in data.items()]
    )
    result = graph.mine(config, only="ingest")
    manifest = Books(config.run_dir, "ingest").manifest()
    assert manifest is not None
    return Ingested(result.stats["ingest"], manifest.parts, config.run_dir)


def beir(folder: Path, corpus: list[str | tuple[str, str]], asked: list[str], **qrels: list[tuple[Any, ...]]) -> None:
    """A BEIR folder: texts, or (id, text); ids are d0, d1 …, q0, q1 … unless given."""
    pairs = [entry if isinstance(entry, tuple) else (f"d{at}", entry) for at, entry in enumerate(corpus)]
    small.write_rows(folder / "data/corpus.jsonl", [{"_id": name, "text": text} for name, text in pairs])
    small.write_rows(folder / "data/queries.jsonl", [{"_id": f"q{at}", "text": text} for at, text in enumerate(asked)])
    for split, rows in qrels.items():
        small.write_qrels(folder / f"data/qrels/{split}.tsv", rows)


# --- rows ---------------------------------------------------------------------------------------------


def test_identical_texts_share_a_row_that_lists_all_ids(tmp_path: Path) -> None:
    corpus: list[str | tuple[str, str]] = ["A", "B", ("z", "A"), ("d1", "B"), "a", ("b", "A"), ("d1", "B")]
    beir(tmp_path, corpus, ["q"], train=[("q0", "b", 1)])
    made = run(tmp_path)
    rows = [(row["id"], row["text"], row["other_ids"], row["source_rows"]) for row in made.documents]
    assert rows == [("d0", "A", ["z", "b"], [0, 2, 5]), ("d1", "B", [], [1, 3, 6]), ("d4", "a", [], [4])]
    assert [row["id_hash"] for row in made.documents] == hashes(["d0", "d1", "d4"]).tolist()
    assert [row["normalized"] for row in made.documents] == hashes(["a", "b", "a"]).tolist()
    assert made.anchors["q0"]["positives"] == [0]
    # Judged under an id that is not the one emitted: a positive by its text, not by its id.
    assert made.anchors["q0"]["known_by_id"] == [False]
    assert (made.stats["documents_read"], made.stats["duplicate_texts"], made.stats["rows"]) == (7, 4, 3)


def test_rows_anchors_and_grades_keep_the_order_of_the_source(tmp_path: Path) -> None:
    train = [("q1", "d3", 1), ("q0", "d2", 2), ("q1", "d0", 3), ("q1", "d3", 2), ("q2", "d1", 0), ("q1", "d1", 1)]
    beir(tmp_path, list("dcba"), ["zz", "yy", "xx"], train=train)
    made = run(tmp_path)
    assert [row["text"] for row in made.documents] == list("dcba")
    assert list(made.anchors) == ["q0", "q1"]
    # A pair judged twice counts once, where it came first, with its higher grade.
    assert (made.anchors["q1"]["positives"], made.anchors["q1"]["grades"]) == ([3, 0, 1], [2, 3, 1])
    assert made.stats["queries_without_positive"] == 1
    high = run(tmp_path, "high", min_grade=2)
    assert {name: row["positives"] for name, row in high.anchors.items()} == {"q0": [2], "q1": [0, 3]}


def test_positives_from_elsewhere_come_after_the_corpus(tmp_path: Path) -> None:
    small.write_rows(tmp_path / "pool.jsonl", [{"text": text} for text in ("one", "two", "three")])
    pairs = [("q1", "new b"), ("q2", "two"), ("q3", "new a"), ("q1", "new a"), ("q3", "one")]
    small.write_rows(tmp_path / "pairs.jsonl", [{"anchor": anchor, "positive": text} for anchor, text in pairs])
    made = run(tmp_path, format="pairs", path=tmp_path / "pairs.jsonl", corpus=tmp_path / "pool.jsonl", text="'{text}'")
    assert [row["text"] for row in made.rows("corpus")] == ["one", "two", "three"]
    assert [row["text"] for row in made.rows("added")] == ["new b", "new a"]
    # Ids are digests of the texts; a row in the source is what vectors are matched to, -1 where there is none.
    assert [row["id"] for row in made.documents] == [text_id(row["text"]) for row in made.documents]
    assert [row["source_rows"] for row in made.documents] == [[0, -1], [1, -1], [2], [-1], [-1, -1]]
    positives = {row["text"]: row["positives"] for row in made.anchors.values()}
    assert positives == {"q1": [3, 4], "q2": [1], "q3": [4, 0]}
    assert (made.stats["rows"], made.stats["added_positives"]) == (5, 2)


def test_the_corpus_names_a_row_even_where_a_positive_came_with_another_id(tmp_path: Path) -> None:
    small.write_rows(tmp_path / "pool.jsonl", [{"_id": "p1", "text": "one"}])
    small.write_rows(tmp_path / "pairs.jsonl", [{"anchor": "q", "positive": "one", "pid": "other"}])
    made = run(
        tmp_path,
        format="pairs",
        path=tmp_path / "pairs.jsonl",
        corpus=tmp_path / "pool.jsonl",
        text="'{text}'",
        columns="{positive_id: pid}",
    )
    assert [(row["id"], row["other_ids"]) for row in made.documents] == [("p1", ["other"])]


def test_positives_of_all_splits_are_known_and_only_one_split_asks(tmp_path: Path) -> None:
    beir(
        tmp_path,
        list("abcdef"),
        ["zz", "yy"],
        train=[("q0", "d4", 1), ("q0", "d1", 1)],
        test=[("q0", "d2", 1), ("q1", "d3", 1), ("q0", "d0", 0)],
    )
    made = run(tmp_path)
    assert list(made.anchors) == ["q0"]
    assert (made.anchors["q0"]["positives"], made.anchors["q0"]["known"]) == ([4, 1], [1, 2, 4])
    assert list(run(tmp_path, "test", split="test").anchors) == ["q0", "q1"]


def test_anchors_that_read_the_same_share_their_positives(tmp_path: Path) -> None:
    asked = ["Same  question", "same question", "other", "ｓａｍｅ\u00a0QUESTION", "same question"]
    train = [("q0", "d0", 1), ("q1", "d1", 1), ("q1", "d0", 1), ("q2", "d2", 1), ("q4", "d4", 1)]
    beir(tmp_path, list("abcde"), asked, train=train, test=[("q3", "d3", 1)])
    made = run(tmp_path)
    # Once for all of them, and nothing of it in the part of the anchors; q2 alone asks its text.
    pairs = [(pair["normalized"], pair["row"]) for pair in made.rows("namesakes")]
    assert pairs == [(hashes(["same question"])[0], row) for row in (0, 1, 3, 4)]
    assert {row["normalized"] for row in made.anchors.values()} == {pairs[0][0], hashes(["other"])[0]}


def test_a_query_that_joins_others_changes_no_part_of_theirs(tmp_path: Path) -> None:
    asked = [f"question {i % 200}" for i in range(1000)]
    train = [(f"q{i}", f"d{i}", 1) for i in range(1000)]
    beir(tmp_path, [f"text {i}" for i in range(1000)], asked, train=train)
    before = run(tmp_path, "a", part_rows=16)
    beir(tmp_path, [f"text {i}" for i in range(1000)], [*asked, "Question 7"], train=[*train, ("q1000", "d0", 1)])
    after = run(tmp_path, "b", part_rows=16)
    kinds = {kind: [part.identity() for part in before.parts if part.kind == kind] for kind in ("anchors", "namesakes")}
    later = {kind: [part.identity() for part in after.parts if part.kind == kind] for kind in kinds}
    assert len(kinds["anchors"]) > 30 and len(kinds["namesakes"]) > 30
    assert later["anchors"][: len(kinds["anchors"]) - 1] == kinds["anchors"][:-1]
    assert sum(part not in kinds["namesakes"] for part in later["namesakes"]) <= 8


def test_an_anchor_knows_the_document_it_equals(tmp_path: Path) -> None:
    beir(tmp_path, ["x", "which?", "y"], ["which?", "Which?"], train=[("q0", "d0", 1), ("q1", "d0", 1)])
    made = run(tmp_path)
    assert {name: row["self_row"] for name, row in made.anchors.items()} == {"q0": 1, "q1": -1}
    assert len({row["normalized"] for row in [*made.anchors.values(), made.documents[1]]}) == 1


def test_the_same_bytes_whatever_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus: list[Any] = small.documents(60)
    corpus += [corpus[7] | {"_id": "again"}, corpus[50] | {"_id": "and again"}]
    small.build(tmp_path, corpus)
    whole = run(tmp_path)
    assert len([part for part in whole.parts if part.kind == "corpus"]) > 4
    for module in (joins, spool):
        monkeypatch.setattr(module, "BATCH", 7)
    assert run(tmp_path, "again").parts[0] is not whole.parts[0]
    assert small.output(tmp_path / "again") == small.output(tmp_path / "run")


def test_anchors_come_no_more_at_a_time_than_a_part_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their texts are in memory: of any length, so what a person lowers is data.part_rows."""
    small.build(tmp_path)
    batches, anchors = [], joins.anchors

    def counted(*arguments: Any) -> Any:
        for table in anchors(*arguments):
            batches.append(table.num_rows)
            yield table

    monkeypatch.setattr(joins, "anchors", counted)
    graph.mine(load_config(small.settings(tmp_path), ["data.part_rows=5"]), only="ingest")
    assert max(batches) <= 5 and sum(batches) == small.QUERIES


def test_too_little_memory_names_the_setting(tmp_path: Path) -> None:
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path))
    resources = config.resources.model_copy(update={"memory_budget": 2**20})  # less than a config may say
    with pytest.raises(BudgetError, match=r"resources\.memory_budget") as refused:
        graph.mine(config.model_copy(update={"resources": resources}), only="ingest")
    assert refused.value.there == 2**19


# --- what is not mined --------------------------------------------------------------------------------


def mined(folder: Path, **overrides: Any) -> list[Row]:
    """All that can be a negative of each anchor."""
    options = {"mining.num_negatives": 4, "mining.range_max": 9, **overrides}
    config = load_config(small.settings(folder), [f"{name}={value}" for name, value in options.items()])
    rows: list[Row] = pq.read_table(graph.mine(config).triplets).to_pylist()
    return rows


def write_vectors(folder: Path, documents: int, queries: int) -> None:
    np.save(folder / "corpus.npy", small.vectors(documents, 1))
    np.save(folder / "anchors.npy", small.vectors(queries, 2))


def test_no_positive_of_another_split_and_no_shared_one_is_a_negative(tmp_path: Path) -> None:
    asked = ["same", "SAME", "other"]
    train, test = [("q0", "d0", 1), ("q1", "d1", 1), ("q2", "d2", 1)], [("q0", "d3", 1), ("q2", "d4", 1)]
    beir(tmp_path, list("abcdefg"), asked, train=train, test=test)
    write_vectors(tmp_path, 7, 3)
    negatives: dict[str, set[str]] = {}
    for row in mined(tmp_path, **{"mining.num_negatives": 7}):
        negatives.setdefault(row["anchor_id"], set()).add(row["negative_id"])
    everything = {f"d{i}" for i in range(7)}
    assert negatives["q0"] == everything - {"d0", "d1", "d3"}
    assert negatives["q1"] == everything - {"d0", "d1", "d3"}
    assert negatives["q2"] == everything - {"d2", "d4"}


@pytest.mark.parametrize("allowed", [True, False])
def test_positives_from_elsewhere_are_candidates_only_where_allowed(allowed: bool, tmp_path: Path) -> None:
    pool, added = [f"pool {i}" for i in range(6)], [f"added {i}" for i in range(4)]
    small.write_rows(tmp_path / "pool.jsonl", [{"text": text} for text in pool])
    small.write_rows(tmp_path / "pairs.jsonl", [{"anchor": f"q{i}", "positive": text} for i, text in enumerate(added)])
    vectors = small.vectors(10, 1)
    table = pa.table({"id": [text_id(text) for text in pool + added], "vector": list(vectors)})
    pq.write_table(table, tmp_path / "corpus.parquet")
    np.save(tmp_path / "anchors.npy", small.vectors(4, 2))
    rows = mined(
        tmp_path,
        **{
            "data.format": "pairs",
            "data.path": tmp_path / "pairs.jsonl",
            "data.corpus": tmp_path / "pool.jsonl",
            "data.text": "'{text}'",
            "data.add_positives": allowed,
            "encoder.corpus_vectors": tmp_path / "corpus.parquet",
            "mining.num_negatives": 9,
        },
    )
    for number, positive in enumerate(added):
        own = [row for row in rows if row["anchor"] == f"q{number}"]
        expected = set(pool) | (set(added) - {positive} if allowed else set())
        assert {row["negative"] for row in own} == expected
        assert {row["positive"] for row in own} == {positive}
        # Ranks count what can be a candidate, and every score is exact.
        anchor, score = small.vectors(4, 2)[number], {}
        for text, vector in zip(pool + added, vectors, strict=True):
            score[text] = float(anchor @ vector / np.linalg.norm(anchor) / np.linalg.norm(vector))
        seen = sorted(pool + (added if allowed else []), key=lambda text: -score[text])
        assert {row["negative"]: row["negative_rank"] for row in own} == {text: seen.index(text) for text in expected}
        for row in own:
            assert row["negative_score"] == pytest.approx(score[row["negative"]], abs=2e-3)
            assert row["positive_score"] == pytest.approx(score[positive], abs=2e-3)


# --- where parts end ----------------------------------------------------------------------------------

CUTS = st.lists(st.integers(0, 2**64 - 1), max_size=120)
SIZES = st.integers(1, 16)


def cut(cuts: list[int], part_rows: int, batches: list[int] | None = None) -> list[int]:
    """Sizes of the parts, the stream coming in batches of these sizes and then the rest."""
    ends: list[int] = []
    start = 0
    for size in [*(batches or []), len(cuts)]:
        batch = np.array(cuts[start : start + size], dtype=np.uint64)
        since = start - (ends[-1] if ends else 0)
        ends += [start + end for end in ingest.cut_points(batch, since, part_rows)]
        start += len(batch)
    last = [] if ends and ends[-1] == len(cuts) else [len(cuts)]
    return [high - low for low, high in pairwise([0, *ends, *last])]


def naive(cuts: list[int], part_rows: int) -> list[int]:
    """The rule read off its description, row by row."""
    least, most = max(1, part_rows // 2), 2 * part_rows
    sizes, size = [], 0
    for value in cuts:
        size += 1
        if (value % least == 0 and size >= least) or size == most:
            sizes.append(size)
            size = 0
    return [*sizes, size] if size or not cuts else sizes


@settings(max_examples=150, deadline=None)
@given(cuts=CUTS, part_rows=SIZES, batches=st.lists(st.integers(0, 20), max_size=8))
def test_parts_end_where_the_rule_says_however_the_stream_comes(
    cuts: list[int], part_rows: int, batches: list[int]
) -> None:
    sizes = cut(cuts, part_rows)
    assert sizes == naive(cuts, part_rows)
    assert cut(cuts, part_rows, batches) == sizes
    assert all(max(1, part_rows // 2) <= size <= 2 * part_rows for size in sizes[:-1])
    assert sum(sizes) == len(cuts)


@settings(max_examples=60, deadline=None)
@given(cuts=CUTS, more=CUTS, part_rows=SIZES)
def test_what_is_appended_changes_the_last_part_only(cuts: list[int], more: list[int], part_rows: int) -> None:
    before = cut(cuts, part_rows)
    assert cut(cuts + more, part_rows)[: len(before) - 1] == before[:-1]


def texts_of(made: Ingested) -> list[str]:
    return [part.meta["texts"] for part in made.parts if part.kind == "corpus"]


def test_an_edit_touches_the_parts_around_it(tmp_path: Path) -> None:
    texts: list[str | tuple[str, str]] = [(f"d{i}", f"text {i}") for i in range(600)]
    train = {"train": [("q0", "d0", 1)]}
    beir(tmp_path, texts, ["q"], **train)
    before = texts_of(run(tmp_path, "a", part_rows=16))
    assert len(before) > 25

    beir(tmp_path, [*texts, ("new", "appended")], ["q"], **train)
    appended = texts_of(run(tmp_path, "b", part_rows=16))
    assert appended[: len(before) - 1] == before[:-1]

    beir(tmp_path, [*texts[:300], ("new", "put in the middle"), *texts[300:]], ["q"], **train)
    inserted = texts_of(run(tmp_path, "c", part_rows=16))
    assert 0 < len(set(inserted) - set(before)) <= 4
    assert inserted[:10] == before[:10]
    assert inserted[-10:] == before[-10:]


# --- texts --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert normalize(f"\n {text}\u3000") == once
    assert normalize(text.upper().lower()) == normalize(text.lower().upper().lower())


@pytest.mark.parametrize(
    "text", ["straße 2", "STRASSE  2", "\tＳｔｒａßｅ\n\u00a02 ", "Stra\u00dfe ²", "STRA\u1e9eE 2", "ſtraſſe 2"]
)
def test_case_width_and_white_space_do_not_count(text: str) -> None:
    assert normalize(text) == "strasse 2"


def test_accents_and_punctuation_count() -> None:
    assert len({normalize(text) for text in ("resume", "résumé", "resume.", "re sume")}) == 4
    assert normalize("re\u0301sume\u0301") == normalize("résumé")


def test_generated_ids_never_change() -> None:
    assert text_id("text") == "d732c6be860e019351f99173fa6ae612"
    assert text_id("Text") != text_id("text")
    assert hashes(["a", "b", "a"]).tolist() == [hashes(["a"])[0], hashes(["b"])[0], hashes(["a"])[0]]
    both = digests(["a", "b", "a"])
    assert both.shape == (3, 2)
    assert (both[0] == both[2]).all()
    assert (both[0] != both[1]).all()
