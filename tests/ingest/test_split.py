"""`train.split`: whole groups are held out, against a union-find that reads the source by itself."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine.manifest import Books
from negpipe.errors import BudgetError, ConfigError, InputError
from negpipe.ingest import split
from negpipe.stages import STAGES, ingest

Judgment = tuple[str, str, float]


@dataclass
class Source:
    """Documents (id → text, thread), queries (id → text), judgments of the split train."""

    documents: dict[str, tuple[str, str | None]]
    queries: dict[str, str]
    judged: list[Judgment]

    def write(self, folder: Path, draw: random.Random | None = None) -> Path:
        """A BEIR folder, its rows in random order where there is something to draw it with."""
        documents = [{"_id": name, "text": text, "thread": thread} for name, (text, thread) in self.documents.items()]
        queries = [{"_id": name, "text": text} for name, text in self.queries.items()]
        judged = [*self.judged]
        if draw:
            draw.shuffle(documents)
            draw.shuffle(queries)
            draw.shuffle(judged)
        small.write_rows(folder / "data/corpus.jsonl", documents)
        small.write_rows(folder / "data/queries.jsonl", queries)
        small.write_qrels(folder / "data/qrels/train.tsv", judged)
        return folder

    @property
    def anchors(self) -> set[str]:
        return {query for query, _, grade in self.judged if grade >= 1}

    def groups(self, *, threads: bool = False) -> list[set[str]]:
        """Anchors that are connected, by a plain union-find over texts, without case, and threads."""
        parent: dict[Any, Any] = {}

        def root(node: Any) -> Any:
            while parent.setdefault(node, node) != node:
                node = parent[node]
            return node

        texts = {name: text.lower() for name, (text, _) in self.documents.items()}
        judged = [(query, document) for query, document, grade in self.judged if grade >= 1]
        for query, document in judged:
            parent[root(self.queries[query].lower())] = root(texts[document])
        if threads:
            positives = {texts[document] for _, document in judged}
            for text, thread in self.documents.values():
                if thread and text.lower() in positives:
                    parent[root(text.lower())] = root((thread,))
        found: dict[Any, set[str]] = {}
        for query in self.anchors:
            found.setdefault(root(self.queries[query].lower()), set()).add(query)
        return [*found.values()]


def tangled(seed: int, size: int = 120) -> Source:
    """Random judgments, sparse enough for many groups, with texts that repeat: exactly, but for case, across tables."""
    draw = random.Random(seed)
    documents: dict[str, tuple[str, str | None]] = {}
    for at in range(size):
        text = f"text {draw.randrange(size)}" if draw.random() < 0.2 else f"document {at}"
        thread = draw.choice([None, "", f"thread {draw.randrange(size)}"])
        documents[f"d{at}"] = (text.upper() if draw.random() < 0.1 else text, thread)
    queries = {}
    for at in range(size):
        text = f"text {draw.randrange(size)}" if draw.random() < 0.2 else f"query {at}"
        queries[f"q{at}"] = text.upper() if draw.random() < 0.1 else text
    judged = {
        (f"q{draw.randrange(size)}", f"d{draw.randrange(size)}"): draw.choice([0, 1, 1, 1, 2]) for _ in range(size)
    }
    return Source(documents, queries, [(*pair, grade) for pair, grade in judged.items()])


def alone(count: int, first: int = 0) -> Source:
    """So many groups of one anchor."""
    numbers = range(first, first + count)
    return Source(
        {f"d{at}": (f"document {at}", f"thread {at}") for at in numbers},
        {f"q{at}": f"query {at}" for at in numbers},
        [(f"q{at}", f"d{at}", 1) for at in numbers],
    )


def config_of(folder: Path, name: str = "run", *overrides: str, **settings: Any) -> Config:
    tree = small.settings(folder) | {
        "run_dir": str(folder / name),
        "train": {"base": "unused", "split": {"test": 0.3, **settings}},
    }
    tree["data"] |= {"extra": {"corpus": ["thread"]}, "part_rows": 64}
    return load_config(tree, [*overrides])


@dataclass(frozen=True)
class Divided:
    """What ingest and held_out have, and the counts."""

    rows: dict[str, dict[str, dict[str, Any]]]
    stats: dict[str, Any]

    @property
    def sides(self) -> dict[str, set[str]]:
        return {side: {*rows} for side, rows in self.rows.items()}


def divided(config: Config) -> Divided:
    graph.mine(config, only="ingest")
    stats = graph.train(config, only="held_out").stats
    rows = {}
    for side, stage in (("train", "ingest"), ("test", "held_out")):
        manifest = Books(config.run_dir, stage).manifest()
        assert manifest
        tables = [
            pa.ipc.open_file(config.run_dir / part.files[0].path).read_all() for part in manifest.of_kind("anchors")
        ]
        rows[side] = {row["id"]: row for table in tables for row in table.to_pylist()}
    # What both say of the division is the same.
    both = [
        {name: value for name, value in stats[stage].items() if name in _COUNTS} for stage in ("ingest", "held_out")
    ]
    assert both[0] == both[1] and len(both[0]) == len(_COUNTS)
    return Divided(rows, stats["ingest"])


_COUNTS = ("divided_anchors", "test_anchors", "groups", "test_groups", "largest_group", "test_share")


# --- groups -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by", ["positive", "thread"])
def test_groups_stay_whole(by: str, seed: int, tmp_path: Path) -> None:
    source = tangled(seed)
    found = divided(config_of(source.write(tmp_path), by=by, seed=seed))
    train, test = found.sides["train"], found.sides["test"]
    assert train and test and not train & test and train | test == source.anchors
    groups = source.groups(threads=by == "thread")
    assert all(group <= train or group <= test for group in groups)
    expected = (len(source.anchors), len(test), len(groups), sum(group <= test for group in groups))
    assert tuple(found.stats[name] for name in _COUNTS[:4]) == expected
    assert found.stats["largest_group"] == max(map(len, groups)) > 1
    assert found.stats["queries_without_positive"] == len(source.queries) - len(source.anchors)


def test_a_column_joins_what_positives_do_not(tmp_path: Path) -> None:
    assert len({len(tangled(0).groups(threads=threads)) for threads in (False, True)}) == 2
    source = alone(60)
    source.documents = {f"d{at}": (f"document {at}", f"thread {at // 4}") for at in range(60)}
    source.documents["twice"] = ("DOCUMENT 0", "thread 9")  # not judged, but the text of a positive
    found = divided(config_of(source.write(tmp_path), by="thread"))
    assert found.stats["groups"] == 14 and found.stats["largest_group"] == 8


def test_what_an_anchor_is_known_to_have_is_what_it_was(tmp_path: Path) -> None:
    """Positives of other splits and refused documents too: rows are those of a run without a division."""
    source = tangled(3)
    source.write(tmp_path)
    draw = random.Random(1)
    small.write_qrels(
        tmp_path / "data/qrels/dev.tsv",
        [(f"q{draw.randrange(120)}", f"d{draw.randrange(120)}", draw.choice([0, 1])) for _ in range(90)],
    )
    found = divided(config_of(tmp_path))
    whole = config_of(tmp_path, "whole", "train.split=null")
    graph.mine(whole, only="ingest")
    manifest = Books(whole.run_dir, "ingest").manifest()
    assert manifest
    tables = [pa.ipc.open_file(whole.run_dir / part.files[0].path).read_all() for part in manifest.of_kind("anchors")]
    assert found.rows["train"] | found.rows["test"] == {row["id"]: row for table in tables for row in table.to_pylist()}
    divided_parts = Books(tmp_path / "run", "ingest").manifest()
    assert divided_parts and divided_parts.of_kind("corpus") == [
        part.model_copy(update={"provenance": mine.provenance})
        for part, mine in zip(manifest.of_kind("corpus"), divided_parts.of_kind("corpus"), strict=True)
    ]


# --- shares -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_share_comes_out_over_many_groups(share: float, tmp_path: Path) -> None:
    count = 3000
    found = divided(config_of(alone(count).write(tmp_path), test=share))
    spread = (share * (1 - share) / count) ** 0.5
    assert abs(len(found.sides["test"]) / count - share) < 4 * spread
    assert [level for level, _ in split.remarks(found.stats)] == [logging.INFO]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 5, 6, 7])  # the last three draw it for the test side
def test_a_group_larger_than_what_is_held_out_is_trained_on(seed: int, tmp_path: Path) -> None:
    source = alone(100)
    source.judged += [(f"q{at}", "d0", 1) for at in range(1, 60)]
    found = divided(config_of(source.write(tmp_path), test=0.5, seed=seed))
    assert {f"q{at}" for at in range(60)} <= found.sides["train"]
    (_, told), *warned = split.remarks(found.stats)
    assert f"{len(found.sides['test'])} of 100 anchors" in told
    assert [level for level, _ in warned] == [logging.WARNING] * (len(found.sides["test"]) < 25)
    assert all("raise train.split.test" in text for _, text in warned)


@pytest.mark.slow
def test_the_share_is_far_off_by_chance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = alone(9).write(tmp_path)
    shares = {}
    for seed in range(12):
        try:
            graph.mine(config_of(source, "run", test=0.2, seed=seed), only="ingest")
        except InputError:
            continue
        finally:
            warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            caplog.clear()
        manifest = Books(source / "run", "ingest").manifest()
        assert manifest
        shares[seed] = manifest.stats["test_anchors"]
        assert any("another train.split.seed" in text for text in warned) == (abs(shares[seed] / 9 - 0.2) > 0.1)
    assert len({*shares.values()}) > 2


# --- where it stays -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_order_of_rows_moves_nobody(tmp_path: Path) -> None:
    source = tangled(7)
    for by in ("positive", "thread"):
        sides = [
            divided(config_of(source.write(tmp_path / f"{order}", random.Random(order)), by, by=by)).sides
            for order in range(3)
        ]
        assert sides[0] == sides[1] == sides[2]


@pytest.mark.slow
def test_more_data_move_nobody(tmp_path: Path) -> None:
    before = tangled(7)
    sides = divided(config_of(before.write(tmp_path / "before"))).sides
    new = alone(80, first=1000)
    # New anchors of positives that there were are on the side of those.
    pairs = [(f"new{at}", document, 1) for at, (_, document, grade) in enumerate(before.judged) if grade >= 1]
    grown = Source(
        before.documents | new.documents,
        before.queries | new.queries | {name: f"new query {name}" for name, _, _ in pairs},
        [*pairs, *before.judged, *new.judged],
    )
    after = divided(config_of(grown.write(tmp_path / "after"))).sides
    for side, anchors in sides.items():
        assert anchors <= after[side]


@pytest.mark.slow
def test_a_seed_of_its_own(tmp_path: Path) -> None:
    source = alone(200).write(tmp_path)
    sides = divided(config_of(source)).sides
    assert divided(config_of(source, "other", "seed=7", "train.seed=3")).sides == sides
    assert divided(config_of(source, "other", seed=7)).sides != sides


def test_a_larger_share_holds_out_what_a_smaller_one_did(tmp_path: Path) -> None:
    source = alone(200).write(tmp_path)
    few, many = (divided(config_of(source, f"{share}", test=share)).sides["test"] for share in (0.2, 0.6))
    assert few < many


# --- what is listed -----------------------------------------------------------------------------------


def listed(run_dir: Path) -> dict[str, list[Judgment]]:
    tables = {side: pq.read_table(run_dir / f"split/{side}.parquet") for side in ("train", "test")}
    return {side: [tuple(row.values()) for row in table.to_pylist()] for side, table in tables.items()}


def test_the_judgments_of_both_sides_are_listed(tmp_path: Path) -> None:
    source = tangled(2)
    draw, judged = random.Random(1), [*source.judged]
    draw.shuffle(judged)
    source.judged = [*judged, *((query, document, 0.5) for query, document, _ in judged[:20])]
    config = config_of(source.write(tmp_path))
    sides = divided(config).sides
    expected = {side: [judgment for judgment in judged if judgment[0] in anchors] for side, anchors in sides.items()}
    best = {(query, document): 0.5 for query, document, grade in judged[:20] if grade < 0.5}
    found = listed(config.run_dir)
    assert found == {
        side: [(query, document, best.get((query, document), grade)) for query, document, grade in rows]
        for side, rows in expected.items()
    }
    assert pq.read_schema(config.run_dir / "split/train.parquet").names == ["query-id", "corpus-id", "score"]


def test_a_side_that_is_read_as_qrels_is_that_side(tmp_path: Path) -> None:
    config = config_of(tangled(2).write(tmp_path))
    found = divided(config)
    data = tmp_path / "data"
    for side, rows in found.rows.items():
        tree = small.settings(tmp_path) | {"run_dir": str(tmp_path / side)}
        tree["data"] = {
            "format": "columns",
            "corpus": str(data / "corpus.jsonl"),
            "queries": str(data / "queries.jsonl"),
            "qrels": {"path": str(config.run_dir / f"split/{side}.parquet"), "split": "train"},
            "text": "{text}",
        }
        graph.mine(load_config(tree), only="ingest")
        manifest = Books(tmp_path / side, "ingest").manifest()
        assert manifest
        tables = [
            pa.ipc.open_file(tmp_path / side / part.files[0].path).read_all() for part in manifest.of_kind("anchors")
        ]
        again = {row["id"]: row["positives"] for table in tables for row in table.to_pylist()}
        assert again == {name: row["positives"] for name, row in rows.items()}


def test_what_is_shown_comes_and_goes_with_the_setting(tmp_path: Path) -> None:
    source = tangled(2).write(tmp_path)
    graph.mine(config_of(source), only="ingest")
    before = listed(source / "run")
    assert graph.mine(config_of(source), only="ingest").ran == ()
    (source / "run/split/test.parquet").unlink()
    assert graph.mine(config_of(source), only="ingest").ran == ("ingest",)
    assert listed(source / "run") == before
    plain = config_of(source, "run", "train.split=null")
    state = next(state for state in graph.status(plain) if state.stage == "ingest")
    assert state.state == "stale" and "train.split" in state.reason
    graph.mine(plain, only="ingest")
    assert not (source / "run/split").exists()
    mine = source / "run/split/notes.txt"
    mine.parent.mkdir()
    mine.write_text("a user's own\n", encoding="utf-8")
    assert graph.mine(plain, only="ingest").ran == ()
    graph.mine(config_of(source), only="ingest")
    assert listed(source / "run") == before and mine.read_text(encoding="utf-8") == "a user's own\n"


def test_files_that_are_listed_outlive_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are published by another thread than the one that reads, which is done meanwhile."""
    source = tangled(2).write(tmp_path)
    run = ingest.STAGE.run

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3 if arguments[0].kind == "counts" else 0)
        return run(*arguments)

    monkeypatch.setitem(STAGES, "ingest", replace(ingest.STAGE, run=slow))
    graph.mine(config_of(source), only="ingest")
    assert all(listed(source / "run").values())


