"""Rules by a column against a plain program over the rows of the source: nulls, several positives, other splits."""

from __future__ import annotations

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import ConfigError, InputError
from negpipe.review import finished, measures, report
from negpipe.review.audit import AuditOptions
from negpipe.select import columns, conditions
from negpipe.stages import STAGES

DOCUMENTS, QUERIES, WANTED = 90, 24, 4

Row = dict[str, Any]
Holds = Callable[[Row, Row, Row, float, int, float], bool]


# --- a source -------------------------------------------------------------------------------------------


class Source:
    """Documents and queries with columns that may be null, and vectors whose products are exact."""

    def __init__(self, folder: Path) -> None:
        draw = np.random.default_rng(11)

        def one(values: list[Any]) -> Any:
            return values[int(draw.integers(len(values)))]

        self.documents = [
            {
                "_id": f"d{at}",
                "title": "",
                "text": f"document {at}",
                "doc": one([None, "", *(f"m{n}" for n in range(7))]),
                "lang": one(["de", "en", "fr", None]),
                "year": one([1990, 2000, 2010, "n/a", None]),
            }
            for at in range(DOCUMENTS)
        ]
        self.queries = [
            {
                "_id": f"q{at}",
                "text": f"query {at}",
                "doc": one(["m0", "m1", "", None]),
                "lang": one(["de", "en", None]),
            }
            for at in range(QUERIES)
        ]
        self.positives: dict[str, list[int]] = {}
        self.known: dict[str, list[int]] = {}
        for query in self.queries:
            rows = draw.choice(DOCUMENTS, int(draw.integers(2, 6)), replace=False).tolist()
            self.known[query["_id"]], self.positives[query["_id"]] = rows, rows[: int(draw.integers(1, len(rows)))]
        small.write_rows(folder / "data/corpus.jsonl", self.documents)
        small.write_rows(folder / "data/queries.jsonl", self.queries)
        for split, side in (("train", self.positives), ("test", self.known)):
            pairs = [(name, f"d{row}", 1) for name, rows in side.items() for row in rows]
            small.write_qrels(folder / f"data/qrels/{split}.tsv", pairs)
        vectors = draw.integers(-8, 9, (DOCUMENTS + QUERIES, 12)) / 16
        self.scores = vectors[DOCUMENTS:] @ vectors[:DOCUMENTS].T
        np.save(folder / "corpus.npy", vectors[:DOCUMENTS].astype(np.float32))
        np.save(folder / "anchors.npy", vectors[DOCUMENTS:].astype(np.float32))
        self.tree = small.settings(folder)
        self.tree["encoder"]["normalize"] = False
        self.tree["data"]["extra"] = {"corpus": ["doc", "lang", "year"], "queries": ["lang", "doc"]}
        self.tree["mining"] = {"relative_margin": None, "num_negatives": WANTED, "range_max": 60}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("columns"))


# --- a plain program ------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    return value if isinstance(value, int) else None


def older(left: Row, right: Row) -> bool:
    one, other = number(left["year"]), number(right["year"])
    return one is not None and other is not None and one <= other


WHERE: dict[str, Holds] = {
    "candidate.lang = anchor.lang": lambda a, p, c, s, r, ps: c["lang"] is not None and c["lang"] == a["lang"],
    "candidate.doc != positive.doc": lambda a, p, c, s, r, ps: (
        None not in (c["doc"], p["doc"]) and c["doc"] != p["doc"]
    ),
    "score < positive_score - 0.25 and rank >= 3": lambda a, p, c, s, r, ps: s < ps - 0.25 and r >= 3,
    "try_cast(candidate.year as integer) <= try_cast(positive.year as integer)": lambda a, p, c, s, r, ps: older(c, p),
    "candidate.text not like '%7' and (positive.id < candidate.id or anchor.doc is null) -- odd": (
        lambda a, p, c, s, r, ps: not c["text"].endswith("7") and (p["_id"] < c["_id"] or a["doc"] is None)
    ),
    "candidate.lang in ('de', 'en') AND NOT score BETWEEN -0.25 AND 0.25 and candidate.year is not null": (
        lambda a, p, c, s, r, ps: c["lang"] in ("de", "en") and not -0.25 <= s <= 0.25 and c["year"] is not None
    ),
}
RULES: list[dict[str, Any]] = [
    {"never_same": ["doc"]},
    {"never_same": ["doc", "year"]},
    {"never_same": ["anchor.lang"]},
    {"only_same": ["lang"]},
    {"only_same": ["anchor.lang"]},
    {"only_same": ["lang", "anchor.lang"], "never_same": ["doc"]},
    *({"where": text} for text in WHERE),
    {"where": "candidate.lang = anchor.lang", "never_same": ["doc"], "max_score": 0.75},
]


