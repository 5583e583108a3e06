"""`negpipe calibrate` on a generated run: seconds and peak memory.

    python scripts/bench_calibrate.py
    python scripts/bench_calibrate.py --anchors 20000 --work-dir runs/bench-calibrate

There are as many documents as anchors, and two positives per anchor: one near the anchor, the other near the first.
Every anchor is tried twice, with one of the two hidden. The run is made first and is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

DIMENSION = 64


def write(folder: Path, count: int) -> Path:
    """A BEIR folder, vectors and a config."""
    (folder / "beir/qrels").mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    documents = draw.standard_normal((count, DIMENSION), np.float32)
    first, second = draw.integers(0, count, (2, count))
    documents[second] = 0.8 * documents[first] + 0.6 * documents[second]
    anchors = documents[first] + draw.standard_normal((count, DIMENSION), np.float32)
    for name, vectors in (("corpus", documents), ("anchors", anchors)):
        np.save(folder / f"{name}.npy", vectors)
    for name, ending in (("corpus", "d"), ("queries", "a")):
        with (folder / f"beir/{name}.jsonl").open("w") as file:
            file.writelines(f'{{"_id": "{ending}{i}", "text": "{name} {i}"}}\n' for i in range(count))
    with (folder / "beir/qrels/train.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for i, both in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            file.writelines(f"a{i}\td{document}\t1\n" for document in sorted(set(both)))
    settings = {
        "run_dir": str(folder / "run"),
        "data": {"path": str(folder / "beir"), "text": "{text}"},
        "encoder": {
            "backend": "precomputed",
            "corpus_vectors": str(folder / "corpus.npy"),
            "anchor_vectors": str(folder / "anchors.npy"),
        },
        "mining": {"num_negatives": 5, "range_max": 100},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder / "config.yaml"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=100_000)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-calibrate"))
    options = parser.parse_args()
    config = write(options.work_dir, options.anchors)
    command = [sys.executable, "-m", "negpipe"]
    subprocess.run([*command, "mine", str(config)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = time.perf_counter()
    process = subprocess.Popen([*command, "calibrate", str(config)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("calibrate failed")
    seconds = time.perf_counter() - started
    settings = pq.read_metadata(config.parent / "run/calibration.parquet").num_rows
    print(
        f"{options.anchors:,} anchors, {settings} settings: {seconds:.1f} s, peak {usage.ru_maxrss / 1024:,.0f} MiB;"
        f" load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
