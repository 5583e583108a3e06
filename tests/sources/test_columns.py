"""What is read at once is what is read row by row: the same records, the same bad rows, at the same places."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_data import Fault, faults
from bad_data import sources as sound_sources

from negpipe import sources
from negpipe.config.schema import Data
from negpipe.errors import InputError
from negpipe.sources import BadRow, Document, Judgment, Place, Query, RecordColumns, TextColumns

FAULTS = list(faults())
Outcome = tuple[dict[str, list[Any]], str | None]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def one_by_one(texts: TextColumns | None) -> Iterator[tuple[Any, ...]]:
    if texts is None:
        return
    ids = [None] * len(texts.texts) if texts.ids is None else texts.ids.to_pylist()
    extra = [column.to_pylist() for column in texts.extra]
    for name, text, row, *more in zip(ids, texts.texts.to_pylist(), texts.places.tolist(), *extra, strict=True):
        yield name, text, Place(texts.file, row), tuple(more)


def records_of(block: RecordColumns) -> Iterator[Any]:
    """The records of a block, kind by kind."""
    for documents, in_corpus in ((block.corpus, True), (block.added, False)):
        for name, text, place, extra in one_by_one(documents):
            yield Document(name, text, place, in_corpus, extra)
    yield from (Query(*values) for values in one_by_one(block.queries))
    if judged := block.judgments:
        sides = judged.queries.to_pylist(), judged.documents.to_pylist()
        for query, document, grade, row in zip(*sides, judged.grades, judged.places.tolist(), strict=True):
            place = Place(judged.file, row)
            yield Judgment(query, document, grade, judged.split, place, judged.query_by_text, judged.document_by_text)


def outcome(records: Callable[[], Iterator[Any]]) -> Outcome:
    """Records by kind, in order, and the error that ended them."""
    found: dict[str, list[Any]] = defaultdict(list)
    try:
        for record in records():
            if isinstance(record, BadRow):
                found["bad"].append((str(record.error), *record[1:]))
            else:
                place = record.place._replace(field=None)
                found[type(record).__name__].append(record._replace(place=place))
    except InputError as error:
        return dict(found), str(error)
    return dict(found), None


def compared(data: Data) -> tuple[Outcome, int]:
    """The outcome, row by row and in columns alike, and how many pieces were read in columns."""
    at_once = 0

    def read() -> Iterator[Any]:
        nonlocal at_once
        for piece in sources.pieces(data):
            block = piece.block()
            at_once += block is not None
            yield from piece.records() if block is None else records_of(block)

    by_row = outcome(lambda: sources.read(data))
    in_columns = outcome(read)
    assert in_columns == by_row
    return by_row, at_once


@pytest.mark.parametrize("name", sound_sources())
def test_sound_sources_are_read_at_once(name: str, tmp_path: Path) -> None:
    (records, error), at_once = compared(Data(**sound_sources()[name].write(tmp_path)))
    assert error is None and "bad" not in records and len(records["Document"]) >= 6
    assert at_once == (0 if name == "flagembedding" else len(sound_sources()[name].files) - (name == "candidate pool"))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.kind != "unknown_id"], ids=str)
def test_bad_rows_are_the_same(fault: Fault, tmp_path: Path) -> None:
    source = sound_sources()[fault.format]
    source.files[fault.file].insert(len(source.files[fault.file]) // 2, fault.row)
    data = Data(**source.write(tmp_path))
    (records, error), _ = compared(data)
    assert error or len(records["bad"]) == 1


# --- mutations --------------------------------------------------------------------------------------------

TOKENS = [
    *(
        b"NaN",
        b"Inf",
        b"-Infinity",
        b"-NaN",
        b"1e999",
        b"-0",
        b"007",
        b"1.",
        b"true",
        b"null",
        b'""',
        b"[]",
        b"{}",
        b'"',
    ),
    *(
        b"\\u0000",
        b"\\ud800",
        b"\\uDC00",
        b"\\ud83d\\ude00",
        b"\\",
        b"\\q",
        b"\x00",
        b"\x01",
        b"\x1c",
        b"\x85",
        b"\xff",
    ),
    *("\u00e9".encode(), "\u3000".encode(), "\ufeff".encode(), b"\r", b"\n", b"\n\n", b"\t", b" ", b",", b":"),
    *(b"-NaN", b"}{", b"}\n{", b"[" * 600 + b"]" * 600, b"9" * 4400, b'"x":{"y":[1,{"z":null}]},', b'"_id":"twice",'),
    *(b'"text":5,', b'"text":null,', b"99999999999999999999", b"1.5", b'a"b', b'"a""b"', b"nan", b"1_0", b"0x1"),
]


def mutation(draw: random.Random, content: bytes) -> bytes:
    """A few changes at random."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        end = min(end, at + draw.randrange(12))
        kind = draw.randrange(6)
        if kind == 0:
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[end:]
        elif kind == 2:
            content = content[:at] + content[at:end] * 2 + content[end:]
        elif kind == 3 and content.count(b"\n"):
            lines = content.split(b"\n")
            place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
            lines[place], lines[other] = lines[other], lines[place]
            content = b"\n".join(lines)
        elif kind == 4:  # where a value stands
            signs = [place for place, byte in enumerate(content) if byte in b':,"']
            place = draw.choice(signs) + 1 if signs else at
            content = content[:place] + draw.choice(TOKENS) + content[place:]
        else:
            content = content[:at] + draw.choice(TOKENS) + content[at:]
    return content


