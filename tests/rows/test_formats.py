"""Rows of every format against an oracle that loops over units, and against the trainers that take them."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from beir_data import numbered_folder, write_vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_runs import Run

import negpipe
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.data.tables import EXTRA, Rows, to_bytes
from negpipe.errors import ConfigError, InputError
from negpipe.rows import formats
from negpipe.select.selector import SOURCES, Units

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
DOCUMENTS, ANCHORS = 30, 6


@dataclass(frozen=True)
class Doc:
    """A document of a unit; a `source` of None makes it a positive."""

    row: int
    score: float
    rank: int | None
    grade: float = 0.0
    source: str | None = None


@dataclass(frozen=True)
class Unit:
    anchor: int
    positives: tuple[Doc, ...]
    negatives: tuple[Doc, ...]


def text(row: int) -> str:
    return f"text {row} " + "é" * (row % 7)


def title(row: int) -> str | None:
    return None if row % 5 == 0 else f"title {row % 3}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Three parts, the middle one of a single row."""
    folder, paths = tmp_path_factory.mktemp("corpus"), []
    for start, stop in ((0, 12), (12, 13), (13, DOCUMENTS)):
        rows = range(start, stop)
        columns: dict[str, list[str | None]] = {
            "id": [f"d{row}" for row in rows],
            "text": [text(row) for row in rows],
            EXTRA + "title": [title(row) for row in rows],
        }
        paths.append(folder / f"{start}.arrow")
        arrays = {name: pa.array(values, pa.large_string()) for name, values in columns.items()}
        paths[-1].write_bytes(to_bytes(pa.table(arrays)))
    return Rows(paths)


REFUSED = {3: 0.0, 5: -1.0, 7: None, 21: 0.5}
"""Documents that are judged below the least grade for every other anchor, or brought as negatives (no grade)."""


def judged(anchor: int, doc: Doc) -> float | None:
    return doc.grade if doc.source is None else REFUSED.get(doc.row) if anchor % 2 else None


def units_of(units: list[Unit]) -> Units:
    anchors = {
        "id": [f"q{at}" for at in range(ANCHORS)],
        "text": [f"question {at // 2}" for at in range(ANCHORS)],  # pairs of anchors with one text
        EXTRA + "lang": ["en" if at % 2 else None for at in range(ANCHORS)],
        "refused": pa.array([[*REFUSED] if at % 2 else [] for at in range(ANCHORS)], pa.list_(pa.int64())),
        "refused_grades": pa.array(
            [[*REFUSED.values()] if at % 2 else [] for at in range(ANCHORS)], pa.list_(pa.float64())
        ),
    }
    positives = [doc for unit in units for doc in unit.positives]
    negatives = [doc for unit in units for doc in unit.negatives]

    def offsets(lengths: list[int]) -> Any:
        return np.array([0, *itertools.accumulate(lengths)], np.int64)

    def ranks(docs: list[Doc]) -> Any:
        return np.array([-1 if doc.rank is None else doc.rank for doc in docs], np.int64)

    return Units(
        anchors=pa.table(anchors),
        anchor=np.array([unit.anchor for unit in units], np.int64),
        positives=np.array([doc.row for doc in positives], np.int64),
        positive_offsets=offsets([len(unit.positives) for unit in units]),
        positive_scores=np.array([doc.score for doc in positives], np.float32),
        positive_ranks=ranks(positives),
        grades=np.array([doc.grade for doc in positives], np.float32),
        negatives=np.array([doc.row for doc in negatives], np.int64),
        negative_offsets=offsets([len(unit.negatives) for unit in units]),
        negative_scores=np.array([doc.score for doc in negatives], np.float32),
        negative_ranks=ranks(negatives),
        negative_sources=np.array([SOURCES.index(doc.source or "") for doc in negatives], np.uint8),
        fates=np.zeros((len(units), 1), np.uint8),
        references=np.zeros(len(units), np.float32),
    )


