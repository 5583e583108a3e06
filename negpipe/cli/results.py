"""Commands that read the output of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from negpipe.cli.app import ConfigArgument, DebugOption, LogOption, SetOption, app, checked
from negpipe.cli.formats import FormatOption, printed_as


@app.command()
def export(
    config: ConfigArgument,
    to: Annotated[
        str,
        typer.Option(
            help="Layout: flagembedding, nemo, tevatron, tevatron-passages, ms-swift, ms-swift-reranker, distillation,"
            " pylate, trec-run, sentence-transformers, jsonl or hub.",
            metavar="LAYOUT",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to create, or a file: NAME.jsonl, NAME.jsonl.gz, NAME.parquet, NAME.trec.")
    ],
    shard_rows: Annotated[int | None, typer.Option(help="Maximum rows per file; default: one file.")] = None,
    compress: Annotated[bool, typer.Option("--gzip", help="Compress JSON files and runs.")] = False,
    run: Annotated[
        bool, typer.Option("--run", help="tevatron, tevatron-passages: also write run.tsv, the stored ranking.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing output.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="hub: also upload to this repository; created as private if new.", metavar="REPO"),
    ] = None,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Write the training rows in the exact layout that a trainer loads.

    Does not run any stage; requires the output of ingest and search.

    Example: negpipe export scifact.yaml --to flagembedding --out exports/scifact
    """
    from negpipe.cli import console
    from negpipe.config.file import load_config
    from negpipe.review import finished
    from negpipe.rows.exports import ExportOptions

    console.set_up_logging(checked(log_format), debug=debug)
    options = ExportOptions(
        to=to, out=out, shard_rows=shard_rows, compress=compress, run=run, force=force, push_to_hub=push_to_hub
    )
    finished.export(load_config(config, overrides, tell=False), options, reporter=console.reporter(log_format))


@app.command()
def explain(
    config: ConfigArgument,
    anchor: Annotated[str, typer.Option(help="Id of the anchor, or its exact text.", metavar="ID")],
    limit: Annotated[int, typer.Option(min=1, help="Candidates and positives to show; those taken always are.")] = 50,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Show an anchor's candidates in order, with score, rank, and why each was taken or dropped.

    Example: negpipe explain quickstart.yaml --anchor q:json.dumps --limit 20
    """
    import dataclasses

    from negpipe.cli import console, formats, summary
    from negpipe.config.file import load_config
    from negpipe.review import finished

    console.set_up_logging(checked(log_format), debug=debug)
    found = finished.explain_anchor(load_config(config, overrides, tell=False), anchor)
    units = [unit.shortened(limit) for unit in found.units]
    document = dataclasses.asdict(dataclasses.replace(found, units=units))
    if not printed_as("json" if as_json else form, document, formats.candidates(units)):
        summary.show_explanation(found, limit)
