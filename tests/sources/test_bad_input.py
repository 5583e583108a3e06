"""Bad input ends in an error that says where and what to do, and costs nothing that was made before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
from upkeep_of import config_of

from negpipe import graph, mine
from negpipe.encoders.blocks import ComputedVectors
from negpipe.engine.stage import Task
from negpipe.errors import InputError

Break = Callable[[Path], object]


@pytest.fixture
def folder(finished: Path) -> Iterator[Path]:
    """The same, free to be broken: its source is put back afterwards."""
    source = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and not in_run(path)}
    yield finished
    for path, content in source.items():
        path.write_bytes(content)
    assert mine(finished / "config.yaml").ran == ()  # What went wrong in between has cost nothing.
    graph.clean(config_of(finished / "run"))


def in_run(path: Path) -> bool:
    return "run" in path.parts


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder in which nothing has run."""
    small.build(tmp_path)
    return tmp_path


def edit_line(name: str, line: int, **values: Any) -> Break:
    """Change a JSON line (1-based); the value ... deletes a key."""

    def edit(folder: Path) -> None:
        path = folder / "data" / name
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        merged = rows[line - 1] | values
        rows[line - 1] = {key: value for key, value in merged.items() if value is not ...}
        small.write_rows(path, rows)

    return edit


def rename_key(name: str, old: str, new: str) -> Break:
    def edit(folder: Path) -> None:
        path = folder / "data" / name
        path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))

    return edit


def judge(*rows: tuple[Any, ...]) -> Break:
    return lambda folder: small.write_qrels(folder / "data/qrels/train.tsv", [*small.judgments(), *rows])


def poison(name: str, row: int, value: float) -> Break:
    def edit(folder: Path) -> None:
        vectors = np.load(folder / name)
        vectors[row] = value
        np.save(folder / name, vectors)

    return edit


def save(name: str, values: Any) -> Break:
    return lambda folder: np.save(folder / name, values)


def as_parquet(ids: list[Any] | None, vectors: Any) -> Break:
    def edit(folder: Path) -> None:
        columns = {} if ids is None else {"id": ids}
        pq.write_table(pa.table(columns | {"vector": list(vectors)}), folder / "corpus.parquet", row_group_size=7)
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("corpus.npy", "corpus.parquet"))

    return edit


RAGGED = [*small.vectors(20, 1), np.ones(5, np.float32), *small.vectors(19, 1)]
IDS = [f"d{i}" for i in range(small.DOCUMENTS)]

