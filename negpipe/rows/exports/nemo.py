"""NeMo Automodel's retrieval data: train.json, which refers by id to the corpus next to it.

train.json is {corpus, mining: {args}, data}, with one record per unit: question_id, question, corpus_id, pos_doc
and neg_doc with id and score. Its loader resolves the corpus path relative to the folder of train.json, reads
corpus/merlin_metadata.json, and the documents from corpus/train.parquet (id, text). With shards, every
file is complete, and all share the corpus.
"""

from __future__ import annotations

import json
from typing import Any

from negpipe.rows.exports.blocks import Documents, blocks
from negpipe.rows.exports.files import as_json
from negpipe.rows.exports.job import ExportJob, ExportLayout, described
from negpipe.rows.exports.referenced import Referenced

CORPUS_ID = "corpus"


def _write(job: ExportJob) -> int:
    top = {"corpus": [{"path": "./corpus/"}], "mining": {"args": described(job.config)}}
    head = json.dumps(top, ensure_ascii=False, allow_nan=False).removesuffix("}") + ', "data": [\n'
    referenced = Referenced(job.corpus)
    with job.lines(suffix=".json", head=head, joint=",\n", tail="\n]}\n") as files:
        for block in blocks(job.slices, job.corpus):
            referenced.add(block)
            rows = zip(block.ids, block.texts, _documents(block.positives), _documents(block.negatives), strict=True)
            files.write(
                as_json(
                    {"question_id": name, "question": text, "corpus_id": CORPUS_ID, "pos_doc": pos, "neg_doc": neg}
                    for name, text, pos, neg in rows
                )
            )
    referenced.write(job.folder / "corpus", "train", "id", None)
    about = {"class": "TextQADataset", "corpus_id": CORPUS_ID}
    (job.folder / "corpus" / "merlin_metadata.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    return files.rows


def _documents(documents: Documents) -> list[list[dict[str, Any]]]:
    lists = zip(documents.id_lists, documents.score_lists, strict=True)
    return [[{"id": name, "score": score} for name, score in zip(*own, strict=True)] for own in lists]


LAYOUT = ExportLayout(_write, text=True, reads_gzip=False)
