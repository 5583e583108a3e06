"""Sources that programs write oddly, and what rows, files and folders may hide: nothing is left out in silence."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from written_sources import made, mteb

from negpipe import sources
from negpipe.config import schema
from negpipe.errors import InputError
from negpipe.sources import BadRow, Document, Judgment, Query

pytestmark = pytest.mark.cases


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def read(**settings: Any) -> list[Any]:
    return list(sources.read(schema.Data.model_validate(settings), given=True))


# --- what is wrong -------------------------------------------------------------------------------------


def text_of(records: list[Any]) -> list[str]:
    return [one.text for one in records if isinstance(one, Document)]


@pytest.mark.parametrize("ending", [b"]", b""])
def test_a_bad_element_is_named_by_its_number(ending: bytes, tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": "one"}, 7, {"query": "q", "pos": 5}, {"query": "q", "pos": "two"}]
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps(rows, indent=1).encode().removesuffix(b"]") + ending)
    records: list[Any] = []
    reading = sources.read(schema.Data(format="flagembedding", path=str(path)))
    if ending:
        records.extend(reading)
    else:
        with pytest.raises(InputError) as caught:
            records.extend(reading)
        assert (caught.value.file, caught.value.row) == (str(path), 15)  # the line at which it ends
    bad = [(one.error.row, one.error.field, one.kind) for one in records if isinstance(one, BadRow)]
    assert bad == [(1, None, "broken"), (2, "pos", "type")]
    assert text_of(records) == ["one", "two"]


def test_a_list_of_very_many_rows_is_read_in_chunks(tmp_path: Path) -> None:
    texts = [f"text {n} " + "x" * (n % 7) * 900 for n in range(3000)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"anchor": "q", "positive": text} for text in texts]))
    assert text_of(read(path=str(path))) == [text.strip() for text in texts]


def test_a_file_cut_off_within_utf16_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"anchor": "q", "positive": "p"}\n'.encode("utf-16")[:-1])
    with pytest.raises(InputError) as caught:
        read(path=str(path))
    assert caught.value.file == str(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.tsv", "rows.jsonl"])
def test_utf16_needs_no_byte_order_mark(name: str, encoding: str, tmp_path: Path) -> None:
    text = "anchor\tpositive\r\nq\tÖl 日本\r\n" if name.endswith("tsv") else '{"anchor": "q", "positive": "Öl 日本"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert text_of(read(path=str(tmp_path / name))) == ["Öl 日本"]


def test_quotes_mean_nothing_where_they_are_to_mean_nothing(tmp_path: Path) -> None:
    lines = ['1\t"so it begins', '2\tand "so" on', '3\t"whole"', "4\tit's \"", "5\ta\ttab too many"]
    (tmp_path / "c.tsv").write_text("\r\n".join(lines))
    (tmp_path / "q.tsv").write_text("id\ttext\n1\twhy\n")
    (tmp_path / "j.txt").write_text("1 Q0 1 1\n")
    named = {
        name: str(tmp_path / file) for name, file in {"corpus": "c.tsv", "queries": "q.tsv", "qrels": "j.txt"}.items()
    }
    table = {"header": ["id", "text"], "quoting": "none"}
    records = read(**named, text="{text}", table=table)
    assert text_of(records) == ['"so it begins', 'and "so" on', '"whole"', "it's \""]
    bad = [one.error for one in records if isinstance(one, BadRow)]
    assert [(one.row, one.problem) for one in bad] == [(5, "3 fields, but the header names 2")]
    # The header is that of one table alone.
    of_corpus = {**named, "corpus": {"path": named["corpus"], "table": table}}
    assert text_of(read(**of_corpus, text="{text}")) == text_of(records)
    with pytest.raises(InputError) as caught:
        read(**{**named, "corpus": {"path": named["corpus"], "table": {"header": ["id", "text"]}}}, text="{text}")
    assert "data.table.quoting" in str(caught.value)
    with pytest.raises(InputError) as caught:
        read(**named, text="{text}", table={"quoting": "none"})
    assert caught.value.row == 1 and "data.table.header" in str(caught.value)


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolon"), ("|", "pipe"), ("\t", "tab"), ("~", "~")])
def test_delimiters(sign: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f'anchor{sign}positive\nq{sign}"a {sign} b"\n')
    assert text_of(read(path=str(tmp_path / "p.csv"), table={"delimiter": name})) == [f"a {sign} b"]
    with pytest.raises(InputError) as caught:
        read(path=str(tmp_path / "p.csv"), format="pairs")
    assert caught.value.row == 1


@pytest.mark.parametrize("header", ["_id;text", '"_id";"text"'])
def test_the_delimiter_that_an_error_advises_reads_the_table(header: str, tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text(header + "\nd1;a text\n")
    (tmp_path / "queries.csv").write_text("_id;text\nq1;a query\n")
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\nq1\td1\n")
    named = {"corpus": "docs.csv", "queries": "queries.csv", "qrels": "qrels.tsv"}
    source: dict[str, Any] = {name: str(tmp_path / file) for name, file in named.items()} | {"text": "{text}"}
    with pytest.raises(InputError) as caught:
        read(**source)
    assert "set data.table.delimiter: semicolon" in str(caught.value.remedy)
    source["table"] = {"delimiter": "semicolon"}
    with pytest.raises(InputError) as caught:
        read(**source)
    advised = str(caught.value.remedy).partition("set data.qrels: ")[2]
    source["qrels"] = yaml.safe_load(advised.replace("…", source["qrels"]))
    assert len(read(**source)) == 3


def test_guessed_names_are_alike_in_upper_and_lower_case(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("ID,Question,Answer\n1,a query,a text\n")
    assert text_of(read(path=str(tmp_path / "rows.csv"))) == ["a text"]
    rows_file(tmp_path / "both.jsonl", {"Query": "not this", "query": "q", "Answer": "a", "answer": "this"})
    records = read(path=str(tmp_path / "both.jsonl"))
    assert [one.text for one in records if isinstance(one, Document | Query)] == ["q", "this"]


def test_a_mistyped_column_is_not_taken_for_a_missing_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Art. No,Question,Head line\n1,a query,a text\n")
    source = {"format": "pairs", "path": str(tmp_path / "rows.csv")}
    with pytest.raises(InputError) as caught:
        read(**source, columns={"anchor": "Question", "positive": "headline"})
    assert "'Head line'" in str(caught.value.remedy) and "header" not in str(caught.value.remedy)
    with pytest.raises(InputError) as caught:
        read(**source, columns={"anchor": "Question", "positive": "url"})
    assert "data.columns.positive" in str(caught.value.remedy) and "data.table.header" in str(caught.value.remedy)


def test_negatives_and_labels_are_not_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"anchor": "q", "positive": "p", "negative": "n", "hard_neg": "h", "label": 0}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    records = read(path=str(tmp_path / "p.jsonl"), format="pairs")
    assert [one.grade for one in records if isinstance(one, Judgment)] == [1.0, None]
    assert "ignored columns: hard_neg, label" in caplog.text and "data.columns.label" in caplog.text
    records = read(path=str(tmp_path / "p.jsonl"))
    assert [one.grade for one in records if isinstance(one, Judgment)] == [0.0, None], "a pair with the label 0"


def test_what_nothing_is_known_of_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "letters.md").write_text("x")
    (tmp_path / "rows.csv").write_text("who,what\na,b\n")
    for path, expected in {"f": "letters.md", "rows.csv": "who, what"}.items():
        with pytest.raises(InputError) as caught:
            read(path=str(tmp_path / path))
        assert caught.value.field == "data.format" and expected in str(caught.value)
    with pytest.raises(InputError) as caught:
        read(path=str(tmp_path / "none-*.jsonl"))
    assert caught.value.file == str(tmp_path / "none-*.jsonl")
    (tmp_path / "ids.jsonl").write_text('{"query_id": "1", "query_text": "q", "positive_document_ids": ["d"]}')
    with pytest.raises(InputError) as caught:
        read(path=str(tmp_path / "ids.jsonl"))
    assert caught.value.field == "data.corpus"


def test_a_cache_that_cannot_be_written_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    written = mteb(random.Random(1), made(random.Random(1)), tmp_path / "in")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError) as caught:
        read(**written.settings)
    assert caught.value.field == "HF_HOME"


def test_a_pattern_of_remote_files_names_them_all() -> None:
    import fsspec

    files = {f"memory://set/rows-{n}.jsonl.gz": {"anchor": f"q{n}", "positive": f"p{n}"} for n in (2, 0, 1)}
    for path, row in files.items():
        with fsspec.open(path, "wb", compression="gzip") as file:
            file.write(json.dumps(row).encode())
    assert text_of(read(path="memory://set/rows-*.jsonl.gz")) == ["p0", "p1", "p2"]
    data = schema.Data(path="memory://set/rows-*.jsonl.gz")
    before = sources.revision(data)
    with fsspec.open("memory://set/rows-1.jsonl.gz", "wb", compression="gzip") as file:
        file.write(json.dumps({"anchor": "q", "positive": "another"}).encode())
    assert sources.revision(data) != before


# --- what rows, files and folders may hide -------------------------------------------------------------


def rows_file(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "later", "name"),
    [
        ({"anchor": "a", "positive": "p"}, {"anchor": "b", "positive": "q", "label": 0}, "label"),
        ({"anchor": "a", "positive": "p"}, {"anchor": "b", "positive": "q", "negative": "n"}, "negative"),
        ({"query": "a", "positive": "p"}, {"anchor": "b", "positive": "q"}, "anchor"),
        (
            {"anchor": "a", "positive": "p", "negative_1": "n"},
            {"anchor": "b", "positive": "q", "negative_1": "n", "negative_2": "m"},
            "negative_2",
        ),
    ],
)
@pytest.mark.parametrize("rows_between", [0, 20000])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_column_that_comes_late_is_no_row_lost(
    first: Any, later: Any, name: str, rows_between: int, ending: str, tmp_path: Path
) -> None:
    rows = [first, *([first] * rows_between), later]
    path = tmp_path / f"rows.{ending}"
    path.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as caught:
        list(sources.read(schema.Data(path=str(path)), given=True))
    assert (caught.value.field, caught.value.row) == (name, len(rows) - (ending == "json"))
    pieces = (piece.block() for piece in sources.pieces(schema.Data(path=str(path)), given=True))
    assert None in list(islice(pieces, len(rows))) or ending == "json", "the fast way leaves it to the slow one"


def test_judgments_whose_grade_comes_late(tmp_path: Path) -> None:
    corpus = rows_file(tmp_path / "c.jsonl", {"_id": "d1", "text": "x"}, {"_id": "d2", "text": "y"})
    queries = rows_file(tmp_path / "q.jsonl", {"_id": "q1", "text": "why"})
    for name in ("rel", "score"):
        qrels = rows_file(tmp_path / "j.jsonl", {"qid": "q1", "docid": "d1"}, {"qid": "q1", "docid": "d2", name: 0})
        settings: dict[str, Any] = {"corpus": corpus, "queries": queries, "qrels": qrels}
        if name == "rel":
            with pytest.raises(InputError) as caught:
                read(**settings)
            assert (caught.value.field, caught.value.row) == ("rel", 2)
        else:
            assert [one.grade for one in read(**settings) if isinstance(one, Judgment)] == [1.0, 0.0]


def test_what_one_file_of_several_brings_counts(tmp_path: Path) -> None:
    one = rows_file(tmp_path / "l1.jsonl", {"anchor": "a", "positive": "p"})
    other = rows_file(tmp_path / "l2.jsonl", {"anchor": "b", "positive": "q", "negative": "n"})
    records = read(path=[one, other])
    assert [record.grade for record in records if isinstance(record, Judgment)] == [1.0, 1.0, None]


def test_lists_one_after_the_other_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = {"anchor": "a", "positive": "p"}
    path.write_text(json.dumps([row, row], indent=1) + "\n" + json.dumps([{"anchor": "c", "positive": "r"}]))
    assert text_of(read(path=str(path))) == ["p", "p", "r"]
    path.write_text(json.dumps([row]) + " x")
    with pytest.raises(InputError) as caught:
        read(path=str(path))
    assert (caught.value.file, caught.value.row) == (str(path), 1)


def test_the_split_of_a_folder_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows_file(tmp_path / "set" / f"{split}.jsonl", {"anchor": "a", "positive": split})
    for split in ("train", "test"):
        assert text_of(read(path=str(tmp_path / "set"), split=split)) == [split]
    with pytest.raises(InputError) as caught:
        read(path=str(tmp_path / "set"), split="dev")
    assert caught.value.field == "split" and caught.value.there == ["test", "train"]


def test_a_folder_of_files_is_read_in_their_order(tmp_path: Path) -> None:
    for n in (1, 0, 2):
        rows_file(tmp_path / "set" / f"part-{n}.jsonl", {"anchor": "a", "positive": f"p{n}"})
    (tmp_path / "set" / "_SUCCESS").touch()
    assert text_of(read(path=str(tmp_path / "set"))) == ["p0", "p1", "p2"]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"anchor": "a", "positive": "p"}]).save_to_disk(str(tmp_path / "set"))
    assert text_of(read(path=str(tmp_path / "set"))) == ["p"]


def test_every_split_of_a_corpus_is_corpus(tmp_path: Path) -> None:
    source = made(random.Random(3))
    written = mteb(random.Random(4), source, tmp_path / "in")
    (old,) = (tmp_path / "in" / "corpus").glob("*.parquet")
    pq.write_table(
        pa.table({"_id": ["more"], "id": ["more"], "title": [""], "text": ["more"]}), old.with_name("b.parquet")
    )
    readme = tmp_path / "in" / "README.md"
    readme.write_text(
        readme.read_text().replace(
            "  data_files:\n  - path: corpus/*.parquet\n",
            f"  data_files:\n  - path: corpus/b.parquet\n    split: train\n  - path: corpus/{old.name}\n",
        )
    )
    assert len(text_of(read(**written.settings))) == len(source.documents) + 1


@pytest.mark.parametrize("sign", [" ", "\t"])
def test_judgments_without_header_and_iteration(sign: str, tmp_path: Path) -> None:
    """BEIR's columns without their names; names that belong to other tables are not theirs."""
    for name in ("corpus", "queries"):
        (tmp_path / f"{name}.tsv").write_text(f"{name}1\ta text\n{name}2\tanother\n")
    judged = tmp_path / "qrels" / "train.tsv"
    judged.parent.mkdir()
    judged.write_text("".join(sign.join(("queries1", f"corpus{n}", str(n - 1))) + "\n" for n in (1, 2)))
    records = read(path=str(tmp_path), text="{text}", table={"header": ["_id", "text"]})
    judged_here = [(one.document, one.grade) for one in records if isinstance(one, Judgment)]
    assert judged_here == [("corpus1", 0), ("corpus2", 1)]


