"""Bad data in every format: a named error with file and row, or a row that is rejected, counted and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
import yaml
from bad_data import DOCUMENTS, LONG, QUERIES, Fault, Source, faults, sources
from upkeep_of import config_of

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Data
from negpipe.engine import upkeep
from negpipe.errors import DamagedError, InputError
from negpipe.ingest.rejected import NAME
from negpipe.sources import BadRow, Document
from negpipe.sources import read as read_source

FAULTS = list(faults())
Record = Callable[[str, object], None]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def ingest(folder: Path, settings: dict[str, Any], *overrides: str) -> graph.Result:
    config = small.settings(folder) | {"data": settings}
    return graph.mine(load_config(config, list(overrides)), only="ingest")


def listed(result: graph.Result) -> list[dict[str, Any]]:
    path = result.run_dir / NAME
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()] if path.exists() else []


def test_there_are_enough_cases() -> None:
    assert len(FAULTS) >= 300
    assert {fault.format for fault in FAULTS} == set(sources())
    assert len(set(map(str, FAULTS))) == len(FAULTS)


@pytest.mark.guarantee(
    "a row is broken, empty or of a wrong type",
    "named by file, row and field (a broken line of a hub repository by file alone); or, up to `--max-"
    "bad-rows N`, rejected and listed in `rejected.jsonl`",
    section="input",
)
@pytest.mark.torture
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_bad_row_is_refused_by_file_row_and_field(fault: Fault, tmp_path: Path, record_property: Record) -> None:
    source = sources()[fault.format]
    source.files[fault.file].append(fault.row)
    settings = source.write(tmp_path / "source")
    if fault.kind == "unknown_id":
        with pytest.raises(InputError) as caught:
            ingest(tmp_path, settings)
        error = caught.value
    else:
        # The one error that ends an ingest; below, every format goes through a whole one.
        (error,) = (bad.error for bad in read_source(Data(**settings)) if isinstance(bad, BadRow))
    row = source.row_of(fault.file, len(source.files[fault.file]) - 1)
    assert (error.row, error.field) == (row, fault.field)
    file = f"source/{fault.file}" if not source.readme else f"source/{Path(fault.file).parent}"
    assert str(error).startswith(f"{tmp_path}/{file}")
    assert [word for word in fault.words if word not in str(error)] == [], str(error)
    record_property("count: bad inputs tried", 1)


@pytest.mark.slow
@pytest.mark.guarantee("a row is broken, empty or of a wrong type")
@pytest.mark.torture
@pytest.mark.parametrize("name", sources())
def test_as_many_bad_rows_as_allowed_are_left_out_and_listed(
    name: str, tmp_path: Path, record_property: Record
) -> None:
    """All bad rows of a format in one source: what is left is the sound one."""
    sound = ingest(tmp_path / "sound", sources()[name].write(tmp_path / "sound/source"))
    source = sources()[name]
    own = [fault for fault in FAULTS if fault.format == name]
    expected: list[tuple[int, str | None, str]] = []
    for file in source.files:
        unknown: list[tuple[int, str | None, str]] = []
        for fault in own:
            if fault.file == file:
                source.files[file].append(fault.row)
                row = source.row_of(file, len(source.files[file]) - 1)
                (unknown if fault.kind == "unknown_id" else expected).append((row, fault.field, fault.kind))
        expected += unknown
    settings = source.write(tmp_path / "source")
    result = ingest(tmp_path, settings, f"data.max_bad_rows={len(own)}")
    rejected = listed(result)
    assert [(row["row"], row["field"], row["kind"]) for row in rejected] == expected
    assert all(row["reason"] and row["raw"] and len(row["raw"]) <= 300 for row in rejected)
    assert result.stats["ingest"]["rejected_rows"] == len(own)
    same = ("rows", "anchors", "positives")
    assert [result.stats["ingest"][key] for key in same] == [sound.stats["ingest"][key] for key in same]
    record_property("count: bad inputs tried", len(own))

    with pytest.raises(InputError, match=rf"max_bad_rows \({len(own) - 1:,}\) allows.*--max-bad"):
        ingest(tmp_path, settings, f"data.max_bad_rows={len(own) - 1}")


def test_the_list_is_a_file_of_the_run_like_the_others(tmp_path: Path) -> None:
    source = sources()["beir"]
    source.files["corpus.jsonl"][4:4] = [b"\x1b]0;owned\x07", {"_id": "e", "text": ""}]
    settings = source.write(tmp_path / "source")
    result = ingest(tmp_path, settings, "data.max_bad_rows=2")
    shown = (result.run_dir / NAME).read_bytes()
    assert b"\x1b" not in shown
    assert [row["raw"] for row in listed(result)] == ["\x1b]0;owned\x07", '{"_id": "e", "text": ""}']

    # Damage is found, and the same bytes are made again.
    (result.run_dir / NAME).write_bytes(shown.replace(b"owned", b"OWNED"))
    assert ".jsonl has changed since it was written" in " ".join(
        upkeep.verify(config_of(result.run_dir), graph.inventory(config_of(result.run_dir)))
    )
    config = load_config(small.settings(tmp_path) | {"data": settings}, ["data.max_bad_rows=2"])
    graph.mine(config, only="ingest", repair=True)
    assert (result.run_dir / NAME).read_bytes() == shown
    (result.run_dir / NAME).unlink()
    assert graph.status(config)[0].state == "damaged"
    ingest(tmp_path, settings, "data.max_bad_rows=2")
    assert (result.run_dir / NAME).read_bytes() == shown

    # Another setting, another list, and back.
    ingest(tmp_path, settings, "data.max_bad_rows=1", "data.on_empty=skip")
    assert (result.run_dir / NAME).read_bytes() == shown
    source.files["corpus.jsonl"].pop(4)
    source.write(tmp_path / "source")
    assert len(listed(ingest(tmp_path, settings, "data.on_empty=skip"))) == 1
    with pytest.raises(InputError, match=r"data\.on_empty: skip"):
        ingest(tmp_path, settings)
    source.files["corpus.jsonl"].pop(4)
    source.write(tmp_path / "source")
    assert ingest(tmp_path, settings).stats["ingest"]["rejected_rows"] == 0
    assert not (result.run_dir / NAME).exists()


def test_the_list_survives_clean_and_nothing_else_in_the_run_directory_goes(tmp_path: Path) -> None:
    source = sources()["beir"]
    source.files["corpus.jsonl"].append(b"x")
    settings = source.write(tmp_path / "source")
    result = ingest(tmp_path, settings, "data.max_bad_rows=1")
    (result.run_dir / "audit.json").write_text("{}", encoding="utf-8")
    ingest(tmp_path, settings, "data.max_bad_rows=1", "data.part_rows=2")
    assert graph.clean(config_of(result.run_dir)) > 0
    assert (result.run_dir / "audit.json").exists()
    assert (result.run_dir / NAME).exists()


def test_the_option_is_the_setting_and_people_are_told(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    path = tmp_path / "data/corpus.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1], lines[4] = '{"_id": "d1", "text": \x1b', '{"_id": "d4", "text": 4}'
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    refused = small.run("mine", config)
    assert refused.code == 3
    assert "corpus.jsonl, row 2: broken JSON" in refused.err
    refused = small.run("mine", config, "--max-bad-rows", 1)
    assert refused.code == 3
    assert "corpus.jsonl, row 5, field 'text': expected a text, got 4; the source has more bad rows" in refused.err
    mined = small.run("mine", config, "--max-bad-rows", 2)
    assert mined.code == 0, mined.err
    assert f"2 source rows rejected: {tmp_path}/run/{NAME}" in mined.out
    kept = yaml.safe_load((tmp_path / "run/.negpipe/config.yaml").read_text(encoding="utf-8"))
    assert kept["data"]["max_bad_rows"] == 2  # so that what comes next needs no more than the run directory
    assert "source rows rejected 2" in mined.err
    status = small.run("status", config, "--set", "data.max_bad_rows=2")
    assert f"ingest: 2 source rows rejected, see {NAME}" in status.out
    assert [line.split()[1] for line in status.out.splitlines()[1:6]] == ["current"] * 5
    # Vectors are matched to the rows of the source, so those of the rows behind are still their own.
    whole = small.build(tmp_path / "whole")
    assert small.run("mine", whole).code == 0
    scores = [pairs_of(folder) for folder in (tmp_path, tmp_path / "whole")]
    assert all(scores[1][pair] == score for pair, score in scores[0].items() if pair in scores[1])
    assert len(scores[0].keys() & scores[1].keys()) > 20


def pairs_of(folder: Path) -> dict[tuple[str, str], float]:
    rows = pq.read_table(folder / "run/triplets").to_pylist()
    return {(row["anchor_id"], row["negative_id"]): row["negative_score"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("side", ["queries.jsonl", "qrels/train.tsv"])
def test_a_broken_row_of_one_table_moves_no_vector_of_another(side: str, tmp_path: Path) -> None:
    config = small.build(tmp_path)
    path = tmp_path / "data" / side
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([head, "{", *lines[1:]]) + "\n", encoding="utf-8")
    assert small.run("mine", config, "--max-bad-rows", 2).code == 0
    whole = small.build(tmp_path / "whole")
    assert small.run("mine", whole).code == 0
    found, sound = (pairs_of(folder) for folder in (tmp_path, tmp_path / "whole"))
    assert len(found) > 20
    assert found.items() <= sound.items()


# --- whole tables -----------------------------------------------------------------------------------------

Change = Callable[[Source], object]


def put(file: str, *rows: Any) -> Change:
    def change(source: Source) -> None:
        source.files[file] = list(rows)

    return change


def add(file: str, *rows: Any) -> Change:
    return lambda source: source.files[file].extend(rows)


def named(old: str, new: str, file: str) -> Change:
    def change(source: Source) -> None:
        source.files[file] = [
            {new if key == old else key: value for key, value in row.items()} for row in source.files[file]
        ]

    return change


def column(file: str, name: str, values: list[Any]) -> Change:
    def change(source: Source) -> None:
        source.files[file] = [row | {name: value} for row, value in zip(source.files[file], values, strict=True)]

    return change


def doc(name: Any, text: str = "another text") -> dict[str, Any]:
    return {"_id": name, "title": "", "text": text}


HEADER = {"query-id": "query-id", "corpus-id": "corpus-id", "score": "score"}

# name: format, change, row, what the message must say
TABLES: dict[str, tuple[str, Change, int | None, list[str]]] = {
    "beir: an id twice": ("beir", add("corpus.jsonl", doc("d1")), 7, ["'d1' appears again", "row 2", "its own id"]),
    "jsonl: a query id twice": (
        "jsonl",
        add("queries.jsonl", {"_id": "q0", "text": "other"}),
        4,
        ["query id 'q0' appears again", "row 1"],
    ),
    "csv: an id twice": ("csv", add("corpus.csv", doc("d5")), 8, ["'d5' appears again", "row 7"]),
    "parquet: an id twice": ("parquet", add("corpus.parquet", doc("d5")), 6, ["'d5' appears again", "row 5"]),
    "pairs: an id with two texts": (
        "pairs with ids",
        add("p.jsonl", {"anchor": "a", "positive": "b", "qid": "q9", "did": "d0"}),
        7,
        ["document id 'd0' appears again", "row 1"],
    ),
    "an integer and a text that print the same": ("jsonl", add("corpus.jsonl", doc(7), doc("7", "y")), 8, ["id '7'"]),
    "beir: no document": ("beir", put("corpus.jsonl"), None, ["contains no documents", "data.path"]),
    "beir: no query": ("beir", put("queries.jsonl"), None, ["contains no queries"]),
    "beir: qrels without a row": (
        "beir",
        put("qrels/train.tsv", b"query-id\tcorpus-id\tscore"),
        None,
        ["no relevance judgment"],
    ),
    "jsonl: no document": ("jsonl", put("corpus.jsonl", b"", b"  "), None, ["contains no documents"]),
    "csv: an empty file": ("csv", put("corpus.csv"), 1, ["the file is empty", "header"]),
    "parquet: no row": ("parquet", put("qrels.parquet"), None, ["column not found"]),
    "pairs: nothing": ("pairs", put("p.jsonl"), None, ["contains no documents"]),
    "pool: nothing": ("flagembedding", put("f.jsonl", b'{"query": "q", "pos": []}'), None, ["contains no documents"]),
    "beir: all grades are zero": ("beir", column("qrels/train.tsv", "score", [0] * 3), None, ["grade 1 or more"]),
    "beir: all grades are negative": ("beir", column("qrels/train.tsv", "score", [-1] * 3), None, ["data.min_grade"]),
    "parquet: ids of floats": (
        "parquet",
        column("corpus.parquet", "_id", [float(i) for i in range(6)]),
        0,
        ["a float (0.0)", "missing id"],
    ),
    "parquet: texts of bytes": (
        "parquet",
        column("corpus.parquet", "text", [b"x"] * 6),
        0,
        ["expected a text, got b'x'"],
    ),
    "parquet: texts of lists": ("parquet", column("queries.parquet", "text", [["x"]] * 3), 0, ["a list"]),
    "parquet: texts of numbers": ("parquet", column("queries.parquet", "text", [1, 2, 3]), 0, ["got 1"]),
    "parquet: grades of texts": ("parquet", column("qrels.parquet", "score", ["a"] * 3), 0, ["number, not 'a'"]),
    "parquet: another schema": (
        "parquet",
        put("corpus.parquet", {"url": "x", "body": "y"}),
        None,
        ["column not found", "url, body", "data.columns"],
    ),
    "csv: quotes in the middle": (
        "csv",
        add("corpus.csv", b'd9,t,a "b" c', b'd10,t,"a" b'),
        9,
        ["broken quoting", "double"],
    ),
    "csv: an open quote": ("csv", add("corpus.csv", b'd9,t,"a'), 8, ["broken quoting"]),
    "csv: invalid UTF-8": ("csv", add("corpus.csv", b"d9,t,\xff"), 8, ["invalid UTF-8 at byte 5", "Save"]),
    "csv: separated by semicolons": (
        "csv",
        put("corpus.csv", b"_id;title;text", b"d0;t;x"),
        1,
        ["not separated by commas"],
    ),
    "csv: separated by tabs": ("csv", put("qrels.csv", b"query-id\tcorpus-id\tscore"), 1, ["not separated by commas"]),
    "tsv: separated by commas": ("beir", put("qrels/train.tsv", b"query-id,corpus-id,score"), 1, ["separated by tabs"]),
    "tsv: separated by spaces": ("beir", put("qrels/train.tsv", b"query-id corpus-id score"), 1, ["separated by tabs"]),
    "tsv: no header": ("beir", put("qrels/train.tsv", b"0\t1"), 1, ["column not found", "no header"]),
    "csv: no header": ("csv", put("qrels.csv", b"q0,d0,1"), 1, ["column not found", "no header"]),
    "csv: a column twice": (
        "csv",
        put("qrels.csv", b"query-id,corpus-id,corpus-id"),
        1,
        ["duplicate column name", "Rename"],
    ),
    "jsonl: other names": ("jsonl", named("_id", "name", "queries.jsonl"), 1, ["field '_id'", "data.columns.query_id"]),
    "parquet: other names": ("parquet", named("text", "body", "corpus.parquet"), None, ["field 'text'", "data.text"]),
    "pairs: other names": ("pairs", named("anchor", "asked", "p.jsonl"), 1, ["field 'anchor'", "data.columns.anchor"]),
    "pool: other names": ("candidate pool", named("text", "body", "pool.jsonl"), 1, ["field 'text'", "data.text"]),
    "flagembedding: no pos": (
        "flagembedding",
        named("pos", "positives", "f.jsonl"),
        1,
        ["field 'pos'", "query, pos and neg"],
    ),
    "repository: other names": (
        "repository",
        named("text", "body", "repo/corpus.jsonl"),
        None,
        ["field 'text'", "body"],
    ),
    "repository: a broken line": (
        "repository",
        add("repo/corpus.jsonl", b"{"),
        None,
        ["cannot be loaded", "data files"],
    ),
    "repository: invalid UTF-8": (
        "repository",
        add("repo/corpus.jsonl", b'{"_id": "\xff"}'),
        6,
        ["invalid UTF-8 at byte 0"],
    ),
    "repository: an id twice": ("repository", add("repo/corpus.jsonl", doc("d1")), 6, ["'d1' appears again"]),
    "repository: no row": ("repository", put("repo/queries.jsonl"), None, ["cannot be loaded"]),
    "beir: an unknown id but for case": (
        "beir",
        add("qrels/train.tsv", HEADER | {"query-id": "Q0", "corpus-id": "d0", "score": 1}),
        5,
        ["unknown query id 'Q0'"],
    ),
    "beir: an unknown id but for white space": (
        "beir",
        add("qrels/train.tsv", HEADER | {"query-id": "q0 ", "corpus-id": "d0", "score": 1}),
        5,
        ["unknown query id 'q0 '"],
    ),
}


@pytest.mark.guarantee(
    "an entire table is wrong",
    "named, with row and remedy",
    section="input",
)
@pytest.mark.torture
@pytest.mark.parametrize("name", TABLES)
def test_a_bad_table_is_refused_by_file(name: str, tmp_path: Path, record_property: Record) -> None:
    format_, change, row, words = TABLES[name]
    source = sources()[format_]
    change(source)
    settings = source.write(tmp_path / "source")
    with pytest.raises(InputError) as caught:
        ingest(tmp_path, settings, "data.max_bad_rows=0")
    assert caught.value.row == row, str(caught.value)
    assert str(tmp_path / "source") in str(caught.value) or "the source" in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    record_property("count: bad inputs tried", 1)


# --- odd, and right ---------------------------------------------------------------------------------------


def test_ids_that_differ_by_case_or_white_space_are_different(tmp_path: Path) -> None:
    source = sources()["beir"]
    odd = ["D0", "d0 ", " d0", "d\u00a00", "ｄ0", "d0\x00", "\x1b[1md0", "../../d0", "/etc/passwd", "d0\nd0"]
    source.files["corpus.jsonl"] += [doc(name, f"text {at}") for at, name in enumerate(odd)]
    result = ingest(tmp_path, source.write(tmp_path / "source"))
    assert result.stats["ingest"]["rows"] == DOCUMENTS + len(odd)
    ids = [row["id"] for row in documents(result)]
    assert ids == [*(f"d{i}" for i in range(DOCUMENTS)), *odd]


def documents(result: graph.Result) -> list[dict[str, Any]]:
    manifest = json.loads((result.run_dir / ".negpipe/ingest/manifest.json").read_text(encoding="utf-8"))
    paths = [part["files"][0]["path"] for part in manifest["parts"] if part["kind"] == "corpus"]
    tables = [pa.ipc.open_file(pa.memory_map(str(result.run_dir / path))).read_all() for path in paths]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def test_integer_ids_meet_the_same_ids_as_text(tmp_path: Path) -> None:
    source = sources()["jsonl"]
    for at in range(QUERIES):
        source.files["corpus.jsonl"][at]["_id"] = at
        source.files["qrels.jsonl"][at]["corpus-id"] = str(at)
    result = ingest(tmp_path, source.write(tmp_path / "source"))
    assert result.stats["ingest"]["positives"] == QUERIES


def test_grades_that_are_absent_negative_or_zero(tmp_path: Path) -> None:
    source = sources()["csv"]
    grades = {"d0": "", "d1": "-3", "d2": "0", "d3": "0.5", "d4": "2.5"}
    rows = [{"query-id": "q0", "corpus-id": name, "score": grade} for name, grade in grades.items()]
    source.files["qrels.csv"] = rows
    result = ingest(tmp_path, source.write(tmp_path / "source"))
    assert (result.stats["ingest"]["positives"], result.stats["ingest"]["anchors"]) == (2, 1)


def test_control_characters_in_texts_stay_as_they_are(tmp_path: Path) -> None:
    source = sources()["jsonl"]
    text = "a\x00b\x1b[31mc\u202ed\u2028e\ufffef\U0010ffff <script>"
    source.files["corpus.jsonl"][0] |= {"title": "", "text": text}
    assert documents(ingest(tmp_path, source.write(tmp_path / "source")))[0]["text"] == text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beir", "csv", "parquet"])
def test_a_text_of_50_mb(name: str, tmp_path: Path) -> None:
    source = sources()[name]
    place = source.places["document"]
    source.files[place.file][2] |= {"title": "", "text": LONG}
    settings = source.write(tmp_path / "source")
    if name == "beir":
        assert documents(ingest(tmp_path, settings))[2]["text"] == LONG
    else:
        document = list(islice(read_source(Data(**settings)), 3))[2]
        assert isinstance(document, Document)
        assert document.text == LONG


def test_a_bad_row_of_50_mb_is_shown_by_its_beginning(tmp_path: Path) -> None:
    source = sources()["beir"]
    source.files["corpus.jsonl"][0] |= {"_id": "", "text": LONG}
    bad = next(read_source(Data(**source.write(tmp_path / "source"))))
    assert isinstance(bad, BadRow)
    assert len(bad.raw) == 300
    assert len(str(bad.error)) < 500


def run(folder: Path, corpus: list[Any], asked: list[Any], qrels: list[tuple[str, str, int]]) -> graph.Result:
    config = small.build(folder, corpus, asked)
    small.write_qrels(folder / "data/qrels/train.tsv", qrels)
    return graph.mine(load_config(str(config), ["mining.num_negatives=1", "output.min_rows=0"]))


def test_anchors_that_equal_documents(tmp_path: Path) -> None:
    corpus = [doc(f"d{i}", f"same {i}") for i in range(4)]
    asked = [{"_id": f"q{i}", "text": f"same {i}"} for i in range(3)]
    result = run(tmp_path, corpus, asked, [(f"q{i}", f"d{i + 1}", 1) for i in range(3)])
    rows = pq.read_table(result.triplets).to_pylist()
    assert rows
    assert all(row["anchor"] != row["negative"] for row in rows)


def test_a_corpus_of_one_document(tmp_path: Path) -> None:
    result = run(tmp_path, [doc("d0")], small.queries(2), [("q0", "d0", 1), ("q1", "d0", 1)])
    stats = result.stats["triplets"]
    assert (stats["rows"], stats["short_anchors"]) == (0, 2)


def test_one_anchor_to_which_every_document_is_positive(tmp_path: Path) -> None:
    corpus = small.documents(9)
    result = run(tmp_path, corpus, small.queries(1), [("q0", row["_id"], 1) for row in corpus])
    stats = result.stats["triplets"]
    assert (stats["rows"], stats["drops"], stats["short_anchors"]) == (0, {"positive_id": 9}, 1)


def test_positives_that_are_not_in_the_corpus(tmp_path: Path) -> None:
    source = sources()["beir"]
    source.files["qrels/train.tsv"][1]["corpus-id"] = "gone"
    settings = source.write(tmp_path / "source")
    with pytest.raises(InputError, match=r"train.tsv, row 3: .*unknown document id 'gone' \(in total 1 of"):
        ingest(tmp_path, settings)
    result = ingest(tmp_path, settings, "data.on_unknown_id=skip")
    expected = [("unknown_id", 3, "q1\tgone")]
    assert [(row["kind"], row["row"], row["raw"]) for row in listed(result)] == expected
    assert result.stats["ingest"]["unknown_judgments"] == 1


# --- vectors ----------------------------------------------------------------------------------------------


def vectors(values: Any) -> Change2:
    return lambda folder: np.save(folder / "corpus.npy", values)


def changed(row: int, value: Any, kind: Any = np.float32) -> Change2:
    def change(folder: Path) -> None:
        found = small.vectors(small.DOCUMENTS, 1).astype(kind)
        found[row] = value
        np.save(folder / "corpus.npy", found)

    return change


def table(**columns: Any) -> Change2:
    def change(folder: Path) -> None:
        pq.write_table(pa.table(columns), folder / "corpus.parquet", row_group_size=9)

    return change


def cut(name: str, keep: int) -> Change2:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


Change2 = Callable[[Path], object]
GOOD = small.vectors(small.DOCUMENTS, 1)
IDS = [f"d{i}" for i in range(small.DOCUMENTS)]
SIGNALLING = np.frombuffer(b"\x01\x00\x80\x7f", np.float32)[0]

VECTORS: dict[str, tuple[Change2, int | None, list[str]]] = {
    "NaN": (changed(7, np.nan), 7, ["document 'd7'", "not finite", "Fix"]),
    "a signalling NaN": (changed(7, SIGNALLING), 7, ["not finite"]),
    "one NaN among numbers": (changed(3, [np.nan] + [1] * 7), 3, ["document 'd3'", "not finite"]),
    "infinity": (changed(0, np.inf), 0, ["document 'd0'", "not finite"]),
    "minus infinity": (changed(39, -np.inf), 39, ["document 'd39'", "not finite"]),
    "zero": (changed(5, 0), 5, ["document 'd5'", "zero"]),
    "minus zero": (changed(5, -0.0), 5, ["zero"]),
    "NaN in float16": (changed(8, np.nan, np.float16), 8, ["not finite"]),
    "NaN in float64": (changed(8, np.nan, np.float64), 8, ["not finite"]),
    "beyond float32": (changed(8, 1e300, np.float64), 8, ["not finite"]),
    "denormal": (changed(6, 1e-45), 6, ["document 'd6'", "too small or too large to scale", "about length 1"]),
    "denormal in a file of float64": (changed(6, 1e-310, np.float64), 6, ["document 'd6'", "zero"]),
    "too large to scale": (changed(6, 3e38), 6, ["document 'd6'", "too small or too large to scale"]),
    "too few rows": (vectors(GOOD[:-1]), None, ["39 vectors for 40 rows", "one vector per source row"]),
    "one dimension": (vectors(GOOD.ravel()), None, ["matrix of floats", "shape (320,)"]),
    "three dimensions": (vectors(GOOD[None]), None, ["matrix of floats"]),
    "vectors of nothing": (vectors(np.empty((40, 0), np.float32)), None, ["matrix of floats"]),
    "whole numbers": (vectors(np.ones((40, 8), np.int64)), None, ["matrix of floats", "int64"]),
    "complex numbers": (vectors(GOOD.astype(np.complex64)), None, ["matrix of floats", "complex64"]),
    "texts": (vectors(np.full((40, 8), "x")), None, ["matrix of floats"]),
    "Python objects": (vectors(np.full((40, 8), None)), None, ["not a readable .npy", "Python objects"]),
    "a truncated file": (cut("corpus.npy", 900), None, ["not a readable .npy"]),
    "a truncated header": (cut("corpus.npy", 20), None, ["not a readable .npy"]),
    "an empty file": (cut("corpus.npy", 0), None, ["not a readable .npy"]),
    "another dimension than the anchors": (vectors(GOOD[:, :5]), None, ["of dimension 8", "of 5"]),
}
TABLES_OF_VECTORS: dict[str, tuple[Change2, int | None, list[str]]] = {
    "mixed dimensions": (
        table(id=IDS, v=[*GOOD[:20], np.ones(5, np.float32), *GOOD[21:]]),
        20,
        ["8 numbers", "the same dimension"],
    ),
    "mixed dimensions between parts": (table(id=IDS, v=[*GOOD[:36], *np.ones((4, 3), np.float32)]), 36, ["8 numbers"]),
    "no vector": (table(id=IDS, v=[*GOOD[:-1], None]), 39, ["8 numbers", "the same dimension"]),
    "a null in a vector": (table(id=IDS, v=[[1.0, None] * 4, *GOOD[1:].tolist()]), 0, ["not finite"]),
    "NaN": (
        table(id=IDS, v=[*GOOD[:11], np.full(8, np.nan, np.float32), *GOOD[12:]]),
        11,
        ["document 'd11'", "not finite"],
    ),
    "no id": (table(id=[*IDS[:-1], None], v=list(GOOD)), 39, ["there is no id", "every vector an id"]),
    "an id twice": (table(id=[*IDS[:-1], "d3"], v=list(GOOD)), 39, ["the id of row 3", "a different vector"]),
    "an id missing": (table(id=[*IDS[:-1], "e"], v=list(GOOD)), None, ["no vector for id 'd39'"]),
    "another schema": (table(id=IDS, v=IDS), None, ["one column of float lists", "id, v"]),
    "two columns of vectors": (table(a=list(GOOD), b=list(GOOD)), None, ["one column of float lists"]),
    "vectors of whole numbers": (table(id=IDS, v=[[1, 2]] * 40), None, ["one column of float lists"]),
    "no row": (table(id=pa.array([], pa.string()), v=pa.array([], pa.list_(pa.float32()))), None, ["no vector"]),
    "no Parquet": (lambda folder: (folder / "corpus.parquet").write_bytes(b"PAR1"), None, ["not a readable Parquet"]),
}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose source is read."""
    folder = tmp_path_factory.mktemp("read")
    graph.mine(load_config(str(small.build(folder))), only="ingest")
    return folder


