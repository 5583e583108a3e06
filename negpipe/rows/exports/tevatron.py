"""Tevatron's training JSONL, one line per unit.

tevatron: version 3. train.jsonl has query_id, query_text, positive_document_ids and negative_document_ids, corpus.jsonl
their documents (docid, text). README.md lists both as configs, `train` and `corpus`. Scores are in columns that its
loader ignores.
tevatron-passages: the older layout, which version 3 still reads: query_id, query, positive_passages and
negative_passages with docid, title, text. Each passage has its score, which Tevatron's distillation reads.

Titles are part of the text, according to `data.text`, so `title` is empty. Optionally, `run.tsv` contains the ranking
stored by search, before any exclusion: query id, document id and score, best first.
"""

from __future__ import annotations

from typing import Any

from negpipe.rows.exports.blocks import Documents, Slices, blocks
from negpipe.rows.exports.files import TextFiles, as_json
from negpipe.rows.exports.front import write_configs
from negpipe.rows.exports.job import ExportJob, ExportLayout
from negpipe.rows.exports.ranking import ranking
from negpipe.rows.exports.referenced import Referenced


def _write(job: ExportJob) -> int:
    referenced = Referenced(job.corpus)
    with job.lines() as files:
        for block in blocks(_slices(job), job.corpus):
            referenced.add(block)
            pos, neg = block.positives, block.negatives
            columns = {
                "query_id": block.ids,
                "query_text": block.texts,
                "positive_document_ids": pos.id_lists,
                "negative_document_ids": neg.id_lists,
                "positive_scores": pos.score_lists,
                "negative_scores": neg.score_lists,
            }
            files.write(as_json(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)))
    # Also as JSON: `datasets` reads all configs of a folder with one reader.
    with job.lines("corpus") as corpus:
        for table in referenced.tables("docid"):
            corpus.write(as_json(table.to_pylist()))
    write_configs(job.folder, {"train": "train*.jsonl*", "corpus": "corpus*.jsonl*"})
    return files.rows


def _write_passages(job: ExportJob) -> int:
    with job.lines() as files:
        for block in blocks(_slices(job), job.corpus):
            rows = zip(block.ids, block.texts, _passages(block.positives), _passages(block.negatives), strict=True)
            files.write(
                as_json(
                    {"query_id": name, "query": text, "positive_passages": positives, "negative_passages": negatives}
                    for name, text, positives, negatives in rows
                )
            )
        return files.rows


def _passages(documents: Documents) -> list[list[dict[str, Any]]]:
    lists = zip(documents.id_lists, documents.text_lists, documents.score_lists, strict=True)
    return [
        [{"docid": name, "title": "", "text": text, "score": score} for name, text, score in zip(*own, strict=True)]
        for own in lists
    ]


def _slices(job: ExportJob) -> Slices:
    """The slices; if the ranking is requested, iterating them also writes the run file."""
    if not job.run:
        yield from job.slices
        return
    with TextFiles(job.folder, "run", suffix=".tsv", shard_rows=None, compress=False) as files:
        for found, units in job.slices:
            files.write(
                f"{anchor}\t{document}\t{score}"
                for anchor, document, _, score in ranking(found, units, job.corpus, "\t\n\r")
            )
            yield found, units


LAYOUT = ExportLayout(_write, text=True, runs=True)
PASSAGES = ExportLayout(_write_passages, text=True, suffix=".jsonl", runs=True)
