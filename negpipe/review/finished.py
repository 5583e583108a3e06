"""Reads a run without running a stage: exports and explanations, from the output of ingest and search."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace

from negpipe import graph
from negpipe.config.schema import Config
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.manifest import Part
from negpipe.engine.progress import Reporter, Silent
from negpipe.engine.repair import check_headers
from negpipe.engine.stage import Context
from negpipe.engine.state import blocked, digests_of, identity_of, look
from negpipe.errors import MissingStageError
from negpipe.review import explain
from negpipe.rows import exports
from negpipe.rows.exports.blocks import Slices
from negpipe.select.selector import PartFiles
from negpipe.stages import STAGES
from negpipe.stages.triplets import DEEPER, Shared, open_selection, part_files, search_deeper

logger = logging.getLogger(__name__)


def export(config: Config, options: exports.ExportOptions, *, reporter: Reporter | None = None) -> exports.Exported:
    """Write the training rows in a trainer's layout, from the output of ingest and search. Does not run any stage.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
        ConfigError, InputError, StorageError: see `exports.export`.
    """
    reporter = reporter or Silent()
    with digests_of(config) as digests:
        context = searched(config, digests, "export")
        _tell_of_other_rows(context, "export")
        opened = open_selection(context)

        def slices() -> Slices:
            for piece in selected(context, opened):
                yield piece
                reporter.advance(len(piece[0].rows), "")

        read, encode = context.manifest("ingest").stats, context.manifest("encode")
        vectors = {name: encode.inputs[name] for name in sorted(encode.inputs) if name.startswith("encoder.")}
        logger.info("export: writing %s", options.out)
        reporter.begin("export", read["anchors"], 0, "anchors")
        try:
            return exports.export(
                context.config,
                options,
                opened.corpus,
                slices(),
                counts={"anchors": read["anchors"], "documents of the corpus": read["rows"]},
                encoder=exports.describe_encoder(config, vectors),
            )
        finally:
            reporter.end()


def explain_anchor(config: Config, anchor: str) -> explain.Explanation:
    """The fate of every candidate of an anchor, named by id or exact text, and the rule behind it.

    Does not run any stage.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
        InputError: no anchor has the id or the text.
    """
    with digests_of(config) as digests:
        context = searched(config, digests, "explain")
        _tell_of_other_rows(context, "explain")
        opened = open_selection(context)
        parts, complete = _parts(context)
        part, at = explain.find(parts, anchor, trains=config.train is not None)
        files = part if complete else replace(part, deeper=search_deeper(part, opened, context))
        return explain.explain(opened.selector, opened.corpus, files, at)


def searched(config: Config, digests: DigestCache, wanted: str) -> Context:
    """The context for a reader of candidates, if everything before `triplets` is current."""
    context = current(config, digests, wanted, last="search")
    STAGES["triplets"].check(STAGES["triplets"].within(context))
    return context


def _tell_of_other_rows(context: Context, command: str) -> None:
    """Warn if the rows on disk were selected by other rules than those that the command uses."""
    state = look(STAGES["triplets"], context)
    if state.state == "stale":
        config = context.config
        run = shlex.quote(config.place)
        hint = "" if config.url else f"; `negpipe {command} {run}` uses those"  # a bucket keeps no config
        logger.warning("the rows in %s were made with other settings: %s%s", run, state.reason, hint)


def current(config: Config, digests: DigestCache, wanted: str, *, last: str) -> Context:
    """The context with the stages up to `last` and those that replace its output, if all of them are current.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
        DamagedError: a file of the right size has another kind or number of rows.
    """
    # A single process reads, whatever the executor: it may use all memory and threads.
    alone = config.executor.model_copy(update={"kind": "inline"})
    context = Context(config.model_copy(update={"executor": alone}), config.run_dir, digests)
    stages = [*graph.mining(config).values()]
    end = max(at for at, stage in enumerate(stages) if last in (stage.name, stage.provides))
    for stage in stages[: end + 1]:
        state = look(stage, context)
        if state.state != "current" or state.manifest is None:
            raise MissingStageError(blocked(state, wanted))
        check_headers(context.store, stage, state.manifest)
        context = context.after(stage, state.manifest)
    return context


def selected(context: Context, opened: Shared, every: int = 1) -> Slices:
    """The candidates of all anchors, or of one in `every`, a slice at a time, with the selection of the config."""
    parts, complete = _parts(context)
    for part in parts:
        yield from opened.selector.slices(
            part if complete else replace(part, deeper=search_deeper(part, opened, context)), every
        )


def _parts(context: Context) -> tuple[list[PartFiles], bool]:
    """The files of every part of anchors, and whether they include deeper candidates.

    They do if `triplets` has run with these settings; otherwise, deeper candidates have to be searched.
    """
    stage = STAGES["triplets"]
    context = replace(stage.within(context), key=identity_of(stage, context).key)
    manifest = context.books(stage.name).manifest()
    complete = manifest is not None and look(stage, context).state == "current"
    made: tuple[Part, ...] = ()
    if manifest and complete:
        check_headers(context.store, stage, manifest)
        made = manifest.parts
    deeper = {part.key: context.store.path(file.path) for part in made for file in part.all(DEEPER)}
    return [replace(part_files(context, task), deeper=deeper.get(task.key)) for task in stage.plan(context)], complete
