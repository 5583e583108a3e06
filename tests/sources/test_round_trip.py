"""What `export` writes and holds positives, ingest reads back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import small_source as small
from real_runs import Run

from negpipe import sources
from negpipe.config import schema
from negpipe.config.file import load_config
from negpipe.data.texts import text_id
from negpipe.review import finished
from negpipe.rows import exports
from negpipe.sources import BadRow, Document, Judgment, Query

pytestmark = pytest.mark.cases

NO_POSITIVES = {"trec-run"}
NO_IDS = {"ms-swift", "ms-swift-reranker", "sentence-transformers"}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("mined")
    small.build(folder)
    run = Run(small.settings(folder))
    run.mine()
    return run


Sides = dict[str, tuple[set[str], set[str]]]


def of_triplets(run: Run, *, ids: bool) -> Sides:
    found: Sides = defaultdict(lambda: (set(), set()))
    for row in pq.read_table(run.folder / "triplets").to_pylist():
        anchor, positive, negative = (row[f"{side}_id" if ids else side] for side in ("anchor", "positive", "negative"))
        found[anchor][0].add(positive)
        found[anchor][1].add(negative)
    return dict(found)


def read_back(path: Path, *, ids: bool, **settings: Any) -> Sides:
    data = schema.Data.model_validate({"path": str(path), **settings})
    texts: dict[str, str] = {}
    found: Sides = defaultdict(lambda: (set(), set()))
    for record in sources.read(data, given=True):
        assert not isinstance(record, BadRow), record.error
        if isinstance(record, Document | Query):
            texts[record.id or text_id(record.text)] = record.text
        else:
            assert isinstance(record, Judgment)
            query = text_id(record.query) if record.query_by_text else record.query
            document = text_id(record.document) if record.document_by_text else record.document
            found[query][record.grade in (None, 0)].add(document)
    return {
        (query if ids else texts[query]): tuple({one if ids else texts[one] for one in side} for side in sides)  # type: ignore[misc]
        for query, sides in found.items()
    }


@pytest.mark.parametrize("to", [name for name in exports.LAYOUTS if name not in NO_POSITIVES])
def test_exports_are_read_back(to: str, mined: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished.export(load_config(mined.config), exports.ExportOptions(to=to, out=out))
    files = [file for file in out.iterdir() if file.name.startswith("train") and file.suffix in (".jsonl", ".parquet")]
    for path in [out, *(files if len(files) == 1 and not (out / "README.md").exists() else [])]:
        assert read_back(path, ids=False) == of_triplets(mined, ids=False)
        if to not in NO_IDS:
            assert read_back(path, ids=True) == of_triplets(mined, ids=True)


@pytest.mark.parametrize("form", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
@pytest.mark.parametrize("to", ["sentence-transformers", "hub"])
def test_every_format_of_rows_is_read_back(to: str, form: str, mined: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished.export(load_config(mined.config, [f"output.format={form}"]), exports.ExportOptions(to=to, out=out))
    assert read_back(out, ids=False) == of_triplets(mined, ids=False)
