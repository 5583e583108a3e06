"""Fit the speeds and sizes used by `negpipe plan --cluster` to runs on this machine, and check them on a larger one.

    python scripts/fit_plan.py
    python scripts/fit_plan.py --measures mine.json --work-dir /scratch/fit-plan

Random texts of words and random float16 vectors are mined, stage by stage, with one thread (resources.cpus: 1), with
real-time priority if the system grants it, so that a busy machine has less influence. Sizes up to a million documents
are fitted; two million, which are not part of any fit, are the check. Measurements that the file already contains are
not repeated; those behind the values included in negpipe are in scripts/fit_plan.json. Prints the section `rates` of a
cluster file, and the error of each stage's prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from negpipe.config.cluster import Cluster, Rates
from negpipe.config.schema import Config
from negpipe.engine.stage import Workload
from negpipe.plan.cluster import Forecast, forecast

BLOCK = 16384
SMALL = 2.5e11  # multiplications, up to which a search does without torch
STAGES = ("ingest", "encode", "index", "search", "triplets")
SHORT = ("index", "triplets")


@dataclass(frozen=True)
class Sizes:
    """The data to mine: an anchor has one positive, a text about this many characters."""

    documents: int
    dimension: int
    anchors: int
    characters: int
    depth: int = 256
    negatives: int = 3
    part_rows: int = 16384


FITTED = (
    Sizes(1_000_000, 768, 400, 100),
    Sizes(1_000_000, 768, 4_000, 100, negatives=8, part_rows=4096),
    Sizes(200_000, 768, 16_384, 300),
    Sizes(1_000_000, 384, 2_000, 600),
    Sizes(250_000, 768, 4_000, 300),
    Sizes(500_000, 384, 8_000, 300, depth=512, negatives=8),
)
HELD_OUT = (Sizes(2_000_000, 768, 4_000, 300),)


def write(folder: Path, sizes: Sizes) -> Path:
    """Source, vectors and config; returns the config."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "beir/qrels").mkdir(parents=True)
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, draw.integers(97, 123, draw.integers(2, 10)))) for _ in range(20_000)]
    # About as frequent as real words; they are joined from prepared lines, which is faster than from words.
    common = 1 / np.arange(1, len(words) + 1)
    chosen = draw.choice(len(words), (20_000, 9), p=common / common.sum())
    lines = [" ".join(words[word] for word in line) for line in chosen]
    of = draw.integers(len(lines), size=(sizes.documents, 1 + sizes.characters // 50))
    with (folder / "beir/corpus.jsonl").open("w") as file:
        for row, picked in enumerate(of):
            text = " ".join([str(row), *(lines[line] for line in picked)])[: sizes.characters]
            file.write(f'{{"_id": "d{row}", "text": "{text}"}}\n')
    with (folder / "beir/queries.jsonl").open("w") as file:
        file.writelines(f'{{"_id": "q{row}", "text": "{lines[row % 999]} {row}"}}\n' for row in range(sizes.anchors))
    with (folder / "beir/qrels/train.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"q{row}\td{7 * row % sizes.documents}\t1\n" for row in range(sizes.anchors))
    for name, rows in (("corpus", sizes.documents), ("anchors", sizes.anchors)):
        out = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (rows, sizes.dimension))
        for start in range(0, rows, BLOCK):
            vectors = draw.standard_normal((min(BLOCK, rows - start), sizes.dimension), np.float32)
            out[start : start + BLOCK] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        del out
    settings = {
        "run_dir": str(folder / "run"),
        "data": {"path": str(folder / "beir"), "text": "{text}", "part_rows": sizes.part_rows},
        "encoder": {
            "backend": "precomputed",
            "corpus_vectors": str(folder / "corpus.npy"),
            "anchor_vectors": str(folder / "anchors.npy"),
            "normalize": False,
        },
        "index": {"kind": "stream"},
        "search": {"depth": sizes.depth},
        "mining": {"num_negatives": sizes.negatives, "relative_margin": None},
        "output": {"report": False},
        "resources": {"cpus": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder / "config.yaml"


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Run the stages, the short ones three times. From the median run: wall-clock seconds, recorded seconds, seconds of
    its tasks, CPU seconds, and bytes."""
    config, stages = write(folder, sizes), {}
    for name in STAGES:
        runs = []
        for _ in range(3 if name in SHORT else 1):
            shutil.rmtree(folder / f"run/.negpipe/{name}", ignore_errors=True)
            runs.append(once(folder, config, name))
        stages[name] = sorted(runs, key=lambda run: run["clock"])[len(runs) // 2]
    print(f"{sizes}: {stages}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return asdict(sizes) | {"stages": stages}


def once(folder: Path, config: Path, name: str) -> dict[str, Any]:
    """Run a stage."""
    first = ["chrt", "-r", "1"] if shutil.which("chrt") and os.geteuid() == 0 else []
    started = time.perf_counter()
    process = subprocess.Popen([*first, sys.executable, "-m", "negpipe", name, str(config)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    clock = time.perf_counter() - started
    made = json.loads((folder / f"run/.negpipe/{name}/manifest.json").read_text())
    return {
        "parts": len(made["parts"]),
        "clock": round(clock, 2),
        "seconds": made["provenance"]["seconds"],
        "tasks": round(sum(part["provenance"]["seconds"] for part in made["parts"]), 3),
        "processors": round(usage.ru_utime + usage.ru_stime, 2),
        "bytes": sum(file["bytes"] for part in made["parts"] for file in part["files"]),
        "peak": max(part["provenance"]["peak_memory"] for part in made["parts"]),
    }


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measurements of all sizes; missing ones are made."""
    known: list[dict[str, Any]] = json.loads(options.measures.read_text()) if options.measures.exists() else []
    for sizes in (*FITTED, *HELD_OUT):
        if not any(asdict(sizes).items() <= one.items() for one in known):
            known.append(measure(options.work_dir, sizes))
            options.measures.write_text(json.dumps(known, indent=1) + "\n")
    return known


# --- the fit ------------------------------------------------------------------------------------------


def predicted(rates: Rates, one: dict[str, Any]) -> dict[str, Forecast]:
    """The plan for a measured run: one node, one core, a disk that costs nothing."""
    job = Workload(one["documents"], one["anchors"], one["dimension"], one["characters"], 1.0)
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "part_rows": one["part_rows"]},
            "encoder": {"backend": "precomputed", "corpus_vectors": "unused", "anchor_vectors": "unused"},
            "index": {"kind": "stream"},
            "search": {"depth": one["depth"]},
            "mining": {"num_negatives": one["negatives"]},
        }
    )
    node = Cluster(cores=1, memory=2**34, disk_bandwidth=2**50, rates=rates)
    return {stage.stage: stage for stage in forecast(config, node, job, 1).stages}


def fitted(measures: list[dict[str, Any]]) -> Rates:
    """The rates with the smallest errors in the logarithms of wall-clock seconds and of bytes.

    `task` and `process_bytes` stay: runs with few tasks do not determine them.
    """
    names = [name for name in Rates.model_fields if name not in ("task", "process_bytes")]
    start = np.log([getattr(Rates(), name) for name in names])

    def rates(logarithms: npt.NDArray[np.float64]) -> Rates:
        return Rates(**dict(zip(names, np.exp(logarithms).tolist(), strict=True)))

    def off(logarithms: npt.NDArray[np.float64]) -> list[float]:
        tried = rates(logarithms)
        pairs = [pair for one in measures for *_, pair in compared(tried, one)]
        # Pulled slightly towards the start values, so that rates that no run determines stay there.
        return [*(np.log(said / found) for said, found in pairs), *(0.01 * (logarithms - start))]

    found = least_squares(off, start, loss="soft_l1", f_scale=0.1)
    return rates(found.x)


def compared(rates: Rates, one: dict[str, Any]) -> Iterator[tuple[str, str, tuple[float, float]]]:
    """Stage, quantity, prediction and measurement, without searches too small for the fast products."""
    for name, stage in predicted(rates, one).items():
        large = one["documents"] * one["anchors"] * one["dimension"] > SMALL
        if stage.seconds and (name != "search" or large):
            yield name, "seconds", (stage.seconds, one["stages"][name]["clock"])
        yield name, "bytes", (stage.disk, one["stages"][name]["bytes"])


def show(rates: Rates, measures: list[dict[str, Any]], title: str) -> None:
    """The errors of the predictions, one line per run and stage."""
    print(f"\n{title}")
    for one in measures:
        print(f"  {one['documents']:,} x {one['dimension']}, {one['anchors']:,} anchors")
        for stage, what, (said, found) in compared(rates, one):
            print(f"    {stage:10} {what:8} {said:16,.1f} predicted {found:16,.1f} measured {said / found - 1:+7.1%}")


def main() -> None:
    """Measure, fit, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--work-dir", type=Path, default=Path("runs/fit-plan"))
    options = parser.parse_args()
    known = measured(options)
    most = max(sizes.documents for sizes in FITTED)
    small, large = ([one for one in known if (one["documents"] <= most) is fits] for fits in (True, False))
    rates = fitted(small)
    print("rates:")
    for name, value in rates:
        print(f"  {name}: {value:.4g}")
    show(rates, small, "Fitted to:")
    show(rates, large, "Held out:")
    show(Rates(), large, "Held out, with the rates that come with negpipe:")


if __name__ == "__main__":
    main()
