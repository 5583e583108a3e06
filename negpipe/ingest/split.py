"""Anchors held out of mining, if a source has no split to judge a model on: entire groups, so that the sides share
nothing.

Normalized texts are connected: an anchor's with those of its positives and, if `train.split.by` is a column, a
positive's with that column's value. A connected component is a group. A number drawn from `train.split.seed` and the
smallest hash of its positives' texts determines its side, so it does not depend on the order of the source's rows or
on other groups. A group larger than the entire held-out share stays on the training side: otherwise, by chance, almost
nothing would be left to train on. Memory holds a few integers per pair of anchor and positive.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.config.schema import Config
from negpipe.config.training import Split
from negpipe.data.arrays import Hashes
from negpipe.data.database import number_of
from negpipe.data.tables import EXTRA
from negpipe.data.texts import hashes
from negpipe.engine.budget import Budget
from negpipe.errors import InputError, count_of
from negpipe.ingest.spool import Spool

if TYPE_CHECKING:
    import duckdb

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = ("train", "test")

NAME = "split"
"""The folder in the run directory with the judgments of both sides."""
_BATCH = 8192
_FAR = 0.5  # of the smaller side: maximum deviation of the share without a warning
_BYTES = 64  # per tie or text, while finding components: SciPy holds the matrix twice, in float64


def divide(config: Config, side: Side, database: duckdb.DuckDBPyConnection, spool: Spool, budget: Budget) -> None:
    """Set the anchors of the other side aside.

    Args:
        config: with `train.split`.
        side: the side whose anchors stay.
        database: with the tables of `joins.join`; gets a table `sides` (normalized, test, part: the group's number) of
            the connected texts, and rows in `put_aside`.
        spool: with the columns of documents.
        budget: for the integers.

    Raises:
        InputError: one side has no anchor.
        BudgetError: there are too many positives.
    """
    assert config.train is not None and config.train.split is not None
    split = config.train.split
    database.execute("""
        create table tied as
        select distinct q.normalized as text, n.normalized as other
        from positives p join askers q on p.query = q.id join numbered n on p.row = n.row""")
    if split.by != "positive":
        for text, value in _values(config, split.by, database, spool):
            database.register("named", pa.table({"text": text, "other": value}))
            database.execute("insert into tied select * from named")
            database.unregister("named")
    database.execute("""
        create table tied_texts as
        with asked as (select normalized, count(*) as anchors from askers
            where id in (select query from positives) group by normalized)
        select text, row_number() over (order by text) - 1 as node, coalesce(anchors, 0) as anchors, text in (
            select normalized from numbered semi join positives using (row)) as positive
        from (select text from tied union select other from tied) left join asked on text = normalized""")
    ties, texts = (number_of(database, f"select count(*) from {table}") for table in ("tied", "tied_texts"))
    budget.require(
        _BYTES * (ties + texts), f"dividing {count_of(ties, 'pair')} of anchor and positive", "remove train.split"
    )
    database.register("divided", _divided(split, database))
    database.execute(f"""
        create table sides as select * from divided;
        insert into put_aside select id from askers join sides using (normalized) where test = {side == "train"}""")
    database.unregister("divided")
    _check(split, database)


def _values(
    config: Config, name: str, database: duckdb.DuckDBPyConnection, spool: Spool
) -> Iterator[tuple[Hashes, Hashes]]:
    """Hashes of positives' texts, and of a column's non-empty values in every row with this text."""
    for kind in ("corpus", "added"):
        rows = database.execute(f"""
            select position, normalized from documents
            where corpus = {kind == "corpus"} and normalized in (
                select normalized from numbered semi join positives using (row))
            order by position""").fetchnumpy()
        for here, spooled in spool.texts(kind, config.data.extra.corpus).take(rows["position"]):
            values = spooled[EXTRA + name].to_pylist()
            there = np.array([bool(value) for value in values], np.bool_)
            # With the column's name, so that a value never equals a text.
            yield rows["normalized"][here][there], hashes([f"{name}\0{value}" for value in values if value])


def _divided(split: Split, database: duckdb.DuckDBPyConnection) -> pa.Table:
    """Every connected text with its side and the number of its group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes = database.execute("select text, anchors, positive from tied_texts order by node").fetchnumpy()
    ends = database.execute("""
        select a.node::integer as a, b.node::integer as b
        from tied t join tied_texts a on t.text = a.text join tied_texts b on t.other = b.text""").fetchnumpy()
    size = len(nodes["text"])
    ties = coo_array((np.ones(len(ends["a"])), (ends["a"], ends["b"])), shape=(size, size))
    count, groups = connected_components(ties, directed=False)
    positives = np.flatnonzero(nodes["positive"])
    # Nodes are ordered by the hash of their text, so the first of a group is the smallest; each group has a positive.
    first = positives[np.unique(groups[positives], return_index=True)[1]]
    drawn = np.concatenate(
        [_drawn(split.seed, nodes["text"][first[at : at + _BATCH]]) for at in range(0, count, _BATCH)]
    )
    sizes = np.bincount(groups, nodes["anchors"])
    test = (drawn < split.test) & (sizes <= largest(split.test, sizes.sum()))
    return pa.table({"normalized": nodes["text"], "test": test[groups], "part": groups})


def largest(share: float, anchors: float) -> float:
    """The maximum anchors of a group that can be held out, for a share of all."""
    return max(1, share * anchors)


def _drawn(seed: int, texts: Hashes) -> npt.NDArray[np.float64]:
    """A number from 0 to 1 for each text, depending on nothing else."""
    drawn: npt.NDArray[np.float64] = hashes([f"{seed} {text}" for text in texts.tolist()]) * np.float64(2.0**-64)
    return drawn


def _check(split: Split, database: duckdb.DuckDBPyConnection) -> None:
    found = counts(split, database)
    anchors, groups, most = (found[name] for name in ("divided_anchors", "groups", "largest_group"))
    if 0 < found["test_anchors"] < anchors:
        return
    if groups == 1:
        tied = "positives" if split.by == "positive" else f"positives or a value of '{split.by}'"
        problem = f"all {anchors:,} anchors are in one group, as they share texts of {tied}: they cannot be divided"
        remedy = "Set a split to judge on in train.eval_split instead" + (
            "" if split.by == "positive" else ", or set by: positive"
        )
    else:
        empty = "train" if found["test_anchors"] else "test"
        problem = f"no anchors on the {empty} side: the largest of {groups:,} groups has {most:,} of {anchors:,}"
        remedy = "Change train.split.test or train.split.seed"
    raise InputError(problem, field="train.split", remedy=remedy)


def counts(split: Split, database: duckdb.DuckDBPyConnection) -> dict[str, float]:
    """Anchors and groups in total and on the test side, the anchors of the largest group, and the requested share."""
    row = database.execute("""
        select sum(size)::bigint, coalesce(sum(size) filter (test), 0)::bigint, count(*),
            count(*) filter (test), max(size)
        from (select part, any_value(test) as test, count(*) as size
            from askers join sides using (normalized) where id in (select query from positives) group by part)
    """).fetchone()
    assert row is not None
    names = ("divided_anchors", "test_anchors", "groups", "test_groups", "largest_group")
    return {**dict(zip(names, map(int, row), strict=True)), "test_share": split.test}


def remarks(stats: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """The remarks of the stage about the counts."""
    if "test_share" not in stats:
        return
    share, test, anchors = (stats[name] for name in ("test_share", "test_anchors", "divided_anchors"))
    groups, most = stats["groups"], stats["largest_group"]
    yield (
        logging.INFO,
        f"train.split: {test:,} of {anchors:,} anchors held out ({test / anchors:.1%}), {stats['test_groups']:,} of"
        f" {groups:,} groups; the judgments of both sides are in {NAME}/",
    )
    if abs(test / anchors - share) > _FAR * min(share, 1 - share):
        why = f"the largest of {count_of(groups, 'group')} has {most:,}: try another train.split.seed"
        if most > largest(share, anchors):
            why = f"the largest of {groups:,} groups has {most:,} and stays for training: raise train.split.test"
        yield logging.WARNING, f"train.split: {share:.1%} of the anchors were to be held out, but {why}"


def write(config: Config, database: duckdb.DuckDBPyConnection, folder: Path) -> dict[Side, Path]:
    """Write the original judgments of `data.split` for the anchors of each side, as Parquet with the columns query-id,
    corpus-id and score. Memory holds one batch."""
    name = config.data.split.replace("'", "''")
    files: dict[Side, Path] = {}
    for side in SIDES:
        files[side] = folder / f"{side}.parquet"
        batches = (
            database.cursor()
            .sql(f"""
            select j.query as "query-id", j.document as "corpus-id", max(j.grade) as score
            from judgments j join askers q on j.query = q.id join sides s using (normalized)
            where j.split = '{name}' and j.grade is not null and s.test = {side == "test"}
                and j.query in (select query from positives) and j.document in (select id from ids)
            group by all order by min(j.rowid)""")
            .to_arrow_reader(_BATCH)
        )
        with pq.ParquetWriter(files[side], batches.schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
    return files
