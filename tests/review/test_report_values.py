"""Every number that report.html shows, computed again from the files of the run, without the package's own readers."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small
from beir_data import precomputed_config, tricky_folder, write_vectors
from real_runs import STAGES, Run

from negpipe.config.file import load_config
from negpipe.review import report as reports
from negpipe.review.report import sample

pytestmark = pytest.mark.guarantee(
    "the report shows the stages, a figure, a review row",
    "its numbers, bars and marks are what the run's files contain",
    section="input",
)

DEPTH, RANDOM_EACH = 64, 5


@dataclass
class Mined:
    """A run, its training rows, and its page."""

    run: Run
    config: Path
    page: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for path in self.run.paths("triplets", "rows") for row in pq.read_table(path).to_pylist()]

    def figure(self, title: str) -> str:
        found = re.findall(r"<figure.*?</figure>", self.page, re.DOTALL)
        return str(next(one for one in found if f">{title}</h3>" in one))


@dataclass
class Anchor:
    """What the run found for an anchor: score and rank of each positive and negative, by id."""

    text: str = ""
    positives: dict[str, tuple[float, int | None]] = field(default_factory=dict)
    negatives: dict[str, tuple[float, int | None, str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Mined:
    """Anchors with several positives, shared words, random negatives, and many reasons to drop."""
    folder = tmp_path_factory.mktemp("valued")
    data = tricky_folder(folder / "beir")
    themed(data / "corpus.jsonl")
    counts = [len((data / f"{name}.jsonl").read_bytes().splitlines()) for name in ("corpus", "queries")]
    write_vectors(data, *counts, seed=7, dimension=8)
    run = Run(
        precomputed_config(folder / "run", data)
        | {
            "data": {"path": str(data), "part_rows": 40},
            "executor": {"kind": "inline"},
            "search": {"depth": DEPTH},
            "mining": {
                "range_min": 1,
                "range_max": 20,
                "num_negatives": 5,
                "num_random": 1,
                "relative_margin": None,
                "max_score": 0.7,
                "max_depth": None,
            },
        }
    )
    config = folder / "config.yaml"
    config.write_text(json.dumps(run.config), encoding="utf-8")
    outcome = small.run("mine", config)
    assert outcome.code == 0 and "report: failed" not in outcome.err, outcome.err
    return Mined(run, config, page_of(run))


def themed(corpus: Path) -> None:
    """Every document gets one of twelve words that no anchor has."""
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["text"] += f" theme{int(row['_id'][1:]) % 12}"
    small.write_rows(corpus, rows)


def page_of(run: Run) -> str:
    return (run.folder / "report.html").read_bytes().decode()


@pytest.fixture(scope="module")
def anchors(mined: Mined) -> dict[str, Anchor]:
    """Every anchor, from the parts of ingest, search and triplets."""
    names: dict[int, str] = {}
    for path in mined.run.files("index", "ids"):
        table = pq.read_table(path)
        names |= dict(zip(table["row"].to_pylist(), table["id"].to_pylist(), strict=True))
    found: dict[str, Anchor] = {}
    asked = mined.run.tables("anchors").select(["id", "text"]).to_pylist()
    stored = [row for path in mined.run.files("search") for row in pq.read_table(path).to_pylist()]
    for anchor, row in zip(asked, stored, strict=True):
        assert len(row["rows"]) == DEPTH
        ranks = {name: rank for rank, name in enumerate(row["rows"])}
        own = zip(row["positives"], row["positive_score_dense"], strict=True)
        positives = {names[one]: (score, ranks.get(one)) for one, score in own}
        found[anchor["id"]] = Anchor(anchor["text"], positives)
    for row in mined.rows:
        assert row["positive_score"] == found[row["anchor_id"]].positives[row["positive_id"]][0]
        about = (row["negative_score"], row["negative_rank"], row["source"])
        found[row["anchor_id"]].negatives[row["negative_id"]] = about
    assert max(len(anchor.positives) for anchor in found.values()) > 1
    assert {source for anchor in found.values() for *_, source in anchor.negatives.values()} == {"mined", "random"}
    return found


# --- what ran -----------------------------------------------------------------------------------------


def in_words(count: float) -> str:
    """Bytes for people, in steps of a thousand."""
    steps = min(4, max(0, (len(str(int(count))) - 1) // 3))
    unit = ("B", "kB", "MB", "GB", "TB")[steps]
    return f"{count / 1000**steps:.1f} {unit}" if steps else f"{int(count)} B"


def table_of(page: str) -> dict[str, list[str]]:
    """The cells of each stage's row."""
    (table,) = (one for one in re.findall(r"<table>.*?</table>", page, re.DOTALL) if ">peak memory<" in one)
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', table)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}