def fate(source: Source, rules: Row, at: int, row: int, rank: int, positive: int) -> str | None:
    """The first rule that drops a candidate."""
    query, document = source.queries[at], source.documents[row]
    known = [source.documents[one] for one in source.known[query["_id"]]]
    if document in known:
        return "positive_id"

    def shared(name: str, *, or_anchor: bool) -> bool:
        column = name.removeprefix("anchor.")
        values = [] if "." in name else [one[column] for one in known]
        if "." in name or (or_anchor and column in query):
            values.append(query[column])
        return document[column] not in (None, "") and document[column] in values

    if any(shared(name, or_anchor=True) for name in rules.get("never_same", ())):
        return "never_same"
    if not all(shared(name, or_anchor=False) for name in rules.get("only_same", ())):
        return "only_same"
    score, reference = source.scores[at, row], source.scores[at, positive]
    if "where" in rules:
        holds = WHERE[rules["where"]](query, source.documents[positive], document, score, rank, reference)
        if not holds:
            return "where"
    return "max_score" if score > rules.get("max_score", np.inf) else None


def units(source: Source, reference: str) -> list[tuple[int, int]]:
    """(query, the positive that margins refer to)."""
    found = []
    for at, query in enumerate(source.queries):
        own = source.positives[query["_id"]]
        if reference == "each":
            found += [(at, row) for row in own]
        else:
            best = (min if reference == "min" else max)(source.scores[at, row] for row in own)
            found.append((at, next(row for row in own if source.scores[at, row] == best)))
    return found


def expected(
    source: Source, rules: Row, reference: str, rank_over: str = "survivors", end: int = 60
) -> tuple[Counter[tuple[str, str, str]], Counter[str]]:
    """(anchor, positive, negative) of all rows, and what dropped how many."""
    rows, drops = Counter[tuple[str, str, str]](), Counter[str]()
    for at, positive in units(source, reference):
        taken: list[int] = []
        survivors = 0
        for rank, row in enumerate(np.lexsort((np.arange(DOCUMENTS), -source.scores[at])).tolist()):
            why = fate(source, rules, at, row, rank, positive)
            place = survivors if rank_over == "survivors" else rank
            survivors += why is None
            why = why or ("after_window" if place >= end else "not_sampled" if len(taken) == WANTED else None)
            if why:
                drops[why] += 1
            else:
                taken.append(row)
        name = source.queries[at]["_id"]
        own = [positive] if reference == "each" else source.positives[name]
        rows.update((name, f"d{one}", f"d{row}") for one in own for row in taken)
    return rows, drops


def config_of(source: Source, rules: Row, **mining: Any) -> Any:
    data = {**source.tree["data"], **mining.pop("data", {})}
    search = mining.pop("search", {})
    output = {**source.tree["output"], **mining.pop("output", {})}
    mining = {**source.tree["mining"], **rules, **mining}
    return load_config({**source.tree, "data": data, "mining": mining, "search": search, "output": output})


def rows_of(folder: Path) -> list[Row]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def chosen(rows: list[Row]) -> Counter[tuple[str, str, str]]:
    return Counter((row["anchor_id"], row["positive_id"], row["negative_id"]) for row in rows)


