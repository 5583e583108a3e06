"""`negpipe audit` on a generated file: rows per second and the peak memory of the process.

    python scripts/bench_audit.py [ROWS] [FOLDER]

Writes ROWS (1,000,000) triplets with ids, texts of about 500 characters and scores, 10 negatives per anchor from a
corpus a third as large as the number of rows, and a known number of faults. Keeps the file in FOLDER, if given.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EACH = 10
WORDS = 80
FAULTS = 100


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary)
        path = folder / f"audit-{rows}.parquet"
        if not path.exists():
            generate(path, rows)
        started = time.monotonic()
        command = [sys.executable, "-m", "negpipe", "audit", "--file", str(path), "--format", "json"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        seconds = time.monotonic() - started
        counts = {name: check["count"] for name, check in found["checks"].items()}
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
        print(f"\n{rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB: {seconds:.1f} s, {rows / seconds:,.0f} rows/s")
        print(f"peak memory {peak:.0f} MiB; load before the end {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"faults written: {FAULTS} each of positive_id, near_duplicate, non_finite; found: {counts}")


def generate(path: Path, rows: int) -> None:
    """Write the file, a row group of 100,000 rows at a time."""
    draw = np.random.default_rng(0)
    words = np.array(["".join(draw.choice(list("abcdefghiklmnoprstu"), size)) for size in draw.integers(3, 10, 20000)])
    documents = [" ".join(text) for text in words[draw.integers(len(words), size=(max(100, rows // 3), WORDS))]]
    step = 100_000
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, rows, step):
            number = np.arange(start, min(start + step, rows))
            anchor = number // EACH
            positive = anchor % len(documents)
            negative = (positive + 1 + draw.integers(len(documents) - 1, size=len(number))) % len(documents)
            score = draw.uniform(0.2, 0.5, len(number)).astype(np.float32)
            texts = [documents[row] for row in negative]
            if not start:
                negative[:FAULTS] = positive[:FAULTS]
                for row in range(FAULTS, 2 * FAULTS):
                    texts[row], negative[row] = documents[positive[row]][:-3] + " so", len(documents) + row
                for row in range(FAULTS):
                    texts[row] = documents[positive[row]]
                score[2 * FAULTS : 3 * FAULTS] = np.nan
            writer.write_table(
                pa.table(
                    {
                        "anchor_id": [f"q{row}" for row in anchor],
                        "positive_id": [f"d{row}" for row in positive],
                        "negative_id": [f"d{row}" for row in negative],
                        "anchor": [f"what is known of number {row}" for row in anchor],
                        "positive": [documents[row] for row in positive],
                        "negative": texts,
                        "positive_score": np.full(len(number), 0.8, np.float32),
                        "negative_score": score,
                    },
                    schema=SCHEMA,
                )
            )


SCHEMA = pa.schema(
    [
        *(
            (name, pa.string())
            for name in ("anchor_id", "positive_id", "negative_id", "anchor", "positive", "negative")
        ),
        *((name, pa.float32()) for name in ("positive_score", "negative_score")),
    ]
)

if __name__ == "__main__":
    main()
