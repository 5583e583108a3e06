"""The audit counts what a plain program counts, in every format, and finds nothing in what negpipe mines."""

from __future__ import annotations

import json
import math
import random
import re
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from beir_data import precomputed_config, tricky_folder, write_vectors
from real_runs import Run
from small_source import run as negpipe

from negpipe.engine.budget import Budget
from negpipe.errors import BudgetError, ConfigError, InputError
from negpipe.review import audit

WANTED = 3


@dataclass(frozen=True)
class Document:
    id: str | None
    text: str | None
    score: float | None


@dataclass(frozen=True)
class Row:
    """A row of any format; an anchor's labelled rows belong together where `alone`."""

    anchor_id: str | None
    anchor: str
    positives: list[Document] = field(default_factory=list)
    negatives: list[Document] = field(default_factory=list)
    alone: bool = False


def faulty(seed: int) -> list[Row]:
    """Units of 40 anchors, one positive and about three negatives each, so few texts that everything goes wrong."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(["stone", "river", "house", "wind", "green"], k=12)) for _ in range(40)]
    variants: list[Callable[[str], str]] = [str, str, str, str.upper, lambda text: text.replace("e", "ｅ"), near]
    anchors = ["who?", "Who?  ", *(f"question {number}" for number in range(38))]
    rows = []
    for number, anchor in enumerate(anchors):

        def document(score: float) -> Document:
            at = number if draw.random() < 0.3 else draw.randrange(len(texts))  # noqa: B023
            text: str | None = draw.choice(variants)(texts[at])
            text = draw.choices([text, anchor.upper(), "  ", None, "everywhere"], [40, 1, 1, 1, 8])[0]  # noqa: B023
            wrong = draw.choices([score, math.nan, math.inf, None], [20, 1, 1, 1])[0]
            return Document(draw.choices([f"d{at}", f"e{at}", "", None], [10, 10, 1, 1])[0], text, wrong)

        count = draw.choices([WANTED, 1, 5], [8, 1, 1])[0]
        negatives = [document(draw.uniform(0.1, 0.9)) for _ in range(count)]
        if draw.random() < 0.2:
            negatives.append(negatives[0])
        if draw.random() < 0.1:  # as where queries are documents: with a title in front
            negatives.append(Document(f"q{number}", f"A title. {anchor}", 0.5))
        name = draw.choices([f"q{number}", None], [30, 1])[0]
        row = Row(name, anchor, [Document(f"d{number}", texts[number], 0.8)], negatives)
        rows += [row] * draw.choices([1, 2], [9, 1])[0]
    return rows


def near(text: str) -> str:
    return text[:-2] + "!!"


# --- a plain program --------------------------------------------------------------------------------------


def normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


@cache
def likeness(left: str, right: str) -> float:
    """1 - (characters to insert or delete) / (length of both), by the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for one in left:
        before = 0
        for at, other in enumerate(right, 1):
            before, row[at] = row[at], before + 1 if one == other else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(left) + len(right)) if left or right else 1.0


def expected(rows: list[Row]) -> Counter[str]:
    counts: Counter[str] = Counter()
    own: dict[str, list[Document]] = defaultdict(list)
    asks: dict[str, set[str]] = defaultdict(set)
    least: dict[Any, float] = defaultdict(lambda: math.inf)
    for row in rows:
        if row.anchor_id is not None:
            own[row.anchor_id] += row.positives
            asks[row.anchor_id].add(normal(row.anchor))
        for one in row.positives:
            if one.score is not None and math.isfinite(one.score):
                least[unit(row)] = min(least[unit(row)], one.score)
    seen: set[str] = set()
    sizes: dict[Any, list[str | None]] = defaultdict(list)
    owners: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        signature = repr([row.anchor_id, row.anchor, *[(d.id, d.text) for d in row.positives], "not"]) + repr(
            [(d.id, d.text) for d in row.negatives]
        )
        counts["duplicate_row"] += signature in seen
        counts["missing_id"] += not row.anchor_id
        counts["empty_text"] += not normal(row.anchor)
        twin = signature in seen
        seen.add(signature)
        sizes[unit(row)] += []
        for one in [*row.positives, *row.negatives]:
            counts["missing_id"] += not one.id
            counts["empty_text"] += one.text is None or not normal(one.text)
            counts["non_finite"] += one.score is None or not math.isfinite(one.score)
        for one in row.negatives:
            if one.score is not None and math.isfinite(one.score):
                counts["above_positive"] += one.score > least[unit(row)]
            if one.text is not None and row.anchor_id is not None:
                owners[normal(one.text)].add(row.anchor_id)
            if not twin:
                text = None if one.text is None else normal(one.text)
                counts["repeated_negative"] += text is not None and text in sizes[unit(row)]
                sizes[unit(row)].append(text)
            reason = why(row, one, own, asks)
            if reason:
                counts[reason] += 1
    usual = Counter(map(len, sizes.values()))
    wanted = max(usual, key=lambda size: (usual[size], size))
    counts["shortage"] = sum(len(texts) < wanted for texts in sizes.values())
    counts["hub"] = sum(len(names) > 10 for names in owners.values())
    return counts


