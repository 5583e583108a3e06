"""A sample of anchors and documents, including their positives, and what a config mines from their vectors.

Small enough to be encoded in seconds: windows are as in the config but documents are fewer, so selection is easier than
in the run. It serves to compare two ways to compute vectors, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from negpipe import ann
from negpipe.ann.vectors import Held
from negpipe.data.arrays import Floats, Ints
from negpipe.data.candidates import DENSE, Candidates
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import Rows, documents, open_table, ragged, searchable
from negpipe.engine.stage import Context
from negpipe.review import quality
from negpipe.select.filters import own_documents
from negpipe.select.rules import Fate
from negpipe.select.selector import Selector

_EACH = 5  # documents per anchor
_POSITIVES = 4  # positives per anchor among them
_METRIC = "nDCG@10"


@dataclass(frozen=True)
class Sample:
    """Documents in encoding order, so that the first n are a sample, too.

    Attributes:
        rows: (n,) rows of the documents, each once; `texts` are their texts.
        anchors: (m,) rows of ingest's anchor table.
        positives: rows of the anchors' positives among the documents, ragged by `offsets` (m + 1,); grades alike.
        complete: (m,) how many first documents contain the positives of an anchor and those before it; ascending.
    """

    rows: Ints
    texts: list[str]
    anchors: pa.Table
    positives: Ints
    grades: Floats
    offsets: Ints
    complete: Ints


@dataclass(frozen=True)
class Outcome:
    """Result of some vectors of a sample.

    Attributes:
        negatives: (unit, row) of each mined negative; None if another score than theirs decides.
        ndcg: nDCG@10, mean over the anchors.
    """

    negatives: frozenset[tuple[int, int]] | None
    ndcg: float


def draw(context: Context, most: int) -> Sample:
    """A sample of at most `most` documents; without anchors if the positives of one do not fit.

    Deterministic for the same ingest; the corpus is not read.
    """
    read, generator = context.manifest("ingest"), np.random.default_rng(0)
    corpus = Rows([context.path(part, "table") for part in documents(read)])
    most = min(most, len(corpus))
    others = iter(generator.choice(len(corpus), most, replace=False).tolist())
    anchors = _some_anchors(context, most // _EACH, generator)
    own, offsets = ragged(anchors["positives"])
    grades, _ = ragged(anchors["grades"])
    rows: dict[int, None] = {}
    kept: list[int] = []
    complete: list[int] = []
    for at, (low, high) in enumerate(zip(offsets, np.minimum(offsets[1:], offsets[:-1] + _POSITIVES), strict=False)):
        asked = rows | dict.fromkeys(own[low:high].tolist())
        if len(asked) > most:
            break
        rows = asked
        kept += range(low, high)
        complete.append(len(rows))
        while len(rows) < min(most, _EACH * (at + 1)) and (row := next(others, None)) is not None:
            rows[row] = None
    for row in others:
        if len(rows) == most:
            break
        rows[row] = None
    anchors = anchors.slice(0, len(complete))
    counts = np.minimum(np.diff(offsets), _POSITIVES)[: len(complete)]
    chosen = np.fromiter(rows, np.int64, len(rows))
    return Sample(
        chosen,
        corpus.strings("text", chosen).to_pylist(),
        anchors,
        own[kept].astype(np.int64),
        grades[kept].astype(np.float32),
        np.concatenate([[0], np.cumsum(counts)]),
        np.array(complete, np.int64),
    )


def _some_anchors(context: Context, count: int, generator: np.random.Generator) -> pa.Table:
    parts = context.manifest("ingest").of_kind("anchors")
    ends = np.cumsum([part.rows for part in parts])
    wanted = generator.choice(ends[-1], min(count, int(ends[-1])), replace=False)

    def taken() -> Iterator[pa.Table]:
        for part, end in zip(parts, ends, strict=True):
            here = np.sort(wanted[(wanted < end) & (wanted >= end - part.rows)]) - (end - part.rows)
            yield open_table(context.path(part, "table")).take(pa.array(here))

    table = pa.concat_tables(taken()).combine_chunks()
    return table.take(pa.array(generator.permutation(table.num_rows)))  # the first ones come from all parts


class Judge:
    """Runs the config's mining on a sample, with the code that mines."""

    def __init__(self, context: Context, sample: Sample) -> None:
        read = context.manifest("ingest")
        self._context, self._sample = context, sample
        self._searchable = sum(part.rows for part in searchable(read, context.config))
        self._selector = Selector(
            context.config,
            Rows([context.path(part, "table") for part in documents(read)]),
            Namesakes([context.path(part, "table") for part in read.of_kind("namesakes")]),
            searchable=self._searchable,
        )

    def outcome(self, vectors: Floats, anchors: Floats) -> Outcome:
        """Outcome of (n, d) vectors of the first documents and (m, d) of the first anchors, with their positives."""
        sample, config = self._sample, self._context.config
        order = np.argsort(sample.rows[: len(vectors)])  # ties by row
        rows, offsets = sample.rows[order], sample.offsets[: len(anchors) + 1]
        positives = sample.positives[: offsets[-1]]
        owner = np.repeat(np.arange(len(anchors)), np.diff(offsets))
        found = ann.search_exact(
            anchors.astype(config.encoder.storage).astype(np.float32),
            Held(vectors[order].astype(config.encoder.storage).astype(np.float32)),
            min(config.depth, len(rows)),
            positives=(owner, np.searchsorted(rows, positives)),
            candidates=int(np.searchsorted(rows, self._searchable)),
            budget=self._context.budget,
        )
        table = sample.anchors.slice(0, len(anchors))
        candidates = Candidates(
            np.where(found.rows < 0, -1, rows[found.rows]),
            found.scores,
            positives,
            offsets,
            found.positive_scores,
            np.arange(len(anchors)),
        )
        ranked = candidates.without(own_documents(self._selector.filters.lookup, table, candidates.rows))
        grades = sample.grades[: offsets[-1]]
        ndcg = quality.of_each([_METRIC], ranked.rows, positives, offsets, grades)[_METRIC]
        return Outcome(self._mined(table, candidates), float(ndcg.mean()))

    def _mined(self, table: pa.Table, candidates: Candidates) -> frozenset[tuple[int, int]] | None:
        if self._context.config.mining.score != DENSE:
            return None
        chosen = self._selector.choose(table, candidates)
        unit, column = np.nonzero(chosen.fates == Fate.TAKEN)
        return frozenset(zip(unit.tolist(), chosen.rows[chosen.anchor[unit], column].tolist(), strict=True))
