"""The ranking stored by search, before any exclusion, for programs that read runs.

trec-run: TREC's `qid Q0 docid rank score tag` for every anchor, best first, ranks from 1. Evaluators order by score.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

import numpy as np

from negpipe.data.candidates import Candidates
from negpipe.data.tables import Rows
from negpipe.errors import InputError
from negpipe.rows.exports.job import ExportJob, ExportLayout
from negpipe.select.selector import Units

_ANCHORS = 64  # at a time
_TAG = "negpipe"


def ranking(found: Candidates, units: Units, corpus: Rows, barred: str) -> Iterator[tuple[str, str, int, float]]:
    """Anchor id, document id, rank from 0 and score of every candidate of a slice.

    Args:
        barred: characters not allowed in ids, since they end a field.

    Raises:
        InputError: an id contains one of them.
    """
    names = units.anchors["id"].to_pylist()
    for start in range(0, len(names), _ANCHORS):
        here = slice(start, start + _ANCHORS)
        rows, scores = found.rows[here], found.scores[here]
        anchor, rank = np.nonzero(rows >= 0)
        documents = corpus.strings("id", rows[anchor, rank]).to_pylist()
        fields = zip(anchor.tolist(), documents, rank.tolist(), scores[anchor, rank].tolist(), strict=True)
        for at, document, place, score in fields:
            yield _field(names[start + at], barred), _field(document, barred), place, score


def _field(name: str, barred: str) -> str:
    if any(mark in name for mark in barred):
        raise InputError(
            f"the id {name!r} has a space, a tab or a line break, which ends a field of a run file",
            remedy="Rename it in the source, or export without the ranking, which other layouts do not need",
        )
    return name


def _write(job: ExportJob) -> int:
    with job.lines("run", LAYOUT.suffix or "") as files:
        for found, units in job.slices:
            files.write(
                f"{anchor} Q0 {document} {rank + 1} {score} {_TAG}"
                for anchor, document, rank, score in ranking(found, units, job.corpus, string.whitespace)
            )
        return files.rows


LAYOUT = ExportLayout(
    _write,
    text=True,
    suffix=".trec",
    reads_gzip=False,
    has_rows=lambda units, config: np.ones(len(units.anchor), np.bool_),
)