def why(row: Row, one: Document, own: dict[str, list[Document]], asks: dict[str, set[str]]) -> str | None:
    if row.anchor_id is None:
        return None
    mine = [d for d in own[row.anchor_id] if d.text is not None]
    others = [
        d for name, texts in asks.items() if name != row.anchor_id and texts & asks[row.anchor_id] for d in own[name]
    ]
    if one.id is not None and one.id in [d.id for d in mine]:
        return "positive_id"
    if one.text is not None and one.text in [d.text for d in mine]:
        return "positive_text"
    text = None if one.text is None else normal(one.text)
    if text is not None and text in [normal(d.text or "") for d in mine]:
        return "positive_normalized"
    if (one.id is not None and one.id in [d.id for d in others]) or (
        text is not None and text in [normal(d.text) for d in others if d.text is not None]
    ):
        return "shared_anchor"
    if text is not None and text in asks[row.anchor_id]:
        return "anchor_text"
    asked = normal(row.anchor or "")
    if one.id == row.anchor_id and text and asked and (text in asked or asked in text):
        return "anchor_id"
    if text is not None and any(likeness(text, normal(d.text or "")) >= 0.9 for d in mine):
        return "near_duplicate"
    return None


def unit(row: Row) -> tuple[Any, ...]:
    return row.anchor_id, row.anchor, None if row.alone else row.positives[0].text


# --- the formats ------------------------------------------------------------------------------------------


