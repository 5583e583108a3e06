"""Every layout is opened by the loader it is for, and holds the ids and scores that `triplets` wrote."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source
import yaml
from beir_data import tricky_folder, write_vectors
from datasets import Dataset, disable_progress_bars, load_dataset
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.errors import ConfigError, InputError, MissingStageError
from negpipe.review import finished
from negpipe.rows import exports

LAYOUTS = list(exports.LAYOUTS)
# anchor id, positive id, negative id, their scores
Triplet = tuple[str, str, str, float | None, float | None]
disable_progress_bars()


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder full of traps, with random vectors of unequal length: scores beyond 1, anchors without a negative."""
    folder = tmp_path_factory.mktemp("exports")
    data = tricky_folder(folder / "beir")
    rows = {name: len((data / f"{name}.jsonl").read_text("utf-8").splitlines()) for name in ("corpus", "queries")}
    write_vectors(data, rows["corpus"], rows["queries"], seed=1)
    run = Run(
        {
            "run_dir": str(folder / "run"),
            "data": {"path": str(data), "part_rows": 24},
            "encoder": {
                "backend": "precomputed",
                "normalize": False,
                "corpus_vectors": str(data / "corpus.npy"),
                "anchor_vectors": str(data / "queries.npy"),
            },
            "mining": {"range_max": 60, "num_negatives": 3, "min_score": 9.0, "max_depth": None},
            "executor": {"kind": "inline"},
        }
    )
    run.mine()
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A source without traps: every id is one word."""
    folder = tmp_path_factory.mktemp("plain")
    small_source.build(folder)
    run = Run(small_source.settings(folder))
    run.mine()
    return run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from, or left in, the cache that `datasets` has at home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def export(mined: Run, to: str, out: Path, *overrides: str, **options: Any) -> exports.Exported:
    return finished.export(load_config(mined.config, list(overrides)), exports.ExportOptions(to=to, out=out, **options))


def opened(*args: Any, **options: Any) -> Dataset:
    return load_dataset(*args, split="train", **options)


def mined_triplets(run: Run) -> Counter[Triplet]:
    names = ("anchor_id", "positive_id", "negative_id", "positive_score", "negative_score")
    rows = pq.read_table(run.folder / "triplets", columns=list(names)).to_pylist()
    return Counter(tuple(row[name] for name in names) for row in rows)


def crossed(
    anchor: str, positives: Iterable[tuple[str, float | None]], negatives: Iterable[tuple[str, float | None]]
) -> list[Triplet]:
    negatives = list(negatives)
    return [(anchor, p, n, p_score, n_score) for p, p_score in positives for n, n_score in negatives]


def source_texts(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """Documents and queries as the source has them."""
    folder = Path(run.config["data"]["path"])
    documents, queries = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("corpus", "queries")
    )
    return (
        {row["_id"]: f"{row['title']} {row['text']}".strip() for row in documents},
        {row["_id"]: row["text"] for row in queries},
    )


# --- the triplets in each layout ------------------------------------------------------------------------


def from_flagembedding(out: Path) -> Counter[Triplet]:
    return Counter(
        triplet
        for row in opened("json", data_files=str(out / "train.jsonl"))
        for triplet in crossed(
            row["query_id"],
            zip(row["pos_ids"], row["pos_scores"], strict=True),
            zip(row["neg_ids"], row["neg_scores"], strict=True),
        )
    )


def from_nemo(out: Path) -> Counter[Triplet]:
    return Counter(
        triplet
        for row in json.loads((out / "train.json").read_text("utf-8"))["data"]
        for triplet in crossed(row["question_id"], scored(row["pos_doc"], "id"), scored(row["neg_doc"], "id"))
    )


def from_tevatron(out: Path) -> Counter[Triplet]:
    return Counter(
        triplet
        for row in opened(str(out), "train")
        for triplet in crossed(
            row["query_id"],
            zip(row["positive_document_ids"], row["positive_scores"], strict=True),
            zip(row["negative_document_ids"], row["negative_scores"], strict=True),
        )
    )


def from_swift(out: Path) -> Counter[Triplet]:
    return Counter(
        triplet
        for row in opened(str(out))
        for triplet in crossed(
            row["query_id"],
            zip(row["positive_ids"], row["positive_scores"], strict=True),
            zip(row["negative_ids"], row["negative_scores"], strict=True),
        )
    )


def from_passages(out: Path) -> Counter[Triplet]:
    return Counter(
        triplet
        for row in opened(str(out))
        for triplet in crossed(
            row["query_id"], scored(row["positive_passages"], "docid"), scored(row["negative_passages"], "docid")
        )
    )


def scored(documents: list[dict[str, Any]], name: str) -> list[tuple[str, float | None]]:
    return [(document[name], document["score"]) for document in documents]


def from_distillation(out: Path) -> Counter[Triplet]:
    return Counter(
        triplet
        for row in opened(str(out), "train")
        for triplet in crossed(
            row["query_id"],
            [(row["document_ids"][0], row["scores"][0])],
            zip(row["document_ids"][1:], row["scores"][1:], strict=True),
        )
    )


def from_rows(out: Path) -> Counter[Triplet]:
    names = ("anchor_id", "positive_id", "negative_id", "positive_score", "negative_score")
    return Counter(tuple(row[name] for name in names) for row in opened(str(out)))


READERS: dict[str, Callable[[Path], Counter[Triplet]]] = {
    "flagembedding": from_flagembedding,
    "nemo": from_nemo,
    "tevatron": from_tevatron,
    "tevatron-passages": from_passages,
    "ms-swift": from_swift,
    "ms-swift-reranker": from_swift,
    "distillation": from_distillation,
    "jsonl": from_rows,
    "hub": from_rows,
}


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("reference", ["min", "each"])
def test_ids_and_scores_are_those_of_the_triplets(mined: Run, tmp_path: Path, to: str, reference: str) -> None:
    run = mined.at(tmp_path / "run") if reference == "each" else mined
    if reference == "each":
        run = Run(
            {**mined.copied(tmp_path / "run").config, "mining": {**mined.config["mining"], "margin_reference": "each"}}
        )
        run.mine()
    done = export(run, to, tmp_path / "out")
    assert READERS[to](tmp_path / "out") == mined_triplets(run)
    with_negatives = {(row[0], row[1]) if reference == "each" else row[0] for row in mined_triplets(run)}
    assert done.units - done.left_out == len(with_negatives)
    assert done.left_out > 0, "every anchor has a negative: nothing is shown of those that have none"
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir()), "something temporary is left"


@pytest.mark.parametrize(
    "overrides",
    [
        ("mining.relative_margin=0.3", "mining.num_negatives=5"),
        ("mining.min_score=null", "mining.max_depth=293"),  # searched again, deeper than what is stored
        ("mining.num_random=2", "mining.on_shortage=random"),
    ],
)
def test_rows_follow_the_config_and_not_what_was_made_before(
    mined: Run, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Other settings need no `triplets` run first, and give what it would write; `triplets/` is not touched."""
    run = mined.copied(tmp_path / "run")
    export(run, "flagembedding", tmp_path / "before", *overrides)
    assert run.content("triplets") == mined.content("triplets")
    run.mine(*overrides)
    assert from_flagembedding(tmp_path / "before") == mined_triplets(run) != mined_triplets(mined)
    export(run, "flagembedding", tmp_path / "after", *overrides)
    before, after = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("before", "after"))
    assert before == after
    if "mining.max_depth=293" in overrides:
        assert run.manifest("triplets")["stats"]["searched_deeper"] > 0


