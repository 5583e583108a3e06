"""The stage with `train.kind: reranker`: what it judges, what it keys on, what it shows and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learnable
import numpy as np
import pyarrow.parquet as pq
import pytest
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import ConfigError, InputError
from negpipe.train.comparison import METRICS

pytestmark = pytest.mark.slow

DEPTH = 20
OVERRIDES = ["train.kind=reranker", "output.format=labeled-list", f"train.rerank_depth={DEPTH}"]


@pytest.fixture(scope="module")
def reranked(mined: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A reranker of two steps, of the encoder's own weights."""
    folder = tmp_path_factory.mktemp("reranked")
    run = mined.copied(folder / "run")
    settings = {"kind": "reranker", "rerank_depth": DEPTH}
    run = Run(
        run.config
        | {"output": {**run.config["output"], "format": "labeled-list"}, "train": {**run.config["train"], **settings}}
    )
    with learnable.training_here():
        graph.train(load_config(run.config))
    return run


@pytest.fixture
def copy(reranked: Run, tmp_path: Path) -> Iterator[Run]:
    with learnable.training_here():
        yield reranked.copied(tmp_path / "run")


def table(run: Run, kind: str, role: str) -> dict[str, Any]:
    (part,) = run.parts("train", kind)
    (path,) = (run.folder / file["path"] for file in part["files"] if file["role"] == role)
    found: dict[str, Any] = pq.read_table(path).to_pydict()
    return found


def read(run: Run) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Corpus, queries, and the one positive of each held-out query."""
    data = Path(run.config["data"]["path"])
    corpus, queries = (
        {row["_id"]: row["text"] for row in map(json.loads, (data / f"{name}.jsonl").open())}
        for name in ("corpus", "queries")
    )
    lines = (data / "qrels/test.tsv").read_text().splitlines()[1:]
    return corpus, queries, dict(line.split("\t")[:2] for line in lines)


def gains(orders: list[list[str]], positives: list[str]) -> list[float]:
    """nDCG@10 of rankings with one positive each."""
    places = [order.index(positive) for order, positive in zip(orders, positives, strict=True)]
    return [1 / np.log2(place + 2) if place < 10 else 0.0 for place in places]


def test_the_library_s_models_give_the_scores_before_and_after(reranked: Run) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    corpus, queries, positive = read(reranked)
    model = SentenceTransformer(reranked.config["encoder"]["model"])
    documents = model.encode([*corpus.values()], normalize_embeddings=True)
    anchors = model.encode([queries[name] for name in positive], normalize_embeddings=True)
    ids = np.array([*corpus])
    orders = [[*ids[np.argsort(-row, kind="stable")]] for row in anchors @ documents.T]
    judge = CrossEncoder(str(reranked.folder / "model"))
    after, samples = [], []
    for (query, own), order in zip(positive.items(), orders, strict=True):
        pairs = [(queries[query], corpus[name]) for name in order[:DEPTH]]
        best = np.argsort(-judge.predict(pairs), kind="stable")
        after.append([order[at] for at in best] + order[DEPTH:])
        texts = [text for _, text in pairs]
        samples.append({"query": pairs[0][0], "positive": [corpus[own]], "documents": texts})
    scores = table(reranked, "evaluation", "scores")
    assert scores["anchor_id"] == [*positive]
    for side, ranked in (("before", orders), ("after", after)):
        assert scores[f"nDCG@10_{side}"] == pytest.approx(gains(ranked, [*positive.values()]), abs=1e-6)
    theirs = CrossEncoderRerankingEvaluator(samples, at_k=10, always_rerank_positives=False)(judge)
    for metric in ("nDCG@10", "MRR@10"):
        for side, name in (("before", "base_"), ("after", "")):
            key = f"{name}{metric.lower()}"
            assert np.mean(scores[f"{metric}_{side}"]) == pytest.approx(theirs[key], abs=1e-6)
    assert np.mean(scores["nDCG@10_before"]) != np.mean(scores["nDCG@10_after"])
    # Positives beyond the depth keep the places that they had.
    assert scores["Recall@100_before"] == scores["Recall@100_after"]


def test_what_the_encoder_finds_is_kept(reranked: Run) -> None:
    kept = table(reranked, "base", "ranking")
    assert kept["anchor_id"] == table(reranked, "base", "scores")["anchor_id"]
    assert {len(rows) for rows in kept["rows"]} == {100}
    for rows, scores in zip(kept["rows"], kept["scores"], strict=True):
        assert sorted(rows)[-learnable.DOCUMENTS :] == [*range(learnable.DOCUMENTS)] and rows[90:] == [-1] * 10
        assert scores[:90] == sorted(scores[:90], reverse=True)


def test_a_retriever_and_a_reranker_that_share_a_store_have_one_base(mined: Run, tmp_path: Path) -> None:
    made = {}
    with learnable.training_here():
        for name, overrides in {"retriever": [], "reranker": OVERRIDES}.items():
            config = {**mined.config, "run_dir": str(tmp_path / name), "store": str(tmp_path / "store")}
            graph.train(load_config(config, overrides))
            parts = Run(config).manifest("train")["parts"]
            made[name] = {part["kind"]: (part["key"], part["files"][0]["path"]) for part in parts}
    assert {kind for kind in made["reranker"] if made["retriever"][kind] == made["reranker"][kind]} == {"base"}


def test_another_depth_judges_the_same_model(copy: Run) -> None:
    (before,) = copy.parts("train", "model")
    graph.train(load_config(copy.config, ["train.rerank_depth=5"]))
    (after,) = copy.parts("train", "model")
    assert before == after
    assert copy.states("train.rerank_depth=5")["train"].state == "current"
    assert copy.states()["train"].state == "stale"


@pytest.mark.parametrize(
    ("override", "state"),
    [
        ("train.checkpoint_steps=7", "current"),
        ("train.learning_rate=1e-3", "stale"),
        ("train.seed=1", "stale"),
    ],
)
def test_what_it_keys_on(override: str, state: str, reranked: Run) -> None:
    assert reranked.states(override)["train"].state == state


def test_settings_of_the_other_kind_change_no_key(mined: Run, trained: Run) -> None:
    assert trained.states("train.rerank_depth=7")["train"].state == "current"
    assert trained.states("train.learning_rate=0.003")["train"].state == "current"


def test_from_the_weights_of_a_retriever(copy: Run, trained: Run) -> None:
    """The retriever that finds the documents stays the encoder's own."""
    before, weights = (copy.parts("train", kind) for kind in ("base", "model"))
    assert graph.train(load_config(copy.config, [f"train.base={trained.folder / 'model'}"])).ran == ("train",)
    assert copy.parts("train", "base") == before and copy.parts("train", "model") != weights


