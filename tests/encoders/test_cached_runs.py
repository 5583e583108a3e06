"""Runs with `encoder.cache`: what is given to the model, what rows come of it, and what is said of them."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import statistics
import textwrap
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small
from real_runs import Run, encoding_here, interrupted, kill
from tiny_model import build_tiny_model

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.manifest import Books
from negpipe.errors import ConfigError
from negpipe.plan import estimate
from negpipe.review.report import facts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee(
        "the corpus grew or was edited, with `encoder.cache`",
        "only the texts that changed; the rows of a new run within rounding",
    ),
]

MODULES = (shutil, statistics, textwrap, zipfile)


def functions() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Documents and queries as the quickstart has them: functions of Python's library, and what they say they do."""
    found = {
        f"{module.__name__}.{name}": member
        for module in MODULES
        for name, member in inspect.getmembers(module, inspect.isfunction)
        if member.__module__ == module.__name__
    }
    corpus = [{"_id": name, "text": f"{name} {inspect.getsource(member)[:300]}"} for name, member in found.items()]
    said = {(member.__doc__ or "").strip().split("\n")[0]: name for name, member in found.items()}
    return corpus, [{"_id": name, "text": text} for text, name in said.items() if text]


@dataclass
class Source:
    """A source on disk that can be edited, and a config for it."""

    folder: Path
    model: Path
    corpus: list[dict[str, Any]] = field(init=False)
    queries: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.corpus, self.queries = functions()
        self.write()

    @property
    def texts(self) -> int:
        return len(self.corpus) + len(self.queries)

    def write(self) -> None:
        small.write_rows(self.folder / "data/corpus.jsonl", self.corpus)
        small.write_rows(self.folder / "data/queries.jsonl", self.queries)
        own = [(query["_id"], query["_id"], 1) for query in self.queries]
        small.write_qrels(self.folder / "data/qrels/train.tsv", own)

    def run(self, name: str, **encoder: Any) -> Run:
        settings = small.settings(self.folder) | {"run_dir": str(self.folder / name)}
        settings["data"]["part_rows"] = 16
        settings["mining"] = {"range_max": 40, "num_negatives": 4}
        settings["encoder"] = {
            "backend": "sentence-transformers",
            "model": str(self.model),
            "batch_size": 8,
            "passage_max_length": 64,
            "storage": "float32",
            **encoder,
        }
        return Run(settings)

    def cached(self, name: str, **encoder: Any) -> Run:
        return self.run(name, **{"cache": str(self.folder / "cache"), **encoder})


@pytest.fixture
def source(tmp_path: Path, tiny: Path) -> Source:
    return Source(tmp_path, tiny)


@contextmanager
def forward_passes() -> Iterator[list[int]]:
    """Texts of every pass through a BERT, counted at the model itself."""
    from torch.nn.modules.module import register_module_forward_hook
    from transformers.models.bert.modeling_bert import BertEmbeddings

    passes: list[int] = []

    def count(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, BertEmbeddings):
            passes.append(len(output))

    handle = register_module_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def mined(run: Run, *overrides: str, only: str | None = None) -> tuple[graph.Result, int]:
    """What a run made, and how many texts the model was given."""
    with encoding_here(), forward_passes() as passes:
        return run.mine(*overrides, only=only), sum(passes)


def encoded(run: Run) -> tuple[graph.Result, int]:
    """The same of a run that ends with its vectors."""
    run.mine(only="ingest")
    return mined(run, only="encode")


def vectors(run: Run) -> Any:
    return np.concatenate([np.load(path) for path in run.files("encode")])


def rows(run: Run) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in run.files("triplets")]
    return [row for table in tables for row in table.to_pylist()]


def ids(run: Run) -> list[tuple[str, str, str]]:
    return [(row["anchor_id"], row["positive_id"], row["negative_id"]) for row in rows(run)]