def expected_row(manifest: dict[str, Any]) -> list[str]:
    unit = {"encode": "texts", "search": "anchors", "triplets": "rows"}.get(manifest["stage"], "documents")
    count = manifest["stats"][unit if unit in ("texts", "anchors") else "rows"]
    parts = manifest["parts"]
    seconds = sum(part["provenance"]["seconds"] for part in parts)
    took = manifest["provenance"]["seconds"]
    return [
        f"{count:,} {unit}",
        str(len(parts)),
        in_words(sum(file["bytes"] for part in parts for file in part["files"])),
        f"{took:,.1f} s",
        f"{seconds:,.1f} s",
        f"{count / seconds:,.0f}" if seconds >= 0.1 else "–",
        in_words(max(part["provenance"]["peak_memory"] for part in parts)),
        re.sub(r"(.*)T(.*)\+00:00", r"\1 \2 UTC", manifest["provenance"]["finished"]),
    ]


def test_times_throughput_and_peak_memory_are_those_of_the_parts(mined: Mined, tmp_path: Path) -> None:
    assert table_of(mined.page) == {stage: expected_row(mined.run.manifest(stage)) for stage in STAGES}
    # Small runs are over too quickly to tell: the same with hours and gigabytes in the books.
    run = mined.run.copied(tmp_path / "run")
    for number, stage in enumerate(STAGES):
        manifest = run.manifest(stage)
        del manifest["digest"]
        for at, part in enumerate(manifest["parts"]):
            part["provenance"] |= {
                "seconds": 0.001 if stage == "index" else 1000.0**number / 3 + at,
                "peak_memory": 7 * 10 ** (5 + number) - at * 10**4,
            }
        manifest["provenance"]["seconds"] = 1000.0 * number + 0.25
        run.change_manifest(stage, manifest)
    outcome = small.run("report", mined.config, "--set", f"run_dir={run.folder}")
    assert outcome.code == 0, outcome.err
    shown = table_of(page_of(run))
    assert shown == {stage: expected_row(run.manifest(stage)) for stage in STAGES}
    assert [cells[5] == "–" for cells in shown.values()] == [False, False, True, False, False]
    assert [cells[6] for cells in shown.values()] == ["700.0 kB", "7.0 MB", "70.0 MB", "700.0 MB", "7.0 GB"]


# --- figures ------------------------------------------------------------------------------------------


def texts_of(figure: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r">([^<>\n]+)</text>", figure)]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def bars(figure: str, colour: str) -> list[list[tuple[float, float]]]:
    """Corners of every bar of a colour, in order."""
    return [points(path) for path in re.findall(rf'<path d="([^"]+)"[^>]*style="fill: var\(--{colour}\)"/>', figure)]


def check_bars(figure: str, colour: str, wanted: dict[str, int], *, lying: bool = False) -> None:
    """Names and numbers are written beside the bars, whose lengths are as the numbers."""
    texts = texts_of(figure)
    assert texts[-len(wanted) :] == [f"{count:,}" for count in wanted.values()]
    at = texts.index(next(iter(wanted)))
    assert texts[at : at + len(wanted)] == list(wanted)
    axis = 0 if lying else 1
    lengths = [max(one[axis] for one in bar) - min(one[axis] for one in bar) for bar in bars(figure, colour)]
    longest = max(wanted.values())
    assert lengths == pytest.approx([count / longest * max(lengths) for count in wanted.values()], abs=0.01)
    assert max(lengths) > 50


