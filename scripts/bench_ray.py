"""What Ray costs compared with worker processes on one machine: the same run with `executor.kind: local` and `ray`.

    python scripts/bench_ray.py
    python scripts/bench_ray.py --documents 20000 --anchors 2000 --rounds 3

Vectors are precomputed; encode, index, search and triplets run in a given number of workers with one core each.
Measured: wall-clock time, with all imports; Ray's start, from its log; and, from the records on disk over all stages,
the start of workers (until the first part is started, including the opening of shared resources), their seconds in
parts, and the seconds between a part and the next one of the same worker. The latter are the cost of an executor beyond
its start; they are also printed as a share of the seconds in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from bench_rerun import write

STAGES = ("encode", "index", "search", "triplets")


@dataclass(frozen=True)
class Measured:
    """Seconds: wall-clock, Ray's start, start of workers, in parts and between them."""

    clock: float
    ray: float
    starts: float
    parts: float
    between: float

    @property
    def share(self) -> float:
        """The seconds between parts, as a share of those in parts."""
        return self.between / self.parts


def of_stages(run_dir: Path) -> tuple[float, float, float]:
    """Seconds for starting workers, in parts and between them, over all stages."""
    starts = parts = between = 0.0
    for stage in STAGES:
        books = run_dir / ".negpipe" / stage
        manifest = json.loads((books / "manifest.json").read_text())
        began = (books / "manifest.json").stat().st_mtime - manifest["provenance"]["seconds"]
        spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for part in manifest["parts"]:
            ended, seconds = (books / f"{part['key']}.json").stat().st_mtime, part["provenance"]["seconds"]
            spans[part["provenance"]["pid"]].append((ended - seconds, ended))
            parts += seconds
        starts += min(span[0] for own in spans.values() for span in own) - began
        for own in spans.values():
            between += sum(after[0] - before[1] for before, after in pairwise(sorted(own)))
    return starts, parts, between


def measured(folder: Path, kind: str, workers: int) -> Measured:
    """One run from scratch."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    run_dir = folder / kind
    shutil.rmtree(run_dir, ignore_errors=True)
    share = workers if kind == "local" else 1  # of an actor's cores and memory there is one for each
    settings |= {
        "run_dir": str(run_dir),
        "executor": {"kind": kind, "workers": workers, "ray": {"address": "local"}},
        "resources": {"cpus": share, "memory_budget": share * 2**29},
        "output": {"report": False},
    }
    config = folder / f"{kind}.yaml"
    config.write_text(yaml.safe_dump(settings))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "negpipe", "mine", str(config)], capture_output=True, text=True, check=False
    )
    clock = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr[-2000:]}")
    said = re.search(r"ray: started in ([\d.]+) s", " ".join(done.stderr.split()))
    return Measured(clock, float(said[1]) if said else 0.0, *of_stages(run_dir))


def rows(run_dir: Path) -> list[str]:
    """Digests of the rows."""
    manifest = json.loads((run_dir / ".negpipe/triplets/manifest.json").read_text())
    return [file["digest"] for part in manifest["parts"] for file in part["files"]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--anchors", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-ray"))
    options = parser.parse_args()

    write(options.work_dir, options.documents, options.anchors, 60, 1024, options.dimension)
    print(f"{options.documents:,} documents, {options.anchors:,} anchors, {options.workers} workers of one core")
    print(
        f"{'round':>6} {'kind':<6} {'clock':>7} {'Ray':>6} {'starts':>7} {'parts':>7} {'between':>8} {'share':>6} load"
    )
    shares: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for kind in ("local", "ray"):
            one = measured(options.work_dir, kind, options.workers)
            shares[kind].append(one.share)
            print(
                f"{number + 1:>6} {kind:<6} {one.clock:>7.1f} {one.ray:>6.1f} {one.starts:>7.1f} {one.parts:>7.1f}"
                f" {one.between:>8.2f} {one.share:>6.1%} {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        if rows(options.work_dir / "local") != rows(options.work_dir / "ray"):
            sys.exit("the rows differ")
    medians = {kind: statistics.median(found) for kind, found in shares.items()}
    print(f"between parts, of the seconds in them: {medians['ray']:.1%}, local {medians['local']:.1%}; the same rows")


if __name__ == "__main__":
    main()
