"""The rows of the first edition, kept: every preset, format and sampler gives what commit 51acabb gave.

`goldens.json` holds digests of the content of `triplets/` and ledger, made by that commit with
`python tests/test_goldens.py`. Vectors are small integers over a power of two, so that every score is exact
and no processor rounds it differently. What had to change since, and why, stands in `CHANGED`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beir_data import tricky_folder

from negpipe import graph
from negpipe.config.file import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from compare_rows import EXACT, content

GOLDENS = Path(__file__).with_name("goldens.json")
# Who has seen every document is short of corpus, and nobody else is: not who merely stood beside one searched deeper.
CHANGED = {
    ("compat nemo", "shortage_reason"),
    ("compat nv-retriever", "shortage_reason"),
    ("margin of each", "shortage_reason"),
    ("deeper", "shortage_reason"),
}


def source(folder: Path) -> dict[str, Any]:
    """The config of the folder full of traps, with exact vectors."""
    data = tricky_folder(folder / "beir")
    draw = np.random.default_rng(5)
    documents, queries = (
        len((data / f"{name}.jsonl").read_text("utf-8").splitlines()) for name in ("corpus", "queries")
    )
    corpus = draw.integers(-8, 9, (documents, 16))
    anchors = corpus[:queries] + draw.integers(-8, 9, (queries, 16))
    for name, vectors in (("corpus", corpus), ("anchors", anchors)):
        np.save(folder / f"{name}.npy", (vectors / 16).astype(np.float32))
    return {
        "run_dir": str(folder / "run"),
        "data": {"path": str(data), "part_rows": 24},
        "encoder": {
            "backend": "precomputed",
            "normalize": False,
            "corpus_vectors": str(folder / "corpus.npy"),
            "anchor_vectors": str(folder / "anchors.npy"),
        },
        "executor": {"kind": "inline"},
        "resources": {"cpus": 1},
        "output": {"report": False},
    }


def made(config: dict[str, Any], variant: str) -> dict[str, str]:
    """Digests of what a variant's run holds."""
    return content(graph.mine(load_config(config, EXACT[variant])).run_dir)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return source(tmp_path_factory.mktemp("goldens"))


@pytest.mark.guarantee(
    "every preset, format and sampler",
    "gives the rows and the ledger of the first edition, but for the changes that the test lists",
    section="rows",
)
@pytest.mark.parametrize("variant", EXACT)
def test_rows_and_ledger_are_those_of_the_first_edition(config: dict[str, Any], variant: str) -> None:
    expected, found = json.loads(GOLDENS.read_text("utf-8"))[variant], made(config, variant)
    for what, digest in found.items():
        assert (digest == expected[what]) is ((variant, what) not in CHANGED), what


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tree = source(Path(folder))
        digests = {variant: made(tree, variant) for variant in EXACT}
    GOLDENS.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
