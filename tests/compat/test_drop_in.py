"""`negpipe.mine_hard_negatives` beside sentence-transformers' own: same input, same models, any kind of caller."""

from __future__ import annotations

import itertools
import json
import queue
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_parity import FORMATS, Model, World, negatives
from tiny_model import build_tiny_model

import negpipe
from negpipe.errors import InputError

if TYPE_CHECKING:
    # Ten seconds: every process of pytest imports this file, one of them runs it.
    import torch
    from datasets import Dataset

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PAIRS = {"question": ["a", "b", "a", " a", "c"], "answer": ["x", "y", "z", "x ", ""]}
ARGUMENTS: dict[str, Any] = {
    "corpus": ["x", "y ", "w", "v", "v"],
    "range_max": 9,
    "num_negatives": 2,
    "output_scores": True,
    "verbose": False,
}
SCRIPT = f"""
import json, sys
import numpy as np
import torch
from datasets import Dataset
from negpipe import mine_hard_negatives

sys.path.insert(0, sys.argv[1])
from test_parity import Model

vectors = {{text: np.array(row, np.float32) for text, row in json.load(open(sys.argv[2])).items()}}
mined = mine_hard_negatives(Dataset.from_dict({PAIRS!r}), Model(vectors), **{ARGUMENTS!r})
assert "faiss" not in sys.modules
print(json.dumps([repr(mined.features), mined.to_dict()]))
"""


def dataset_of(columns: dict[str, Any]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(columns)


def theirs(*given: Any, **named: Any) -> Dataset:
    """Sentence-transformers' own."""
    from sentence_transformers.util import mine_hard_negatives

    mined: Dataset = mine_hard_negatives(*given, **named)
    return mined


class CrossEncoder:
    """Scores that have nothing to do with the vectors."""

    def __init__(self) -> None:
        self.asked = 0

    def predict(self, pairs: list[tuple[str, str]], **_: Any) -> torch.Tensor:
        import torch

        self.asked += len(pairs)
        return torch.tensor([float(np.sin(len(one) + sum(map(ord, other)) ** 1.3)) for one, other in pairs])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(3, tmp_path_factory.mktemp("drop_in") / "world")


def both(world: World, **arguments: Any) -> tuple[Dataset, Dataset]:
    dataset = dataset_of({"query": [a for a, _ in world.pairs], "answer": [p for _, p in world.pairs]})
    given = {"dataset": dataset, "model": Model(world.vectors), "corpus": world.corpus, "verbose": False, **arguments}
    own = {name: given.pop(name) for name in ("run_dir", "seed") if name in given}
    return negpipe.mine_hard_negatives(**given, **own), theirs(**given)


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


@pytest.mark.guarantee(
    "`negpipe.mine_hard_negatives` takes the place of the original",
    "the same dataset: rows, order, columns, types",
    section="rows",
)
@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("scores", [True, False])
def test_same_dataset(world: World, run_dir: Path, output_format: str, scores: bool) -> None:
    arguments = {"output_format": output_format, "output_scores": scores, "num_negatives": 2}
    ours, other = both(world, run_dir=run_dir, relative_margin=0.1, **arguments)
    assert len(ours)
    check(ours, other)


@pytest.mark.guarantee("`negpipe.mine_hard_negatives` takes the place of the original")
@pytest.mark.parametrize(
    "rules",
    [
        {"range_min": 2, "range_max": 9},
        {"absolute_margin": 0.1},
        {"absolute_margin": 0.02, "range_min": 1, "max_score": 0.4},
        {"range_min": 3, "use_faiss": True},
    ],
)
def test_windows_and_margins(world: World, run_dir: Path, rules: dict[str, Any]) -> None:
    ours, other = both(world, run_dir=run_dir, num_negatives=2, output_scores=True, **rules)
    assert len(ours)
    check(ours, other)


def test_ranking_with_positives(world: World, run_dir: Path) -> None:
    check(*both(world, run_dir=run_dir, include_positives=True, num_negatives=6, output_scores=True))


@pytest.mark.guarantee("`negpipe.mine_hard_negatives` takes the place of the original")
@pytest.mark.parametrize("cutoff", [{"max_score": 0.2}, {"min_score": -0.5}, {"relative_margin": 0.3}, {}])
def test_cross_encoder(world: World, run_dir: Path, cutoff: dict[str, float]) -> None:
    """It is asked only where a cutoff needs it."""
    model = CrossEncoder()
    check(*both(world, run_dir=run_dir, cross_encoder=model, num_negatives=2, output_scores=True, **cutoff))
    assert bool(model.asked) == bool(cutoff)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"range_min": 3, "range_max": 3}, r"range_min \(3\) must be at least 0 and below range_max \(3\)"),
        ({"range_min": -1}, r"range_min \(-1\) must be at least 0"),
        ({"range_max": 2}, "3 negatives do not fit in the ranks 0 to 2"),
        ({"faiss_batch_size": 0}, "faiss_batch_size must be at least 1, got 0"),
        (
            {"output_format": "triplets"},
            "output_format must be one of 'triplet', 'n-tuple', 'labeled-pair', 'labeled-list', got 'triplets'",
        ),
        ({"dataset": {"query": [], "answer": []}}, "the dataset is empty"),
        ({"dataset": {"query": ["a"]}}, "must have two columns, anchors and positives; it has 'query'"),
    ],
)
def test_what_it_refuses_we_refuse(world: World, wrong: dict[str, Any], message: str) -> None:
    arguments = {"dataset": {"query": ["a"], "answer": ["b"]}, "verbose": False, **wrong}
    arguments["dataset"] = dataset_of(arguments["dataset"])
    with pytest.raises(ValueError):
        theirs(model=Model(world.vectors), **arguments)
    with pytest.raises(ValueError, match=message):
        negpipe.mine_hard_negatives(model=None, **arguments)  # refused before the model is asked for anything


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampling_strategy": "best"}, "sampling_strategy must be one of 'top', 'random', got 'best'"),
        ({"seed": -1}, "seed: "),
        ({"relative_margin": float("nan")}, r"mining\.relative_margin: "),
        (
            {"dataset": {"q": ["a", "b"], "a": ["x", None]}},
            "'a', row 1: expected a text, found None",
        ),
        ({"corpus": ["x", 7]}, "'corpus', row 1: expected a text, found 7"),
    ],
)
def test_what_it_trips_over_we_refuse(wrong: dict[str, Any], message: str) -> None:
    arguments = {"dataset": {"query": ["a"], "answer": ["b"]}, "model": None, **wrong}
    arguments["dataset"] = dataset_of(arguments["dataset"])
    with pytest.raises(ValueError, match=message):
        negpipe.mine_hard_negatives(**arguments)