def config_of(name: str, *, negatives: int = 3, on_shortage: str = "keep", **output: Any) -> Config:
    return load_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "extra": {"corpus": ["title"], "queries": ["lang"]}},
            "encoder": {"model": "unused"},
            "mining": {"num_negatives": negatives, "on_shortage": on_shortage},
            "output": {"format": name, **output},
        }
    )


def written(units: list[list[Unit]], corpus: Rows, config: Config) -> list[bytes]:
    """The files of a part."""
    groups = formats.tables((units_of(piece) for piece in units), corpus, config)
    files = []
    for _, tables in itertools.groupby(groups, key=lambda pair: pair[0]):
        file = io.BytesIO()
        formats.write(file, (table for _, table in tables))
        files.append(file.getvalue())
    return files


def rows_in(file: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(file)).to_pylist()
    return rows


# --- the oracle ---------------------------------------------------------------------------------------


def expected(units: list[Unit], config: Config) -> list[dict[str, Any]]:
    """What the module's docstring and sentence-transformers' say, a row at a time."""
    output, wanted, rows = config.output, config.mining.num_negatives, []
    for unit in units:
        if config.mining.on_shortage == "drop" and len(unit.negatives) < wanted:
            continue
        if output.format == "labeled-pair":
            documents: list[list[Doc]] = [[doc] for doc in unit.positives + unit.negatives]
        elif output.format == "triplet":
            documents = [[positive, negative] for positive in unit.positives for negative in unit.negatives]
        else:
            least = wanted if output.format == "n-tuple" else 1
            whole = len(unit.negatives) >= least
            documents = [[positive, *unit.negatives] for positive in unit.positives if whole]
        rows += [row(unit.anchor, docs, config) for docs in documents]
    return rows


def grades(anchor: int, docs: list[Doc], form: str) -> dict[str, Any]:
    known = [judged(anchor, doc) for doc in docs]
    if form == "labeled-list":
        return {"grades": [grade or 0.0 for grade in known]}
    if form == "labeled-pair":
        return {"grade": known[0] or 0.0}
    return {"positive_grade": known[0]} | ({"negative_grade": known[1]} if form == "triplet" else {})


def row(anchor: int, docs: list[Doc], config: Config) -> dict[str, Any]:
    output, many = config.output, config.output.format == "labeled-list"
    one_list = [("positive", docs)] if many else []
    texts = one_list or list(zip(["positive", "negative"], [[doc] for doc in docs], strict=False))
    if output.format == "n-tuple":
        texts = [("positive", docs[:1]), *((f"negative_{n}", [doc]) for n, doc in enumerate(docs[1:], 1))]

    def shaped(values: list[Any]) -> Any:
        return values if many else values[0]

    made: dict[str, Any] = {}
    if output.ids:
        made |= {"anchor_id": f"q{anchor}"}
        made |= {f"{name}_id": shaped([f"d{doc.row}" for doc in of]) for name, of in texts}
    made["anchor"] = f"question {anchor // 2}"
    made |= {name: shaped([text(doc.row) for doc in of]) for name, of in texts}

    labels = [int(doc.source is None) for doc in docs]
    numbers = {
        "label": labels if output.format.startswith("labeled") else None,
        "score": [doc.score for doc in docs] if output.scores else None,
        "rank": [doc.rank for doc in docs] if output.ranks else None,
        "grade": [] if output.grades else None,
        "source": [doc.source for doc in docs] if config.mining.on_shortage == "random" else None,
    }
    for name, values in numbers.items():
        if values is None:
            continue
        if name == "grade":
            made |= grades(anchor, docs, output.format)
        elif output.format == "labeled-pair":
            made[name] = values[0]
        elif output.format != "triplet":
            made[name + "s"] = values
        elif name == "source":
            made["source"] = values[1]
        elif name == "rank":
            made["negative_rank"] = values[1]
        else:
            made |= {"positive_score": values[0], "negative_score": values[1]}

    asked = ("title", "lang") if output.extra_columns is None else output.extra_columns
    if "lang" in asked:
        made["anchor_lang"] = "en" if anchor % 2 else None
    if "title" in asked:
        made |= {f"{name}_title": shaped([title(doc.row) for doc in of]) for name, of in texts}
    return made


