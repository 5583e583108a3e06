"""Whole runs: the rows are what a plain computation gives, the counts add up, and only what changed is made again."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import golden_oracle
import numpy as np
import oracle_mining
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from beir_data import write_vectors
from real_runs import STAGES, Run, encoding_here, kill, wait

import negpipe
from negpipe import quickstart

TEXTS = ("anchor_id", "positive_id", "negative_id", "anchor", "positive", "negative")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXTS),
        ("positive_score", pa.float32()),
        ("negative_score", pa.float32()),
        ("negative_rank", pa.int32()),
    ]
)
IDS_AND_TEXTS = [*TEXTS, "negative_rank"]
NO_FATES = ("anchor_id", "positive_id", "candidates", "deepest_rank", "random", "short", "shortage_reason")


def triplets(run: Run) -> pa.Table:
    files = sorted((run.folder / "triplets").iterdir())
    assert [path.name for path in files] == [f"part-{number:05d}.parquet" for number in range(len(files))]
    return pa.concat_tables([pq.read_table(path) for path in files])


def ledger(run: Run) -> list[dict[str, Any]]:
    return list(pa.concat_tables([pq.read_table(path) for path in run.paths("triplets", "ledger")]).to_pylist())


def vectors(run: Run) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Stored vectors of documents and anchors."""
    documents = [*run.files("encode", "corpus"), *run.files("encode", "added")]
    anchors = run.files("encode", "anchors")
    return np.concatenate([np.load(path) for path in documents]), np.concatenate([np.load(path) for path in anchors])


# --- the rows ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stored_vectors_are_the_models(golden: Run, tiny: Path) -> None:
    import torch
    from transformers import BertModel, BertTokenizerFast

    tokenizer, model = BertTokenizerFast.from_pretrained(tiny), BertModel.from_pretrained(tiny).eval()

    def encode(text: str, length: int) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
            mean = model(**tokens).last_hidden_state[0].mean(dim=0).double().numpy()
        return np.asarray(mean / np.linalg.norm(mean))

    source = golden_oracle.Source.read(Path(golden.config["data"]["path"]))
    documents, anchors = vectors(golden)
    assert documents.dtype == anchors.dtype == np.float16
    asked = [f"list: {source.queries[name]}" for name in source.anchors("train")]
    assert (len(documents), len(anchors)) == (len(source.texts), len(asked))
    assert np.allclose(documents[::5], [encode(text, 64) for text in source.texts[::5]], atol=1e-3)
    assert np.allclose(anchors[::5], [encode(text, 48) for text in asked[::5]], atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank_over": "raw", "range_min": 5, "range_max": 45, "sampling_strategy": "random", "relative_margin": None},
        {"range_min": 3, "range_max": 20, "absolute_margin": 0.02, "num_negatives": 7, "on_shortage": "drop"},
        {"max_score": 0.9, "min_score": 0.5, "sampling_strategy": "random", "relative_margin": 0.01},
    ],
    ids=["default", "raw, random", "margins, drop", "limits, random"],
)
def test_rows_are_those_of_a_plain_computation(golden: Run, tmp_path: Path, changes: dict[str, Any]) -> None:
    mining = golden.config["mining"] | changes
    run = golden.copied(tmp_path / "run")
    result = run.mine(*(f"mining.{name}={json.dumps(value)}" for name, value in changes.items()), "search.depth=300")
    source = golden_oracle.Source.read(Path(golden.config["data"]["path"]))
    expected = golden_oracle.mined(source, *vectors(run), 42, mining)

    found = triplets(run)
    assert found.schema == SCHEMA
    group = pq.ParquetFile(next((run.folder / "triplets").iterdir())).metadata.row_group(0)
    assert {group.column(number).compression for number in range(group.num_columns)} == {"ZSTD"}
    assert len(expected.rows) > 100
    assert list(zip(*(found[name].to_pylist() for name in IDS_AND_TEXTS), strict=True)) == expected.rows
    scores = np.column_stack([found["positive_score"].to_numpy(), found["negative_score"].to_numpy()])
    assert np.allclose(scores, expected.scores, rtol=0, atol=1e-6)

    assert {row["anchor_id"]: counted(row) for row in ledger(run)} == expected.fates
    total = sum(expected.fates.values(), Counter())
    stats = result.stats["triplets"]
    assert Counter({"TAKEN": stats["negatives"]}) + upper(stats["drops"]) == total
    assert stats["candidates"] == total.total() == len(source.texts) * len(source.anchors("train"))
    assert stats["rows"] == len(expected.rows)