def test_zero_vectors_have_cosine_0(world: World, run_dir: Path) -> None:
    """An anchor whose candidates all tie, and a document that stands between positive and negative cosines."""
    anchor, document = world.pairs[0][0], world.pairs[1][1]
    zero = {text: np.zeros_like(world.vectors[text]) for text in (anchor, document)}
    # Everything is taken: how the tied are ordered does not matter.
    count = len({*(world.corpus or ()), *(positive for _, positive in world.pairs)})
    found = both(
        replace(world, vectors=world.vectors | zero),
        run_dir=run_dir,
        output_scores=True,
        range_max=count,
        num_negatives=count,
    )
    ours, other = (sorted(side.to_list(), key=lambda row: [*row.values()][:3]) for side in found)
    assert len(ours) == len(other)
    for one, two in zip(ours, other, strict=True):
        scores = one.pop("scores"), two.pop("scores")
        assert one == two
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
        for side, score in zip(("answer", "negative"), scores[0], strict=True):
            assert (score == 0) == (one["query"] == anchor or one[side] == document)
    check(*(side.filter(lambda row: row["query"] != anchor) for side in found))


def test_a_vector_that_is_not_finite_names_its_text(world: World) -> None:
    broken = world.vectors | {"document 3": np.full_like(world.vectors["document 3"], np.nan)}
    with pytest.raises(InputError, match="vector of the text 'document 3' is not finite"):
        both(replace(world, vectors=broken))


# --- random sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", [{}, {"relative_margin": 0.3}])
def test_random_draws_from_the_same_documents(world: World, run_dir: Path, cutoff: dict[str, float]) -> None:
    arguments = {"range_max": 7, "run_dir": run_dir, **cutoff}
    _, eligible = both(world, num_negatives=7, **arguments)
    wanted = by_anchor(eligible)
    draws = [both(world, num_negatives=2, sampling_strategy="random", seed=seed, **arguments) for seed in (1, 2, 3, 1)]
    assert any(len(found) > 2 for found in wanted.values())
    for sides in draws:
        for drawn in map(by_anchor, sides):
            assert {anchor: len(found) for anchor, found in drawn.items()} == {
                anchor: min(2, len(found)) for anchor, found in wanted.items()
            }
            assert all(drawn[anchor] <= found for anchor, found in wanted.items())
    ours = [drawn.to_dict() for drawn, _ in draws]
    assert ours[0] == ours[3]
    assert all(one != other for one, other in itertools.combinations(ours[:3], 2))


