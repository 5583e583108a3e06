"""Checks rows against the config's column rules: in SQL, independently of the code that selected them.

facts  document, and the columns of documents that the rules name
asks   a (anchor), and the columns of anchors that the rules name
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from negpipe.config.schema import ANCHOR, Config
from negpipe.data.tables import EXTRA
from negpipe.review.audit.columns import RowLayout, quoted
from negpipe.select.conditions import Condition, columns_of, conditions

if TYPE_CHECKING:
    import duckdb

RULES: Mapping[str, str] = {
    "never_same": "the negative shares a column of mining.never_same with a known positive, or with the anchor",
    "only_same": "the negative does not share the columns of mining.only_same",
    "where": "mining.where does not hold for the negative",
}
"""Checks for rules that a config may set."""


@dataclass(frozen=True)
class ColumnRules:
    """A config's column rules, and the values that they use.

    Attributes:
        config: the config.
        documents: tables of document (its number) and `named(config)["corpus"]`; one row per document.
        anchors: tables of anchor_id, anchor and `named(config)["queries"]`; one row per anchor.
    """

    config: Config
    documents: Iterable[pa.Table]
    anchors: Iterable[pa.Table]


def named(config: Config) -> dict[str, list[str]]:
    """The columns of ingest's documents (corpus) and anchors (queries) that the rules use."""
    mining, kept = config.mining, config.data.extra.queries
    names = [name.removeprefix(ANCHOR) for name in (*mining.never_same, *mining.only_same)]
    named = columns_of(conditions(config), config)
    queries = [EXTRA + name for name in names if name in kept] + list(named["anchor"].values())
    corpus = [EXTRA + name for name in names] + [*named["positive"].values(), *named["candidate"].values()]
    return {"corpus": list(dict.fromkeys(corpus)), "queries": list(dict.fromkeys(queries))}


def load(database: duckdb.DuckDBPyConnection, rules: ColumnRules, layout: RowLayout) -> None:
    """Load the values."""
    anchor = "anchor_id" if layout.has("anchor_id") else "anchor"
    wanted = named(rules.config)
    sides = {
        "facts": ("document", "document bigint", rules.documents, wanted["corpus"]),
        "asks": (f"hash({anchor})", "a ubigint", rules.anchors, wanted["queries"]),
    }
    for table, (key, typed, pieces, names) in sides.items():
        database.execute(f"create table {table} ({', '.join([typed, *(f'{quoted(name)} varchar' for name in names)])})")
        for piece in pieces:
            database.register("piece", piece)
            database.execute(f"insert into {table} select {', '.join([key, *map(quoted, names)])} from piece")


def queries(rules: ColumnRules, layout: RowLayout) -> Iterator[tuple[str, str | None]]:
    """Every configured check with its query of (row, doc, detail); None if the columns do not allow it."""
    mining = rules.config.mining
    if mining.never_same:
        shared = [
            f"select row, doc, {_text(name.removeprefix(ANCHOR) + ' ')} || {_candidate(name)} as detail"
            f" from negatives x join facts c using (document) where {_same(name, rules.config, or_anchor=True)}"
            for name in mining.never_same
        ]
        yield "never_same", f"select row, doc, min(detail) as detail from ({' union all '.join(shared)}) group by all"
    if mining.only_same:
        same = " and ".join(_same(name, rules.config, or_anchor=False) for name in mining.only_same)
        shown = " || ', ' || ".join(
            f"{_text(name.removeprefix(ANCHOR) + ' ')} || coalesce({_candidate(name)}, 'null')"
            for name in mining.only_same
        )
        yield (
            "only_same",
            f"select row, doc, {shown} as detail from negatives x join facts c using (document) where not ({same})",
        )
    if mining.where:
        yield "where", _where(rules.config, layout)


def _candidate(name: str) -> str:
    return f"c.{quoted(EXTRA + name.removeprefix(ANCHOR))}"


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _same(name: str, config: Config, *, or_anchor: bool) -> str:
    """Whether the candidate shares a column with a known positive or the anchor; null and '' never match."""
    column, value = quoted(EXTRA + name.removeprefix(ANCHOR)), _candidate(name)
    of_anchor = f"(x.a, {value}) in (select a, {column} from asks where {column} != '')"
    of_positive = f"(x.a, {value}) in (select a, {column} from known join facts using (document) where {column} != '')"
    if name.startswith(ANCHOR):
        same = of_anchor
    elif or_anchor and name in config.data.extra.queries:
        same = f"({of_positive} or {of_anchor})"
    else:
        same = of_positive
    return f"(coalesce({value}, '') != '' and {same})"


def _where(config: Config, layout: RowLayout) -> str | None:
    """Random, given and judged negatives are only checked by conditions without scores; random ones have no rank."""
    each = config.mining.margin_reference == "each"
    # Runs have no positives; a row with one labelled document does not name the positive its negative belongs to.
    paired = not layout.ranked and (not layout.pairs if each else layout.scored)
    ranked = layout.has("rank") or layout.has("negative_rank")
    asked = conditions(config)
    held = [f"({one.sql})" for one in asked if not one.scored and (paired or not _of_a_positive(one))]
    known = {"score": layout.scored, "rank": ranked, "positive_score": layout.scored and paired}
    held += [
        f"(rank is null or ({one.sql}))" if ranked else f"({one.sql})"
        for one in asked
        if one.scored
        and (ranked or not config.mining.draws)
        and not config.mining.prefers  # a row does not show which of its negatives these are
        and (paired or not _of_a_positive(one))
        and all(known[name[0]] for name in one.names if len(name) == 1)
    ]
    if not held:
        return None
    unit, sign = ("u", "") if each else ("a", "-" if config.mining.margin_reference == "max" else "")
    sides = {"candidate": "c", "positive": "p", "anchor": "q"}
    structs = [
        f"struct_pack({_fields(of_side, sides[side])}) as {side}"
        for side, of_side in columns_of(asked, config).items()
        if of_side
    ]
    numbers = ["x.score::float as score", "d.rank as rank", "r.score::float as positive_score"]
    return f"""
        select row, doc, '' as detail from (
            select x.row, x.doc, {", ".join([*structs, *numbers])} from negatives x
            join facts c on c.document = x.document join documents d on d.doc = x.doc left join asks q on q.a = x.a
            left join (
                select {unit} as unit, arg_min(document, place) as document, arg_min(score, place) as score from (
                    select e.{unit}, k.document, o.score, row({sign}o.score, o.doc) as place from documents o
                    join entries e using (row) join known_ids k using (id) where positive
                ) group by unit
            ) r on r.unit = x.{unit} left join facts p on p.document = r.document
        ) where not coalesce({" and ".join(held)}, false)"""


def _of_a_positive(condition: Condition) -> bool:
    return any(name[0] in ("positive", "positive_score") for name in condition.names)


def _fields(names: Mapping[str, str], table: str) -> str:
    return ", ".join(f"{quoted(name)} := {table}.{quoted(stored)}" for name, stored in names.items())