def test_the_figure_of_ranks(mined: Mined, anchors: dict[str, Anchor]) -> None:
    ranks = [rank for anchor in anchors.values() for _, rank in anchor.positives.values()]
    within = [rank for rank in ranks if rank is not None]
    wanted = {
        name: sum(low <= rank <= high for rank in within)
        for name, low, high in (("0", 0, 0), ("1-4", 1, 4), ("5-9", 5, 9), ("10-49", 10, 49), ("50-63", 50, 63))
    } | {"beyond": ranks.count(None)}
    assert min(wanted.values()) > 0
    figure = mined.figure("Rank of the positives")
    check_bars(figure, "green", wanted)
    first, beyond = (f"{wanted[name] / len(ranks):.1%}" for name in ("0", "beyond"))
    assert f"{first} of the positives are the nearest document, {beyond} are beyond rank {DEPTH}." in figure


def test_the_figure_of_negatives_an_anchor(mined: Mined, anchors: dict[str, Anchor]) -> None:
    counts = Counter(len(anchor.negatives) for anchor in anchors.values())
    figure = mined.figure("Negatives per anchor")
    check_bars(figure, "orange", {str(count): counts[count] for count in sorted(counts)})
    assert f"{counts[6] / len(anchors):.1%} of the anchors have all 6 requested." in figure


def test_the_figure_of_drops(mined: Mined) -> None:
    ledger = [row for path in mined.run.paths("triplets", "ledger") for row in pq.read_table(path).to_pylist()]
    sums = Counter({name: sum(row[name] for row in ledger) for name in ledger[0] if name.startswith("dropped_")})
    wanted = {name[8:].replace("_", " "): count for name, count in sums.most_common() if count}
    assert len(wanted) > 4
    figure = mined.figure("Candidates dropped, by reason")
    check_bars(figure, "blue", wanted, lying=True)
    seen, taken = (sum(row[name] for row in ledger) for name in ("candidates", "taken"))
    assert f"{seen:,} candidates seen, {taken:,} taken." in figure
    name, count = next(iter(wanted.items()))
    assert f"Most frequent drop reason: {name}, {count / seen:.1%}." in figure


def test_the_figure_and_the_table_of_hubs(mined: Mined, anchors: dict[str, Anchor]) -> None:
    counts = Counter(name for anchor in anchors.values() for name in anchor.negatives)
    ranges = [(2**power, 2 ** (power + 1) - 1) for power in range(max(counts.values()).bit_length())]
    wanted = {
        str(low) if low == high else f"{low}-{high}": sum(low <= count <= high for count in counts.values())
        for low, high in ranges
    }
    figure = mined.figure("Hubs")
    check_bars(figure, "orange", wanted)
    most = max(counts.values())
    assert f"{len(counts):,} documents are negatives; the most frequent one for {most} of {len(anchors)}" in figure
    (table,) = re.findall(
        r"<caption>Documents that are a negative for most anchors</caption>.*?</table>", mined.page, re.S
    )
    rows = [
        (int(count), html.unescape(name))
        for count, name in re.findall(r'<td class="n">(\d+)</td><td>(.*?)</td>', table)
    ]
    assert [count for count, _ in rows] == [count for _, count in counts.most_common(8)]
    assert all(counts[name] == count for count, name in rows) and len({name for _, name in rows}) == 8


