"""Evaluates a run without running a stage: calibration, retriever quality, and the audit of its rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import ann
from negpipe.config.schema import Config
from negpipe.data import candidates
from negpipe.data.tables import Rows, documents, members, open_table, ragged
from negpipe.engine.progress import Reporter, Silent
from negpipe.engine.stage import Context
from negpipe.engine.state import digests_of
from negpipe.errors import ConfigError, InputError, count_of
from negpipe.review import audit, calibrate, quality
from negpipe.review.calibrate import Calibration, Recommendation, Setting, Trials
from negpipe.review.finished import current, searched, selected
from negpipe.select import columns
from negpipe.select.selector import Units, rows_of
from negpipe.stages import STAGES, defects
from negpipe.stages.triplets import Shared, open_selection, part_files
from negpipe.store.files import json_bytes, publish, write_all

logger = logging.getLogger(__name__)

CALIBRATION, AUDIT = "calibration.parquet", "audit.json"
MADE_OF = "made_of"
"""Key under which both record the candidates, or rows, that they are based on."""
_ANCHORS = 4096  # anchors processed at a time
_JUDGMENTS = 8192  # judgments whose texts are in memory at a time
_NEIGHBOURS = 16  # maximum near anchors per anchor
_SUSPECTS = 2**20  # their positives in memory at a time


def measure_quality(config: Config, *, reporter: Reporter | None = None) -> quality.Quality:
    """Measure how well the encoder retrieves the positives; see `quality`.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
    """
    reporter = reporter or Silent()
    with digests_of(config) as digests:
        context = searched(config, digests, "quality")
        anchors = count_of(context.manifest("ingest").stats["anchors"], "anchor")
        logger.info("quality: measuring on the candidates of %s", anchors)
        opened = open_selection(context)

        def slices() -> Iterator[tuple[candidates.Candidates, Units]]:
            for piece in selected(context, opened):
                yield piece
                reporter.advance(len(piece[0].rows), "")

        reporter.begin("quality", context.manifest("ingest").stats["anchors"], 0, "anchors")
        try:
            return quality_of(context, opened, slices())
        finally:
            reporter.end()


def quality_of(
    context: Context, opened: Shared, slices: Iterable[tuple[candidates.Candidates, Units]]
) -> quality.Quality:
    """The same, for candidates and units read by the caller."""
    vectors = [context.path(part, "vectors") for part in context.manifest("encode").of_kind("anchors")]
    random = quality.random_scores(vectors, opened.vectors, opened.searchable, context.config.seed)
    slices = (opened.selector.without_itself(found, units) for found, units in slices)
    measured = quality.measure(slices, random, min(context.config.depth, opened.searchable))
    return replace(measured, vectors=defects.counted(context.manifest("encode").stats))


def calibrate_settings(
    config: Config,
    settings: Callable[[Config], Sequence[Setting]] = calibrate.grid,
    *,
    near: float | None = None,
    second: Config | None = None,
    reporter: Reporter | None = None,
) -> Calibration:
    """Try settings on the stored candidates and write `calibration.parquet` to the run directory.

    Args:
        config: the config of the run; provides everything that the settings do not set.
        settings: returns the settings to try, given the resolved config.
        near: use the stand-in of near anchors, with this minimum cosine.
        second: use the stand-in of a second opinion, from this run.
        reporter: receives progress.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
        InputError: nothing can be tried; the message suggests alternatives.
        ConfigError: the config mines no negatives, or the stand-in is incompatible with it.
    """
    reporter = reporter or Silent()
    method: Literal["hidden", "near_anchors", "second_opinion"] = (
        "second_opinion" if second else "near_anchors" if near is not None else "hidden"
    )
    with digests_of(config) as digests:
        context = searched(config, digests, "calibrate")
        if not context.config.mining.num_negatives:
            raise ConfigError("mining.num_negatives is 0: only mined negatives can be calibrated")
        tried, total = settings(context.config), context.manifest("ingest").stats["anchors"]
        what = count_of(len(tried), "setting"), count_of(total, "anchor")
        logger.info("calibrate: trying %s on the candidates of %s", *what)
        opened = open_selection(context)
        if second is not None:
            with digests_of(second) as others:
                trials = _second_opinion(context, opened, searched(second, others, "calibrate --second"))
        elif near is not None:
            trials = _near_anchors(context, opened, near)
        else:
            trials = (
                calibrate.hidden(anchors, found, opened.corpus) for anchors, found in _slices(context, context.config)
            )
        reporter.begin("calibrate", 0, 0, "trials")
        try:
            made = calibrate.calibrate(
                context.config,
                opened.corpus,
                opened.namesakes,
                trials,
                tried,
                method=method,
                all_anchors=total,
                threads=context.budget.threads,
                progress=lambda count: reporter.advance(count, ""),
            )
        finally:
            reporter.end()
        if not made.anchors:
            raise InputError(_UNTRIED[method].format(total=total, near=near), remedy=_INSTEAD[method])
        judged = {MADE_OF: context.manifest("search").digest}
        table = calibrate.to_table(made).replace_schema_metadata(judged)
        context.run.put("", lambda _: CALIBRATION, lambda file: _write(table, file))
        return made


def audit_rows(config: Config | None, options: audit.AuditOptions, file: Path | None = None) -> audit.Audit:
    """Check training rows: those of a run, writing `audit.json` there, or those of any file.

    Args:
        config: the config of the run with the rows and qrels; None: a file's rows are only compared to each other.
        options: how rows are judged. For a run's rows, the wanted number of negatives is the config's.
        file: a file with rows to use instead of the run's.

    Raises:
        MissingStageError: rows or qrels do not exist; the message names the command that makes them.
        ConfigError: neither a config nor a file is given, or the run's rows are rankings.
        InputError: see `audit.audit`.
    """
    if config is None:
        if file is None:
            raise ConfigError("nothing to audit: name a CONFIG, or a file with --file")
        return audit.audit(file, options)
    with digests_of(config) as digests:
        context = current(config, digests, "audit", last="ingest" if file else "triplets")
        shared = replace(options, budget=context.budget.share(0.5))
        if file is not None:
            return audit.audit(file, shared, _qrels(context), scratch=config.run_dir)
        if config.output.include_positives:
            raise ConfigError("output.include_positives writes complete rankings, which hold positives too")
        wanted = options.negatives or context.config.mining.wanted
        found = audit.audit(
            context.run.folder("triplets"), replace(shared, negatives=wanted), _qrels(context), scratch=config.run_dir
        )
        document = json_bytes({**found.document(), MADE_OF: context.manifest("triplets").key})
        context.run.put("", lambda _: AUDIT, lambda file: write_all(file, document), len(document))
        return found


def _qrels(context: Context) -> audit.Qrels:
    read = context.manifest("ingest")
    parts = [context.path(part, "table") for part in documents(read)]
    corpus = Rows(parts)

    def positives() -> Iterator[pa.Table]:
        for part in read.of_kind("anchors"):
            table = open_table(context.path(part, "table"))
            for start in range(0, table.num_rows, _ANCHORS):
                some = table.slice(start, _ANCHORS)
                known, offsets = ragged(some["known"])
                owner = np.repeat(np.arange(some.num_rows), np.diff(offsets))
                for low in range(0, len(known), _JUDGMENTS):
                    here = slice(low, low + _JUDGMENTS)
                    at, rows = pa.array(owner[here]), known[here]
                    columns = {"anchor_id": some["id"].take(at), "anchor": some["text"].take(at)}
                    yield pa.table({**columns, "document": rows, "text": corpus.strings("text", rows)})

    def of_documents(names: list[str]) -> Iterator[pa.Table]:
        for start, path in zip(corpus.starts.tolist(), parts, strict=False):
            table = open_table(path).select(names)
            yield table.append_column("document", pa.array(np.arange(start, start + table.num_rows)))

    def of_anchors(names: list[str]) -> Iterator[pa.Table]:
        for part in read.of_kind("anchors"):
            table = open_table(context.path(part, "table"))
            own = {name: table[name] for name in names}
            yield pa.table({"anchor_id": table["id"], "anchor": table["text"], **own})

    asked = None
    if columns.asked_for(context.config.mining):
        named = audit.rules.named(context.config)
        asked = audit.ColumnRules(context.config, of_documents(named["corpus"]), of_anchors(named["queries"]))
    texts = audit.TextTables(of_anchors([]), of_documents(["id", "other_ids", "text"]))
    return audit.Qrels(str(context.run_dir), positives(), of_documents(["id", "other_ids"]), asked, texts)


def plot_leak(path: Path, calibration: Calibration, advice: Recommendation | None = None) -> None:
    """Save the plot of leak against hardness as .svg or .png.

    Raises:
        StorageError: the file system refused the write.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Without a date and with fixed names, equal calibrations produce equal files.
    with rc_context({"svg.hashsalt": "negpipe"}):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        calibrate.draw_leak(figure.subplots(), calibration, advice)
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        publish(path.parent, path.name, lambda file: figure.savefig(file, format=kind, metadata=metadata))


