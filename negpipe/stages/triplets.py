"""triplets: candidates → training rows, and a ledger of the fate of every candidate.

One task turns one part of candidates into one part of rows and one of the ledger, one ledger row per unit; anchors that
lack negatives are searched again, and candidates found beyond the stored depth are kept as `deeper`. RUN/triplets shows
the rows of all parts as `part-NNNNN.parquet`, or with `output.rows_per_file` as `part-NNNNN-00000.parquet`, …
Anchors are processed in slices: memory does not grow with the part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import ann
from negpipe.ann import approximate
from negpipe.config.schema import Config, Mining
from negpipe.data import candidates, moments
from negpipe.data.candidates import Deeper
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import Rows, documents, open_table, searchable
from negpipe.engine import devices
from negpipe.engine.fingerprint import key
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Context, Made, Needs, Progress, Publisher, Shown, Stage, Task, Workload
from negpipe.errors import InputError, RowsError, count_of
from negpipe.rows import formats
from negpipe.select import columns, conditions, deeper, rules, verdicts
from negpipe.select.filters import CODES
from negpipe.select.ledger import ledger
from negpipe.select.selector import PartFiles, Selector, Units
from negpipe.stages import defects, headers, shortage
from negpipe.stages.index import recall_window
from negpipe.store.store import Store

VERSION = 5
_ROWS, LEDGER, DEEPER = "rows", "ledger", "deeper"
"""The roles of a part's files, and their folders."""
_ADDED = (*columns.NAMES, "given_negatives", "judged")
"""Settings added after the form of this stage's key was fixed."""
_CELL = 160  # bytes for each candidate of a slice, measured by scripts/bench_memory.py
_COLUMN = 96  # additional bytes if column rules look up values, measured: 30 by never_same, 85 by where
_ROWS_SECOND = 150_000  # negatives written per second; it rarely takes long
_SAMPLED = 64  # anchors of a slice whose scores show whether margins suit the model
_FATE = 8  # bytes for the fate of a candidate for one positive of its anchor


def _settings(config: Config) -> dict[str, Any]:
    values = {f"mining.{name}": value for name, value in config.mining.model_dump(mode="json").items()}
    # A fixed order, regardless of the order in the file.
    values["mining.exclude"] = sorted(config.mining.exclude)
    del values["mining.exclude_file"], values["mining.compat"]
    for name in _ADDED:  # with the defaults, rows and ledger are as before these settings existed
        if getattr(config.mining, name) == Mining.model_fields[name].default:
            del values[f"mining.{name}"]
    if config.mining.sampling_strategy != "top" or config.mining.draws:
        values["seed"] = config.seed
    values["search.depth"] = config.depth  # if candidates were stored deeper, the rest is ignored
    if not config.data.add_positives:  # deeper and random candidates come from the other documents
        values["data.add_positives"] = False
    output = config.output.model_dump(mode="json", exclude={"report", "min_rows"})
    return values | {f"output.{name}": value for name, value in output.items()}


def _sources(context: Context) -> dict[str, str]:
    return context.digest_of("mining.exclude_file", context.config.mining.exclude_file)


def _check(context: Context) -> None:
    """Check that the exclude file is readable and, once the source is read, that the window begins in the corpus."""
    _sources(context)
    if context.config.mining.exclude_file:
        verdicts.read(Path(context.config.mining.exclude_file))
    conditions.check(context.config)
    if "index" in context.manifests:
        recall_window(context)
    if "ingest" not in context.manifests:
        return
    _check_memory(context)
    read, first = context.manifest("ingest").stats, context.config.mining.range_min
    rows = read["rows"] - (0 if context.config.data.add_positives else read["added_positives"])
    if first >= rows:
        raise InputError(
            f"the window starts at rank {first}, but the corpus has {count_of(rows, 'document')}",
            field="mining.range_min",
            remedy="Set mining.range_min below the number of documents",
        )


def _needs(context: Context, work: Workload) -> Needs:
    negatives = work.anchors * context.config.mining.wanted
    deepest = deeper.limit(context.config, work.documents)
    more = f"; anchors short of negatives are searched again, to depth {deepest:,} (not counted)" if deepest else ""
    return Needs(seconds=negatives / _ROWS_SECOND, note=f"{negatives:,} negatives at most{more}")


