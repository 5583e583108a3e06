"""Export mined rows for FlagEmbedding, and start its trainer.

python examples/train_flagembedding.py quickstart.yaml BAAI/bge-small-en-v1.5 models/quickstart

On several GPUs, replace `sys.executable, "-m"` in `command` below with `"torchrun", "--nproc_per_node", "4", "-m"`, and
add "negatives_cross_device": True to the settings.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import negpipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config or a run directory")
    parser.add_argument("model", help="the model to train")
    parser.add_argument("out", type=Path, help="where the trained model goes; the rows are written next to it")
    parser.add_argument("--steps", type=int, default=-1, help="maximum number of steps (default: one epoch)")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()

    run = negpipe.Run(options.config)
    run.mine()
    rows = options.out.with_name(f"{options.out.name}.jsonl")
    run.export("flagembedding", rows, force=True)
    passages = 1 + run.config.mining.num_negatives  # one positive and all its negatives

    settings = {
        "model_name_or_path": options.model,
        "train_data": rows,
        "output_dir": options.out,
        "train_group_size": passages,
        "query_max_len": run.config.encoder.query_max_length,
        "passage_max_len": run.config.encoder.passage_max_length,
        "sentence_pooling_method": run.config.encoder.pooling or "cls",
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "FlagEmbedding.finetune.embedder.encoder_only.base", *words]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
