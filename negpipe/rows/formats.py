"""Training rows: units → Arrow tables in the layout of `output.format`.

The rows, their order and the column names are those of sentence-transformers' `mine_hard_negatives`;
`mining.margin_reference` determines the units.

    triplet       anchor, positive, negative
                  a row per positive and negative of a unit, with the positive in the outer loop
    n-tuple       anchor, positive, negative_1 … negative_n
                  a row per positive of a unit with all n negatives
    labeled-pair  anchor, positive, label
                  a row per document of a unit, the positives (1), then the negatives (0); both in `positive`
    labeled-list  anchor, positive, labels
                  a row per positive of a unit with negatives: lists of that positive and the negatives

With `mining.on_shortage: drop`, units that lack negatives have no rows in any format.

Optional further columns: ids and `data.extra` columns of a text, prefixed with its column (`anchor_id`,
`negative_2_title`); and the numbers below, with lists in the order of the row's documents.
A rank is null beyond the stored depth and for random negatives. An unjudged negative has no grade in triplets, and the
grade 0 in labeled rows, whose grades are read by a loss. If negatives may be random, given or judged, the source says
so, or `mined`; it is null for a positive.

    triplet       positive_score, negative_score, negative_rank, positive_grade, negative_grade, source
    n-tuple       scores, ranks, positive_grade, sources
    labeled-pair  score, rank, grade, source
    labeled-list  scores, ranks, grades, sources

Trainers use every column, so select those for a loss with `select_columns`: ["anchor", "positive", "negative_1"]
for MultipleNegativesRankingLoss, these and "scores" for MarginMSELoss, ["anchor", "positive", "label"] for
BinaryCrossEntropyLoss, ["anchor", "positive", "labels"] (or "scores", "grades" renamed) for LambdaLoss.

Memory holds the texts of one row group at a time, about 32 MiB, each text once; the same units give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.config.schema import Config
from negpipe.data.arrays import Ints, Mask
from negpipe.data.tables import EXTRA, Rows, dictionary, within
from negpipe.select.selector import SOURCES, Units

GROUP_BYTES = 32 * 2**20
_ALL = -1
# Column → its content, and the position of its document in the row.
_NUMBERS: dict[str, dict[str, tuple[str, int]]] = {
    "triplet": {
        "positive_score": ("score", 0),
        "negative_score": ("score", 1),
        "negative_rank": ("rank", 1),
        "positive_grade": ("grade", 0),
        "negative_grade": ("grade", 1),
        "source": ("source", 1),
    },
    "n-tuple": {
        "scores": ("score", _ALL),
        "ranks": ("rank", _ALL),
        "positive_grade": ("grade", 0),
        "sources": ("source", _ALL),
    },
    "labeled-pair": {name: (name, 0) for name in ("label", "score", "rank", "grade", "source")},
    "labeled-list": {name + "s": (name, _ALL) for name in ("label", "score", "rank", "grade", "source")},
}


def tables(slices: Iterable[Units], corpus: Rows, config: Config) -> Iterator[tuple[int, pa.Table]]:
    """Rows in row groups, each with the number of its file in the part: 0, or by `output.rows_per_file`.

    Text columns are dictionary-encoded for `write`; a slice without rows yields a table without rows.
    """
    limit = config.output.rows_per_file
    written = 0
    for units in slices:
        rows = _arranged(units, config)
        for start, stop in pairwise(_borders(units, corpus, rows, written, limit)):
            made = _table(units, corpus, rows.slice(start, stop), config)
            yield max(0, written + stop - start - 1) // limit if limit else 0, made
            written += stop - start


def has_rows(units: Units, config: Config) -> Mask:
    """(u,) whether a unit has enough negatives for rows in the config's format."""
    name, wanted = config.output.format, config.mining.wanted
    all_of_them = name == "n-tuple" or config.mining.on_shortage == "drop"
    return units.counts >= (wanted if all_of_them else name != "labeled-pair")