def by_anchor(dataset: Dataset) -> dict[str, set[str]]:
    return negatives([{"anchor": row["query"], "negative": row["negative"]} for row in dataset.to_list()])


# --- real models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def prompted(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "find: ", "document": "text: ", "ask": "which file is in ", "say": "the name of "}
    return SentenceTransformer(str(folder), prompts=prompts, device="cpu")


@pytest.fixture(scope="module")
def cross_encoder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch
    from sentence_transformers import CrossEncoder

    plain = tmp_path_factory.mktemp("cross") / "model"
    shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("modules.json", "1_Pooling"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the head, which the folder has not
        return CrossEncoder(str(plain), num_labels=1, device="cpu")


def test_prompts(world: World, prompted: Any, run_dir: Path) -> None:
    """Those of the model, by their names, and those of the call, which win."""
    calls: list[dict[str, str]] = [
        {},
        {"query_prompt_name": "ask", "corpus_prompt_name": "say"},
        {"query_prompt": "as in ", "corpus_prompt": "return: "},
        {"query_prompt": "the list of ", "query_prompt_name": "ask"},
    ]
    made = []
    for prompts in calls:
        ours, other = both(world, run_dir=run_dir, model=prompted, num_negatives=2, output_scores=True, **prompts)
        check(ours, other)
        made.append(ours["scores"][0])
    assert all(abs(one[0] - two[0]) > 1e-4 for one, two in itertools.combinations(made, 2))


@pytest.mark.parametrize("side", ["query", "corpus"])
def test_a_prompt_that_the_model_does_not_name_is_refused_at_once(world: World, prompted: Any, side: str) -> None:
    with pytest.raises(ValueError, match=f"{side}_prompt_name.*'quary'.*query, document, ask, say"):
        both(world, model=prompted, **{f"{side}_prompt_name": "quary"})


def test_prompts_of_a_folder_give_the_rows_that_a_run_gives(world: World, folder: Path, tmp_path: Path) -> None:
    """One rule: the stages encode a folder's texts as the drop-in has the library do it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sentence_transformers import SentenceTransformer

    model = shutil.copytree(folder, tmp_path / "prompted")
    prompts = {"query": "find: ", "document": "text: "}
    (model / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
    texts = [text for text in dict.fromkeys(positive for _, positive in world.pairs) if text.strip() == text != ""]
    pairs = {"anchor": [f"which is number {i}" for i in range(len(texts))], "positive": texts}
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    library = SentenceTransformer(str(model), device="cpu")
    ours = negpipe.mine_hard_negatives(dataset_of(pairs), library, num_negatives=2, output_scores=True, verbose=False)
    result = negpipe.mine(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {"format": "pairs", "path": str(tmp_path / "pairs.parquet")},
            "encoder": {"backend": "sentence-transformers", "model": str(model), "storage": "float32"},
            "mining": {"compat": "sentence-transformers", "num_negatives": 2},
            "output": {"report": False},
        }
    )
    assert result.stats["encode"]["prompts"] == {"query_prompt": "find: ", "passage_prompt": "text: "}
    rows = [row for path in sorted(result.triplets.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    mined = {(row["anchor"], row["positive"], row["negative"]): row["scores"] for row in ours}
    stages = {
        (row["anchor"], row["positive"], row["negative"]): [row["positive_score"], row["negative_score"]]
        for row in rows
    }
    assert mined.keys() == stages.keys() and mined
    np.testing.assert_allclose([stages[key] for key in mined], [*mined.values()], atol=1e-4)


@pytest.mark.parametrize("cutoff", [{"relative_margin": 0.02}, {"min_score": 0.4}])
def test_a_real_cross_encoder(
    world: World, prompted: Any, cross_encoder: Any, run_dir: Path, cutoff: dict[str, float]
) -> None:
    arguments = {"model": prompted, "num_negatives": 2, "output_scores": True, **cutoff}
    ours, other = both(world, run_dir=run_dir, cross_encoder=cross_encoder, **arguments)
    check(ours, other)
    assert len(ours)
    plain, _ = both(world, run_dir=run_dir, **arguments)
    assert plain.to_dict() != ours.to_dict()


class Threads:
    """A context of multiprocessing whose processes are threads: they need not import torch for ten seconds each."""

    class Queue(queue.Queue[Any]):
        def cancel_join_thread(self) -> None:
            pass

        def close(self) -> None:
            pass

    class Process(threading.Thread):
        def terminate(self) -> None:
            pass

        def join(self, timeout: float | None = None) -> None:
            pass

        def close(self) -> None:
            pass


@pytest.mark.slow
@pytest.mark.torture
def test_processes_of_its_own(
    request: pytest.FixtureRequest, world: World, prompted: Any, cross_encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`use_multi_process` starts the pools of both models; the rows are those of one process."""
    arguments = {"model": prompted, "cross_encoder": cross_encoder, "relative_margin": 0.02, "output_scores": True}
    dataset = dataset_of({"query": [a for a, _ in world.pairs], "answer": [p for _, p in world.pairs]})
    started: list[Any] = []

    def watched(start: Any) -> Any:
        def method(model: Any, target_devices: list[str] | None = None) -> Any:
            started.append(target_devices)
            return start(model, target_devices)

        return method

    for kind in (type(prompted), type(cross_encoder)):
        monkeypatch.setattr(kind, "start_multi_process_pool", watched(kind.start_multi_process_pool))
    if not request.config.getoption("--torture"):
        monkeypatch.setattr("torch.multiprocessing.get_context", lambda method: Threads)
    ours = negpipe.mine_hard_negatives(dataset, use_multi_process=["cpu"], verbose=False, **arguments)
    assert started == [["cpu"], ["cpu"]]
    assert len(ours)
    check(ours, theirs(dataset, verbose=False, **arguments))


# --- the cache ------------------------------------------------------------------------------------------


def test_cached_vectors_belong_to_the_weights(tmp_path: Path) -> None:
    """Two models of one name: their vectors are kept apart, and used again."""
    import torch

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

    dataset = dataset_of({"query": ["a", "b", "c"], "answer": ["x", "y", "z"]})
    models = [Weighted(0), Weighted(0), Weighted(5)]
    found = [
        negpipe.mine_hard_negatives(
            dataset, model, num_negatives=2, output_scores=True, cache_folder=str(tmp_path / "cache"), verbose=False
        ).to_dict()
        for model in models
    ]
    assert [model.calls for model in models] == [1, 0, 1]
    assert found[0] == found[1] != found[2]


# --- callers --------------------------------------------------------------------------------------------


def test_script_without_main_guard(tmp_path: Path) -> None:
    """Texts differ by white space, one is empty; torch is in this process and FAISS never comes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), *script_arguments(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_output(tmp_path, done.stdout)


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in the cells of a Jupyter kernel, whose event loop runs and whose streams are no files."""
    from jupyter_client.manager import start_new_kernel

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    said: list[dict[str, Any]] = []
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        first = f"import asyncio, sys; await asyncio.sleep(0); sys.argv[1:] = {script_arguments(tmp_path)!r}"
        for cell in (first, SCRIPT):
            reply = client.execute_interactive(cell, timeout=120, output_hook=said.append)
            assert reply["content"]["status"] == "ok", "".join(reply["content"]["traceback"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    streams = [message["content"] for message in said if message["msg_type"] == "stream"]
    check_output(tmp_path, "".join(stream["text"] for stream in streams if stream["name"] == "stdout"))


def script_arguments(folder: Path) -> list[str]:
    """Where this folder is, and vectors for the script's texts."""
    draw = np.random.default_rng(0)
    texts = ["a", "b", " a", "c", "x", "y", "z", "x ", "", "y ", "w", "v"]
    rows = draw.standard_normal((len(texts), 8))
    vectors = dict(zip(texts, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).tolist(), strict=True))
    (folder / "vectors.json").write_text(json.dumps(vectors))
    return [str(Path(__file__).parents[1]), str(folder / "vectors.json")]


def check_output(folder: Path, printed: str) -> None:
    features, ours = json.loads(printed)
    vectors = json.loads((folder / "vectors.json").read_text())
    model = Model({text: np.array(row, np.float32) for text, row in vectors.items()})
    mined = theirs(dataset_of(PAIRS), model, **ARGUMENTS)
    other = mined.to_dict()
    assert features == repr(mined.features)
    assert len(ours["question"]) > 5
    np.testing.assert_allclose(np.array(ours.pop("scores")), np.array(other.pop("scores")), atol=1e-5)
    assert ours == other