def test_only_edited_texts_are_given_to_the_model(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="negpipe")
    run, plain = source.cached("run"), source.run("plain")
    first, passed = mined(run)
    assert passed == source.texts > 100
    assert first.stats["encode"]["cached"] == {"texts": 0, "of": source.texts, "troubles": []}
    mined(plain)
    assert vectors(run).tobytes() == vectors(plain).tobytes() and rows(run) == rows(plain)  # nothing was known yet

    edited = source.corpus[::16]
    for document in edited:
        document["text"] += " edited"
    source.write()
    before = {part["key"] for part in run.parts("encode")}
    caplog.clear()
    second, passed = mined(run)
    assert passed == len(edited) > 3
    made = [part for part in run.parts("encode") if part["key"] not in before]
    known = sum(part["rows"] for part in made) - len(edited)
    assert known > 5 * len(edited)
    assert second.stats["encode"]["cached"] == {"texts": known, "of": source.texts, "troubles": []}
    assert second.stats["triplets"]["vectors"]["cached"]["texts"] == known
    assert f"encode: {known:,} of {source.texts:,} texts from the cache" in caplog.text
    assert "not reproducible bit for bit" in caplog.text

    mined(plain)
    np.testing.assert_allclose(vectors(run), vectors(plain), atol=1e-5)
    assert ids(run) == ids(plain)


def test_a_warm_cache_gives_the_rows_of_a_cold_one(source: Source) -> None:
    cold, warm = source.run("cold"), source.cached("warm", batch_size=5, call_texts=17)
    mined(cold)
    encoded(source.cached("filling"))
    _, passed = mined(warm)
    assert passed == 0
    np.testing.assert_allclose(vectors(warm), vectors(cold), atol=1e-5)
    assert ids(warm) == ids(cold)
    for name in ("positive_score", "negative_score"):
        scores, expected = ([row[name] for row in rows(run)] for run in (warm, cold))
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_what_was_made_in_another_way_is_not_known(source: Source, tmp_path: Path) -> None:
    run, documents = source.cached("run"), len(source.corpus)
    encoded(run)
    another = build_tiny_model(tmp_path / "another", seed=1)
    alike = ["encoder.storage=float16", "encoder.batch_size=4", "encoder.call_texts=50", "encoder.cache_size=1GiB"]
    for changes, again in (
        (["encoder.query_instruction='find: '"], source.texts - documents),
        (["encoder.passage_instruction='text: '"], documents),
        (["encoder.passage_max_length=32"], documents),
        (["encoder.normalize=false"], source.texts),
        (["encoder.truncate_dim=16"], source.texts),
        ([f"encoder.model={another}"], source.texts),
        (alike, 0),
    ):
        assert mined(run, *changes, only="encode")[1] == again, changes


def test_vectors_of_both_instructions_are_the_models_own(source: Source) -> None:
    """One side's vectors are known and the other's are not: neither is taken for the other."""
    encoded(source.cached("first"))
    asked = {"passage_instruction": "the name of a file: "}
    changed, plain = source.cached("changed", **asked), source.run("plain", **asked)
    for run in (changed, plain):
        encoded(run)
    np.testing.assert_allclose(vectors(changed), vectors(plain), atol=1e-5)
    assert np.abs(vectors(changed) - vectors(source.cached("first"))).max() > 0.01  # the model cares