def documents(source: st.SearchStrategy[str] | None) -> st.SearchStrategy[Doc]:
    return st.builds(
        Doc,
        row=st.integers(0, DOCUMENTS - 1),
        score=st.floats(-1, 1, width=32),
        rank=st.none() | st.integers(0, 500),
        grade=st.sampled_from([1.0, 2.0]) if source is None else st.just(0.0),
        source=st.none() if source is None else source,
    )


UNITS = st.lists(
    st.builds(
        Unit,
        anchor=st.integers(0, ANCHORS - 1),
        positives=st.lists(documents(None), min_size=1, max_size=3).map(tuple),
        negatives=st.lists(documents(st.sampled_from(SOURCES)), max_size=3).map(tuple),
    ),
    max_size=6,
).map(lambda units: sorted(units, key=lambda unit: unit.anchor))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_those_of_the_oracle(
    name: str, corpus: Rows, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Whatever is asked for, however rows are cut into groups and files: same rows, same order, same columns."""
    monkeypatch.setattr(formats, "GROUP_BYTES", data.draw(st.sampled_from([1, 40, 2**20])))
    output: dict[str, Any] = {option: data.draw(st.booleans()) for option in ("ids", "scores", "ranks", "grades")}
    output["extra_columns"] = data.draw(st.sampled_from([None, [], ["title"], ["lang"]]))
    output["rows_per_file"] = limit = data.draw(st.sampled_from([None, 2, 5]))
    shortage = data.draw(st.sampled_from(["keep", "drop", "random"]))
    config = config_of(name, on_shortage=shortage, **output)
    slices = data.draw(st.lists(UNITS, min_size=1, max_size=3))

    files = written(slices, corpus, config)

    wanted = [row for piece in slices for row in expected(piece, config)]
    found = [rows_in(file) for file in files]
    assert list(itertools.chain(*found)) == wanted
    assert [list(row) for row in itertools.chain(*found)] == [list(row) for row in wanted]
    assert all(len(rows) == limit for rows in found[:-1])
    assert limit is None or len(found[-1]) <= limit
    assert len(files) == max(1, -(-len(wanted) // limit) if limit else 1)


def pair(anchor: int, score: float, *negatives: Doc) -> Unit:
    return Unit(anchor, (Doc(anchor, score, 0, grade=1.0),), negatives)


@pytest.mark.parametrize("name", FORMATS)
def test_a_unit_with_many_positives_is_cut_between_them(
    name: str, corpus: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group holds the texts of more than fit, but those of the unit's negatives beside them."""
    monkeypatch.setattr(formats, "GROUP_BYTES", 100)
    near = tuple(Doc(20 + at, 0.5, 3 + at, source="mined") for at in range(2))
    many = Unit(0, tuple(Doc(at % 20, 0.75, 0, grade=1.0) for at in range(60)), near)
    config = config_of(name, negatives=2)
    held = []
    for _, table in formats.tables(iter([units_of([many])]), corpus, config):
        texts = [value[0] if isinstance(value, list) else value for value in table["positive"].to_pylist()]
        held.append(sum(map(len, set(texts))))
    assert len(held) > 5 and max(held) <= 100 + max(len(text(row)) for row in range(22))


def test_by_hand(corpus: Rows) -> None:
    """One anchor with two positives, one short of negatives, then the same as units of pairs."""
    near, far = Doc(20, 0.5, 3, source="mined"), Doc(21, 0.25, 7, source="mined")
    both = Unit(0, (Doc(1, 0.75, 0, grade=1.0), Doc(2, 0.625, None, grade=2.0)), (near, far))
    short, none = pair(1, 0.875, near), pair(2, 0.5)

    def read(name: str, *units: Unit, **options: Any) -> list[tuple[Any, ...]]:
        config = config_of(name, negatives=2, extra_columns=[], scores=False, ranks=False, **options)
        return [tuple(row.values()) for row in rows_in(written([list(units)], corpus, config)[0])]

    def t(*rows: int) -> list[str]:
        return [text(row) for row in rows]

    plain: dict[str, Any] = {"ids": False}
    assert read("triplet", both, short, none, **plain) == [
        ("question 0", *t(1, 20)),
        ("question 0", *t(1, 21)),
        ("question 0", *t(2, 20)),
        ("question 0", *t(2, 21)),
        ("question 0", *t(1, 20)),
    ]
    assert read("n-tuple", both, short, none, **plain) == [
        ("question 0", *t(1, 20, 21)),
        ("question 0", *t(2, 20, 21)),
    ]
    assert read("labeled-pair", both, short, none, **plain) == [
        ("question 0", text(1), 1),
        ("question 0", text(2), 1),
        ("question 0", text(20), 0),
        ("question 0", text(21), 0),
        ("question 0", text(1), 1),
        ("question 0", text(20), 0),
        ("question 1", text(2), 1),
    ]
    assert read("labeled-list", both, short, none, grades=True) == [
        ("q0", ["d1", "d20", "d21"], "question 0", t(1, 20, 21), [1, 0, 0], [1.0, 0.0, 0.0]),
        ("q0", ["d2", "d20", "d21"], "question 0", t(2, 20, 21), [1, 0, 0], [2.0, 0.0, 0.0]),
        ("q1", ["d1", "d20"], "question 0", t(1, 20), [1, 0], [1.0, 0.0]),
    ]
    assert read("labeled-pair", both, short, none, on_shortage="drop", **plain)[-1] == ("question 0", text(21), 0)
    each = [pair(0, 0.75, near), Unit(0, (Doc(2, 0.5, 1, grade=1.0),), (far,))]
    assert read("triplet", *each, **plain) == [("question 0", *t(0, 20)), ("question 0", *t(2, 21))]


def test_triplet_has_its_columns_by_default(corpus: Rows) -> None:
    config = config_of("triplet", extra_columns=[])
    table = pq.read_table(io.BytesIO(written([[]], corpus, config)[0]))
    assert table.column_names == [
        *("anchor_id", "positive_id", "negative_id", "anchor", "positive", "negative"),
        *("positive_score", "negative_score", "negative_rank"),
    ]
    assert set(map(str, table.schema.types)) == {"string", "float", "int32"}


def test_the_same_bytes(corpus: Rows) -> None:
    draw = np.random.default_rng(0)
    units = [
        pair(anchor, 0.5, *(Doc(int(row), 0.25, 1, source="mined") for row in draw.integers(0, DOCUMENTS, 3)))
        for anchor in draw.integers(0, ANCHORS, 500)
    ]
    for name in FORMATS:
        assert len({*(tuple(written([units, units], corpus, config_of(name))) for _ in range(3))}) == 1


# --- through the stages -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents in three parts, 40 anchors, with further columns and two documents of one text."""
    folder = numbered_folder(tmp_path_factory.mktemp("formats") / "beir", 120, 40)
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    for at, line in enumerate(lines):
        line |= {"url": f"https://example.org/{at}", "year": 2000 + at % 3, "draft": None if at % 2 else True}
    lines[7]["text"] = lines[3]["text"]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    content = "".join(json.dumps(line | {"lang": "en"}) + "\n" for line in queries)
    (folder / "queries.jsonl").write_text(content, encoding="utf-8")
    write_vectors(folder, 120, 40, seed=0)
    return folder


@pytest.fixture(scope="module")
def mined(source: Path) -> Run:
    config = {
        "run_dir": str(source.parent / "run"),
        "data": {"path": str(source), "part_rows": 16},
        "encoder": {
            "backend": "precomputed",
            "corpus_vectors": str(source / "corpus.npy"),
            "anchor_vectors": str(source / "queries.npy"),
            "storage": "float32",
        },
        "mining": {"range_max": 32, "relative_margin": None, "exclude": ["positive_id", "positive_text"]},
    }
    run = Run(config)
    run.mine()
    return run


def output(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((run.folder / "triplets").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


@pytest.mark.slow
def test_files_of_so_many_rows(mined: Run, tmp_path: Path) -> None:
    run = mined.copied(tmp_path / "run")
    whole = output(run)
    result = run.mine("output.rows_per_file=7")
    assert result.ran == ("triplets",)
    names = sorted(path.name for path in (run.folder / "triplets").iterdir())
    parts = len(run.parts("triplets"))
    assert parts > 1
    assert {name[:11] for name in names} == {f"part-{part:05d}-" for part in range(parts)}
    assert f"part-{parts - 1:05d}-00000.parquet" in names
    assert output(run) == whole
    assert all(pq.ParquetFile(run.folder / "triplets" / name).metadata.num_rows <= 7 for name in names)
    before = run.content("triplets")
    assert run.at(tmp_path / "workers").mine("output.rows_per_file=7", "executor.workers=2").ran[-1] == "triplets"
    assert run.at(tmp_path / "workers").content("triplets") == before
    run.mine()
    assert sorted(path.name for path in (run.folder / "triplets").iterdir()) == [
        f"part-{part:05d}.parquet" for part in range(parts)
    ]


def test_include_positives_keeps_the_ranking(mined: Run, source: Path, tmp_path: Path) -> None:
    run = mined.copied(tmp_path / "run")
    run.mine("output.include_positives=true", "output.format=n-tuple", "mining.num_negatives=9")
    corpus, queries = (np.load(source / name).astype(np.float64) for name in ("corpus.npy", "queries.npy"))
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(corpus, axis=1)
    scores = queries @ corpus.T / lengths
    scores[:, 7] = -np.inf  # the text of d3 again
    rows = output(run)
    assert len(rows) == 40
    for at, row in enumerate(rows):
        assert row["anchor_id"] == f"q{at}"
        positive = 3 if at == 7 else at
        assert row["positive_id"] == f"d{positive}"
        ranking = np.argsort(-scores[at])[:9]
        assert [row[f"negative_{n}_id"] for n in range(1, 10)] == [f"d{document}" for document in ranking]
        assert np.allclose(row["scores"], [scores[at, positive], *scores[at, ranking]], atol=1e-5)
        assert row["ranks"][1:] == list(range(9))
    assert any(row["positive_id"] == row[f"negative_{n}_id"] for row in rows for n in range(1, 10))


def test_include_positives_and_margins() -> None:
    def margin(**mining: Any) -> float | None:
        tree = {"run_dir": "x", "data": {"path": "y"}, "encoder": {"model": "m"}, "mining": mining}
        return load_config(tree | {"output": {"format": "n-tuple", "include_positives": True}}).mining.relative_margin

    assert margin() is None
    assert margin(relative_margin=0.1) == 0.1
    assert margin(compat="nv-retriever") == 0.05
    with pytest.raises(ConfigError, match="n-tuple"):
        config_of("triplet", include_positives=True)


# --- columns of the source ----------------------------------------------------------------------------


def test_extra_columns_come_along_and_nothing_is_encoded_again(mined: Run, tmp_path: Path) -> None:
    run = mined.copied(tmp_path / "run")
    vectors, without = run.inodes("encode"), output(run)
    extra = "data.extra={corpus: [url, year, draft], queries: [lang]}"
    run.mine(extra)
    assert run.inodes("encode") == vectors
    rows = output(run)
    names = [f"{side}_{name}" for side in ("positive", "negative") for name in ("url", "year", "draft")]
    assert [{name: row[name] for name in row if name not in ("anchor_lang", *names)} for row in rows] == without
    for row in rows:
        assert row["anchor_lang"] == "en"
        for side in ("positive", "negative"):
            # The first row with the text: d3 stands for d7 too.
            number = int(row[f"{side}_id"][1:])
            assert row[f"{side}_url"] == f"https://example.org/{number}"
            assert row[f"{side}_year"] == str(2000 + number % 3)
            assert row[f"{side}_draft"] == (None if number % 2 else "true")
    assert run.mine(extra, "output.extra_columns=[year]").ran == ("triplets",)
    assert {name for row in output(run) for name in row} - set(without[0]) == {"positive_year", "negative_year"}
    # The tables of `negpipe.Run` have them under their own names.
    tables = negpipe.Run(run.folder, [extra])
    assert tables.corpus().column_names == ["id", "text", "url", "year", "draft"]
    assert tables.corpus()["url"][1].as_py() == "https://example.org/1"
    assert tables.anchors().column_names == ["id", "text", "lang", "positives"]
    assert set(tables.anchors()["lang"].to_pylist()) == {"en"}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def run_of(tmp_path: Path, vectors: tuple[int, int], **data: Any) -> Run:
    rng = np.random.default_rng(0)
    for name, count in zip(("corpus", "queries"), vectors, strict=True):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((count, 4)).astype(np.float32))
    encoder = {"backend": "precomputed"} | {
        f"{name}_vectors": str(tmp_path / f"{file}.npy") for name, file in (("corpus", "corpus"), ("anchor", "queries"))
    }
    return Run({"run_dir": str(tmp_path / "run"), "data": data, "encoder": encoder})


def test_extra_columns_of_pair_rows(tmp_path: Path) -> None:
    """Parquet pairs: one column for both sides, and one that is the text itself."""
    rows = {"anchor": ["a", "b", "a"], "positive": ["x", "y", "y"], "topic": ["one", "two", "three"]}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    extra = {"corpus": ["topic", "positive"], "queries": ["topic"]}
    run = run_of(tmp_path, (3, 3), format="pairs", path=str(tmp_path / "pairs.parquet"), extra=extra)
    run.mine("mining.relative_margin=null", "output.format=labeled-pair", "mining.num_negatives=1")
    found = {(row["anchor"], row["positive"], row["label"]): row for row in output(run)}
    assert found[("a", "y", 1)]["anchor_topic"] == "one"
    assert found[("a", "y", 1)]["positive_topic"] == "two"
    assert found[("b", "x", 0)]["positive_topic"] == "one"
    assert found[("b", "x", 0)]["positive_positive"] == "x"


def test_a_column_of_grades_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"anchor": ["a", "b"], "positive": ["x", "y"], "label": [1, 2]}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    caplog.set_level("INFO")
    run_of(tmp_path, (2, 2), path=str(tmp_path / "pairs.parquet")).mine(only="ingest")
    told = "reading grades of positives from the column 'label' (data.columns.label)"
    assert [message for message in caplog.messages if "reading grades" in message] == [told]


def test_extra_columns_of_a_pool(tmp_path: Path) -> None:
    """The pool's columns are wanted; a positive that is not in it has none."""
    pool = write_lines(tmp_path / "pool.jsonl", [{"text": text, "url": text.upper()} for text in ("x", "y", "z")])
    pairs = write_lines(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["x", "w"], "neg": [], "type": "t"}])
    extra = {"corpus": ["url"], "queries": ["type"]}
    run = run_of(tmp_path, (4, 1), format="flagembedding", path=pairs, corpus=pool, text="{text}", extra=extra)
    run.mine(only="ingest")
    found = {row["text"]: row[EXTRA + "url"] for row in run.tables("documents").to_pylist()}
    assert found == {"x": "X", "y": "Y", "z": "Z", "w": None}
    assert run.tables("anchors")[EXTRA + "type"].to_pylist() == ["t"]
    with pytest.raises(ConfigError, match=r"data\.extra\.corpus requires data\.corpus"):
        run_of(tmp_path, (4, 1), format="flagembedding", path=pairs, extra=extra).mine(only="ingest")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"corpus": ["site"]}, r"corpus\.jsonl, row 1, field 'site': column not found\. Columns here: .*url"),
        ({"queries": ["site"]}, r"queries\.jsonl, row 1, field 'site'.*data\.extra\.queries"),
        ({"corpus": ["tags"]}, r"corpus\.jsonl, row 2, field 'tags': an extra column cannot hold a list"),
    ],
)
def test_bad_extra_columns(tmp_path: Path, extra: dict[str, list[str]], message: str) -> None:
    folder = numbered_folder(tmp_path / "beir", 3, 2)
    documents = [{"_id": f"d{at}", "text": f"t{at}", "url": "u", "tags": ["a"] if at else None} for at in range(3)]
    write_lines(folder / "corpus.jsonl", documents)
    with pytest.raises(InputError, match=message):
        run_of(tmp_path, (3, 2), path=str(folder), extra=extra).mine(only="ingest")


