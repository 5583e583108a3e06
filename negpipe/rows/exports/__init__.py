"""Exports: units → the exact files that a trainer's own loader opens.

Guarantees, for every layout: ids and scores as `triplets` has them, where the layout has room; units without the
negatives that a row needs are left out and counted, by reason; no NaN or Infinity in JSON; the output appears whole
under its name or not at all; memory holds one block of units, whatever the size of the corpus and the output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from negpipe.config.schema import Config
from negpipe.data import moments
from negpipe.data.tables import Rows
from negpipe.encoders.vectors import NOT_EXACT
from negpipe.errors import ConfigError, InputError
from negpipe.rows.exports import card, distillation, flagembedding, nemo, ranking, rows, swift, tevatron
from negpipe.rows.exports.blocks import Slices
from negpipe.rows.exports.files import published
from negpipe.rows.exports.job import Job, Layout, described

logger = logging.getLogger(__name__)

LAYOUTS: Mapping[str, Layout] = {
    "flagembedding": flagembedding.LAYOUT,
    "nemo": nemo.LAYOUT,
    "tevatron": tevatron.LAYOUT,
    "tevatron-passages": tevatron.PASSAGES,
    "ms-swift": swift.EMBEDDING,
    "ms-swift-reranker": swift.RERANKER,
    "distillation": distillation.LAYOUT,
    "pylate": distillation.PYLATE,
    "trec-run": ranking.LAYOUT,
    "sentence-transformers": rows.SENTENCE_TRANSFORMERS,
    "jsonl": rows.JSONL,
    "hub": rows.HUB,
}
_FILE_SUFFIXES = (".jsonl", ".json", ".gz", ".parquet", ".trec", ".run", ".txt", ".tsv")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to export.

    Attributes:
        to: name of the layout.
        out: the folder to make; or a file, where its suffix is the layout's and one file holds everything.
        shard_rows: rows a file, at most.
        compress: gzip text.
        run: tevatron, tevatron-passages: write the stored ranking too.
        force: replace what is at `out`.
        push_to_hub: hub: repository to upload to; it is made private if it is new.

    Raises:
        ConfigError: the options do not go together.
    """

    to: str
    out: Path
    shard_rows: int | None = None
    compress: bool = False
    run: bool = False
    force: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for wrong, message in self._problems():
            if wrong:
                raise ConfigError(message)

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.to]

    @property
    def single(self) -> bool:
        """Whether `out` names a file."""
        suffix, name = self.layout.suffix, self.out.name
        return suffix is not None and (name.endswith(suffix) or (self.layout.text and name.endswith(f"{suffix}.gz")))

    @property
    def gzip(self) -> bool:
        return self.compress or (self.single and self.out.suffix == ".gz")

    def _problems(self) -> Iterator[tuple[bool, str]]:
        yield self.to not in LAYOUTS, f"--to {self.to}: expected one of {', '.join(LAYOUTS)}"
        yield self.shard_rows is not None and self.shard_rows < 1, "--shard-rows: expected 1 or more"
        yield self.compress and not self.layout.text, f"--gzip: {self.to} writes Parquet, which is compressed already"
        yield (
            self.run and not self.layout.runs,
            f"--run: {self.to} has no run file, tevatron has; see --to trec-run",
        )
        yield self.push_to_hub is not None and self.to != "hub", f"--push-to-hub goes with --to hub, not {self.to}"
        several = self.run or self.shard_rows is not None
        yield self.single and several, f"--out {self.out} names one file, --shard-rows and --run make several"
        file = self.out.suffix in _FILE_SUFFIXES and not self.single
        other = f", or of a file, with {self.layout.suffix}" if self.layout.suffix else ""
        yield file, f"--out {self.out} is no file of {self.to}: give the name of a folder, without a suffix{other}"
        plain = self.single and self.compress and self.out.suffix != ".gz"
        yield plain, f"--gzip: give --out a name that ends in .gz, not {self.out.name}"


