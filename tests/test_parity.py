"""The rows of other miners, from the same vectors: sentence-transformers itself, the others from their description.

Every case of sentence-transformers draws its own settings; texts and vectors come from a few small worlds in which
texts repeat, anchors have several positives, rows stand twice, and similarities fall below 0.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.data.texts import text_id

pytestmark = pytest.mark.parity

Floats = npt.NDArray[np.float32]
Table = list[dict[str, Any]]
FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
CASES = 252


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All draws with --torture and with -m parity; else every fifth, which has every format, loader and world."""
    if "drawn" in metafunc.fixturenames:
        full = metafunc.config.getoption("--torture") or "parity" in metafunc.config.getoption("-m")
        metafunc.parametrize("drawn", range(0, CASES, 1 if full else 5))


@dataclass(frozen=True)
class World:
    """Pairs of texts, a corpus, and a vector for each text."""

    seed: int
    folder: Path
    pairs: list[tuple[str, str]]
    corpus: list[str] | None
    vectors: dict[str, Floats]

    @classmethod
    def make(cls, seed: int, folder: Path) -> World:
        draw = np.random.default_rng(seed)
        documents = [f"document {i}" for i in range((40, 4, 90, 12)[seed % 4])]
        anchors = [f"anchor {i}" for i in range(int(draw.integers(3, 10)))]
        pairs = [
            (anchor, document)
            for anchor in anchors
            for document in draw.choice(documents, min(len(documents) - 1, int(draw.integers(1, 5))), replace=False)
        ]
        pairs += [pairs[int(i)] for i in draw.integers(0, len(pairs), 3)]
        pairs = [(str(a), str(p)) for a, p in draw.permutation(pairs)]
        # An anchor's text may stand in the corpus, and a positive may be missing from it.
        corpus = [*(str(d) for d in draw.permutation([*documents, *documents[:3]])[1:]), anchors[0]]
        dimension = int(draw.integers(8, 17))
        shift = draw.standard_normal(dimension) * (seed % 3)
        vectors = {text: draw.standard_normal(dimension) + shift for text in [*documents, *anchors]}
        for anchor, positive in pairs:  # most are near, some are not
            vectors[anchor] = vectors[anchor] + draw.choice([1, 0.5, 0]) * vectors[positive]
        units = {text: (row / np.linalg.norm(row)).astype(np.float32) for text, row in vectors.items()}
        world = cls(seed, folder, pairs, corpus if seed % 2 else None, units)
        world.write()
        return world

    def write(self) -> None:
        self.folder.mkdir()
        rows = [{"anchor": anchor, "positive": positive} for anchor, positive in self.pairs]
        (self.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.folder / "corpus.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in self.corpus or ())
        )
        table = pa.table({"id": [text_id(text) for text in self.vectors], "vector": list(self.vectors.values())})
        pq.write_table(table.cast(pa.schema({"id": pa.string(), "vector": pa.list_(pa.float32())})), self.file)

    @property
    def file(self) -> Path:
        return self.folder / "vectors.parquet"

    def mine(self, mining: dict[str, Any], output: dict[str, Any] | None = None, **settings: Any) -> Table:
        """The rows of the whole pipeline."""
        config = {
            "run_dir": str(self.folder / "run"),
            "data": {
                "format": "pairs",
                "path": str(self.folder / "pairs.jsonl"),
                "corpus": str(self.folder / "corpus.jsonl") if self.corpus else None,
                "part_rows": 7,
            },
            "encoder": {
                "backend": "precomputed",
                "corpus_vectors": str(self.file),
                "anchor_vectors": str(self.file),
                "storage": "float32",
            },
            "index": {"kind": "stream"},
            "executor": {"kind": "inline"},
            "resources": {"cpus": 1},
            "mining": mining,
            "output": {"min_rows": 0, **(output or {})},
            **settings,
        }
        result = graph.mine(load_config(config))
        return [
            row
            for path in sorted(result.triplets.glob("*.parquet"))
            for row in pq.read_table(path, use_threads=False).to_pylist()
        ]


class Model:
    """What sentence-transformers asks of a model, with vectors that are given."""

    device = "cpu"

    def __init__(self, vectors: dict[str, Floats]) -> None:
        self.vectors = vectors

    def encode_document(self, texts: list[str], **_: Any) -> Floats:
        return np.stack([self.vectors[text] for text in texts])

    encode_query = encode_document

    def get_embedding_dimension(self) -> int:
        return len(next(iter(self.vectors.values())))

    def similarity(self, one: Floats, other: Floats) -> Any:
        from sentence_transformers.util import cos_sim

        return cos_sim(one, other)

    def similarity_pairwise(self, one: Floats, other: Floats) -> Any:
        from sentence_transformers.util import pairwise_cos_sim

        return pairwise_cos_sim(one, other)


