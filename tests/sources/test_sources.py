"""Every kind of source is read from real files; every mistake in one is named by file, row and field."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from negpipe import sources
from negpipe.config import schema
from negpipe.errors import ConfigError, InputError
from negpipe.sources import BadRow, Document, Judgment, Query, tables

CORPUS = [{"_id": "d1", "title": "One", "text": "first"}, {"_id": "d2", "title": "", "text": " second "}]
QUERIES = [{"_id": "q1", "text": "which?"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\n"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def data(**settings: Any) -> schema.Data:
    return schema.Data.model_validate(settings)


def write(path: str, content: str | bytes | list[Any]) -> str:
    """A file by its name: rows become JSON lines, .gz is packed."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    raw = content.encode() if isinstance(content, str) else content
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(gzip.compress(raw) if path.endswith(".gz") else raw)
    return path


def beir(folder: str = "set", corpus: Any = CORPUS, queries: Any = QUERIES, qrels: Any = QRELS, gz: str = "") -> str:
    write(f"{folder}/corpus.jsonl{gz}", corpus)
    write(f"{folder}/queries.jsonl{gz}", queries)
    write(f"{folder}/qrels/train.tsv{gz}", qrels)
    return folder


def repository(name: str = "repo") -> str:
    """A dataset repository as on the hub: subsets by README, ids that the qrels hold as integers."""
    subsets = "".join(
        f"- config_name: {subset}\n  data_files:\n  - split: {subset}\n    path: {subset}.jsonl.gz\n"
        for subset in ("corpus", "queries")
    )
    write(f"{name}/README.md", f"---\nconfigs:\n{subsets}---\n")
    write(f"{name}/corpus.jsonl.gz", [{"_id": str(i), "title": f"t{i}", "text": f"x{i}"} for i in range(2500)])
    write(f"{name}/queries.jsonl.gz", [{"_id": "7", "text": "seven?"}, {"_id": "8", "text": "eight?"}])
    write(f"{name}/.git/HEAD", "hidden")
    splits = "".join(f"  - split: {split}\n    path: {split}.tsv\n" for split in ("train", "test"))
    write(f"{name}-qrels/README.md", f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    write(f"{name}-qrels/train.tsv", "query-id\tcorpus-id\tscore\n7\t2400\t1\n")
    write(f"{name}-qrels/test.tsv", "query-id\tcorpus-id\tscore\n8\t3\t2\n")
    return name


def plain(records: Iterator[sources.Record]) -> list[tuple[Any, ...]]:
    """Records without their places; bad rows by kind, row and field."""
    result: list[tuple[Any, ...]] = []
    for record in records:
        if isinstance(record, Document):
            result.append(("document", record.id, record.text, record.in_corpus))
        elif isinstance(record, Query):
            result.append(("query", record.id, record.text))
        elif isinstance(record, Judgment):
            assert record.query_by_text == record.document_by_text
            result.append((record.split, record.query, record.document, record.grade, record.query_by_text))
        else:
            result.append((record.kind, record.error.row, record.error.field, record.id, record.of_query))
    return result


BEIR_RECORDS = [
    ("document", "d1", "One first", True),
    ("document", "d2", "second", True),
    ("query", "q1", "which?"),
    ("train", "q1", "d1", 1.0, False),
]


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_beir_folder(gz: str) -> None:
    assert plain(sources.read(data(path=beir(gz=gz)))) == BEIR_RECORDS


def test_places_are_one_based_lines_of_text_and_zero_based_rows_of_parquet() -> None:
    write("c.jsonl", "\n" + json.dumps(CORPUS[0]) + "\n\n" + json.dumps(CORPUS[1]))
    write("c.csv", '_id,title,text\nd1,"two\nlines",first\n\nd2,,second\n')
    pq.write_table(pa.Table.from_pylist(CORPUS), "c.parquet")
    write("q.jsonl", QUERIES)
    write("r.tsv", QRELS)
    for corpus, lines in (("c.jsonl", [2, 4]), ("c.csv", [2, 5]), ("c.parquet", [0, 1])):
        records = sources.read(data(format="columns", corpus=corpus, queries="q.jsonl", qrels="r.tsv"))
        places = [record.place for record in records if isinstance(record, Document)]
        assert [(place.file, place.row) for place in places] == [(corpus, line) for line in lines]


def test_all_splits_are_read_and_the_missing_one_names_them() -> None:
    write(f"{beir()}/qrels/dev.tsv", "query-id\tcorpus-id\tscore\nq1\td2\t\n")
    judged = [record for record in sources.read(data(path="set")) if isinstance(record, Judgment)]
    assert [(j.split, j.document, j.grade) for j in judged] == [("dev", "d2", 1.0), ("train", "d1", 1.0)]
    with pytest.raises(InputError, match=r"qrels/test.tsv.*no judgments for the split 'test'.*dev, train"):
        sources.read(data(path="set", split="test"))


@pytest.mark.parametrize("extension", ["jsonl", "json", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet"])
def test_columns_from_any_kind_of_file(extension: str) -> None:
    tables: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"doc": "d1", "title": "One", "body": "first", "x": "-"}, {"doc": "d2", "title": "", "body": "é ü"}],
        "queries": [{"no": 12, "question": " which? "}],
        "qrels": [{"q": 12, "d": "d1"}],
    }
    for name, rows in tables.items():
        if extension == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), f"{name}.parquet")
        elif extension.startswith("json"):
            write(f"{name}.{extension}", rows)
        else:
            sign = "," if extension.startswith("csv") else "\t"
            lines = [sign.join(rows[0]), *(sign.join(str(row.get(key, "")) for key in rows[0]) for row in rows)]
            write(f"{name}.{extension}", "\ufeff" + "\r\n".join(lines))
    names = {
        "corpus_id": "doc",
        "query_id": "no",
        "query_text": "question",
        "qrels_query_id": "q",
        "qrels_corpus_id": "d",
    }
    settings = {name: f"{name}.{extension}" for name in tables}
    found = sources.read(data(format="columns", columns=names, text="{title}: {{{body}}}", split="dev", **settings))
    assert plain(found) == [
        ("document", "d1", "One: {first}", True),
        ("document", "d2", ": {é ü}", True),
        ("query", "12", "which?"),
        ("dev", "12", "d1", 1.0, False),
    ]


