"""Draws the figures of the concept pages from a finished run of the quickstart: `python scripts/docs_figures.py`.

`make mine` makes the run, in runs/quickstart. The figures are docs/images/margins.svg, windows.svg and recall.svg.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
RUN, IMAGES = ROOT / "runs" / "quickstart", ROOT / "docs" / "images"
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


def main() -> None:
    found = candidates()
    drawings: dict[str, Callable[[Any], None]] = {
        "margins": lambda axes: margins(axes, *found),
        "windows": lambda axes: windows(axes, *found),
        "recall": recall,
    }
    for name, draw in drawings.items():
        figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