def write(file: BinaryIO, groups: Iterable[pa.Table]) -> int:
    """Write one Parquet file from at least one table, one row group per table. Return the number of rows.

    Readers see plain strings. A second thread compresses a group while the next is assembled.
    """
    groups = iter(groups)
    table = next(groups, None)
    assert table is not None
    rows, pending = 0, None
    texts = [_leaf(field) for field in table.schema if _is_text(field.type)]
    with (
        pq.ParquetWriter(
            file,
            table.schema,
            compression="zstd",
            compression_level=1,
            store_schema=False,
            use_dictionary=texts,
            dictionary_pagesize_limit=2**30,
            write_statistics=[_leaf(field) for field in table.schema if not _is_text(field.type)],
        ) as writer,
        ThreadPoolExecutor(1) as pool,
    ):
        while table is not None:
            if table.num_rows:
                _finish(pending)
                pending = pool.submit(writer.write_table, table, row_group_size=table.num_rows)
                rows += table.num_rows
            table = next(groups, None)
        _finish(pending)
    return rows


def _finish(pending: Future[None] | None) -> None:
    if pending is not None:
        pending.result()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_dictionary(kind.value_type if pa.types.is_list(kind) else kind))


def _leaf(field: pa.Field) -> str:
    """A column's path in the Parquet schema."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


# --- documents of rows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """r rows of documents.

    Attributes:
        unit: (r,) unit of each row, ascending.
        documents: documents of all rows, ragged by `offsets` (r + 1,). A document is an index into the units'
            positives followed by their negatives.
    """

    unit: Ints
    documents: Ints
    offsets: Ints

    def slice(self, start: int, stop: int) -> _Rows:
        low, high = self.offsets[start], self.offsets[stop]
        return _Rows(self.unit[start:stop], self.documents[low:high], self.offsets[start : stop + 1] - low)


def _arranged(units: Units, config: Config) -> _Rows:
    """The rows of the config's format."""
    name, kept = config.output.format, has_rows(units, config)
    positives, negatives = np.diff(units.positive_offsets), np.diff(units.negative_offsets)
    first = len(units.positives) + units.negative_offsets[:-1]
    if name == "labeled-pair":
        lengths = (positives + negatives) * kept
        unit = np.repeat(np.arange(len(kept)), lengths)
        place = within(lengths)
        after = place - positives[unit]
        documents = np.where(after < 0, units.positive_offsets[unit] + place, first[unit] + after)
        return _Rows(unit, documents, np.arange(len(unit) + 1))
    unit = np.repeat(np.arange(len(kept)), positives)
    positive = np.flatnonzero(kept[unit])
    unit = unit[positive]
    if name == "triplet":
        lengths = negatives[unit]
        positive, unit = np.repeat(positive, lengths), np.repeat(unit, lengths)
        negative = first[unit] + within(lengths)
        return _Rows(unit, np.stack([positive, negative], axis=1).ravel(), 2 * np.arange(len(unit) + 1))
    lengths = 1 + negatives[unit]
    place = within(lengths)
    documents = np.where(place, np.repeat(first[unit], lengths) + place - 1, np.repeat(positive, lengths))
    return _Rows(unit, documents, np.concatenate([[0], np.cumsum(lengths)]))


