"""triplets: candidates → training rows, and a ledger of what became of every candidate.

One task turns one part of candidates into one `part-NNNNN.parquet` in `triplets/` (published all at
once) and one part in `ledger/`, a row an anchor. Anchors are worked through in slices: memory does not
grow with the part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from negpipe import candidates, mining
from negpipe.candidates import Candidates
from negpipe.config import Config
from negpipe.errors import InputError
from negpipe.fingerprint import key
from negpipe.manifest import Part
from negpipe.mining import Fate
from negpipe.publication import staging
from negpipe.stage import Context, Made, Progress, Publisher, Stage, Task
from negpipe.tables import Rows, documents, open_table, ragged

VERSION = 1


def _settings(config: Config) -> dict[str, Any]:
    values = {f"mining.{name}": value for name, value in config.mining.model_dump(mode="json").items()}
    # A fixed order, whatever the order in the file.
    values["mining.exclude"] = sorted(config.mining.exclude)
    if config.mining.sampling_strategy != "top":
        values["seed"] = config.seed
    return values | {f"output.{name}": value for name, value in config.output.model_dump(mode="json").items()}


def _plan(context: Context) -> Iterator[Task]:
    anchors = context.manifest("ingest").of_kind("anchors")
    candidates = context.manifest("search").of_kind("candidates")
    for number, (anchor_part, part) in enumerate(zip(anchors, candidates, strict=True)):
        # The name is part of the task: the same rows under another number are another file.
        name = key("triplets", VERSION, context.key, number, part.identity(), anchor_part.identity())
        yield Task(
            name,
            "triplets",
            part.rows,
            {"anchors": anchor_part.path, "candidates": part.path, "number": number, "stage_key": context.key},
        )


@contextmanager
def _open(context: Context) -> Iterator[Rows]:
    yield Rows([context.file(part) for part in documents(context.manifest("ingest"))])


def _run(task: Task, corpus: Rows, context: Context, publish: Publisher, progress: Progress) -> Made:
    writer = _Slices(task, corpus, context, progress)
    publish(
        ".parquet",
        writer.write,
        folder=staging("triplets", task.payload["stage_key"]),
        name=f"part-{task.payload['number']:05d}.parquet",
    )
    publish(".parquet", writer.write_ledger, folder="ledger")
    return Made(writer.rows, writer.facts())


class _Slices:
    """Selects, gathers and writes slice by slice, and keeps the counts."""

    def __init__(self, task: Task, corpus: Rows, context: Context, progress: Progress) -> None:
        self._corpus, self._config, self._progress = corpus, context.config, progress
        self._anchors = open_table(context.run_dir / task.payload["anchors"])
        self._candidates = context.run_dir / task.payload["candidates"]
        self._ledger: list[Any] = []
        self._fates = np.zeros(len(Fate), np.int64)
        self._scores = {"positive": _no_moments(), "negative": _no_moments()}
        self.rows = 0

    def write(self, file: BinaryIO) -> None:
        import pyarrow.parquet as pq

        with pq.ParquetWriter(file, _schema(), compression="zstd", compression_level=1, store_schema=False) as out:
            start = 0
            for found in candidates.read(self._candidates):
                anchors = self._anchors.slice(start, len(found.rows))
                table = self._select(anchors, found)
                out.write_table(table, row_group_size=max(1, table.num_rows))
                self.rows += table.num_rows
                self._progress(anchors.num_rows, "")
                start += anchors.num_rows

    def write_ledger(self, file: BinaryIO) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.concat_tables(self._ledger), file, compression="zstd", store_schema=False)

    def facts(self) -> dict[str, Any]:
        fates = {fate.name.lower(): int(self._fates[fate]) for fate in Fate if self._fates[fate]}
        short = sum(int(np.count_nonzero(table["shortage"].to_numpy(zero_copy_only=False))) for table in self._ledger)
        return {"fates": fates, "short_anchors": short, "scores": self._scores}

    def _select(self, anchors: Any, found: Candidates) -> Any:
        rules = _rules(self._config)
        fates = mining.select(
            found.rows,
            found.scores,
            self._excluded(anchors, found.rows),
            mining.reference_scores(found.positive_scores, found.offsets, "min"),
            self._uniform(anchors, found.rows),
            rules,
        )
        self._account(anchors, fates, rules)
        return self._table(anchors, found, fates == Fate.TAKEN)

    def _excluded(self, anchors: Any, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        wanted = set(self._config.mining.exclude)
        found: dict[Fate, npt.NDArray[np.bool_]] = {}
        known, offsets = ragged(anchors["known"])
        by_id, _ = ragged(anchors["known_by_id"])
        if "positive_id" in wanted:
            found[Fate.POSITIVE_ID] = mining.contains(rows, *_where(known, offsets, by_id))
        if "positive_text" in wanted:
            found[Fate.POSITIVE_TEXT] = mining.contains(rows, *_where(known, offsets, ~by_id))
        shared, shared_offsets = ragged(anchors["shared"])
        if "shared_anchor" in wanted:
            found[Fate.SHARED_ANCHOR] = mining.contains(rows, shared, shared_offsets)
        if wanted & {"positive_normalized", "anchor_text"}:
            normalized = self._corpus.numbers("normalized", np.maximum(rows, 0))
            if "positive_normalized" in wanted:
                hashes = self._corpus.numbers("normalized", known)
                found[Fate.POSITIVE_NORMALIZED] = mining.contains(normalized, hashes, offsets)
                if "shared_anchor" in wanted:
                    hashes = self._corpus.numbers("normalized", shared)
                    found[Fate.SHARED_ANCHOR] |= mining.contains(normalized, hashes, shared_offsets)
            if "anchor_text" in wanted:
                found[Fate.ANCHOR_TEXT] = normalized == anchors["normalized"].to_numpy()[:, None]
        return mining.exclusions(rows.shape, found)

    def _uniform(self, anchors: Any, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        if self._config.mining.sampling_strategy == "top":
            return None
        documents = self._corpus.numbers("id_hash", np.maximum(rows, 0))
        return mining.uniform(self._config.seed, anchors["id_hash"].to_numpy(), documents)

    def _account(self, anchors: Any, fates: npt.NDArray[np.uint8], rules: mining.Rules) -> None:
        import pyarrow as pa

        counts = mining.counts(fates)
        taken = counts[:, Fate.TAKEN]
        short = taken < rules.num_negatives
        if rules.on_shortage == "fail" and short.any():
            names = ", ".join(repr(name) for name in anchors["id"].filter(pa.array(short)).to_pylist()[:5])
            raise InputError(
                f"{int(short.sum())} anchors of this part have fewer than {rules.num_negatives} negatives: {names}",
                field="mining.on_shortage",
                remedy="Widen the window or the margins, deepen search.depth, or set mining.on_shortage: keep or drop",
            )
        self._fates += counts.sum(axis=0)
        depth = np.where(fates == Fate.TAKEN, np.arange(fates.shape[1])[None, :], -1).max(axis=1, initial=-1)
        columns = {fate.name.lower(): counts[:, fate] for fate in Fate if fate not in (Fate.PADDING, Fate.TAKEN)}
        self._ledger.append(
            pa.table(
                {
                    "anchor_id": anchors["id"].cast(pa.string()),
                    "candidates": fates.shape[1] - counts[:, Fate.PADDING],
                    "taken": taken,
                    **columns,
                    "deepest_rank": pa.array(depth, mask=depth < 0),
                    "shortage": short,
                }
            )
        )

    def _table(self, anchors: Any, found: Candidates, taken: npt.NDArray[np.bool_]) -> Any:
        import pyarrow as pa

        # A row for every (positive, negative) of an anchor, the positive in the outer loop.
        negatives_each, positives_each = taken.sum(axis=1), np.diff(found.offsets)
        per_pair = np.repeat(negatives_each, positives_each)
        pair = np.repeat(np.arange(len(found.positives)), per_pair)
        anchor = np.repeat(np.arange(len(taken)), positives_each * negatives_each)
        where = np.flatnonzero(taken)
        first = np.cumsum(negatives_each) - negatives_each
        cell = where[first[anchor] + _count_within(per_pair)]
        negative, negative_score = found.rows.ravel()[cell], found.scores.ravel()[cell]
        _add_moments(self._scores["negative"], found.scores.ravel()[where])
        _add_moments(self._scores["positive"], found.positive_scores[per_pair > 0])
        string = pa.string()
        anchor_rows, positive_rows = pa.array(anchor), found.positives[pair]
        return pa.table(
            {
                "anchor_id": anchors["id"].take(anchor_rows).cast(string),
                "positive_id": self._corpus.strings("id", positive_rows).cast(string),
                "negative_id": self._corpus.strings("id", negative).cast(string),
                "anchor": anchors["text"].take(anchor_rows).cast(string),
                "positive": self._corpus.strings("text", positive_rows).cast(string),
                "negative": self._corpus.strings("text", negative).cast(string),
                "positive_score": found.positive_scores[pair],
                "negative_score": negative_score,
                "negative_rank": (cell % taken.shape[1]).astype(np.int32),
            },
            schema=_schema(),
        )


def _schema() -> Any:
    import pyarrow as pa

    texts = ("anchor_id", "positive_id", "negative_id", "anchor", "positive", "negative")
    numbers = {"positive_score": pa.float32(), "negative_score": pa.float32(), "negative_rank": pa.int32()}
    return pa.schema({name: pa.string() for name in texts} | numbers)


def _rules(config: Config) -> mining.Rules:
    names = {field.name for field in dataclasses.fields(mining.Rules)}
    return mining.Rules(**{name: value for name, value in config.mining.model_dump().items() if name in names})


def _where(
    values: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The kept values of ragged lists, still ragged."""
    return values[keep], np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int64)


