"""Small BEIR folders: one full of traps with real sentences, one large enough to cut into many parts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

_WORDS = [
    *("the", "of", "and", "to", "in", "is", "that", "for", "as", "return", "list", "file", "name", "text", "error"),
    *("river", "stone", "house", "wind", "green", "paper"),
]
_WIDE = str.maketrans("0123456789", "０１２３４５６７８９")


def write_folder(
    folder: Path,
    documents: Iterable[tuple[str, str, str]],
    queries: Iterable[tuple[str, str]],
    qrels: dict[str, list[tuple[str, str, int]]],
) -> Path:
    """Write (id, title, text) documents, (id, text) queries and (query, document, grade) judgments by split."""
    (folder / "qrels").mkdir(parents=True)
    rows = {
        "corpus": [{"_id": name, "title": title, "text": text} for name, title, text in documents],
        "queries": [{"_id": name, "text": text} for name, text in queries],
    }
    for name, objects in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for split, judgments in qrels.items():
        lines = "".join(f"{query}\t{document}\t{grade}\n" for query, document, grade in judgments)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines, encoding="utf-8")
    return folder


def tricky_folder(folder: Path, *, appended: bool = True) -> Path:
    """293 documents (263 without the appended ones), 102 train anchors, and every trap the exclusions are for.

    e0 to e14 have the texts of d0 to d14; v15 to v24 those of d15 to d24 in other case, spaces and digits; s0 to s4
    equal queries, s5 to s7 but for case. q100 is q30 in capitals, q101 equals q31, q102 (test only) is q32 in
    capitals. q0 to q9 have more positives in test, q60 to q74 know theirs by the duplicate's id.
    """
    draw = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(draw.choices(_WORDS, k=words))

    queries = [(f"q{i}", f"{sentence(6)} {i}") for i in range(100)]
    queries += [("q100", shouted(queries[30][1])), ("q101", queries[31][1]), ("q102", shouted(queries[32][1]))]
    queries += [(f"q{i}", f"{sentence(5)} {i}") for i in range(103, 110)]

    def about(query: int, number: int) -> str:
        words = queries[query][1].split()
        return " ".join([*draw.sample(words, 4), sentence(draw.randint(1, 12)), str(number)])

    originals = [(f"d{i}", f"name {i}" if i % 4 else "", about(i % 100, i)) for i in range(230)]
    documents = [*originals]
    documents += [(f"e{i}", *originals[i][1:]) for i in range(15)]
    documents += [(f"v{i}", shouted(originals[i][1]), shouted(originals[i][2])) for i in range(15, 25)]
    documents += [(f"s{i}", "", shouted(text) if i > 4 else text) for i, (_, text) in enumerate(queries[:8])]
    if appended:
        documents += [(f"n{i}", "", f"{about(i, i)} new") for i in range(30)]

    train = [(f"q{i}", f"d{i}", 1) for i in range(100) if not 60 <= i < 75]
    train += [(f"q{i}", f"e{i - 60}", 2) for i in range(60, 75)]
    train += [(f"q{i}", f"d{100 + i}", 1) for i in range(0, 100, 3)]
    train += [(f"q{i}", f"e{i}", 1) for i in range(5)]
    train += [(f"q{i}", f"d{(i + 77) % 230}", 0) for i in range(0, 100, 7)]
    train += [("q100", "d220", 1), ("q101", "d221", 1)]
    test = [(f"q{i}", f"d{100 + i}", 1) for i in range(10)] + [(f"q{i}", f"d{100 + i}", 1) for i in range(102, 106)]
    return write_folder(folder, documents, queries, {"train": train, "test": test})


def shouted(text: str) -> str:
    """The same text to a reader who ignores case, white space and the width of digits."""
    return text.upper().replace(" ", " \t ").translate(_WIDE)


def numbered_folder(folder: Path, documents: int, anchors: int, *, seed: int = 0, dimension: int = 16) -> Path:
    """Document i and query i of a number in words, one positive each, with vectors in corpus.npy and queries.npy."""
    write_folder(
        folder,
        [(f"d{i}", "", f"document number {i}") for i in range(documents)],
        [(f"q{i}", f"query number {i}") for i in range(anchors)],
        {"train": [(f"q{i}", f"d{i}", 1) for i in range(anchors)]},
    )
    write_vectors(folder, documents, anchors, seed=seed, dimension=dimension)
    return folder


def write_vectors(folder: Path, documents: int, anchors: int, *, seed: int, dimension: int = 16) -> None:
    """Vectors for such a folder: a query lies near its document."""
    draw = np.random.default_rng(seed)
    corpus = draw.standard_normal((documents, dimension)).astype(np.float32)
    np.save(folder / "corpus.npy", corpus)
    np.save(folder / "queries.npy", corpus[:anchors] + draw.standard_normal((anchors, dimension)).astype(np.float32))


def precomputed_config(run_dir: Path, folder: Path) -> dict[str, Any]:
    """A config for such a folder and its vectors, with parts of about 16 rows."""
    return {
        "run_dir": str(run_dir),
        "data": {"path": str(folder), "part_rows": 16},
        "encoder": {
            "backend": "precomputed",
            "corpus_vectors": str(folder / "corpus.npy"),
            "anchor_vectors": str(folder / "queries.npy"),
        },
        "mining": {"range_max": 40},
        "executor": {"kind": "local", "workers": 1},
    }