# --- what is chosen -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["min", "max", "each"])
@pytest.mark.parametrize("rules", RULES, ids=json.dumps)
def test_rows_and_ledger_are_those_of_a_plain_program(source: Source, rules: Row, reference: str) -> None:
    result = graph.mine(config_of(source, rules, margin_reference=reference, search={"depth": 128}))
    rows, drops = expected(source, rules, reference)
    assert chosen(rows_of(result.triplets)) == rows
    assert Counter(result.stats["triplets"]["drops"]) == drops
    assert any(drops[name] for name in rules if name in columns.NAMES)
    assert not any(f"dropped_{name}" in ledger_of(result) for name in columns.NAMES if name not in rules)


def ledger_of(result: graph.Result) -> list[str]:
    manifest = json.loads((result.run_dir / ".negpipe/triplets/manifest.json").read_text(encoding="utf-8"))
    paths = [file["path"] for part in manifest["parts"] for file in part["files"] if "ledger/" in file["path"]]
    names: list[str] = pq.read_schema(result.run_dir / paths[0]).names
    return names


@pytest.mark.parametrize("rules", [RULES[0], RULES[3], RULES[-2]], ids=json.dumps)
def test_raw_ranks_count_what_is_dropped(source: Source, rules: Row) -> None:
    result = graph.mine(config_of(source, rules, rank_over="raw", range_max=12, search={"depth": 128}))
    assert chosen(rows_of(result.triplets)) == expected(source, rules, "min", "raw", 12)[0]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["min", "each"])
@pytest.mark.parametrize("rules", [RULES[0], RULES[5], RULES[-1]], ids=json.dumps)
def test_anchors_that_run_short_are_searched_deeper(source: Source, rules: Row, reference: str) -> None:
    shallow = {"search": {"depth": 8}, "range_max": 8, "margin_reference": reference}
    result = graph.mine(config_of(source, rules, **shallow))
    assert result.stats["triplets"]["searched_deeper"] > 0
    assert chosen(rows_of(result.triplets)) == expected(source, rules, reference, end=8)[0]


