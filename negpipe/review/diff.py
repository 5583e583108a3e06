"""Compares the negatives of two runs, or of two files from any miners: numbers and examples.

Anchors and documents are identified by their ids if both sides have them, else by their exact texts. A negative counts
once per anchor, regardless of rows. Both sides are streamed through DuckDB, which spills to disk beyond its memory:
memory does not grow with the rows. The same rows give the same differences in the same order.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from negpipe.config.file import find_config, load_config
from negpipe.config.schema import Config
from negpipe.data.database import opened
from negpipe.engine.budget import DEFAULT, Budget
from negpipe.engine.manifest import Books, Manifest
from negpipe.errors import ConfigError, InputError, MissingStageError
from negpipe.review.audit import load
from negpipe.review.audit.columns import RowLayout, layout_of
from negpipe.store.files import BOOKS, explained
from negpipe.store.opening import run_of
from negpipe.store.store import LocalStore, Store

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)
_CIRCUMSTANCE = ("run_dir", "store", "executor.", "resources.", "output.report")  # settings that do not affect rows
_TEXT = 200  # characters of a text in an example
_DOCUMENTS = 5  # documents of an example per side


@dataclass(frozen=True)
class Source:
    """One side: its rows, and the manifest of the run that made them, if any."""

    name: str
    rows: Path
    manifest: Manifest | None


@dataclass(frozen=True)
class Side:
    """Counts of one side; means are over its negatives, None if the rows do not contain them."""

    source: str
    anchors: int
    negatives: int
    score: float | None
    rank: float | None


@dataclass(frozen=True)
class Change:
    """A negative that only one side has."""

    id: str | None
    text: str
    score: float | None
    rank: int | None


@dataclass(frozen=True)
class Example:
    """An anchor of both sides with some of its changed negatives, best score first."""

    anchor_id: str | None
    anchor: str
    overlap: float
    removed: list[Change]
    added: list[Change]


@dataclass(frozen=True)
class Difference:
    """How B differs from A.

    Attributes:
        a, b: both sides in full, including anchors of one side only.
        gained, lost: number of anchors that only B, or only A, has; `gained_ids` and `lost_ids` list some (texts if
            anchors are not identified by ids).
        common: anchors of both. The following is over these.
        kept, added, removed: negatives of both, only of B, only of A.
        overlap: mean over the anchors of kept / (kept + added + removed).
        same, disjoint: anchors whose negatives are all the same, or all different.
        score_shift, rank_shift: mean of B's minus A's over kept negatives; None if none has both.
        largest_score_shift: the largest of them, up or down.
        settings: name → A's and B's value, where they differ; None if a side is not a run.
    """

    a: Side
    b: Side
    by_id: bool
    gained: int
    lost: int
    gained_ids: list[str]
    lost_ids: list[str]
    common: int
    kept: int
    added: int
    removed: int
    overlap: float | None
    same: int
    disjoint: int
    score_shift: float | None
    rank_shift: float | None
    largest_score_shift: float | None
    settings: dict[str, tuple[Any, Any]] | None
    examples: list[Example]

    def document(self) -> dict[str, Any]:
        """The difference as plain JSON."""
        return asdict(self)


def source_of(name: str) -> Source:
    """Resolve a command-line name: a run directory, a config, or a file or folder of rows.

    Raises:
        MissingStageError: the run has no triplets.
        ConfigError: nothing has that name.
    """
    path = Path(name)
    if path.is_dir() and not (path / BOOKS).is_dir():
        return Source(name, path, None)
    if path.is_dir():
        return _run(name, LocalStore(path))
    if path.is_file() and path.suffix not in (".yaml", ".yml", ".json"):
        return Source(name, path, None)
    try:
        config: Config = load_config(find_config(name))
    except ConfigError as error:
        raise ConfigError(f"{name}: expected a run directory, a config, or a file of rows. {error}") from None
    return _run(name, run_of(config))


def compare(
    a: Source,
    b: Source,
    *,
    columns: dict[str, str] | None = None,
    examples: int = 5,
    budget: Budget = DEFAULT,
    scratch: Path | None = None,
) -> Difference:
    """Compare B to A.

    Args:
        a, b: both sides.
        columns: columns by field of the sides that are not runs; others are guessed.
        examples: anchors to show, those that changed most first.
        budget: for DuckDB. Does not affect results.
        scratch: folder for spilled data; None: the system's temporary folder.

    Raises:
        ConfigError: columns are named, and both sides are runs.
        InputError: a file cannot be read, lacks a column, or has no rows; or the two have no anchor in common.
    """
    if columns and a.manifest and b.manifest:
        raise ConfigError("--columns: both sides are runs, whose columns are known")
    with (
        explained(scratch or Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(dir=scratch, prefix=".diff-") as folder,
        opened(Path(folder), budget, "the comparison") as database,
    ):
        logger.info("diff: reading the rows of %s and %s", a.rows, b.rows)
        sides = (("a", a), ("b", b))
        layouts = [_load(database, side, source, columns or {}, Path(folder)) for side, source in sides]
        by_id = all(one.has("anchor_id") for one in layouts)
        documents_by_id = all(one.has("positive_id" if one.labelled else "negative_id") for one in layouts)
        _pair(database, by_id, documents_by_id)
        return _difference(database, a, b, by_id, examples)


def _run(name: str, run: Store) -> Source:
    manifest = Books(run, "triplets").manifest()
    if manifest is None:
        raise MissingStageError(f"no triplets in {run}: run `negpipe mine {shlex.quote(name)}` first")
    return Source(name, run.folder("triplets"), manifest)


def _load(
    database: duckdb.DuckDBPyConnection, side: str, source: Source, columns: dict[str, str], folder: Path
) -> RowLayout:
    """Load one side into a separate schema."""
    (folder / side).mkdir()
    database.execute(f"create schema {side}; use {side}")
    layout = layout_of(database, source.rows, {} if source.manifest else columns, folder / side)
    load.rows(database, layout, str(source.rows))
    return layout


def _pair(database: duckdb.DuckDBPyConnection, anchors_by_id: bool, documents_by_id: bool) -> None:
    """Create `main.anchors`, from the pairs of anchor and negative of both sides."""
    anchor = "hash(e.anchor_id)" if anchors_by_id else "e.h"
    document = "case when d.id is null then d.h else hash(d.id) end" if documents_by_id else "d.h"
    database.execute("use main")
    for side in ("a", "b"):
        database.execute(f"""
            create table {side}_pairs as
            select {anchor} as k, {document} as d, any_value(e.anchor_id) as anchor_id, min(e.row) as row,
                min(d.doc) as doc, any_value(d.id) as id, max(d.score) filter (isfinite(d.score)) as score,
                min(d.rank) as rank
            from {side}.documents d join {side}.entries e using (row) where not d.positive group by all
        """)
    database.execute("""
        create table anchors as
        select k, min(a.row) as a_row, min(b.row) as b_row, count(*) filter (a.d = b.d) as kept,
            count(*) filter (b.d is null) as removed, count(*) filter (a.d is null) as added
        from a_pairs a full join b_pairs b using (k, d) group by k
    """)
    # Anchors of only one side cannot be compared.
    database.execute("create view common as select * from anchors where a_row is not null and b_row is not null")


def _difference(database: duckdb.DuckDBPyConnection, a: Source, b: Source, by_id: bool, examples: int) -> Difference:
    counts = _row(
        database,
        "select count(*) as common, sum(kept)::bigint as kept, sum(added)::bigint as added,"
        " sum(removed)::bigint as removed, avg(kept / (kept + added + removed)) as overlap,"
        " count(*) filter (added + removed = 0) as same, count(*) filter (kept = 0) as disjoint from common",
    )
    if not counts["common"]:
        raise InputError(
            f"{a.name} and {b.name} have no anchor in common",
            remedy="They were mined from different queries, or their ids differ: nothing can be compared",
        )
    shifts = _row(
        database,
        "select avg(b.score - a.score) as score_shift, avg(b.rank - a.rank) as rank_shift,"
        " max(abs(b.score - a.score)) as largest_score_shift from a_pairs a join b_pairs b using (k, d)",
    )
    of_side = "select count(distinct k) as anchors, count(*) as negatives, avg(score) as score, avg(rank) as rank from"
    (gained, gained_ids), (lost, lost_ids) = (_alone(database, side, by_id) for side in ("b", "a"))
    return Difference(
        a=Side(a.name, **_row(database, f"{of_side} a_pairs")),
        b=Side(b.name, **_row(database, f"{of_side} b_pairs")),
        by_id=by_id,
        gained=gained,
        lost=lost,
        gained_ids=gained_ids,
        lost_ids=lost_ids,
        **counts,
        **shifts,
        settings=_settings(a.manifest, b.manifest) if a.manifest and b.manifest else None,
        examples=_examples(database, examples),
    )


def _alone(database: duckdb.DuckDBPyConnection, side: str, by_id: bool) -> tuple[int, list[str]]:
    """Anchors that only one side has: their number, and some of them."""
    other = "b" if side == "a" else "a"
    alone = f"from anchors where {other}_row is null"
    name = "anchor_id" if by_id else f"anchor[:{_TEXT}]"
    rows = database.execute(f"""
        select {name} from (select {side}_row as row {alone} order by row limit {_DOCUMENTS})
        join {side}.source using (row) order by row
    """).fetchall()
    return _row(database, f"select count(*) as anchors {alone}")["anchors"], [str(row[0]) for row in rows]


def _examples(database: duckdb.DuckDBPyConnection, wanted: int) -> list[Example]:
    found = database.execute(f"""
        select k, anchor_id, anchor[:{_TEXT}], overlap from (
            select k, a_row as row, kept / (kept + added + removed) as overlap from common
            where added + removed > 0 order by overlap, a_row limit {wanted}
        ) join a.source using (row) order by overlap, row
    """).fetchall()
    return [
        Example(anchor_id, anchor, overlap, _changes(database, "a", "b", k), _changes(database, "b", "a", k))
        for k, anchor_id, anchor, overlap in found
    ]


def _changes(database: duckdb.DuckDBPyConnection, side: str, other: str, k: int) -> list[Change]:
    """Negatives of an anchor that the other side does not have."""
    rows = database.execute(
        f"""
        select p.id, t.text[:{_TEXT}], p.score, p.rank from (
            select * from {side}_pairs where k = $k and d not in (select d from {other}_pairs where k = $k)
            order by score desc nulls last, doc limit {_DOCUMENTS}
        ) p join {side}.documents using (doc) join {side}.entries e on e.row = documents.row
        join (select row, unnest(list_concat(texts, negatives)) as text from {side}.source) t
            on t.row = e.row and hash(t.text) = documents.h
        order by p.score desc nulls last, p.doc""",
        {"k": k},
    ).fetchall()
    return [Change(*row) for row in dict.fromkeys(rows)]


def _settings(a: Manifest, b: Manifest) -> dict[str, tuple[Any, Any]]:
    """Differing settings and input digests; the location of runs is ignored."""
    left, right = (
        _flat(one.provenance.get("config", {}))
        | {f"content of {name}": digest[:12] for name, digest in one.inputs.items() if name != "search"}
        for one in (a, b)
    )
    names = [
        name
        for name in [*left, *right]
        if not _same(left.get(name), right.get(name)) and not name.startswith(_CIRCUMSTANCE)
    ]
    return {name: (left.get(name), right.get(name)) for name in dict.fromkeys(names)}


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal, or paths to the same file."""
    paths = isinstance(a, str) and isinstance(b, str) and Path(a).exists() and Path(b).exists()
    return a == b or (paths and Path(a).samefile(b))


def _flat(tree: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {before: tree}
    return {
        name: value
        for key, inner in tree.items()
        for name, value in _flat(inner, f"{before}.{key}" if before else key).items()
    }


def _row(database: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    """The one row of a query, by column."""
    row: dict[str, Any] = database.sql(query).to_arrow_table().to_pylist()[0]
    return row
