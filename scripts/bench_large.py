"""Exact search of a corpus far larger than memory: its speed compared with the same search of vectors in memory.

    python scripts/bench_large.py
    python scripts/bench_large.py --documents 1000000 --anchors 10000 --memory 768MiB

Parts of random float16 vectors are written once (7.7 GB for 10 million with 384 numbers each). Each side runs in a
separate process and prints its rate and its peak memory. The in-memory side searches the first part of the corpus, as
many rows as fit, already converted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from negpipe import ann
from negpipe.ann.factory import NO_PAIRS
from negpipe.ann.vectors import Held
from negpipe.engine.budget import Budget

PART_ROWS = 65536
HELD_ROWS = 1_000_000


def parts(options: argparse.Namespace) -> list[Path]:
    """The corpus, written if it does not exist yet."""
    options.work_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, options.documents, PART_ROWS):
        rows = min(PART_ROWS, options.documents - first)
        path: Path = options.work_dir / f"part-{first}-{rows}x{options.dimension}.npy"
        if not path.exists():
            vectors = np.random.default_rng(first).standard_normal((rows, options.dimension), np.float32)
            np.save(path, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
        paths.append(path)
    return paths


def side(options: argparse.Namespace) -> None:
    """Search, and print time and memory."""
    vectors = ann.open_parts(parts(options))
    if options.side == "held":
        held = np.empty((min(HELD_ROWS, vectors.rows), vectors.dimension), np.float32)
        vectors.read(0, held)
        source: Held | ann.Vectors = Held(held)
    else:
        source = vectors
    draw = np.random.default_rng(1)
    anchors = draw.standard_normal((options.anchors, options.dimension), np.float32)
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    # Keeps imports and the compilation for matrix units out of both times.
    budget = Budget(options.memory, len(os.sched_getaffinity(0)))
    first = np.empty((min(PART_ROWS, vectors.rows), vectors.dimension), np.float32)
    vectors.read(0, first)
    for _ in range(2):
        ann.search_exact(np.repeat(anchors, 5, axis=0), Held(first), options.depth, positives=NO_PAIRS, budget=budget)
    del first
    started = time.perf_counter()
    ann.search_exact(anchors, source, options.depth, positives=NO_PAIRS, budget=budget)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = 2 * source.rows * options.anchors * options.dimension / seconds / 1e9
    print(json.dumps({"seconds": seconds, "gflops": rate, "peak": peak, "rows": source.rows}))


def main() -> None:
    """Measure and print."""
    from negpipe.config.executor import Resources

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--anchors", type=int, default=2_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--depth", type=int, default=320)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-large"))
    parser.add_argument("--side", choices=("held", "streamed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.memory = Resources.model_validate({"memory_budget": options.memory}).memory_budget
    if options.side:
        side(options)
        return
    parts(options)
    found: dict[str, list[dict[str, float]]] = {}
    for name in ("held", "streamed", "held"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found.setdefault(name, []).append(done)
        print(
            f"{name:9} {done['rows']:>12,} rows x {options.anchors:,} anchors: {done['seconds']:.1f} s,"
            f" {done['gflops']:.0f} GFLOP/s, peak {done['peak']:,.0f} MiB; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    held = sum(one["gflops"] for one in found["held"]) / len(found["held"])
    print(f"streamed at {found['streamed'][0]['gflops'] / held:.2f} of the rate in memory")


if __name__ == "__main__":
    main()