@pytest.mark.parametrize(
    ("data", "output", "message"),
    [
        ({"extra": {"corpus": ["id"]}}, {}, "rename"),
        ({"extra": {"queries": ["a", "a"]}}, {}, "twice"),
        ({"extra": {"queries": ["a"]}}, {"extra_columns": ["b"]}, "'b' is not kept"),
    ],
)
def test_bad_settings(data: dict[str, Any], output: dict[str, Any], message: str) -> None:
    tree = {"run_dir": "x", "data": {"path": "y", **data}, "encoder": {"model": "m"}, "output": output}
    with pytest.raises(ConfigError, match=message):
        load_config(tree)


# --- the trainers -------------------------------------------------------------------------------------


@pytest.fixture
def loaded(mined: Run, tmp_path: Path) -> Iterator[Any]:
    """Mine a format and load what it wrote as a user would."""
    import datasets

    def load(*overrides: str) -> Any:
        run = mined.copied(tmp_path / "-".join(overrides).replace("/", "_"))
        run.mine(*overrides)
        cache = str(tmp_path / "cache")
        return datasets.load_dataset("parquet", data_dir=str(run.folder / "triplets"), split="train", cache_dir=cache)

    yield load


def steps(trainer: Any) -> float:
    return float(trainer.train().training_loss)


