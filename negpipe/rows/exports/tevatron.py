"""Tevatron's training JSONL: query_id, query, positive_passages and negative_passages of docid, title, text.

One line a unit. Each passage carries its score, which Tevatron's distillation reads. Titles are part of the
text, as `data.text` says, so `title` is empty. On request `run.tsv` holds the ranking that search stored,
before any exclusion: query id, document id and score, best first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from negpipe.data.tables import Rows
from negpipe.errors import InputError
from negpipe.rows.exports.blocks import Documents, Slices, blocks
from negpipe.rows.exports.files import JsonFiles
from negpipe.rows.exports.job import Job, Layout

_ANCHORS = 64  # at a time, to the run file


def _write(job: Job) -> int:
    slices = _with_run(job) if job.run else job.slices
    with JsonFiles(job.folder, "train", shard_rows=job.shard_rows, compress=job.compress) as files:
        for block in blocks(slices, job.corpus):
            rows = zip(block.ids, block.texts, _passages(block.positives), _passages(block.negatives), strict=True)
            files.write(
                [
                    {"query_id": name, "query": text, "positive_passages": positives, "negative_passages": negatives}
                    for name, text, positives, negatives in rows
                ]
            )
        return files.rows


def _passages(documents: Documents) -> list[list[dict[str, Any]]]:
    lists = zip(documents.id_lists, documents.text_lists, documents.score_lists, strict=True)
    return [
        [{"docid": name, "title": "", "text": text, "score": score} for name, text, score in zip(*own, strict=True)]
        for own in lists
    ]


def _with_run(job: Job) -> Slices:
    """The slices; whoever walks them writes the run file on the way."""
    with (job.folder / "run.tsv").open("w", encoding="utf-8", newline="") as file:
        for found, units in job.slices:
            names = units.anchors["id"].to_pylist()
            for start in range(0, len(names), _ANCHORS):
                here = slice(start, start + _ANCHORS)
                file.writelines(_ranking(names[here], found.rows[here], found.scores[here], job.corpus))
            yield found, units


def _ranking(anchors: list[str], rows: np.ndarray, scores: np.ndarray, corpus: Rows) -> list[str]:
    anchor, rank = np.nonzero(rows >= 0)
    documents = corpus.strings("id", rows[anchor, rank]).to_pylist()
    lines = zip(anchor.tolist(), documents, scores[anchor, rank].tolist(), strict=True)
    return [f"{_field(anchors[at])}\t{_field(document)}\t{score}\n" for at, document, score in lines]


def _field(name: str) -> str:
    if any(mark in name for mark in "\t\n\r"):
        raise InputError(f"the id {name!r} has a tab or a line break, a run file cannot hold it", remedy="Omit --run")
    return name


LAYOUT = Layout(_write, json=True, suffix=".jsonl", runs=True)
