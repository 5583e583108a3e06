"""Every layout is opened by the loader it is for, and holds the ids and scores that `triplets` wrote."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from, or left in, the cache that `datasets` has at home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def export(mined: Run, to: str, out: Path, *overrides: str, **options: Any) -> exports.Exported:
    return finished.export(load_config(mined.config, list(overrides)), exports.Options(to=to, out=out, **options))


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
    "distillation": from_distillation,
    "jsonl": from_rows,
    "hub": from_rows,
}


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


def test_tevatron_passages_and_run(mined: Run, tmp_path: Path) -> None:
    export(mined, "tevatron", tmp_path / "out", run=True)
    documents, queries = source_texts(mined)
    for row in opened(str(tmp_path / "out")):
        assert row["query"] == queries[row["query_id"]]
        for passage in row["positive_passages"] + row["negative_passages"]:
            assert (passage["title"], passage["text"]) == ("", documents[passage["docid"]])

    ids = mined.tables("documents")["id"].to_pylist()
    anchors = mined.tables("anchors")["id"].to_pylist()
    stored = [row for file in mined.files("search") for row in pq.read_table(file).to_pylist()]
    expected = [
        (anchor, ids[row], float(score))
        for anchor, found in zip(anchors, stored, strict=True)
        for row, score in zip(found["rows"], found["score_dense"], strict=True)
        if row >= 0
    ]
    lines = (tmp_path / "out" / "run.tsv").read_text("utf-8").splitlines()
    assert [
        (query, document, float(score)) for query, document, score in (line.split("\t") for line in lines)
    ] == expected


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


# --- Sentence Transformers ------------------------------------------------------------------------------


def test_sentence_transformers_trains_on_its_export(mined: Run, tmp_path: Path, tiny: Path) -> None:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    done = export(mined, "sentence-transformers", tmp_path / "out")
    dataset = opened("parquet", data_dir=str(tmp_path / "out"))
    assert dataset.column_names == ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    documents, queries = source_texts(mined)
    wanted: dict[tuple[str, str], list[str]] = {}
    columns = ["anchor_id", "positive_id", "negative_id"]
    for row in pq.read_table(mined.folder / "triplets", columns=columns).to_pylist():
        pair = queries[row["anchor_id"]], documents[row["positive_id"]]
        wanted.setdefault(pair, []).append(documents[row["negative_id"]])
    full = Counter((*pair, *negatives) for pair, negatives in wanted.items() if len(negatives) == 3)
    assert 0 < len(full) < len(wanted), "no pair is short: nothing is shown of those that are"
    assert Counter(tuple(row.values()) for row in dataset) == full
    assert done.rows == full.total()

    model = SentenceTransformer(str(tiny), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "trained"),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    assert math.isfinite(trainer.train().training_loss)


# --- JSON, shards, gzip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [name for name, layout in exports.LAYOUTS.items() if layout.json])
def test_json_is_strict_and_negatives_are_never_empty(mined: Run, tmp_path: Path, to: str) -> None:
    def refused(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    export(mined, to, tmp_path / "out", "mining.max_score=12")
    (file,) = [path for path in (tmp_path / "out").iterdir() if path.name.startswith("train.")]
    text = file.read_text("utf-8")
    rows = [json.loads(text)] if to == "nemo" else [json.loads(line) for line in text.split("\n")[:-1]]
    json.loads(json.dumps(rows, allow_nan=False), parse_constant=refused)
    for row in rows[0]["data"] if to == "nemo" else rows:
        for name in ("pos", "neg", "pos_doc", "neg_doc", "positive_passages", "negative_passages"):
            assert row.get(name) != []
            assert isinstance(row.get(name, []), list)


def test_a_score_that_is_no_number_is_null() -> None:
    from negpipe.data.tables import Rows
    from negpipe.rows.exports.blocks import Documents

    scores = np.array([0.5, np.nan, -np.inf], np.float32)
    documents = Documents(Rows([]), np.arange(3), np.array([0, 1, 3]), scores)
    assert documents.score_lists == [[0.5], [None, None]]


@pytest.mark.parametrize("to", ["jsonl", "flagembedding", "tevatron"])
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
        export(mined, to, tmp_path / name, compress=exports.LAYOUTS[to].json)
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


@pytest.mark.parametrize("to", ["hub", "distillation"])
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
        ({"to": "hub", "compress": True}, "compressed already"),
        ({"to": "nemo", "run": True}, "tevatron has"),
        ({"to": "jsonl", "push_to_hub": "me/x"}, "--to hub"),
        ({"to": "jsonl", "shard_rows": 0}, "1 or more"),
        ({"to": "nemo", "out": "train.json"}, "writes a folder"),
        ({"to": "jsonl", "out": "x.jsonl", "shard_rows": 5}, "names one file"),
        ({"to": "jsonl", "out": "x.jsonl", "compress": True}, "ends in .gz"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        exports.Options(
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
    with pytest.raises(ConfigError, match="no export"):
        export(run, "jsonl", run.folder / place, force=True)
    assert run.content() == before


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