def test_the_figure_of_scores(mined: Mined, anchors: dict[str, Anchor]) -> None:
    asked = np.concatenate([np.load(path) for path in mined.run.files("encode", "anchors")]).astype(np.float64)
    kinds = [path for kind in ("corpus", "added") for path in mined.run.files("encode", kind)]
    vectors = np.concatenate([np.load(path) for path in kinds]).astype(np.float64)
    drawn = np.random.default_rng(42).integers(len(vectors), size=RANDOM_EACH * len(asked))
    random = np.einsum("ij,ij->i", np.repeat(asked, RANDOM_EACH, axis=0), vectors[drawn])
    sides = {
        "green": [score for anchor in anchors.values() for score, _ in anchor.positives.values()],
        "orange": [score for anchor in anchors.values() for score, *_ in anchor.negatives.values()],
        "grey": random.astype(np.float32).tolist(),
        "blue": [
            min(score for score, _ in anchor.positives.values()) - score
            for anchor in anchors.values()
            for score, *_ in anchor.negatives.values()
        ],
    }
    figure, apart = mined.figure("Similarity"), mined.figure("Positive minus negative")
    assert texts_of(figure)[-3:] == ["positives", "negatives", "random pairs"]
    *means, difference = [f"{np.mean(values):.3f}" for values in sides.values()]
    assert "Mean scores: positives {}, negatives {}, random pairs {}.".format(*means) in figure
    above = np.mean([value < 0 for value in sides["blue"]])
    assert f"Mean {difference}. {above:.1%} of the selected negatives score above their positive." in apart
    lines = {}
    for colour, values in sides.items():
        outline = rf'<path d="([^"]+)" clip-path[^>]*style="fill: none; stroke: var\(--{colour}\)'
        (path,) = re.findall(outline, apart if colour == "blue" else figure)
        shape = points(path)
        # Up, along, up or down, along …, and back to where it began.
        steps = [(x, y) for (x, y), (_, after) in zip(shape[1::2], shape[2::2], strict=False) if y == after]
        borders, heights = [*[x for x, _ in steps], shape[-1][0]], [shape[0][1] - y for _, y in steps]
        counts, edges = np.histogram(values, bins=np.linspace(min(values), max(values), 21))
        assert len(heights) == 20
        lines[colour] = borders, heights, edges, counts / np.diff(edges) / len(values)
    (_, heights, _, density) = lines.pop("blue")  # on a scale of its own
    assert heights == pytest.approx(max(heights) / max(density) * density, abs=0.02 * max(heights))
    # One scale for the others: what it is, one of them tells.
    borders, heights, edges, density = lines["grey"]
    across, up = (borders[-1] - borders[0]) / (edges[-1] - edges[0]), max(heights) / max(density)
    left = borders[0] - across * edges[0]
    for colour, (borders, heights, edges, density) in lines.items():
        assert borders == pytest.approx(left + across * edges, abs=0.02), colour
        assert heights == pytest.approx(up * density, abs=0.02 * max(heights)), colour


# --- the rows to review -------------------------------------------------------------------------------

Pieces = list[tuple[str, str]]


@dataclass
class Shown:
    """A document as a card shows it."""

    score: str
    rank: str
    id: str
    pieces: Pieces

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def pieces(inner: str) -> Pieces:
    """Words that are marked, each with why, and what is between them."""
    found = re.split(r'<mark class="(\w+)">(.*?)</mark>', inner, flags=re.DOTALL)
    kinds = ["", *found[1::3]]
    texts = [(html.unescape(text), "") for text in found[0::3]]
    marked = [(html.unescape(text), kind) for text, kind in zip(found[2::3], kinds[1:], strict=True)]
    return [texts[0], *(piece for pair in zip(marked, texts[1:], strict=True) for piece in pair)]


DOCUMENT = re.compile(
    r'<div class="document( negative)?"><p class="about"><span>(.*?)</span><span>(.*?)</span><span>id (.*?)</span>'
    r'.*?</p><p class="text"[^>]*>(.*?)</p></div>',
    re.DOTALL,
)


