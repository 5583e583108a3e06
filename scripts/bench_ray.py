"""What Ray costs beside worker processes on one machine: the same run by `executor.kind: local` and by `ray`.

    python scripts/bench_ray.py
    python scripts/bench_ray.py --documents 20000 --anchors 2000 --rounds 3

Vectors are brought; encode, index, search and triplets run in so many workers of one core each. By the clock, with all
imports; Ray's own start as its log has it; from the records on disk, for each stage, the start of its workers (until
the first part is begun, opening what they share included) and the work after it. The ratio is that of the work, of the
same round: overhead beyond the start.
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
from dataclasses import dataclass
from pathlib import Path

import yaml
from bench_rerun import write

STAGES = ("encode", "index", "search", "triplets")


@dataclass(frozen=True)
class Measured:
    """Seconds: by the clock, of Ray's start, and of starting and working in the stages."""

    clock: float
    ray: float
    starts: float
    work: float


def of_stages(run_dir: Path) -> tuple[float, float]:
    """Seconds of starting workers and of their work, over all stages."""
    starts = work = 0.0
    for stage in STAGES:
        books = run_dir / ".negpipe" / stage
        manifest = json.loads((books / "manifest.json").read_text())
        ended, seconds = (books / "manifest.json").stat().st_mtime, manifest["provenance"]["seconds"]
        begun = min(
            (books / f"{part['key']}.json").stat().st_mtime - part["provenance"]["seconds"]
            for part in manifest["parts"]
        )
        starts, work = starts + begun - (ended - seconds), work + ended - begun
    return starts, work


def measured(folder: Path, kind: str, workers: int) -> Measured:
    """One run from nothing."""
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
        f"{'round':>6} {'kind':<6} {'clock':>8} {'Ray starts':>11} {'workers start':>14} {'work':>8} {'ratio':>6} load"
    )
    ratios = []
    for number in range(options.rounds):
        work = 0.0
        for kind in ("local", "ray"):
            one = measured(options.work_dir, kind, options.workers)
            work = work or one.work
            print(
                f"{number + 1:>6} {kind:<6} {one.clock:>8.1f} {one.ray:>11.1f} {one.starts:>14.1f} {one.work:>8.1f}"
                f" {one.work / work:>6.2f} {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        ratios.append(one.work / work)
        if rows(options.work_dir / "local") != rows(options.work_dir / "ray"):
            sys.exit("the rows differ")
    print(f"Ray's work is {statistics.median(ratios):.2f} of local's (median); the same rows")


if __name__ == "__main__":
    main()