def test_the_same_again_gives_the_same_bytes(copy: Run, mined: Run, tmp_path: Path) -> None:
    again = mined.copied(tmp_path / "again")
    graph.train(load_config(again.config, OVERRIDES))
    for kind in ("model", "evaluation"):
        digests = [
            {file["role"]: file["digest"] for file in part["files"] if not file["aside"]}
            for run in (copy, again)
            for part in run.parts("train", kind)
        ]
        assert digests[0] == digests[1]


def test_the_card_tells_of_a_reranker(reranked: Run) -> None:
    from huggingface_hub import ModelCard
    from sentence_transformers import CrossEncoder

    card = ModelCard.load(reranked.folder / "model/README.md")
    assert {one.task_type for one in card.data.eval_results} == {"text-ranking"}
    assert {one.metric_name for one in card.data.eval_results} == {*METRICS}
    assert f"its best {DEPTH} ordered by this model" in str(card)
    assert CrossEncoder(str(reranked.folder / "model")).predict([("a", "b")]).shape == (1,)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["output.format=triplet"], "requires output.format labeled-list, not triplet: set it"),
        (["output.format=labeled-pair"], "requires output.format labeled-list"),
        (["train.loss=BinaryCrossEntropyLoss"], "requires output.format labeled-pair"),
        (["train.loss=MarginMSELoss"], "requires output.format triplet or n-tuple, not labeled-list: set one of them"),
        (["train.loss=CachedGISTEmbedLoss"], "cannot train a reranker: use BinaryCrossEntropyLoss or LambdaLoss"),
        (["train.kind=retriever", "train.loss=LambdaLoss"], "cannot train a retriever: use Mult"),
        (["train.matryoshka=[8]"], "no vectors"),
        (["train.negatives=false"], "train: negatives|train.negatives"),
        (["encoder.backend=precomputed", "encoder.corpus_vectors=a", "encoder.anchor_vectors=b"], "train.kind"),
    ],
)
def test_what_does_not_go_together(overrides: list[str], words: str, reranked: Run) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(reranked.config, overrides)


def test_labels_that_are_all_one_are_refused_before_the_base_is_judged(mined: Run, tmp_path: Path) -> None:
    run = mined.copied(tmp_path / "run")
    pairs = ["train.loss=BinaryCrossEntropyLoss", "output.format=labeled-pair", "train.kind=reranker"]
    with learnable.training_here(), pytest.raises(InputError, match="have the label 1") as raised:
        graph.train(load_config(run.config, [*pairs, "mining.max_score=-1"]))
    assert raised.value.field == "train.kind" and raised.value.remedy
    assert not (run.folder / "train").exists()


def test_rows_that_fill_no_batch(mined: Run, tmp_path: Path) -> None:
    run = mined.copied(tmp_path / "run")
    with learnable.training_here(), pytest.raises(InputError) as raised:
        graph.train(load_config(run.config, [*OVERRIDES, "train.batch_size=500"]))
    assert raised.value.field == "train.batch_size"


def test_a_base_that_is_not_there_is_named(mined: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        graph.train(load_config(mined.at(tmp_path / "run").config, [*OVERRIDES, "train.base=no/such/folder"]))
    assert raised.value.field == "train.base"
    assert not (tmp_path / "run/encode").exists()
