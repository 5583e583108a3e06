"""The checks: each finds rows or documents, counts them and shows some.

A negative counts as false for one reason, the first of positive_id, positive_text, positive_normalized, shared_anchor,
anchor_text, anchor_id and near_duplicate that applies. A row that repeats an earlier one counts as that, and nothing in
it as a repeated negative. All positives of an anchor in the file, and in the qrels if there are any, are its positives:
an anchor is identified by its id, or by its exact text if the file has no ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from negpipe.data.database import number_of
from negpipe.errors import InputError
from negpipe.review.audit import load, rules
from negpipe.review.audit.columns import RowLayout
from negpipe.review.audit.rules import RULES, ColumnRules

if TYPE_CHECKING:
    import duckdb

CHECKS: Mapping[str, str] = {
    "positive_id": "the negative is a positive of its anchor, by id",
    "positive_text": "the negative has the text of a positive of its anchor",
    "positive_normalized": "the same but for case, white space or Unicode form",
    "shared_anchor": "the negative is a positive of another anchor with the same text",
    "anchor_text": "the negative is the anchor's own text",
    "anchor_id": "the negative has the anchor's id, and its text within or around the anchor's",
    "near_duplicate": "the negative is nearly the text of a positive of its anchor",
    "repeated_negative": "the negative is listed twice for the same anchor and positive",
    "duplicate_row": "the row repeats an earlier one",
    "non_finite": "the score is missing or not a finite number",
    "above_positive": "the negative scores above its positive",
    "shortage": "fewer negatives than wanted",
    "empty_text": "the text is missing or blank",
    "missing_id": "the id is missing or empty",
    "unknown_id": "the id, or the text of an anchor without an id, is not in the data of the config",
    "hub": "the document is the negative of unusually many anchors",
}
NEMO: Mapping[str, tuple[str, ...]] = {
    "question ids are unique": ("duplicate_row",),
    "documents exist": ("missing_id", "unknown_id"),
    "no positive among the negatives": ("positive_id", "positive_text", "positive_normalized", "shared_anchor"),
    "negatives are unique in a row": ("repeated_negative",),
    "scores are finite": ("non_finite",),
    "enough distinct negatives": ("shortage",),
}
"""The points of NeMo's checklist for mined sets, and the checks that answer each."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "positive": ("positive_id", "positive_text", "positive_normalized", "shared_anchor"),
    "duplicate": ("near_duplicate", "repeated_negative", "duplicate_row"),
    "score": ("non_finite", "above_positive"),
    "text": ("anchor_text", "anchor_id", "empty_text"),
    "rules": tuple(RULES),
    "any": (*CHECKS, *RULES),
}
_FALSE = (*GROUPS["positive"], "anchor_text", "anchor_id", "near_duplicate")
_HUB = 10  # minimum anchors of a hub
_SHOWN = 300  # characters of a text in an example
_SIDE = "if(positive, 'positive', 'negative')"


