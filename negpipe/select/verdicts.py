"""`mining.exclude_file`: a reviewer's verdicts, pairs of anchor and document that are never negatives."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from negpipe.data.tables import Rows
from negpipe.errors import InputError

Ints = npt.NDArray[np.int64]
logger = logging.getLogger(__name__)


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
    wanted = {document for documents in verdicts.values() for document in documents}
    row_of = corpus.find(wanted)
    if unknown := wanted - row_of.keys():
        logger.warning(
            "mining.exclude_file: %d of %d documents are not in the corpus, such as %r",
            len(unknown),
            len(wanted),
            min(unknown),
        )
    return {anchor: [row_of[name] for name in names if name in row_of] for anchor, names in verdicts.items()}


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
            except (ValueError, RecursionError) as error:
                raise InputError(f"not JSON: {error}", file=str(path), row=number) from None
            yield number, row if isinstance(row, dict) else {}
