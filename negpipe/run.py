"""A run in Python: its config, its stages, and their output as data.

    run = negpipe.Run("scifact.yaml")          # or a run directory: negpipe.Run("runs/scifact")
    run.mine()
    run.rows().to_pandas()
    run.select(relative_margin=0.1).rows       # other rules, in memory: writes no file

Tables are Arrow tables: `.to_pandas()` makes a data frame, `duckdb.sql("from rows")` and polars read them directly.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from negpipe import graph
from negpipe.config import kept
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.errors import NegpipeError, count_of
from negpipe.redaction import redact
from negpipe.review.wording import filled_in

if TYPE_CHECKING:
    import pyarrow as pa

    from negpipe.engine.progress import Reporter
    from negpipe.engine.stage import Context
    from negpipe.plan.estimate import Plan
    from negpipe.review.audit import Audit
    from negpipe.review.calibrate import Calibration, Recommendation, Setting
    from negpipe.review.explain import Explanation
    from negpipe.review.quality import Quality
    from negpipe.rows.exports import Exported


@dataclass(frozen=True)
class Selection:
    """The result of other rules on the same candidates.

    Attributes:
        rows: training rows, as in `Run.rows`.
        ledger: counts of every anchor, as in `Run.ledger`.
        config: the run's config with these rules.
    """

    rows: pa.Table
    ledger: pa.Table
    config: Config

    def __repr__(self) -> str:
        anchors = len(self.ledger["anchor_id"].unique())
        return f"Selection({count_of(self.rows.num_rows, 'row')} of {count_of(anchors, 'anchor')})"


class Calibrated(NamedTuple):
    """The result of `Run.calibrate`: `calibration.estimates` has the leak and hardness of every setting,
    `recommendation.chosen` is one of them."""

    calibration: Calibration
    recommendation: Recommendation


Method = TypeVar("Method", bound=Callable[..., Any])


def _named(method: Method) -> Method:
    """Put the run into the commands that the errors of its method suggest."""

    @wraps(method)
    def call(run: Run, /, *args: Any, **options: Any) -> Any:
        try:
            return method(run, *args, **options)
        except NegpipeError as error:
            error.args = (filled_in(str(error), run._typed()),)
            raise

    return cast("Method", call)


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python; a path as text."""
    return value.item() if hasattr(value, "item") else str(value)


