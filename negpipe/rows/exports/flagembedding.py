"""FlagEmbedding's fine-tuning JSONL: query, pos, neg, and scores for distillation.

One line per unit. Its dataset class reads any file ending in .json or .jsonl and ignores further columns,
so ids are included; `pos` is always a list, `neg` is never empty.
"""

from __future__ import annotations

from negpipe.rows.exports.blocks import blocks
from negpipe.rows.exports.files import as_json
from negpipe.rows.exports.job import ExportJob, ExportLayout


def _write(job: ExportJob) -> int:
    with job.lines() as files:
        for block in blocks(job.slices, job.corpus):
            pos, neg = block.positives, block.negatives
            columns = {
                "query": block.texts,
                "pos": pos.text_lists,
                "neg": neg.text_lists,
                "pos_scores": pos.score_lists,
                "neg_scores": neg.score_lists,
                "query_id": block.ids,
                "pos_ids": pos.id_lists,
                "neg_ids": neg.id_lists,
            }
            files.write(as_json(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)))
        return files.rows


LAYOUT = ExportLayout(_write, text=True, suffix=".jsonl", reads_gzip=False)
