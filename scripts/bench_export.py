"""How fast selected rows are written in each trainer's layout, and in how much memory.

    python scripts/bench_export.py
    python scripts/bench_export.py --rows 200000 --layouts nemo hub --characters 2000

A synthetic corpus is written the way `ingest` writes it; units with random documents then go through
`exports.export` to a folder on disk, as with `negpipe export`. To make layouts comparable, `rows/s` counts (anchor,
positive, negative) triples in every layout, since most layouts hold several per row. Every layout runs in a separate
process. Peak memory includes the mapped pages of the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_formats import slices, write_corpus

from negpipe.config.schema import Config
from negpipe.data.candidates import Candidates
from negpipe.data.tables import Rows
from negpipe.rows import exports
from negpipe.select.selector import Units


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Export to one layout in this process."""
    config = Config.model_validate(
        {
            "run_dir": f"{options.corpus}/run",
            "data": {"path": "unused"},
            "encoder": {"model": "unused"},
            "mining": {"num_negatives": options.negatives},
        }
    )
    corpus = Rows(sorted(Path(options.corpus).glob("*.arrow")))
    pieces = [(nothing_found(units), units) for units in slices(options, len(corpus))]
    out = Path(options.corpus) / "out"
    started, busy = time.perf_counter(), time.process_time()
    done = exports.export(
        config, exports.ExportOptions(to=name, out=out, force=True), corpus, pieces, counts={}, encoder={}
    )
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return {
        "layout": name,
        "rows": done.rows,
        "rows/s": round(sum(len(units.negatives) for _, units in pieces) / seconds),
        "seconds": round(seconds, 2),
        "cpu seconds": round(busy, 2),
        "MB": round(sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6, 1),
        "peak RSS MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def nothing_found(units: Units) -> Candidates:
    """The candidates of synthetic units: only a run file would show them."""
    rows = np.empty((len(units.anchor), 0), np.int64)
    return Candidates(
        rows,
        rows.astype(np.float32),
        units.positives,
        units.positive_offsets,
        units.positive_scores,
        np.arange(len(rows)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="triples")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=300, help="approximate length of a document's text")
    parser.add_argument("--negatives", type=int, default=10, help="negatives per anchor")
    layouts = [name for name in exports.LAYOUTS if name != "trec-run"]  # whose ranking is not made up
    parser.add_argument("--layouts", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.corpus:
        print(json.dumps(measure(options, options.layouts[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), options.documents, options.characters)
        print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
        for name in options.layouts:
            arguments = [*sys.argv[1:], "--layouts", name, "--corpus", folder]
            done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
            print(", ".join(f"{key} {value}" for key, value in json.loads(done.stdout).items()))
        print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
