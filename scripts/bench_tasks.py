"""How long it takes to plan, resume and commit stages with very many tasks, compared with the work itself.

    python scripts/bench_tasks.py
    python scripts/bench_tasks.py --tasks 1000 --work-dir /dev/shm/bench-tasks

The vectors are precomputed and a part holds about one row, so that `encode`, `search` and `triplets` have one task per
anchor. For each stage, all tasks are run; then one record is deleted, and the run is planned, resumed and committed;
finally, the entire run is checked again with nothing to do. For each command: wall-clock seconds, including its start,
and CPU seconds, which a busy disk or machine does not affect.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from bench_rerun import write

STAGES = ("encode", "search", "triplets")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-tasks"))
    parser.add_argument("--again", action="store_true", help="reuse the output of an earlier ingest in --work-dir")
    options = parser.parse_args()

    config, books = options.work_dir / "config.yaml", options.work_dir / "run/.negpipe"

    def run(verb: str, flags: str = "") -> None:
        command = [sys.executable, "-m", "negpipe", *verb.split(), str(config), *flags.split()]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        clock, computing = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
        code = os.waitstatus_to_exitcode(status)
        print(f"{f'{verb} {flags}':32} {clock:7.2f} s, {computing:7.2f} s computing, exit {code}", flush=True)

    if not options.again:
        shutil.rmtree(options.work_dir, ignore_errors=True)
        write(options.work_dir, 200, options.tasks, 60, 1, 16)
        settings = yaml.safe_load(config.read_text()) | {"executor": {"kind": "inline"}}
        config.write_text(yaml.safe_dump(settings))
    run("ingest")
    for stage in STAGES:
        shutil.rmtree(books / stage, ignore_errors=True)
        if stage == "search":
            run("index")
        run(f"work {stage}", "--shard 0/1")
        record = sorted((books / stage).glob("*.json"))
        record[0].unlink()
        print(f"{len(record):,} tasks, all but one made:")
        run("plan", "--no-probe")
        run(f"work {stage}", "--shard 0/1")
        run(f"commit {stage}")
    run("mine", "--set output.report=false")
    run("status")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
