"""A corpus searched in slices gives the bytes of a search of it all, and a task reads nothing of other slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
from clustered import KINDS, QUERIES, vectors, write
from real_runs import Run

from negpipe import ann, graph
from negpipe.ann import slices
from negpipe.config.file import load_config
from negpipe.data.texts import text_id
from negpipe.engine import pipeline
from negpipe.engine.budget import Budget
from negpipe.engine.stage import opened
from negpipe.errors import ConfigError, MissingStageError
from negpipe.store.store import LocalStore

SLICED = "search.slice_documents=900"
SHARDS = ("index.shard_size=40000", f"index.recall_anchors={QUERIES}", "index.min_recall=0.8")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """3,000 documents in parts of 400, some of them with the vector of one in another slice."""
    folder = tmp_path_factory.mktemp("encoded")
    run = Run(write(folder))
    corpus = np.load(folder / "corpus.npy")
    corpus[1500:1600], corpus[2900:] = corpus[100:200], corpus[100:200]
    np.save(folder / "corpus.npy", corpus)
    run.mine(only="ingest")
    run.mine(only="encode")
    return run


@pytest.mark.parametrize(
    "kind", ["stream", "IVF16,SQ8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flat", *KINDS))]
)
def test_slices_find_what_a_search_of_all_finds(encoded: Run, tmp_path: Path, kind: str) -> None:
    settings = (f"index.kind={kind}", *SHARDS)
    whole, run = encoded.copied(tmp_path / "whole"), encoded.copied(tmp_path / "run")
    whole.mine(*settings)
    run.mine(*settings, SLICED)
    assert run.content() == whole.content()
    assert len(run.parts("slices")) >= 3 * len(run.parts("encode", "anchors"))
    assert run.manifest("search")["key"] == whole.manifest("search")["key"]
    assert run.mine(*settings, SLICED).ran == run.mine(*settings).ran == ()


@pytest.mark.slow
@pytest.mark.parametrize("other", ["400", "1300", "100000", "1"])
def test_the_size_of_slices_changes_no_byte(encoded: Run, tmp_path: Path, other: str) -> None:
    whole, run = encoded.copied(tmp_path / "whole"), encoded.copied(tmp_path / "run")
    whole.mine("resources.memory_budget=64MiB")
    run.mine(f"search.slice_documents={other}")
    assert run.content() == whole.content()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "IVF16,Flat", "IVF16,SQ8"])
def test_documents_that_are_no_candidates_stay_out(tmp_path: Path, kind: str) -> None:
    """They lie behind the candidates, in slices of their own or in one that candidates share."""
    pool, added = [f"pool {i}" for i in range(1_000)], [f"added {i}" for i in range(QUERIES)]
    small.write_rows(tmp_path / "pool.jsonl", [{"text": text} for text in pool])
    small.write_rows(tmp_path / "pairs.jsonl", [{"anchor": f"q{i}", "positive": t} for i, t in enumerate(added)])
    anchors = vectors(QUERIES, 2)
    table = pa.table(
        {"id": [text_id(text) for text in pool + added], "vector": list(np.concatenate([vectors(1_000, 1), anchors]))}
    )
    pq.write_table(table, tmp_path / "corpus.parquet")
    np.save(tmp_path / "anchors.npy", anchors)
    settings = small.settings(tmp_path)
    data = {"format": "pairs", "path": str(tmp_path / "pairs.jsonl"), "corpus": str(tmp_path / "pool.jsonl")}
    settings["data"] = data | {"part_rows": 150, "text": "{text}", "add_positives": False}
    settings["encoder"]["corpus_vectors"] = str(tmp_path / "corpus.parquet")
    whole = Run({**settings, "index": {"kind": kind, "shard_size": "10000", "min_recall": 0.5}})
    whole.mine()
    for documents in (150, 1_050, 1_200):
        run = whole.copied(tmp_path / str(documents))
        for stage in ("search", "triplets"):
            run.forget(stage)
        run.mine(f"search.slice_documents={documents}")
        assert run.content() == whole.content()
        rows = pq.read_table(run.files("search")[0])["rows"].combine_chunks().flatten().drop_null()
        assert rows.to_numpy().max() < 1_000


@pytest.mark.parametrize("kind", ["stream", "IVF16,Flat"])
def test_a_task_reads_its_slice_alone(encoded: Run, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = encoded.copied(tmp_path / "run")
    settings = [f"index.kind={kind}", *SHARDS, SLICED]
    run.mine(*settings, only="index")
    read: set[str] = set()
    real = LocalStore.path

    def path(store: LocalStore, name: str) -> Path:
        read.add(name)
        return real(store, name)

    parts = [file["path"] for part in run.parts("encode", "corpus") for file in part["files"]]
    shards = [file["path"] for part in run.parts("index", "shard") for file in part["files"]]
    config = load_config(run.config, ["executor.kind=inline", *settings])
    with pipeline.opened(config, graph.stages(config)) as first, monkeypatch.context() as patch:
        context = first
        for name, stage in graph.stages(config).items():
            if name == "slices":
                break
            manifest = pipeline.looked(stage, context).manifest
            assert manifest
            context = context.after(stage, manifest)
        context = stage.within(context)
        tasks = [*stage.plan(context)]
        patch.setattr(LocalStore, "path", path)
        for task in tasks:
            read.clear()
            with opened(stage, context) as running:
                running.run(task, lambda units, note: None)
            here = [place for place, name in enumerate(parts) if name in read]
            assert 1 <= len(here) <= 4 and here == [*range(here[0], here[-1] + 1)]
            assert (0 < len({*shards} & read) <= len(shards) / 2) == kind.startswith("IVF")
    assert len(tasks) >= 6


@pytest.mark.slow
def test_appended_documents_leave_the_slices_before_them(tmp_path: Path) -> None:
    config = write(tmp_path, documents=2_400)
    run = Run(config)
    run.mine(SLICED)
    before = {part["key"] for part in run.parts("slices")}
    last = len(run.parts("encode", "anchors"))
    grown = Run(write(tmp_path / "grown")).config["data"]
    config["data"], config["encoder"]["corpus_vectors"] = grown, str(tmp_path / "grown/corpus.npy")
    run.mine(SLICED)
    kept = {part["key"] for part in run.parts("slices")} & before
    assert len(before) - last <= len(kept) and len(before) >= 3 * last
    whole = Run(config).at(tmp_path / "whole")
    whole.mine()
    assert run.content() == whole.content()


def test_what_was_searched_needs_no_slices(encoded: Run, tmp_path: Path) -> None:
    run = encoded.copied(tmp_path / "run")
    run.mine()
    assert run.mine(SLICED).ran == ("slices",) and run.parts("slices") == []
    assert run.states(SLICED)["search"].state == "current"
    wanted = run.content()
    run.files("search")[0].unlink()
    assert "search" in run.mine(SLICED).ran and run.content() == wanted


@pytest.mark.slow
def test_search_asks_for_the_slices(encoded: Run, tmp_path: Path) -> None:
    run = encoded.copied(tmp_path / "run")
    run.mine(only="index")
    code, _, log = run.command("search", SLICED)
    assert code == MissingStageError.exit_code and "negpipe slices" in log
    assert run.command("slices", SLICED)[0] == run.command("search", SLICED)[0] == 0


def test_a_damaged_slice_is_made_again(encoded: Run, tmp_path: Path) -> None:
    run = encoded.copied(tmp_path / "run")
    run.mine(SLICED)
    wanted = run.content()
    run.forget("search")
    part = run.parts("slices")[1]
    broken = next(run.folder / file["path"] for file in part["files"] if file["role"] == "found")
    broken.write_bytes(broken.read_bytes()[:-8])
    assert run.mine(SLICED).ran == ("slices", "search")  # what was cut off is made again
    assert run.content() == wanted
    run.forget("search")
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    graph.mine(load_config(run.config, ["executor.kind=inline", SLICED]), repair=True)
    assert run.content() == wanted


def test_a_merge_is_the_same_in_any_memory(tmp_path: Path) -> None:
    """Of proposals, those count that the whole index would have looked at."""
    draw, parts, depth, proposed = np.random.default_rng(3), [], 5, 8
    products = draw.integers(0, 6, (70, 60)).astype(np.float32)  # many ties
    scores = draw.integers(0, 4, (70, 60)).astype(np.float32)
    for first, last in ((0, 25), (25, 31), (31, 60)):
        rows = np.broadcast_to(np.arange(last - first), (70, last - first))
        layers = [slices.layered(rows, each[:, first:last].copy()) for each in (products, scores)]
        path = tmp_path / f"{first}.npy"
        with path.open("wb") as file:
            slices.write(file, np.array_split(np.concatenate(layers, axis=1), 3), (70, 2, last - first))
        parts.append((path, first))
    everything: list[list[tuple[float, int]]] = []
    for product, score in zip(products, scores, strict=True):
        looked_at = sorted(range(60), key=lambda row: (-product[row], row))[:proposed]
        everything.append(sorted((-float(score[row]), row) for row in looked_at)[:depth])
    for memory in (70 * 12 * depth + 64 * 60, 20_000, 2**30):
        rows, found = slices.merge(parts, depth, proposed, budget=Budget(memory, 1))
        pairs = zip(found.tolist(), rows.tolist(), strict=True)
        assert [[(-score, row) for score, row in zip(*each, strict=True)] for each in pairs] == everything
    with pytest.raises(ConfigError, match="merging 3 slices"):
        slices.merge(parts, depth, proposed, budget=Budget(1_000, 1))
    rows, found = slices.merge(parts[1:2], 8, 8, budget=Budget(2**30, 1))
    assert (rows[:, 6:] == -1).all() and np.isneginf(found[:, 6:]).all()
    assert ann.slices is slices
