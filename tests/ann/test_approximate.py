"""Approximate indexes in whole runs: recall is stated and true, what cannot reach it is refused, stages resume."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
from clustered import DIMENSION, DOCUMENTS, KINDS, QUERIES, mined, vectors, write

from negpipe import ann, graph
from negpipe.ann import approximate, auto, coded, factory
from negpipe.ann.probe import SearchJob
from negpipe.config.file import load_config
from negpipe.data import candidates
from negpipe.data.tables import open_table
from negpipe.data.texts import text_id
from negpipe.engine.budget import Budget
from negpipe.engine.manifest import Books
from negpipe.errors import BudgetError, ConfigError, DamagedError, InputError, RecallError, StorageError


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every index is made from."""
    settings = write(tmp_path_factory.mktemp("approximate"))
    for stage in ("ingest", "encode"):
        graph.mine(load_config(settings), only=stage)
    return settings


@pytest.fixture
def source(encoded: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The data of all; a run directory of its own, in which the index is next."""
    return {**encoded, "run_dir": str(shutil.copytree(encoded["run_dir"], tmp_path / "run"))}


def stored(run_dir: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    manifest = Books(run_dir, "search").manifest()
    assert manifest is not None
    read = Books(run_dir, "ingest").manifest()
    assert read is not None
    tables = [open_table(run_dir / part.files[0].path) for part in read.of_kind("anchors")]
    pieces = [
        piece
        for part, table in zip(manifest.parts, tables, strict=True)
        for piece in candidates.read(run_dir / part.files[0].path, table["id"], depth=64)
    ]
    return np.concatenate([one.rows for one in pieces]), np.concatenate([one.scores for one in pieces])


def exact(run_dir: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows and scores of the 64 nearest, in double precision."""
    manifest = Books(run_dir, "encode").manifest()
    assert manifest is not None
    corpus = np.concatenate([np.load(run_dir / part.files[0].path) for part in manifest.of_kind("corpus")]).astype(
        np.float64
    )
    anchors = np.concatenate([np.load(run_dir / part.files[0].path) for part in manifest.of_kind("anchors")])
    products = anchors.astype(np.float64) @ corpus.T
    rows = np.argsort(-products, axis=1, kind="stable")[:, :64]
    return rows, products


@pytest.mark.slow
@pytest.mark.guarantee(
    "an approximate index states its recall",
    "it is that of an exact search, within its interval",
    section="rows",
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_recall_is_true(source: dict[str, Any], kind: str) -> None:
    result = mined(source, f"index.kind={kind}", "index.min_recall=0.9", "index.recall_anchors=150")
    rows, scores = stored(result.run_dir)
    true, products = exact(result.run_dir)
    found = np.array([np.isin(true[i], rows[i]).mean() for i in range(QUERIES)])
    stats = result.stats["index"]
    low, high = stats["recall_interval"]
    assert low >= 0.9 or stats["recall"] == 1.0
    # What numpy counts for all 300 anchors lies within the interval of the 150 that were looked at.
    assert low - 1e-4 <= found.mean() <= high + 1e-4
    assert scores[rows >= 0] == pytest.approx(np.take_along_axis(products, rows, axis=1)[rows >= 0], abs=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    marked = [part.meta["approximate"] for part in Books(result.run_dir, "search").manifest().parts]  # type: ignore[union-attr]
    assert set(marked) == {kind}
    path = result.run_dir / Books(result.run_dir, "search").manifest().parts[0].files[0].path  # type: ignore[union-attr]
    assert pq.read_schema(path).metadata[b"negpipe.ann.approximate"] == kind.encode()


@pytest.mark.guarantee("an approximate index states its recall")
def test_recall_over_the_window_and_the_shift_at_its_edges(source: dict[str, Any]) -> None:
    settings = ["index.kind=IVF16,Flat", "index.nprobe=6", "index.min_recall=0.3", "index.recall_anchors=300"]
    result = mined(source, *settings)
    rows, _ = stored(result.run_dir)
    true, _ = exact(result.run_dir)
    check = functools.partial(check_window, rows, true)
    check(result.stats["triplets"]["recall_window"], 2, 10)
    # Another window is chosen from the same candidates, and stated by itself.
    again = mined(source, *settings, "mining.range_min=5", "mining.range_max=14")
    assert again.ran == ("triplets",)
    check(again.stats["triplets"]["recall_window"], 5, 14)


def check_window(rows: Any, true: Any, window: dict[str, float], first: int, last: int) -> None:
    assert (window["first"], window["last"]) == (first, last)
    inside = np.mean([np.isin(true[i, first:last], rows[i]).mean() for i in range(QUERIES)])
    assert window["recall"] == pytest.approx(inside, abs=1e-4)
    assert window["low"] < inside < window["high"]
    for edge, rank in (("shift_first", first), ("shift_last", last - 1)):
        shifts = [list(true[i]).index(rows[i, rank]) - rank for i in range(QUERIES) if rows[i, rank] in true[i]]
        assert window[edge] == pytest.approx(np.mean(shifts), abs=1e-3)


def test_too_few_lists_are_refused_with_the_curve(source: dict[str, Any]) -> None:
    told = r"min_recall 0.98 .* nprobe 1: recall 0\.\d+.*raise index.nprobe or set it to null"
    with pytest.raises(RecallError, match=told):
        mined(source, "index.kind=IVF16,Flat", "index.nprobe=1")
    with pytest.raises(RecallError, match=r"proposed 64: recall 0\.\d+; .*proposed 1,024: recall"):
        mined(source, "index.kind=IVF16,PQ1x4fs", "index.nprobe=1")
    # Nothing is lost: with the effort left to it, the trained lists are there already.
    folder = Path(source["run_dir"]) / "index"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.faiss")}
    mined(source, "index.kind=IVF16,Flat")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.faiss")} == before


def test_each_task_is_done_once(source: dict[str, Any]) -> None:
    run_dir = mined(source, "index.kind=IVF16,Flat").run_dir
    manifest = Books(run_dir, "index").manifest()
    assert manifest is not None
    kinds_made = [part.kind for part in manifest.parts]
    assert kinds_made.count("trained") == kinds_made.count("tuned") == 1
    first = {path: path.stat().st_mtime_ns for path in (run_dir / "index").iterdir()}
    tuned = manifest.of_kind("tuned")[0]
    (run_dir / tuned.files[0].path).unlink()
    again = mined(source, "index.kind=IVF16,Flat")
    assert again.ran == ("index",)
    changed = {path for path in (run_dir / "index").iterdir() if first.get(path) != path.stat().st_mtime_ns}
    assert changed == {run_dir / file.path for file in tuned.files}


@pytest.mark.slow
@pytest.mark.guarantee("workers, threads, blocks and memory change no byte")
def test_the_same_bytes_with_workers_and_little_memory(source: dict[str, Any]) -> None:
    shutil.copytree(source["run_dir"], f"{source['run_dir']}-2")
    one = mined(source, "index.kind=IVF16,Flat")
    other = ["executor.kind=local", "executor.workers=2", "resources.cpus=2", "resources.memory_budget=160MiB"]
    config = load_config(source, ["index.kind=IVF16,Flat", f"run_dir={source['run_dir']}-2", *other])
    for stage in ("index", "search"):
        graph.mine(config, only=stage)
    ours, theirs = small.output(one.run_dir), small.output(config.run_dir)
    assert {Path(name).parts[0] for name in theirs} == {"ingest", "encode", "index", "search"}
    assert theirs.items() <= ours.items()
    assert {name for name in ours if name.startswith(("index/", "search/"))} <= set(theirs)


def test_proposals_do_not_depend_on_memory(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    rows, anchors = (draw.standard_normal((count, DIMENSION), np.float32) for count in (2_000, 600))
    np.save(tmp_path / "rows.npy", rows)
    index = factory.train("SQ8", rows, seed=1, threads=1)
    factory.fill(index, ann.open_parts([tmp_path / "rows.npy"]), threads=1)
    about: dict[str, Any] = {"effort_value": None, "proposed": 50}
    found = {
        memory: list(coded.propose(anchors, [(index, 0)], budget=Budget(memory, 2), **about))
        for memory in (2 * 2**20, 2**26)
    }
    tight, ample = (np.concatenate([rows for _, rows in pieces]) for pieces in found.values())
    assert [len(pieces) for pieces in found.values()] == [3, 1]
    assert np.array_equal(tight, ample)
    with pytest.raises(BudgetError) as refused:
        list(coded.propose(anchors, [(index, 0)], budget=Budget(2**20, 2), **about))
    assert refused.value.there == 2**20 < refused.value.needed <= 2 * 2**20


@pytest.mark.slow
def test_an_append_leaves_full_shards_alone(tmp_path: Path) -> None:
    size = f"index.shard_size={900 * DIMENSION * 4}"
    source = write(tmp_path, 2_600)
    first = mined(source, "index.kind=IVF16,Flat", size)
    trained = next(part for part in Books(first.run_dir, "index").manifest().parts if part.kind == "trained")  # type: ignore[union-attr]
    kept = str(first.run_dir / trained.files[0].path)
    fixed = ["index.kind=IVF16,Flat", f"index.trained={kept}", size]
    mined(source, *fixed)
    before = {path.name for path in (first.run_dir / "index").glob("*.faiss")}
    write(tmp_path)
    grown = mined(source, *fixed)
    shards = [part for part in Books(grown.run_dir, "index").manifest().parts if part.kind == "shard"]  # type: ignore[union-attr]
    names = [Path(part.files[0].path).name for part in shards]
    assert len(names) >= 4 and sum(name in before for name in names) >= len(names) - 2
    assert sum(part.rows for part in shards) == DOCUMENTS
    rows, _ = stored(grown.run_dir)
    assert rows.max() >= 2_600
    # The recall is that of the grown corpus.
    true, _ = exact(grown.run_dir)
    found = np.mean([np.isin(true[i], rows[i]).mean() for i in range(QUERIES)])
    assert grown.stats["index"]["recall"] == pytest.approx(found, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["IVF16,Flat", "IVF16,SQ8"])
def test_documents_added_for_positives_stay_out_of_the_candidates_and_of_the_recall(kind: str, tmp_path: Path) -> None:
    pool = [f"pool {i}" for i in range(DOCUMENTS)]
    added = [f"added {i // 20} {i}" for i in range(20 * QUERIES)]  # as near to its anchor as can be, 20 of them
    small.write_rows(tmp_path / "pool.jsonl", [{"text": text} for text in pool])
    pairs = [{"anchor": f"q{text.split()[1]}", "positive": text} for text in added]
    small.write_rows(tmp_path / "pairs.jsonl", pairs)
    anchors = vectors(QUERIES, 2)
    everything = np.concatenate([vectors(DOCUMENTS, 1), np.repeat(anchors, 20, axis=0)])
    table = pa.table({"id": [text_id(text) for text in pool + added], "vector": list(everything)})
    pq.write_table(table, tmp_path / "corpus.parquet")
    np.save(tmp_path / "anchors.npy", anchors.repeat(20, axis=0))  # of the rows of pairs
    settings = small.settings(tmp_path)
    data = {"format": "pairs", "path": str(tmp_path / "pairs.jsonl"), "corpus": str(tmp_path / "pool.jsonl")}
    settings["data"] = data | {"part_rows": 400, "text": "{text}", "add_positives": False}
    settings["encoder"]["corpus_vectors"] = str(tmp_path / "corpus.parquet")
    settings["search"] = {"depth": 64}
    asked = [f"index.kind={kind}", f"index.recall_anchors={QUERIES}", "index.min_recall=0.8", "index.nprobe=6"]
    result = mined(settings, *asked)
    rows, _ = stored(result.run_dir)
    assert rows.max() < DOCUMENTS
    true, _ = exact(result.run_dir)
    found = np.mean([np.isin(true[i], rows[i]).mean() for i in range(QUERIES)])
    assert result.stats["index"]["recall"] == pytest.approx(found, abs=1e-4)
    assert found < 1


def test_auto_is_decided_by_sizes(source: dict[str, Any]) -> None:
    assert auto.choose(10_000, 384, 10_000, 320)[0] == "stream"
    assert auto.choose(1_000_000, 384, 100, 320)[0] == "stream"
    kind, reason = auto.choose(10_000_000, 384, 100_000, 320)
    assert kind.startswith("IVF") and kind.endswith(",Flat") and "times as fast" in reason
    # Half as many lists where the sample of more of them is beyond the default budget.
    assert auto.choose(10_000_000, 768, 1_000_000, 320)[0] == "IVF4096,Flat"
    for dimension in (384, 768, 4096):
        ((_, lists, trained, _),) = auto.options(50_000_000, dimension, 320)
        assert 39 * lists <= trained and 2 * trained * dimension * 4 <= 2**31
    result = mined(source, "index.kind=auto")
    assert result.stats["index"]["kind"] == "stream"
    # What auto means is in the key: naming it changes nothing.
    assert mined(source, "index.kind=stream").ran == ()


def test_auto_that_means_lists_is_those_lists(source: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "choose", lambda *sizes: ("IVF16,Flat", "told to"))
    result = mined(source, "index.kind=auto")
    stats = result.stats["index"]
    assert stats["kind"] == "IVF16,Flat" and stats["recall"] >= 0.98
    rows, _ = stored(result.run_dir)
    true, _ = exact(result.run_dir)
    found = np.mean([np.isin(true[i], rows[i]).mean() for i in range(QUERIES)])
    assert stats["recall_interval"][0] - 1e-4 <= found <= stats["recall_interval"][1] + 1e-4
    assert mined(source, "index.kind=IVF16,Flat").ran == ()


def test_auto_says_why_and_the_log_and_status_state_the_recall(source: dict[str, Any]) -> None:
    config = Path(source["run_dir"]).parent / "said.yaml"
    config.write_text(json.dumps(source | {"run_dir": str(Path(source["run_dir"]).parent / "said")}))
    outcome = small.run("mine", config, "--set", "index.kind=auto")
    assert "index.kind auto chooses stream: exact search costs little here" in outcome.err.replace("\n", " ")
    settings = ("--set", "index.kind=IVF16,Flat", "--set", "index.recall_anchors=150")
    runs = [small.run(command, config, *settings) for command in ("index", "mine")]
    logged = " ".join("".join(run.err for run in runs).split())
    shown = " ".join(small.run("status", config, *settings).out.split())
    for said in (logged, shown):
        assert re.search(
            r"IVF16,Flat \(nprobe \d+\) finds [\d.]+% \([\d.]+% to [\d.]+%\) of the true candidates of 150", said
        )
        assert re.search(
            r"triplets: search finds [\d.]+% \([\d.]+% to [\d.]+%\) of the true candidates at ranks 2 to 9;"
            r" the document at rank 2 truly is [\d.]+ ranks deeper, the one at rank 9 [\d.]+",
            said,
        )


def test_too_much_for_the_memory_is_said_before(source: dict[str, Any]) -> None:
    size, held = factory.bytes_of("HNSW16", DIMENSION, DOCUMENTS, 1)
    assert held == size > DOCUMENTS * DIMENSION * 4
    places, rest = 2 * 16 * 16, 1000  # of a list in a shard, and of what a file says of itself
    for kind, copies in (("IVF16,SQ8", 2), ("IVF16,Flat", 1)):
        centres = copies * 16 * DIMENSION * 4 + places
        assert centres <= factory.bytes_of(kind, DIMENSION, DOCUMENTS, 2)[1] < centres + copies * rest
    mined(source, "index.kind=stream")
    tight = ["resources.memory_budget=64MiB", "executor.kind=local", "executor.workers=110", "resources.cpus=110"]
    with pytest.raises(BudgetError, match="HNSW64") as refused:
        mined(source, "index.kind=HNSW64", *tight)
    assert refused.value.there == 64 * 2**20 // 110 < refused.value.needed < 3 * 2**20
    # A rotation is learned in eleven times the memory of its sample.
    job = SearchJob(200_000, 384, 100, 64)
    for kind, memory in (("PQ32x4fs", 512 * 2**20), ("OPQ32,PQ32x4fs", 1100 * 2**20)):
        about = load_config(source, [f"index.kind={kind}"]), job, 1_000, 100, 0
        approximate.check_memory(*about, budget=Budget(memory, 1))
    with pytest.raises(BudgetError) as refused:
        approximate.check_memory(*about, budget=Budget(512 * 2**20, 1))
    assert -(-refused.value.needed // 2**20) == 1056
    message = r"IVF16,Flat: searching .* resources.cpus or"
    tight = ["resources.memory_budget=64MiB", "executor.kind=local", "executor.workers=4", "resources.cpus=4"]
    with pytest.raises(ConfigError, match=message):
        mined(source, "index.kind=IVF16,Flat", "index.shard_size=100kB", *tight)


BAD: list[tuple[list[str], type[Exception], str]] = [
    (["index.kind=IVF16,Flaat"], ConfigError, r"FAISS rejects it .*IVF1024,Flat"),
    (["index.kind=IVF16,PQ8x4fs,RFlat"], ConfigError, r"leave out refinement and id maps"),
    (["index.kind=PQ7x4"], ConfigError, r"FAISS rejects it for vectors of dimension 16"),
    (["index.kind=IVF512,Flat"], ConfigError, r"512 lists.*19,968 training rows.*has 3,000: set at most 76 lists"),
    (["index.kind=PQ8x12"], ConfigError, r"codes of 4,096 words.*the corpus has 3,000: set fewer bits"),
    (["index.kind=OPQ4,IVF2,PQ4x12"], ConfigError, r"codes of 4,096 words.*or index.kind: stream"),
    (["index.kind=IVF16,Flat", "index.trained=/nowhere.faiss"], InputError, r"index.trained.*the file does not exist"),
    (["index.kind=flat", "index.trained=x.faiss"], ConfigError, r"index.trained requires index.kind"),
]


@pytest.mark.parametrize(("overrides", "kind", "message"), BAD)
def test_bad_indexes_are_refused(
    source: dict[str, Any], overrides: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        mined(source, *overrides)
    assert not (Path(source["run_dir"]) / "search").exists()


def test_a_bad_string_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    source = write(tmp_path)
    with pytest.raises(ConfigError, match="FAISS rejects it"):
        mined(source, "index.kind=IVF16,Flaat")
    assert not (tmp_path / "run/ingest").exists()
    with pytest.raises(ConfigError, match=r"512 lists.*the corpus has 3,000: set at most 76 lists"):
        mined(source, "index.kind=IVF512,PQ8x4fs")
    for kind in ("PQ25", "IVF64,PQ144", "OPQ11_121,PQ11"):
        assert factory.make(kind, factory.fitting_dimension(kind))
    assert (tmp_path / "run/ingest").exists() and not (tmp_path / "run/encode").exists()


def test_a_graph_behind_a_projection_is_searched_as_deep_as_needed(source: dict[str, Any]) -> None:
    result = mined(source, "index.kind=PCA12,HNSW8", "index.min_recall=0.9", "index.recall_anchors=100")
    assert result.stats["index"]["nprobe"] > 1 and result.stats["index"]["recall"] >= 0.9
    assert "PCA12,HNSW8 (efSearch " in str(approximate.remarks(result.stats["index"]))


def test_a_change_of_kind_is_the_reason_and_not_the_settings_it_brings(source: dict[str, Any]) -> None:
    mined(source, "index.kind=stream")
    states = {state.stage: state for state in graph.status(load_config(source, ["index.kind=IVF16,Flat"]))}
    assert states["index"].reason == "index.kind changed from 'stream' to 'IVF16,Flat'"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["IVF64,Flat", "IVF16,SQ8", "PQ4x4fs"])
def test_an_index_that_was_searched_deeper_makes_what_a_fresh_run_makes(
    source: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    settings = [f"index.kind={kind}", "index.min_recall=0.9", "index.recall_anchors=150", "mining.range_max=20"]
    fresh = mined({**source, "run_dir": str(tmp_path / "fresh")}, *settings)
    deep = mined(source, *settings, "search.depth=1024")
    assert deep.stats["index"] != fresh.stats["index"]
    mined(source, *settings, "search.depth=64")
    after = mined(source, *settings)
    assert after.stats["index"] == fresh.stats["index"]
    for stage in ("index", "search", "triplets"):
        assert [part.identity() for part in Books(after.run_dir, stage).manifest().parts] == [  # type: ignore[union-attr]
            part.identity()
            for part in Books(fresh.run_dir, stage).manifest().parts  # type: ignore[union-attr]
        ], stage
    # Lists and shards are kept: only the tuning looks at the depth.
    parts = Books(after.run_dir, "index")
    assert len([part for part in parts.parts() if part.kind == "shard"]) == len(
        [part for part in Books(fresh.run_dir, "index").parts() if part.kind == "shard"]
    )


def test_a_window_of_which_too_little_is_found_is_an_error(source: dict[str, Any]) -> None:
    settings = ["index.kind=IVF16,Flat", "index.nprobe=6", "index.recall_anchors=300", "search.depth=64"]
    deep = ["mining.range_min=50", "mining.range_max=60"]
    loose = mined(source, *settings, "index.min_recall=0.3", *deep)
    window = loose.stats["triplets"]["recall_window"]["recall"]
    wanted = loose.stats["index"]["recall_interval"][0] - 0.001
    assert window < wanted
    strict = [*settings, f"index.min_recall={wanted}"]
    message = rf"finds {window:.4f} of the true candidates at ranks 50 to 59, .*raise it"
    with pytest.raises(RecallError, match=message):
        mined(source, *strict, *deep)
    assert mined(source, *strict).stats["triplets"]["recall_window"]["recall"] >= wanted
    with pytest.raises(RecallError, match=message):
        mined(source, *strict, *deep)


KINDS_OF_FAISS = [*("Flat", "SQ8", "SQfp16", "PQ8", "PQ8x4fs", "PQ4x10", "RaBitQ", "HNSW16", "HNSW24,SQ8", "PCA12,SQ8")]
KINDS_OF_FAISS += ("IVF64,Flat", "IVF64,SQ4", "IVF32,PQ8", "IVF32,PQ8x4fs", "IVF32,RaBitQ", "IVF64_HNSW16,Flat")
KINDS_OF_FAISS += ("OPQ8,PQ8x4fs", "OPQ8_16,IVF32,PQ8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_FAISS)
def test_sizes_of_any_kind_are_those_of_a_real_index(kind: str) -> None:
    import faiss

    rows = np.random.default_rng(2).standard_normal((12_000, DIMENSION), np.float32)
    index = factory.train(kind, rows, seed=1, threads=2)
    index.add(rows)
    real = len(faiss.serialize_index(index))
    size, held = factory.bytes_of(kind, DIMENSION, len(rows), 1)
    assert real * 0.95 < size < real * 1.1
    assert held <= size


@pytest.mark.slow
def test_a_budget_below_a_shard_is_refused_and_smaller_shards_fit(tmp_path: Path) -> None:
    source = write(tmp_path)
    draw = np.random.default_rng(3)
    for name, rows in (("corpus_vectors", DOCUMENTS), ("anchor_vectors", QUERIES)):
        np.save(Path(source["encoder"][name]), draw.standard_normal((rows, 2_000), np.float32))
    tight = ["index.kind=IVF16,Flat", "data.part_rows=250", "resources.memory_budget=64MiB", "resources.cpus=1"]
    with pytest.raises(BudgetError) as refused:
        mined(source, *tight)
    assert refused.value.there == 64 * 2**20 < refused.value.needed == 3 * 3_000 * 2_000 * 4
    assert "index.shard_size" in refused.value.remedy
    mined(source, *tight, "index.shard_size=8MB")


@pytest.mark.parametrize("kind", ["flat", "IVF16,Flat"])
def test_a_disk_too_small_is_known_before(source: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mined(source, "index.kind=stream")
    usage = shutil.disk_usage(source["run_dir"])._replace(free=DOCUMENTS * DIMENSION * 4 - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"writes [\d,]+ bytes in .*, 191,999 bytes are free.*index.kind: stream"):
        mined(source, f"index.kind={kind}")
    assert not [*(Path(source["run_dir"]) / "index").glob("*.faiss")]


def test_a_trained_index_of_another_kind_is_refused(source: dict[str, Any]) -> None:
    run_dir = mined(source, "index.kind=IVF16,Flat").run_dir
    trained = next(part for part in Books(run_dir, "index").manifest().parts if part.kind == "trained")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"IndexIVFFlat with 16 lists .*, index.kind IVF32,Flat means .*32 lists"):
        mined(source, "index.kind=IVF32,Flat", f"index.trained={run_dir / trained.files[0].path}")
    with pytest.raises(ConfigError, match=r"16 lists and codes of 65 bytes, .*16 lists and codes of 17 bytes"):
        mined(source, "index.kind=IVF16,SQ8", f"index.trained={run_dir / trained.files[0].path}")
    other = faiss.index_factory(8, "IVF16,Flat", faiss.METRIC_INNER_PRODUCT)
    faiss.write_index(other, str(run_dir / "other.faiss"))
    with pytest.raises(InputError, match=r"other.faiss.*index.trained.*holds dimension 8, .*Use an index") as caught:
        mined(source, "index.kind=IVF16,Flat", f"index.trained={run_dir / 'other.faiss'}")
    assert caught.value.field == "index.trained"


@pytest.mark.parametrize("damage", ["version", "rows"])
def test_an_index_file_that_does_not_fit_is_named(source: dict[str, Any], damage: str) -> None:
    run_dir = mined(source, "index.kind=IVF16,Flat").run_dir
    books = Books(run_dir, "index")
    shard = next(part for part in books.manifest().parts if part.kind == "shard")  # type: ignore[union-attr]
    path = run_dir / shard.files[0].path
    data = bytearray(path.read_bytes())
    if damage == "version":
        data[:4] = b"IwZZ"  # a kind of index that this FAISS does not know
    else:
        data[8:16] = (7).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=f"{path.name}.*(FAISS|header says 7 vectors, its lists hold 3,000)"):
        mined(source, "index.kind=IVF16,Flat", "search.depth=128")


@pytest.mark.parametrize("kind", ["IVF16,Flat", "SQ8"])
def test_an_index_with_other_vectors_than_were_encoded_is_refused(tmp_path: Path, kind: str) -> None:
    rows = vectors(1_000, 1)
    np.save(tmp_path / "rows.npy", rows)
    made = ann.open_parts([tmp_path / "rows.npy"])
    index = factory.train(kind, rows, seed=1, threads=1)
    factory.fill(index, made, threads=1)
    for name in ("a.faiss", "b.faiss"):
        with (tmp_path / name).open("wb") as file:
            factory.write(index, file)
    shards = [
        approximate.IndexShard(tmp_path / name, tmp_path / "rows.npy", 1_000 * i)
        for i, name in enumerate(("a.faiss", "b.faiss"))
    ]
    assert approximate.open_index(kind, shards[:1], made).vectors.rows == 1_000
    with pytest.raises(DamagedError, match=r"the index holds 2,000 vectors, encode made 1,000\. Run `negpipe index`"):
        approximate.open_index(kind, shards, made)