# --- FlagEmbedding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distilled", [False, True])
def test_flagembedding_reads_its_export(mined: Run, tmp_path: Path, distilled: bool) -> None:
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments
    from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderTrainDataset

    export(mined, "flagembedding", tmp_path / "out", shard_rows=40)
    assert len(list((tmp_path / "out").iterdir())) > 1
    arguments = AbsEmbedderDataArguments(
        train_data=[str(tmp_path / "out")],
        cache_path=str(tmp_path / "cache"),
        train_group_size=4,
        knowledge_distillation=distilled,
    )
    dataset = AbsEmbedderTrainDataset(arguments, tokenizer=None)
    documents, queries = source_texts(mined)
    known = mined_triplets(mined)
    assert len(dataset) == len({row[0] for row in known})
    pairs = {(queries[row[0]], documents[row[2]], row[4]) for row in known}
    positives = {(queries[row[0]], documents[row[1]], row[3]) for row in known}
    for at in range(len(dataset)):
        query, passages, scores = dataset[at]
        assert len(passages) == 4
        if not distilled:
            assert scores is None
            assert all((query, passage) in {pair[:2] for pair in pairs} for passage in passages[1:])
            continue
        assert (query, passages[0], scores[0]) in positives
        assert all((query, *document) in pairs for document in zip(passages[1:], scores[1:], strict=True))


