"""Working memory: a budget that does not suffice is refused with its number, one that does is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import small_source as small
import yaml

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.data import candidates
from negpipe.engine.manifest import Books
from negpipe.errors import BudgetError, ConfigError, InputError, StorageError

pytestmark = pytest.mark.slow


def test_parts_too_large_to_encode_are_refused(tmp_path: Path) -> None:
    small.build(tmp_path)
    for name, rows in (("corpus", small.DOCUMENTS), ("anchors", small.QUERIES)):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float16, (rows, 900_000))
    tight = ["data.part_rows=1000", "resources.memory_budget=64MiB"]
    with pytest.raises(BudgetError) as refused:
        graph.mine(load_config(small.settings(tmp_path), tight))
    assert refused.value.there == 64 * 2**20 < small.DOCUMENTS * 900_000 * 2 <= refused.value.needed
    assert "data.part_rows" in refused.value.remedy
    assert not list((tmp_path / "run/encode").glob("*.npy"))
    # One part of several is too large: known before any is encoded.
    result = graph.mine(load_config(small.settings(tmp_path), ["data.part_rows=12"]), only="ingest")
    sizes = [part.rows for part in Books(result.run_dir, "ingest").manifest().parts if part.kind != "counts"]  # type: ignore[union-attr]
    most, row = max(sizes), 900_000 * (2 + 2 * 4) / 2**20
    fitting = ["data.part_rows=12", f"resources.memory_budget={int(most * row) + 8}MiB"]
    tight = ["data.part_rows=12", f"resources.memory_budget={int(most * row) - 4}MiB"]
    assert min(sizes) < most
    with pytest.raises(ConfigError, match=rf"part of {most} rows"):
        graph.mine(load_config(small.settings(tmp_path), tight), only="encode")
    assert not list((tmp_path / "run/encode").glob("*.npy"))
    with pytest.raises(InputError, match="is zero"):  # it was read
        graph.mine(load_config(small.settings(tmp_path), fitting), only="encode")


def test_a_disk_too_small_for_the_vectors_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path))
    graph.mine(config, only="ingest")
    # Vectors, candidates, and the index, which is flat.
    total = (small.DOCUMENTS + small.QUERIES) * small.DIMENSION * 2
    found = small.QUERIES * small.DOCUMENTS * candidates.BYTES
    total += found + small.DOCUMENTS * small.DIMENSION * 4
    usage = shutil.disk_usage(tmp_path)._replace(free=total - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=rf"take about {total:,} bytes in .*, {total - 1:,} bytes are .*larger disk"):
        graph.mine(config, only="encode")
    assert not list((tmp_path / "run/encode").glob("*.npy"))
    # Vectors of another kind that are there do not count as made.
    monkeypatch.undo()
    graph.mine(config, only="encode")
    total += (small.DOCUMENTS + small.QUERIES) * small.DIMENSION * 2
    usage = shutil.disk_usage(tmp_path)._replace(free=total - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=rf"take about {total:,} bytes"):
        graph.mine(load_config(small.settings(tmp_path), ["encoder.storage=float32"]), only="encode")
    # Where anchors alone are new, the index stays.
    monkeypatch.undo()
    np.save(tmp_path / "anchors.npy", small.vectors(small.QUERIES, 3))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=4_991))
    with pytest.raises(StorageError, match=rf"take about {small.QUERIES * small.DIMENSION * 2 + found:,} bytes"):
        graph.mine(config, only="encode")


def test_a_disk_too_small_for_the_candidates_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path), ["index.kind=stream"])
    for stage in ("ingest", "encode", "index"):
        graph.mine(config, only=stage)
    total = small.QUERIES * small.DOCUMENTS * candidates.BYTES
    usage = shutil.disk_usage(tmp_path)._replace(free=total - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    message = rf"search writes about {total:,} bytes in .*, {total - 1:,} bytes are free there.*lower search\.depth"
    with pytest.raises(StorageError, match=message):
        graph.mine(config)
    assert not (tmp_path / "run/search").exists()
    # What is there already needs no room.
    monkeypatch.undo()
    parts = Books(graph.mine(config, only="search").run_dir, "search").manifest().parts  # type: ignore[union-attr]
    Books(config.run_dir, "search").manifest_path.unlink()
    (config.run_dir / parts[0].files[0].path).unlink()
    missing = parts[0].rows * small.DOCUMENTS * candidates.BYTES
    usage = shutil.disk_usage(tmp_path)._replace(free=missing - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=rf"search writes about {missing:,} bytes"):
        graph.mine(config, only="search")


def test_parts_of_long_texts_are_refused_while_they_are_read(tmp_path: Path) -> None:
    small.build(tmp_path)
    rows = [{"_id": f"d{i}", "text": f"{i} " + "a long text " * 5_000} for i in range(200)]
    small.write_rows(tmp_path / "data/corpus.jsonl", rows)
    little = "resources.memory_budget=64MiB"
    with pytest.raises(BudgetError) as refused:
        graph.mine(load_config(small.settings(tmp_path), [little, "data.part_rows=1000"]), only="ingest")
    assert refused.value.there == 32 * 2**20 < refused.value.needed < 64 * 2**20
    assert "data.part_rows" in refused.value.remedy
    graph.mine(load_config(small.settings(tmp_path), [little, "data.part_rows=20"]), only="ingest")
    graph.mine(load_config(small.settings(tmp_path), ["data.part_rows=1000"]), only="ingest")


TWO = ("executor.kind=local", "executor.workers=2", "resources.cpus=2")


@pytest.mark.guarantee("every stage keeps within `resources.memory_budget`")
def test_candidates_too_many_to_choose_from_are_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    corpus = [{"_id": f"d{i}", "text": f"text {i}"} for i in range(9_000)]
    small.write_rows(tmp_path / "data/corpus.jsonl", corpus)
    small.write_rows(tmp_path / "data/queries.jsonl", small.queries(90))
    small.write_qrels(tmp_path / "data/qrels/train.tsv", [(f"q{i}", f"d{i + k}", 1) for i in range(90) for k in (0, 1)])
    for name, rows in (("corpus", 9_000), ("anchors", 90)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32))
    settings = small.settings(tmp_path)
    deep, little = (
        ["search.depth=50000", "mining.range_max=9", "data.part_rows=16384"],
        "resources.memory_budget=130MiB",
    )
    for more, needed, there, fewer in (
        ([little], None, None, ""),
        ([little, "mining.margin_reference=each"], 173, 130, ""),
        ([little, *TWO], 124, 65, "lower executor.workers, or "),
    ):
        config = load_config(settings, [*deep, *more, f"run_dir={tmp_path}/run-{len(more)}-{needed}"])
        if needed and there:
            with pytest.raises(BudgetError) as refused:
                graph.mine(config)
            assert refused.value.there == there * 2**20
            assert needed * 2**20 <= refused.value.needed < (needed + 4) * 2**20  # with the rows that are written
            assert refused.value.remedy == f"{fewer}lower search.depth (50,000 now)"
            assert not (config.run_dir / "encode").exists()
        else:
            graph.mine(config)
            (tmp_path / "mined.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    # Exports choose by the same code, and say the same.
    less = ("--set", "resources.memory_budget=64MiB")
    outcome = small.run("export", tmp_path / "mined.yaml", "--to", "jsonl", "--out", tmp_path / "out", *less)
    assert outcome.code == 2 and "choosing from 9,000 candidates per anchor" in outcome.err


EVERY = (["ingest"], ["encode"], ["index"], ["search"], ["triplets"], ["export", "--to", "flagembedding"])


@pytest.mark.guarantee(
    "every stage keeps within `resources.memory_budget`",
    "beyond the libraries; what cannot is refused with number and setting",
    section="rows",
)
@pytest.mark.torture
def test_every_stage_keeps_its_budget(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """270 MB of texts and 180 MB of vectors: no stage could hold either."""
    if not request.config.getoption("--torture"):
        pytest.skip("takes long: make torture")
    text = "a text as long as a passage of an encyclopaedia or a manual is " * 24
    sizes = (("small", 500), ("large", 180_000))
    least, most = (peaks(source(tmp_path / name, rows, 256, text), 256, EVERY) for name, rows in sizes)
    over = {stage: most[stage] - least[stage] for stage in most}
    assert all(megabytes <= 256 for megabytes in over.values()), over


@pytest.mark.guarantee("every stage keeps within `resources.memory_budget`")
def test_an_index_keeps_its_budget(tmp_path: Path) -> None:
    """58 MB of vectors, as much again in an index of lists: 64 MiB could not hold both."""
    folders = [source(tmp_path / name, rows, 96, "a text") for name, rows in (("small", 6_000), ("large", 150_000))]
    for folder in folders:
        peaks(folder, 512, [["ingest"], ["encode"]])
    for kind in ("IVF64,Flat", "IVF64,PQ16x4fs"):
        index = ("kind=" + kind, "shard_size=8MiB", "min_recall=0.1")
        wanted = [
            *(f"--set=index.{setting}" for setting in index),
            "--set=mining.range_max=32",
            "--set=search.depth=32",
        ]
        least, most = (peaks(folder, 64, [["index", *wanted], ["search", *wanted]]) for folder in folders)
        over = {stage: most[stage] - least[stage] for stage in most}
        assert all(megabytes <= 64 for megabytes in over.values()), (kind, over)


@pytest.mark.slow
def test_rules_by_a_column_keep_their_budget(tmp_path: Path) -> None:
    """160 MB of values in two columns, which what a larger source takes beyond a small one could not hold."""
    folders = [source(tmp_path / name, rows, 16, "a text") for name, rows in (("small", 6_000), ("large", 80_000))]
    for folder in folders:
        corpus = folder / "data/corpus.jsonl"
        rows = [json.loads(line) for line in corpus.read_text().splitlines()]
        kinds = ({"doc": f"{at // 3} {'d' * 1000}", "lang": f"{at % 2} {'l' * 1000}"} for at in range(len(rows)))
        small.write_rows(corpus, ({**row, **kind} for row, kind in zip(rows, kinds, strict=True)))
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings["data"]["extra"] = {"corpus": ["doc", "lang"]}
        settings["search"] = {"depth": 64}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        peaks(folder, 1024, [["ingest"], ["encode"], ["index"], ["search"]])
    rules = ["never_same=[doc]", "only_same=[lang]", "where=candidate.doc != positive.lang"]
    mine = ["triplets", *(f"--set=mining.{rule}" for rule in rules)]
    least, most = (peaks(folder, 256, [mine])["triplets"] for folder in folders)
    assert most - least <= 100, (least, most)


def source(folder: Path, documents: int, dimension: int, text: str) -> Path:
    """Documents, a fiftieth as many anchors, vectors of them all and a config."""
    small.write_rows(folder / "data/corpus.jsonl", ({"_id": f"d{i}", "text": f"{i} {text}"} for i in range(documents)))
    small.write_rows(folder / "data/queries.jsonl", small.queries(documents // 50))
    small.write_qrels(folder / "data/qrels/train.tsv", [(f"q{i}", f"d{i}", 1) for i in range(documents // 50)])
    for name, rows in (("corpus", documents), ("anchors", documents // 50)):
        np.save(folder / f"{name}.npy", np.random.default_rng(rows).normal(size=(rows, dimension)).astype(np.float32))
    settings = small.settings(folder)
    settings["data"] |= {"part_rows": 4096, "text": "{text}"}
    settings["encoder"]["storage"] = "float32"
    settings["mining"]["max_depth"] = 0  # what deeper candidates take is a floor of its own
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def peaks(folder: Path, budget: int, commands: Sequence[list[str]]) -> dict[str, float]:
    """Greatest anonymous memory of each command in MiB: mapped files are the kernel's to take back."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["resources"] = {"memory_budget": f"{budget}MiB", "cpus": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    found = {}
    for name, *options in commands:
        out = ["--out", str(folder / "out.jsonl")] if name == "export" else []
        process = subprocess.Popen([sys.executable, "-m", "negpipe", name, str(folder / "config.yaml"), *options, *out])
        most = 0
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.005)
        assert process.returncode == 0
        found[name] = most / 1024
    return found
