"""ms-swift's JSONL: messages, positive_messages and negative_messages.

One line per (anchor, positive) pair, since its embedding task requires exactly one positive and its reranker task
draws one. Its embedding template encodes every text separately, with the role user; its reranker template appends the
document to the query's messages, with the role assistant. It ignores the additional columns of ids and scores.
"""

from __future__ import annotations

from functools import partial

from negpipe.rows.exports.blocks import blocks
from negpipe.rows.exports.files import as_json
from negpipe.rows.exports.job import ExportJob, ExportLayout


def _write(job: ExportJob, role: str) -> int:
    with job.lines() as files:
        for block in blocks(job.slices, job.corpus):
            pos, neg = block.positives, block.negatives
            files.write(
                as_json(
                    {
                        "messages": [_message(text, "user")],
                        "positive_messages": [[_message(positive, role)]],
                        "negative_messages": [[_message(negative, role)] for negative in negatives],
                        "query_id": query_id,
                        "positive_ids": [positive_id],
                        "negative_ids": negative_ids,
                        "positive_scores": [positive_score],
                        "negative_scores": negative_scores,
                    }
                    for query_id, text, positives, negative_ids, negatives, negative_scores in zip(
                        block.ids,
                        block.texts,
                        zip(pos.id_lists, pos.text_lists, pos.score_lists, strict=True),
                        neg.id_lists,
                        neg.text_lists,
                        neg.score_lists,
                        strict=True,
                    )
                    for positive_id, positive, positive_score in zip(*positives, strict=True)
                )
            )
        return files.rows


def _message(text: str, role: str) -> dict[str, str]:
    return {"role": role, "content": text}


EMBEDDING = ExportLayout(partial(_write, role="user"), text=True, suffix=".jsonl")
RERANKER = ExportLayout(partial(_write, role="assistant"), text=True, suffix=".jsonl")
