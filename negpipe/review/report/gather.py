"""Gathers a report's content from the stages' output: for all anchors, or for evenly spaced ones if there are many."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import __version__
from negpipe.config.schema import Config
from negpipe.data.candidates import Candidates
from negpipe.engine.manifest import Manifest
from negpipe.engine.stage import Context
from negpipe.errors import NegpipeError, count_of
from negpipe.redaction import redacted
from negpipe.review import audit, measures
from negpipe.review.calibrate import Calibration, Estimate, Setting
from negpipe.review.finished import selected
from negpipe.review.quality import Quality
from negpipe.review.report import facts, plots, sample
from negpipe.review.report.facts import StageFacts
from negpipe.review.report.sample import Card, Pool
from negpipe.review.wording import clean_text
from negpipe.select import verdicts
from negpipe.select.selector import Units
from negpipe.stages.triplets import LEDGER, Shared, open_selection

logger = logging.getLogger(__name__)
_AUDITED = 10_000  # maximum rows audited here; more need the command
_EARLIER = 20_000  # maximum verdicts repeated on the page
_HUBS = 8


@dataclass(frozen=True)
class Report:
    """Content of the page; texts are as in the source.

    Attributes:
        key: the key of the rows.
        typed: config and overrides in shell syntax.
        looked_at: number of `anchors` used for scores, ranks, hubs and cards.
        hubs: (anchors, id, text) of the documents that are a negative for the most anchors.
        audit: as in `audit.json`; None: `no_audit` says why.
        earlier: verdicts of the current `mining.exclude_file`; None: too many.
    """

    key: str
    title: str
    run_dir: str
    version: str
    typed: str
    config: str
    anchors: int
    looked_at: int
    numbers: dict[str, str]
    stages: list[StageFacts]
    encoder: dict[str, str]
    index: dict[str, str]
    metrics: dict[str, str]
    figures: list[plots.Figure]
    no_calibration: str
    hubs: list[tuple[int, str, str]]
    audit: dict[str, Any] | None
    no_audit: str
    cards: list[Card]
    earlier: list[tuple[str, str]] | None


def gather(context: Context, typed: str, anchors: int) -> Report:
    """Read a finished run.

    Args:
        context: a context in which every stage is current.
        typed: config and overrides, for the commands shown on the page.
        anchors: approximate number of anchors to use.
    """
    opened, pool = open_selection(context), Pool()
    total = context.manifest("ingest").stats["anchors"]

    def slices() -> Iterator[tuple[Candidates, Units]]:
        for found, units in selected(context, opened, every=-(-total // anchors)):
            pool.add(units)
            yield found, units

    measured = measures.quality_of(context, opened, slices())
    made = context.manifest("triplets")
    negatives = _per_unit(context, made)
    calibration = _calibration(context, typed)
    hubs, counts = pool.hubs()
    svgs = plots.draw(measured, negatives, made.stats["drops"], counts, calibration)
    captions = _captions(measured, negatives, made, counts, context.config)
    audited, no_audit = _audit(context, made, typed)
    config = redacted(context.config.model_dump(mode="json"))
    return Report(
        key=made.key,
        title=PurePosixPath(context.config.url or context.run_dir.resolve()).name,
        run_dir=context.config.place,
        version=__version__,
        typed=typed,
        config=_yaml(config),
        anchors=total,
        looked_at=measured.anchors,
        numbers=_numbers(context, measured, negatives),
        stages=facts.stages(context.manifests),
        encoder=redacted(facts.encoder(context.config, context.manifest("encode"))),
        index=facts.index(context.manifest("index").stats, made.stats),
        metrics={name: f"{value:.4f}" for name, value in measured.metrics.items()},
        figures=[plots.Figure(title, svg, captions[title], title == plots.LEAK) for title, svg in svgs.items()],
        no_calibration=""
        if calibration
        else f"`negpipe calibrate {typed}` estimates how many of the negatives are false, and which margin is better;"
        " the next report then shows its plot.",
        hubs=_named(opened, hubs[:_HUBS], counts[:_HUBS]),
        audit=audited,
        no_audit=no_audit,
        cards=sample.cards(pool, opened.corpus, context.config.seed),
        earlier=_earlier(context.config),
    )


def _numbers(context: Context, measured: Quality, negatives: npt.NDArray[np.int64]) -> dict[str, str]:
    read, made = context.manifest("ingest").stats, context.manifest("triplets").stats
    numbers = {
        "documents": f"{read['rows']:,}",
        "anchors": f"{read['anchors']:,}",
        "rows": f"{made['rows']:,}",
        "negatives": f"{int(negatives.sum()):,}",
        "anchors short of negatives": f"{made['short_anchors']:,}",
    }
    if measured.outscored is not None:
        numbers["negatives above their positive"] = f"{measured.outscored:.1%}"
    beyond = f"beyond {measured.depth}"
    return numbers | {
        "median rank of a positive": beyond if measured.median_rank is None else f"{measured.median_rank:,}",
        "nDCG@10 of the encoder": f"{measured.metrics['nDCG@10']:.3f}",
    }


def _captions(
    measured: Quality, negatives: npt.NDArray[np.int64], made: Manifest, hubs: npt.NDArray[np.int64], config: Config
) -> dict[str, str]:
    """A sentence describing each figure, also for users who cannot see it."""
    means = ", ".join(
        f"{name} {found.mean:.3f}"
        for side, (name, _) in plots.SIDES.items()
        if (found := measured.scores[side]).mean is not None
    )
    apart = "" if measured.separation is None else (
        f" A positive scores above a random document in {measured.separation:.1%} of cases."
    )  # fmt: skip
    difference = measured.scores[plots.DIFFERENCE].mean
    margin = "No negative has a positive to compare it to." if difference is None or measured.outscored is None else (
        f"Mean {difference:.3f}. {measured.outscored:.1%} of the selected negatives score above their positive."
    )  # fmt: skip
    first = measured.ranks.get("0", 0) / max(1, measured.positives)
    beyond = measured.ranks["beyond"] / max(1, measured.positives)
    wanted = config.mining.wanted
    full = float(np.mean(negatives >= wanted)) if len(negatives) else 0.0
    most = next(iter(made.stats["drops"].items()), None)
    dropped = "" if most is None else (
        f" Most frequent drop reason: {most[0].replace('_', ' ')}, {most[1] / max(1, made.stats['candidates']):.1%}."
    )  # fmt: skip
    return {
        plots.SCORES: f"Mean scores: {means}.{apart}",
        plots.APART: margin,
        plots.RANKS: f"{first:.1%} of the positives are the nearest document, {beyond:.1%} are beyond rank"
        f" {measured.depth}.",
        plots.PER_ANCHOR: f"{full:.1%} of the anchors have all {wanted} requested.",
        plots.DROPS: f"{count_of(made.stats['candidates'], 'candidate')} seen, {made.stats['negatives']:,} taken."
        f"{dropped}",
        plots.HUBS: f"{count_of(len(hubs), 'document is a negative', 'documents are negatives')}; the most frequent one"
        f" for {int(hubs.max(initial=0)):,} of {count_of(measured.anchors, 'anchor')}.",
        plots.LEAK: "Each mark is a setting: further left it takes fewer false negatives, further up harder ones.",
    }


def _per_unit(context: Context, made: Manifest) -> npt.NDArray[np.int64]:
    """How many negatives each anchor (with `margin_reference: each`, each pair) got, from the ledger."""
    files = [context.store.path(file.path) for part in made.parts for file in part.all(LEDGER)]
    counts = [np.empty(0, np.int64)]
    for path in files:
        there = [name for name in ("taken", "preferred", "random") if name in pq.read_schema(path).names]
        book = pq.read_table(path, columns=there)
        counts.append(np.sum([book[name].to_numpy() for name in there], axis=0))
    return np.concatenate(counts)


def _named(opened: Shared, rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> list[tuple[int, str, str]]:
    ids, texts = (opened.corpus.strings(name, rows).to_pylist() for name in ("id", "text"))
    return [
        (count, name, clean_text(text, 160))
        for count, name, text in zip(counts.tolist(), ids, texts, strict=True)
        if count > 1
    ]


def _calibration(context: Context, typed: str) -> Calibration | None:
    """The last calibration, if it is based on these candidates."""
    try:
        content = context.run.read(measures.CALIBRATION)
        if content is None:
            return None
        table = pq.read_table(pa.BufferReader(content))
        if (table.schema.metadata or {}).get(measures.MADE_OF.encode()) != context.manifest("search").digest.encode():
            return None
        rows = table.to_pylist()
        return Calibration(
            rows[0]["method"],
            rows[0]["anchors"],
            context.manifest("ingest").stats["anchors"],
            rows[0]["trials"],
            rows[0]["num_negatives"],
            [
                Estimate(
                    Setting(**{name: row[name] for name in Setting.__dataclass_fields__}),
                    **{name: row[name] for name in Estimate.__dataclass_fields__ if name != "setting"},
                )
                for row in rows
            ],
        )
    except (OSError, ValueError, LookupError) as error:
        path = f"{context.run}/{measures.CALIBRATION}"
        logger.warning("report: %s cannot be read (%s): run `negpipe calibrate %s` again", path, error, typed)
        return None


def _audit(context: Context, made: Manifest, typed: str) -> tuple[dict[str, Any] | None, str]:
    """The audit of these rows, or the reason why there is none."""
    try:
        stored = json.loads(context.run.read(measures.AUDIT) or b"")
        if stored[measures.MADE_OF] == made.key:
            return stored, ""
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    if made.stats["rows"] > _AUDITED:
        return (
            None,
            f"{count_of(made.stats['rows'], 'row')} not audited: run `negpipe audit {typed}`, then report again.",
        )
    try:
        found = measures.audit_rows(context.config, audit.AuditOptions(columns={}))
    except NegpipeError as error:
        return None, f"Not audited: {error}"
    return found.document(), ""


def _earlier(config: Config) -> list[tuple[str, str]] | None:
    if not config.mining.exclude_file:
        return []
    found = verdicts.read(Path(config.mining.exclude_file))
    pairs = [(anchor, document) for anchor, documents in found.items() for document in documents]
    return pairs if len(pairs) <= _EARLIER else None


def _yaml(tree: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    return text