def as_triplet(rows: list[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    rows = [replace(row, negatives=[one]) for row in rows for one in row.negatives]
    tables = [
        {
            **asked(row),
            **{
                f"{side}{suffix}": getattr(one, name)
                for side, one in (("positive", row.positives[0]), ("negative", row.negatives[0]))
                for suffix, name in (("", "text"), ("_id", "id"), ("_score", "score"))
            },
        }
        for row in rows
    ]
    return rows, tables


def as_tuple(rows: list[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    rows = [replace(row, negatives=row.negatives[:WANTED]) for row in rows if len(row.negatives) >= WANTED]
    tables = [
        {
            **asked(row),
            "positive": row.positives[0].text,
            "positive_id": row.positives[0].id,
            **{f"negative_{at}": one.text for at, one in enumerate(row.negatives, 1)},
            **{f"negative_{at}_id": one.id for at, one in enumerate(row.negatives, 1)},
            "scores": [one.score for one in [*row.positives, *row.negatives]],
        }
        for row in rows
    ]
    return rows, tables


def as_labelled_pair(rows: list[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    found: list[Row] = []
    for row in rows:
        found += [replace(row, positives=[one], negatives=[], alone=True) for one in row.positives]
        found += [replace(row, positives=[], negatives=[one], alone=True) for one in row.negatives]
    tables = [
        {**asked(row), "positive": one.text, "positive_id": one.id, "label": len(row.positives), "score": one.score}
        for row in found
        for one in [*row.positives, *row.negatives]
    ]
    return found, tables


def as_labelled_list(rows: list[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    tables = [
        {
            **asked(row),
            "positive": [one.text for one in [*row.positives, *row.negatives]],
            "positive_id": [one.id for one in [*row.positives, *row.negatives]],
            "labels": [1] * len(row.positives) + [0] * len(row.negatives),
            "scores": [one.score for one in [*row.positives, *row.negatives]],
        }
        for row in rows
    ]
    return rows, tables


def as_flagembedding(rows: list[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    names = {"pos": "text", "pos_ids": "id", "pos_scores": "score"}
    tables = [
        {
            "query": row.anchor,
            "query_id": row.anchor_id,
            **{name: [getattr(one, key) for one in row.positives] for name, key in names.items()},
            **{f"neg{name[3:]}": [getattr(one, key) for one in row.negatives] for name, key in names.items()},
        }
        for row in rows
    ]
    return rows, tables


def asked(row: Row) -> dict[str, Any]:
    return {"anchor": row.anchor, "anchor_id": row.anchor_id}


FORMATS = [as_triplet, as_tuple, as_labelled_pair, as_labelled_list, as_flagembedding]


def found_in(path: Path, **columns: str) -> dict[str, int]:
    found = audit.audit(path, audit.AuditOptions(columns=columns, examples=1000))
    for one in found.findings:
        assert len(one.examples) == one.count
    return {one.check: one.count for one in found.findings if one.count}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("written", FORMATS)
def test_counts_are_those_of_a_plain_program(
    written: Callable[[list[Row]], tuple[list[Row], list[dict[str, Any]]]], seed: int, tmp_path: Path
) -> None:
    rows, table = written(faulty(seed))
    if written is as_flagembedding:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in table), "utf-8")
    else:
        path = tmp_path / "rows"
        path.mkdir()
        half = len(table) // 2
        pq.write_table(pa.Table.from_pylist(table[:half]), path / "part-0.parquet")
        schema = pq.read_schema(path / "part-0.parquet")
        pq.write_table(pa.Table.from_pylist(table[half:], schema=schema), path / "part-1.parquet")
    counts = {name: count for name, count in expected(rows).items() if count}
    assert found_in(path) == counts
    assert {"positive_id", "non_finite", "repeated_negative", "duplicate_row"} <= set(counts)


def test_every_check_is_tried_by_the_plain_program() -> None:
    every = {
        name for seed in range(3) for written in FORMATS for name, n in expected(written(faulty(seed))[0]).items() if n
    }
    assert every == set(audit.CHECKS) - {"unknown_id"}  # which only a config can tell


# --- runs, qrels and the command --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder full of traps, with random vectors."""
    folder = tmp_path_factory.mktemp("audit")
    data = tricky_folder(folder / "beir")
    rows = [len((data / f"{name}.jsonl").read_text("utf-8").splitlines()) for name in ("corpus", "queries")]
    write_vectors(data, rows[0], rows[1], seed=1)
    run = Run(precomputed_config(folder / "run", data))
    run.mine()
    return run


def config_of(run: Run, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(run.config), "utf-8")
    return path


def test_the_checks_that_cover_nemos_list_exist_and_are_printed_for_a_file() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/trust.md").read_text("utf-8")
    answers = page.partition("NeMo's checklist")[2].partition("recorded in")[0]
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+|shortage)`", answers))
    assert named == {check for checks in audit.NEMO.values() for check in checks} <= set(audit.CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_what_is_mined_is_clean(mined: Run, tmp_path: Path, name: str) -> None:
    run = mined.copied(tmp_path / "run")
    changes = [f"output.format={name}", "mining.near_duplicate=0.9"]
    run.mine(*changes)
    options = [option for change in changes for option in ("--set", change)]
    config = config_of(run, tmp_path)
    done = negpipe("audit", config, *options, "--fail-on", "positive,duplicate,score,text,missing_id")
    assert done.code == 0, done.out + done.err
    written = json.loads((run.folder / "audit.json").read_text("utf-8"))
    assert written["qrels"]
    assert written["checks"]["positive_id"]["of"] == written["negatives"] > 300


def test_without_exclusions_the_qrels_tell(mined: Run, tmp_path: Path) -> None:
    """Negatives that are positives by the qrels alone: in the rows themselves nothing says so."""
    run = mined.copied(tmp_path / "run")
    changes = ["mining.exclude=[]", "mining.relative_margin=null", "mining.num_negatives=200", "mining.range_max=300"]
    run.mine(*changes)
    judged = {
        tuple(line.split("\t")[:2])
        for split in ("train", "test")
        for line in (Path(run.config["data"]["path"]) / f"qrels/{split}.tsv").read_text("utf-8").splitlines()[1:]
        if line.split("\t")[2] != "0"
    }
    others = {f"e{i}": f"d{i}" for i in range(15)}  # ids that share a text
    judged |= {(query, others[document]) for query, document in judged if document in others}
    rows = [row for path in (run.folder / "triplets").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    planted = sum((row["anchor_id"], row["negative_id"]) in judged for row in rows)
    options = [option for change in changes for option in ("--set", change)]
    done = negpipe("audit", config_of(run, tmp_path), *options, "--fail-on", "positive_id")
    found = json.loads((run.folder / "audit.json").read_text("utf-8"))["checks"]
    assert (done.code, found["positive_id"]["count"]) == (1, planted)
    assert f"positive_id ({planted}" in done.err
    assert found["positive_normalized"]["count"] > 0
    assert found["shared_anchor"]["count"] > 0
    alone = audit.audit(run.folder / "triplets", audit.AuditOptions(columns={}))
    by_name = {one.check: one.count for one in alone.findings}
    assert 0 < by_name["positive_id"] < planted


def test_foreign_file_with_the_qrels_of_a_config(mined: Run, tmp_path: Path) -> None:
    """No ids in the file: anchors and documents are found by their texts."""
    data = Path(mined.config["data"]["path"])
    texts = {
        row["_id"]: f"{row.get('title', '')} {row['text']}".strip()
        for name in ("corpus", "queries")
        for row in map(json.loads, (data / f"{name}.jsonl").read_text("utf-8").splitlines())
    }
    file = tmp_path / "foreign.csv"
    lines = [(texts["q0"], texts["d0"], texts[name]) for name in ("d100", "d50", "d51")]
    file.write_text("question,good,bad\n" + "".join(",".join(line) + "\n" for line in lines), "utf-8")
    columns = "anchor=question,positive=good,negative=bad"
    alone = negpipe("audit", "--file", file, "--columns", columns, "--fail-on", "positive")
    points = alone.out.partition("NeMo's checklist")[2]
    assert all(point in points and check in points for point, checks in audit.NEMO.items() for check in checks)
    assert alone.code == 0, alone.err
    config = config_of(mined, tmp_path)
    done = negpipe("audit", config, "--file", file, "--columns", columns, "--fail-on", "positive", "--json")
    assert done.code == 1
    found = json.loads(done.out)["checks"]
    assert (found["positive_text"]["count"], found["positive_text"]["examples"][0]["row"]) == (1, 0)
    assert found["positive_id"]["of"] == 0
    assert not (mined.folder / "audit.json").exists()


def test_unknown_ids(mined: Run, tmp_path: Path) -> None:
    """Some are findings; a file with mostly unknown ids is from other data, where no check means anything."""
    file, config = tmp_path / "rows.jsonl", config_of(mined, tmp_path)
    row = {"anchor": "a", "positive": "b", "negative": "c", "anchor_id": "q0", "positive_id": "d0", "negative_id": "x9"}
    file.write_text("".join(json.dumps(row | more) + "\n" for more in ({}, {"anchor_id": "y7", "negative_id": ""})))
    done = negpipe("audit", config, "--file", file, "--format", "json", "--fail-on", "unknown_id=0.5,missing_id=0.5")
    assert done.code == 0, done.err
    found = json.loads(done.out)["checks"]["unknown_id"]
    assert (found["count"], found["of"]) == (2, 5)  # the empty id is missing, not unknown
    assert [(one["row"], one["detail"]) for one in found["examples"]] == [(0, "document id x9"), (1, "anchor id y7")]
    assert negpipe("audit", config, "--file", file, "--fail-on", "unknown_id").code == 1
    file.write_text(json.dumps(row | {"positive_id": "x8"}) + "\n", "utf-8")
    done = negpipe("audit", config, "--file", file)
    assert done.code == 3
    assert "2 of 2 document ids are not among the documents" in done.err
    assert "'x8'" in done.err
    assert "`negpipe ingest" in done.err


def test_unknown_anchors_without_ids(mined: Run, tmp_path: Path) -> None:
    """They are known by their texts; those of the qrels that have no row are told apart in the shortage."""
    file, config = tmp_path / "rows.csv", config_of(mined, tmp_path)
    queries = (Path(mined.config["data"]["path"]) / "queries.jsonl").read_text("utf-8").splitlines()
    known = {row["_id"]: row["text"] for row in map(json.loads, queries)}["q0"].upper()
    file.write_text(f"anchor,positive,negative\n{known},good,bad\nanother one,good,\n", "utf-8")
    done = negpipe("audit", config, "--file", file, "--format", "json", "--fail-on", "unknown_id=0.5")
    assert done.code == 0, done.err
    found = json.loads(done.out)["checks"]
    unknown, empty, short = (found[name] for name in ("unknown_id", "empty_text", "shortage"))
    assert (unknown["count"], unknown["of"], unknown["unit"]) == (1, 2, "anchor texts")
    assert [(one["row"], one["detail"]) for one in unknown["examples"]] == [(1, "anchor text another one")]
    assert [(one["row"], one["detail"]) for one in empty["examples"]] == [(1, "negative")]
    assert short["unit"] == f"anchors with their positive, {short['of'] - 2} of them without a row"
    assert "anchor q0 has no row" not in [one["detail"] for one in short["examples"]]
    file.write_text("anchor,positive,negative\none,good,bad\nanother one,good,bad\n", "utf-8")
    done = negpipe("audit", config, "--file", file)
    assert done.code == 3
    assert "2 of 2 anchor texts are not among the anchors of data.split" in done.err


@pytest.mark.parametrize(
    ("text", "mapping", "message"),
    [
        (
            '{"q": "a", "good": "b", "bad": "c"}',
            {"anchor_id": "q", "positive_id": "good", "negative_id": "bad"},
            "Ids alone cannot be audited",
        ),
        ('{"q": "a", "docs": "b"}', {}, "hold the anchor or the positive or the negative; columns: q, docs"),
        ('{"query": "a", "pos": ["b"], "n": "c"}', {"negative": "no"}, "column 'no' for the negative does not exist"),
        ('{"query": ["a"], "pos": ["b"], "neg": ["c"]}', {}, "expected a text for the anchor"),
        ('{"query": "a", "pos": [{"text": "b"}], "neg": ["c"]}', {}, "field 'pos': holds STRUCT"),
        ('{"query": "a", ', {}, "cannot be read"),
        ("", {}, "cannot be read|contains no rows|no column"),
    ],
)
def test_files_that_cannot_be_audited(text: str, mapping: dict[str, str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text + "\n", "utf-8")
    with pytest.raises(InputError, match=message):
        audit.audit(file, audit.AuditOptions(columns=mapping))


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = (
        {"query": f"anchor {i}", "pos": [f"right {i}"], "neg": [f"wrong {i + k}" for k in range(9)]}
        for i in range(9000)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(BudgetError, match=r"resources\.memory_budget") as refused:
        audit.audit(file, audit.AuditOptions(columns={}, budget=Budget(2 * 2**20)))
    assert refused.value.there == 2 * 2**20


def test_policy() -> None:
    chosen = audit.policy("positive,shortage=0.5,hub")
    assert set(chosen.allowed) == {*audit.GROUPS["positive"], "shortage", "hub"}
    findings = [
        audit.Finding("shortage", "", "units", 1, 2, []),
        audit.Finding("hub", "", "documents", 1, 900, []),
        audit.Finding("positive_id", "", "negatives", 0, 9, []),
        audit.Finding("empty_text", "", "texts", 5, 9, []),
    ]
    assert [one.check for one in chosen.failed(findings)] == ["hub"]
    for wrong in ("positives", "hub=x", "hub=2"):
        with pytest.raises(ConfigError, match="--fail-on"):
            audit.policy(wrong)


def test_help_names_every_check_and_group() -> None:
    shown = negpipe("audit", "--help").out
    assert all(name in shown for name in [*audit.CHECKS, *audit.GROUPS])


def test_before_anything_is_mined(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**precomputed_config(tmp_path / "run", tmp_path), "mining": {}}), "utf-8")
    done = negpipe("audit", config)
    assert (done.code, "`negpipe ingest" in done.err) == (3, True)
    assert negpipe("audit").code == 2
    assert negpipe("audit", "--file", tmp_path / "none.parquet").code == 3


def test_texts_never_steer_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"anchor": "\x1b[31mred", "positive": "[bold]b\x07", "negative": "[bold]b\x07"}
    file.write_text(json.dumps(row) + "\n", "utf-8")
    done = negpipe("audit", "--file", file)
    assert "[bold]b" in done.out
    assert "\x1b" not in done.out
    assert "\x07" not in done.out


# --- texts and ids that repeat ----------------------------------------------------------------------------


MANY = 20_000  # squared, too many for the memory there is


@pytest.mark.slow
@pytest.mark.guarantee("100,000 queries share a text, or 100,000 documents, or one has them all")
@pytest.mark.parametrize("shape", ["one anchor text", "one anchor", "one document", "no ids"])
def test_rows_of_one_text_take_no_longer_than_others(shape: str, tmp_path: Path) -> None:
    """One text under many ids; one anchor with many positives; one document, under many ids, of many anchors."""
    number = list(map(str, range(MANY)))
    texts = [f"{'the' if i % 2 else 'an'} answer {i}" for i in range(MANY)]
    columns = {
        "anchor_id": ["q"] * MANY if shape == "one anchor" else [f"q{i}" for i in number],
        "anchor": [f"question {i}" for i in number] if shape == "one document" else ["Sports"] * MANY,
        "positive_id": [f"d{i}" for i in number],
        "positive": ["Yes."] * MANY if shape == "one document" else texts,
        "negative_id": [f"d{(i + 1) % MANY}" for i in range(MANY)],
        "negative": ["Yes."] * MANY if shape == "one document" else [texts[(i + 1) % MANY] for i in range(MANY)],
    }
    if shape == "one anchor":  # no positive, but as near to half of them in length
        columns["negative_id"], columns["negative"] = ["e"] * MANY, ["some words about something else"] * MANY
    if shape == "no ids":
        missing: list[Any] = [None] * MANY
        columns |= {"anchor_id": missing, "positive_id": missing, "negative_id": missing}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    pieces = [
        pa.table(
            {
                "anchor_id": columns["anchor_id"],
                "anchor": columns["anchor"],
                "document": [0] * MANY if shape == "one document" else list(range(MANY)),
                "text": columns["positive"],
            }
        )
    ]
    ids = [f"d{i}" for i in number]
    listed = {"document": list(range(MANY)), "id": ids, "other_ids": [[]] * MANY}
    if shape == "one document":
        listed = {"document": [0], "id": ids[:1], "other_ids": [ids[1:]]}
    if shape == "one anchor":
        listed = {"document": list(range(MANY + 1)), "id": [*ids, "e"], "other_ids": [[]] * (MANY + 1)}
    options = audit.AuditOptions(columns={}, budget=Budget(2**27))
    started = time.monotonic()
    for qrels in (None, audit.Qrels("qrels", pieces, [pa.table(listed)])):
        found = {one.check: one.count for one in audit.audit(tmp_path / "rows.parquet", options, qrels).findings}
        expected = {"one anchor text": "shared_anchor", "one document": "positive_id" if qrels else "positive_text"}
        why = expected.get(shape, "repeated_negative")
        reasons = ("positive_id", "positive_text", "positive_normalized", "shared_anchor", "near_duplicate")
        assert {reason: found[reason] for reason in reasons} == {r: MANY if r == why else 0 for r in reasons}
    assert time.monotonic() - started < 60
