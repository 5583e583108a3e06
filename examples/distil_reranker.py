"""Distil a reranker into a retriever: the reranker scores mined rows, the retriever learns the score differences.

A retriever's hard negatives show where it is wrong, and a reranker can tell by how much. It also detects positives
that nobody labelled: rows whose negative it prefers are left out.

python examples/distil_reranker.py quickstart.yaml cross-encoder/ms-marco-MiniLM-L6-v2 \
    sentence-transformers/all-MiniLM-L6-v2 models/distilled
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MarginMSELoss

import negpipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config or a run directory")
    parser.add_argument("reranker", help="the teacher, a cross-encoder")
    parser.add_argument("model", help="the model to train")
    parser.add_argument("out", help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=-1, help="maximum number of steps (default: one epoch)")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()

    run = negpipe.Run(options.config)
    run.mine()
    # No margin, because the teacher decides: the negatives that the retriever scores highest teach it most.
    rows = run.select(relative_margin=None).rows.select(["anchor", "positive", "negative"]).to_pylist()

    teacher = CrossEncoder(options.reranker)
    positive = teacher.predict([(row["anchor"], row["positive"]) for row in rows])
    negative = teacher.predict([(row["anchor"], row["negative"]) for row in rows])
    margins = positive - negative
    taught = [{**row, "label": float(margin)} for row, margin in zip(rows, margins, strict=True) if margin > 0]
    print(f"{len(taught):,} of {len(rows):,} rows have a positive that the teacher prefers")

    model = SentenceTransformer(options.model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        save_strategy="no",
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(model, arguments, Dataset.from_list(taught), loss=MarginMSELoss(model))
    trainer.train()
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