@dataclass(frozen=True)
class Case:
    """One call of `mine_hard_negatives`."""

    number: int

    @cached_property
    def settings(self) -> dict[str, Any]:
        draw = np.random.default_rng(1000 + self.number)

        def some(*values: Any) -> Any:
            return values[int(draw.integers(len(values)))]

        first, count = some(0, 0, 0, 1, 3), some(1, 2, 3, 5)
        return {
            "range_min": first,
            "range_max": some(None, None, first + count, first + count + 4, 60),
            "num_negatives": count,
            "absolute_margin": some(None, None, None, 0.0, 0.05, -0.2),
            "relative_margin": some(None, None, 0.05, 0.2, 0.0),
            "max_score": some(None, None, None, None, 0.3, 0.8),
            "min_score": some(None, None, None, None, -0.2, 0.1),
        }

    @property
    def output(self) -> dict[str, Any]:
        return {"format": FORMATS[self.number % 4], "scores": bool(self.number // 4 % 2), "ids": False, "ranks": False}

    @property
    def use_faiss(self) -> bool:
        return bool(self.number // 8 % 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for work of this size only get in each other's way."""
    import faiss
    import torch

    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:  # nothing here is to survive a power cut
        patch.setattr(os, "fsync", lambda handle: None)
        yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[World]:
    folder = tmp_path_factory.mktemp("worlds")
    return [World.make(seed, folder / str(seed)) for seed in range(9)]


def peer(world: World, **arguments: Any) -> Table:
    """The rows of sentence-transformers."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    dataset = Dataset.from_dict({"anchor": [a for a, _ in world.pairs], "positive": [p for _, p in world.pairs]})
    mined = mine_hard_negatives(dataset, Model(world.vectors), corpus=world.corpus, verbose=False, **arguments)
    rows: Table = mined.to_list()
    return rows


def peer_of(world: World, case: Case) -> Table:
    output = {"output_format": case.output["format"], "output_scores": case.output["scores"]}
    return peer(world, **case.settings, **output, use_faiss=case.use_faiss)


def agree(ours: Table, theirs: Table, scores: bool) -> None:
    """The same rows in the same order; where scores are asked for, the same to 1e-5."""
    assert len(ours) == len(theirs)
    for one, other in zip((as_theirs(row, scores) for row in ours), theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if name in ("score", "scores"):
                assert one[name] == pytest.approx(value, abs=1e-5)
            else:
                assert one[name] == value, name


def as_theirs(row: dict[str, Any], scores: bool) -> dict[str, Any]:
    """A row with the columns that sentence-transformers has: labels or scores, those of a triplet in one list."""
    row = dict(row)
    if "positive_score" in row:
        row["scores"] = [row.pop("positive_score"), row.pop("negative_score")]
    return {name: value for name, value in row.items() if not (scores and name in ("label", "labels"))}


@pytest.mark.guarantee(
    "`mining.compat: sentence-transformers`",
    "the rows of its `mine_hard_negatives` on the same vectors",
    section="rows",
)
@pytest.mark.torture
def test_sentence_transformers(worlds: list[World], drawn: int) -> None:
    # Earlier versions fail if there are fewer documents than they search for, and have other rules.
    pytest.importorskip("sentence_transformers", minversion="5.7")
    case, world = Case(drawn), worlds[drawn % 9]
    ours = world.mine({"compat": "sentence-transformers", **case.settings}, case.output, search={"depth": 192})
    try:
        theirs = peer_of(world, case)
    except ZeroDivisionError:  # it takes shares of the candidates that are left, also where none is
        assert not [row for row in ours if row.get("label") != 1]
        return
    agree(ours, theirs, case.output["scores"])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_sentence_transformers_draws(worlds: list[World], number: int) -> None:
    world, arguments = worlds[2 * number], {"range_max": 12, "relative_margin": 0.1}
    eligible = negatives(peer(world, num_negatives=12, use_faiss=bool(number % 2), **arguments))
    drawing = {"compat": "sentence-transformers", "sampling_strategy": "random", **arguments}
    draws = [negatives(world.mine({**drawing, "num_negatives": 2}, seed=seed)) for seed in range(6)]
    for drawn in draws:
        assert {anchor: len(found) for anchor, found in drawn.items()} == {
            anchor: min(2, len(found)) for anchor, found in eligible.items()
        }
        assert all(drawn[anchor] <= found for anchor, found in eligible.items())
    if any(len(found) > 2 for found in eligible.values()):
        assert any(one != other for one, other in itertools.combinations(draws, 2))
    assert negatives(world.mine({**drawing, "num_negatives": 12})) == eligible


def negatives(rows: Table) -> dict[str, set[str]]:
    """Negatives by anchor."""
    return {row["anchor"]: {other["negative"] for other in rows if other["anchor"] == row["anchor"]} for row in rows}


# --- miners that are not installed: from what their descriptions say they do --------------------


@dataclass(frozen=True)
class Ranked:
    """An anchor with its positives and all documents, best first."""

    anchor: str
    positives: list[str]
    documents: list[tuple[float, str]]

    @property
    def positive_scores(self) -> list[float]:
        return [score for score, document in self.documents if document in self.positives]


def ranked(world: World) -> list[Ranked]:
    documents = dict.fromkeys([*(world.corpus or ()), *(positive for _, positive in world.pairs)])
    return [
        Ranked(
            anchor,
            list(dict.fromkeys(positive for other, positive in world.pairs if other == anchor)),
            sorted(((float(world.vectors[anchor] @ world.vectors[text]), text) for text in documents), reverse=True),
        )
        for anchor in dict.fromkeys(anchor for anchor, _ in world.pairs)
    ]


@pytest.mark.slow
@pytest.mark.guarantee(
    "`mining.compat: flagembedding`",
    "the rows of an independent program in the test, written from its `hn_mine`",
    section="rows",
)
@pytest.mark.parametrize("number", range(9))
def test_flagembedding(worlds: list[World], number: int) -> None:
    """hn_mine: a window of raw ranks, positives and the query out, a draw of the rest, filled from the corpus."""
    world = worlds[number]
    settings = {"compat": "flagembedding", "range_min": 2, "range_max": 14, "num_negatives": 5}
    rows = world.mine(settings, seed=number)
    found = {(row["anchor"], row["source"]): set[str]() for row in rows}
    for row in rows:
        found[row["anchor"], row["source"]].add(row["negative"])
    for one in ranked(world):
        outside = {*one.positives, one.anchor}
        window = {text for _, text in one.documents[2:14]} - outside
        mined, filled = (found.get((one.anchor, source), set()) for source in ("mined", "random"))
        assert len(mined) == min(5, len(window))
        assert mined <= window
        everything = {text for _, text in one.documents} - outside
        assert len(filled) == min(5, len(everything)) - len(mined)
        assert filled <= everything - mined
    drawn = [world.mine(settings, seed=seed) for seed in (0, 1, 2)]
    if any(len(one.documents) > 20 for one in ranked(world)):
        assert drawn[0] != drawn[1] or drawn[0] != drawn[2]


@pytest.mark.guarantee(
    "`mining.compat: nemo`",
    "the rows of an independent program in the test, written from its source",
    section="rows",
)
@pytest.mark.parametrize("number", range(9))
def test_nemo(worlds: list[World], number: int) -> None:
    """Positives masked by id, then everything above 0.95 of the lowest positive score, then the top."""
    world, count = worlds[number], 6
    rows = world.mine({"compat": "nemo", "num_negatives": count})
    expected = []
    for one in ranked(world):
        lowest = min(one.positive_scores)
        cutoff = 0.95 * lowest if lowest > 0 else lowest - 0.05 * abs(lowest)  # its own is not sign-safe
        passed = [text for score, text in one.documents if text not in one.positives and score <= cutoff]
        expected += [(one.anchor, positive, text) for positive in one.positives for text in passed[:count]]
    assert [(row["anchor"], row["positive"], row["negative"]) for row in rows] == expected


@pytest.mark.guarantee(
    "`mining.compat: nv-retriever`",
    "the rows of an independent program in the test",
    section="rows",
)
@pytest.mark.parametrize("number", range(9))
def test_nv_retriever(worlds: list[World], number: int) -> None:
    """TopK-PercPos: for each pair, the top of what scores below 95 % of its positive."""
    world, count = worlds[number], 4
    rows = world.mine({"compat": "nv-retriever", "num_negatives": count})
    expected = []
    for one in ranked(world):
        scores = {text: score for score, text in one.documents}
        for positive in one.positives:
            own = scores[positive]
            cutoff = 0.95 * own if own > 0 else own - 0.05 * abs(own)
            passed = [text for score, text in one.documents if text not in one.positives and score < cutoff]
            expected += [(one.anchor, positive, text) for text in passed[:count]]
    assert [(row["anchor"], row["positive"], row["negative"]) for row in rows] == expected
