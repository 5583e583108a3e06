"""`mining.exclude_file`: a reviewer's verdicts, pairs of anchor and document that are never negatives."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from negpipe.data.tables import Rows
from negpipe.errors import InputError


def read(path: Path) -> dict[str, list[str]]:
    """Anchor id → document ids.

    Raises:
        InputError: the file is missing, or a row lacks anchor_id or document_id.
    """
    verdicts: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in _rows(path, file):
                anchor, document = (_id(row.get(name)) for name in ("anchor_id", "document_id"))
                if not (anchor and document):
                    raise InputError(
                        "every row needs anchor_id and document_id, texts or integers",
                        file=str(path),
                        row=line,
                        remedy='Write {"anchor_id": "…", "document_id": "…"} per line, or CSV with that header',
                    )
                verdicts.setdefault(anchor, []).append(document)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read: {error}", file=str(path), field="mining.exclude_file") from None
    return verdicts


def resolve(verdicts: dict[str, list[str]], corpus: Rows) -> dict[str, list[int]]:
    """Anchor id → rows of the corpus: a verdict on any id of a text applies to the text."""
    row_of = corpus.find({document for documents in verdicts.values() for document in documents})
    return {anchor: [row_of[name] for name in names if name in row_of] for anchor, names in verdicts.items()}


def unknown(verdicts: dict[str, list[str]], corpus: Rows, anchors: Iterable[pa.ChunkedArray]) -> list[str]:
    """For each pair without effect, the id that does not exist, with its kind: `anchor 'q7'`, `document 'd9'`.

    Args:
        verdicts: anchor id → document ids.
        corpus: ingest's documents.
        anchors: the ids of all anchors, in pieces.
    """
    asked = pa.array(verdicts, pa.string())
    known = {name for ids in anchors for name in ids.filter(pc.is_in(ids, asked)).to_pylist()}
    documents = corpus.find({document for documents in verdicts.values() for document in documents})
    return [
        f"document {document!r}" if anchor in known else f"anchor {anchor!r}"
        for anchor, named in verdicts.items()
        for document in named
        if anchor not in known or document not in documents
    ]


def _id(value: object) -> str | None:
    """The id as text; None if it is invalid: absent, of another type, or with a lone surrogate."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    name = str(value)
    return name if name.encode(errors="ignore").decode() == name else None


def _rows(path: Path, file: Iterator[str]) -> Iterator[tuple[int, dict[str, object]]]:
    if path.suffix in (".csv", ".tsv"):
        yield from enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), 2)
        return
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                remedy = 'Write one JSON object per line, such as {"anchor_id": "q1", "document_id": "d1"}'
                raise InputError("not JSON", file=str(path), row=number, remedy=remedy) from None
            yield number, row if isinstance(row, dict) else {}
