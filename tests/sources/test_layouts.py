"""One source, written in every layout, is read as the same source, up to what the layout can carry."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from real_runs import Run

from negpipe import sources
from negpipe.config import schema
from negpipe.data.texts import text_id
from negpipe.errors import InputError
from negpipe.sources import BadRow, Document, Judgment, Query

pytestmark = pytest.mark.cases

WORDS = [
    "oats",
    "Öl",
    '"quoted"',
    "it's",
    "5",
    "a,b",
    "tea; milk",
    "日本",
    "x|y",
    "[z]",
    "{w}",
    "end.",
    "\U0001f600",
    "0",
]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


class Source(NamedTuple):
    """Documents (id → title, text), queries (id → text), and what is judged: query → positives, negatives."""

    documents: dict[str, tuple[str, str]]
    queries: dict[str, str]
    judged: dict[str, tuple[list[str], list[str]]]

    def text(self, document: str) -> str:
        return " ".join(self.documents[document]).strip()


def made(draw: random.Random) -> Source:
    def words(least: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 6)))

    documents = {
        f"d{n}": (words(0) if draw.random() < 0.5 else "", f"{words(1)} {n}") for n in range(draw.randint(4, 9))
    }
    queries = {f"{n:03d}": f"{words(1)} q{n}" for n in range(draw.randint(1, 5))}
    judged = {}
    for query in queries:
        some = draw.sample(sorted(documents), 4)
        positives = draw.randint(1, 3)
        judged[query] = some[:positives], some[positives:]
    return Source(documents, queries, judged)


# --- files ---------------------------------------------------------------------------------------------

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
}


def json_text(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """Rows as lines, a list, or objects over several lines, in UTF-8 or UTF-16."""
    ascii_only = draw.random() < 0.5
    way = draw.choice(["lines", "list", "pretty list", "pretty objects"])
    if way in ("list", "pretty list"):
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=2 if way == "pretty list" else None)
    else:
        indent = 1 if way == "pretty objects" else None
        text = "".join(json.dumps(row, ensure_ascii=ascii_only, indent=indent) + "\n" for row in rows)
    return text.encode(draw.choice(["utf-8", "utf-8-sig", "utf-16"]))


def put(draw: random.Random, folder: Path, name: str, rows: list[dict[str, Any]], kind: str = ".jsonl") -> str:
    """A table in a file of any kind that can hold it, packed or not; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = all(isinstance(value, str | int | None) for row in rows for value in row.values())
    if plain and draw.random() < 0.3:
        path = folder / f"{name}.tsv"
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)
    if draw.random() < 0.2:
        path = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    packed = draw.choice(list(PACKED))
    path = folder / f"{name}{kind}{packed if draw.random() < 0.7 else ''}"
    path.write_bytes(PACKED[packed](json_text(draw, rows)))
    return str(path)


def corpus_rows(source: Source, identity: str = "_id") -> list[dict[str, Any]]:
    return [{identity: name, "title": title, "text": text} for name, (title, text) in source.documents.items()]


def judgment_rows(source: Source) -> list[dict[str, Any]]:
    return [
        {"query-id": query, "corpus-id": document, "score": int(positive)}
        for query, lists in source.judged.items()
        for positive, some in zip((True, False), lists, strict=True)
        for document in some
    ]


# --- layouts -------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A source in a layout: its settings, and what the layout carries."""

    settings: dict[str, Any]
    carries: frozenset[str]


EVERYTHING = frozenset({"corpus", "query ids", "document ids", "negatives"})
UNQUOTED = {"table": {"quoting": "none"}}