@dataclass
class _Tally:
    """What went by."""

    units: int = 0
    without: int = 0
    short: int = 0
    negatives: int = 0
    unscored: int = 0
    scores: dict[str, list[moments.Moments]] = field(default_factory=lambda: {"positives": [], "negatives": []})

    def watch(self, slices: Slices, layout: Layout, config: Config) -> Slices:
        for found, ranked in slices:
            units = ranked.only_negatives()
            left_out = ~layout.has_rows(ranked, config)
            none = (units.counts == 0) & ~units.given_up
            used = np.repeat(units.counts > 0, np.diff(units.positive_offsets))
            known = np.isfinite(units.negative_scores)
            self.units += len(left_out)
            self.without += int(np.count_nonzero(left_out & none))
            self.short += int(np.count_nonzero(left_out & ~none))
            self.negatives += len(known)
            self.unscored += int(np.count_nonzero(~known))
            self.scores["positives"].append(moments.of(units.positive_scores[used]))
            self.scores["negatives"].append(moments.of(units.negative_scores[known]))
            yield found, ranked


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        rows: lines or records.
        units: anchors; with `margin_reference: each`, pairs of anchor and positive.
        without: units that were left out, since they have no negative.
        short: units that were left out, since they have too few.
    """

    out: Path
    rows: int
    units: int
    without: int
    short: int

    @property
    def left_out(self) -> int:
        return self.without + self.short


def export(
    config: Config,
    options: Options,
    corpus: Rows,
    slices: Slices,
    *,
    counts: Mapping[str, int],
    encoder: Mapping[str, str],
) -> Exported:
    """Write one export.

    Args:
        corpus: ingest's documents.
        slices: every anchor's candidates and units, see `Selector.slices`.
        counts, encoder: facts for the dataset card, in words.

    Raises:
        ConfigError: `out` is there, or holds what must not be replaced.
        InputError: no anchor has a negative; the hub refused.
        StorageError: the file system refused.
    """
    for root in {config.run_dir, config.store or config.run_dir}:
        _check_place(options, root)
    tally = _Tally()
    with published(options.out, single=options.single, force=options.force) as folder:
        job = Job(
            config,
            corpus,
            tally.watch(slices, options.layout, config),
            folder,
            options.shard_rows,
            options.gzip,
            options.run,
        )
        written = options.layout.write(job)
        if not written:
            raise InputError(
                f"none of {tally.units:,} anchors has the negatives that a row of '{options.to}' needs",
                field="mining",
                remedy="Widen the window, lower the margins, or ask for fewer negatives",
            )
        if options.to == "hub":
            _write_card(folder, config, options, written, tally, counts, encoder)
    done = Exported(options.out, written, tally.units, tally.without, tally.short)
    reasons = ((done.without, "without a negative"), (done.short, "with too few negatives"))
    logger.info(
        "export: %s rows of %s %s in %s%s",
        f"{written:,}",
        f"{done.units - done.left_out:,}",
        "pairs" if config.mining.margin_reference == "each" else "anchors",
        options.out,
        "".join(f"; {count:,} {reason} left out" for count, reason in reasons if count),
    )
    _warn(options, tally)
    if options.push_to_hub is not None:
        _push(options.out, options.push_to_hub)
    return done


def describe_encoder(config: Config, digests: Mapping[str, str]) -> dict[str, str]:
    """Facts for the card: the encoder, and what tells its files or vectors from others.

    Args:
        digests: of the model (a hub model's is its resolved revision) or of the vectors, and the model's own prompts,
            by setting.
    """
    named = {
        "backend": config.encoder.backend,
        "model": described(config)["encoder"].get("model", "precomputed vectors"),
    }
    revision = len(digests.get("encoder.model", "")) == 40
    names = {
        "encoder.model": "resolved revision" if revision else "digest of the model's files",
        "encoder.query_prompt": "the model's own query prompt",
        "encoder.passage_prompt": "the model's own passage prompt",
        "encoder.routes": "the model's own routes",
    }
    known = {names.get(name, f"digest of {name}"): digest for name, digest in digests.items()}
    return named | known | ({"cache": NOT_EXACT} if config.encoder.cache else {})


def _check_place(options: Options, run_dir: Path) -> None:
    """--force takes the place of an earlier export, never that of a run or of the folder one stands in."""
    out, run = options.out.resolve(), run_dir.resolve()
    first = out.relative_to(run).parts[:1] if out.is_relative_to(run) else ()
    folders = {"rows", "ledger", "deeper"}
    of_run = any(name[0] == "." or name in folders or (run / ".negpipe" / name).exists() for name in first)
    if of_run or any(place.is_relative_to(out) for place in (run, Path.cwd())):
        raise ConfigError(f"--out {options.out} would replace a folder that is no export: name another place")


def _warn(options: Options, tally: _Tally) -> None:
    if tally.unscored:
        logger.warning("export: %s of %s negatives have no score (null)", f"{tally.unscored:,}", f"{tally.negatives:,}")
    if options.gzip and not options.layout.reads_gzip:
        logger.warning("export: the loader of %s opens plain files only: unpack them first", options.to)


def _write_card(
    folder: Path,
    config: Config,
    options: Options,
    written: int,
    tally: _Tally,
    counts: Mapping[str, int],
    encoder: Mapping[str, str],
) -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(next(folder.glob("data/*.parquet")))
    card.write(
        folder,
        config,
        name=options.push_to_hub or "FOLDER_OR_REPOSITORY",
        counts={
            "rows": written,
            **counts,
            "anchors or pairs without a negative, left out": tally.without,
            "anchors or pairs with too few negatives, left out": tally.short,
        },
        scores={side: moments.summary(moments.merge(pieces)) for side, pieces in tally.scores.items()},
        encoder=encoder,
        columns=[(column.name, str(column.type)) for column in schema],
    )


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        done: Any = api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"the hub did not take {folder} as {repository}: {error}",
            remedy="Log in with `hf auth login` or set HF_TOKEN; the folder is whole and can be uploaded by hand",
        ) from error
    logger.info("export: pushed to %s", done.commit_url)
