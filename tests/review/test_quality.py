"""The encoder's figures are those of independent programs on the same vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from beir_data import numbered_folder, precomputed_config, write_folder, write_vectors
from real_runs import Run, encoding_here
from small_source import run as negpipe

from negpipe.config.file import load_config
from negpipe.errors import MissingStageError
from negpipe.review import measures, quality


@pytest.fixture(scope="module")
def judged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """200 documents and 40 queries in words, one to four positives each, encoded by a real BERT."""
    folder = tmp_path_factory.mktemp("quality")
    draw = np.random.default_rng(3)
    words = ["the", "of", "and", "in", "is", "list", "file", "name", "text", "error", "river", "stone", "house"]

    def sentence(size: int) -> str:
        return " ".join(draw.choice(words, size))

    documents = [(f"d{i}", "", f"{sentence(9)} {i}") for i in range(200)]
    queries = [(f"q{i}", f"{sentence(4)} {i}") for i in range(40)]
    judgments = [
        (f"q{i}", f"d{row}", 1) for i in range(40) for row in draw.choice(200, 1 + i % 4, replace=False).tolist()
    ]
    data = write_folder(folder / "beir", documents, queries, {"train": judgments})
    run = Run(
        {
            "run_dir": str(folder / "run"),
            "data": {"path": str(data), "part_rows": 16},
            "encoder": {"backend": "sentence-transformers", "model": str(tiny), "storage": "float32"},
            "search": {"depth": 64},
            "mining": {"range_max": 50},
            "resources": {"cpus": 2},
        }
    )
    with encoding_here():
        run.mine()
    return run


@pytest.mark.slow
def test_agrees_with_sentence_transformers(judged: Run, tiny: Path) -> None:
    """The same model, through its evaluator, on the same texts: every figure that both have."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    data = Path(judged.config["data"]["path"])
    documents, queries = (
        {row["_id"]: row["text"].strip() for row in map(json.loads, (data / name).read_text("utf-8").splitlines())}
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    relevant: dict[str, set[str]] = {}
    for line in (data / "qrels/train.tsv").read_text("utf-8").splitlines()[1:]:
        query, document, _ = line.split("\t")
        relevant.setdefault(query, set()).add(document)
    found = measures.measure_quality(load_config(judged.config))
    depth = found.depth
    evaluator = InformationRetrievalEvaluator(
        queries,
        documents,
        relevant,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[1, 5, 10, 50, depth],
        map_at_k=[depth],
        write_csv=False,
    )
    theirs = evaluator(SentenceTransformer(str(tiny), device="cpu"))
    names = {f"Recall@{k}": f"cosine_recall@{k}" for k in (1, 5, 10, 50, depth)}
    names |= {"MRR@10": "cosine_mrr@10", "nDCG@10": "cosine_ndcg@10", f"MAP@{depth}": f"cosine_map@{depth}"}
    assert depth == 64
    for ours, other in names.items():
        assert found.metrics[ours] == pytest.approx(theirs[other], abs=1e-9), ours
    assert 0.0 < found.metrics["Recall@10"] < found.metrics["Recall@50"] < 1.0


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """100 documents, 30 anchors with graded positives, random vectors."""
    folder = tmp_path_factory.mktemp("graded")
    judgments = [(f"q{i}", f"d{(7 * i + 13 * j) % 100}", 1 + j) for i in range(30) for j in range(1 + i % 3)]
    documents = [(f"d{i}", "", f"document {i}") for i in range(100)]
    data = write_folder(folder / "beir", documents, [(f"q{i}", f"query {i}") for i in range(30)], {"train": judgments})
    write_vectors(data, 100, 30, seed=4)
    run = Run(precomputed_config(folder / "run", data))
    run.mine()
    return run


def test_ranks_gains_and_scores_of_a_plain_program(graded: Run) -> None:
    """numpy over all pairs, without the index, the candidates or ir-measures."""
    data = Path(graded.config["data"]["path"])
    corpus, queries = (
        (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
        for vectors in (np.load(data / f"{name}.npy") for name in ("corpus", "queries"))
    )
    scores = queries @ corpus.T
    judged = [[(7 * i + 13 * j) % 100 for j in range(1 + i % 3)] for i in range(30)]
    ranks = [[int(np.sum(scores[i] > scores[i, row])) for row in rows] for i, rows in enumerate(judged)]
    flat = [rank for own in ranks for rank in own]

    def ndcg(own: list[int]) -> float:
        gained = sum((1 + j) / np.log2(rank + 2) for j, rank in enumerate(own) if rank < 10)
        best = sum(gain / np.log2(place + 2) for place, gain in enumerate(range(len(own), 0, -1)))
        return float(gained / best)

    found = measures.measure_quality(load_config(graded.config))
    assert found.depth == 100
    assert found.metrics["nDCG@10"] == pytest.approx(np.mean([ndcg(own) for own in ranks]), abs=1e-9)
    assert found.metrics["MRR@10"] == pytest.approx(
        np.mean([1 / (min(own) + 1) if min(own) < 10 else 0 for own in ranks]), abs=1e-9
    )
    bins = {"0": (0, 1), "1-4": (1, 5), "5-9": (5, 10), "10-49": (10, 50), "50-99": (50, 100), "beyond": (100, 999)}
    assert found.ranks == {name: sum(low <= rank < high for rank in flat) for name, (low, high) in bins.items()}
    assert found.median_rank == sorted(flat)[(len(flat) - 1) // 2]
    own = [scores[i, row] for i, rows in enumerate(judged) for row in rows]
    assert found.scores["positive"].mean == pytest.approx(np.mean(own), abs=1e-5)
    assert sum(found.scores["positive"].counts) == len(own)
    # The random pairs are drawn from all pairs: their mean lies within 5 standard errors of the true one.
    random = found.scores["random"]
    assert random.mean is not None
    assert abs(random.mean - scores.mean()) < 5 * scores.std() / np.sqrt(random.count)


def test_negatives_are_those_of_the_rows(graded: Run) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(graded.folder / "triplets").to_pylist()
    lowest: dict[str, float] = {}
    for row in rows:
        lowest[row["anchor_id"]] = min(row["positive_score"], lowest.get(row["anchor_id"], 9.0))
    pairs = {(row["anchor_id"], row["negative_id"]): row["negative_score"] for row in rows}
    found = measures.measure_quality(load_config(graded.config))
    assert found.scores["negative"].count == len(pairs)
    assert found.scores["negative"].mean == pytest.approx(np.mean(list(pairs.values())), abs=1e-6)
    gaps = [lowest[anchor] - score for (anchor, _), score in pairs.items()]
    assert found.scores["positive - negative"].mean == pytest.approx(np.mean(gaps), abs=1e-6)
    assert found.outscored == 0.0


def test_separation_counts_pairs() -> None:
    positive, random = np.array([0.5, 0.2], np.float32), np.array([0.1, 0.2, 0.9], np.float32)
    pairs = [(p > r) + 0.5 * (p == r) for p in positive for r in random]
    assert quality._separation(positive, random) == pytest.approx(np.mean(pairs))


def test_command(graded: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(graded.config), "utf-8")
    shown = negpipe("quality", config)
    document = json.loads(negpipe("quality", config, "--json").out)
    assert shown.code == 0
    assert f"{document['metrics']['nDCG@10']:.4f}" in shown.out
    assert list(document["metrics"])[:5] == ["Recall@1", "Recall@5", "Recall@10", "Recall@50", "Recall@100"]


def test_without_candidates(tmp_path: Path) -> None:
    run = Run(precomputed_config(tmp_path / "run", numbered_folder(tmp_path / "beir", 20, 4)))
    with pytest.raises(MissingStageError, match="negpipe ingest"):
        measures.measure_quality(load_config(run.config))