def arguments(kind: Any, folder: Path) -> Any:
    return kind(output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triplet", "n-tuple"])
def test_sentence_transformer_trains_on_it(name: str, loaded: Any, tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss, MultipleNegativesRankingLoss

    dataset = loaded(f"output.format={name}")
    assert {
        str(feature.dtype) for column, feature in dataset.features.items() if column not in ("scores", "ranks")
    } <= {
        "string",
        "float32",
        "int32",
    }
    model = SentenceTransformer(str(tiny))
    negatives = ["negative"] if name == "triplet" else ["negative_1", "negative_2", "negative_3"]
    texts = ["anchor", "positive", *negatives]
    wanted = [(texts, MultipleNegativesRankingLoss(model))]
    if name == "n-tuple":
        wanted.append(([*texts, "scores"], MarginMSELoss(model)))
    for columns, loss in wanted:
        train = dataset.select_columns(columns)
        args = arguments(SentenceTransformerTrainingArguments, tmp_path / "out")
        assert steps(SentenceTransformerTrainer(model, args, train_dataset=train, loss=loss)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labeled-pair", "labeled-list"])
def test_cross_encoder_trains_on_it(name: str, loaded: Any, tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )

    plain = tmp_path / "plain"
    plain.mkdir()
    for file in tiny.iterdir():
        if file.is_file() and file.name != "modules.json":
            (plain / file.name).write_bytes(file.read_bytes())
    model = CrossEncoder(str(plain), num_labels=1)
    loss = losses.BinaryCrossEntropyLoss(model) if name == "labeled-pair" else losses.LambdaLoss(model)
    dataset = loaded(f"output.format={name}", "output.grades=true")
    for target in ("label", "score") if name == "labeled-pair" else ("label", "grade"):
        column = target + "s" * (name == "labeled-list")
        train = dataset.select_columns(["anchor", "positive", column])
        if target == "grade":
            train = train.rename_column(column, "label" + "s" * (name == "labeled-list"))
        args = arguments(CrossEncoderTrainingArguments, tmp_path / "out")
        assert np.isfinite(steps(CrossEncoderTrainer(model, args, train_dataset=train, loss=loss)))