def test_judgments_with_names_of_their_own(tmp_path: Path) -> None:
    corpus = rows_file(tmp_path / "c.jsonl", {"_id": "d1", "text": "x"})
    queries = rows_file(tmp_path / "q.jsonl", {"_id": "q1", "text": "why"})
    (tmp_path / "j.tsv").write_text("q1\td1\t2\n")
    qrels = {"path": str(tmp_path / "j.tsv"), "table": {"header": ["query-id", "corpus-id", "score"]}}
    records = read(corpus=corpus, queries=queries, qrels=qrels)
    assert [record.grade for record in records if isinstance(record, Judgment)] == [2.0]
    (tmp_path / "j.tsv").write_text("7\t9\n")
    with pytest.raises(InputError) as caught:
        read(corpus=corpus, queries=queries, qrels=qrels["path"])
    assert "columns in data.qrels.table.header" in str(caught.value)


@pytest.mark.parametrize(
    "corpus", [{"path": "corp"}, ["corp"], "corp", None, [], [{"path": "lost"}], [{"path": "c"}, {}]]
)
def test_corpora_of_nemo_that_are_not_there(corpus: Any, tmp_path: Path) -> None:
    rows_file(tmp_path / "c" / "docs.jsonl", {"id": "d", "text": "x"})
    question = {"question_id": "1", "question": "q", "pos_doc": [{"id": "d"}]}
    (tmp_path / "train.json").write_text(json.dumps({"corpus": corpus, "data": [question]}))
    with pytest.raises(InputError):
        read(format="nemo", path=str(tmp_path / "train.json"))
    twice = [{"path": "c"}, {"path": "./c/"}]
    (tmp_path / "c" / "NOTES.txt").write_text("no table")
    (tmp_path / "train.json").write_text(json.dumps({"corpus": twice, "data": [question]}))
    assert text_of(read(path=str(tmp_path))) == ["x"]


def test_cells_that_hold_nothing_and_labels_that_are_true(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("anchor,positive,negative_1,negative_2\na,p,n,\nb,q,n,m\n")
    records = read(path=str(tmp_path / "r.csv"))
    assert not [record for record in records if isinstance(record, BadRow)]
    assert len([record for record in records if isinstance(record, Judgment) and record.grade is None]) == 3
    pq.write_table(
        pa.table({"anchor": ["a", "a"], "positive": ["p", "q"], "label": [True, False]}), tmp_path / "r.parquet"
    )
    records = read(path=str(tmp_path / "r.parquet"))
    assert [record.grade for record in records if isinstance(record, Judgment)] == [1.0, 0.0]
