"""How long it takes to plan, to take up again and to commit a stage of very many tasks, beside the work itself.

    python scripts/bench_shards.py
    python scripts/bench_shards.py --tasks 2000

The vectors are brought and a part holds about one of them, so that `encode` has a task for each document. For each
command: seconds by the clock, its start included, seconds of processors, and its exit code.
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-shards"))
    options = parser.parse_args()

    shutil.rmtree(options.work_dir, ignore_errors=True)
    config = write(options.work_dir, options.tasks, 200, 60, 1, 16)
    settings = yaml.safe_load(config.read_text()) | {"executor": {"kind": "inline"}}
    config.write_text(yaml.safe_dump(settings))

    def run(verb: str, flags: str = "") -> None:
        command = [sys.executable, "-m", "negpipe", *verb.split(), str(config), *flags.split()]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        clock, computing = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
        code = os.waitstatus_to_exitcode(status)
        print(f"{f'{verb} {flags}':32} {clock:6.2f} s, {computing:6.2f} s computing, exit {code}", flush=True)

    run("ingest")
    run("plan", "--no-probe")
    run("work encode", "--shard 0/2")
    run("commit encode", "--shards 2")
    run("work encode", "--shard 1/2")
    records = sorted((options.work_dir / "run/.negpipe/encode").glob("*.json"))
    records[0].unlink()
    print(f"{len(records):,} tasks, all but one made:")
    run("plan", "--no-probe")
    for shard in ("0/2", "1/2", "0/1"):
        run("work encode", f"--shard {shard}")
    run("commit encode", "--shards 2")
    run("status")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