@pytest.mark.slow
def test_parts_and_blocks_change_nothing(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    for rules in (RULES[5], RULES[-1]):
        rows = expected(source, rules, "min")[0]
        for part_rows, block in ((3, columns._BLOCK), (500, columns._BLOCK), (500, 300)):
            monkeypatch.setattr(columns, "_BLOCK", block)
            # The format is another, so that nothing is up to date.
            changes = {"data": {"part_rows": part_rows}, "output": {"ranks": block == 300}}
            result = graph.mine(config_of(source, rules, search={"depth": 128}, **changes))
            assert chosen(rows_of(result.triplets)) == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "unscored"),
    [
        ({"never_same": ["doc"], "only_same": ["lang"]}, None),
        ({"where": "candidate.doc != positive.doc"}, "candidate.doc != positive.doc"),
        ({"where": "candidate.lang = anchor.lang and score < -0.25"}, "candidate.lang = anchor.lang"),
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("reference", ["max", "each"])
def test_drawn_documents_keep_to_what_names_no_score(
    source: Source, rules: Row, unscored: str | None, reference: str
) -> None:
    """As many are asked for as there are documents: mined and drawn ones are all that are allowed."""
    wanted = {"num_random": DOCUMENTS, "num_negatives": 1, "margin_reference": reference}
    rows = rows_of(graph.mine(config_of(source, rules, **wanted)).triplets)
    found = defaultdict(set)
    for row in rows:
        found[row["anchor_id"], row["positive_id"]].add(row["negative_id"])
    assert {row["source"] for row in rows} == {"mined", "random"}
    kept = {name: value for name, value in rules.items() if name != "where"} | ({"where": unscored} if unscored else {})
    for at, positive in units(source, reference):
        name = source.queries[at]["_id"]
        allowed = {f"d{row}" for row in range(DOCUMENTS) if not fate(source, kept, at, row, 0, positive)}
        for one in [positive] if reference == "each" else source.positives[name]:
            assert found.pop((name, f"d{one}"), set()) == allowed
    assert not found


# --- what is said about it ------------------------------------------------------------------------------


@pytest.mark.slow
def test_explain_names_the_rule_of_every_candidate(source: Source) -> None:
    rules = {"never_same": ["doc"], "only_same": ["lang"], "where": "score < positive_score - 0.25 and rank >= 3"}
    config = config_of(source, rules, search={"depth": 128})
    graph.mine(config)
    seen = Counter[str]()
    for at, positive in units(source, "min"):
        (unit,) = finished.explain_anchor(config, source.queries[at]["_id"]).units
        for rank, candidate in enumerate(unit.candidates):
            why = fate(source, rules, at, int(candidate.id[1:]), rank, positive)
            assert candidate.fate == why or (why is None and candidate.fate in ("taken", "not_sampled"))
            assert why not in rules or why in candidate.rule
            seen[candidate.fate] += 1
    assert all(seen[name] for name in rules)


@pytest.mark.slow
def test_the_report_says_how_much_each_rule_dropped(source: Source) -> None:
    rules = {"never_same": ["doc"], "only_same": ["lang"], "where": "score < positive_score - 0.25 and rank >= 3"}
    config = config_of(source, rules, search={"depth": 128})
    graph.mine(config)
    _, drops = expected(source, rules, "min")
    page = report.write(config).read_text(encoding="utf-8")
    figure = page[page.index("Candidates dropped, by reason") :].partition("</figure>")[0]
    written = [html.unescape(text) for text in re.findall(r">([^<>\n]+)</text>", figure)]
    names = [name.replace("_", " ") for name in drops if drops[name]]
    shown = dict(zip([one for one in written if one in names], written[-len(names) :], strict=True))
    assert {name: shown[name.replace("_", " ")] for name in rules} == {name: f"{drops[name]:,}" for name in rules}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
@pytest.mark.parametrize("reference", ["min", "max", "each"])
def test_audit_counts_the_rows_that_break_a_rule(source: Source, form: str, reference: str, tmp_path: Path) -> None:
    """Rows that were made without the rules, against a config that has them; and its own rows, which keep them."""
    rules = {"never_same": ["doc"], "only_same": ["lang", "anchor.lang"], "where": list(WHERE)[3]}
    settings = {"margin_reference": reference, "search": {"depth": 128}, "output": {"format": form}}
    without = graph.mine(config_of(source, {}, **settings)).triplets
    copy = tmp_path / "rows"
    copy.mkdir()
    for path in without.glob("*.parquet"):
        (copy / path.name).write_bytes(path.read_bytes())
    config = config_of(source, rules, **settings)
    graph.mine(config)
    own = {one.check: one for one in measures.audit_rows(config, AuditOptions(columns={})).findings}
    forged = {one.check: one for one in measures.audit_rows(config, AuditOptions(columns={}), copy).findings}
    counts = Counter[str]()
    for at, positive, row in negatives_of(source, rows_of(copy), form, reference):
        for name, asked in rules.items():
            counts[name] += fate(source, {name: asked}, at, row, 0, positive) == name
    for name in rules:
        if name == "where" and reference == "each" and form == "labeled-pair":
            assert (own[name].of, forged[name].of) == (0, 0)  # such rows do not say which pair is meant
            continue
        assert (own[name].count, forged[name].count) == (0, counts[name])
        assert own[name].of > 0 < counts[name]


def negatives_of(source: Source, rows: list[Row], form: str, reference: str) -> list[tuple[int, int, int]]:
    """(query, the positive that margins refer to, negative) of every negative in rows of a format."""
    referred = dict(units(source, reference)) if reference != "each" else {}
    found = []
    for row in rows:
        at, ids = int(row["anchor_id"][1:]), row["positive_id"]
        if form == "triplet":
            own, negatives = ids, [row["negative_id"]]
        elif form == "n-tuple":
            own, negatives = ids, [row[f"negative_{n}_id"] for n in range(1, WANTED + 1)]
        elif form == "labeled-pair":
            own, negatives = ids, [] if row["label"] else [ids]
        else:
            own, negatives = ids[0], ids[1:]
        found += [(at, referred.get(at, int(own[1:])), int(one[1:])) for one in negatives]
    return found


@pytest.mark.slow
def test_a_score_in_a_rule_is_checked_by_the_rows_own(source: Source) -> None:
    text = "score < positive_score - 0.25 and rank >= 3"
    for settings in ({}, {"num_random": 5}):
        config = config_of(source, {"where": text}, search={"depth": 128}, **settings)
        graph.mine(config)
        found = {one.check: one for one in measures.audit_rows(config, AuditOptions(columns={})).findings}
        assert found["where"].count == 0 < found["where"].of
    rows = pa.Table.from_pylist(rows_of(config.run_dir / "triplets"))
    forged = config.run_dir / "forged.parquet"
    pq.write_table(
        rows.set_column(rows.column_names.index("negative_rank"), "negative_rank", [[1] * len(rows)]), forged
    )
    found = {one.check: one for one in measures.audit_rows(config, AuditOptions(columns={}), forged).findings}
    assert found["where"].count == len(rows)


@pytest.mark.slow
def test_calibrate_keeps_to_the_rules(source: Source) -> None:
    def taken(rules: Row) -> float:
        made = measures.calibrate_settings(config_of(source, rules, search={"depth": 128}))
        return max(one.negatives for one in made.estimates)

    assert taken({}) > 0
    assert taken({"where": "rank < 0"}) == 0


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"never_same": ["author"]}, "data.extra.corpus: [doc, lang, year, author]"),
        ({"only_same": ["anchor.year"]}, "data.extra.queries: [lang, doc, year]"),
        ({"only_same": ["anchor.author"]}, "data.extra.corpus: [doc, lang, year, author]"),
        ({"where": "candidate.author = 'x'"}, "data.extra.corpus: [doc, lang, year, author]"),
        ({"where": "anchor.year = 'x'"}, "data.extra.queries: [lang, doc, year]"),
        ({"where": "scor < 0.5"}, "score"),
        ({"where": "candidate.lang = english"}, "single quotes"),
        ({"where": "candidate.year < 2000"}, "try_cast"),
        ({"where": "score"}, "FLOAT"),
        ({"where": "candidate.lang and score < 0.5"}, "VARCHAR"),
        ({"where": "score <"}, "syntax"),
        *(
            ({"where": text}, "mining.where")
            for text in (
                "score < 1; drop table x",
                "score < 1; select 2",
                "score < 1, rank < 2",
                "score < 1 from read_csv('/etc/passwd')",
                "score < 1 union select true",
                "score < 1 limit 1",
                "score < 1 as x",
                "candidate.lang in (select content from read_text('/etc/passwd'))",
                "exists(select 1)",
                "read_text('/etc/passwd') = 'x'",
                "random() < 0.5",
                "now() > '2020-01-01'",
                "current_setting('threads') = 1",
                "count(*) > 1",
                "row_number() over () > 1",
                "candidate = anchor",
                "columns(*)",
                "not " * 900 + "true",
                "$1",
            )
        ),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(
    source: Source, rules: Row, named: str, tmp_path: Path
) -> None:
    tree = {**source.tree, "run_dir": str(tmp_path / "run"), "mining": source.tree["mining"] | rules}
    with pytest.raises(ConfigError) as refused:
        graph.mine(load_config(tree))
    assert named in str(refused.value)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert small.run("config", "check", path).code == 2
    assert not list((tmp_path / "run").glob("ingest/*"))


