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
from test_parity import FORMATS, Model, World

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
        return torch.tensor([float(np.sin(len(one) + sum(map(ord, other)) ** 1.3)) for one, other in pairs])


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
            one, two = (np.concatenate([np.ravel(row) for row in side[name]]) for side in (mine, rows))
            np.testing.assert_allclose(one, two, atol=1e-5)
        else:
            assert mine[name] == rows[name]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: what a call finds there it does not do again."""
    return tmp_path_factory.mktemp("drop_in_run")


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("scores", [True, False])
def test_same_dataset(world: World, run_dir: Path, output_format: str, scores: bool) -> None:
    arguments = {"output_format": output_format, "output_scores": scores, "num_negatives": 2}
    ours, other = both(world, run_dir=run_dir, relative_margin=0.1, **arguments)
    assert len(ours)
    check(ours, other)


def test_ranking_with_positives(world: World, run_dir: Path) -> None:
    check(*both(world, run_dir=run_dir, include_positives=True, num_negatives=6, output_scores=True))


@pytest.mark.parametrize("cutoff", [{"max_score": 0.2}, {"min_score": -0.5}, {"relative_margin": 0.3}, {}])
def test_cross_encoder(world: World, run_dir: Path, cutoff: dict[str, float]) -> None:
    """It is asked only where a cutoff needs it."""
    model = CrossEncoder()
    check(*both(world, run_dir=run_dir, cross_encoder=model, num_negatives=2, output_scores=True, **cutoff))
    assert bool(model.asked) == bool(cutoff)


@pytest.mark.parametrize(
    "wrong",
    [{"num_negatives": 0}, {"range_min": 3, "range_max": 3}, {"range_max": 2}, {"range_min": -1}],
)
def test_arguments_that_do_not_fit(world: World, wrong: dict[str, Any]) -> None:
    dataset = Dataset.from_dict({"query": ["a"], "answer": ["b"]})
    for function in (negpipe.mine_hard_negatives, theirs):
        with pytest.raises(ValueError):
            function(dataset, Model(world.vectors), verbose=False, **wrong)


def test_cached_vectors_belong_to_the_weights(tmp_path: Path) -> None:
    """Two models of one name: their vectors are kept apart, and used again."""

    class Weighted(Model):
        def __init__(self, seed: int) -> None:
            self.layer = torch.nn.Linear(8, 8, bias=False)
            torch.nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(seed))
            texts = ["a", "b", "c", "x", "y", "z"]
            rows = self.layer(torch.randn(6, 8, generator=torch.Generator().manual_seed(1))).detach().numpy()
            super().__init__(dict(zip(texts, rows / np.linalg.norm(rows, axis=1, keepdims=True), strict=True)))
            self.calls = 0

        def __repr__(self) -> str:
            return "Weighted"

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"weight": self.layer.weight}

        def encode_document(self, texts: list[str], **options: Any) -> Any:
            self.calls += 1
            return super().encode_document(texts, **options)

    dataset = Dataset.from_dict({"query": ["a", "b", "c"], "answer": ["x", "y", "z"]})
    models = [Weighted(0), Weighted(0), Weighted(5)]
    found = [
        negpipe.mine_hard_negatives(
            dataset, model, num_negatives=2, output_scores=True, cache_folder=str(tmp_path / "cache"), verbose=False
        ).to_dict()
        for model in models
    ]
    assert [model.calls for model in models] == [1, 0, 1]
    assert found[0] == found[1] != found[2]


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
    np.testing.assert_allclose(np.array(ours.pop("scores")), np.array(other.pop("scores")), atol=1e-5)
    assert ours == other