def cards(page: str) -> dict[str, tuple[Pieces, list[Shown], list[Shown]]]:
    """Anchor id → the anchor, its positives and its negatives, as they are shown."""
    shown = {}
    for article in re.findall(r'<article class="card".*?</article>', page, re.DOTALL):
        (name,) = re.findall(r"<span>anchor (.*?)</span>", article)
        (anchor,) = re.findall(r"<h3[^>]*>(.*?)</h3>", article, re.DOTALL)
        sides: tuple[list[Shown], list[Shown]] = [], []
        for negative, score, rank, document, text in DOCUMENT.findall(article):
            sides[bool(negative)].append(Shown(score, rank, html.unescape(document), pieces(text)))
        shown[html.unescape(name)] = (pieces(anchor), *sides)
    return shown


def test_scores_and_ranks_of_the_rows_to_review(mined: Mined, anchors: dict[str, Anchor]) -> None:
    shown = cards(mined.page)
    assert len(shown) == 50
    seen = Counter[str]()
    for name, (_, positives, negatives) in shown.items():
        wanted = [
            (f"{score:.3f}", "beyond the depth" if rank is None else f"rank {rank}", document)
            for document, (score, rank) in anchors[name].positives.items()
        ]
        assert sorted((one.score, one.rank, one.id) for one in positives) == sorted(wanted)
        found = [
            (f"{score:.3f}", "random" if source == "random" else f"rank {rank}", document)
            for document, (score, rank, source) in anchors[name].negatives.items()
        ]
        assert sorted((one.score, one.rank, one.id) for one in negatives) == sorted(found)
        for side in (positives, negatives):
            assert [one.score for one in side] == sorted((one.score for one in side), key=float, reverse=True)
        seen.update(one.rank.split()[0] for one in (*positives, *negatives))
    assert min(seen[kind] for kind in ("rank", "random", "beyond")) > 5


def test_the_positive_that_margins_are_measured_from_is_always_shown(
    mined: Mined, anchors: dict[str, Anchor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_POSITIVES", 1)
    page = reports.write(load_config(mined.config), tmp_path / "report.html").read_text("utf-8")
    several = 0
    for name, (_, (positive,), _) in cards(page).items():
        lowest = min(score for score, _ in anchors[name].positives.values())
        assert positive.score == f"{lowest:.3f}"
        several += len(anchors[name].positives) > 1
    assert several and page.count("<span>margins are measured from it</span>") == several
    assert len(re.findall(r"<h4>Positive, \d+ more not shown</h4>", page)) == several


def test_words_in_common_are_marked_on_the_page(mined: Mined, anchors: dict[str, Anchor]) -> None:
    def words(text: str) -> set[str]:
        return {word.casefold() for word in re.split(r"\W+", text) if word}

    texts = {row[f"{side}_id"]: row[side] for row in mined.rows for side in ("positive", "negative")}
    counts = Counter(word for text in texts.values() for word in words(text))
    usual = {word for word, count in counts.items() if count > len(texts) / 5}
    assert usual, "words that nearly every text has are not marked"
    seen = Counter[str]()
    for name, (anchor, positives, negatives) in cards(mined.page).items():
        assert "".join(text for text, _ in anchor) == anchors[name].text
        assert all(one.text == texts[one.id] for one in (*positives, *negatives))
        own = words(anchors[name].text) - usual
        right, wrong = (set().union(*(words(one.text) for one in side)) - usual for side in (positives, negatives))
        check_marks(anchor, own & (right | wrong), set())
        for one in positives:
            check_marks(one.pieces, own, right & wrong)
        for one in negatives:
            check_marks(one.pieces, own, right)
        seen.update(kind for one in (*positives, *negatives) for _, kind in one.pieces)
    assert seen["anchor"] > 50 and seen["positive"] > 50


def check_marks(found: Pieces, anchor: set[str], positive: set[str]) -> None:
    """What is marked is one word, every word that is to be is marked, and as what it is."""
    assert all(re.fullmatch(r"\w+", text) for text, kind in found if kind)
    split = [(word.casefold(), kind) for text, kind in found for word in re.findall(r"\w+", text)]
    assert split == [
        (word, "anchor" if word in anchor else "positive" if word in positive else "") for word, _ in split
    ]
