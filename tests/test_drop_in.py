"""`negpipe.mine_hard_negatives` beside sentence-transformers' own, on the same input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives as theirs
from test_parity import FORMATS, Case, Model, World

import negpipe

pytestmark = pytest.mark.parity

SCRIPT = """
import json, sys
import numpy as np
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives as theirs
from negpipe import mine_hard_negatives as ours

sys.path.insert(0, sys.argv[1])
from test_parity import Model

vectors = {text: np.array(row, np.float32) for text, row in json.load(open(sys.argv[2])).items()}
pairs = {"question": ["a", "b", "a", " a", "c"], "answer": ["x", "y", "z", "x ", ""]}
results = [
    mine(Dataset.from_dict(pairs), Model(vectors), corpus=["x", "y ", "w", "v", "v"], range_max=9, num_negatives=2,
         output_scores=True, verbose=False)
    for mine in (ours, theirs)
]
assert "faiss" not in sys.modules
assert results[0].features == results[1].features, (results[0].features, results[1].features)
print(json.dumps([result.to_dict() for result in results]))
"""


class CrossEncoder:
    """Scores that have nothing to do with the vectors."""

    def __init__(self) -> None:
        self.asked = 0

    def predict(self, pairs: list[tuple[str, str]], **_: Any) -> torch.Tensor:
        self.asked += len(pairs)
        return torch.tensor([np.sin(len(one) + sum(map(ord, other)) ** 1.3) for one, other in pairs], dtype=torch.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(3, tmp_path_factory.mktemp("drop_in") / "world")


def both(world: World, **arguments: Any) -> tuple[Dataset, Dataset]:
    dataset = Dataset.from_dict({"query": [a for a, _ in world.pairs], "answer": [p for _, p in world.pairs]})
    given = {"dataset": dataset, "model": Model(world.vectors), "corpus": world.corpus, "verbose": False, **arguments}
    run_dir = given.pop("run_dir", None)
    return negpipe.mine_hard_negatives(**given, run_dir=run_dir), theirs(**given)


def check(ours: Dataset, other: Dataset) -> None:
    assert ours.features == other.features
    mine, rows = ours.to_dict(), other.to_dict()
    for name in rows:
        if name in ("score", "scores"):
            flat = [np.concatenate([np.ravel(row) for row in side[name]]) for side in (mine, rows)]
            np.testing.assert_allclose(*flat, atol=1e-5)
        else:
            assert mine[name] == rows[name]


@pytest.mark.parametrize("output_format", FORMATS)
def test_same_dataset(world: World, tmp_path: Path, output_format: str) -> None:
    for scores in (True, False):  # the second run finds everything but the rows
        arguments = {"output_format": output_format, "output_scores": scores, "num_negatives": 2}
        ours, other = both(world, run_dir=tmp_path, relative_margin=0.1, **arguments)
        assert len(ours)
        check(ours, other)


def test_ranking_with_positives(world: World) -> None:
    check(*both(world, include_positives=True, num_negatives=6, output_scores=True))


@pytest.mark.parametrize("cutoff", [{"max_score": 0.2}, {"min_score": -0.5}, {"relative_margin": 0.3}])
def test_cross_encoder(world: World, cutoff: dict[str, float]) -> None:
    model = CrossEncoder()
    check(*both(world, cross_encoder=model, num_negatives=2, output_scores=True, **cutoff))
    assert model.asked


def test_cross_encoder_without_cutoff_is_not_asked(world: World) -> None:
    model = CrossEncoder()
    check(*both(world, cross_encoder=model, num_negatives=2))
    assert not model.asked


def test_script_without_main_guard(tmp_path: Path) -> None:
    """Texts differ by white space, one is empty; torch is in this process and FAISS never comes."""
    draw = np.random.default_rng(0)
    texts = ["a", "b", " a", "c", "x", "y", "z", "x ", "", "y ", "w", "v"]
    rows = draw.standard_normal((len(texts), 8))
    vectors = dict(zip(texts, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).tolist(), strict=True))
    (tmp_path / "vectors.json").write_text(json.dumps(vectors))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path / "vectors.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, other = json.loads(done.stdout)
    assert len(ours["question"]) > 5
    scores = [np.array(side.pop("scores")) for side in (ours, other)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert ours == other