def test_other_versions_of_libraries_begin_anew(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(source.cached("first"))
    upgraded = {"transformers": "99.0"}
    monkeypatch.setattr("negpipe.engine.versions.version", lambda name: upgraded.get(name) or version(name))
    assert encoded(source.cached("second"))[1] == source.texts


def test_on_or_off_is_in_the_key_and_where_it_lies_is_not(source: Source, tmp_path: Path) -> None:
    off, on = source.run("run"), source.cached("run")
    elsewhere = source.run("run", cache=str(tmp_path / "elsewhere"), cache_size="2GiB")
    encoded(off)
    assert on.states()["encode"].state == "stale" and "encoder.cache was added" in on.states()["encode"].reason
    of_off = {part["key"] for part in off.parts("encode")}
    encoded(on)
    assert not of_off & {part["key"] for part in on.parts("encode")}
    assert off.states()["encode"].state == "stale" and "encoder.cache was removed" in off.states()["encode"].reason
    assert elsewhere.states()["encode"].state == "current"
    assert encoded(elsewhere)[1] == 0 and not (tmp_path / "elsewhere").exists()


def test_training_does_not_know_of_it(source: Source) -> None:
    off, on = (load_config(run.config | {"train": {}}) for run in (source.run("run"), source.cached("run")))
    train = graph.stages(on)["train"]
    assert train.settings(on) == train.settings(off)


def test_a_damaged_cache_costs_time_and_is_told(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    encoded(source.cached("first"))
    (file,) = (source.folder / "cache").iterdir()
    file.write_bytes(bytes(1000) + file.read_bytes()[1000:])
    second = source.cached("second")
    result, passed = encoded(second)
    assert passed == source.texts
    (trouble,) = result.stats["encode"]["cached"]["troubles"]
    assert str(source.folder / "cache") in trouble and "is damaged" in trouble
    assert [record.message for record in caplog.records if "is damaged" in record.message] == [f"encode: {trouble}"]
    encoded(source.run("plain"))
    assert vectors(second).tobytes() == vectors(source.run("plain")).tobytes()
    assert encoded(source.cached("third"))[1] == 0


def test_cuts_are_counted_of_texts_that_are_encoded(source: Source) -> None:
    encoded(source.cached("first", passage_max_length=16))
    for number, document in enumerate(source.corpus[:3]):
        document["text"] = f"{number} list of names " * 8
    source.write()
    run = source.cached("second", passage_max_length=16)
    result, passed = encoded(run)
    assert passed == 3
    assert result.stats["encode"]["cut"]["documents"]["texts"] == result.stats["encode"]["cut"]["documents"]["of"] == 3
    assert "anchors" not in result.stats["encode"]["cut"]  # none was encoded, so nothing is known of them


def test_status_report_and_card_say_so(source: Source, tmp_path: Path) -> None:
    encoded(source.cached("first"))
    run, config = source.cached("run"), tmp_path / "config.yaml"
    config.write_text(json.dumps(run.config), encoding="utf-8")
    mined(run)
    sentence, promise = f"{source.texts:,} of {source.texts:,} texts from the cache", "not reproducible bit for bit"
    status = " ".join(small.run("status", config).out.split())
    assert f"encode: {sentence}" in status and promise in status
    manifest = Books(run.folder, "encode").manifest()
    assert manifest is not None
    told = facts.encoder(load_config(run.config), manifest)["cache"]  # on the report's page
    assert sentence in told and promise in told
    assert small.run("export", config, "--to", "hub", "--out", tmp_path / "hub").code == 0
    card = (tmp_path / "hub/README.md").read_text("utf-8")
    assert promise in card and str(tmp_path) not in card


def test_a_plan_does_not_count_what_the_cache_had(source: Source) -> None:
    """Parts of which it had some tell nothing of the model's speed."""
    encoded(source.cached("first"))
    run = source.cached("run")
    encoded(run)
    source.corpus[0]["text"] += " edited"
    source.write()
    run.mine(only="ingest")
    plan = estimate.plan(load_config(run.config), probe_encoder=False)
    (step,) = [step for step in plan.steps if step.stage == "encode"]
    assert step.todo and step.seconds is None
    assert step.note == f"{run.parts('ingest', 'corpus')[0]['rows']} texts, minus cached texts"


def test_brought_vectors_have_no_cache(tmp_path: Path) -> None:
    small.build(tmp_path)
    with pytest.raises(ConfigError, match=r"encoder\.cache stores vectors made by a model"):
        load_config(small.settings(tmp_path), [f"encoder.cache={tmp_path}"])


def test_clean_leaves_it_alone(source: Source, tmp_path: Path) -> None:
    run, config = source.cached("run", cache=str(source.folder / "run/cache")), tmp_path / "config.yaml"
    config.write_text(json.dumps(run.config), encoding="utf-8")
    encoded(run)
    mined(run, "encoder.passage_max_length=32", only="encode")
    assert small.run("clean", config, "--set", "encoder.passage_max_length=32", "--yes").code == 0
    assert encoded(run)[1] == 0


@pytest.mark.slow
def test_killed_and_used_by_others(source: Source) -> None:
    """Real processes: one is killed while it encodes, then two encode at once what it had kept and the rest."""
    killed, *rivals = (source.cached(name, call_texts=8) for name in ("killed", "one", "two"))
    interrupted(killed, "encode", how=kill)
    kept = sum(part["rows"] for part in killed.committed("encode"))
    processes = [rival.start("mine") for rival in rivals]
    for rival, process in zip(rivals, processes, strict=True):
        process.communicate(timeout=300)
        assert process.returncode == 0, rival.log.read_text(encoding="utf-8")
    plain = source.run("plain")
    mined(plain)
    for rival in rivals:
        cached = rival.manifest("encode")["stats"]["cached"]
        assert cached["texts"] >= kept > 0 and not cached["troubles"]
        np.testing.assert_allclose(vectors(rival), vectors(plain), atol=1e-5)
        assert ids(rival) == ids(plain)
    assert encoded(source.cached("three"))[1] == 0
