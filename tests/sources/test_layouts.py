"""One source, written in every layout, is read as the same source, up to what the layout can carry."""

from __future__ import annotations

import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_runs import Run
from written_sources import LAYOUTS, Source, made, mteb, pylate

from negpipe import sources
from negpipe.config import schema
from negpipe.data.texts import text_id
from negpipe.sources import BadRow, Document, Judgment, Query

pytestmark = pytest.mark.cases


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


# --- what is read --------------------------------------------------------------------------------------


def expected(source: Source, carries: frozenset[str]) -> dict[str, Any]:
    """(text, id) of documents and queries, and by query text the texts of positives and negatives."""

    def document(name: str) -> tuple[str, str]:
        text = source.text(name)
        return text, name if "document ids" in carries else text_id(text)

    def query(name: str) -> tuple[str, str]:
        return source.queries[name], name if "query ids" in carries else text_id(source.queries[name])

    def positives(name: str) -> set[tuple[str, str]]:
        return {document(one) for one in source.judged[name][0]}

    negatives = {query(name): {document(one) for one in lists[1]} for name, lists in source.judged.items()}
    return {
        "queries": {query(name) for name in source.queries},
        "positives": {query(name): positives(name) for name in source.judged},
        "negatives": {asked: some for asked, some in negatives.items() if some} if "negatives" in carries else {},
    } | ({"corpus": {document(name) for name in source.documents}} if "corpus" in carries else {})


def found(data: schema.Data, carries: frozenset[str]) -> dict[str, Any]:
    documents: dict[str, tuple[str, str]] = {}
    queries: dict[str, tuple[str, str]] = {}
    judged: dict[str, dict[tuple[str, str], set[tuple[str, str]]]] = {
        "positives": defaultdict(set),
        "negatives": defaultdict(set),
    }
    for record in sources.read(data, given=True):
        assert not isinstance(record, BadRow), record.error
        if isinstance(record, Document):
            identity = record.id or text_id(record.text)
            documents[identity] = record.text, identity
        elif isinstance(record, Query):
            identity = record.id or text_id(record.text)
            queries[identity] = record.text, identity
        else:
            assert isinstance(record, Judgment)
            query = text_id(record.query) if record.query_by_text else record.query
            document = text_id(record.document) if record.document_by_text else record.document
            if record.grade != 0:
                side = "negatives" if record.grade is None else "positives"
                judged[side][queries[query]].add(documents[document])
    return {"queries": {*queries.values()}, **{side: dict(by_query) for side, by_query in judged.items()}} | (
        {"corpus": {*documents.values()}} if "corpus" in carries else {}
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("seed", range(12))
def test_every_layout_gives_the_same_source(
    layout: Any, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(f"{layout.__name__} {seed}")
    source = made(draw)
    written = layout(draw, source, tmp_path / "in")
    named = schema.Data.model_validate(written.settings)
    assert found(named, written.carries) == expected(source, written.carries)
    if layout in (mteb, pylate):
        streamed = named.model_copy(update={"streaming": True})
        assert found(streamed, written.carries) == expected(source, written.carries)
    guessed = {key: value for key, value in written.settings.items() if key not in ("format", "columns")}
    if "path" in guessed:
        assert sources.recognized(schema.Data.model_validate(guessed)).format == named.format
    caplog.clear()
    caplog.set_level(logging.INFO, logger="negpipe")
    assert found(schema.Data.model_validate(guessed), written.carries) == expected(source, written.carries)
    assert f"the source is read as data.format: {named.format}" in caplog.text


def test_judgments_without_a_grade_beside_columns_that_nobody_reads_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"_id": "d1", "text": "one"}, {"_id": "d2", "text": "two"}],
        "queries": [{"_id": "q1", "text": "which?"}],
        "qrels/train": [{"query-id": "q1", "corpus-id": "d2", "how_good": 0}],
    }
    for name, rows in tables.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = schema.Data(path=str(tmp_path))
    assert [record.grade for record in sources.read(data) if isinstance(record, Judgment)] == [1]
    assert "no column 'score' (data.columns.grade): every judgment counts as relevant" in caplog.text
    assert caplog.text.count("Columns not read: how_good") == 1
    named = data.model_copy(update={"columns": schema.Columns(grade="how_good")})
    caplog.clear()
    assert [record.grade for record in sources.read(named) if isinstance(record, Judgment)] == [0]
    assert "Columns not read" not in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("seed", [20, 21])
def test_every_layout_gives_the_same_tables(layout: Any, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{layout.__name__} {seed}")
    source = made(draw)
    written = layout(draw, source, tmp_path / "in")
    encoder = {"backend": "precomputed", "corpus_vectors": "none.npy", "anchor_vectors": "none.npy"}
    config = {"run_dir": str(tmp_path / "run"), "data": written.settings, "encoder": encoder}
    run = Run(config | {"mining": {"given_negatives": "first"}})
    run.mine(only="ingest")
    texts = [(row["text"], row["id"]) for row in run.tables("documents").to_pylist()]
    wanted = expected(source, written.carries)
    if "corpus" in wanted:
        assert {*texts} == wanted["corpus"]
    anchors = run.tables("anchors").to_pylist()
    positives = {(row["text"], row["id"]): {texts[at] for at in row["positives"]} for row in anchors}
    assert positives == wanted["positives"]
    assert {*positives} == wanted["queries"]
    given = {}
    for row in anchors:
        some = zip(row["refused"], row["refused_grades"], strict=True)
        if brought := {texts[at] for at, grade in some if grade is None}:
            given[row["text"], row["id"]] = brought
    assert given == wanted["negatives"]
