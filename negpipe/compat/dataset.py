"""A caller's (anchor, positive) texts as the source of a run, and its rows with the caller's texts.

Like in sentence-transformers, texts are distinguished character by character; an id is the position of a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from negpipe.compat.columns import columns_of, pair_of, pairs, texts_of
from negpipe.data.arrays import Floats
from negpipe.errors import InputError, count_of
from negpipe.store import view
from negpipe.store.files import publish

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Pairs:
    """Rows of a dataset, and the documents to search.

    Attributes:
        columns: the names of the anchor column and the positive column.
        rows: (anchor, positive), one per row of the dataset, or several for a list of positives.
        corpus: further documents.
    """

    columns: tuple[str, str]
    rows: list[tuple[str, str]]
    corpus: list[str]

    @classmethod
    def of(cls, dataset: Any, anchor: str | None, positive: str | None, corpus: Any = None) -> Pairs:
        """Read a dataset; by default, the columns are its first two.

        Raises:
            ValueError: see `columns`; or the dataset has no rows.
        """
        columns = columns_of(dataset)
        if not any(len(values) for values in columns.values()):
            raise ValueError("the dataset is empty: it must have rows of an anchor and a positive")
        names = pair_of(list(columns), anchor, positive)
        return cls(names, pairs(columns, *names), texts_of(corpus))

    @cached_property
    def anchors(self) -> list[str]:
        return list(dict.fromkeys(anchor for anchor, _ in self.rows))

    @cached_property
    def documents(self) -> list[str]:
        return list(dict.fromkeys([*self.corpus, *(positive for _, positive in self.rows)]))

    @property
    def max_positives(self) -> int:
        """The most rows of an anchor, counting repeated ones."""
        return max(Counter(anchor for anchor, _ in self.rows).values())

    def settings(self, folder: Path) -> dict[str, Any]:
        """Settings of a run in `folder` that reads the output of `write`."""
        source = folder / "source"
        tables = {name: str(source / f"{name}.parquet") for name in ("corpus", "queries", "qrels")}
        return {
            "run_dir": str(folder),
            "data": {"format": "columns", **tables},
            "encoder": {
                "backend": "precomputed",
                "corpus_vectors": str(source / "documents.npy"),
                "anchor_vectors": str(source / "anchors.npy"),
                "normalize": False,
                "storage": "float32",
            },
            "index": {"kind": "stream"},
        }

    def write(self, folder: Path, documents: Floats, anchors: Floats) -> None:
        """Write texts and vectors, (d, n) float32 of `documents` and `anchors`, as the source of a run.

        Raises:
            InputError: a vector is not finite.
        """
        import pyarrow as pa

        numbers = {text: number for number, text in enumerate(self.documents)}
        places = {text: number for number, text in enumerate(self.anchors)}
        tables: dict[str, dict[str, Any]] = {
            "corpus": {"_id": range(len(numbers)), "text": list(map(_wrapped, self.documents))},
            "queries": {"_id": range(len(places)), "text": list(map(_wrapped, self.anchors))},
            "qrels": {
                "query-id": [places[anchor] for anchor, _ in self.rows],
                "corpus-id": [numbers[positive] for _, positive in self.rows],
            },
        }
        for name, columns in tables.items():
            table = pa.table({column: pa.array(values) for column, values in columns.items()})
            _write_table(folder / "source" / f"{name}.parquet", table)
        _check_finite(self.documents, documents)
        _check_finite(self.anchors, anchors)
        for name, vectors in zip(("documents", "anchors"), _never_zero(documents, anchors), strict=True):
            write_vectors(folder / "source" / f"{name}.npy", vectors)

    def dataset(self, triplets: Path, output_format: str, scores: bool) -> Dataset:
        """The rows with the caller's texts, in the columns of sentence-transformers."""
        import pyarrow.dataset as ds
        from datasets import Dataset

        table = ds.dataset([*map(str, view.entries(triplets))]).to_table()
        anchor, positive = self.columns
        columns: dict[str, list[Any]] = {anchor: [self.anchors[int(at)] for at in table["anchor_id"].to_pylist()]}
        for name in table.column_names:
            if name.endswith("_id") and name != "anchor_id":
                text = name.removesuffix("_id")
                columns[positive if text == "positive" else text] = self._texts(table[name].to_pylist())
        if scores and output_format == "triplet":
            both = (table[f"{name}_score"].to_pylist() for name in ("positive", "negative"))
            columns["scores"] = [[one, other] for one, other in zip(*both, strict=True)]
        elif scores or output_format.startswith("labeled"):
            name = "score" if scores else "label"
            name += "" if output_format == "labeled-pair" else "s"
            columns[name] = table[name].to_pylist()
        return Dataset.from_dict(columns)

    def _texts(self, ids: list[Any]) -> list[Any]:
        return [self._texts(entry) if isinstance(entry, list) else self.documents[int(entry)] for entry in ids]


def _wrapped(text: str) -> str:
    """Protect a text: ingest strips texts and rejects empty ones; sentence-transformers does not."""
    return text if text and text == text.strip() and text[0] != "\2" else f"\2{text}\3"


def unwrapped(text: str) -> str:
    """The caller's text of a protected one."""
    return text[1:-1] if text[0] == "\2" else text


def _check_finite(texts: Sequence[str], vectors: Floats) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise InputError(
            f"the model's vector of the text {texts[int(bad[0])][:80]!r} is not finite"
            f" ({count_of(len(bad), 'such vector')})",
            remedy="Check the text; if others fail too, the model's weights are damaged or its precision is too low",
        )


def _never_zero(documents: Floats, anchors: Floats) -> Iterator[Floats]:
    """Vectors with the same inner products, none of them zero: a zero vector's cosine is 0 with all others.

    The stages reject zero vectors, which indicate a damaged file if vectors come from one.
    """
    zero = [~vectors.any(axis=1) for vectors in (documents, anchors)]
    for place, (vectors, here) in enumerate(zip((documents, anchors), zero, strict=True)):
        apart = np.zeros((len(vectors), 2), np.float32)
        apart[here, place] = 1
        yield np.concatenate([vectors, apart], axis=1) if any(map(np.any, zero)) else vectors


def write_vectors(path: Path, vectors: Floats) -> None:
    """Publish vectors as an .npy file."""
    publish(path.parent, path.name, lambda file: np.save(file, vectors, allow_pickle=False))


def _write_table(path: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    publish(path.parent, path.name, lambda file: pq.write_table(table, file))