@pytest.mark.slow
def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    source = alone(20_000)
    source.judged = [(f"q{at}", f"d{at // 3 * 3}", 1) for at in range(20_000)]
    source.write(tmp_path)
    fresh = divided(config_of(tmp_path, "fresh", by="thread"))
    settings = config_of(tmp_path, by="thread").model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "negpipe", "ingest", str(tmp_path / "config.json")]
    kills: Counter[str] = Counter()
    for name, count in (("read-*.json", 2), ("spool-*/work.duckdb", 1), ("train.parquet", 1)):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline, books = time.monotonic() + 60, tmp_path / "run/.negpipe/ingest"
            while process.poll() is None and time.monotonic() < deadline:
                if len([*books.rglob(name)]) >= count:
                    process.send_signal(signal.SIGKILL)
                    kills[name] += 1
                    break
                time.sleep(0.001)
    assert kills["read-*.json"]
    again = divided(config_of(tmp_path, by="thread"))
    assert again == fresh and 0.25 < len(again.sides["test"]) / 20_000 < 0.35
    assert listed(tmp_path / "run") == listed(tmp_path / "fresh")
    assert not [*(tmp_path / "run/.negpipe/ingest").glob("begun-*")]


# --- identity, and what is refused --------------------------------------------------------------------


def test_without_the_setting_nothing_is_asked_for(tmp_path: Path) -> None:
    plain = load_config({**small.settings(tmp_path)})
    trained = load_config({**small.settings(tmp_path), "train": {"base": "unused"}})
    small.build(tmp_path)
    assert ingest.STAGE.settings(plain) == ingest.STAGE.settings(trained)
    asked = ingest.STAGE.settings(config_of(tmp_path, "run", "data.extra={}"))
    assert {*asked} - {*ingest.STAGE.settings(plain)} == {"train.split"}


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.split and eval_split \('test'\)"):
        config_of(tmp_path, "run", "train.eval_split=test")
    with pytest.raises(ConfigError, match=r"train\.split\.by: 'url' requires the column.*data\.extra\.corpus"):
        config_of(tmp_path, by="url")
    for share in (0, 1):
        with pytest.raises(ConfigError, match=r"train\.split\.test"):
            config_of(tmp_path, test=share)
    # A split that is divided may be called as the one that is held out by default.
    assert config_of(tmp_path, "run", "data.split=test").train
    with pytest.raises(ConfigError, match="hold out a share of this one"):
        config_of(tmp_path, "run", "data.split=test", "train.split=null")
    # What a process reads that another one wrote is the same config.
    config = config_of(tmp_path)
    assert load_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(("by", "remedy"), [("positive", "train.eval_split"), ("thread", "by: positive")])