# --- NeMo -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_rows", [None, 30])
def test_nemo_finds_every_document(mined: Run, tmp_path: Path, shard_rows: int | None) -> None:
    """Step by step what the loader of NeMo Automodel does with each file."""
    done = export(mined, "nemo", tmp_path / "out", shard_rows=shard_rows)
    files = sorted((tmp_path / "out").glob("*.json"))
    assert len(files) == (1 if shard_rows is None else math.ceil(done.rows / shard_rows))
    documents, queries = source_texts(mined)
    seen = set()
    for file in files:
        data = json.loads(file.read_text("utf-8"))
        assert list(data) == ["corpus", "mining", "data"]
        assert data["mining"]["args"]["mining"]["num_negatives"] == 3
        (place,) = data["corpus"]
        folder = (file.parent / place["path"]).resolve()
        about = json.loads((folder / "merlin_metadata.json").read_text("utf-8"))
        assert about["class"] == "TextQADataset"
        corpus = {row["id"]: row["text"] for row in load_dataset(str(folder))["train"]}
        for row in data["data"]:
            assert row["corpus_id"] == about["corpus_id"]
            assert row["question"] == queries[row["question_id"]]
            assert row["pos_doc"]
            assert row["neg_doc"]
            for document in row["pos_doc"] + row["neg_doc"]:
                assert corpus[document["id"]] == documents[document["id"]]
                seen.add(document["id"])
    assert set(corpus) == seen


# --- Tevatron -------------------------------------------------------------------------------------------


class TevatronTrainDataset:
    """Tevatron 3's `TrainDataset`, after its documentation and source: text in, the first epoch of a group out.

    As there, the arguments are names and configs for `load_dataset`, and any positive and negative may be drawn.
    """

    def __init__(self, name: str, config: str | None, corpus_name: str | None, corpus_config: str | None) -> None:
        self.rows = opened(name, config)
        self.corpus = opened(corpus_name, corpus_config) if corpus_name else None
        docids = self.corpus["docid"] if self.corpus is not None else []
        self.place = {docid: at for at, docid in enumerate(docids)}

    def text(self, docid: str) -> str:
        assert self.corpus is not None
        return str(self.corpus[self.place[docid]]["text"])

    def groups(self) -> Iterator[tuple[str, set[str], set[str]]]:
        for row in self.rows:
            if "positive_passages" in row:
                sides = (row["positive_passages"], row["negative_passages"])
                yield row["query"], *({f"{p['title']} {p['text']}".strip() for p in side} for side in sides)
            else:
                ids = row["positive_document_ids"], row["negative_document_ids"]
                yield row["query_text"], *({self.text(docid) for docid in side} for side in ids)


def texts_of_triplets(run: Run) -> dict[str, tuple[set[str], set[str]]]:
    """Query → texts of its positives, of its negatives, in the rows of `triplets`."""
    documents, queries = source_texts(run)
    found: dict[str, tuple[set[str], set[str]]] = {}
    for anchor, positive, negative, *_ in mined_triplets(run):
        positives, negatives = found.setdefault(queries[anchor], (set(), set()))
        positives.add(documents[positive])
        negatives.add(documents[negative])
    return found


