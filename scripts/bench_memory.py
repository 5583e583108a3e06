r"""Working memory of every stage compared with `resources.memory_budget`.

    python scripts/bench_memory.py
    python scripts/bench_memory.py --documents 2000000 --budgets 512MiB
    python scripts/bench_memory.py --documents 100000 --anchors 1000000 --dimension 64 --budgets 512MiB \
        --commands ingest,encode,index,search,triplets

A run over documents of 300 characters with precomputed vectors, each command in a separate process. The measure
is the anonymous memory of the process, sampled every few milliseconds, minus that of the same command on a
thousand documents: the kernel can reclaim pages of mapped files. "failed": the command reported that the budget is
not sufficient; its message is above the table. A large search multiplies with torch, which a small one does not need:
the last line shows the memory of that library.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from bench_rerun import write

MULTIPLIED = "import torch; a = torch.ones(512, 128).bfloat16(); a @ a.T"
COMMANDS = {
    "ingest": ["ingest"],
    "encode": ["encode"],
    "index": ["index"],
    "search": ["search"],
    "triplets": ["triplets"],
    # No candidate may be taken: every anchor is searched again, to depth 1,024.
    "deeper": ["triplets", "--set", "mining.rank_over=survivors", "--set", "mining.max_score=-9"],
    "export": ["export", "--to", "flagembedding", "--out", "OUT/flag.jsonl"],
    "distillation": ["export", "--to", "distillation", "--out", "OUT/distillation"],
    "audit": ["audit"],
}


def run(command: list[str]) -> tuple[float, float]:
    """Peak anonymous memory of a process in MiB, and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        most = max([most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.003)
    # 1 means that the audit found something.
    if process.wait() > 1:
        print(" ".join(command), "failed:", process.stderr.read()[-2000:] if process.stderr else "", file=sys.stderr)
        most = 0
    return most / 1024, time.perf_counter() - started


def measure(
    folder: Path, documents: int, anchors: int, dimension: int, budget: str, commands: list[str]
) -> dict[str, tuple[float, float]]:
    """For every command: peak anonymous memory in MiB, seconds."""
    config = write(folder, documents, anchors, 300, 16384, dimension)
    settings = yaml.safe_load(config.read_text())
    settings |= {"resources": {"memory_budget": budget}, "executor": {"kind": "inline"}}
    config.write_text(yaml.safe_dump(settings))
    found = {}
    for name in commands:
        words = [word.replace("OUT", str(folder)) for word in COMMANDS[name]]
        found[name] = run([sys.executable, "-m", "negpipe", words[0], str(config), *words[1:]])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=500_000)
    parser.add_argument("--anchors", type=int, default=50_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--budgets", default="384MiB,1GiB", help="separated by , (%(default)s)")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="separated by , (%(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-memory"))
    options = parser.parse_args()
    budgets, commands = options.budgets.split(","), options.commands.split(",")
    least = measure(options.work_dir / "small", 1000, 100, options.dimension, "256MiB", commands)
    found = {
        budget: measure(
            options.work_dir / "large", options.documents, options.anchors, options.dimension, budget, commands
        )
        for budget in budgets
    }
    print(
        f"{options.documents:,} documents of 300 characters, {options.dimension} numbers each, {options.anchors:,}"
        f" anchors; MiB over what 1,000 documents take (seconds); load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'memory_budget':14}" + "".join(f"{budget:>18}" for budget in budgets))
    for name in commands:
        cells = [
            f"{peak - least[name][0]:8.0f} ({seconds:5.1f} s)" if peak else "failed"
            for peak, seconds in (found[budget][name] for budget in budgets)
        ]
        print(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    without, imported = (run([sys.executable, "-c", f"import faiss, numpy; {more}"])[0] for more in ("", MULTIPLIED))
    print(f"torch itself: {imported - without:.0f}")


if __name__ == "__main__":
    main()