def test_columns_whose_names_differ_by_case_are_not_mistaken(source: Source) -> None:
    extra = {"corpus": ["lang", "Lang"]}
    with pytest.raises(ConfigError, match="Lang"):
        conditions.check(config_of(source, {"where": 'candidate.lang = candidate."Lang"'}, data={"extra": extra}))
    conditions.check(config_of(source, {"where": "candidate.\"Lang\" = 'de'"}, data={"extra": extra}))


def test_a_value_that_cannot_be_converted_is_named(source: Source) -> None:
    with pytest.raises(InputError) as refused:
        graph.mine(config_of(source, {"where": "candidate.year::integer < 2000"}))
    assert refused.value.field == "mining.where"
    assert "n/a" in refused.value.problem
    assert "try_cast" in str(refused.value.remedy)


def test_without_the_rules_nothing_is_made_again(source: Source) -> None:
    plain = STAGES["triplets"].settings(config_of(source, {}))
    assert not {name for name in plain if name.removeprefix("mining.") in columns.NAMES}
    asked = STAGES["triplets"].settings(config_of(source, {"never_same": ["doc"]}))
    assert asked == plain | {"mining.never_same": ["doc"]}


# --- situations -----------------------------------------------------------------------------------------


def pool(folder: Path, documents: list[Row], queries: list[Row], positives: list[int], near: Any) -> Row:
    """A config over a source whose scores are those of `near`, (queries, documents)."""
    small.write_rows(folder / "data/corpus.jsonl", documents)
    small.write_rows(folder / "data/queries.jsonl", queries)
    pairs = [(query["_id"], documents[row]["_id"], 1) for query, row in zip(queries, positives, strict=True)]
    small.write_qrels(folder / "data/qrels/train.tsv", pairs)
    np.save(folder / "corpus.npy", near.T.astype(np.float32))
    np.save(folder / "anchors.npy", np.eye(len(queries), dtype=np.float32))
    tree = small.settings(folder)
    tree["encoder"]["normalize"] = False
    tree["mining"] = {"relative_margin": None, "num_negatives": 4, "range_max": 40}
    return tree


