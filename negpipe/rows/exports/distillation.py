"""Distillation data in LightOn's layout: queries, documents, and lists of scored document ids.

queries (query_id, text) and documents (document_id, text) are the texts; `train` in scores/ has one row per
(anchor, positive) pair: query_id, document_ids with the positive first, and matching scores. README.md lists
the three as configs, so that calls like `load_dataset(PATH, "train")` open them.

distillation: every pair with a negative. pylate: pairs with all negatives, since PyLate stacks the scores of a batch,
as does sentence-transformers' `resolve_ids` unless it keeps lists.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from negpipe.rows.exports.blocks import Block, blocks, has_all_negatives
from negpipe.rows.exports.files import ParquetFiles
from negpipe.rows.exports.front import write_configs
from negpipe.rows.exports.job import ExportJob, ExportLayout
from negpipe.rows.exports.referenced import Referenced

_QUERIES = pa.schema({"query_id": pa.string(), "text": pa.string()})
_SCORES = pa.schema({"query_id": pa.string(), "document_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32())})
_CONFIGS = {"train": "scores/*.parquet", "queries": "queries/*.parquet", "documents": "documents/*.parquet"}


def _write(job: ExportJob, fewest: int = 1) -> int:
    referenced = Referenced(job.corpus)
    last = None
    with (
        ParquetFiles(job.folder / "queries", "train", _QUERIES, shard_rows=job.shard_rows) as queries,
        ParquetFiles(job.folder / "scores", "train", _SCORES, shard_rows=job.shard_rows) as scores,
    ):
        for block in blocks(job.slices, job.corpus, fewest):
            referenced.add(block)
            # With `margin_reference: each`, an anchor has several consecutive units.
            fresh = [name != before for before, name in pairwise([last, *block.ids])]
            last = block.ids[-1]
            queries.write(block.anchors.filter(pa.array(fresh)).rename_columns(["query_id", "text"]).cast(_QUERIES))
            scores.write(_scores(block))
    referenced.write(job.folder / "documents", "train", "document_id", job.shard_rows)
    write_configs(job.folder, _CONFIGS)
    return scores.rows


def _scores(block: Block) -> pa.Table:
    unit, positive = block.pairs()
    names, pos_ids, neg_ids = block.ids, block.positives.ids.to_pylist(), block.negatives.id_lists
    pos_scores, neg_scores = block.positives.scores, np.split(block.negatives.scores, block.negatives.offsets[1:-1])
    pairs = list(zip(unit.tolist(), positive.tolist(), strict=True))
    return pa.table(
        {
            "query_id": [names[at] for at, _ in pairs],
            "document_ids": [[pos_ids[own], *neg_ids[at]] for at, own in pairs],
            "scores": [np.concatenate([pos_scores[own : own + 1], neg_scores[at]]) for at, own in pairs],
        },
        schema=_SCORES,
    )


LAYOUT = ExportLayout(_write)
PYLATE = ExportLayout(lambda job: _write(job, job.config.mining.wanted), has_rows=has_all_negatives)