def test_the_folder_springs_every_trap(golden: Run) -> None:
    """Each exclusion has something to exclude that is not excluded for another reason."""
    drops = golden.manifest("triplets")["stats"]["drops"]
    assert {"positive_id", "positive_text", "positive_normalized", "shared_anchor", "anchor_text"} <= set(drops)
    for row in triplets(golden).to_pylist():
        anchor, positive, negative = (golden_oracle.normalized(row[n]) for n in ("anchor", "positive", "negative"))
        assert negative not in (anchor, positive)


def test_datasets_opens_the_triplets(golden: Run, tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = str(golden.folder / "triplets")
    loaded = load_dataset("parquet", data_dir=folder, cache_dir=str(tmp_path))["train"]
    assert loaded.column_names == SCHEMA.names
    assert loaded.num_rows == triplets(golden).num_rows
    trained = loaded.select_columns(["anchor", "positive", "negative"])
    assert trained[0] == {name: triplets(golden)[name][0].as_py() for name in ("anchor", "positive", "negative")}


@pytest.mark.slow
def test_quickstart_slice_with_the_embedded_model(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("argparse", "ast", "inspect", "shutil", "statistics", "tarfile", "textwrap", "zipfile"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", modules)
    functions = quickstart.choose(quickstart.stdlib_functions(modules), 150)
    data = tmp_path / "data"
    data.mkdir()
    quickstart.write_beir(functions, data)
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    config["run_dir"], config["data"]["path"] = str(tmp_path / "run"), str(data)
    config["encoder"] |= {"passage_max_length": 64, "query_max_length": 32}
    run = Run(config)
    with encoding_here():
        run.mine()

    assert {state.state for state in run.states().values()} == {"current"}
    with (data / "qrels" / "train.tsv").open(encoding="utf-8") as file:
        answered = {row["query-id"] for row in csv.DictReader(file, delimiter="\t")}
    anchors = run.tables("anchors")
    assert set(anchors["id"].to_pylist()) == answered
    ranks = []
    for found in pa.concat_tables([pq.read_table(path) for path in run.files("search")]).to_pylist():
        rows = found["rows"]
        ranks += [rows.index(row) if row in rows else len(rows) for row in found["positives"]]
    assert len(functions) == 150
    assert np.median(ranks) <= 1  # by chance: 75
    assert np.mean(np.array(ranks) < 10) > 0.8
    assert triplets(run).num_rows > 100


# --- the counts -------------------------------------------------------------------------------------------


def upper(counts: dict[str, int]) -> Counter[str]:
    return Counter({name.upper(): count for name, count in counts.items()})


def counted(row: dict[str, Any]) -> Counter[str]:
    """A row of the ledger as fates, without those that no candidate met."""
    return +upper({name.removeprefix("dropped_"): count for name, count in row.items() if name not in NO_FATES})


def looked_at(run: Run) -> list[tuple[list[int], list[float], list[float]]]:
    """Rows and scores of every anchor's candidates, the deeper ones where it has them, and its positives' scores."""
    seen = []
    for candidates, part in zip(run.files("search"), run.parts("triplets"), strict=True):
        table = pq.read_table(candidates)
        own = [table[name].to_pylist() for name in ("anchor", "rows", "score_dense", "positive_score_dense")]
        for file in part["files"]:
            if file["path"].startswith("deeper/"):
                for row in pq.read_table(run.folder / file["path"]).to_pylist():
                    at = own[0].index(row["anchor"])
                    assert row["rows"][:128] == own[1][at]
                    own[1][at], own[2][at] = row["rows"], row["score_dense"]
        rows, scores, positive_scores = own[1:]
        rows = [[-1 if row is None else row for row in each] for each in rows]
        scores = [[-math.inf if score is None else score for score in each] for each in scores]
        seen += list(zip(rows, scores, positive_scores, strict=True))
    return seen


def test_counts_add_up_from_what_search_stored(golden: Run, tmp_path: Path) -> None:
    # A depth below the corpus, so that most of the corpus is no candidate at all.
    run = golden.copied(tmp_path / "run")
    changes = {"range_max": 30, "sampling_strategy": "random", "max_score": 0.95}
    stats = run.mine(*(f"mining.{name}={value}" for name, value in changes.items())).stats["triplets"]
    rules = golden_oracle.DEFAULT_RULES | run.config["mining"] | changes

    documents, anchors = run.tables("documents"), run.tables("anchors").to_pylist()
    normal, hashes = documents["normalized"].to_pylist(), documents["id_hash"].to_pylist()
    recount, namesakes = {}, run.namesakes()
    for anchor, (rows, scores, positive_scores) in zip(anchors, looked_at(run), strict=True):
        emitted = {row for row, by_id in zip(anchor["known"], anchor["known_by_id"], strict=True) if by_id}
        reasons = []
        for row in rows:
            holds = {
                "POSITIVE_ID": row in emitted,
                "POSITIVE_TEXT": row in anchor["known"] and row not in emitted,
                "POSITIVE_NORMALIZED": normal[row] in {normal[known] for known in anchor["known"]},
                "SHARED_ANCHOR": normal[row] in {normal[known] for known in namesakes.get(anchor["normalized"], [])},
                "ANCHOR_TEXT": normal[row] == anchor["normalized"],
            }
            reasons.append({name for name, true in holds.items() if true})
        draws = [oracle_mining.uniform(42, anchor["id_hash"], hashes[row]) for row in rows]
        fates = oracle_mining.fates_of_unit(rows, scores, reasons, min(positive_scores), draws, rules)
        recount[anchor["id"]] = Counter(fate for fate in fates if fate != "PADDING")

    kept = ledger(run)
    assert {row["anchor_id"]: counted(row) for row in kept} == recount
    assert {row["anchor_id"]: row["candidates"] for row in kept} == {n: c.total() for n, c in recount.items()}
    assert {row["anchor_id"] for row in kept if row["short"]} == {
        name for name, fates in recount.items() if fates["TAKEN"] < 4
    }
    total = sum(recount.values(), Counter())
    assert stats["candidates"] == total.total() >= 128 * len(anchors)
    assert stats["negatives"] == total.pop("TAKEN")
    assert upper(stats["drops"]) == total
    assert stats["short_anchors"] == sum(row["short"] for row in kept)
    taken = {(row["anchor_id"], row["negative_id"]) for row in triplets(run).to_pylist()}
    assert len(taken) == stats["negatives"]


# --- what runs again --------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and times of every file, except those of the lock."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.name not in ("run.lock", "holder.json") and path.is_file()
    }


def test_second_run_does_nothing(undisturbed: Run) -> None:
    before = snapshot(undisturbed.folder)
    assert undisturbed.mine().ran == ()
    code, output, log = undisturbed.command("mine")
    assert code == 0
    assert "every stage is up to date" in output
    assert all(f"{stage}: up to date" in log for stage in STAGES)
    assert snapshot(undisturbed.folder) == before


def test_mining_settings_run_triplets_alone(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.copied(tmp_path / "run")
    kept = run.inodes("ingest", "encode", "index", "search")
    first = run.content("triplets")
    # Windows up to 64 have the depth 128.
    for override in ("mining.relative_margin=0.3", "mining.range_max=64", "mining.sampling_strategy=random"):
        assert run.mine(override).ran == ("triplets",)
    assert run.inodes("ingest", "encode", "index", "search") == kept
    assert run.mine().ran == ("triplets",)
    assert run.content("triplets") == first


def test_other_model_runs_from_encode_and_is_named(golden: Run, tmp_path: Path) -> None:
    run = golden.copied(tmp_path / "run")
    before = run.inodes()
    old = golden.config["encoder"]["model"]
    new = str(shutil.copytree(old, tmp_path / "other", symlinks=True))
    vocabulary = Path(new) / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("river", "brook"), encoding="utf-8")

    line = f"encode: starting, encoder.model changed from {old!r} to {new!r}"
    process = run.start("mine", f"encoder.model={new}")
    try:
        assert wait(process, lambda: line in run.log.read_text(encoding="utf-8"))
        assert "ingest: up to date" in run.log.read_text(encoding="utf-8")
    finally:
        kill(process)
    states = run.states(f"encoder.model={new}")
    assert [states[stage].state for stage in STAGES] == ["current", "stale", "blocked", "blocked", "blocked"]
    assert run.mine().ran == ()
    assert run.inodes() == before


@pytest.mark.slow
def test_other_vectors_and_back(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.copied(tmp_path / "run")
    before, content = run.inodes("ingest", "encode", "index", "search"), run.content("triplets")
    shutil.copytree(run.config["data"]["path"], tmp_path / "other")
    write_vectors(tmp_path / "other", 400, 160, seed=1)
    other = f"encoder.corpus_vectors={tmp_path / 'other' / 'corpus.npy'}"
    assert run.mine(other).ran == ("encode", "index", "search", "triplets")
    changed = run.inodes("encode", "search")
    kept = {part["files"][0]["path"] for part in run.parts("encode", "anchors")}
    assert {path for path, inode in changed.items() if before.get(path) == inode} == kept
    assert run.content("triplets") != content

    assert set(run.mine().ran) <= set(STAGES[1:])
    assert run.inodes("ingest", "encode", "index", "search") == before
    assert run.content("triplets") == content


@pytest.mark.guarantee(
    "`flat` and `stream` are exact",
    "the same candidates, ties included",
    section="rows",
)
def test_flat_and_stream_find_the_same(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.copied(tmp_path / "run")
    flat = list(run.content("search").values())
    assert any(path.endswith(".faiss") for path in run.content("index"))
    assert run.mine("index.kind=stream").ran == ("index", "search")
    assert not any(path.endswith(".faiss") for path in run.content("index"))
    assert list(run.content("search").values()) == flat


def test_no_more_workers_than_cores(undisturbed: Run, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed.mine("executor.kind=local", "executor.workers=3", "resources.cpus=2")
    assert "executor.workers is 3, more than resources.cpus, so 2 run at a time" in caplog.text
    caplog.clear()
    undisturbed.mine("executor.kind=local", "executor.workers=2", "resources.cpus=2")
    assert "run at a time" not in caplog.text


@pytest.mark.slow
def test_workers_share_the_cores(undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    start: Any = subprocess.Popen

    def starting(*arguments: Any, env: dict[str, str], **more: Any) -> Any:
        started.append(env)
        return start(*arguments, env=env, **more)

    monkeypatch.setattr("negpipe.engine.executors.local.subprocess.Popen", starting)
    run = undisturbed.copied(tmp_path / "run")
    run.mine("executor.kind=local", "executor.workers=2", "resources.cpus=6", "index.kind=stream")
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    assert len(started) >= 2 and {env[name] for env in started for name in names} == {"3"}


@pytest.mark.guarantee(
    "workers, threads, blocks and memory change no byte",
    "the same Parquet files",
    section="rows",
)
@pytest.mark.slow
def test_workers_change_no_byte(undisturbed: Run, tmp_path: Path) -> None:
    inline = undisturbed.at(tmp_path / "inline")
    inline.mine()
    three = undisturbed.at(tmp_path / "three")
    three.mine("executor.kind=local", "executor.workers=3", "resources.cpus=3", "resources.memory_budget=192MiB")
    assert inline.content() == undisturbed.content()
    assert three.content() == undisturbed.content()
    for stage in ("encode", "index", "search", "triplets"):
        assert len(three.parts(stage)) >= 6
        assert len({part["provenance"]["pid"] for part in three.parts(stage)}) >= 2
        assert len({part["provenance"]["pid"] for part in undisturbed.parts(stage)}) == 1


# --- Python -----------------------------------------------------------------------------------------------


def test_mine_from_a_script_without_a_main_guard(scripted: tuple[Run, list[Any]]) -> None:
    run, (folder, stats, ran) = scripted
    assert folder == str(run.folder / "triplets")
    assert tuple(ran) == STAGES
    assert stats == {stage: run.manifest(stage)["stats"] for stage in STAGES}
    assert stats["triplets"]["rows"] == triplets(run).num_rows > 0
    assert negpipe.mine(run.config, ["mining.num_negatives=3"]).ran == ()
