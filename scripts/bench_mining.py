"""How fast negpipe mines compared with Sentence Transformers' `mine_hard_negatives`, and whether their rows agree.

    python scripts/bench_mining.py
    python scripts/bench_mining.py --hn-mine
    python scripts/bench_mining.py --documents 1000000 --memory 768MiB --work-dir runs/bench
    python scripts/bench_mining.py --small

Both sides get the same vectors (clusters of many sizes, near each other as embeddings are; rounded to
float16, so that storing them loses nothing), the same window and `top` sampling. Every measurement runs in a separate
process. Sentence Transformers is timed around the single call, without imports and loading. negpipe is timed twice: as
recorded by the stages (worker start included), and by the wall clock around its three commands (Python's start
included). CPU seconds (with every start for negpipe, without for the other side) are less sensitive to a busy machine.
`--hn-mine` also times the loop of FlagEmbedding's script of that name: 64 queries per search, Python lists. Peak memory
is the largest process of each side, including all its imports. Exits with code 1 if the rows differ by more than
near-ties explain.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LIBRARIES = ("numpy", "faiss-cpu", "torch", "sentence-transformers", "pyarrow")
STAGES = ("index", "search", "triplets")
MAX_DIFFERING = 0.002
MAX_TIME, MAX_TIME_LARGE = 0.7, 0.95  # of Sentence Transformers'; from a million documents on
MAX_TIME_OF_HN_MINE = 0.13
MAX_MEMORY, MAX_MEMORY_LARGE = 2**30, 0.25  # bytes; of Sentence Transformers'
MIN_SPEED, MIN_SPEED_LARGE = 0.75, 0.88  # of sgemm's
BATCH = 16384

Floats = npt.NDArray[np.float32]


# --- the data -----------------------------------------------------------------------------------------


def make_data(options: argparse.Namespace) -> dict[str, Any]:
    """Write a BEIR folder, the vectors, and negpipe's config."""
    folder: Path = options.work_dir
    draw = np.random.default_rng(0)
    centres = _centres(draw, max(8, options.documents // 100), options.dimension)
    # Zipf's law, flattened at its head: the largest cluster holds a few hundredths of the documents.
    weights = 1 / (np.arange(len(centres)) + 10)
    label = draw.choice(len(centres), options.documents, p=weights / weights.sum())
    positive = draw.choice(options.documents, options.anchors, replace=False)

    def documents(rows: slice) -> Floats:
        vectors: Floats = centres[label[rows]]
        vectors += 0.75 * _noise(draw, *vectors.shape)
        return vectors

    corpus = _save(folder / "corpus.npy", options.documents, options.dimension, documents)

    def anchors(rows: slice) -> Floats:
        # Between its positive and what the cluster has in common: most positives rank first, some do not.
        of = positive[rows]
        share = draw.random((len(of), 1), np.float32)
        vectors: Floats = share * corpus[of] + (1 - share) * centres[label[of]]
        vectors += 0.4 * _noise(draw, *vectors.shape)
        return vectors

    _save(folder / "anchors.npy", options.anchors, options.dimension, anchors)

    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True, exist_ok=True)
    with (beir / "corpus.jsonl").open("w") as file:
        file.writelines(f'{{"_id": "d{row}", "text": "{_document(row)}"}}\n' for row in range(options.documents))
    with (beir / "queries.jsonl").open("w") as file:
        file.writelines(f'{{"_id": "a{row}", "text": "{_anchor(row)}"}}\n' for row in range(options.anchors))
    with (beir / "qrels" / "train.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"a{row}\td{of}\t1\n" for row, of in enumerate(positive))
    np.save(folder / "positives.npy", positive)
    (folder / "config.yaml").write_text(json.dumps(_config(options), indent=2))
    return {}


def _config(options: argparse.Namespace) -> dict[str, Any]:
    folder: Path = options.work_dir
    return {
        "run_dir": str(folder / "run"),
        "data": {"format": "beir", "path": str(folder / "beir"), "text": "{text}"},
        "encoder": {
            "backend": "precomputed",
            "corpus_vectors": str(folder / "corpus.npy"),
            "anchor_vectors": str(folder / "anchors.npy"),
            "normalize": False,
        },
        "index": {"kind": options.kind},
        "resources": {"memory_budget": options.memory},
        "mining": {
            "range_min": options.range_min,
            "range_max": options.range_max,
            "rank_over": "survivors",
            "num_negatives": options.num_negatives,
            "sampling_strategy": "top",
            "relative_margin": None,
            "exclude": ["positive_id", "positive_text"],
        },
    }


def _document(row: int) -> str:
    return f"document {row} of the benchmark"


def _anchor(row: int) -> str:
    return f"query {row} of the benchmark"


def _centres(draw: np.random.Generator, count: int, dimension: int) -> Floats:
    """Cluster centres, 20 a domain, all leaning one way: as embeddings of different topics do."""
    domains = _noise(draw, -(-count // 20), dimension)
    centres = 0.5 * _noise(draw, 1, dimension) + 0.6 * np.repeat(domains, 20, axis=0)[:count]
    return _normalized(centres + 0.65 * _noise(draw, count, dimension))


def _noise(draw: np.random.Generator, rows: int, dimension: int) -> Floats:
    """Random directions, about 1 long."""
    return draw.standard_normal((rows, dimension), np.float32) * np.float32(dimension**-0.5)


def _normalized(vectors: Floats) -> Floats:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _save(path: Path, rows: int, dimension: int, make: Callable[[slice], Floats]) -> npt.NDArray[np.float16]:
    out: npt.NDArray[np.float16] = np.lib.format.open_memmap(path, "w+", np.float16, (rows, dimension))
    for start in range(0, rows, BATCH):
        block = slice(start, min(start + BATCH, rows))
        out[block] = _normalized(make(block))
    return out


# --- the sides, each in a separate process ------------------------------------------------------------


def sgemm(options: argparse.Namespace) -> dict[str, Any]:
    """GFLOP/s of numpy's float32 matrix product, at the sizes of a search."""
    draw = np.random.default_rng(0)
    left = draw.standard_normal((4096, options.dimension), np.float32)
    right = draw.standard_normal((options.dimension, 16384), np.float32)
    out = left @ right
    seconds: list[float] = []
    while sum(seconds) < 3:
        started = time.perf_counter()
        np.matmul(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    work = 2 * left.size * right.shape[1] / 1e9
    return {"best": work / min(seconds), "median": work / statistics.median(seconds)}


class Stub:
    """The part of SentenceTransformer that `mine_hard_negatives` calls; the vectors already exist."""

    device = "cpu"

    def __init__(self, corpus: Floats, anchors: Floats) -> None:
        self._dimension: int = corpus.shape[1]
        # Handed over, not kept: a model does not hold what it has encoded.
        self._corpus, self._anchors = [corpus], [anchors]

    def get_embedding_dimension(self) -> int:
        return self._dimension

    def encode_document(self, texts: list[str], **_: Any) -> Floats:
        return _checked(self._corpus.pop(), texts)

    def encode_query(self, texts: list[str], **_: Any) -> Floats:
        return _checked(self._anchors.pop(), texts)

    def similarity_pairwise(self, left: Floats, right: Floats) -> Any:
        # The inner product, which is what its FAISS index ranks by.
        from sentence_transformers.util import pairwise_dot_score

        return pairwise_dot_score(left, right)


def _checked(vectors: Floats, texts: list[str]) -> Floats:
    if len(vectors) != len(texts):
        raise ValueError(f"{len(vectors)} vectors for {len(texts)} texts")
    return vectors


def sentence_transformers(options: argparse.Namespace) -> dict[str, Any]:
    """Mine with Sentence Transformers, timed around the call; its rows are written afterwards."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    importlib.import_module("faiss")  # which the call imports; that is not timed
    folder: Path = options.work_dir
    texts = [_document(row) for row in range(options.documents)]
    positives = np.load(folder / "positives.npy")
    pairs = Dataset.from_dict(
        {"anchor": [_anchor(row) for row in range(options.anchors)], "positive": [texts[of] for of in positives]}
    )
    model = Stub(*(np.load(folder / name).astype(np.float32) for name in ("corpus.npy", "anchors.npy")))
    started, cpu_started = time.perf_counter(), time.process_time()
    rows = mine_hard_negatives(
        pairs,
        model,
        corpus=texts,
        range_min=options.range_min,
        range_max=options.range_max,
        num_negatives=options.num_negatives,
        sampling_strategy="top",
        output_format="triplet",
        output_scores=True,
        use_faiss=True,
        verbose=False,
    )
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows.to_parquet(folder / "theirs.parquet")
    return {"seconds": seconds, "cpu": cpu, "peak": peak}


def hn_mine(options: argparse.Namespace) -> dict[str, Any]:
    """Mine like FlagEmbedding's scripts/hn_mine.py, reimplemented here because no package contains that script."""
    import random

    import faiss

    folder: Path = options.work_dir
    corpus = [_document(row) for row in range(options.documents)]
    lines = [
        {"query": _anchor(row), "pos": [corpus[of]]}
        for row, of in enumerate(np.load(folder / "positives.npy").tolist())
    ]
    vectors, queries = (np.load(folder / name).astype(np.float32) for name in ("corpus.npy", "anchors.npy"))
    started, cpu_started = time.perf_counter(), time.process_time()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    found: list[list[int]] = []
    for start in range(0, len(queries), 64):
        _, rows = index.search(queries[start : start + 64], options.range_max)
        found.extend(rows.tolist())
    with (folder / "hn_mine.jsonl").open("w") as file:
        for line, ranked in zip(lines, found, strict=True):
            kept = [row for row in ranked[options.range_min : options.range_max] if row != -1]
            kept = [row for row in kept if corpus[row] not in line["pos"] and corpus[row] != line["query"]]
            taken = random.sample(kept, min(options.num_negatives, len(kept)))
            file.write(json.dumps(line | {"neg": [corpus[row] for row in taken]}, ensure_ascii=False) + "\n")
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu": cpu, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """How many rows only one side has, and how far the scores differ."""
    import pyarrow.parquet as pq

    ours = pq.read_table(options.work_dir / "run" / "triplets")
    theirs = pq.read_table(options.work_dir / "theirs.parquet")
    our_scores = np.stack([ours[name].to_numpy() for name in ("positive_score", "negative_score")], axis=1)
    their_scores = theirs["scores"].combine_chunks().flatten().to_numpy().reshape(-1, 2)
    keys = [
        list(zip(*(t[n].to_pylist() for n in ("anchor", "positive", "negative")), strict=True)) for t in (ours, theirs)
    ]
    of_ours, of_theirs = (dict(zip(key, range(len(key)), strict=True)) for key in keys)
    common = list(of_ours.keys() & of_theirs.keys())
    at = np.array([(of_ours[key], of_theirs[key]) for key in common]).reshape(-1, 2)
    apart = np.abs(our_scores[at[:, 0]] - their_scores[at[:, 1]]).max(axis=0, initial=0)
    return {
        "rows": [len(ours), len(theirs)],
        "differing": 1 - len(common) / max(len(of_ours), len(of_theirs), 1),
        "positive": float(apart[0]),
        "negative": float(apart[1]),
        "place": _apart_by_place(keys[0], our_scores[:, 1], keys[1], their_scores[:, 1]),
    }


def _apart_by_place(
    our_keys: list[tuple[str, ...]], ours: npt.NDArray[Any], their_keys: list[tuple[str, ...]], theirs: npt.NDArray[Any]
) -> float:
    """The largest difference between the scores of the i-th best negative of a pair; inf: the counts differ.

    A difference as small as a rounding error proves that the differing rows are near-ties.
    """
    largest = 0.0
    both = [_by_pair(keys, scores) for keys, scores in ((our_keys, ours), (their_keys, theirs))]
    for pair in both[0].keys() | both[1].keys():
        mine, other = (np.sort(side.get(pair, [])) for side in both)
        largest = max(largest, float(np.abs(mine - other).max(initial=0)) if len(mine) == len(other) else np.inf)
    return largest


def _by_pair(keys: list[tuple[str, ...]], scores: npt.NDArray[Any]) -> dict[tuple[str, ...], list[float]]:
    pairs: dict[tuple[str, ...], list[float]] = {}
    for key, score in zip(keys, scores.tolist(), strict=True):
        pairs.setdefault(key[:2], []).append(score)
    return pairs


SIDES = {
    "data": make_data,
    "sgemm": sgemm,
    "sentence-transformers": sentence_transformers,
    "hn_mine": hn_mine,
    "compare": compare,
}


# --- measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A successful command, workers included: wall-clock seconds, CPU seconds, bytes of the largest process."""

    seconds: float
    cpu: float
    peak: int
    output: str


def run(command: list[str]) -> Ran:
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    return Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output)


def side(name: str, folder: Path) -> tuple[Ran, dict[str, Any]]:
    ran = run([sys.executable, __file__, *sys.argv[1:], "--work-dir", str(folder), "--side", name])
    result: dict[str, Any] = json.loads(ran.output.splitlines()[-1])
    return ran, result


@dataclass(frozen=True)
class Stage:
    """One negpipe command: its wall-clock time, and the recorded seconds of the stage and of its tasks."""

    name: str
    ran: Ran
    seconds: float
    tasks: float


def negpipe(folder: Path) -> Iterator[Stage]:
    """Run the stages one by one, from scratch; the stages before index are not measured."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    for name in ("ingest", "encode", *STAGES):
        ran = run([sys.executable, "-m", "negpipe", name, str(folder / "config.yaml")])
        if name in STAGES:
            manifest = json.loads((folder / "run" / ".negpipe" / name / "manifest.json").read_text())
            tasks = sum(part["provenance"]["seconds"] for part in manifest["parts"])
            yield Stage(name, ran, manifest["provenance"]["seconds"], tasks)


@dataclass(frozen=True)
class Round:
    stages: tuple[Stage, ...]
    gemm: dict[str, float]
    theirs: dict[str, float]
    their_clock: float
    speed: float  # GFLOP/s of the search tasks: all products, rescoring, reading and writing

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def clock(self) -> float:
        return sum(stage.ran.seconds for stage in self.stages)

    @property
    def cpu(self) -> float:
        return sum(stage.ran.cpu for stage in self.stages)

    @property
    def peak(self) -> int:
        return max(stage.ran.peak for stage in self.stages)


def measure(options: argparse.Namespace, folder: Path) -> Round:
    _, gemm = side("sgemm", folder)
    stages = tuple(negpipe(folder))
    ran, theirs = side("sentence-transformers", folder)
    work = 2 * options.documents * options.anchors * options.dimension / 1e9
    search = next(stage.tasks for stage in stages if stage.name == "search")
    return Round(stages, gemm, theirs, ran.seconds, work / search)


# --- the report ---------------------------------------------------------------------------------------


def show_round(done: Round) -> None:
    print(f"  {'seconds':<24} {'tasks':>8} {'stage':>8} {'clock':>8} {'CPU':>8} {'peak MiB':>9}")
    for stage in done.stages:
        _row(f"negpipe {stage.name}", stage.tasks, stage.seconds, stage.ran.seconds, stage.ran.cpu, stage.ran.peak)
    tasks = sum(stage.tasks for stage in done.stages)
    _row("negpipe together", tasks, done.seconds, done.clock, done.cpu, done.peak)
    theirs = done.theirs
    _row("Sentence Transformers", None, theirs["seconds"], done.their_clock, theirs["cpu"], theirs["peak"])
    print(f"  sgemm {done.gemm['best']:.0f} GFLOP/s at best, {done.gemm['median']:.0f} median; search {done.speed:.0f}")


def _row(name: str, tasks: float | None, *numbers: float) -> None:
    *seconds, peak = numbers
    shown = ["" if number is None else f"{number:.2f}" for number in (tasks, *seconds)]
    print(f"  {name:<24} {' '.join(f'{number:>8}' for number in shown)} {_mib(peak):>9}")


def show_summary(rounds: list[Round], options: argparse.Namespace, rows: dict[str, Any]) -> bool:
    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(map(value, rounds))

    time_ratio = median(lambda done: done.seconds / done.theirs["seconds"])
    cpu_ratio = median(lambda done: done.cpu / done.theirs["cpu"])
    clock_ratio = median(lambda done: done.clock / done.theirs["seconds"])
    speed = median(lambda done: done.speed / done.gemm["median"])
    best = median(lambda done: done.speed / done.gemm["best"])
    peak, their_peak = max(done.peak for done in rounds), max(done.theirs["peak"] for done in rounds)
    agree: bool = rows["differing"] <= MAX_DIFFERING
    print(f"\nmedian of {len(rounds)}" if len(rounds) > 1 else "")
    # Small runs are dominated by the start of the stages: the targets are for the default sizes.
    small, large = options.small, options.documents >= 1_000_000
    most, least = (MAX_TIME_LARGE, MIN_SPEED_LARGE) if large else (MAX_TIME, MIN_SPEED)
    _verdict("time of Sentence Transformers'", f"{time_ratio:.2f}", f"at most {most}", time_ratio <= most, small)
    print(f"  {'  with Python’s start':<34} {clock_ratio:.2f}")
    print(f"  {'  in CPU seconds, with that too':<34} {cpu_ratio:.2f}")
    _verdict("search of sgemm's median", f"{speed:.2f}", f"at least {least}", speed >= least, small)
    print(f"  {'  of its best':<34} {best:.2f}")
    if large:
        share = peak / their_peak
        met = share <= MAX_MEMORY_LARGE
        _verdict("memory of Sentence Transformers'", f"{share:.2f}", f"at most {MAX_MEMORY_LARGE}", met)
    else:
        _verdict("peak memory", f"{_mib(peak)} MiB", f"at most {_mib(MAX_MEMORY)}", peak <= MAX_MEMORY, small)
    print(f"  {'  negpipe, Sentence Transformers':<34} {_mib(peak)}, {_mib(their_peak)} MiB")
    _verdict("rows that differ", f"{rows['differing']:.4%}", f"at most {MAX_DIFFERING:.1%}", agree)
    ours, theirs = rows["rows"]
    print(f"  {'  rows':<34} {ours:,} and {theirs:,}")
    print(f"  {'  scores of equal rows apart':<34} {rows['positive']:.1e} positives, {rows['negative']:.1e} negatives")
    print(f"  {'  scores of equal places apart':<34} {rows['place']:.1e} negatives")
    return agree


def _verdict(name: str, value: str, target: str, met: bool, no_target: bool = False) -> None:
    verdict = "" if no_target else f" ({target}: {'met' if met else 'MISSED'})"
    print(f"  {name:<34} {value:<10}{verdict}".rstrip())


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {versions}"


def bench(options: argparse.Namespace, folder: Path) -> bool:
    print(machine())
    print(
        f"{options.documents:,} documents of {options.dimension} numbers, {options.anchors:,} anchors, window"
        f" {options.range_min} to {options.range_max}, {options.num_negatives} negatives, index.kind {options.kind}"
    )
    side("data", folder)
    rounds = []
    for number in range(options.rounds):
        print(f"\nround {number + 1}, load average {os.getloadavg()[0]:.2f}", flush=True)
        rounds.append(measure(options, folder))
        show_round(rounds[-1])
    _, rows = side("compare", folder)
    agree = show_summary(rounds, options, rows)
    if options.hn_mine:
        _, loop = side("hn_mine", folder)
        ratio = statistics.median(done.seconds for done in rounds) / loop["seconds"]
        target = f"at most {MAX_TIME_OF_HN_MINE}"
        _verdict("time of hn_mine's loop", f"{ratio:.3f}", target, ratio <= MAX_TIME_OF_HN_MINE, options.small)
        print(f"  {'  hn_mine':<34} {loop['seconds']:.1f} s, {_mib(loop['peak'])} MiB")
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000, help="documents (%(default)s)")
    parser.add_argument("--dimension", type=int, default=384, help="numbers per vector (%(default)s)")
    parser.add_argument("--anchors", type=int, default=10_000, help="anchors, one positive each (%(default)s)")
    parser.add_argument("--range-min", type=int, default=10, help="first rank of the window (%(default)s)")
    parser.add_argument("--range-max", type=int, default=210, help="rank after its last one (%(default)s)")
    parser.add_argument("--num-negatives", type=int, default=15, help="negatives per anchor (%(default)s)")
    parser.add_argument("--kind", default="stream", help="index.kind (%(default)s)")
    parser.add_argument("--memory", default="2GiB", help="resources.memory_budget (%(default)s)")
    parser.add_argument("--hn-mine", action="store_true", help="also time FlagEmbedding's loop (takes a minute)")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is measured (%(default)s)")
    parser.add_argument("--small", action="store_true", help="5,000 documents of 64 numbers, 500 anchors: seconds")
    parser.add_argument("--work-dir", type=Path, help="folder for data and outputs (default: a temporary one)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        options.documents, options.dimension, options.anchors = 5_000, 64, 500
    if options.anchors > options.documents:
        parser.error("--anchors: every anchor needs a positive of its own, so at most as many as --documents")
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
    elif options.work_dir:
        options.work_dir.mkdir(parents=True, exist_ok=True)
        sys.exit(not bench(options, options.work_dir))
    else:
        with tempfile.TemporaryDirectory(prefix="bench-mining-") as folder:
            sys.exit(not bench(options, Path(folder)))


if __name__ == "__main__":
    main()
