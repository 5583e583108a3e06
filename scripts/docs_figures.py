"""Draws the figures of the concept pages: `python scripts/docs_figures.py [NAME …]`.

margins, windows and recall are from a finished run of the quickstart, which `make mine` makes in runs/quickstart;
restarts and determinism from small runs on its data, whose texts are cut at 32 tokens (some minutes).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from matplotlib import pyplot as plt

import negpipe

ROOT = Path(__file__).parents[1]
RUN, IMAGES = ROOT / "runs" / "quickstart", ROOT / "docs" / "images"
SHORT = ["encoder.passage_max_length=32", "encoder.query_max_length=32", "data.part_rows=200", "executor.kind=inline"]
STAGES = ("ingest", "encode", "index", "search", "triplets")
MARGIN, WINDOW, LISTS = 0.05, 100, 32
Floats = npt.NDArray[np.float32]

mpl.rcParams.update({"svg.hashsalt": "negpipe", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})


def candidates() -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """(n, k) scores, (n,) lowest scores of the positives, (n, k) which candidates are positives."""
    table = pq.read_table(sorted((RUN / "search").glob("*.parquet")))
    scores = np.array(table["score_dense"].to_pylist(), np.float32)
    lowest = np.array([min(one) for one in table["positive_score_dense"].to_pylist()], np.float32)
    known = zip(table["rows"].to_pylist(), table["positives"].to_pylist(), strict=True)
    return scores, lowest, np.array([[row in positives for row in rows] for rows, positives in known])


def margins(axes: Any, scores: Floats, lowest: Floats, known: npt.NDArray[np.bool_]) -> None:
    """Scores of the first ranks, relative to the positive's: what a margin drops."""
    relative = scores / lowest[:, None]
    bins = np.arange(0.4, 1.5, 0.025)
    for first, last, color in ((0, 10, "#c2560c"), (10, 50, "#0b7f5b"), (50, 192, "#7a8594")):
        chosen = relative[:, first:last][~known[:, first:last]]
        label = f"ranks {first} to {last - 1}"
        axes.hist(
            chosen, bins, weights=np.full(len(chosen), 100 / len(chosen)), histtype="step", color=color, label=label
        )
    axes.axvline(1 - MARGIN, color="black", lw=1)
    axes.annotate(
        "dropped by a margin of 5 %", (1 - MARGIN, axes.get_ylim()[1] * 0.92), xytext=(4, 0), textcoords="offset points"
    )
    axes.set(xlabel="candidate's score, of the lowest positive's", ylabel="% of the candidates")
    axes.legend(frameon=False, loc="center right")


def windows(axes: Any, scores: Floats, lowest: Floats, known: npt.NDArray[np.bool_]) -> None:
    """How scores fall with the rank, beside the positives' and the window."""
    ranks = np.arange(scores.shape[1])
    low, middle, high = np.nanquantile(np.where(known, np.nan, scores), [0.25, 0.5, 0.75], axis=0)
    axes.axvspan(0, WINDOW, color="#0b63b8", alpha=0.08, label=f"window of the quickstart, ranks 0 to {WINDOW - 1}")
    axes.fill_between(ranks, low, high, color="#c2560c", alpha=0.3, lw=0, label="candidates, middle half")
    axes.plot(ranks, middle, color="#c2560c", label="candidates, median")
    axes.axhline(np.median(lowest), color="#0b7f5b", label="positives, median")
    axes.set(xlabel="rank, before anything is left out", ylabel="score", xlim=(0, len(ranks) - 1))
    axes.legend(frameon=False)


