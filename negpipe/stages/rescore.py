"""rescore: the candidates of search with an additional score, `teacher`, from a function of the caller.

Only for Python callers with a cross-encoder in their process; a run from the command line never
has this stage. The first `mining.depth` candidates of each anchor are scored and ranked by it, and their positives
scored; `mining.score: teacher` selects by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.data import candidates
from negpipe.data.candidates import Candidates, Scored
from negpipe.data.tables import Rows, documents, open_table
from negpipe.engine.fingerprint import key
from negpipe.engine.stage import Context, Made, Progress, Publisher, Stage, Task
from negpipe.stages import headers

VERSION = 2
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Score = Callable[[Sequence[tuple[str, str]]], Floats]
"""Scores of (anchor, document) texts, one per pair."""


def rescore(score: Score, identity: str) -> Stage:
    """The stage for a score function.

    Args:
        score: called with the candidates of one anchor, and with the positives of a slice.
        identity: changes whenever the scores may.
    """

    def plan(context: Context) -> Iterator[Task]:
        anchors, found = context.manifest("ingest").of_kind("anchors"), context.manifest("search").of_kind("candidates")
        depth = context.config.mining.depth
        for texts, part in zip(anchors, found, strict=True):
            name = key("rescore", VERSION, identity, depth, texts.identity(), part.identity())
            payload = {"texts": texts.file("table").path, "candidates": part.file("candidates").path, "depth": depth}
            yield Task(name, "candidates", part.rows, payload)

    @contextmanager
    def opened(context: Context) -> Iterator[Rows]:
        yield Rows([context.path(part, "table") for part in documents(context.manifest("ingest"))])

    def run(task: Task, corpus: Rows, context: Context, publish: Publisher, progress: Progress) -> Made:
        texts = open_table(context.store.path(task.payload["texts"]))
        pieces, judged = [], []
        # Candidates of an earlier, deeper search would change which ones are scored.
        path = context.store.path(task.payload["candidates"])
        for found in candidates.read(path, texts["id"], depth=context.config.depth):
            asked: list[str] = texts["text"].take(pa.array(found.anchors)).to_pylist()
            pieces.append(found.narrowed(task.payload["depth"] or found.rows.shape[1]))
            judged.append(_judged(score, asked, pieces[-1], corpus, progress))
        every = candidates.joined(pieces)
        teacher = Scored(
            np.concatenate([one.ranks for one in judged]),
            np.concatenate([one.scores for one in judged]),
            np.concatenate([one.positive_scores for one in judged]),
        )
        publish(
            "candidates",
            ".parquet",
            lambda file: candidates.write(file, texts["id"], every, {candidates.TEACHER: teacher}),
        )
        return Made(len(every.rows), {"depth": every.rows.shape[1]})

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
        place=lambda _: "caller",
    )


def _judged(score: Score, asked: Sequence[str], found: Candidates, corpus: Rows, progress: Progress) -> Scored:
    scores, ranks = np.full(found.scores.shape, np.nan, np.float32), np.full(found.rows.shape, -1, np.int32)
    for at, query in enumerate(asked):
        real = np.flatnonzero(found.rows[at] >= 0)
        scores[at, real] = _scores(score, [query] * len(real), found.rows[at, real], corpus)
        ranks[at, real[np.lexsort((found.rows[at, real], -scores[at, real]))]] = np.arange(len(real))
        progress(1, "")
    queries = [query for query, count in zip(asked, np.diff(found.offsets), strict=True) for _ in range(count)]
    return Scored(ranks, scores, _scores(score, queries, found.positives, corpus))


def _scores(score: Score, queries: Sequence[str], rows: Ints, corpus: Rows) -> Floats:
    pairs = list(zip(queries, corpus.strings("text", rows).to_pylist(), strict=True))
    return np.asarray(score(pairs), np.float32) if pairs else np.empty(0, np.float32)
