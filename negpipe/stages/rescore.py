"""rescore: candidates with scores from a function of the caller, in the place of search's.

Only for callers from Python, who have a cross-encoder in their process; a run of the command line never
has this stage. The first `mining.depth` candidates of each anchor get new scores and are put in their
order, and so do the positives; ranks then count in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from negpipe.data import candidates
from negpipe.data.candidates import Candidates
from negpipe.data.tables import Rows, documents, open_table
from negpipe.engine.fingerprint import key
from negpipe.engine.stage import Context, Made, Progress, Publisher, Stage, Task
from negpipe.stages import headers

VERSION = 1
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Score = Callable[[Sequence[tuple[str, str]]], Floats]
"""Scores of (anchor, document) texts, one a pair."""


def rescore(score: Score, identity: str) -> Stage:
    """The stage for one function.

    Args:
        score: called with the candidates of one anchor, and with the positives of one slice.
        identity: changes whenever the scores may.
    """

    def plan(context: Context) -> Iterator[Task]:
        anchors, found = context.manifest("ingest").of_kind("anchors"), context.manifest("search").of_kind("candidates")
        depth = context.config.mining.depth
        for texts, part in zip(anchors, found, strict=True):
            name = key("rescore", VERSION, identity, depth, texts.identity(), part.identity())
            payload = {"texts": texts.path, "candidates": part.path, "depth": depth}
            yield Task(name, "candidates", part.rows, payload)

    @contextmanager
    def opened(context: Context) -> Iterator[Rows]:
        yield Rows([context.file(part) for part in documents(context.manifest("ingest"))])

    def run(task: Task, corpus: Rows, context: Context, publish: Publisher, progress: Progress) -> Made:
        texts = open_table(context.run_dir / task.payload["texts"])["text"]
        pieces, start = [], 0
        # Those of an earlier, deeper search would change which are looked at.
        for found in candidates.read(context.run_dir / task.payload["candidates"], depth=context.config.depth):
            asked: list[str] = texts.slice(start, len(found.rows)).to_pylist()
            looked_at = found.narrowed(task.payload["depth"] or found.rows.shape[1])
            pieces.append(_rescored(score, asked, looked_at, corpus, progress))
            start += len(found.rows)
        publish(".parquet", lambda file: candidates.write(file, candidates.joined(pieces)))
        return Made(start, {"depth": pieces[0].rows.shape[1]})

    return Stage(
        name="rescore",
        version=VERSION,
        inputs=("ingest", "search"),
        settings=lambda config: {"rescore.model": identity, "mining.depth": config.mining.depth},
        plan=plan,
        open=opened,
        run=run,
        provides="search",
        misfit=headers.misfit,
        here=True,
    )


def _rescored(score: Score, asked: Sequence[str], found: Candidates, corpus: Rows, progress: Progress) -> Candidates:
    rows, scores = found.rows.copy(), np.full(found.scores.shape, -np.inf, np.float32)
    for at, query in enumerate(asked):
        real = np.flatnonzero(rows[at] >= 0)
        new = _scores(score, [query] * len(real), rows[at, real], corpus)
        order = np.lexsort((rows[at, real], -new))
        rows[at, real], scores[at, real] = rows[at, real][order], new[order]
        progress(1, "")
    queries = [query for query, count in zip(asked, np.diff(found.offsets), strict=True) for _ in range(count)]
    positive_scores = _scores(score, queries, found.positives, corpus)
    return Candidates(rows, scores, found.positives, found.offsets, positive_scores)


def _scores(score: Score, queries: Sequence[str], rows: Ints, corpus: Rows) -> Floats:
    pairs = list(zip(queries, corpus.strings("text", rows).to_pylist(), strict=True))
    return np.asarray(score(pairs), np.float32) if pairs else np.empty(0, np.float32)
