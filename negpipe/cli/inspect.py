"""The commands `inspect` and `init`: describe a source, and write a config for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from negpipe.cli.app import DebugOption, LogOption, app, checked, program

if TYPE_CHECKING:
    from negpipe.review.inspection import Inspection

_ROWS = 100_000


@app.command()
def inspect(
    paths: Annotated[list[str], typer.Argument(help="Folder, files or hub dataset.", metavar="PATH...")],
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="Split of the judgments that define anchors; default: train, else the first there is.",
            show_default=False,
        ),
    ] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Subset of a hub dataset.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override a setting of the source: --set data.format=pairs (repeatable).", metavar="data.…"
        ),
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", help="Write a config for the source to this file.", metavar="FILE.yaml")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Records to read from each table.")] = _ROWS,
    form: Annotated[
        Literal["table", "json"], typer.Option("--format", help="table: for people. json: one document.")
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Describe a source: layout, tables, columns, counts, bad rows, and the config that mines it.

    A ranking (TREC's run, Tevatron's three columns) is described too.

    Example: negpipe inspect my/folder --write my.yaml && negpipe mine my.yaml
    """
    from negpipe.cli import console

    console.set_up_logging(checked(log_format), debug=debug)
    _inspect(paths, split, subset, settings, write, rows, as_json=as_json or form == "json")


@app.command()
def init(
    path: Annotated[
        str | None, typer.Argument(help="Hub dataset, folder or file.", metavar="[NAME]", show_default=False)
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", help="Config file to write; default: NAME.yaml.", metavar="FILE.yaml", show_default=False
        ),
    ] = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Write a config for a source. Short for negpipe inspect NAME --write NAME.yaml.

    Without NAME, write a first config, quickstart.yaml, and its data: code search in Python's standard library.

    Example: negpipe init mteb/scifact && negpipe mine scifact.yaml
    """
    from negpipe.cli import console

    console.set_up_logging(checked(log_format), debug=debug)
    if path is None:
        _quickstart(write or Path("quickstart.yaml"))
        return
    _inspect([path], None, None, None, write or Path(f"{_named(path)}.yaml"), _ROWS, as_json=False)


def _quickstart(write: Path) -> None:
    """Write the first config, and its data if missing."""
    from negpipe import quickstart
    from negpipe.cli import console
    from negpipe.errors import ConfigError
    from negpipe.store.files import explained

    if write.exists():
        raise ConfigError(f"{write} already exists: choose another file with --write")
    with explained(Path()):
        if not quickstart.DATA.exists():
            quickstart.write(quickstart.DATA)
        write.write_text(quickstart.CONFIG.read_text(encoding="utf-8"), encoding="utf-8")
    console.out.print(f"written to {write}: {program()} mine {write}", markup=False, soft_wrap=True)


def _named(path: str) -> str:
    return re.sub(r"[^\w-]+", "", Path(path.rstrip("/")).name.partition(".")[0]) or "source"


def _say(line: str) -> None:
    from negpipe.cli import console
    from negpipe.review import wording

    console.out.print(wording.visible(line), markup=False, highlight=False, soft_wrap=True)


def _inspect(
    paths: list[str],
    split: str | None,
    subset: str | None,
    settings: list[str] | None,
    write: Path | None,
    rows: int,
    *,
    as_json: bool,
) -> None:
    import dataclasses
    import json

    import yaml

    from negpipe import sources
    from negpipe.config.file import load_config
    from negpipe.errors import ConfigError, InputError
    from negpipe.review import inspection

    ranking = inspection.ranking(paths[0], rows) if len(paths) == 1 and not write else None
    if ranking and as_json:
        typer.echo(json.dumps({"run": dataclasses.asdict(ranking)}))
        return
    if ranking:
        first = "" if ranking.whole else f" (of the first {rows:,} lines)"
        many = f"median {ranking.median:,}, fewest {ranking.fewest:,}, most {ranking.most:,}"
        _say(f"{paths[0]} is {sources.RUNS[ranking.kind]}")
        _say(f"lines: {ranking.lines:,}, anchors: {ranking.anchors:,}, documents per anchor: {many}{first}")
        _say("A run lists candidates but no positives, so it cannot be mined alone. To check every line as a negative")
        _say(f"of its anchor, use the config of its data: {program()} audit CONFIG --file {paths[0]}")
        return
    if write and write.exists():
        raise ConfigError(f"{write} already exists: choose another file with --write")
    source = {"path": paths[0] if len(paths) == 1 else paths, "split": split or "train", "subset": subset}
    run_dir = f"runs/{_named(paths[0])}"
    tree = {"run_dir": run_dir, "data": source, "encoder": {"model": "none"}}
    found = inspection.inspect(load_config(tree, settings).data, rows, any_split=split is None)
    config = found.config(run_dir)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if write and not found.nothing:
        write.write_text(text, encoding="utf-8")
    if as_json:
        found_in = dataclasses.asdict(found) | {"data": config["data"], "config": config}
        typer.echo(json.dumps(found_in, allow_nan=False))
        return

    _describe(found, paths[0], rows)
    if found.nothing:
        raise InputError(f"nothing can be mined: {found.nothing}", file=paths[0], remedy="See the counts above")
    rejecting = f"\nIt stops at the bad rows; to reject them, add --max-bad-rows {sum(found.odd.values())}"
    _say(
        f"\nwritten to {write}: {program()} mine {write}{rejecting if found.odd else ''}"
        if write
        else f"\nConfig that mines it (--write FILE.yaml saves it):\n\n{text}"
    )


def _describe(found: Inspection, path: str, rows: int) -> None:
    _say(f"{path} is read as data.format: {found.data.format}")
    for table, columns in found.tables.items():
        _say(f"  {table}: {', '.join(columns) or 'no rows'}")
    more = "" if found.whole else f" (of the first {rows:,} records of each table)"
    for table in found.without_ids:
        name = found.data.columns.corpus_id
        _say(
            f"{table} has no column {name}: ids are made of the texts, or set data.columns.corpus_id to another column"
        )
    for what, lengths, same in (("documents", found.documents, "text"), ("queries", found.queries, "id")):
        several = (
            "" if lengths.rows == lengths.count else f" in {lengths.rows:,} rows (of rows with the same {same}, one)"
        )
        _say(f"{what}: {lengths.count:,}{several}, characters: median {lengths.median:,}, most {lengths.most:,}{more}")
    _say("judgments: " + (", ".join(f"{name} {count:,}" for name, count in found.judgments.items()) or "none"))
    anchors = sum(found.positives.values())
    total = sum(count * many for count, many in found.positives.items())
    most = max(found.positives, default=0)
    _say(f"anchors in data.split {found.data.split}: {anchors:,}, positives: {total:,}, most per anchor {most:,}")
    if found.given:
        _say(f"negatives in the source: {found.given:,} (used with mining.given_negatives: first or keep)")
    for kind, count in found.odd.items():
        _say(f"bad rows: {count:,} ({kind.replace('_', ' ')})")
    for example in found.examples:
        _say(f"  {example}")
    if found.odd:
        _say(
            "Bad rows stop a run: fix them, or let some be rejected with data.max_bad_rows (empty texts:"
            " data.on_empty: skip, unknown ids: data.on_unknown_id: skip; an id with two texts must be fixed)"
        )
    if found.ids:
        _say("The documents contain no spaces and look like ids: their texts may be in another file")