def _plan(context: Context) -> Iterator[Task]:
    names = {"ingest": "anchors", "search": "candidates", "encode": "anchors"}
    stages = (context.manifest(stage).of_kind(kind) for stage, kind in names.items())
    for anchors, part, vectors in zip(*stages, strict=True):
        name = key("triplets", VERSION, context.key, part.identity(), anchors.identity())
        files = {
            "anchors": anchors.file("table").path,
            "candidates": part.file("candidates").path,
            "vectors": vectors.file("vectors").path,
        }
        yield Task(name, "triplets", part.rows, {"files": files})


@dataclass(frozen=True)
class Shared:
    """Inputs of selection, shared by all parts."""

    corpus: Rows
    namesakes: Namesakes
    selector: Selector
    vectors: list[Path]
    """The parts of encode with the documents that can be candidates."""
    searchable: int
    """The number of these documents."""


def open_selection(context: Context) -> Shared:
    """Open the output of ingest and encode; also for readers of candidates that do not run the stage."""
    parts = searchable(context.manifest("encode"), context.config)
    read = context.manifest("ingest")
    corpus = Rows([context.path(part, "table") for part in documents(read)])
    namesakes = Namesakes([context.path(part, "table") for part in read.of_kind("namesakes")])
    vectors, rows = [context.path(part, "vectors") for part in parts], sum(part.rows for part in parts)
    about: dict[str, Any] = {"searchable": rows, "vectors": vectors, "threads": context.budget.threads}
    return Shared(corpus, namesakes, Selector(context.config, corpus, namesakes, **about), vectors, rows)


def _check_memory(context: Context) -> None:
    """Check the memory for a slice of anchors with all facts about its candidates, and some row groups."""
    read = context.manifest("ingest")
    largest = max((part.rows for part in read.of_kind("anchors")), default=0)
    texts = sum(file.bytes for part in documents(read) for file in part.files)
    depth = min(context.config.depth, read.stats["rows"])
    stored = min(largest, candidates.ROW_GROUP) * depth
    deepest = deeper.limit(context.config, read.stats["rows"])
    again = min(largest * deepest, max(candidates.CELLS, deepest))
    written = 5 * min(formats.GROUP_BYTES, texts)

    mining = context.config.mining
    cell = _CELL + (_COLUMN if columns.asked_for(mining) else 0)

    def takes(cells: int) -> int:
        if mining.margin_reference != "each":
            return cells * cell
        # On average, an anchor is processed once per positive; some at a time.
        units = int(cells * read.stats["positives"] / max(1, read.stats["anchors"]))
        return max(cells, min(units, candidates.CELLS)) * cell + units * _FATE

    chosen = takes(max(stored, again))
    helping = {_shallower(context.config, read.stats["max_positives"]): stored, "set mining.max_depth: 0": again}
    remedy = " and ".join(text for text, cells in helping.items() if takes(cells) + written > context.budget.memory)
    fewer = "lower executor.workers, or " if context.workers > 1 else ""
    context.budget.require(
        chosen + written,
        f"choosing from {max(depth, deepest):,} candidates per anchor, and writing rows ({-(-written // 2**20)} MiB),",
        fewer + remedy,
    )
    if deepest and "encode" in context.manifests:
        encode = context.manifest("encode")
        rows = sum(part.rows for part in searchable(encode, context.config))
        dimension, deepest = encode.stats["dimension"], min(deepest, rows)
        deeper.check_memory(largest, rows, dimension, deepest, context.budget)


def _accept(config: Config, stats: Mapping[str, Any]) -> None:
    rows, least = stats["rows"], config.output.min_rows
    if rows < least:
        raise RowsError(
            f"{count_of(rows, 'row')}, but output.min_rows is {least:,}: triplets/ stays as it was;"
            f" {shortage.reasons(stats)}, or set output.min_rows={rows}"
        )


def _shallower(config: Config, max_positives: int) -> str:
    """A remedy that makes search store fewer candidates."""
    if config.search.depth:
        return f"lower search.depth ({config.depth:,} now)"
    named = {"mining.range_max": config.mining.range_max, "mining.depth": config.mining.depth}
    shown = ", ".join(f"{name} ({value:,} now)" for name, value in named.items() if isinstance(value, int))
    if config.mining.depth != (config.mining.range_max or 0) + max_positives:
        return f"lower {shown}"
    return f"set smaller values for {shown}, which leave room for the {max_positives:,} positives of one anchor text"