_UNTRIED = {
    "hidden": "none of {total:,} anchors has two different positives: false negatives cannot be estimated by"
    " hiding positives",
    "near_anchors": "no two of the {total:,} anchors have a cosine of {near:g} or more and different positives",
    "second_opinion": "the run has no anchors",
}
_INSTEAD = {
    "hidden": "Use one of the two weaker stand-ins, each labelled as such: `negpipe calibrate CONFIG --near-anchors"
    " 0.95` counts positives of anchors with nearly the same vector; `negpipe calibrate CONFIG --second OTHER_CONFIG`"
    " counts negatives that another model's run ranks above the positive",
    "near_anchors": "Lower --near-anchors, or use the other stand-in: --second OTHER_CONFIG",
    "second_opinion": "Check `negpipe status CONFIG`",
}


def _slices(context: Context, config: Config) -> Iterator[tuple[pa.Table, candidates.Candidates]]:
    """Anchors with their stored candidates, up to the config's depth."""
    for task in STAGES["triplets"].plan(STAGES["triplets"].within(context)):
        files = part_files(context, task)
        table = open_table(files.anchors)
        for found in candidates.read(files.candidates, table["id"], depth=config.depth, score=config.mining.score):
            yield rows_of(table, found.anchors), found


def _near_anchors(context: Context, opened: Shared, least: float) -> Iterator[Trials]:
    if not context.config.encoder.normalize:
        raise ConfigError("--near-anchors compares cosines, but encoder.normalize is false: use --second instead")
    texts, vectors = (context.manifest(name).of_kind("anchors") for name in ("ingest", "encode"))
    tables = [open_table(context.path(part, "table")) for part in texts]
    known, offsets = ragged(pa.concat_tables([table.select(["known"]) for table in tables])["known"])
    every = ann.open_parts([context.path(part, "vectors") for part in vectors])
    none = np.empty(0, np.int64)
    start = 0
    for anchors, found in _slices(context, context.config):
        rows = np.arange(start, start + len(found.rows))
        own = np.empty((len(rows), every.dimension), np.float32)
        every.read(start, own)
        near = ann.search_exact(
            own,
            every,
            min(_NEIGHBOURS + 1, every.rows),
            positives=(none, none),
            budget=context.budget,
        )
        anchor, column = np.nonzero((near.scores >= least) & (near.rows >= 0) & (near.rows != rows[:, None]))
        # An anchor may have very many positives: take as many anchors at a time as keep their number bounded.
        per_anchor = np.concatenate([[0], np.cumsum(np.bincount(anchor, minlength=len(rows)))])
        listed = np.concatenate([[0], np.cumsum(np.diff(offsets)[near.rows[anchor, column]])])
        cuts = np.flatnonzero(np.diff(listed[per_anchor[1:]] // _SUSPECTS)) + 1
        for low, high in pairwise([0, *cuts.tolist(), len(rows)]):
            pairs, some = slice(per_anchor[low], per_anchor[high]), np.arange(low, high)
            positions, ends = members(offsets, near.rows[anchor[pairs], column[pairs]])
            ends = ends[per_anchor[low : high + 1] - per_anchor[low]]
            piece = anchors.slice(low, high - low), found.take(some)
            yield calibrate.near_anchors(*piece, opened.corpus, known[positions], ends)
        start += len(rows)


def _second_opinion(context: Context, opened: Shared, second: Context) -> Iterator[Trials]:
    if context.manifest("ingest").digest != second.manifest("ingest").digest:
        raise InputError(
            f"{second.run_dir} was made from other data than {context.run_dir}: rows cannot be compared",
            remedy="Both configs need the same `data` settings and the same files; run `negpipe mine` on both",
        )
    pairs = zip(_slices(context, context.config), _slices(second, second.config), strict=True)
    return (calibrate.second_opinion(anchors, found, opened.corpus, other) for (anchors, found), (_, other) in pairs)


def _write(table: pa.Table, file: BinaryIO) -> None:
    pq.write_table(table, file, compression="zstd")
