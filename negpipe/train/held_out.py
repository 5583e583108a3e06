"""held_out: a second ingest, of the split that a model is judged on, or of the test side of `train.split`. Its corpus
is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from negpipe import sources
from negpipe.config.schema import Config
from negpipe.config.training import EVAL_SPLIT
from negpipe.engine.manifest import Manifest
from negpipe.engine.stage import Context, Needs, Task
from negpipe.errors import InputError
from negpipe.stages import ingest


def check(config: Config) -> None:
    """Raises InputError: the source has no splits, so that the model would be judged on what it is trained on."""
    held_out = _config(config)
    with _split_named(config):
        if held_out is config or sources.splits(config.data, held_out.data.split):
            return
    raise InputError(
        "the source has no splits, so there is nothing to judge the model on",
        field="train.eval_split",
        remedy="Hold some of its anchors out: train: {split: {test: 0.1}} in place of train.eval_split",
    )


def _config(config: Config) -> Config:
    """The config whose anchors are the held-out ones."""
    assert config.train is not None
    if config.train.split:
        return config
    return config.model_copy(
        update={"data": config.data.model_copy(update={"split": config.train.eval_split or EVAL_SPLIT})}
    )


def _sources(context: Context) -> dict[str, str]:
    with _split_named(context.config):
        return ingest.STAGE.sources(context)


def _plan(context: Context) -> Iterator[Task]:
    with _split_named(context.config):
        yield from ingest.plan(context, "test")


@contextmanager
def _split_named(config: Config) -> Iterator[None]:
    """Report a missing split under the setting that requests it."""
    assert config.train is not None
    try:
        yield
    except InputError as error:
        if error.field != "split" or config.train.split:
            raise
        there = [name for name in error.there if name != config.data.split]
        raise InputError(
            f"there is nothing to judge the model on: {error.problem}",
            file=error.file,
            field="train.eval_split",
            remedy=f"Available splits: {', '.join(there) or 'none'}. Use one that is not trained on",
            there=error.there,
        ) from None


def _settled(config: Config, _: Manifest) -> tuple[Config, str]:
    return config, ""  # the search depth is decided by the other ingest


STAGE = replace(
    ingest.STAGE,
    name="held_out",
    kind="ingest",
    config=_config,
    sources=_sources,
    plan=_plan,
    needs=lambda *_: Needs(note="reads the source again, for the held-out split"),
    settle=_settled,
    remarks=lambda _: (),
    outlook=lambda _: (),
    views=lambda _: {},
)
