"""negpipe: hard negatives for retrieval and reranking models, in restartable stages.

`negpipe.mine(config)` does the same as `negpipe mine`, except for the report, and returns the location of the rows and
the counts.
`negpipe.Run(config)` is a run in Python: its stages, and their output as Arrow tables; `run.select(...)` tries other
rules in memory.
`negpipe.mine_hard_negatives` replaces the function of sentence-transformers with the same name.

These names and `negpipe.errors` are stable, see docs/reference/api.md; everything else is private.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negpipe.compat.sentence_transformers import mine_hard_negatives
    from negpipe.graph import Result
    from negpipe.review.calibrate import Setting
    from negpipe.run import Run, Selection

__all__ = ["Run", "Selection", "Setting", "mine", "mine_hard_negatives"]
__version__ = "0.1.0"


def mine(config: str | Path | dict[str, Any], overrides: Sequence[str] = (), *, progress: bool | None = None) -> Result:
    """Run every stage that is not up to date.

    Args:
        config: a path, a name in configs/, a run directory, or a mapping of settings.
        overrides: `key.path=value` strings.
        progress: where to show progress, see `negpipe.Run`.

    Returns:
        the run directory, the folder of the triplets, and the counts of each stage.

    Raises:
        negpipe.errors.NegpipeError: the run failed; the message says why.
    """
    from negpipe import graph
    from negpipe.config.file import load_config
    from negpipe.review.progress import reporter

    return graph.mine(load_config(config, list(overrides)), reporter=reporter(progress))


def __getattr__(name: str) -> Any:
    if name == "mine_hard_negatives":
        from negpipe.compat.sentence_transformers import mine_hard_negatives

        return mine_hard_negatives
    if name in ("Run", "Selection"):
        from negpipe import run

        return getattr(run, name)
    if name == "Setting":
        from negpipe.review.calibrate import Setting

        return Setting
    raise AttributeError(f"module 'negpipe' has no attribute '{name}'")