def test_a_dataset_repository_goes_through_load_dataset() -> None:
    source = data(path=repository(), split="test")
    found = plain(sources.read(source))
    assert found[:2500] == [("document", str(i), f"t{i} x{i}", True) for i in range(2500)]
    assert found[2500:2502] == [("query", "7", "seven?"), ("query", "8", "eight?")]
    assert sorted(found[2502:]) == [("test", "8", "3", 2.0, False), ("train", "7", "2400", 1.0, False)]
    repo = ["README.md", "corpus.jsonl.gz", "queries.jsonl.gz"]
    named = [[Path(file).name for file in files] for files in sources.files(source)]
    assert named == [repo, repo, ["README.md", "test.tsv", "train.tsv"]]
    assert sources.revision(source) == ""
    write("repo/queries.jsonl.gz", [{"_id": "8", "text": "changed?"}])
    assert ("query", "8", "changed?") in plain(sources.read(source))
    with pytest.raises(InputError, match=r"repo-qrels.*'dev'.*train, test"):
        sources.read(data(path="repo", split="dev"))


def test_local_repositories_of_one_name_know_nothing_of_each_other() -> None:
    """The library's cache goes by the folder's name, and kept the columns of whichever was read first."""
    for place, name in (("a", "text"), ("b", "body")):
        write(f"{place}/set/train.jsonl", [{"anchor": place, name: f"{place} {name}"}])
        found = sources.read(data(format="pairs", path=f"{place}/set", columns={"positive": name}))
        assert ("document", None, f"{place} {name}", True) in plain(found)
    write("a/set/train.jsonl", [{"anchor": "a", "other": "new"}])
    found = sources.read(data(format="pairs", path="a/set", columns={"positive": "other"}))
    assert ("document", None, "new", True) in plain(found)