@dataclass(frozen=True)
class Limits:
    """Thresholds of a shortage and of a hub, and the number of examples."""

    negatives: int | None
    hub_share: float
    examples: int


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: its name; `about` describes it.
        count: number found among `of` checked (`unit`: rows, negatives, …).
        examples: the first of them: row (0-based), anchor_id, anchor, document_id, document and detail, if
            available. Texts are shortened, but otherwise as in the file.
    """

    check: str
    about: str
    unit: str
    count: int
    of: int
    examples: list[dict[str, Any]]

    @property
    def share(self) -> float:
        """Share found among those checked."""
        return self.count / self.of if self.of else 0.0

    def document(self) -> dict[str, Any]:
        """The finding as plain JSON."""
        return {**{name: value for name, value in vars(self).items() if name != "check"}, "share": self.share}


def prepare(database: duckdb.DuckDBPyConnection, layout: RowLayout) -> None:
    """Classify every negative and every row once for all checks."""
    by_id = _named("x.a", "positives", "a") if _ids(layout) else "false"
    shared_id = _named("x.text", "shared", "text") if _ids(layout) else "false"
    database.execute(f"""
        create table askers as select a, n as text from anchors where n in (
            select n from anchors group by n having min(a) != max(a));
        create table shared as select distinct text, id, document, n from askers join positives using (a);
        create table asked as select doc, text, id, document, n from negatives join askers using (a);
        create table of_namesakes as select doc from asked x
            where {shared_id} or (x.text, x.n) in (select text, n from shared);
        create table themselves as select x.doc from negatives x join entries e using (row)
            join normal d on d.h = x.h join normal q on q.h = e.h
            where x.id = e.anchor_id and '' not in (d.normalized, q.normalized)
            and (contains(d.normalized, q.normalized) or contains(q.normalized, d.normalized));
        create table false_negatives as
        select x.doc, x.row, case
            when {by_id} then 'positive_id'
            when (x.a, x.h) in (select a, h from positives) then 'positive_text'
            when (x.a, x.n) in (select a, n from positives) then 'positive_normalized'
            when x.doc in (select doc from of_namesakes) then 'shared_anchor'
            when (x.a, x.n) in (select a, n from anchors) then 'anchor_text'
            when x.doc in (select doc from themselves) then 'anchor_id'
            when (x.a, x.h) in (select a, h from near) then 'near_duplicate'
            end as reason
        from negatives x where reason is not null;
        create table repeats as select row, earlier from (
            select row, min(row) over (partition by signature) as earlier from entries
        ) where row != earlier;
        create table sizes as
        select e.u, any_value(e.a) as a, min(e.row) as row, count(x.doc) as size from entries e
        left join negatives x using (row) anti join repeats r on r.row = e.row group by e.u;
        """)


def _named(owner: str, positives: str, column: str) -> str:
    """Whether x is a positive by its id, or as a document known to the qrels under any of its ids."""
    # Nulls among the looked-up values would be compared row by row.
    return " or ".join(
        f"(x.{name} is not null and ({owner}, x.{name}) in"
        f" (select {column}, {name} from {positives} where {name} is not null))"
        for name in ("id", "document")
    )


def run(database: duckdb.DuckDBPyConnection, check: str, layout: RowLayout, limits: Limits) -> Finding:
    """Count the findings of a check, and fetch examples."""
    return _finding(database, check, CHECKS[check], limits, *_query(database, check, layout, limits))


def run_rules(
    database: duckdb.DuckDBPyConnection, asked: ColumnRules, layout: RowLayout, limits: Limits
) -> Iterator[Finding]:
    """The same for the rules that a config sets.

    Raises:
        InputError: `mining.where` cannot be evaluated for a row.
    """
    import duckdb

    known = number_of(database, "select count(document) from negatives")
    for check, query in rules.queries(asked, layout):
        try:
            yield _finding(database, check, RULES[check], limits, "negatives", known if query else 0, query or "")
        except duckdb.ConversionException as error:
            raise InputError(str(error).splitlines()[0], field=f"mining.{check}") from None


def _finding(
    database: duckdb.DuckDBPyConnection, check: str, about: str, limits: Limits, unit: str, of: int, found: str
) -> Finding:
    if not of:
        return Finding(check, about, unit, 0, 0, [])
    total = number_of(database, f"select count(*) from ({found})")
    examples = _examples(database, f"{found} order by row, doc limit {limits.examples}") if total else []
    return Finding(check, about, unit, total, of, examples)


def _query(database: duckdb.DuckDBPyConnection, check: str, layout: RowLayout, limits: Limits) -> tuple[str, int, str]:
    """What is checked, its number, and the query of (row, doc, detail) that finds problems."""
    negatives = number_of(database, "select count(*) from negatives")
    if check in _FALSE:
        if check == "near_duplicate":
            return (
                "negatives",
                negatives,
                (
                    "select row, doc, format('{:.3f} alike', similarity) as detail from false_negatives"
                    f" join negatives using (doc, row) join near using (a, h) where reason = '{check}'"
                ),
            )
        missing = check in ("positive_id", "anchor_id") and not _ids(layout)
        return (
            "negatives",
            0 if missing else negatives,
            (f"select row, doc, '' as detail from false_negatives where reason = '{check}'"),
        )
    rows = number_of(database, "select count(*) from entries")
    if check == "repeated_negative":
        return (
            "negatives",
            negatives,
            (
                "select row, doc, '' as detail from (select row, doc, min(doc) over (partition by u, n) as first"
                " from negatives anti join repeats using (row) where n is not null) where doc != first"
            ),
        )
    if check == "duplicate_row":
        return "rows", rows, "select row, null as doc, 'row ' || earlier as detail from repeats"
    documents = number_of(database, "select count(*) from documents")
    if check == "non_finite":
        return (
            "documents",
            documents if layout.scored else 0,
            (
                "select row, doc, coalesce(score::varchar, 'missing') as detail from documents"
                " where score is null or not isfinite(score)"
            ),
        )
    if check == "above_positive":
        return (
            "negatives",
            negatives if layout.scored and not layout.ranked else 0,
            (
                "select x.row, x.doc, format('{:.4f} > {:.4f}', x.score, least) as detail from negatives x join"
                " (select u, min(score) as least from documents join entries using (row) where positive"
                " and isfinite(score) group by u) using (u) where isfinite(x.score) and x.score > least"
            ),
        )
    if check == "shortage":
        return _shortage(database, layout, limits)
    if check == "empty_text":
        blank = "(select h from normal where normalized = '')"
        return (
            "texts",
            rows + documents,
            (
                f"select row, null as doc, 'anchor' as detail from entries where h is null or h in {blank} union all"
                f" select row, doc, {_SIDE} from documents where h is null or h in {blank}"
            ),
        )
    if check == "missing_id":
        return _missing_id(database, layout)
    if check == "unknown_id":
        return _unknown_id(database, layout)
    anchors = number_of(database, "select count(distinct a) from entries")
    least = max(_HUB, limits.hub_share * anchors)
    return (
        "documents",
        number_of(database, "select count(distinct n) from negatives"),
        (
            f"select min(row) as row, min(doc) as doc, count(distinct a) || ' of {anchors} anchors' as detail"
            f" from negatives where n is not null group by n having count(distinct a) > {least}"
        ),
    )


def _shortage(database: duckdb.DuckDBPyConnection, layout: RowLayout, limits: Limits) -> tuple[str, int, str]:
    wanted = limits.negatives
    if wanted is None:  # the most frequent number
        wanted = number_of(database, "select size from sizes group by size order by count(*) desc, size desc limit 1")
    # Without ids, an anchor is there if its normalised text is, as in `unknown_id`.
    has_row = (
        "a in (select a from entries)"
        if layout.has("anchor_id")
        else "anchor in (select h from normal where n in (select n from entries join normal using (h)))"
    )
    absent = (
        f"(select a, any_value(anchor_id) as id from known where not ({has_row}) group by a)"
        if _has(database, "known")
        else "(select 0 as a, '' as id where false)"
    )
    without = number_of(database, f"select count(*) from {absent}")
    of = number_of(database, "select count(*) from sizes") + without
    return (
        f"anchors with their positive, {without:,} of them without a row" if without else "anchors with their positive",
        of,
        (
            f"select row, null as doc, size || ' of {wanted}' as detail from sizes where size < {wanted} union all"
            f" select null, null, 'anchor ' || id || ' has no row' from {absent}"
        ),
    )


def _missing_id(database: duckdb.DuckDBPyConnection, layout: RowLayout) -> tuple[str, int, str]:
    sides = [
        side
        for side, field in (("true", "positive_id"), ("false", "positive_id" if layout.labelled else "negative_id"))
        if layout.has(field)
    ]
    documents = f"(select row, doc, id, positive from documents where positive in ({', '.join(sides)}))"
    parts = [f"select row, doc, id, {_SIDE} as detail from {documents}"] if sides else []
    if layout.has("anchor_id"):
        parts.append("select row, null as doc, anchor_id as id, 'anchor' as detail from entries")
    if not parts:
        return "ids", 0, ""
    every = " union all ".join(parts)
    missing = f"select row, doc, detail from ({every}) where id is null or id = ''"
    return "ids", number_of(database, f"select count(*) from ({every})"), missing


def _unknown_id(database: duckdb.DuckDBPyConnection, layout: RowLayout) -> tuple[str, int, str]:
    if not _has(database, "known"):
        return "ids", 0, ""
    asked = {**load.ids(layout), **load.anchor_texts(layout)}
    every = " union all ".join(
        f"select row, doc, '{what} ' || id[:{_SHOWN}] as detail, id not in ({there}) as unknown from ({ids})"
        for what, (ids, there) in asked.items()
    )
    of = number_of(database, f"select count(*) from ({every})")
    unit = "ids" if layout.has("anchor_id") else "ids and anchor texts" if _ids(layout) else "anchor texts"
    return unit, of, f"select row, doc, detail from ({every}) where unknown"


def _examples(database: duckdb.DuckDBPyConnection, found: str) -> list[dict[str, Any]]:
    cursor = database.execute(f"""
        select f.row, e.anchor_id, s.text[:{_SHOWN}] as anchor, d.id as document_id,
            t.text[:{_SHOWN}] as document, f.detail
        from ({found}) f left join entries e on e.row = f.row left join raw s on s.h = e.h
        left join documents d on d.doc = f.doc
        left join raw t on t.h = d.h order by f.row nulls last, f.doc nulls last, f.detail""")
    names = [column[0] for column in cursor.description]
    rows = (dict(zip(names, row, strict=True)) for row in cursor.fetchall())
    return [{name: value for name, value in row.items() if value not in (None, "")} for row in rows]


def _ids(layout: RowLayout) -> bool:
    """Whether documents have ids."""
    return layout.has("positive_id") or layout.has("negative_id")


def _has(database: duckdb.DuckDBPyConnection, table: str) -> bool:
    return bool(number_of(database, f"select count(*) from duckdb_tables() where table_name = '{table}'"))