def part_files(context: Context, task: Task) -> PartFiles:
    """The files of one of the stage's tasks, without deeper candidates."""
    return PartFiles(**{name: context.store.path(path) for name, path in task.payload["files"].items()})


def _shared(context: Context) -> list[Part]:
    read, encode = context.manifest("ingest"), context.manifest("encode")
    return [*documents(read), *read.of_kind("namesakes"), *documents(encode)]


@contextmanager
def _open(context: Context) -> Iterator[Shared]:
    yield open_selection(context)


def search_deeper(
    files: PartFiles,
    shared: Shared,
    context: Context,
    *,
    progress: Callable[[str], None] = lambda note: None,
    checkpoints: Callable[[str], Path] | None = None,
) -> Iterator[Deeper]:
    """Deeper candidates for the anchors of a part that lack negatives, if configured."""
    deepest = deeper.limit(context.config, shared.searchable)
    if not deepest:
        return iter(())
    return deeper.deepen(
        shared.selector,
        files,
        ann.open_parts(shared.vectors),
        deepest,
        budget=context.budget,
        progress=progress,
        checkpoints=checkpoints,
    )


def _run(task: Task, shared: Shared, context: Context, publish: Publisher, progress: Progress) -> Made:
    files = part_files(context, task)
    searched_deeper = 0
    deeper = search_deeper(
        files,
        shared,
        context,
        progress=lambda note: progress(0, note),
        checkpoints=publish.checkpoint,
    )
    if first := next(deeper, None):

        def write_deeper(file: BinaryIO) -> None:
            nonlocal searched_deeper
            searched_deeper = candidates.write_deeper(file, open_table(files.anchors)["id"], chain([first], deeper))

        files = replace(files, deeper=publish(DEEPER, ".parquet", write_deeper))
    compared = shared.selector.compared
    books: list[pa.Table] = []
    fates = np.zeros(len(CODES), np.int64)
    scores: dict[str, list[moments.Moments]] = {"positive": [], "negative": []}
    sampled: dict[str, list[moments.Moments]] = {"candidates": [], "positives": []}
    own_positives = 0

    def accounted() -> Iterator[Units]:
        nonlocal fates, own_positives
        for found, units in shared.selector.slices(files):
            counts = rules.counts(units.fates, len(CODES))
            books.append(ledger(units, context.config, shared.corpus, shared.selector, shared.searchable))
            fates = fates + counts.sum(axis=0)
            used = np.repeat(units.counts > 0, np.diff(units.positive_offsets))
            scores["positive"].append(moments.of(units.positive_scores[used]))
            alone = units.only_negatives()
            own_positives += len(units.negatives) - len(alone.negatives)
            scores["negative"].append(moments.of(alone.negative_scores))
            sample = found.take(np.arange(min(_SAMPLED, len(found.rows))))
            for side, values in (("candidates", sample.scores.ravel()), ("positives", sample.positive_scores)):
                sampled[side].append(moments.of(values[np.isfinite(values)]))
            yield units
            progress(len(found.rows), "")

    groups = formats.tables(accounted(), shared.corpus, context.config)
    rows = sum(
        _publish(publish, context.config, number, (table for _, table in tables))
        for number, tables in groupby(groups, itemgetter(0))
    )
    book = pa.concat_tables(books)
    publish(LEDGER, ".parquet", lambda file: pq.write_table(book, file, compression="zstd"))
    publish.drop_checkpoints()
    pairs, seconds = (now - before for now, before in zip(shared.selector.compared, compared, strict=True))
    return Made(
        rows,
        {
            "units": book.num_rows,
            "fates": {name: int(fates[code]) for name, code in CODES.items() if fates[code]},
            "short": int(np.count_nonzero(book["short"].to_numpy(zero_copy_only=False))),
            "own_positives": own_positives,
            "random": int(np.sum(book["random"].to_numpy())),
            "preferred": int(np.sum(book["preferred"].to_numpy())) if context.config.mining.prefers else 0,
            "searched_deeper": searched_deeper,
            "texts_compared": int(pairs),
            "scores": {side: moments.merge(pieces) for side, pieces in scores.items()},
            "sampled": {side: moments.merge(pieces) for side, pieces in sampled.items()},
        },
        {} if context.config.mining.near_duplicate is None else {"seconds_comparing": round(seconds, 3)},
    )