def test_one_group(by: str, remedy: str, tmp_path: Path) -> None:
    source = alone(20)
    if by == "positive":
        source.judged += [(f"q{at}", "d0", 1) for at in range(1, 20)]
    else:
        source.documents = {name: (text, "one") for name, (text, _) in source.documents.items()}
    with pytest.raises(InputError, match="all 20 anchors are in one group") as raised:
        graph.mine(config_of(source.write(tmp_path), by=by), only="ingest")
    assert raised.value.field == "train.split" and raised.value.remedy and remedy in raised.value.remedy


@pytest.mark.parametrize(("share", "empty"), [(0.001, "test"), (0.999, "train")])
def test_an_empty_side(share: float, empty: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no anchors on the {empty} side: the largest of 20 groups") as raised:
        graph.mine(config_of(alone(20).write(tmp_path), test=share), only="ingest")
    assert raised.value.field == "train.split" and raised.value.remedy and "train.split.test" in raised.value.remedy


def test_a_split_that_is_not_there_is_named_by_its_own_setting(tmp_path: Path) -> None:
    source = alone(20).write(tmp_path)
    with pytest.raises(InputError) as raised:
        graph.mine(config_of(source, "run", "data.split=dev"), only="ingest")
    assert raised.value.field != "train.split" and "data.split" in str(raised.value)


def test_more_than_fits_and_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = alone(20).write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(split, "_BYTES", 2**40)
        with pytest.raises(BudgetError, match="dividing 20 pairs of anchor and positive"):
            graph.mine(config_of(source), only="ingest")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "scipy" else find(name))
    with pytest.raises(ConfigError, match=r"negpipe\[train\]"):
        graph.mine(config_of(source), only="ingest")