def test_columns_from_a_dataset_repository() -> None:
    repository()
    tables: dict[str, Any] = {
        "corpus": {"path": "repo", "subset": "corpus"},
        "queries": {"path": "repo", "subset": "queries", "split": "queries"},
    }
    every = plain(sources.read(data(format="columns", qrels="repo-qrels", **tables)))
    assert [record[0] for record in every].count("document") == 2500
    assert sorted(record[0] for record in every[2502:]) == ["test", "train"]
    one = plain(sources.read(data(format="columns", qrels={"path": "repo-qrels", "split": "test"}, **tables)))
    assert one[2502:] == [("train", "8", "3", 2.0, False)]  # the named split makes the anchors
    tables["queries"]["split"] = "dev"
    with pytest.raises(InputError, match=r"repo, field 'split'.*split 'dev' not found.*queries"):
        sources.read(data(format="columns", qrels="repo-qrels", **tables))
    tables["queries"]["subset"] = "topics"
    with pytest.raises(InputError, match=r"repo: the subset 'topics' of this dataset cannot be loaded .*corpus"):
        sources.read(data(format="columns", qrels="repo-qrels", **tables))


def test_pairs() -> None:
    write("p.csv", "anchor,positive\na,b\na,\n,c\n")
    assert plain(sources.read(data(format="pairs", path="p.csv"))) == [
        ("query", None, "a"),
        ("document", None, "b", True),
        ("train", "a", "b", 1.0, True),
        ("query", None, "a"),
        ("empty_text", 3, "positive", None, False),
        ("empty_text", 4, "anchor", None, True),
        ("document", None, "c", True),
    ]


def test_pairs_with_ids_and_a_corpus_from_a_dataset_repository() -> None:
    write("pairs/train.jsonl", [{"anchor": "a", "positive": "b", "qid": 1, "did": "D"}])
    write("pool.jsonl", [{"_id": "e", "text": "extra"}])
    columns = {"anchor_id": "qid", "positive_id": "did"}
    assert plain(sources.read(data(format="pairs", path="pairs", columns=columns, corpus="pool.jsonl"))) == [
        ("document", "e", "extra", True),
        ("query", "1", "a"),
        ("document", "D", "b", False),
        ("train", "1", "D", 1.0, False),
    ]
    mixed = sources.read(data(format="pairs", path="pairs", columns={"anchor_id": "qid"}))
    judgment = next(record for record in mixed if isinstance(record, Judgment))
    assert judgment[:2] == ("1", "b")
    assert (judgment.query_by_text, judgment.document_by_text) == (False, True)


def test_flagembedding_with_and_without_a_pool() -> None:
    write("f.jsonl", [{"query": "q", "pos": ["p", " "], "neg": ["n", None]}, {"query": "r", "pos": []}])
    judged = [("query", None, "q"), ("document", None, "p", True), ("train", "q", "p", 1.0, True)]
    empty = [("empty_text", 1, field, None, False) for field in ("pos", "neg")]
    expected = [*judged, empty[0], ("document", None, "n", True), empty[1], ("query", None, "r")]
    assert plain(sources.read(data(format="flagembedding", path="f.jsonl"))) == expected
    write("pool.jsonl", [{"text": "n"}, {"text": "m"}])
    judged[1] = ("document", None, "p", False)
    pool = [("document", None, "n", True), ("document", None, "m", True)]
    expected = [*pool, *judged, empty[0], ("query", None, "r")]
    assert plain(sources.read(data(format="flagembedding", path="f.jsonl", corpus="pool.jsonl"))) == expected


def test_remote_files_are_read_and_told_apart_by_version() -> None:
    import fsspec

    def put(text: str) -> None:
        with fsspec.open("memory://store/p.jsonl.gz", "wb", compression="gzip") as file:
            file.write(json.dumps({"anchor": "a", "positive": text}).encode())

    source = data(format="pairs", path="memory://store/p.jsonl.gz")
    put("one")
    first = sources.revision(source)
    assert ("document", None, "one", True) in plain(sources.read(source))
    assert sources.files(source) == [[]]
    assert sources.revision(source) == first
    put("three")
    assert sources.revision(source) != first
    with pytest.raises(InputError, match=r"memory://store/none.jsonl: file not found"):
        sources.revision(data(format="pairs", path="memory://store/none.jsonl"))


def test_a_missing_title_is_empty_and_titles_may_be_null() -> None:
    corpus = [{"_id": 1, "text": "a"}, {"_id": 2, "title": None, "text": "b"}, {"_id": 3, "title": "c", "text": ""}]
    texts = [record[1:3] for record in plain(sources.read(data(path=beir(corpus=corpus)))) if record[0] == "document"]
    assert texts == [("1", "a"), ("2", "b"), ("3", "c")]