def _borders(units: Units, corpus: Rows, rows: _Rows, written: int, limit: int | None) -> list[int]:
    """The boundaries of row groups, so that texts stay within limits, and of files.

    They are between units; a unit with more texts than a group is split between its documents.
    """
    sizes = np.concatenate([[0], np.cumsum(corpus.sizes("text", np.concatenate([units.positives, units.negatives])))])
    split = len(units.positives)
    size = np.diff(sizes[units.positive_offsets]) + np.diff(sizes[split + units.negative_offsets])
    group = (np.cumsum(size) // GROUP_BYTES)[rows.unit]
    count = len(rows.unit)
    document = rows.documents[rows.offsets[:-1]]
    first = np.where(document < split, units.positive_offsets[rows.unit], split + units.negative_offsets[rows.unit])
    inside = (sizes[document] - sizes[first]) // GROUP_BYTES
    ends = {int(end) + 1 for end in np.flatnonzero(np.diff(group) | np.diff(inside))}
    if limit:
        ends |= set(range(-written % limit, count, limit)) - {0}
    return [0, *sorted(ends), count]


# --- columns of rows ----------------------------------------------------------------------------------


def _table(units: Units, corpus: Rows, rows: _Rows, config: Config) -> pa.Table:
    extra, asked = config.data.extra, config.output.extra_columns
    kept = {side: [EXTRA + name for name in names if asked is None or name in asked] for side, names in extra}
    first = ["id", "text"] if config.output.ids else ["text"]

    documents = np.concatenate([units.positives, units.negatives])[rows.documents]
    found = {"anchor": _of_anchors(units, rows, [*first, *kept["queries"]])}
    if config.output.format == "labeled-list":
        offsets = pa.array(rows.offsets.astype(np.int32))
        texts = corpus.encoded([*first, *kept["corpus"]], documents)
        found["positive"] = [pa.ListArray.from_arrays(offsets, values) for values in texts]
    else:
        for text, column in _places(config).items():
            found[text] = corpus.encoded([*first, *kept["corpus"]], documents[rows.offsets[:-1] + column])
    columns: dict[str, pa.Array] = {}
    if config.output.ids:
        columns |= {f"{text}_id": values[0] for text, values in found.items()}
    columns |= {text: values[len(first) - 1] for text, values in found.items()}
    columns |= _numbers(units, rows, config)
    for text, values in found.items():
        names = kept["queries" if text == "anchor" else "corpus"]
        columns |= {
            f"{text}_{name.removeprefix(EXTRA)}": value for name, value in zip(names, values[len(first) :], strict=True)
        }
    return pa.table(columns)


def _places(config: Config) -> dict[str, int]:
    """Text column → the position of its document in the row."""
    if config.output.format == "labeled-pair":
        return {"positive": 0}
    if config.output.format == "triplet":
        return {"positive": 0, "negative": 1}
    return {"positive": 0} | {f"negative_{number}": number for number in range(1, config.mining.wanted + 1)}


def _of_anchors(units: Units, rows: _Rows, columns: list[str]) -> list[pa.DictionaryArray]:
    anchors, codes = np.unique(units.anchor[rows.unit], return_inverse=True)
    at, codes = pa.array(anchors), pa.array(codes.astype(np.int32))
    values = (units.anchors[name].take(at).combine_chunks().cast(pa.large_string()) for name in columns)
    return [dictionary(texts, codes, distinct=False) for texts in values]


def _numbers(units: Units, rows: _Rows, config: Config) -> dict[str, pa.Array]:
    output = config.output
    ranks = np.concatenate([units.positive_ranks, units.negative_ranks])
    values: dict[str, pa.Array] = {"label": pa.array(np.repeat([1, 0], [len(units.positives), len(units.negatives)]))}
    if output.scores:
        values["score"] = pa.array(np.concatenate([units.positive_scores, units.negative_scores]))
    if output.ranks:
        values["rank"] = pa.array(ranks.astype(np.int32), mask=ranks < 0)
    if output.grades:
        grades = np.concatenate([units.grades, units.negative_grades])
        unknown = np.isnan(grades)
        labelled = output.format.startswith("labeled")
        values["grade"] = pa.array(np.where(unknown, 0, grades)) if labelled else pa.array(grades, mask=unknown)
    if config.mining.draws or config.mining.prefers:
        sources = np.concatenate([np.zeros(len(units.positives), np.uint8), units.negative_sources])
        negative = np.arange(len(sources)) >= len(units.positives)
        codes = pa.array(sources.astype(np.int32), mask=~negative)
        values["source"] = pa.DictionaryArray.from_arrays(codes, pa.array(SOURCES, pa.large_string()))
    columns: dict[str, pa.Array] = {}
    for column, (name, place) in _NUMBERS[output.format].items():
        if name not in values:
            continue
        if place == _ALL:
            found = values[name].take(pa.array(rows.documents))
            columns[column] = pa.ListArray.from_arrays(pa.array(rows.offsets.astype(np.int32)), found)
        else:
            columns[column] = values[name].take(pa.array(rows.documents[rows.offsets[:-1] + place]))
    return columns