def _count_within(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0, 1, … lengths[0]-1, 0, 1, … lengths[1]-1, …"""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)


def _no_moments() -> dict[str, float | int | None]:
    return {"count": 0, "sum": 0.0, "squares": 0.0, "min": None, "max": None}


def _add_moments(into: dict[str, Any], scores: npt.NDArray[np.float32]) -> None:
    if not len(scores):
        return
    wide = scores.astype(np.float64)
    _merge_moments(
        into,
        {
            "count": len(wide),
            "sum": float(wide.sum()),
            "squares": float((wide**2).sum()),
            "min": float(wide.min()),
            "max": float(wide.max()),
        },
    )


def _merge_moments(into: dict[str, Any], more: dict[str, Any]) -> None:
    if not more["count"]:
        return
    for name in ("count", "sum", "squares"):
        into[name] += more[name]
    for name, pick in (("min", min), ("max", max)):
        into[name] = more[name] if into[name] is None else pick(into[name], more[name])


def _stats(_: Context, parts: list[Part]) -> dict[str, Any]:
    fates: dict[str, int] = {}
    scores = {"positive": _no_moments(), "negative": _no_moments()}
    for part in parts:
        for name, count in part.meta["fates"].items():
            fates[name] = fates.get(name, 0) + count
        for side, moments in part.meta["scores"].items():
            _merge_moments(scores[side], moments)
    candidates = sum(count for name, count in fates.items() if name != "padding")
    taken = fates.pop("taken", 0)
    fates.pop("padding", None)
    return {
        "triplets": sum(part.rows for part in parts),
        "candidates": candidates,
        "negatives": taken,
        "short_anchors": sum(part.meta["short_anchors"] for part in parts),
        "drops": dict(sorted(fates.items(), key=lambda item: -item[1])),
        "scores": {side: _summary(moments) for side, moments in scores.items()},
    }


def _summary(moments: dict[str, Any]) -> dict[str, Any]:
    count = moments["count"]
    if not count:
        return {"count": 0}
    mean = moments["sum"] / count
    deviation = max(0.0, moments["squares"] / count - mean**2) ** 0.5
    return {"count": count, "mean": mean, "std": deviation, "min": moments["min"], "max": moments["max"]}


STAGE = Stage(
    name="triplets",
    version=VERSION,
    inputs=("ingest", "search"),
    settings=_settings,
    plan=_plan,
    open=_open,
    run=_run,
    stats=_stats,
    swapped=True,
)
