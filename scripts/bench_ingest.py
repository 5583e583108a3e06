"""How long ingest takes for plain documents and for repeated ids and texts, and how much memory it uses.

    python scripts/bench_ingest.py
    python scripts/bench_ingest.py --rows 1000000 --budget 256MiB

`documents`: a BEIR folder with documents of 300 characters, a tenth of them not ASCII, and a thousand queries. The
other shapes are pair rows of anchor and positive, whose time should grow with the number of rows, whatever they
contain. `hub`: half of them have the same positive text; `label`: all have one anchor text under different ids;
`class`: half have the same anchor. For each number of rows: wall-clock seconds, rows per second, and the process's
peak anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from bench_memory import run

SHAPES = ("documents", "hub", "label", "class")


def write(folder: Path, shape: str, rows: int, budget: str) -> Path:
    """A source, and a config that reads it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "qrels").mkdir(parents=True)
    data = _documents(folder, rows) if shape == "documents" else _pairs(folder, shape, rows)
    settings = {
        "run_dir": str(folder / "run"),
        "data": data,
        "encoder": {"backend": "precomputed", "corpus_vectors": "none.npy", "anchor_vectors": "none.npy"},
        "executor": {"kind": "inline"},
        "resources": {"memory_budget": budget},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def _documents(folder: Path, rows: int) -> dict[str, Any]:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(5000)]
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            text = " ".join(draw.choices(words, k=44))[:290].capitalize() + "."
            text = text.replace("a", "ä") if i % 10 == 0 else text
            file.write(json.dumps({"_id": f"d{i}", "title": f"Title {i}", "text": text}, ensure_ascii=False) + "\n")
    queries = [{"_id": f"q{i}", "text": f"query number {i}"} for i in range(min(rows, 1000))]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(queries)))
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return {"format": "beir", "path": str(folder)}


def _pairs(folder: Path, shape: str, rows: int) -> dict[str, Any]:
    half = [i % 2 == 0 for i in range(rows)]
    anchors = [f"what is asked in row {i} of this file?" for i in range(rows)]
    positives = [f"the answer to question {i}, as long as a sentence" for i in range(rows)]
    if shape == "hub":
        positives = ["Yes." if repeated else text for repeated, text in zip(half, positives, strict=True)]
    if shape == "label":
        anchors = ["sports"] * rows
    if shape == "class":
        anchors = ["sports" if repeated else text for repeated, text in zip(half, anchors, strict=True)]
    names = [f"a{i}" if shape == "label" else f"a-{text}" for i, text in enumerate(anchors)]
    pq.write_table(pa.table({"anchor": anchors, "positive": positives, "aid": names}), folder / "pairs.parquet")
    return {"format": "pairs", "path": str(folder / "pairs.parquet"), "columns": {"anchor_id": "aid"}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000", help="separated by , (%(default)s)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="separated by , (%(default)s)")
    parser.add_argument("--budget", default="2GiB", help="resources.memory_budget (%(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-ingest"))
    options = parser.parse_args()
    print(f"memory_budget {options.budget}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'shape':8}{'rows':>12}{'seconds':>10}{'rows/s':>10}{'MiB':>8}")
    for shape in options.shapes.split(","):
        for rows in map(int, options.rows.split(",")):
            config = write(options.work_dir, shape, rows, options.budget)
            peak, seconds = run([sys.executable, "-m", "negpipe", "ingest", str(config)])
            print(f"{shape:8}{rows:12,}{seconds:10.1f}{rows / seconds:10,.0f}{peak:8,.0f}", flush=True)


if __name__ == "__main__":
    main()