@pytest.mark.cases
def test_overlapping_chunks_of_the_positives_document(tmp_path: Path) -> None:
    """Chunks of one manual share whole sentences, and are nearer than all other documents."""
    documents = [
        {"_id": f"m{m}#{c}", "text": f"sentence {m}.{c}. sentence {m}.{c + 1}.", "title": "", "doc": f"m{m}"}
        for m in range(5)
        for c in range(8)
    ]
    queries = [{"_id": f"q{m}", "text": f"what about {m}"} for m in range(5)]
    manual, chunk = np.divmod(np.arange(40), 8)
    near = np.where(manual == np.arange(5)[:, None], 1.0, 0.1) - np.abs(chunk - 4) / 64 - manual / 1024
    tree = pool(tmp_path, documents, queries, [8 * m + 4 for m in range(5)], near)
    tree["data"]["extra"] = {"corpus": ["doc"]}

    def same(*overrides: str) -> list[bool]:
        rows = rows_of(graph.mine(load_config(tree, list(overrides))).triplets)
        return [row["positive_doc"] == row["negative_doc"] for row in rows]

    assert same() == [True] * 20
    assert same("mining.never_same=[doc]") == [False] * 20


@pytest.mark.cases
@pytest.mark.parametrize("rule", ["mining.only_same=[lang]", "mining.never_same=[anchor.lang]"])
def test_a_bilingual_pool(rule: str, tmp_path: Path) -> None:
    """An encoder that ranks a query's own language first, and positives that are all in the other one."""
    documents = [
        {"_id": f"{lang}{n}", "text": f"text {n} {lang}", "title": "", "lang": lang}
        for lang in ("de", "en")
        for n in range(20)
    ]
    queries = [{"_id": f"q{n}", "text": f"frage {n}", "lang": "de"} for n in range(10)]
    language, topic = np.divmod(np.arange(40), 20)
    near = np.where(language == 0, 0.5, 0.2) - np.abs(topic - np.arange(10)[:, None]) / 128
    tree = pool(tmp_path, documents, queries, [20 + n for n in range(10)], near)
    tree["data"]["extra"] = {"corpus": ["lang"], "queries": ["lang"]}

    def languages(*overrides: str) -> Counter[str]:
        rows = rows_of(graph.mine(load_config(tree, list(overrides))).triplets)
        return Counter(row["negative_lang"] for row in rows)

    assert languages() == {"de": 40}
    assert languages(rule) == {"en": 40}
