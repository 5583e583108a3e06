"""What mining a BEIR folder should give, in plain Python from the files and the stored vectors.

Shares no code with the package: texts are joined and merged here, scores are float64 dot products, and
`oracle_mining` judges one candidate at a time.
"""

from __future__ import annotations

import csv
import hashlib
import json
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle_mining

DEFAULT_RULES = {
    "range_min": 0,
    "range_max": 192,
    "rank_over": "survivors",
    "num_negatives": 3,
    "sampling_strategy": "top",
    "absolute_margin": None,
    "relative_margin": 0.05,
    "max_score": None,
    "min_score": None,
    "on_shortage": "keep",
    "strict": False,
}


def normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def id_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass
class Source:
    """A BEIR folder as read here: rows are distinct texts in order of appearance."""

    texts: list[str] = field(default_factory=list)
    ids: list[list[str]] = field(default_factory=list)
    queries: dict[str, str] = field(default_factory=dict)
    judged: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Source:
        source = cls()
        rows: dict[str, int] = {}
        for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            text = f"{document['title']} {document['text']}".strip()
            if text not in rows:
                rows[text] = len(rows)
                source.texts.append(text)
                source.ids.append([])
            source.ids[rows[text]].append(document["_id"])
        for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines():
            query = json.loads(line)
            source.queries[query["_id"]] = query["text"].strip()
        for path in sorted((folder / "qrels").glob("*.tsv")):
            with path.open(encoding="utf-8", newline="") as file:
                source.judged[path.stem] = [
                    (row["query-id"], row["corpus-id"])
                    for row in csv.DictReader(file, delimiter="\t")
                    if float(row["score"]) >= 1
                ]
        return source

    def row(self, document: str) -> int:
        return next(row for row, ids in enumerate(self.ids) if document in ids)

    def positives(self, query: str, split: str) -> list[int]:
        """Rows of the query's positives in a split, in order of judgment."""
        return list(dict.fromkeys(self.row(document) for asker, document in self.judged[split] if asker == query))

    def known(self, query: str) -> set[str]:
        """Documents that answer the query in any split."""
        return {document for judgments in self.judged.values() for asker, document in judgments if asker == query}

    def anchors(self, split: str) -> list[str]:
        return [query for query in self.queries if self.positives(query, split)]

    def reasons(self, query: str) -> list[set[str]]:
        """Every exclusion that holds for each row."""
        own = self.known(query)
        asked = normalized(self.queries[query])
        twins = {other for other, text in self.queries.items() if normalized(text) == asked} - {query}
        shared = {document for twin in twins for document in self.known(twin)}
        texts = {group: {normalized(self.texts[self.row(d)]) for d in ids} for group, ids in ((0, own), (1, shared))}
        found = []
        for ids, text in zip(self.ids, self.texts, strict=True):
            holds = {
                "POSITIVE_ID": ids[0] in own,
                "POSITIVE_TEXT": any(name in own for name in ids[1:]),
                "POSITIVE_NORMALIZED": normalized(text) in texts[0],
                "SHARED_ANCHOR": normalized(text) in texts[1],
                "ANCHOR_TEXT": normalized(text) == asked,
            }
            found.append({name for name, true in holds.items() if true})
        return found


@dataclass
class Expected:
    """Rows without scores, scores of those rows, and the fates of every candidate by anchor."""

    rows: list[tuple[Any, ...]] = field(default_factory=list)
    scores: list[tuple[float, float]] = field(default_factory=list)
    fates: dict[str, Counter[str]] = field(default_factory=dict)


def mined(
    source: Source, documents: np.ndarray[Any, Any], anchors: np.ndarray[Any, Any], seed: int, changes: dict[str, Any]
) -> Expected:
    """The training rows.

    Args:
        source: the folder.
        documents: (rows, d) stored vectors.
        anchors: (anchors, d) stored vectors.
        seed: the config's.
        changes: settings of `mining` other than the defaults.
    """
    rules = DEFAULT_RULES | changes
    expected = Expected()
    names = source.anchors("train")
    scored = anchors.astype(np.float64) @ documents.astype(np.float64).T
    for name, scores in zip(names, scored, strict=True):
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
        positives = source.positives(name, "train")
        reasons = source.reasons(name)
        fates = oracle_mining.fates_of_unit(
            order,
            [float(scores[row]) for row in order],
            [reasons[row] for row in order],
            min(float(scores[row]) for row in positives),
            [oracle_mining.uniform(seed, id_hash(name), id_hash(source.ids[row][0])) for row in order],
            rules,
        )
        expected.fates[name] = Counter(fates)
        for positive in positives:
            for rank, row in enumerate(order):
                if fates[rank] == "TAKEN":
                    ids = (name, source.ids[positive][0], source.ids[row][0])
                    texts = (source.queries[name], source.texts[positive], source.texts[row])
                    expected.rows.append((*ids, *texts, rank))
                    expected.scores.append((float(scores[positive]), float(scores[row])))
    return expected
