"""How fast selected rows are written as Parquet, in every format, and in how much memory.

    python scripts/bench_formats.py
    python scripts/bench_formats.py --rows 200000 --formats triplet --characters 2000

A synthetic corpus is written the way `ingest` writes it; units with random documents then go through
`formats.tables` and `formats.write`, as in the triplets stage, to a file on disk. To make formats comparable, `rows/s`
counts (anchor, positive, negative) triples in every format: n-tuple and labeled-list hold several per row.
Every format runs in a separate process. Peak memory includes the mapped pages of the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from negpipe.config.schema import Config
from negpipe.data.tables import Rows, to_bytes
from negpipe.rows import formats
from negpipe.select.selector import Units

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
SLICE = 4096


def write_corpus(folder: Path, documents: int, characters: int, part_rows: int = 16384) -> None:
    """Arrow parts of documents whose texts are random words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 10))) for _ in range(20000)]
    for number, start in enumerate(range(0, documents, part_rows)):
        rows = range(start, min(start + part_rows, documents))
        texts = [" ".join(draw.choices(words, k=max(1, characters // 7))) for _ in rows]
        ids = [f"document-{row:08d}" for row in rows]
        columns = {"id": pa.array(ids, pa.large_string()), "text": pa.array(texts, pa.large_string())}
        (folder / f"{number:05d}.arrow").write_bytes(to_bytes(pa.table(columns)))


def slices(options: argparse.Namespace, documents: int) -> Iterator[Units]:
    """Units with one positive each, and documents from anywhere in the corpus."""
    draw = np.random.default_rng(0)
    anchors = -(-options.rows // options.negatives)
    for start in range(0, anchors, SLICE):
        count = min(SLICE, anchors - start)
        ids = [f"query-{start + at:08d}" for at in range(count)]
        texts = [f"what is said about {name} and its neighbours" for name in ids]
        negatives = draw.integers(0, documents, (count, options.negatives))
        yield Units(
            anchors=pa.table({"id": pa.array(ids), "text": pa.array(texts)}),
            anchor=np.arange(count),
            positives=draw.integers(0, documents, count),
            positive_offsets=np.arange(count + 1),
            positive_scores=draw.random(count, np.float32),
            positive_ranks=draw.integers(-1, 200, count),
            grades=np.ones(count, np.float32),
            negatives=negatives.ravel(),
            negative_offsets=np.arange(count + 1) * options.negatives,
            negative_scores=-np.sort(-draw.random((count, options.negatives), np.float32), axis=1).ravel(),
            negative_ranks=np.sort(draw.integers(0, 200, (count, options.negatives)), axis=1).ravel(),
            negative_sources=np.zeros(count * options.negatives, np.uint8),
            fates=np.zeros((count, 1), np.uint8),
            references=np.zeros(count, np.float32),
        )


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Write one format in this process."""
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "data": {"path": "unused"},
            "encoder": {"model": "unused"},
            "mining": {"num_negatives": options.negatives},
            "output": {"format": name},
        }
    )
    corpus = Rows(sorted(Path(options.corpus).glob("*.arrow")))
    units = list(slices(options, len(corpus)))
    path = Path(options.corpus) / "rows.parquet"
    started, busy = time.perf_counter(), time.process_time()
    with path.open("wb") as file:
        rows = formats.write(file, (table for _, table in formats.tables(units, corpus, config)))
        file.flush()
        os.fsync(file.fileno())
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    triples = sum(len(piece.negatives) for piece in units)
    return {
        "format": name,
        "rows": rows,
        "rows/s": round(triples / seconds),
        "seconds": round(seconds, 2),
        "cpu seconds": round(busy, 2),
        "file MB": round(path.stat().st_size / 1e6, 1),
        "peak RSS MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="triples")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=300, help="approximate length of a document's text")
    parser.add_argument("--negatives", type=int, default=10, help="negatives per anchor")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.corpus:
        print(json.dumps(measure(options, options.formats[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), options.documents, options.characters)
        print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
        for name in options.formats:
            arguments = [*sys.argv[1:], "--formats", name, "--corpus", folder]
            done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
            print(", ".join(f"{key} {value}" for key, value in json.loads(done.stdout).items()))
        print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
