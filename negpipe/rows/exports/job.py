"""The input of a layout, and the properties of every layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negpipe.config.schema import Config
from negpipe.data.arrays import Mask
from negpipe.data.tables import Rows
from negpipe.redaction import redacted
from negpipe.rows.exports.blocks import Slices, has_negatives
from negpipe.rows.exports.files import TextFiles
from negpipe.select.selector import Units


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        slices: all anchors, in order; can be iterated once.
        folder: an empty folder.
        shard_rows: maximum rows per file; None: one file.
        compress: gzip text.
        run: also write the ranking stored by search.
    """

    config: Config
    corpus: Rows
    slices: Slices
    folder: Path
    shard_rows: int | None = None
    compress: bool = False
    run: bool = False

    def lines(self, stem: str = "train", suffix: str = ".jsonl", **form: str) -> TextFiles:
        """Files for its rows of text; `form`: see `TextFiles`."""
        return TextFiles(self.folder, stem, shard_rows=self.shard_rows, compress=self.compress, suffix=suffix, **form)


@dataclass(frozen=True)
class ExportLayout:
    """One trainer's layout.

    Attributes:
        write: writes a job, returns the rows written.
        text: its rows are lines of text, so they can be gzipped.
        suffix: suffix of the only file of an export without shards; None: there are always several.
        reads_gzip: whether its trainer's loader opens gzip.
        runs: whether it can include the ranking.
        has_rows: (u,) which units have rows; the others are left out and counted.
    """

    write: Callable[[ExportJob], int]
    text: bool = False
    suffix: str | None = None
    reads_gzip: bool = True
    runs: bool = False
    has_rows: Callable[[Units, Config], Mask] = has_negatives


def described(config: Config) -> dict[str, Any]:
    """The settings that affect the rows, without paths and the server's address."""
    places = dict.fromkeys(("run_dir", "store", "executor", "resources"), True)
    server = {"http": {"url", "key_env"}}
    settings = config.model_dump(mode="json", exclude={**places, "encoder": server}, exclude_none=True)
    return {name: _placeless(value) for name, value in redacted(settings).items()}


def _placeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _placeless(inner) for name, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
