"""rescore: the candidates of search with an additional score, `teacher`, from a function of the caller.

Only for Python callers with a cross-encoder in their process; a command uses what such a caller stored. The first
`mining.depth` candidates of each anchor are scored and ranked by it, and their positives scored; `mining.score:
teacher` selects by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa

from negpipe.data import candidates
from negpipe.data.arrays import Floats, Ints
from negpipe.data.candidates import Candidates, Scored
from negpipe.data.tables import Rows, documents, open_table
from negpipe.engine.fingerprint import key
from negpipe.engine.manifest import Manifest
from negpipe.engine.stage import Context, Made, Progress, Publisher, Stage, Task, counted
from negpipe.errors import ConfigError
from negpipe.stages import headers

NAME, VERSION = "rescore", 2
_MODEL = "rescore.model"
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
            name = key(NAME, VERSION, identity, depth, texts.identity(), part.identity())
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
            lambda file: candidates.write(
                file,
                texts["id"],
                every,
                {candidates.TEACHER: teacher},
                approximate=candidates.approximate(path),
            ),
        )
        return Made(len(every.rows), {"depth": every.rows.shape[1]})

    return Stage(
        name=NAME,
        version=VERSION,
        inputs=("ingest", "search"),
        settings=lambda config: {_MODEL: identity, "mining.depth": config.mining.depth},
        plan=plan,
        open=opened,
        run=run,
        provides="search",
        misfit=headers.misfit,
        place=lambda _: "caller",
        unit="anchors",
        counts=partial(counted, rows="anchors"),
    )


def recorded(manifest: Manifest) -> Stage:
    """The stage of an earlier program, for readers of what it stored: scoring anything else is an error."""
    model = manifest.settings[_MODEL]

    def refuse(pairs: Sequence[tuple[str, str]]) -> Floats:
        raise ConfigError(
            f"mining.score: {candidates.TEACHER} scores come from a function in Python ({model}), and {len(pairs)}"
            " pairs have none: run the program that passes it again, or set mining.score: dense"
        )

    return rescore(refuse, model)


def _judged(score: Score, asked: Sequence[str], found: Candidates, corpus: Rows, progress: Progress) -> Scored:
    scores, ranks = np.full(found.scores.shape, np.nan, np.float32), np.full(found.rows.shape, -1, np.int32)
    for at, anchor in enumerate(asked):
        real = np.flatnonzero(found.rows[at] >= 0)
        scores[at, real] = _scores(score, [anchor] * len(real), found.rows[at, real], corpus)
        ranks[at, real[np.lexsort((found.rows[at, real], -scores[at, real]))]] = np.arange(len(real))
        progress(1, "")
    repeated = [anchor for anchor, count in zip(asked, np.diff(found.offsets), strict=True) for _ in range(count)]
    return Scored(ranks, scores, _scores(score, repeated, found.positives, corpus))


def _scores(score: Score, anchors: Sequence[str], rows: Ints, corpus: Rows) -> Floats:
    pairs = list(zip(anchors, corpus.strings("text", rows).to_pylist(), strict=True))
    return np.asarray(score(pairs), np.float32) if pairs else np.empty(0, np.float32)