class Run:
    """A run directory and its config. Creating it only reads the config.

    Args:
        config: a path, a name in configs/, a run directory, or a mapping of settings.
        overrides: `key.path=value` strings, or a single one.
        progress: where long methods show their progress. True: a bar on a terminal or in a notebook, else lines on
            standard error. False: nowhere. None: a bar on a terminal, else lines in the log (logger `negpipe`, INFO).

    Raises:
        negpipe.errors.ConfigError: the config is not valid.

    Every method that reads the output of a stage raises `negpipe.errors.MissingStageError` if that stage is not up to
    date; the message names the command to run.
    """

    def __init__(
        self,
        config: str | Path | dict[str, Any],
        overrides: Sequence[str] = (),
        *,
        progress: bool | None = None,
    ) -> None:
        self._source, self._overrides = config, [overrides] if isinstance(overrides, str) else [*overrides]
        self.config: Config = load_config(config, self._overrides)
        self._progress = progress

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.config.run_dir

    @property
    def model(self) -> str | None:
        """The encoder's model as other libraries load it: its folder if it is on this disk, else its name."""
        from negpipe.encoders import folder_here

        folder = folder_here(self.config.encoder)
        return str(folder) if folder else self.config.encoder.model

    @_named
    def mine(self, only: str | None = None) -> graph.Result:
        """Run every stage that is not up to date, or `only` one: ingest, encode, index, search or triplets.

        Returns:
            the run directory, the folder of the rows, the counts of each stage, and the stages that ran.
        """
        return graph.mine(self.config, only=only, reporter=self._reporter())

    def status(self) -> dict[str, str]:
        """The state of every stage: current, stale, partial, missing, blocked or damaged."""
        return {state.stage: state.state for state in graph.status(self.config)}

    @_named
    def plan(self, *, probe: bool = False) -> Plan:
        """What `mine` would do: parts, seconds and bytes of each stage, and the cost of each index kind.

        Args:
            probe: load the encoder to time it if its speed is unknown.
        """
        from negpipe.plan import estimate

        return estimate.plan(self.config, probe_encoder=probe)

    @_named
    def corpus(self) -> pa.Table:
        """The documents, in the order of their row numbers: id, text, and the columns of data.extra.corpus.

        Mapped from disk, so it takes no memory until it is read.
        """
        from negpipe.data.tables import documents

        with self._context("corpus", "ingest") as context:
            parts = documents(context.manifest("ingest"))
            return _tables(context, parts, ["id", "text"], self.config.data.extra.corpus)

    @_named
    def anchors(self) -> pa.Table:
        """The anchors: id, text, the columns of data.extra.queries, and positives, a list of document ids."""
        import pyarrow as pa

        from negpipe.data.tables import Rows, documents, ragged

        with self._context("anchors", "ingest") as context:
            read = context.manifest("ingest")
            table = _tables(
                context, read.of_kind("anchors"), ["id", "text", "positives"], self.config.data.extra.queries
            )
            rows, offsets = ragged(table["positives"])
            ids = Rows([context.path(part, "table") for part in documents(read)]).strings("id", rows)
            positives = pa.LargeListArray.from_arrays(pa.array(offsets), ids)
            return table.drop_columns("positives").append_column("positives", positives)

    @_named
    def candidates(self) -> pa.Table:
        """The candidates: anchor_id, document_id, rank (0-based) and score, best first for each anchor.

        Excludes candidates found later, in deeper searches for anchors that lacked negatives. Takes about 40 bytes per
        candidate: for a large run, read RUN_DIR/search/*.parquet in pieces.
        """
        import numpy as np
        import pyarrow as pa

        from negpipe.data import candidates
        from negpipe.data.tables import Rows, documents, open_table

        pieces = []
        with self._context("candidates", "search") as context:
            read = context.manifest("ingest")
            corpus = Rows([context.path(part, "table") for part in documents(read)])
            parts = zip(read.of_kind("anchors"), context.manifest("search").of_kind("candidates"), strict=True)
            for anchors, part in parts:
                ids = open_table(context.path(anchors, "table"))["id"]
                for found in candidates.read(context.path(part, "candidates"), ids, score=self.config.mining.score):
                    anchor, rank = np.nonzero(found.rows >= 0)
                    columns = {
                        "anchor_id": ids.take(pa.array(found.anchors[anchor])),
                        "document_id": corpus.strings("id", found.rows[anchor, rank]),
                        "rank": pa.array(rank.astype(np.int32)),
                        "score": pa.array(found.scores[anchor, rank]),
                    }
                    pieces.append(pa.table(columns))
        return pa.concat_tables(pieces)

    @_named
    def rows(self) -> pa.Table:
        """The training rows in the layout of output.format."""
        import pyarrow.parquet as pq

        with self._context("rows", "triplets") as context:
            files = [file for part in context.manifest("triplets").parts for file in part.all("rows")]
            return _joined([pq.read_table(context.store.path(file.path)) for file in files])

    @_named
    def ledger(self) -> pa.Table:
        """One row per anchor (with margin_reference: each, per anchor and positive): candidates seen, taken, dropped
        for each reason, and why it has fewer negatives than requested."""
        import pyarrow.parquet as pq

        from negpipe.stages.triplets import LEDGER

        with self._context("ledger", "triplets") as context:
            parts = context.manifest("triplets").parts
            return _joined([pq.read_table(context.path(part, LEDGER)) for part in parts])

    @_named
    def select(self, **mining: Any) -> Selection:
        """Select negatives from the stored candidates with other settings of `mining`, in memory.

        The run is not changed. The rows are the same that `negpipe mine` would write with these settings.

        Args:
            mining: settings of the section mining: relative_margin=0.1, num_negatives=5.

        Raises:
            negpipe.errors.ConfigError: a setting does not exist, or has an invalid value.
            negpipe.errors.MissingStageError: the settings require more candidates than are stored, or another search.
        """
        from negpipe.engine.state import digests_of
        from negpipe.review import finished
        from negpipe.rows import formats
        from negpipe.select.ledger import ledger
        from negpipe.stages import triplets

        changes = [f"mining.{name}={json.dumps(value, default=_plain)}" for name, value in mining.items()]
        config = load_config(self._source, [*self._overrides, *changes], tell=False)
        with digests_of(config) as digests:
            context = finished.searched(config, digests, "select")
            opened = triplets.open_selection(context)
            books = []

            def units() -> Iterator[Any]:
                for _, some in finished.selected(context, opened):
                    books.append(ledger(some, context.config, opened.corpus, opened.selector, opened.searchable))
                    yield some

            rows = [table for _, table in formats.tables(units(), opened.corpus, context.config)]
        return Selection(_joined(rows), _joined(books), config)

    @_named
    def explain(self, anchor_id: str) -> Explanation:
        """The fate of every candidate of an anchor, named by id or exact text, and the rule behind it.

        Raises:
            negpipe.errors.InputError: no anchor has the id or the text.
        """
        from negpipe.review import finished

        return finished.explain_anchor(self.config, anchor_id)

    @_named
    def export(self, to: str, out: str | Path, **options: Any) -> Exported:
        """Write the rows in the layout of a trainer.

        Args:
            to: flagembedding, nemo, tevatron, ms-swift, distillation, pylate, trec-run, jsonl …
            out: the folder to create, or a file.
            options: shard_rows, compress, run, force and push_to_hub, as in `negpipe export`.
        """
        from negpipe.review import finished
        from negpipe.rows.exports import ExportOptions

        made = ExportOptions(to=to, out=Path(out), **options)
        return finished.export(self.config, made, reporter=self._reporter())

    @_named
    def audit(self, file: str | Path | None = None, *, columns: dict[str, str] | None = None, **options: Any) -> Audit:
        """Check the rows, or those of any miner's `file`, against this run's qrels; `.findings` has the counts.

        Args:
            file: Parquet, JSONL, JSON, CSV or TSV, or a folder; None: the run's own rows.
            columns: columns of the file by field, {"anchor": "question"}; others are guessed.
            options: near, negatives, hub_share and examples, as in `negpipe audit`.
        """
        from negpipe.review import measures
        from negpipe.review.audit import AuditOptions

        return measures.audit_rows(
            self.config, AuditOptions(columns=columns or {}, **options), None if file is None else Path(file)
        )

    @_named
    def quality(self) -> Quality:
        """How well the encoder finds the positives: recall, MRR, nDCG, MAP, ranks and scores."""
        from negpipe.review import measures

        return measures.measure_quality(self.config, reporter=self._reporter())

    @_named
    def calibrate(
        self,
        *,
        coverage: float = 0.9,
        max_leak: float = 0.05,
        settings: Callable[[Config], Sequence[Setting]] | None = None,
        near_anchors: float | None = None,
        second: Run | None = None,
    ) -> Calibrated:
        """Estimate the false negatives of each setting, and recommend one for this encoder.

        Args:
            coverage: minimum share of anchors that get all their negatives.
            max_leak: maximum upper end of the leak's 95 % interval.
            settings: settings to try, from the resolved config; None: the same as `negpipe calibrate`.
            near_anchors: stand-in for hidden positives: positives of anchors with at least this cosine.
            second: stand-in for hidden positives: documents that this run's model ranks above the positive.

        Raises:
            negpipe.errors.InputError: nothing can be tried; the message suggests alternatives.
        """
        from negpipe.review import calibrate, measures

        made = measures.calibrate_settings(
            self.config,
            settings or calibrate.grid,
            near=near_anchors,
            second=second.config if second else None,
            reporter=self._reporter(),
        )
        return Calibrated(made, calibrate.recommend(made, coverage=coverage, max_leak=max_leak))

    def _reporter(self) -> Reporter:
        from negpipe.review import progress

        return progress.reporter(self._progress)

    def _typed(self) -> str:
        """How a command line refers to this run."""
        if not isinstance(self._source, dict):
            return shlex.join(
                [str(self._source), *(word for one in self._overrides for word in ("--set", redact(one)))]
            )
        return shlex.quote(str(self.path)) if kept.path_in(self.path).is_file() else "CONFIG"

    @contextmanager
    def _context(self, wanted: str, last: str) -> Iterator[Context]:
        from negpipe.engine.state import digests_of
        from negpipe.review import finished

        with digests_of(self.config) as digests:
            yield finished.current(self.config, digests, wanted, last=last)


def _tables(context: Context, parts: Sequence[Any], names: list[str], extra: Sequence[str]) -> pa.Table:
    """Columns of the parts, then those kept by data.extra, which have a prefix on disk."""
    from negpipe.data.tables import EXTRA, open_table

    stored = [*names, *(EXTRA + name for name in extra)]
    tables = [open_table(context.path(part, "table")).select(stored) for part in parts]
    return _joined(tables).rename_columns([*names, *extra])


def _joined(tables: list[pa.Table]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(tables).unify_dictionaries() if tables else pa.table({})