def table(draw: random.Random, columns: dict[str, str]) -> list[dict[str, Any]]:
    words = ["plain", "a  b", " ends ", "Äpfel", "İstanbul", "", "x" * 50, "Information, Inf.", 'say "so"', "a,b\tc"]
    rows = []
    for row in range(draw.randrange(1, 9)):
        values: dict[str, Any] = {name: f"{kind}{row}" for name, kind in columns.items()}
        for name, kind in columns.items():
            if kind == "word":
                values[name] = draw.choice(words) if draw.random() < 0.2 else f"word {row} {name}"
            if kind == "number":
                values[name] = draw.choice([1, 0, 2])
        rows.append(values)
    if draw.random() < 0.3:
        whole = [{**row, "_id": number} if "_id" in row else row for number, row in enumerate(rows)]
        return whole
    return rows


def lines_of(ending: str, rows: list[dict[str, Any]], ascii_only: bool) -> bytes:
    if ending == ".jsonl":
        return b"".join(json.dumps(row, ensure_ascii=ascii_only).encode() + b"\n" for row in rows)
    sign = "," if ending == ".csv" else "\t"

    def cell(value: Any) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '",\t\n') else text

    written = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(sign.join(map(cell, row)) + "\n" for row in written).encode()


def mutated_source(draw: random.Random, folder: Path) -> Data:
    """A small source of one file or three, one of which is changed at random."""
    ending = draw.choice([".jsonl", ".jsonl", ".jsonl", ".csv", ".tsv"])
    if draw.random() < 0.4:
        tables = {"pairs": {"anchor": "word", "positive": "word", "qid": "q"}}
        ids = {"anchor_id": "qid"} if draw.random() < 0.5 else {}
        settings: dict[str, Any] = {"format": "pairs", "path": f"{folder}/pairs{ending}", "columns": ids}
    else:
        tables = {
            "corpus": {"_id": "d", "title": "word", "text": "word", "year": "y"},
            "queries": {"_id": "q", "text": "word"},
            "qrels": {"query-id": "q", "corpus-id": "d", "score": "number"},
        }
        settings = {"format": "columns", **{name: f"{folder}/{name}{ending}" for name in tables}}
        settings["extra"] = {"corpus": ["year"]} if draw.random() < 0.3 else {}
    changed = draw.choice(list(tables))
    for name, columns in tables.items():
        content = lines_of(ending, table(draw, columns), draw.random() < 0.5)
        (folder / f"{name}{ending}").write_bytes(mutation(draw, content) if name == changed else content)
    return Data(**settings)


@pytest.mark.torture
def test_mutated_sources_are_read_alike(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    count = 10_000 if request.config.getoption("--torture") else 600
    draw = random.Random(count)
    seen: dict[str, int] = defaultdict(int)
    for _ in range(count):
        (records, error), at_once = compared(mutated_source(draw, tmp_path))
        seen["refused" if error else "with bad rows" if "bad" in records else "sound"] += 1
        seen["in columns"] += at_once > 0
    assert min(seen[name] for name in ("refused", "with bad rows", "sound")) > count / 20
    assert seen["in columns"] > count / 2


# --- pieces -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_pieces_of_long_texts_stay_small_and_say_where_they_stand(ending: str, tmp_path: Path) -> None:
    rows = [{"anchor": f"query {i}", "positive": f"{i} " + "x" * 180_000} for i in range(120)]
    path = tmp_path / f"pairs{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, use_dictionary=False)
    else:
        path.write_bytes(lines_of(ending, rows, True))
    data = Data(format="pairs", path=str(path))
    blocks = [piece.block() for piece in sources.pieces(data)]
    assert len(blocks) > 3
    assert max(block.added.texts.nbytes if block.added else block.corpus.texts.nbytes for block in blocks) < 2**23  # type: ignore[union-attr]
    compared(data)
    first = {".jsonl": 1, ".csv": 2, ".parquet": 0}[ending]
    places = list(chain.from_iterable(block.queries.places.tolist() for block in blocks))  # type: ignore[union-attr]
    assert places == list(range(first, first + 120))


def test_a_skipped_piece_counts_as_looked_at(tmp_path: Path) -> None:
    """Its columns were there; that a later row lacks one is that row's matter."""
    long = "x" * 2**21
    rows = [{"_id": str(i), "title": "t", "text": long, "year": "1"} for i in range(3)]
    rows += [{"_id": "3", "title": "t", "text": long}]
    for name, table_rows in {"corpus": rows, "queries": [{"_id": "q", "text": "a"}]}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines_of(".jsonl", table_rows, True))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\t0\t1\n")
    named = {name: f"{tmp_path}/{name}.jsonl" for name in ("corpus", "queries")}
    data = Data(format="columns", qrels=f"{tmp_path}/qrels.tsv", extra={"corpus": ["year"]}, **named)
    whole = [list(piece.records()) for piece in sources.pieces(data)]
    for skipped in range(len(whole)):
        pieces = sources.pieces(data)
        for _ in range(skipped):
            next(pieces).skip()
        assert [list(piece.records()) for piece in pieces] == whole[skipped:]
