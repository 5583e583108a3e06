"""Finds negatives that say nearly the same as a positive of their anchor: every pair is compared, each once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from negpipe.select.duplicates import similarities

if TYPE_CHECKING:
    import duckdb

_PAIRS = 16384


def compare(database: duckdb.DuckDBPyConnection, threshold: float, threads: int) -> None:
    """Create the table `near` (a, h, similarity): negatives of an anchor and similarity to its nearest positive."""
    database.execute("create table alike (left_h ubigint, right_h ubigint, similarity double)")
    # The number of inserted or deleted characters is at least the difference in length.
    reader = (
        database.cursor()
        .sql(f"""
        select l.h as left_h, r.h as right_h, l.normalized as left_text, r.normalized as right_text
        from (select distinct x.h as lh, p.h as rh from (select distinct a, h, n from negatives) x
            join (select distinct a, h, n from positives) p using (a) where x.n != p.n) pairs
        join normal l on l.h = lh join normal r on r.h = rh
        where 2 * least(len(l.normalized), len(r.normalized))
            >= {threshold} * (len(l.normalized) + len(r.normalized))""")
        .to_arrow_reader(_PAIRS)
    )
    for batch in reader:
        left, right = batch["left_text"].to_pylist(), batch["right_text"].to_pylist()
        found = similarities(left, right, threshold, threads)
        reached = np.flatnonzero(found >= threshold)
        if len(reached):
            at = pa.array(reached)
            piece = {"left_h": batch["left_h"].take(at), "right_h": batch["right_h"].take(at)}
            database.register("piece", pa.table({**piece, "similarity": found[reached]}))
            database.execute("insert into alike select left_h, right_h, similarity from piece")
    database.execute("""
        create table near as select x.a, x.h, max(similarity) as similarity
        from (select distinct a, h from negatives) x join (select distinct a, h from positives) p using (a)
        join alike on left_h = x.h and right_h = p.h group by x.a, x.h
    """)
