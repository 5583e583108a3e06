"""`report.html`: an overview of what was mined, and a sample of it to review. A single self-contained file.

Reads a finished run without changing it. The same run gives the same figures and the same sample.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from negpipe.config.schema import Config
from negpipe.engine.state import digests_of
from negpipe.errors import LockedError, count_of
from negpipe.review.finished import current
from negpipe.review.report import gather, page
from negpipe.store.files import BOOKS, publish, write_all
from negpipe.store.opening import run_held, run_of

__all__ = ["ANCHORS", "NAME", "after_mining", "write"]

NAME = "report.html"
ANCHORS = 1000
logger = logging.getLogger(__name__)


def write(config: Config, out: Path | None = None, *, typed: str = "CONFIG", anchors: int = ANCHORS) -> Path:
    """Write the report of a run.

    Args:
        config: the config of the run.
        out: the output file; None: `report.html` in the run directory.
        typed: config and overrides in shell syntax, for the commands shown on the page.
        anchors: number used for scores, ranks, hubs and the sample; evenly spaced.

    Returns:
        the path of the file.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
        LockedError: the run is still in progress.
        StorageError: the file cannot be written.
    """
    with _at_rest(config), digests_of(config) as digests:
        context = current(config, digests, "report", last="triplets")
        what = count_of(anchors, "anchor with its", "anchors with their")
        logger.info("report: reading up to %s candidates, and drawing", what)
        data = page.render(gather.gather(context, typed, anchors)).encode()
        if out is None and config.url:
            run_of(config).put("", lambda _: NAME, lambda file: write_all(file, data), len(data))
        out = out or config.run_dir / NAME
        publish(out.parent, out.name, lambda file: write_all(file, data), len(data))
    return out


def after_mining(config: Config, typed: str) -> Path | None:
    """Write the report at the end of `mine`; problems only cause a warning, as the rows are complete."""
    started = time.monotonic()
    try:
        out = write(config, typed=typed)
    except Exception as error:
        logger.warning("report: failed, the rows are complete: %s: %s", type(error).__name__, error)
        return None
    logger.info("report: %s (%.1f s)", out, time.monotonic() - started)
    return out


@contextmanager
def _at_rest(config: Config) -> Iterator[None]:
    """Make sure no process is working on the run; a run that was never started is left alone."""
    if config.url is None and not (config.run_dir / BOOKS).is_dir():
        yield
        return
    try:
        with run_held(config):
            yield
    except LockedError as error:
        raise LockedError(f"{error}. A report needs a finished run; `negpipe status CONFIG` shows its state") from None