def beir(draw: random.Random, source: Source, folder: Path) -> Written:
    identity = draw.choice(["_id", "id"])
    put(draw, folder, "corpus", corpus_rows(source, identity))
    put(draw, folder, "queries", [{identity: name, "text": text} for name, text in source.queries.items()])
    if draw.random() < 0.3:
        (folder / "qrels").mkdir()
        lines = (f"{row['query-id']} 0\t{row['corpus-id']} {row['score']}\n" for row in judgment_rows(source))
        (folder / "qrels" / "train.txt").write_text("".join(lines))
    else:
        put(draw, folder / "qrels", "train", judgment_rows(source))
    return Written({"format": "beir", "path": str(folder), **UNQUOTED}, EVERYTHING - {"negatives"})


def mteb(draw: random.Random, source: Source, folder: Path) -> Written:
    before = draw.choice(["", "de-"])
    judged = draw.choice(["default", "qrels"])
    tables = {
        "corpus": ("corpus", corpus_rows(source, draw.choice(["_id", "id"]))),
        "queries": ("queries", [{"_id": name, "text": text} for name, text in source.queries.items()]),
        judged: ("train", judgment_rows(source)),
    }
    configs = []
    for name, (split, rows) in tables.items():
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{split}-0.parquet")
        files = [{"split": split, "path": f"{name}/*.parquet"}]
        configs.append({"config_name": before + name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n# A set\n")
    settings = {"format": "mteb", "path": str(folder)} | ({"subset": "de"} if before else {})
    return Written(settings, EVERYTHING - {"negatives"})


def columns(draw: random.Random, source: Source, folder: Path) -> Written:
    """Files without a header, as MS MARCO has them, in several pieces."""
    texts = [f"{name}\t{source.text(name)}\n" for name in source.documents]
    cut = draw.randint(1, len(texts) - 1)
    folder.mkdir()
    for number, some in enumerate((texts[:cut], texts[cut:])):
        (folder / f"collection-{number}.tsv").write_text("".join(some), encoding="utf-8")
    (folder / "queries.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in source.queries.items()))
    corpus = draw.choice(["collection-*.tsv", ["collection-0.tsv", "collection-1.tsv"]])
    several = [str(folder / name) for name in ([corpus] if isinstance(corpus, str) else corpus)]
    return Written(
        {
            "format": "columns",
            "corpus": several if len(several) > 1 else several[0],
            "queries": str(folder / "queries.tsv"),
            "qrels": put(draw, folder, "qrels", judgment_rows(source)),
            "table": {"header": ["id", "text"], "quoting": "none"},
            "text": "{text}",
        },
        EVERYTHING - {"negatives"},
    )


def llama_index(draw: random.Random, source: Source, folder: Path) -> Written:
    folder.mkdir()
    whole = {
        "queries": source.queries,
        "corpus": {name: source.text(name) for name in source.documents},
        "relevant_docs": {query: positives for query, (positives, _) in source.judged.items()},
        "mode": "text",
    }
    keys = draw.sample(sorted(whole), 4)
    path = folder / "qa.json"
    path.write_text(json.dumps({key: whole[key] for key in keys}, indent=draw.choice([None, 2])), encoding="utf-8")
    return Written({"format": "llama_index", "path": str(path)}, EVERYTHING - {"negatives"})


def pairs(draw: random.Random, source: Source, folder: Path) -> Written:
    rows: list[dict[str, Any]] = []
    listed = draw.random() < 0.5
    named = draw.choice([{"anchor": "anchor", "positive": "positive"}, {"anchor": "query", "positive": "answers"}])
    for query, (positives, _) in source.judged.items():
        texts = [source.text(name) for name in positives]
        for value in [texts] if listed else texts:
            rows.append({named["anchor"]: source.queries[query], named["positive"]: value})
    path = put(draw, folder, "rows", rows)
    settings = {"format": "pairs", "path": path, **UNQUOTED}
    return Written(settings, frozenset())


def tuples(draw: random.Random, source: Source, folder: Path) -> Written:
    """Triplets, or n-tuples, of Sentence Transformers, with ids."""
    width = min(len(negatives) for _, negatives in source.judged.values())
    rows = []
    for query, (positives, negatives) in source.judged.items():
        for positive in positives:
            row: dict[str, Any] = {"anchor": source.queries[query], "anchor_id": query}
            row |= {"positive": source.text(positive), "positive_id": positive}
            for number, negative in enumerate(negatives[:width], 1):
                ending = f"_{number}" if width > 1 else ""
                row |= {f"negative{ending}": source.text(negative), f"negative{ending}_id": negative}
            rows.append(row)
        del negatives[width:]
    ids = {"anchor_id": "anchor_id", "positive_id": "positive_id", "negative_id": "negative_id"}
    settings = {"format": "pairs", "path": put(draw, folder, "rows", rows), "columns": ids, **UNQUOTED}
    return Written(settings, EVERYTHING - {"corpus"})


def labeled(draw: random.Random, source: Source, folder: Path) -> Written:
    """Labeled lists: the documents of an anchor with 1 or 0 each."""
    rows = []
    for query, (positives, negatives) in source.judged.items():
        order = draw.sample([*positives, *negatives], len(positives) + len(negatives))
        grades = [int(name in positives) for name in order]
        rows.append(
            {"anchor": source.queries[query], "positive": [source.text(name) for name in order], "labels": grades}
        )
    settings = {"format": "pairs", "path": put(draw, folder, "rows", rows), "columns": {"label": "labels"}}
    return Written(settings, frozenset())


def flagembedding(draw: random.Random, source: Source, folder: Path) -> Written:
    rows: list[dict[str, Any]] = [
        {
            "query": source.queries[query],
            "pos": [source.text(p) for p in positives],
            "neg": [source.text(n) for n in neg],
        }
        for query, (positives, neg) in source.judged.items()
    ]
    return Written({"format": "flagembedding", "path": put(draw, folder, "rows", rows)}, frozenset({"negatives"}))


def passages(source: Source, names: list[str], identity: str) -> list[dict[str, Any]]:
    return [{identity: name, "title": source.documents[name][0], "text": source.documents[name][1]} for name in names]


def tevatron(draw: random.Random, source: Source, folder: Path) -> Written:
    rows: list[dict[str, Any]] = [
        {
            "query_id": query,
            "query": source.queries[query],
            "positive_passages": passages(source, positives, "docid"),
            "negative_passages": passages(source, negatives, "docid"),
        }
        for query, (positives, negatives) in source.judged.items()
    ]
    return Written({"format": "tevatron", "path": put(draw, folder, "rows", rows)}, EVERYTHING - {"corpus"})


def tevatron_ids(draw: random.Random, source: Source, folder: Path) -> Written:
    rows: list[dict[str, Any]] = [
        {
            "query_id": query,
            "query_text": source.queries[query],
            "positive_document_ids": positives,
            "negative_document_ids": negatives,
        }
        for query, (positives, negatives) in source.judged.items()
    ]
    corpus = put(draw, folder, "corpus", corpus_rows(source, "docid"))
    path = put(draw, folder, "train", rows)
    settings: dict[str, Any] = {"format": "tevatron", "path": path, "corpus": corpus, **UNQUOTED}
    return Written(settings, EVERYTHING)


def dpr(draw: random.Random, source: Source, folder: Path) -> Written:
    folder.mkdir()
    rows = [
        {
            "question": source.queries[query],
            "answers": ["one"],
            "positive_ctxs": passages(source, positives, "passage_id"),
            "negative_ctxs": passages(source, negatives[:1], "passage_id"),
            "hard_negative_ctxs": passages(source, negatives[1:], "passage_id"),
        }
        for query, (positives, negatives) in source.judged.items()
    ]
    path = folder / "dpr.json"
    path.write_bytes(json.dumps(rows, indent=draw.choice([None, 4])).encode())
    return Written({"format": "dpr", "path": str(path)}, frozenset({"document ids", "negatives"}))


def ms_swift(draw: random.Random, source: Source, folder: Path) -> Written:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    rows = [
        {
            "messages": said(source.queries[query]),
            "positive_messages": [said(source.text(name)) for name in positives],
            "negative_messages": [said(source.text(name)) for name in negatives],
        }
        for query, (positives, negatives) in source.judged.items()
    ]
    return Written({"format": "ms-swift", "path": put(draw, folder, "rows", rows)}, frozenset({"negatives"}))


def nemo(draw: random.Random, source: Source, folder: Path) -> Written:
    (folder / "corpus").mkdir(parents=True)
    (folder / "corpus" / "merlin_metadata.json").write_text('{"corpus_id": "c", "class": "TextQADataset"}')
    rows = [{"id": name, "text": source.text(name)} for name in source.documents]
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus" / "train.parquet")
    questions = [
        {
            "question_id": query,
            "question": source.queries[query],
            "corpus_id": "c",
            "pos_doc": [{"id": name} for name in positives],
            "neg_doc": [{"id": name, "score": 0.5} for name in negatives],
        }
        for query, (positives, negatives) in source.judged.items()
    ]
    whole = {"corpus": [{"path": draw.choice(["corpus", "./corpus/"])}], "data": questions}
    (folder / "train.json").write_text(json.dumps(whole, indent=draw.choice([None, 1])))
    return Written({"format": "nemo", "path": draw.choice([str(folder), str(folder / "train.json")])}, EVERYTHING)


def pylate(draw: random.Random, source: Source, folder: Path) -> Written:
    for lists in source.judged.values():
        del lists[0][1:]  # the first of a list is the positive
    tables: dict[str, list[dict[str, Any]]] = {
        "queries": [{"query_id": name, "text": text} for name, text in source.queries.items()],
        "documents": [{"document_id": name, "text": source.text(name)} for name in source.documents],
        "train": [
            {"query_id": query, "document_ids": [*positives, *negatives], "scores": [0.5] * len(positives + negatives)}
            for query, (positives, negatives) in source.judged.items()
        ],
    }
    if draw.random() < 0.5:
        for name, rows in tables.items():
            put(draw, folder, name, rows)
    else:
        for name, rows in tables.items():
            (folder / name).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / name / "0.parquet")
        configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in tables]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return Written({"format": "pylate", "path": str(folder), **UNQUOTED}, EVERYTHING)


LAYOUTS = (
    *(beir, mteb, columns, llama_index, pairs, tuples, labeled, flagembedding),
    *(tevatron, tevatron_ids, dpr, ms_swift, nemo, pylate),
)


# --- what is read --------------------------------------------------------------------------------------


def expected(source: Source, carries: frozenset[str]) -> dict[str, Any]:
    """(text, id) of documents and queries, and by query text the texts of positives and negatives."""

    def document(name: str) -> tuple[str, str]:
        text = source.text(name)
        return text, name if "document ids" in carries else text_id(text)

    def query(name: str) -> tuple[str, str]:
        return source.queries[name], name if "query ids" in carries else text_id(source.queries[name])

    def positives(name: str) -> set[tuple[str, str]]:
        return {document(one) for one in source.judged[name][0]}

    negatives = {query(name): {document(one) for one in lists[1]} for name, lists in source.judged.items()}
    return {
        "queries": {query(name) for name in source.queries},
        "positives": {query(name): positives(name) for name in source.judged},
        "negatives": {asked: some for asked, some in negatives.items() if some} if "negatives" in carries else {},
    } | ({"corpus": {document(name) for name in source.documents}} if "corpus" in carries else {})


def found(data: schema.Data, carries: frozenset[str]) -> dict[str, Any]:
    documents: dict[str, tuple[str, str]] = {}
    queries: dict[str, tuple[str, str]] = {}
    judged: dict[str, dict[tuple[str, str], set[tuple[str, str]]]] = {
        "positives": defaultdict(set),
        "negatives": defaultdict(set),
    }
    for record in sources.read(data, given=True):
        assert not isinstance(record, BadRow), record.error
        if isinstance(record, Document):
            identity = record.id or text_id(record.text)
            documents[identity] = record.text, identity
        elif isinstance(record, Query):
            identity = record.id or text_id(record.text)
            queries[identity] = record.text, identity
        else:
            assert isinstance(record, Judgment)
            query = text_id(record.query) if record.query_by_text else record.query
            document = text_id(record.document) if record.document_by_text else record.document
            if record.grade != 0:
                side = "negatives" if record.grade is None else "positives"
                judged[side][queries[query]].add(documents[document])
    return {"queries": {*queries.values()}, **{side: dict(by_query) for side, by_query in judged.items()}} | (
        {"corpus": {*documents.values()}} if "corpus" in carries else {}
    )


def read(**settings: Any) -> list[Any]:
    return list(sources.read(schema.Data.model_validate(settings), given=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("seed", range(12))
def test_every_layout_gives_the_same_source(layout: Any, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{layout.__name__} {seed}")
    source = made(draw)
    written = layout(draw, source, tmp_path / "in")
    named = schema.Data.model_validate(written.settings)
    assert found(named, written.carries) == expected(source, written.carries)
    if layout in (mteb, pylate):
        streamed = named.model_copy(update={"streaming": True})
        assert found(streamed, written.carries) == expected(source, written.carries)
    guessed = {key: value for key, value in written.settings.items() if key not in ("format", "columns")}
    if "path" in guessed:
        assert sources.recognized(schema.Data.model_validate(guessed)).format == named.format
    assert found(schema.Data.model_validate(guessed), written.carries) == expected(source, written.carries)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("seed", [20, 21])
def test_every_layout_gives_the_same_tables(layout: Any, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{layout.__name__} {seed}")
    source = made(draw)
    written = layout(draw, source, tmp_path / "in")
    encoder = {"backend": "precomputed", "corpus_vectors": "none.npy", "anchor_vectors": "none.npy"}
    config = {"run_dir": str(tmp_path / "run"), "data": written.settings, "encoder": encoder}
    run = Run(config | {"mining": {"given_negatives": "first"}})
    run.mine(only="ingest")
    texts = [(row["text"], row["id"]) for row in run.tables("documents").to_pylist()]
    wanted = expected(source, written.carries)
    if "corpus" in wanted:
        assert {*texts} == wanted["corpus"]
    anchors = run.tables("anchors").to_pylist()
    positives = {(row["text"], row["id"]): {texts[at] for at in row["positives"]} for row in anchors}
    assert positives == wanted["positives"]
    assert {*positives} == wanted["queries"]
    given = {}
    for row in anchors:
        some = zip(row["refused"], row["refused_grades"], strict=True)
        if brought := {texts[at] for at, grade in some if grade is None}:
            given[row["text"], row["id"]] = brought
    assert given == wanted["negatives"]


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


def test_negatives_and_labels_are_not_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"anchor": "q", "positive": "p", "negative": "n", "hard_neg": "h", "label": 0}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    records = read(path=str(tmp_path / "p.jsonl"), format="pairs")
    assert [one.grade for one in records if isinstance(one, Judgment)] == [1.0, None]
    assert "not read: hard_neg, label" in caplog.text and "data.columns.label" in caplog.text
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


def test_judgments_with_names_of_their_own(tmp_path: Path) -> None:
    corpus = rows_file(tmp_path / "c.jsonl", {"_id": "d1", "text": "x"})
    queries = rows_file(tmp_path / "q.jsonl", {"_id": "q1", "text": "why"})
    (tmp_path / "j.tsv").write_text("q1\td1\t2\n")
    qrels = {"path": str(tmp_path / "j.tsv"), "table": {"header": ["query-id", "corpus-id", "score"]}}
    records = read(corpus=corpus, queries=queries, qrels=qrels)
    assert [record.grade for record in records if isinstance(record, Judgment)] == [2.0]
    with pytest.raises(InputError) as caught:
        read(corpus=corpus, queries=queries, qrels=qrels["path"])
    assert "data.qrels.table.header" in str(caught.value)


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