def recall(axes: Any, depth: int = 100) -> None:
    """What an approximate search finds, of 100, by the lists it looks into."""
    import faiss

    stored = faiss.read_index(str(next((RUN / "index").glob("*.faiss"))))
    corpus = stored.reconstruct_n(0, stored.ntotal)
    parts = json.loads((RUN / ".negpipe/encode/manifest.json").read_text(encoding="utf-8"))["parts"]
    files = [RUN / part["files"][0]["path"] for part in parts if part["kind"] == "anchors"]
    anchors = np.concatenate([np.load(file) for file in files]).astype(np.float32)
    exact = np.argsort(-(anchors @ corpus.T), axis=1)[:, :depth]
    index = faiss.index_factory(corpus.shape[1], f"IVF{LISTS},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(corpus)
    index.add(corpus)
    probes = [1, 2, 4, 8, 12, 16, 24, LISTS]
    shares = []
    for index.nprobe in probes:
        found = index.search(anchors, depth)[1]
        shares.append(
            [np.mean([len({*a[:k]} & {*b}) / k for a, b in zip(exact, found, strict=True)]) for k in (10, depth)]
        )
    axes.plot(probes, [100 * one for one, _ in shares], "o-", color="#0b63b8", label="of the nearest 10")
    axes.plot(probes, [100 * all_ for _, all_ in shares], "o-", color="#c2560c", label=f"of the nearest {depth}")
    axes.axhline(98, color="black", lw=1)
    axes.annotate("index.min_recall, by default", (LISTS, 98), xytext=(-2, -12), ha="right", textcoords="offset points")
    axes.set(xlabel=f"lists looked into, of {LISTS}", ylabel="recall, %")
    axes.legend(frameon=False, loc="lower right")


def _short(folder: Path, *overrides: str) -> negpipe.Run:
    """A run of the quickstart's data in a folder, its texts cut."""
    places = [f"run_dir={folder / 'run'}", f"data.path={folder / 'data'}"]
    return negpipe.Run(ROOT / "configs/quickstart.yaml", [*places, *SHORT, *overrides], progress=False)


def _parts(run: negpipe.Run) -> dict[str, set[str]]:
    """The files of the current parts of each stage."""
    books = {stage: json.loads((run.path / f".negpipe/{stage}/manifest.json").read_text()) for stage in STAGES}
    return {stage: {file["path"] for part in book["parts"] for file in part["files"]} for stage, book in books.items()}


def restarts(axes: Any) -> None:
    """Which share of each stage's files is computed again, by what has changed since the last run."""

    def edit(corpus: Path) -> None:
        lines = corpus.read_text(encoding="utf-8").splitlines()
        lines[1000] = json.dumps(json.loads(lines[1000]) | {"text": "def edited(): pass"})
        corpus.write_text("\n".join(lines), encoding="utf-8")

    def append(corpus: Path) -> None:
        with corpus.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"_id": f"n{n}", "title": "new", "text": f"def new_{n}(): pass"}) + "\n" for n in range(100)
            )

    changes: dict[str, tuple[Callable[[Path], None], list[str]]] = {
        "nothing": (lambda corpus: None, []),
        "another margin": (lambda corpus: None, ["mining.relative_margin=0.1"]),
        "1 document edited": (edit, []),
        "100 documents added": (append, []),
        "passage_max_length": (lambda corpus: None, ["encoder.passage_max_length=24"]),
    }
    shares = np.zeros((len(changes), len(STAGES)))
    for row, (change, overrides) in enumerate(changes.values()):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(ROOT / "data/quickstart", folder / "data")
            _short(folder).mine()
            there = {str(path.relative_to(folder / "run")) for path in (folder / "run").rglob("*") if path.is_file()}
            change(folder / "data/corpus.jsonl")
            run = _short(folder, *overrides)
            run.mine()
            shares[row] = [100 * len(files - there) / len(files) for files in _parts(run).values()]
    axes.imshow(shares, cmap="Oranges", vmin=0, vmax=160, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0f} %" if share else "–", ha="center", va="center")
    axes.set_xticks(range(len(STAGES)), STAGES)
    axes.set_yticks(range(len(changes)), changes)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("share of a stage's files that is computed again, by what has changed", loc="left", fontsize=9)


def determinism(axes: Any) -> None:
    """By how much scores differ between runs: not at all with the same settings, in their last digits with others."""
    runs = {
        "again, in one worker instead of inline": ["executor.kind=local"],
        "batch_size 8 instead of 32": ["encoder.batch_size=8"],
        "storage float32 instead of float16": ["encoder.storage=float32"],
    }

    def scores(*overrides: str) -> dict[tuple[str, str], float]:
        with tempfile.TemporaryDirectory() as name:
            shutil.copytree(ROOT / "data/quickstart", Path(name) / "data")
            run = _short(Path(name), *overrides)
            run.mine(only="ingest"), run.mine(only="encode"), run.mine(only="index"), run.mine(only="search")
            found = run.candidates().to_pydict()
        return dict(zip(zip(found["anchor_id"], found["document_id"], strict=True), found["score"], strict=True))

    usual = scores()
    bins = np.logspace(-9, -2, 57)
    for (label, overrides), color in zip(runs.items(), ("#0b7f5b", "#0b63b8", "#c2560c"), strict=True):
        other = scores(*overrides)
        both = [abs(other[pair] - score) for pair, score in usual.items() if pair in other]
        same = 100 * np.mean([difference == 0 for difference in both])
        shares: dict[str, Any] = {"weights": np.full(len(both), 100 / len(both)), "histtype": "step", "color": color}
        axes.hist(both, bins, label=f"{label}: {same:.0f} % of the scores are the same", **shares)
    axes.set(xscale="log", xlabel="difference between a candidate's scores in two runs", ylabel="% of the candidates")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.5)
    axes.legend(frameon=False, loc="upper left")


def main() -> None:
    found = candidates()
    drawings: dict[str, Callable[[Any], None]] = {
        "margins": lambda axes: margins(axes, *found),
        "windows": lambda axes: windows(axes, *found),
        "recall": recall,
        "restarts": restarts,
        "determinism": determinism,
    }
    for name in sys.argv[1:] or drawings:
        draw = drawings[name]
        figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
