"""Finds problems in training rows: checks every row of any miner's file against itself and the qrels.

`audit` counts, gives examples and says which chosen checks failed; it prints and decides nothing. Rows are streamed
through DuckDB, which spills to disk beyond its memory: time and disk usage grow with the rows, memory does not.
The same rows give the same findings in the same order.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from negpipe.data.database import opened
from negpipe.engine.budget import DEFAULT, Budget
from negpipe.review.audit import checks, load, near, rules
from negpipe.review.audit.checks import CHECKS, GROUPS, NEMO, Finding
from negpipe.review.audit.columns import RowLayout, layout_of
from negpipe.review.audit.policy import Policy, policy
from negpipe.review.audit.rules import ColumnRules
from negpipe.review.audit.runs import TextTables
from negpipe.store.files import explained

__all__ = [
    "CHECKS",
    "GROUPS",
    "NEMO",
    "Audit",
    "AuditOptions",
    "ColumnRules",
    "Finding",
    "Policy",
    "Qrels",
    "RowLayout",
    "TextTables",
    "audit",
    "policy",
]


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """How rows are judged.

    Attributes:
        columns: field → column, see `columns.FIELDS`; other fields are found by their usual names.
        near: minimum similarity of a negative to a positive to be a near duplicate, above 0, at most 1.
        negatives: number wanted per unit; None: the most frequent number.
        hub_share: minimum share of anchors for a document to be a hub; at least 10 anchors.
        examples: number of examples per check.
        budget: for DuckDB. Does not affect results.
    """

    columns: dict[str, str]
    near: float = 0.9
    negatives: int | None = None
    hub_share: float = 0.01
    examples: int = 3
    budget: Budget = DEFAULT


@dataclass(frozen=True)
class Qrels:
    """What is known in addition to the rows.

    Attributes:
        name: its origin, for messages.
        positives: tables of anchor_id, anchor, document (a number), text; one row per judgment.
        documents: tables of document (its number), id, other_ids (list); one row per document.
        rules: the column rules, if configured.
        texts: texts of anchors and documents, needed for runs of ids.
    """

    name: str
    positives: Iterable[pa.Table]
    documents: Iterable[pa.Table]
    rules: ColumnRules | None = None
    texts: TextTables | None = None


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        source: the file or folder.
        rows, anchors, positives, negatives: their numbers; documents count once per row.
        qrels: whether the rows were also compared to qrels.
        findings: one per check, in the order of `CHECKS`, and one per rule that the config sets; those that the
            columns do not allow have `of` 0.
    """

    source: str
    rows: int
    anchors: int
    positives: int
    negatives: int
    qrels: bool
    findings: list[Finding]

    def document(self) -> dict[str, Any]:
        """The audit as plain JSON."""
        counts = {name: getattr(self, name) for name in ("rows", "anchors", "positives", "negatives")}
        checks_found = {one.check: one.document() for one in self.findings}
        return {"source": self.source, **counts, "qrels": self.qrels, "checks": checks_found}


def audit(source: Path, options: AuditOptions, qrels: Qrels | None = None, *, scratch: Path | None = None) -> Audit:
    """Check all rows of a file, or of the Parquet files of a folder.

    Args:
        source: .parquet, .jsonl, .jsonl.gz, .csv or .tsv, or a folder of .parquet.
        options: how rows are judged.
        qrels: positives of the same anchors, and the existing ids.
        scratch: folder for spilled data; None: the system's temporary folder.

    Raises:
        InputError: the file cannot be read, lacks a column, has no rows, or has mostly ids, or without ids mostly
            anchors, unknown to the qrels.
        ConfigError: `options.budget` is too small.
    """
    with (
        explained(scratch or Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(dir=scratch, prefix=".audit-") as folder,
        opened(Path(folder), options.budget, "the audit") as database,
    ):
        found = layout_of(database, source, options.columns, Path(folder), qrels.texts if qrels else None)
        logger.info("audit: reading the rows of %s", source)
        load.rows(database, found, str(source))
        if qrels is not None:
            load.qrels(database, qrels.positives, qrels.documents, str(source), qrels.name, found)
        asked = qrels.rules if qrels is not None else None
        if asked is not None:
            rules.load(database, asked, found)
        load.texts(database, with_qrels=qrels is not None)
        if qrels is not None:
            load.check_known(database, load.anchor_texts(found), str(source), qrels.name)
        logger.info("audit: comparing texts for near duplicates, then running the checks")
        near.compare(database, options.near, options.budget.threads)
        checks.prepare(database, found)
        limits = checks.Limits(options.negatives, options.hub_share, options.examples)
        findings = [checks.run(database, name, found, limits) for name in CHECKS]
        findings += checks.run_rules(database, asked, found, limits) if asked is not None else ()
        counts = load.counts(database)
    return Audit(str(source), **counts, qrels=qrels is not None, findings=findings)