@pytest.mark.parametrize("options", [{}, {"shard_rows": 20}, {"compress": True}])
def test_tevatron_resolves_ids_in_its_corpus(mined: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "out"
    export(mined, "tevatron", out, **options)
    dataset = TevatronTrainDataset(str(out), "train", str(out), "corpus")
    assert {query: sides for query, *sides in dataset.groups()} == {
        query: list(sides) for query, sides in texts_of_triplets(mined).items()
    }
    named = {name for row in dataset.rows for side in ("positive", "negative") for name in row[f"{side}_document_ids"]}
    assert named == set(dataset.place), "the corpus holds what is named, each once"
    assert len(dataset.place) == len(dataset.corpus or ())


def test_tevatron_passages_are_whole(mined: Run, tmp_path: Path) -> None:
    export(mined, "tevatron-passages", tmp_path / "out")
    dataset = TevatronTrainDataset(str(tmp_path / "out"), None, None, None)
    assert {query: tuple(sides) for query, *sides in dataset.groups()} == texts_of_triplets(mined)


@pytest.mark.parametrize("to", ["tevatron", "tevatron-passages"])
def test_tevatron_has_the_ranking_on_request(mined: Run, tmp_path: Path, to: str) -> None:
    export(mined, to, tmp_path / "out", run=True)
    lines = (tmp_path / "out" / "run.tsv").read_text("utf-8").splitlines()
    assert [
        (query, document, float(score)) for query, document, score in (line.split("\t") for line in lines)
    ] == stored_ranking(mined)


def stored_ranking(run: Run) -> list[tuple[str, str, float]]:
    """Anchor, document and score of all candidates, as search left them."""
    ids = run.tables("documents")["id"].to_pylist()
    anchors = run.tables("anchors")["id"].to_pylist()
    stored = [row for file in run.files("search") for row in pq.read_table(file).to_pylist()]
    return [
        (anchor, ids[row], float(score))
        for anchor, found in zip(anchors, stored, strict=True)
        for row, score in zip(found["rows"], found["score_dense"], strict=True)
        if row >= 0
    ]


# --- TREC -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz", "folder"])
def test_trec_run_holds_every_candidate(plain: Run, tmp_path: Path, name: str) -> None:
    """Read by ir-measures, which takes trec_eval's files; anchors without a negative are in it too."""
    import ir_measures

    done = export(plain, "trec-run", tmp_path / name, "mining.max_score=-100")
    file = tmp_path / name / "run.trec" if name == "folder" else tmp_path / name
    text = gzip.decompress(file.read_bytes()).decode() if name.endswith("gz") else file.read_text("utf-8")
    expected = stored_ranking(plain)
    read: Any = ir_measures.read_trec_run  # untyped
    assert [(row.query_id, row.doc_id, row.score) for row in read(text)] == expected
    assert (done.rows, done.left_out) == (len(expected), 0)
    fields = [line.split(" ") for line in text.splitlines()]
    assert {(q0, tag) for _, q0, _, _, _, tag in fields} == {("Q0", "negpipe")}
    for _, group in groupby(fields, key=lambda line: line[0]):
        ranks = [int(rank) for _, _, _, rank, _, _ in group]
        assert ranks == list(range(1, len(ranks) + 1))


def test_an_id_that_a_run_cannot_hold_is_named(tmp_path: Path) -> None:
    """A space ends a field of a TREC run: nothing is written; Tevatron's ends fields with tabs."""
    documents = small_source.documents()
    documents[1]["_id"] = "d 1"
    small_source.build(tmp_path / "source", documents)
    run = Run({**small_source.settings(tmp_path / "source"), "mining": {"range_max": 40, "num_negatives": 39}})
    run.mine()
    with pytest.raises(InputError, match="'d 1'") as caught:
        export(run, "trec-run", tmp_path / "run.trec")
    assert caught.value.remedy
    assert not (tmp_path / "run.trec").exists()
    export(run, "tevatron", tmp_path / "tevatron", run=True)
    assert "\td 1\t" in (tmp_path / "tevatron" / "run.tsv").read_text("utf-8")


# --- ms-swift -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "role"), [("ms-swift", "user"), ("ms-swift-reranker", "assistant")])
def test_swift_messages(mined: Run, tmp_path: Path, to: str, role: str) -> None:
    """What its template makes of a row, after its documentation and `TemplateInputs.from_dict`."""
    done = export(mined, to, tmp_path / "train.jsonl")
    known: dict[str, tuple[set[str], set[str]]] = {}
    pairs = set()
    for row in opened("json", data_files=str(tmp_path / "train.jsonl")):
        prefixes = ("rejected_", "positive_", "negative_")
        chosen = {name: value for name, value in row.items() if not name.startswith(prefixes)}
        (query,) = chosen["messages"]
        assert query["role"] == "user"
        assert len(row["positive_messages"]) == 1, "embedding training takes exactly one"
        positives, negatives = known.setdefault(query["content"], (set(), set()))
        for side, texts in (("positive", positives), ("negative", negatives)):
            for messages in row[f"{side}_messages"]:
                (document,) = messages
                # Embedding: each text by itself. Reranking: appended to the query's messages, where roles alternate.
                assert document["role"] == role
                texts.add(document["content"])
        pairs.add((query["content"], row["positive_messages"][0][0]["content"]))
    assert known == texts_of_triplets(mined)
    assert len(pairs) == done.rows


# --- distillation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_rows", [None, 50])
def test_distillation_tables_join(mined: Run, tmp_path: Path, shard_rows: int | None) -> None:
    export(mined, "distillation", tmp_path / "out", "mining.margin_reference=each", shard_rows=shard_rows)
    queries, documents, scores = (opened(str(tmp_path / "out"), name) for name in ("queries", "documents", "train"))
    texts, questions = source_texts(mined)
    assert len(set(queries["query_id"])) == len(queries)
    assert len(set(documents["document_id"])) == len(documents)
    assert all(row["text"] == questions[row["query_id"]] for row in queries)
    assert all(row["text"] == texts[row["document_id"]] for row in documents)
    assert set(scores["query_id"]) == set(queries["query_id"])
    assert {name for row in scores for name in row["document_ids"]} == set(documents["document_id"])
    assert all(len(row["document_ids"]) == len(row["scores"]) > 1 for row in scores)


def test_sentence_transformers_resolves_and_distils(mined: Run, tmp_path: Path, tiny: Path) -> None:
    """Trained for a step straight from ids: its `resolve_ids` puts the texts in, the scores are the labels."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    resolve_ids = pytest.importorskip("sentence_transformers", minversion="6").util.resolve_ids
    export(mined, "distillation", tmp_path / "out", "mining.on_shortage=drop")
    train, queries, documents = (opened(str(tmp_path / "out"), name) for name in ("train", "queries", "documents"))
    texts, questions = source_texts(mined)
    ids = train.to_list()
    train.set_transform(resolve_ids({"query_id": queries, "document_ids": documents}))
    for row, resolved in zip(ids, train, strict=True):
        assert resolved == {
            "query": questions[row["query_id"]],
            **{f"document_{at}": texts[name] for at, name in enumerate(row["document_ids"], 1)},
            "scores": row["scores"],
        }
    model = SentenceTransformer(str(tiny), device="cpu")
    train_a_step(model, train, losses.DistillKLDivLoss(model), tmp_path)


class KDProcessing:
    """PyLate's `KDProcessing` and the labels of its collator, after their source."""

    def __init__(self, queries: Dataset, documents: Dataset, n_ways: int = 32) -> None:
        self.queries = dict(zip(queries["query_id"], queries["text"], strict=True))
        self.documents = dict(zip(documents["document_id"], documents["text"], strict=True))
        self.n_ways = n_ways

    def transform(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        cut = {name: [own[: self.n_ways] for own in examples[name]] for name in ("document_ids", "scores")}
        return {
            "query": [self.queries[name] for name in examples["query_id"]],
            "documents": [[self.documents[name] for name in own] for own in cut["document_ids"]],
            "scores": cut["scores"],
        }


def test_pylate_batches_its_export(mined: Run, tmp_path: Path) -> None:
    """Its collator stacks the scores of a batch: pairs that lack negatives are left out, and counted as such."""
    import torch

    done = export(mined, "pylate", tmp_path / "out")
    train, queries, documents = (opened(str(tmp_path / "out"), name) for name in ("train", "queries", "documents"))
    train.set_transform(KDProcessing(queries, documents).transform)
    batch = train[:]
    assert torch.tensor(batch["scores"]).shape == (done.rows, 4)
    texts, questions = source_texts(mined)
    wanted: dict[tuple[str, str], set[str]] = {}
    for anchor, positive, negative, *_ in mined_triplets(mined):
        wanted.setdefault((questions[anchor], texts[positive]), set()).add(texts[negative])
    full = {(*pair, *sorted(negatives)) for pair, negatives in wanted.items() if len(negatives) == 3}
    rows = zip(batch["query"], batch["documents"], strict=True)
    assert {(query, own[0], *sorted(own[1:])) for query, own in rows} == full
    assert set(queries["text"]) == {row[0] for row in full}
    per_anchor = Counter(anchor for anchor, _ in {(row[0], row[2]) for row in mined_triplets(mined)})
    assert done.short == sum(count < 3 for count in per_anchor.values()) > 0
    assert done.without == done.units - len(per_anchor) > 0


# --- Sentence Transformers ------------------------------------------------------------------------------


def train_a_step(model: Any, dataset: Dataset, loss: Any, folder: Path) -> None:
    from sentence_transformers import CrossEncoderTrainer, CrossEncoderTrainingArguments, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.cross_encoder import CrossEncoder

    crossed = isinstance(model, CrossEncoder)
    arguments = (CrossEncoderTrainingArguments if crossed else Arguments)(
        output_dir=str(folder / "trained"),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = CrossEncoderTrainer if crossed else SentenceTransformerTrainer
    done = trainer(model=model, args=arguments, train_dataset=dataset, loss=loss).train()
    assert math.isfinite(done.training_loss)


COLUMNS = {
    "triplet": ["anchor", "positive", "negative"],
    "n-tuple": ["anchor", "positive", "negative_1", "negative_2", "negative_3"],
    "labeled-pair": ["anchor", "positive", "label"],
    "labeled-list": ["anchor", "positive", "labels"],
}


@pytest.mark.slow
@pytest.mark.parametrize("form", COLUMNS)
@pytest.mark.parametrize("draws", [False, True])
def test_sentence_transformers_follows_the_format(mined: Run, tmp_path: Path, form: str, draws: bool) -> None:
    """The rows of `triplets`, without a column that its trainer would take for an input."""
    run = mined.copied(tmp_path / "run")
    overrides = [f"output.format={form}", *(["mining.num_negatives=2", "mining.num_random=1"] if draws else [])]
    run.mine(*overrides)
    done = export(run, "sentence-transformers", tmp_path / "train.parquet", *overrides)
    dataset = opened("parquet", data_files=str(tmp_path / "train.parquet"))
    assert dataset.column_names == COLUMNS[form]
    rows = pq.read_table(run.folder / "triplets")
    assert set(rows.column_names) > set(COLUMNS[form])
    assert dataset.to_list() == rows.select(COLUMNS[form]).to_pylist()
    assert done.rows == rows.num_rows
    anchors = Counter(row["anchor_id"] for row in rows.to_pylist())
    assert done.units - done.left_out == len(anchors)


@pytest.mark.slow
@pytest.mark.parametrize("form", COLUMNS)
def test_sentence_transformers_trains_on_its_export(mined: Run, tmp_path: Path, tiny: Path, form: str) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.cross_encoder import losses as of_pairs
    from sentence_transformers.sentence_transformer import losses

    export(mined, "sentence-transformers", tmp_path / "out", f"output.format={form}")
    dataset = opened("parquet", data_dir=str(tmp_path / "out"))
    if form.startswith("labeled"):
        folder = tmp_path / "plain"
        shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("modules.json", "1_Pooling"))
        scorer = CrossEncoder(str(folder), num_labels=1, device="cpu")
        loss = of_pairs.BinaryCrossEntropyLoss if form == "labeled-pair" else of_pairs.LambdaLoss
        train_a_step(scorer, dataset, loss(scorer), tmp_path)
    else:
        model = SentenceTransformer(str(tiny), device="cpu")
        train_a_step(model, dataset, losses.MultipleNegativesRankingLoss(model), tmp_path)


# --- what is left out -----------------------------------------------------------------------------------


@pytest.mark.cases
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("form", COLUMNS)
@pytest.mark.parametrize("shortage", ["keep", "drop"])
def test_what_is_left_out_is_counted_by_reason(plain: Run, tmp_path: Path, to: str, form: str, shortage: str) -> None:
    """Anchors without any candidate within the cutoff, and some with one or two of three: counted by hand."""
    least = "mining.min_score=0.55"
    export(plain, "flagembedding", tmp_path / "kept.jsonl", least)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text("utf-8").splitlines()]
    counts = {row["query_id"]: len(row["neg"]) for row in kept}
    anchors = plain.tables("anchors").num_rows
    none, some = anchors - len(counts), sum(count < 3 for count in counts.values())
    assert min(none, some, len(counts) - some) > 0

    overrides = (least, f"output.format={form}", f"mining.on_shortage={shortage}")
    done = export(plain, to, tmp_path / "out", *overrides)
    by_format = to in ("jsonl", "hub", "sentence-transformers")
    all_needed = shortage == "drop" or form == "n-tuple" or to == "pylate"
    expected = none, some if all_needed else 0
    if to == "trec-run" or (by_format and form == "labeled-pair" and shortage == "keep"):
        expected = 0, 0
    assert (done.without, done.short) == expected
    assert done.units == anchors


# --- JSON, shards, gzip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [name for name in LAYOUTS if exports.LAYOUTS[name].text and name != "trec-run"])
def test_json_is_strict_and_negatives_are_never_empty(mined: Run, tmp_path: Path, to: str) -> None:
    def refused(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    export(mined, to, tmp_path / "out", "mining.max_score=12")
    (file,) = [path for path in (tmp_path / "out").iterdir() if path.name.startswith("train.")]
    text = file.read_text("utf-8")
    rows = [json.loads(text)] if to == "nemo" else [json.loads(line) for line in text.split("\n")[:-1]]
    json.loads(json.dumps(rows, allow_nan=False), parse_constant=refused)
    for row in rows[0]["data"] if to == "nemo" else rows:
        for name, value in row.items():
            if name.startswith(("pos", "neg")) and to != "jsonl":
                assert isinstance(value, list)
                assert value


def test_a_score_that_is_no_number_is_null() -> None:
    from negpipe.data.tables import Rows
    from negpipe.rows.exports.blocks import Documents

    scores = np.array([0.5, np.nan, -np.inf], np.float32)
    documents = Documents(Rows([]), np.arange(3), np.array([0, 1, 3]), scores)
    assert documents.score_lists == [[0.5], [None, None]]


@pytest.mark.parametrize("to", ["jsonl", "flagembedding", "tevatron-passages", "ms-swift"])
def test_shards_and_gzip_hold_the_same_rows(mined: Run, tmp_path: Path, to: str) -> None:
    done = export(mined, to, tmp_path / "whole")
    export(mined, to, tmp_path / "shards", shard_rows=37, compress=True)
    export(mined, to, tmp_path / "one.jsonl.gz")
    files = sorted((tmp_path / "shards").iterdir())
    assert [file.name for file in files] == [f"train-{n:05d}.jsonl.gz" for n in range(math.ceil(done.rows / 37))]
    whole = (tmp_path / "whole" / "train.jsonl").read_bytes()
    assert b"".join(gzip.decompress(file.read_bytes()) for file in files) == whole
    assert gzip.decompress((tmp_path / "one.jsonl.gz").read_bytes()) == whole
    rows = opened(str(tmp_path / "whole")).to_list()
    assert opened("json", data_files=[str(file) for file in files]).to_list() == rows
    assert opened("json", data_files=str(tmp_path / "one.jsonl.gz")).to_list() == rows
    assert len(rows) == done.rows


@pytest.mark.parametrize("to", ["hub", "sentence-transformers"])
def test_parquet_shards_hold_the_same_rows(mined: Run, tmp_path: Path, to: str) -> None:
    done = export(mined, to, tmp_path / "whole")
    export(mined, to, tmp_path / "shards", shard_rows=37)
    rows = opened(str(tmp_path / "whole")).to_list()
    assert opened(str(tmp_path / "shards")).to_list() == rows
    sizes = [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "shards").rglob("*.parquet"))]
    assert sizes == [37] * (done.rows // 37) + [done.rows % 37]


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_same_run_gives_the_same_bytes(mined: Run, tmp_path: Path, to: str) -> None:
    for name in ("first", "second"):
        export(mined, to, tmp_path / name, compress=exports.LAYOUTS[to].text)
    first, second = (
        {
            file.relative_to(tmp_path / name): file.read_bytes()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        }
        for name in ("first", "second")
    )
    assert first == second


def test_blocks_cut_between_units_and_lose_none(mined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(mined, "flagembedding", tmp_path / "large")
    monkeypatch.setattr("negpipe.rows.exports.blocks._DOCUMENTS", 5)
    export(mined, "flagembedding", tmp_path / "small")
    small, large = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("small", "large"))
    assert small == large


# --- hub ------------------------------------------------------------------------------------------------


def test_hub_folder_has_a_card_and_is_not_pushed(mined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be sent")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    done = export(mined, "hub", tmp_path / "out")
    rows = pq.read_table(mined.folder / "triplets")
    assert opened(str(tmp_path / "out")).to_list() == rows.to_pylist()

    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["config_name"] == "default"
    assert "license" not in yaml.safe_load(front)
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["mining"]["num_negatives"] == 3
    assert settings["encoder"]["corpus_vectors"] == "corpus.npy"
    assert str(tmp_path.parent) not in card
    assert f"| rows | {done.rows:,} |" in body
    for name in ("positive", "negative"):
        assert f"| {name}s | " in body
    negatives = {(row["anchor_id"], row["negative_id"]): row["negative_score"] for row in rows.to_pylist()}
    mean = np.mean([score for score in negatives.values() if math.isfinite(score)], dtype=np.float64)
    assert f"| negatives | {len(negatives):,} | {mean:.4f} |" in body
    digests = {name: digest for name, digest in mined.manifest("encode")["inputs"].items() if name != "ingest"}
    assert digests
    assert all(f"| digest of {name} | {digest} |" in body for name, digest in digests.items())


@pytest.mark.parametrize("to", ["hub", "distillation", "tevatron"])
def test_a_new_export_is_not_taken_for_the_old(mined: Run, tmp_path: Path, to: str) -> None:
    """`datasets` tells local folders with a README apart by nothing else than its YAML."""
    for negatives in (1, 2):
        export(mined, to, tmp_path / "out", f"mining.num_negatives={negatives}", force=True)
        fresh = READERS[to](tmp_path / "out")
        export(mined, "jsonl", tmp_path / f"{negatives}", f"mining.num_negatives={negatives}")
        assert fresh == from_rows(tmp_path / f"{negatives}")


def test_hub_is_pushed_when_asked(mined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    sent: list[tuple[str, Any]] = []

    class Commit:
        commit_url = "https://hub/commit"

    def uploaded(_: Any, **what: Any) -> Commit:
        sent.append(("upload", {**what, "files": sorted(p.name for p in what["folder_path"].rglob("*"))}))
        return Commit()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, name, **what: sent.append((name, what)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", uploaded)
    export(mined, "hub", tmp_path / "out", push_to_hub="me/negatives")
    assert sent[0] == ("me/negatives", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert sent[1][1]["repo_id"] == "me/negatives"
    assert sent[1][1]["files"] == ["README.md", "data", "train.parquet"]


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "beir"}, "expected one of flagembedding"),
        ({"to": "hub", "compress": True}, "already compressed"),
        ({"to": "nemo", "run": True}, "use tevatron"),
        ({"to": "jsonl", "push_to_hub": "me/x"}, "--to hub"),
        ({"to": "jsonl", "shard_rows": 0}, "1 or more"),
        ({"to": "nemo", "out": "train.json"}, "use a folder without a suffix"),
        ({"to": "tevatron", "out": "train.jsonl"}, "use a folder without a suffix"),
        ({"to": "trec-run", "out": "run.txt"}, r"a file with \.trec"),
        ({"to": "jsonl", "out": "x.jsonl", "shard_rows": 5}, "is one file"),
        ({"to": "jsonl", "out": "x.jsonl", "compress": True}, "must end in .gz"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        exports.ExportOptions(
            **{"out": Path("somewhere"), **options, **({"out": Path(options["out"])} if "out" in options else {})}
        )


def test_what_is_there_is_replaced_only_by_force(mined: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(mined, "jsonl", out)
    with pytest.raises(ConfigError, match="--force"):
        export(mined, "nemo", out)
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]
    export(mined, "nemo", out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["corpus", "train.json"]


@pytest.mark.parametrize("place", [".", "triplets", ".negpipe/search", "ledger", ".."])
def test_force_spares_the_run(mined: Run, tmp_path: Path, place: str) -> None:
    run = mined.copied(tmp_path / "run")
    before = run.content()
    with pytest.raises(ConfigError, match="not an export"):
        export(run, "jsonl", run.folder / place, force=True)
    assert run.content() == before


def test_force_spares_what_the_config_reads_and_what_is_no_export(
    mined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(mined.config["data"]["path"])
    held = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for place in (source, source / "qrels", source.parent):
        with pytest.raises(ConfigError, match=r"what the config reads|not an export"):
            export(mined, "jsonl", place, force=True)
    assert held == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"contains thesis.txt, which is not an export"):
        export(mined, "jsonl", tmp_path / "home", force=True)
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder, which is not an export"):
        export(mined, "jsonl", tmp_path / "rows.jsonl", force=True)
    assert (tmp_path / "home/thesis.txt").exists()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a split of that name is not a file
        export(mined, "jsonl", Path("train"), force=True)


def test_a_failure_leaves_what_was_there(mined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export(mined, "jsonl", out)
    before = (out / "train.jsonl").read_bytes()
    count = 0

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("negpipe.engine.progress.Silent.advance", failing)
    with pytest.raises(KeyboardInterrupt):
        export(mined, "jsonl", out, force=True)
    assert (out / "train.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_to_export_is_an_error(mined: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="negatives"):
        export(mined, "jsonl", tmp_path / "out", "mining.max_score=-100")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["mining.range_max=200", "encoder.storage=float32"])
def test_a_stage_that_is_not_current_is_named(mined: Run, tmp_path: Path, override: str) -> None:
    with pytest.raises(MissingStageError, match=r"Run `negpipe (search|encode) CONFIG` first"):
        export(mined, "jsonl", tmp_path / "out", override)


def test_shortage_fails_as_in_triplets(mined: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="on_shortage"):
        export(mined, "jsonl", tmp_path / "out", "mining.on_shortage=fail")
    assert not list(tmp_path.iterdir())


def test_command_line(mined: Run, tmp_path: Path) -> None:
    run = mined.copied(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(run.config), encoding="utf-8")
    from negpipe.cli import app

    arguments = ["export", str(file), "--to", "jsonl", "--out", str(tmp_path / "out"), "--shard-rows", "50", "--gzip"]
    app([*arguments, "--set", "mining.num_negatives=2"], standalone_mode=False)
    rows = opened(str(tmp_path / "out")).to_list()
    per_pair = Counter((row["anchor_id"], row["positive_id"]) for row in rows)
    assert max(per_pair.values()) == 2
    assert all(
        one["negative_rank"] < two["negative_rank"]
        for one, two in pairwise(rows)
        if one["anchor_id"] == two["anchor_id"] and one["positive_id"] == two["positive_id"]
    )
