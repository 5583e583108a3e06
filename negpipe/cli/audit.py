"""The `audit` command: check training rows, and fail on bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from negpipe.cli.app import ColumnsOption, DebugOption, LogOption, SetOption, app, by_field, checked, keep
from negpipe.cli.formats import FormatOption, printed_as

# Spelled out, as the checks are imported only when the command runs; a test compares them.
_HELP = """Check every training row of a run or of any miner's file for false, repeated or unscored negatives.

Checks (for `--fail-on`, comma-separated; NAME=SHARE allows findings up to this share):

- positive: positive_id, positive_text, positive_normalized, shared_anchor (a positive of an anchor with the same text)
- duplicate: near_duplicate (of a positive), repeated_negative, duplicate_row
- score: non_finite, above_positive
- text: anchor_text (the negative has the anchor's text), anchor_id (the negative has the anchor's id), empty_text
- shortage, missing_id, unknown_id (not in the config's data; of anchors without ids, the text), hub (a document is a
  negative of unusually many anchors)
- rules: never_same, only_same, where (if set in the config's mining section)
- any: all checks

A run's rows are compared to its qrels, and RUN_DIR/audit.json is written. A file's rows are compared to the qrels of
CONFIG, if given. Columns are found by their usual names (anchor or query, positive or pos, negative or neg or
negative_1 …, label, ids, scores; also FlagEmbedding's lists) or set by --columns FIELD=COLUMN, where `#` stands for a
number and a dot for a field of an object (positive=positive_passages.text). Data of Tevatron, DPR, ms-swift, NeMo and
PyLate is read too, as are runs (TREC's `query Q0 document rank score tag`, Tevatron's three columns): with the CONFIG
of their data, every line is a negative of its anchor.

Fields: anchor, positive, negative, label, anchor_id, positive_id, negative_id, positive_score, negative_score, score,
negative_rank, rank.

Exits with code 1 if a selected check fails.

Example: negpipe audit scifact.yaml --fail-on positive,duplicate,shortage=0.05

Example: negpipe audit --file mined.jsonl --columns anchor=question,positive=pos,negative=hard_# --fail-on positive
"""


@app.command(help=_HELP)
def audit(
    config: Annotated[
        str | None,
        typer.Argument(
            help="Config file, its name in configs/, or a run directory.",
            metavar="[CONFIG]",
            show_default=False,
            callback=keep,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Rows of any miner: a .parquet, .jsonl, .jsonl.gz, .json, .csv or .tsv file, or a folder."),
    ] = None,
    columns: ColumnsOption = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Checks that cause exit code 1.", metavar="CHECKS", show_default=False)
    ] = None,
    near: Annotated[float, typer.Option(min=0.01, max=1, help="Minimum similarity of near duplicates.")] = 0.9,
    negatives: Annotated[
        int | None, typer.Option(min=1, help="Negatives expected; default: as in the config or in most rows.")
    ] = None,
    hub_share: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum share of anchors for a hub; at least 10 anchors.")
    ] = 0.01,
    examples: Annotated[int, typer.Option(min=0, help="Examples to show per check.")] = 3,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    from negpipe.cli import console, printed
    from negpipe.config.file import load_config
    from negpipe.errors import NegpipeError
    from negpipe.review import measures
    from negpipe.review.audit import AuditOptions, policy

    console.set_up_logging(checked(log_format), debug=debug)
    chosen = policy(fail_on)
    options = AuditOptions(
        columns=by_field(columns), near=near, negatives=negatives, hub_share=hub_share, examples=examples
    )
    settings = load_config(config, overrides) if config else None
    found = measures.audit_rows(settings, options, file)
    failed = chosen.failed(found.findings)
    findings = [
        {"check": one.check, "count": one.count, "share": one.share, "of": one.of, "unit": one.unit}
        for one in found.findings
    ]
    if not printed_as("json" if as_json else form, found.document(), findings):
        printed.show_audit(found, {one.check for one in failed}, foreign=file is not None)
    if failed:
        listed = ", ".join(f"{one.check} ({one.count:,} of {one.of:,} {one.unit})" for one in failed)
        raise NegpipeError(f"the audit of {found.source} failed: {listed}")