def test_files_are_absolute_and_in_reading_order(tmp_path: Path) -> None:
    assert sources.files(data(path=beir())) == [
        [str(tmp_path / "set" / name)] for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv")
    ]


def test_files_behind_links_and_hidden_ones_are_files_of_a_folder(tmp_path: Path) -> None:
    write("real/train.jsonl", [{"anchor": "a", "positive": "p"}])
    write("set/.more/x.jsonl", "{}")
    write("set/.git/index", "not looked at")
    Path("set/data").symlink_to(tmp_path / "real")
    Path("set/data/again").symlink_to(tmp_path / "set")  # a circle
    (files,) = sources.files(data(format="pairs", path="set"))
    assert {str(Path(file).relative_to(tmp_path)) for file in files} >= {"set/.more/x.jsonl", "set/data/train.jsonl"}
    assert not any(".git" in file for file in files)


def test_a_pinned_hub_revision_needs_no_network() -> None:
    source = data(format="pairs", path="nobody/nothing", revision="a" * 40)
    assert sources.files(source) == [[]]
    assert "a" * 40 in sources.revision(source)


@pytest.mark.parametrize("template", ["{}", "{a.b}", "{a[0]}", "{a:>9}", "{a!r}", "{a", "a}", "plain"])
def test_bad_templates(template: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.text: .*Use for example '\{title\} \{text\}'"):
        sources.read(data(path=beir(), text=template))


def doc(**values: Any) -> list[Any]:
    return [CORPUS[0], {"_id": "d2", "title": "", "text": "x", **values}]


BAD_ROWS: list[tuple[dict[str, Any], str, str, str, int, str | None, str]] = [
    ({"corpus": '{"_id": "d1", "text": "a"}\n{"_id"\n'}, "broken", "broken JSON", "corpus.jsonl", 2, None, "one JSON"),
    ({"corpus": [CORPUS[0], ["d2"]]}, "broken", "not a JSON object", "corpus.jsonl", 2, None, "every line"),
    ({"corpus": b'{"_id": "d1", "text": "\xff"}\n'}, "broken", "UTF-8 at byte 23", "corpus.jsonl", 1, None, "Save"),
    ({"corpus": doc(text="\ud800")}, "broken", "surrogate", "corpus.jsonl", 2, "text", "complete character"),
    ({"corpus": doc(text="")}, "empty_text", "is empty", "corpus.jsonl", 2, "text", "data.on_empty"),
    ({"corpus": doc(text=None)}, "empty_text", "null", "corpus.jsonl", 2, "text", "data.on_empty"),
    ({"corpus": doc(text=["x"])}, "type", "a list", "corpus.jsonl", 2, "text", "Write a string"),
    ({"corpus": doc(title=5)}, "type", "got 5", "corpus.jsonl", 2, "title", "Write a string"),
    ({"corpus": doc(_id=2.0)}, "type", "a float", "corpus.jsonl", 2, "_id", "strings or integers"),
    ({"corpus": doc(_id=True)}, "type", "a boolean", "corpus.jsonl", 2, "_id", "strings or integers"),
    ({"corpus": doc(_id=None)}, "missing", "no id", "corpus.jsonl", 2, "_id", "an id"),
    ({"queries": [{"_id": "q", "text": 3}]}, "type", "got 3", "queries.jsonl", 1, "text", "Write a string"),
    ({"queries": [{"_id": "q", "text": " "}]}, "empty_text", "empty", "queries.jsonl", 1, "text", "data.on_empty"),
    ({"qrels": QRELS + "q1\td2\thigh\n"}, "type", "a finite number, not 'high'", "train.tsv", 3, "score", "1 or 0"),
    ({"qrels": QRELS + "q1\td2\tnan\n"}, "type", "a finite number, not 'nan'", "train.tsv", 3, "score", "1 or 0"),
    ({"qrels": QRELS + "q1\t\t1\n"}, "missing", "no id", "train.tsv", 3, "corpus-id", "an id"),
    ({"qrels": QRELS + "q1 d2 1\n"}, "broken", "1 field, but the header names 3", "train.tsv", 3, None, "delimiters"),
]


@pytest.mark.parametrize(("parts", "kind", "problem", "file", "row", "field", "remedy"), BAD_ROWS)
def test_a_bad_row_is_named_and_does_not_end_the_reading(
    parts: dict[str, Any], kind: str, problem: str, file: str, row: int, field: str | None, remedy: str
) -> None:
    records = list(sources.read(data(path=beir(**parts))))
    (bad,) = (record for record in records if isinstance(record, BadRow))
    assert bad.kind == kind
    message = str(bad.error)
    place = f"{file}, row {row}" + (f", field '{field}'" if field else "")
    assert place in message and problem in message and remedy in message
    assert isinstance(records[-1], Judgment) or "train.tsv" in file


def test_an_empty_text_keeps_its_id_and_its_side() -> None:
    parts: dict[str, Any] = {"corpus": doc(text=""), "queries": [{"_id": "q1", "text": None}]}
    bad = [record for record in sources.read(data(path=beir(**parts))) if isinstance(record, BadRow)]
    assert [(row.id, row.of_query) for row in bad] == [("d2", False), ("q1", True)]


NO_HEADER = {"qrels": "1\t1\n"}
COMMAS = {"qrels": QRELS.replace("\t", ",")}
QUOTES = {"qrels": QRELS + 'q1\t"d"2\t1\n'}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (NO_HEADER, r"train.tsv, row 1, field 'query-id': column not found.*no header"),
        (COMMAS, r"train.tsv, row 1, field 'query-id': .*not separated by tabs"),
        (QUOTES, r"train.tsv, row 3: broken quoting"),
        ({"qrels": ""}, r"train.tsv, row 1: the file is empty"),
        ({"qrels": QRELS.encode() + b"q1\td\xff\t1\n"}, r"train.tsv, row 3: invalid UTF-8 at byte 4"),
        ({"qrels": QRELS.replace("corpus-id", "what")}, r"field 'corpus-id': .*query-id, what, score.*qrels_corpus_id"),
        ({"qrels": QRELS.replace("score", "corpus-id")}, r"field 'corpus-id': duplicate column name"),
        ({"corpus": [{"_id": "1", "words": "x"}]}, r"corpus.jsonl, row 1, field 'text': .*_id, words.*data.text"),
        ({"corpus": [{"name": "1", "text": "x"}]}, r"corpus.jsonl, row 1, field '_id': .*data.columns.corpus_id"),
        ({"queries": [{"_id": "1", "asked": "x"}]}, r"queries.jsonl, row 1, field 'text': .*data.columns.query_text"),
    ],
)
def test_a_bad_table_ends_the_reading(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(sources.read(data(path=beir(**parts))))


@pytest.mark.parametrize(("file", "pattern"), [("a.jsonl.gz", "*.jsonl.gz"), ("train/a.jsonl", "**/*.jsonl")])
def test_a_folder_of_files_with_a_broken_line_is_named_by_a_pattern(file: str, pattern: str) -> None:
    write(f"shop/{file}", '{"anchor": "a", "positive": "b"}\n{"anchor": \n')
    with pytest.raises(InputError, match=rf"shop: .*cannot be loaded.*data\.path={re.escape(f'shop/{pattern}')}: "):
        list(sources.read(data(format="pairs", path="shop")))
    assert ("broken", 2) in [one[:2] for one in plain(sources.read(data(format="pairs", path=f"shop/{pattern}")))]
    write("shop/README.md", "---\n---\n")
    with pytest.raises(InputError, match=r"Check the folder's README\.md"):
        list(sources.read(data(format="pairs", path="shop")))


def test_rows_without_a_known_layout_name_the_columns_of_tables() -> None:
    with pytest.raises(
        InputError, match=r"no known layout; columns: x, y.*data\.columns.* corpus_id, query_id, query_text"
    ):
        sources.read(data(path=write("rows.csv", "x,y\na,b\n")))


def test_missing_things_name_what_is_near() -> None:
    beir("data/scifact")
    write("data/notes.md", "x")
    Path("data/cut.jsonl.gz").write_bytes(gzip.compress(b'{"anchor": "a", "positive": "b"}\n' * 99)[:-9])
    Path("data/fake.parquet").write_bytes(b"nothing of the kind")
    for path, message in {
        "./data/scifct": r"\./data/scifct: file or folder not found.*Similar names: data/scifact",
        "data/scifact/corpora.jsonl": r"corpora.jsonl: file or folder not found.*corpus.jsonl",
        "data/scifct": r"data/scifct: no local .*beneath .*this dataset cannot be loaded.*Similar names: data/scifact",
        "data/notes.md": r"notes.md: unknown file extension '.md'.*Supported: .jsonl",
        "data/cut.jsonl.gz": r"cut.jsonl.gz, row \d+: the rest of the file cannot be read",
        "data/fake.parquet": r"fake.parquet: not a readable Parquet file",
        "nowhere://x/p.jsonl": r"nowhere://x/p.jsonl: this type of address is not supported",
    }.items():
        with pytest.raises(InputError, match=message):
            list(sources.read(data(format="pairs", path=path)))
    with pytest.raises(InputError, match=r"neither the hub nor the local cache"):
        sources.revision(data(format="pairs", path="data/scifct"))
    Path("data/scifact/queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"data/scifact/queries.jsonl: file not found.*A BEIR folder has"):
        sources.read(data(format="beir", path="data/scifact"))
    with pytest.raises(InputError, match=r"notes.md: a BEIR source is a folder.*data.format: columns"):
        sources.read(data(format="beir", path="data/notes.md"))


@pytest.mark.parametrize(
    ("path", "remedy"),
    [("s3://bucket/{}.jsonl", r"pip install 'negpipe\[s3\]'"), ("gs://bucket/{}.jsonl", "install gcsfs")],
)
def test_a_package_for_an_address_that_is_missing_is_named(
    path: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file, and of a pattern."""
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    for scheme in ("s3", "gs"):  # loaded by a test before
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    for name in ("corpus", "*"):
        with pytest.raises(InputError, match=rf"://bucket/.*: a package that reads .* is not installed\. .*{remedy}"):
            list(sources.read(data(format="pairs", path=path.format(name))))


def test_a_repository_without_judgments_beside_it() -> None:
    repository("alone")
    Path("alone-qrels").rename("elsewhere")
    with pytest.raises(InputError, match=r"alone-qrels: folder not found.*data.format: columns"):
        sources.read(data(format="beir", path="alone"))


def test_invalid_text_inside_parquet() -> None:
    broken = pa.array([b"fine", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"anchor": broken, "positive": ["a", "b"]}), "p.parquet")
    with pytest.raises(InputError, match=r"p.parquet, row 1, field 'anchor': invalid UTF-8 at byte 0"):
        sources.read(data(format="pairs", path="p.parquet"))
    pq.write_table(pa.table({"anchor": ["a"], "other": ["b"]}), "p.parquet")
    with pytest.raises(InputError, match=r"p.parquet, field 'positive': .*anchor, other.*data.columns.positive"):
        sources.read(data(format="pairs", path="p.parquet"))


def test_flagembedding_positives_are_lists_or_one_text() -> None:
    write(
        "f.jsonl", [{"query": "q", "pos": "p", "neg": "n"}, {"query": "q", "pos": ["p", 3]}, {"query": "q", "pos": 5}]
    )
    records = list(sources.read(data(format="flagembedding", path="f.jsonl")))
    assert [r.text for r in records if isinstance(r, Document) and r.place.row == 1] == ["p", "n"]
    number, alone = (r for r in records if isinstance(r, BadRow))
    assert "f.jsonl, row 2, field 'pos': expected a text, got 3" in str(number.error)
    assert "f.jsonl, row 3, field 'pos': expected a text, got 5" in str(alone.error)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_list_is_that_many_positives_of_one_anchor(ending: str) -> None:
    rows = [{"anchor": "q", "positive": ["one", "two"], "ids": ["1", "2"]}, {"anchor": "r", "positive": [], "ids": []}]
    if ending == ".jsonl":
        write("p.jsonl", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), "p.parquet")
    found = list(sources.read(data(format="pairs", path=f"p{ending}", columns={"positive_id": "ids"})))
    assert [record[:2] for record in found if isinstance(record, Document)] == [("1", "one"), ("2", "two")]
    assert [record[:2] for record in found if isinstance(record, Judgment)] == [("q", "1"), ("q", "2")]
    write("short.jsonl", [{"anchor": "q", "positive": ["one", "two"], "ids": ["1"]}])
    (bad,) = sources.read(data(format="pairs", path="short.jsonl", columns={"positive_id": "ids"}))
    assert isinstance(bad, BadRow) and "field 'ids': 2 positives need a list of as many" in str(bad.error)


@pytest.mark.parametrize("sign", [" ", "\t", "   "])
@pytest.mark.parametrize("name", ["qrels.txt", "qrels.tsv", "qrels", "qrels.trec.gz"])
def test_judgments_as_trec_writes_them_are_read_as_they_are(name: str, sign: str) -> None:
    write("corpus.jsonl", [{"_id": "0007", "title": "", "text": "one"}])
    write("queries.jsonl", [{"_id": "0001", "text": "which?"}])
    lines = [sign.join(row) for row in (("0001", "0", "0007", "2"), ("0001", "0", "0008", "0"), ("0001", "0", "9"))]
    content = ("\r\n".join(lines) + "\n").encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = data(format="columns", corpus="corpus.jsonl", queries="queries.jsonl", qrels=name)
    read = list(sources.read(source))
    judged = [record[:3] for record in read if isinstance(record, Judgment)]
    assert judged == [("0001", "0007", 2.0), ("0001", "0008", 0.0)]
    (bad,) = (record for record in read if isinstance(record, BadRow))
    assert f"{name}, row 3: 3 fields, but the header names 4" in str(bad.error)


def packed(kind: str, content: bytes) -> bytes:
    if kind == "zst":
        stream = pa.BufferOutputStream()
        with pa.CompressedOutputStream(stream, "zstd") as file:
            file.write(content)
        return bytes(stream.getvalue())
    pack: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return pack[kind](content)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_packed_files_are_read_whatever_their_names_say(kind: str) -> None:
    folder = Path(beir())
    plain_records = plain(sources.read(data(path=str(folder))))
    for path in [*folder.glob("*.jsonl"), *folder.glob("qrels/*.tsv")]:
        content = packed(kind, path.read_bytes())
        path.unlink()
        path.with_name(f"{path.name}.{kind}").write_bytes(content)
    assert plain(sources.read(data(path=str(folder)))) == plain_records
    for path in [*folder.glob("*.jsonl.*"), *folder.glob("qrels/*.tsv.*")]:
        path.rename(path.with_suffix(""))
    assert plain(sources.read(data(path=str(folder)))) == plain_records


class Once(io.RawIOBase):
    """A stream that can be read once, from start to end, as of a server that knows no ranges."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(buffer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz", "zst"])
def test_a_stream_that_cannot_seek_is_unpacked(kind: str) -> None:
    content = b"".join(json.dumps({"anchor": f"q{i}", "positive": f"d{i}"}).encode() + b"\n" for i in range(90_000))
    stream = io.BufferedReader(Once(packed(kind, content) if kind else content))
    assert tables._unpacked(stream).read() == content


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_a_packed_file_that_was_cut_is_an_error(kind: str) -> None:
    rows = [{"anchor": f"query {i}", "positive": f"{random.Random(i).random()} {i}"} for i in range(3000)]
    content = packed(kind, "".join(json.dumps(row) + "\n" for row in rows).encode())
    Path(f"cut.jsonl.{kind}").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"cut.jsonl.{kind}, row \d+: the rest of the file cannot be read"):
        list(sources.read(data(format="pairs", path=f"cut.jsonl.{kind}")))


@pytest.mark.parametrize("rows", [[{"text": None}, {}], [{"text": None}, {"text": "x"}]])
@pytest.mark.cases
def test_a_title_alone_makes_a_document(rows: list[dict[str, Any]]) -> None:
    """As a title with an empty text does; with neither there is none."""
    sound = {"_id": "s", "title": "sound", "text": "text"}
    corpus = [sound, *({"_id": f"d{i}", "title": f"title {i}"} | row for i, row in enumerate(rows))]
    read = list(sources.read(data(path=beir(corpus=[*corpus, {"_id": "n", "title": None, "text": None}]))))
    texts = [record.text for record in read if isinstance(record, Document)]
    assert texts == ["sound text", "title 0", f"title 1{' x' if len(rows[1]) else ''}"]
    (bad,) = (record for record in read if isinstance(record, BadRow))
    assert bad.id == "n" and "field 'text': the text is null or absent" in str(bad.error)


def test_qrels_need_documents_with_ids() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.corpus_id"):
        sources.read(data(path=beir(), columns={"corpus_id": None}))
