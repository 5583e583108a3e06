"""Ids and texts that repeat: whatever many share is stored, read and looked up once, in the memory there is.

Four shapes: one text that many queries ask; one anchor with many positives; one document that is positive for every
anchor; many identical documents. With --torture there are 100,000 of whatever is many.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
import yaml
from test_memory import peaks

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import to_bytes
from negpipe.engine.manifest import Books
from negpipe.errors import ConfigError, InputError
from negpipe.ingest import joins
from negpipe.review import measures, quality
from negpipe.review.calibrate import Setting

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee(
        "100,000 queries share a text, or 100,000 documents, or one has them all",
        "time and memory grow with the rows, not with their square",
        section="input",
    ),
]

MANY, MOST, POOL = 8_000, 100_000, 300
SHAPES = ("text", "anchor", "document", "copies")


@pytest.fixture(scope="module")
def many(request: pytest.FixtureRequest) -> int:
    return MOST if request.config.getoption("--torture") else MANY


def source(folder: Path, shape: str, many: int, **mining: Any) -> Path:
    """A pool of documents that are nobody's positive lies near every anchor, and so do some of the others."""
    positives, asked = [f"answer {i}" for i in range(many)], [f"question {i}" for i in range(many)]
    judged = [(f"q{i}", f"d{i}", 1) for i in range(many)]
    if shape == "text":
        asked = [("Sports", "sports ", "SPORTS")[i % 3] for i in range(many)]
    if shape == "anchor":
        asked = asked[:20]
        judged = [(f"q{0 if i > 20 else i % 20}", f"d{i}", 1) for i in range(many)]
    if shape == "document":
        judged = [(f"q{i}", "d7", 1) for i in range(many)]
    if shape == "copies":
        asked, positives = asked[:20], ["Yes."] * many
        judged = judged[:20]
    texts = [*positives, *(f"something else {i}" for i in range(POOL))]
    small.write_rows(folder / "data/corpus.jsonl", ({"_id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    small.write_rows(folder / "data/queries.jsonl", ({"_id": f"q{i}", "text": text} for i, text in enumerate(asked)))
    small.write_qrels(folder / "data/qrels/train.tsv", judged)
    draw = np.random.default_rng(5)
    spread = {"corpus": np.repeat([0.3, 0.08], [many, POOL]), "anchors": np.full(len(asked), 0.05)}
    for name, width in spread.items():
        vectors = draw.normal(size=(len(width), 8)) * width[:, None] + np.eye(8)[0]
        if name == "corpus" and shape == "copies":
            vectors[:many] = vectors[0]
        np.save(folder / f"{name}.npy", vectors.astype(np.float32))
    settings = small.settings(folder)
    settings["data"] |= {"part_rows": 16384, "text": "{text}"}
    settings["mining"] |= {"range_max": 100, "num_negatives": 4, **mining}
    settings["resources"] = {"memory_budget": "256MiB", "cpus": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(yaml.safe_load((folder / "config.yaml").read_text()), list(overrides))


def ledger(config: Config) -> Iterator[dict[str, Any]]:
    manifest = Books(config.run_dir, "triplets").manifest()
    assert manifest is not None
    for file in (file for part in manifest.parts for file in part.files if file.path.startswith("ledger/")):
        yield from pq.read_table(config.run_dir / file.path).to_pylist()


# --- the joins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["documents", "queries"])
def test_a_duplicate_check_takes_no_longer_for_one_id_than_for_many(table: str) -> None:
    database = duckdb.connect(config={"threads": 1})
    columns = "id varchar, d1 ubigint, d2 ubigint, file varchar, line bigint"
    for name in ("documents", "queries", "judgments"):
        database.execute(f"create table {name} ({columns}); insert into {name} values ('other', 1, 1, 'f', 0)")
    database.execute(f"insert into {table} select 'Yes.', 7, 7, 'file', i from range(60000) r(i)")
    config = load_config({"run_dir": "run", "data": {"path": "set"}, "encoder": {"model": "some/model"}})
    started = time.monotonic()
    joins.check(config, database)
    assert time.monotonic() - started < 5  # a minute, where every row met every other
    # The first that differs from an earlier one, and the first of its id.
    database.execute(f"insert into {table} select 'Yes.', i, 7, 'file', 60000 + i from range(6, 30) r(i)")
    database.execute(f"insert into {table} values ('other', 1, 2, 'f', 9)")
    with pytest.raises(InputError) as error:
        joins.check(config, database)
    assert (error.value.file, error.value.row) == ("file", 60_006)
    assert "file, row 0" in error.value.problem


def test_rows_of_a_text_are_found_across_parts(tmp_path: Path) -> None:
    """Every text's own, whichever parts they lie in."""
    draw = np.random.default_rng(1)
    rows = {text: np.flatnonzero(draw.random(60) < 0.3) for text in draw.integers(0, 2**64, 20, np.uint64).tolist()}
    rows[max(rows)] = np.arange(50)  # over several parts
    pairs = sorted((text, row) for text, own in rows.items() for row in own.tolist())
    paths = []
    for at, low in enumerate(range(0, len(pairs), 16)):
        columns = zip(
            ("normalized", "row"), (pa.uint64(), pa.int64()), zip(*pairs[low : low + 16], strict=True), strict=True
        )
        table = pa.table({name: pa.array(column, kind) for name, kind, column in columns})
        paths.append(tmp_path / f"{at}.arrow")
        paths[-1].write_bytes(memoryview(to_bytes(table)))
    found = Namesakes(paths)
    asked = np.unique(np.array([*list(rows)[::2], max(rows), 0, 5, 2**64 - 1], np.uint64))
    values, offsets = found.of(asked)
    lists = [values[low:high].tolist() for low, high in pairwise(offsets)]
    assert lists == [rows[text].tolist() if text in rows else [] for text in asked.tolist()]
    for values, offsets in (Namesakes([]).of(asked), found.of(asked[:0])):
        assert len(values) == 0 and not offsets.any()


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SHAPES)
def mined(request: pytest.FixtureRequest, many: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Config]:
    shape = request.param
    config = config_of(source(tmp_path_factory.mktemp(shape), shape, many))
    graph.mine(config)
    return shape, config


def test_no_positive_of_any_namesake_is_a_negative(mined: tuple[str, Config], many: int) -> None:
    shape, config = mined
    pool = {f"d{many + i}" for i in range(POOL)}
    rows = pq.read_table(config.run_dir / "triplets")
    kept = list(ledger(config))
    negatives = set(rows["negative_id"].to_pylist())
    if shape == "text":
        # A document is every query's own or a namesake's.
        assert negatives <= pool
        assert sum(row["dropped_shared_anchor"] for row in kept) > many
        assert sum(row["taken"] for row in kept) > many
    elif shape == "anchor":
        own = [row for row in rows.select(["anchor_id", "negative_id"]).to_pylist() if row["anchor_id"] == "q0"]
        assert {row["negative_id"] for row in own} <= pool | {f"d{i}" for i in range(1, 21)}
        assert len(own) == 4 * (many - 19)
    elif shape == "document":
        assert "d7" not in negatives and len(rows) == 4 * many
    else:
        assert negatives <= pool and len(rows) == 4 * 20


def test_whatever_reads_candidates_reads_these(mined: tuple[str, Config]) -> None:
    shape, config = mined
    if shape == "text":
        return  # every reader's work, at the size of any other run
    measured = measures.measure_quality(config)
    assert isinstance(measured, quality.Quality) and measured.positives >= 20
    changed = config_of(config.run_dir.parent, "mining.num_random=2", "mining.near_duplicate=0.99")
    graph.mine(changed)
    assert {row["random"] for row in ledger(changed)} == {2}


def test_positives_of_one_anchor_have_negatives_of_their_own(many: int, tmp_path: Path) -> None:
    """A unit for each positive, with the candidates, exclusions and random ones of their anchor."""
    folder = source(tmp_path, "anchor", many)
    alike = config_of(folder, "mining.num_random=1")
    graph.mine(alike)
    together = {row["anchor_id"]: row for row in ledger(alike)}
    each = config_of(folder, "mining.num_random=1", "mining.margin_reference=each")
    graph.mine(each)
    reasons = ("taken", "random", "candidates", "dropped_positive_id", "dropped_not_sampled", "deepest_rank")
    units = list(ledger(each))
    assert len(units) == many
    for unit in units:
        assert [unit[name] for name in reasons] == [together[unit["anchor_id"]][name] for name in reasons]


def test_calibration_hides_the_positives_of_one_anchor_from_each_other(tmp_path: Path) -> None:
    folder = source(tmp_path, "anchor", MANY)
    config = config_of(folder, "mining.num_negatives=2", "mining.range_max=20", "search.depth=64")
    for stage in ("ingest", "encode", "index", "search"):
        graph.mine(config, only=stage)
    tracemalloc.start()
    made = measures.calibrate_settings(config, lambda _: [Setting(0, 20, "top", None, None, None)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * 2**20  # a list of all for each of them is half a gigabyte
    assert (made.anchors, made.trials) == (1, MANY - 19)


def test_room_for_the_positives_of_one_text_is_refused_by_its_settings_before_texts_are_encoded(
    tmp_path: Path,
) -> None:
    folder = source(tmp_path, "text", 3_000)
    config = config_of(folder, "mining.compat=sentence-transformers", "mining.range_max=null")
    with pytest.raises(ConfigError) as error:
        graph.mine(config)
    named = ("mining.range_max (1,004 now)", "mining.depth (2,004 now)", "1,000 positives")
    assert all(text in str(error.value) for text in named), error.value
    assert not (config.run_dir / "encode").exists()
    # What it names is a way out.
    graph.mine(config_of(folder, "mining.compat=sentence-transformers", "mining.depth=200"))


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.torture
@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_keeps_its_budget(shape: str, many: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    commands = [["ingest"], ["encode"], ["index"], ["search"], ["triplets"], ["audit"], ["quality"]]
    if not request.config.getoption("--torture"):
        commands = [["ingest"]]
    least, most = (
        peaks(source(tmp_path / name, shape, rows), 256, commands) for name, rows in (("small", 100), ("large", many))
    )
    over = {stage: most[stage] - least[stage] for stage in most}
    assert all(megabytes <= 256 for megabytes in over.values()), over