# name: how the source is broken, what is set, what the message must say
CASES: dict[str, tuple[Break, str, list[str]]] = {
    "corpus without its text column": (
        rename_key("corpus.jsonl", "text", "body"),
        "",
        ["corpus.jsonl, row 1, field 'text'", "column not found", "_id, title, body", "data.text"],
    ),
    "queries without their text column": (
        rename_key("queries.jsonl", "text", "body"),
        "",
        ["queries.jsonl, row 1, field 'text'", "column not found", "data.columns.query_text"],
    ),
    "judgments without a column": (
        lambda folder: (folder / "data/qrels/train.tsv").write_text("query\tcorpus-id\nq1\td1\n"),
        "",
        ["train.tsv, row 1, field 'query-id'", "query, corpus-id", "data.columns.qrels_query_id"],
    ),
    "empty document": (
        edit_line("corpus.jsonl", 4, title="", text=" \t"),
        "",
        ["corpus.jsonl, row 4, field 'text'", "empty", "data.on_empty: skip"],
    ),
    "null document": (
        edit_line("corpus.jsonl", 4, title="", text=None),
        "",
        ["corpus.jsonl, row 4, field 'text'", "null", "data.on_empty: skip"],
    ),
    "empty query": (
        edit_line("queries.jsonl", 2, text=""),
        "",
        ["queries.jsonl, row 2, field 'text'", "empty", "data.on_empty: skip"],
    ),
    "no id": (
        edit_line("corpus.jsonl", 9, _id=None),
        "",
        ["corpus.jsonl, row 9, field '_id'", "no id", "Give every row an id"],
    ),
    "duplicate document id, another text": (
        edit_line("corpus.jsonl", 7, _id="d2"),
        "",
        ["corpus.jsonl, row 7", "document id 'd2'", "corpus.jsonl, row 3", "its own id"],
    ),
    "duplicate query id, another text": (
        edit_line("queries.jsonl", 7, _id="q2"),
        "",
        ["queries.jsonl, row 7", "query id 'q2'", "queries.jsonl, row 3", "its own id"],
    ),
    "judgment of an unknown document": (
        judge(("q1", "nowhere", 1), ("q2", "nowhere", 1)),
        "",
        [
            "train.tsv, row 14",
            "unknown document id 'nowhere' (in total 2 of an unknown document)",
            "data.on_unknown_id: skip",
        ],
    ),
    "several ids in one cell": (
        judge(("q1", "d1, d2", 1)),
        "",
        ["train.tsv, row 14", "unknown document id 'd1, d2'", "Several ids in one cell? Write one judgment per line"],
    ),
    "judgment of an unknown query": (
        judge(("nobody", "d1", 1)),
        "",
        ["train.tsv, row 14", "unknown query id 'nobody' (in total 1 of an unknown query)", "data.on_unknown_id: skip"],
    ),
    "no anchor has a positive": (
        lambda folder: None,
        "data.min_grade=2",
        ["data, field 'data.split'", "positive of grade 2.0 or more in split 'train'", "Available splits: train"],
    ),
    "no such split": (
        lambda folder: None,
        "data.split=dev",
        ["qrels/dev.tsv, field 'split'", "Available splits: train", "data.split"],
    ),
    "broken line": (
        lambda folder: (folder / "data/corpus.jsonl").write_text('{"_id": "d0", "text": "x"}\n{"_id": '),
        "",
        ["corpus.jsonl, row 2", "broken JSON", "one JSON object per line"],
    ),
    "NaN in a document's vector": (
        poison("corpus.npy", 5, np.nan),
        "",
        ["corpus.npy, row 5", "document 'd5'", "not finite", "Fix the vector"],
    ),
    "infinity in an anchor's vector": (
        poison("anchors.npy", 3, np.inf),
        "",
        ["anchors.npy, row 3", "anchor 'q3'", "not finite", "Fix the vector"],
    ),
    "zero vector": (
        poison("corpus.npy", 17, 0),
        "",
        ["corpus.npy, row 17", "document 'd17'", "zero", "Fix the vector"],
    ),
    "too large for float16": (
        poison("corpus.npy", 2, 1e5),
        "encoder.normalize=false",
        ["corpus.npy, row 2", "document 'd2'", "float16", "encoder.storage: float32"],
    ),
    "NaN by id": (
        as_parquet(IDS[::-1], [np.full(8, np.nan) if i == 30 else np.ones(8) for i in range(40)]),
        "",
        ["corpus.parquet", "document 'd9'", "not finite", "Fix the vector"],
    ),
    "anchors of another dimension": (
        save("anchors.npy", np.ones((small.QUERIES, 5), np.float32)),
        "",
        ["anchors.npy has vectors of dimension 5", "corpus.npy of 8", "encoder.anchor_vectors", "same model"],
    ),
    "vectors of two dimensions": (
        as_parquet(None, RAGGED),
        "",
        ["corpus.parquet, row 20, field 'vector'", "8 numbers", "the same dimension"],
    ),
    "too few vectors": (
        save("corpus.npy", small.vectors(39, 1)),
        "",
        ["corpus.npy, field 'encoder.corpus_vectors'", "39 vectors for 40 rows", "one vector per source row"],
    ),
    "too many vectors": (
        save("anchors.npy", small.vectors(13, 1)),
        "",
        ["anchors.npy, field 'encoder.anchor_vectors'", "13 vectors for 12 rows", "one vector per source row"],
    ),
    "an id without a vector": (
        as_parquet(IDS[1:], small.vectors(39, 1)),
        "",
        ["corpus.parquet, field 'encoder.corpus_vectors'", "no vector for id 'd0'", "Add the missing vectors"],
    ),
    "one id, two vectors": (
        as_parquet([*IDS, "d4"], small.vectors(41, 1)),
        "",
        ["corpus.parquet, row 40, field 'id'", "the id of row 4", "a different vector", "one vector per id"],
    ),
    "whole numbers for vectors": (
        save("corpus.npy", np.ones((40, 8), np.int32)),
        "",
        ["corpus.npy, field 'encoder.corpus_vectors'", "matrix of floats", "int32"],
    ),
    "no vectors at all": (
        lambda folder: (folder / "corpus.npy").write_bytes(b"not an array"),
        "",
        ["corpus.npy, field 'encoder.corpus_vectors'", "not a readable .npy file"],
    ),
    "window beyond the corpus": (
        lambda folder: None,
        "mining.range_min=40 mining.range_max=50",
        ["field 'mining.range_min'", "rank 40", "40 documents", "below the number of documents"],
    ),
    "no such folder": (
        lambda folder: None,
        "data.path=./dada",
        ["./dada", "file or folder not found"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_says_where_and_what_to_do_and_nothing_is_lost(name: str, folder: Path) -> None:
    broken, overrides, fragments = CASES[name]
    before = small.made(folder / "run")
    broken(folder)
    options = [word for override in overrides.split() for word in ("--set", override)]

    outcome = small.run("mine", folder / "config.yaml", *options)

    assert outcome.code == 3, outcome.err
    message = next(line for line in outcome.err.splitlines() if line.startswith("negpipe: "))
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert before.items() <= small.made(folder / "run").items()


def test_window_smaller_than_the_negatives_asked_for(fresh: Path) -> None:
    outcome = small.run("mine", fresh / "config.yaml", "--set", "mining.range_max=2")
    assert outcome.code == 2
    assert "mining.num_negatives (3)" in outcome.err
    assert "widen the window or lower num_negatives" in outcome.err
    assert not (fresh / "run").exists()


def test_empty_texts_are_left_out_and_counted(fresh: Path) -> None:
    edit_line("corpus.jsonl", 1, title="", text=None)(fresh)  # d0, the positive of q0
    edit_line("corpus.jsonl", 20, title="", text="   ")(fresh)
    edit_line("queries.jsonl", 3, text="")(fresh)
    result = mine(fresh / "config.yaml", ["data.on_empty=skip"])
    ingest = result.stats["ingest"]
    assert (ingest["skipped_empty"], ingest["rows"], ingest["anchors"]) == (3, 38, 10)
    # A judgment of a row that was left out is no judgment of an unknown id.
    assert ingest["unknown_judgments"] == 0
    rows = pq.read_table(result.triplets).to_pylist()
    assert {row["anchor_id"] for row in rows} == {f"q{i}" for i in range(12)} - {"q0", "q2"}
    assert {"d0", "d19"}.isdisjoint(row["negative_id"] for row in rows)


def test_judgments_of_unknown_ids_are_rejected_and_counted(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge(("q1", "d1|d2", 1), ("nobody", "d1", 1))(fresh)
    result = mine(fresh / "config.yaml", ["data.on_unknown_id=skip"])
    assert result.stats["ingest"]["unknown_judgments"] == 2
    assert result.stats["ingest"]["positives"] == small.QUERIES
    (told,) = [message for message in caplog.messages if "unknown id" in message]
    assert told.startswith(
        "2 of 14 relevance judgments name an unknown id (1 of an unknown query, 1 of an unknown document) and are"
        " rejected, such as document id 'd1|d2'"
    )
    assert told.endswith("train.tsv, row 14. Several ids in one cell? Write one judgment per line")


def test_anchor_without_a_positive_is_ignored_and_counted(fresh: Path) -> None:
    rows = [(*pair[:2], 0) if pair[0] == "q4" else pair for pair in small.judgments() if pair[0] != "q7"]
    small.write_qrels(fresh / "data/qrels/train.tsv", rows)
    result = mine(fresh / "config.yaml")
    assert result.stats["ingest"]["queries_without_positive"] == 2
    assert result.stats["ingest"]["anchors"] == small.QUERIES - 2
    assert {"q4", "q7"}.isdisjoint(pq.read_table(result.triplets)["anchor_id"].to_pylist())


def test_a_depth_beyond_the_corpus_is_clamped(fresh: Path) -> None:
    result = mine(fresh / "config.yaml", ["search.depth=1000", "mining.range_min=35", "mining.range_max=900"])
    assert result.stats["search"]["depth"] == small.DOCUMENTS
    ranks = pq.read_table(result.triplets)["negative_rank"].to_pylist()
    assert ranks
    assert all(35 <= rank < small.DOCUMENTS for rank in ranks)


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        ("./no/such/model", ["folder './no/such/model' not found", "pkg://PACKAGE/FOLDER"]),
        ("pkg://no_such_package/model", ["no_such_package", "not installed", "pip install"]),
        ("pkg://numpy/nowhere", ["package 'numpy' has no folder 'nowhere'"]),
        ("nobody/no-such-model", ["'nobody/no-such-model'", "not available on the hub", "Check the name"]),
        ("FOLDER", ["contains no config.json", "save_pretrained"]),
    ],
)
def test_a_model_that_is_not_there_is_known_before_the_source_is_read(
    model: str, fragments: list[str], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = str(fresh) if model == "FOLDER" else model
    options = ["--set", "encoder.backend=flagembedding", "--set", f"encoder.model={name}"]
    outcome = small.run("mine", fresh / "config.yaml", *options)
    assert outcome.code == 3
    assert [f for f in ["negpipe: field 'encoder.model': ", *fragments] if f not in outcome.err] == [], outcome.err
    assert not (fresh / "run/ingest").exists()


def test_a_window_beyond_the_corpus_is_known_before_anything_is_encoded(fresh: Path) -> None:
    outcome = small.run("mine", fresh / "config.yaml", "--set", "mining.range_min=40", "--set", "mining.range_max=50")
    assert outcome.code == 3
    assert (fresh / "run/ingest").exists()
    assert not (fresh / "run/encode").exists()


def test_a_text_the_model_gives_no_vector_for_is_named_by_its_id(fresh: Path) -> None:
    class Failing:
        def encode(self, texts: Any, kind: Any, on_batch: Any, on_cut: Any = None) -> Any:
            raise InputError("the vector of this text is zero", row=3, remedy="Look at the text")
            yield

    table = pa.table({"id": ["a", "b", "c", "d"], "text": ["1", "2", "3", "4"]})
    with pytest.raises(InputError, match=r"^corpus, id 'd': the vector of this text is zero\. Look"):
        list(
            ComputedVectors(Failing(), {}, lambda dimension: None).blocks(
                Task("key", "corpus", 4, {}), table, {}, lambda units, note: None
            )
        )


def test_vectors_by_row_and_by_id_give_the_same_rows(tmp_path: Path) -> None:
    corpus: list[Any] = small.documents()
    corpus[10] = {"_id": "empty", "title": "", "text": ""}
    corpus += [corpus[5], corpus[6] | {"_id": "copy of 6"}, corpus[7] | {"_id": "copy of 7"}]
    asked: list[Any] = small.queries()
    asked[4:4] = [{"_id": "empty", "text": None}, asked[2]]
    config = small.build(tmp_path, corpus, asked)
    by_row = {"corpus": small.vectors(len(corpus), 1), "anchors": small.vectors(len(asked), 2)}
    by_row["corpus"][40:42] = by_row["corpus"][5:7]  # equal texts, equal vectors; the copy of 7 has its own
    by_row["anchors"][5] = by_row["anchors"][2]
    for name, values in by_row.items():
        np.save(tmp_path / f"{name}.npy", values)
        ids = [row["_id"] for row in (corpus if name == "corpus" else asked)]
        order = np.random.default_rng(7).permutation(len(ids))
        table = pa.table({"name": [ids[i] for i in order], "vector": list(values[order])})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=5)

    one = mine(config, ["data.on_empty=skip"])
    options = [
        f"encoder.{'anchor' if name == 'anchors' else name}_vectors={tmp_path / name}.parquet"
        for name in ("corpus", "anchors")
    ]
    other = mine(config, ["data.on_empty=skip", f"run_dir={tmp_path / 'other'}", *options])

    assert one.stats["encode"] == other.stats["encode"]
    assert one.stats["encode"]["differing_duplicates"] == 1
    same = [name for name in small.output(one.run_dir) if name.startswith(("triplets/", "search/"))]
    assert [small.output(one.run_dir)[n] for n in same] == [small.output(other.run_dir)[n] for n in same]
    assert same
    # And they are the vectors of the rows they stand for.
    positives = {row["_id"]: by_row["corpus"][at] for at, row in reversed(list(enumerate(corpus)))}
    anchors = {row["_id"]: by_row["anchors"][at] for at, row in reversed(list(enumerate(asked)))}
    for row in pq.read_table(one.triplets).to_pylist():
        for side in ("positive", "negative"):
            pair = anchors[row["anchor_id"]], positives[row[f"{side}_id"]]
            cosine = float(np.dot(*pair) / np.prod([np.linalg.norm(vector) for vector in pair]))
            assert row[f"{side}_score"] == pytest.approx(cosine, abs=2e-3)
