"""Output formats of commands that print a table: a table for people, JSON or CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from negpipe.engine.stage import Graph
    from negpipe.engine.state import State
    from negpipe.review.explain import Unit
    from negpipe.review.quality import Quality

Format = Literal["table", "json", "csv"]
FormatOption = Annotated[
    Format, typer.Option("--format", help="table: for people. json: one document. csv: the table's rows, unrounded.")
]


def printed_as(form: Format, document: Any, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Print a document as JSON or its rows as CSV; for a table, print nothing and return False."""
    if form == "json":
        typer.echo(json.dumps(document, allow_nan=False))
    elif form == "csv":
        typer.echo(_csv([*rows]), nl=False)
    return form != "table"


def _csv(rows: list[Mapping[str, Any]]) -> str:
    from negpipe.review.wording import visible

    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict | list))
    writer = csv.DictWriter(text, [*names], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: visible(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows
    )
    return text.getvalue()


def states(found: Iterable[State]) -> list[dict[str, Any]]:
    """One row per stage."""
    rows = []
    for state in found:
        parts = state.manifest.parts if state.manifest else ()
        provenance = state.manifest.provenance if state.manifest else {}
        rows.append(
            {
                "stage": state.stage,
                "state": state.state,
                "parts": len(parts) or state.done,
                "rows": sum(part.rows for part in parts),
                "bytes": sum(file.bytes for part in parts for file in part.files),
                "seconds": provenance.get("seconds"),
                "finished": provenance.get("finished"),
                "reason": state.reason,
            }
        )
    return rows


def superseded(listed: Iterable[tuple[Path, int]], root: Path, stages: Graph, *, local: bool) -> list[dict[str, Any]]:
    """One row per folder of files that `clean` deletes, with their stage; times in UTC, if the files are local."""
    from negpipe.store.files import BOOKS

    owners = {folder: name for name, stage in stages.items() for folder in (name, f"{BOOKS}/{name}", *stage.folders)}
    folders: dict[str, list[tuple[Path, int]]] = {}
    for path, size in listed:
        folders.setdefault(path.parent.relative_to(root).as_posix(), []).append((path, size))
    rows = []
    for folder, files in folders.items():
        written = [path.stat().st_mtime for path, _ in files if local and path.exists()]
        first, last = (datetime.fromtimestamp(at(written), UTC).isoformat() if written else None for at in (min, max))
        rows.append(
            {
                "stage": owners.get(folder, ""),
                "folder": folder,
                "files": len(files),
                "bytes": sum(size for _, size in files),
                "first_written": first,
                "last_written": last,
            }
        )
    return sorted(rows, key=lambda row: (row["stage"], row["folder"]))


def measures(found: Quality) -> Iterator[dict[str, Any]]:
    """One row per number: what it describes, its name, and its value."""
    for name, value in found.metrics.items():
        yield {"of": "metric", "name": name, "value": value}
    for name, count in found.ranks.items():
        yield {"of": "rank of positives", "name": name, "value": count}
    for side, values in found.scores.items():
        numbers = {"count": values.count, "mean": values.mean, "std": values.std, **values.quantiles}
        yield from ({"of": f"score of {side}", "name": name, "value": value} for name, value in numbers.items())


def candidates(units: Iterable[Unit]) -> Iterator[dict[str, Any]]:
    """One row per candidate, with the number of its unit."""
    for number, unit in enumerate(units):
        for one in unit.candidates:
            yield {
                "unit": number,
                "rank": one.rank,
                "score": one.score,
                "document": one.id,
                "fate": one.fate,
                "rule": one.rule,
                "text": one.text,
            }