def _publish(publish: Publisher, config: Config, number: int, tables: Iterable[pa.Table]) -> int:
    """Publish one file of the part, return its rows."""
    rows = 0

    def write(file: BinaryIO) -> None:
        nonlocal rows
        rows = formats.write(file, tables)

    publish(f"{_ROWS}-{number:05d}" if config.output.rows_per_file else _ROWS, ".parquet", write)
    return rows


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    fates: dict[str, int] = {}
    for part in parts:
        for name, count in part.meta["fates"].items():
            fates[name] = fates.get(name, 0) + count
    fates.pop("padding", None)
    candidates_seen, taken = sum(fates.values()), fates.pop("taken", 0)
    fates.pop("preferred", None)
    own_positives, random, preferred, searched_deeper, compared = (
        sum(part.meta[name] for part in parts)
        for name in ("own_positives", "random", "preferred", "searched_deeper", "texts_compared")
    )
    recall = recall_window(context)
    return (
        ({"recall_window": recall} if recall else {})
        | _verdicts(context)
        | {
            "rows": sum(part.rows for part in parts),
            "candidates": candidates_seen,
            "negatives": taken - own_positives,
            "wanted": sum(part.meta["units"] for part in parts) * context.config.mining.wanted,
            "own_positives": own_positives,
            "random_negatives": random,
            "preferred_negatives": preferred,
            "searched_deeper": searched_deeper,
            "texts_compared": compared,
            "seconds_comparing": round(sum(part.provenance.get("seconds_comparing", 0.0) for part in parts), 1),
            "short_anchors": sum(part.meta["short"] for part in parts),
            "drops": dict(sorted(fates.items(), key=lambda item: -item[1])),
            "scores": {
                side: moments.summary(moments.merge([part.meta["scores"][side] for part in parts]))
                for side in ("positive", "negative")
            },
            "vectors": defects.counted(context.manifest("encode").stats),
        }
        | shortage.spread(context.config.mining, parts, fates)
    )


def _verdicts(context: Context) -> dict[str, Any]:
    """Pairs of the exclude file that name what does not exist, if there are any."""
    name = context.config.mining.exclude_file
    if name is None:
        return {}
    read, pairs = context.manifest("ingest"), verdicts.read(Path(name))
    anchors = (open_table(context.path(part, "table"))["id"] for part in read.of_kind("anchors"))
    unknown = verdicts.unknown(pairs, Rows([context.path(part, "table") for part in documents(read)]), anchors)
    if not unknown:
        return {}
    count = sum(map(len, pairs.values()))
    return {"verdicts": {"file": name, "pairs": count, "unknown": len(unknown), "example": unknown[0]}}


def _remarks(stats: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    if about := stats.get("verdicts"):
        yield (
            logging.WARNING,
            f"{about['unknown']:,} of {about['pairs']:,} pairs of {about['file']} (mining.exclude_file) name an anchor"
            f" or document that does not exist, such as {about['example']}",
        )
    if shortage.is_short(stats):
        yield logging.WARNING, shortage.warning(stats)
    yield from approximate.remarks(stats)


def _views(parts: Sequence[Part]) -> dict[str, Shown]:
    """The part number makes names unique and sorts them in row order."""
    return {
        "triplets": {
            f"part-{number:05d}{file.role.removeprefix(_ROWS)}.parquet": file
            for number, part in enumerate(parts)
            for file in part.all(_ROWS)
        }
    }


def _misfit(store: Store, part: Part) -> str | None:
    return headers.misfit(store, part, {LEDGER: "units", DEEPER: "searched_deeper"})


def _libraries(config: Config) -> tuple[str, ...]:
    return ("faiss-cpu", "numpy", "pyarrow", *(("RapidFuzz",) if config.mining.near_duplicate is not None else ()))


STAGE = Stage(
    name="triplets",
    version=VERSION,
    inputs=("ingest", "encode", "search"),
    settings=_settings,
    sources=_sources,
    check=_check,
    needs=_needs,
    plan=_plan,
    shared=_shared,
    open=_open,
    run=_run,
    accept=_accept,
    remarks=_remarks,
    misfit=_misfit,
    libraries=_libraries,
    stats=_stats,
    devices=devices.of_search,
    place=lambda _: "light",
    views=_views,
    folders=(_ROWS, LEDGER, DEEPER),
    unit="anchors",
)
