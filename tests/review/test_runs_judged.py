"""A run names candidates and no positives: no source, but said what it is, and judged by a config's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import small_source as small
from beir_data import precomputed_config, tricky_folder, write_vectors
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.errors import InputError
from negpipe.review import audit, finished, measures
from negpipe.rows import exports

pytestmark = [pytest.mark.slow, pytest.mark.cases]

CHANGES = [
    "mining.exclude=[]",
    "mining.relative_margin=null",
    "mining.num_negatives=200",
    "mining.range_max=300",
    "output.format=labeled-pair",
]
"""Negatives that are positives in every way, each once an anchor."""


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("judged")
    data = tricky_folder(folder / "beir")
    rows = [len((data / f"{name}.jsonl").read_text("utf-8").splitlines()) for name in ("corpus", "queries")]
    write_vectors(data, rows[0], rows[1], seed=1)
    run = Run(precomputed_config(folder / "run", data))
    run.mine(*CHANGES)
    return run


def findings(run: Run, file: Path | None, *changes: str, wanted: int = 201) -> dict[str, audit.Finding]:
    config = load_config(run.config, [*CHANGES, *changes])
    found = measures.audit_rows(config, audit.AuditOptions(columns={}, negatives=wanted), file)
    return {one.check: one for one in found.findings}


def negatives(run: Run) -> list[tuple[str, str, float]]:
    rows = [row for path in (run.folder / "triplets").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return [(row["anchor_id"], row["positive_id"], row["score"]) for row in rows if not row["label"]]


def write(file: Path, lines: list[str]) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file


@pytest.mark.parametrize("kind", ["trec", "tevatron"])
def test_the_run_of_rows_is_judged_like_the_rows(kind: str, mined: Run, tmp_path: Path) -> None:
    lines = [
        f"{anchor} Q0 {document} 1 {score} x" if kind == "trec" else f"{anchor}\t{document}\t{score}"
        for anchor, document, score in negatives(mined)
    ]
    rows, run = findings(mined, None), findings(mined, write(tmp_path / "some.name", lines))
    same = ["positive_id", "positive_text", "positive_normalized", "shared_anchor", "anchor_text", "anchor_id"]
    same += ["near_duplicate", "repeated_negative", "hub", "shortage"]
    assert {name: (run[name].count, run[name].of) for name in same} == {
        name: (rows[name].count, rows[name].of) for name in same
    }
    assert all(rows[name].count for name in ("positive_id", "positive_normalized", "shared_anchor", "shortage"))
    assert run["above_positive"].of == 0, "a run says no positive's score"
    assert run["non_finite"].of == len(lines)


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz", "folder", "shards", "run.tsv"])
def test_an_exported_run_is_read(name: str, mined: Run, tmp_path: Path) -> None:
    """It holds every candidate: the positives among them are those that the qrels name."""
    config, out = load_config(mined.config, CHANGES), tmp_path / name
    if name == "run.tsv":
        finished.export(config, exports.ExportOptions(to="tevatron", out=tmp_path / "out", run=True))
        out = tmp_path / "out" / name
    else:
        finished.export(
            config, exports.ExportOptions(to="trec-run", out=out, shard_rows=999 if name == "shards" else None)
        )
    found = findings(mined, out)
    known = {
        (anchor["id"], row)
        for anchor in mined.tables("anchors").to_pylist()
        for row in anchor["known"]
        if row < mined.tables("corpus").num_rows
    }
    candidates = mined.tables("anchors").num_rows * mined.tables("corpus").num_rows
    assert found["non_finite"].of == candidates, "as deep as the corpus"
    assert found["positive_id"].count == len(known) > 0
    (first, *_) = found["positive_id"].examples
    assert first["document"] and first["anchor"]


def test_repeated_lines_and_scores_that_are_none(mined: Run, tmp_path: Path) -> None:
    (anchor, document, _), (_, other, _) = negatives(mined)[:2]
    lines = [f"{anchor} Q0 {document} 1 2.5 x", f"{anchor} Q0 {other} 2 nan x", "", f"{anchor} Q0 {document} 3 none x"]
    found = findings(mined, write(tmp_path / "run", lines))
    assert (found["duplicate_row"].count, found["non_finite"].count) == (1, 2)
    assert found["duplicate_row"].examples[0]["row"] == 2


def test_rules_of_the_config_are_asked_as_far_as_ids_tell(tmp_path: Path) -> None:
    documents = [{**row, "lang": "de" if at % 2 else "en"} for at, row in enumerate(small.documents())]
    small.build(tmp_path, documents)
    tree = small.settings(tmp_path)
    tree["data"]["extra"] = {"corpus": ["lang"]}
    tree["mining"]["num_negatives"] = 9
    run = Run(tree)
    run.mine()
    config = load_config(run.config)
    finished.export(config, exports.ExportOptions(to="trec-run", out=tmp_path / "run.trec"))
    judged = [
        "mining.only_same=[lang]",
        "mining.where=candidate.lang != 'de' and (positive.lang = 'none' or score > positive_score)",
    ]
    checked = load_config(run.config, judged)
    found = {
        one.check: one
        for one in measures.audit_rows(checked, audit.AuditOptions(columns={}), tmp_path / "run.trec").findings
    }
    lang = {row["_id"]: row["lang"] for row in documents}
    lines = [line.split() for line in (tmp_path / "run.trec").read_text("utf-8").splitlines()]
    positive = {anchor: document for anchor, document, _ in small.judgments()}
    assert found["only_same"].count == sum(lang[line[2]] != lang[positive[line[0]]] for line in lines)
    assert found["where"].count == sum(lang[line[2]] == "de" for line in lines), "a run says nothing about positives"


def test_what_cannot_be_judged_is_named(mined: Run, tmp_path: Path) -> None:
    anchor, document, _ = negatives(mined)[0]
    good = f"{anchor} Q0 {document} 1 0.5 x"
    with pytest.raises(InputError, match="mean nothing by themselves"):
        audit.audit(write(tmp_path / "run", [good]), audit.AuditOptions(columns={}))
    with pytest.raises(InputError, match="2 of 3 document ids are not among the documents") as caught:
        lines = [good, *(f"{anchor} Q0 {name} 2 0.4 x" for name in ("nowhere", "elsewhere"))]
        findings(mined, write(tmp_path / "unknown", lines))
    assert caught.value.row == 1
    with pytest.raises(InputError, match="5 fields") as caught:
        findings(mined, write(tmp_path / "short", [good, f"{anchor} Q0 {document} 2 0.4"]))
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "short"), 2)


RUNS = {
    "run.trec": ["q0 Q0 d0 1 0.5 x", "q0 Q0 d1 2 0.25 x", "q1 Q0 d0 1 0.5 x"],
    "run.txt": ["q0 0 d0 1 0.5 x", "q0 0 d1 2 0.25 x", "q1 0 d0 1 0.5 x"],
    "run.tsv": ["q0\td0\t0.5", "q0\td1\t-2e-3", "q1\td0\t12.0"],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("form", ["auto", "pairs", "tevatron", "qrels"])
def test_a_run_is_no_source(name: str, form: str, tmp_path: Path) -> None:
    folder = small.build(tmp_path).parent
    run = write(tmp_path / name, RUNS[name])
    changes = [f"data.path={run}", f"data.format={form}"]
    if form == "qrels":
        tables = {side: str(folder / f"data/{side}.jsonl") for side in ("corpus", "queries")}
        changes = ["data.path=null", "data.format=columns", f"data.qrels={run}"]
        changes += [f"data.{side}={path}" for side, path in tables.items()]
    done = small.run("ingest", tmp_path / "config.yaml", *(part for one in changes for part in ("--set", one)))
    assert done.code == 3
    assert "a ranking, which lists candidates but no positives" in done.err.replace("\n", " ")
    assert name in done.err


@pytest.mark.parametrize("name", RUNS)
def test_inspect_says_what_a_run_is(name: str, tmp_path: Path) -> None:
    run = write(tmp_path / name, RUNS[name])
    done = small.run("inspect", run)
    assert done.code == 0 and "lines: 3, anchors: 2, documents per anchor: median 1, fewest 1, most 2" in done.out
    assert f"negpipe audit CONFIG --file {run}" in done.out
    found: dict[str, Any] = json.loads(small.run("inspect", run, "--rows", "2", "--json").out)["run"]
    assert (found["lines"], found["anchors"], found["whole"]) == (2, 1, False)
    written = small.run("inspect", run, "--write", tmp_path / "my.yaml")
    assert written.code == 3 and not (tmp_path / "my.yaml").exists()


def test_pairs_with_scores_are_no_run(tmp_path: Path) -> None:
    small.write_config(tmp_path)
    rows = write(tmp_path / "pairs.tsv", [f"what\tthis{at}\t0.{at}" for at in range(1, 4)])
    changes = [f"data.path={rows}", "data.table.header=[anchor, positive, score]", "encoder={model: none}"]
    done = small.run("ingest", tmp_path / "config.yaml", *(part for one in changes for part in ("--set", one)))
    assert done.code == 0, done.err
    texts = write(tmp_path / "texts.tsv", ["what is it\tthis is it\t0.5"])
    assert "does not seem to be a header" in small.run("inspect", texts).err.replace("\n", " ")
