"""One small source of random texts, and writers of it in every layout that ingest reads."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

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