CASES = [("corpus.npy", name) for name in VECTORS] + [("corpus.parquet", name) for name in TABLES_OF_VECTORS]


@pytest.mark.guarantee(
    "a vector is NaN, infinite, zero, missing, of another dimension",
    "named by file and row",
    section="input",
)
@pytest.mark.torture
@pytest.mark.parametrize(("file", "name"), CASES)
def test_bad_vectors_are_refused_by_row(
    file: str, name: str, read: Path, request: pytest.FixtureRequest, record_property: Record
) -> None:
    change, row, words = (VECTORS if file.endswith(".npy") else TABLES_OF_VECTORS)[name]
    request.addfinalizer(lambda: np.save(read / "corpus.npy", GOOD))
    change(read)
    options = [f"encoder.corpus_vectors={read / file}"]
    with pytest.raises(InputError) as caught:
        graph.mine(load_config(str(read / "config.yaml"), options), only="encode")
    assert caught.value.row == row, str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert file in str(caught.value)
    record_property("count: bad inputs tried", 1)


def test_small_vectors_keep_their_direction(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    assert small.run("mine", config).code == 0
    before = pairs_of(tmp_path)
    tiny = small.vectors(small.DOCUMENTS, 1)
    tiny[3] *= np.float32(1e-15)
    np.save(tmp_path / "corpus.npy", tiny)
    assert small.run("mine", config).code == 0
    after = pairs_of(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[pair] == pytest.approx(before[pair], abs=2e-3) for pair in after)


def test_a_sidecar_that_names_a_file_elsewhere_is_none(tmp_path: Path) -> None:
    graph.mine(load_config(str(small.build(tmp_path))), only="ingest")
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    path = tmp_path / "run/.negpipe/ingest/manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest.pop("digest")
    for name in ("../victim", str(victim), "ingest/../../victim"):
        manifest["parts"][0]["files"][0]["path"] = name
        path.write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(DamagedError):
            graph.clean(config_of(tmp_path / "run"))
        assert graph.status(load_config(str(tmp_path / "config.yaml")))[0].state == "damaged"
    assert victim.read_text(encoding="utf-8") == "mine"


def test_vectors_whose_products_overflow_are_refused(read: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: np.save(read / "corpus.npy", GOOD))
    changed(6, 1e19)(read)
    settings = [f"encoder.corpus_vectors={read}/corpus.npy", "encoder.normalize=false", "encoder.storage=float32"]
    with pytest.raises(InputError, match=r"document 'd6' is too long: .*length 1") as caught:
        graph.mine(load_config(str(read / "config.yaml"), settings), only="encode")
    assert caught.value.row == 6
