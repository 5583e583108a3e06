"""A run to report on: real words, and ids and texts that would do harm where they are not escaped."""

from __future__ import annotations

import json
import random
from pathlib import Path

from beir_data import precomputed_config, write_folder, write_vectors

DOCUMENTS, ANCHORS = 90, 70
_WORDS = ["river", "stone", "house", "wind", "green", "paper", "valley", "copper", "bridge", "garden", "winter"]

HARM = [
    "<script>window.harmed = 1</script>",
    "</script><script>window.harmed = 2</script>",
    "<img src=x onerror='window.harmed = 3'>",
    "' onfocus='window.harmed = 4' autofocus tabindex='1",
    '"><svg onload="window.harmed = 5">',
    "</textarea></style></title><!--",
    "{{ 7 * 7 }} {% raw %} ${alert(6)} $x^2$",
    "a\rcarriage\r\nreturn\tand \u202eright-to-left",
    "&lt;script&gt; &amp;amp; \\u003c \u2028 é 漢字 🙂",
    "javascript:window.harmed=7",
]


def build(folder: Path) -> Path:
    """Write source, vectors and config; the first documents and queries have harmful ids and texts."""
    draw = random.Random(3)

    def sentence(number: int) -> str:
        harm = HARM[number % len(HARM)] if number < 3 * len(HARM) else ""
        return f"{harm} {' '.join(draw.choices(_WORDS, k=9))} {number}".strip()

    def name(kind: str, number: int) -> str:
        return f"{HARM[number]}{kind}" if number < len(HARM) else f"{kind}{number}"

    documents = [(name("d", i), "", sentence(i)) for i in range(DOCUMENTS)]
    queries = [(name("q", i), sentence(i)) for i in range(ANCHORS)]
    judgments = [(name("q", i), name("d", i), 1) for i in range(ANCHORS)]
    # Tabs and line ends cannot stand in a TSV, so the qrels are JSON lines.
    data = write_folder(folder / "data", documents, queries, {})
    rows = [{"query-id": query, "corpus-id": document, "score": grade} for query, document, grade in judgments]
    (data / "qrels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_vectors(data, DOCUMENTS, ANCHORS, seed=4, dimension=8)
    config = precomputed_config(folder / "run", data)
    config["data"] = {
        "format": "columns",
        **{table: str(data / f"{table}.jsonl") for table in ("corpus", "queries", "qrels")},
        "part_rows": 32,
    }
    config["mining"] = {"range_max": 40, "relative_margin": None}
    config["executor"] = {"kind": "inline"}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
