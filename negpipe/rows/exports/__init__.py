"""Exports: units → the exact files that a trainer's loader opens.

Guarantees, for every layout: ids and scores are those of `triplets`, if the layout supports them; units that lack the
negatives for a row are left out and counted by reason; no NaN or Infinity in JSON; the output is written atomically;
memory holds one block of units, whatever the size of the corpus and the output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from negpipe.config import kept
from negpipe.config.schema import Config
from negpipe.data import moments
from negpipe.data.tables import Rows
from negpipe.encoders.vectors import NOT_EXACT
from negpipe.errors import ConfigError, InputError, count_of
from negpipe.rows.exports import card, distillation, flagembedding, nemo, ranking, rows, swift, tevatron
from negpipe.rows.exports.blocks import Slices
from negpipe.rows.exports.files import published
from negpipe.rows.exports.job import ExportJob, ExportLayout, described

logger = logging.getLogger(__name__)

LAYOUTS: Mapping[str, ExportLayout] = {
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
_WRITTEN = (".jsonl", ".json", ".gz", ".parquet", ".trec", ".tsv", ".md")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        to: name of the layout.
        out: the folder to create; or a file, if it has the suffix of the layout and one file is enough.
        shard_rows: maximum rows per file.
        compress: gzip text.
        run: tevatron, tevatron-passages: also write the stored ranking.
        force: overwrite existing output.
        push_to_hub: hub: repository to upload to; created as private if new.

    Raises:
        ConfigError: the options are inconsistent.
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
    def layout(self) -> ExportLayout:
        return LAYOUTS[self.to]

    @property
    def single(self) -> bool:
        """Whether `out` is a file."""
        suffix, name = self.layout.suffix, self.out.name
        return suffix is not None and (name.endswith(suffix) or (self.layout.text and name.endswith(f"{suffix}.gz")))

    @property
    def gzip(self) -> bool:
        return self.compress or (self.single and self.out.suffix == ".gz")

    def _problems(self) -> Iterator[tuple[bool, str]]:
        yield self.to not in LAYOUTS, f"--to {self.to}: expected one of {', '.join(LAYOUTS)}"
        yield self.shard_rows is not None and self.shard_rows < 1, "--shard-rows: expected 1 or more"
        yield self.compress and not self.layout.text, f"--gzip: {self.to} writes Parquet, which is already compressed"
        yield (
            self.run and not self.layout.runs,
            f"--run: {self.to} has no run file; use tevatron, or --to trec-run",
        )
        yield self.push_to_hub is not None and self.to != "hub", f"--push-to-hub requires --to hub, not {self.to}"
        several = self.run or self.shard_rows is not None
        yield self.single and several, f"--out {self.out} is one file, but --shard-rows and --run write several"
        file = self.out.suffix in _FILE_SUFFIXES and not self.single
        other = f", or a file with {self.layout.suffix}" if self.layout.suffix else ""
        yield file, f"--out {self.out} is not a file for {self.to}: use a folder without a suffix{other}"
        plain = self.single and self.compress and self.out.suffix != ".gz"
        yield plain, f"--gzip: --out must end in .gz, not {self.out.name}"


@dataclass
class _Tally:
    """Counts of an export."""

    units: int = 0
    without: int = 0
    short: int = 0
    negatives: int = 0
    unscored: int = 0
    scores: dict[str, list[moments.Moments]] = field(default_factory=lambda: {"positives": [], "negatives": []})

    def watch(self, slices: Slices, layout: ExportLayout, config: Config) -> Slices:
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
    """The result of an export.

    Attributes:
        rows: lines or records.
        units: anchors; with `margin_reference: each`, pairs of anchor and positive.
        without: units left out because they have no negatives.
        short: units left out because they have too few.
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
    options: ExportOptions,
    corpus: Rows,
    slices: Slices,
    *,
    counts: Mapping[str, int],
    encoder: Mapping[str, str],
) -> Exported:
    """Write one export.

    Args:
        corpus: ingest's documents.
        slices: candidates and units of every anchor, see `Selector.slices`.
        counts, encoder: facts for the dataset card, in words.

    Raises:
        ConfigError: `out` exists, or contains something that must not be replaced.
        InputError: no anchor has negatives; the hub rejected the upload.
        StorageError: the file system rejected a write.
    """
    for root in {config.run_dir, config.store or config.run_dir}:
        _check_place(options, root)
    if options.force:
        _check_replaced(options, config)
    tally = _Tally()
    with published(options.out, single=options.single, force=options.force) as folder:
        job = ExportJob(
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
                f"none of {tally.units:,} anchors has enough negatives for a row of '{options.to}'",
                field="mining",
                remedy="Widen the window, lower the margins, or lower mining.num_negatives",
            )
        if options.to == "hub":
            _write_card(folder, config, options, written, tally, counts, encoder)
    done = Exported(options.out, written, tally.units, tally.without, tally.short)
    reasons = ((done.without, "without negatives"), (done.short, "with too few negatives"))
    logger.info(
        "export: %s of %s to %s%s",
        count_of(written, "row"),
        count_of(done.units - done.left_out, "pair" if config.mining.margin_reference == "each" else "anchor"),
        options.out,
        "".join(f"; {count:,} {reason} left out" for count, reason in reasons if count),
    )
    _warn(options, tally)
    if options.push_to_hub is not None:
        _push(options.out, options.push_to_hub)
    return done


def describe_encoder(config: Config, digests: Mapping[str, str]) -> dict[str, str]:
    """Facts for the card: the encoder, and the identity of its files or vectors.

    Args:
        digests: of the model (for a hub model, its resolved revision) or of the vectors, and the model's prompts, by
            setting.
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


def _check_place(options: ExportOptions, run_dir: Path) -> None:
    """--force replaces an earlier export, but never a run or a parent of the working directory."""
    out, run = options.out.resolve(), run_dir.resolve()
    first = out.relative_to(run).parts[:1] if out.is_relative_to(run) else ()
    folders = {"rows", "ledger", "deeper"}
    of_run = any(name[0] == "." or name in folders or (run / ".negpipe" / name).exists() for name in first)
    if of_run or any(place.is_relative_to(out) for place in (run, Path.cwd())):
        raise ConfigError(f"--out {options.out} would replace a folder that is not an export: choose another path")


def _check_replaced(options: ExportOptions, config: Config) -> None:
    """--force replaces nothing that the config reads, and nothing that no export can have written."""
    out = options.out.resolve()
    if not out.exists():
        return
    for read in (path.resolve() for path in kept.inputs(config)):
        if read.is_relative_to(out) or out.is_relative_to(read):
            raise ConfigError(f"--out {options.out} would replace what the config reads, {read}: choose another path")
    written = [inner for inner in out.rglob("*") if not inner.is_dir()] if out.is_dir() else [out]
    foreign = [file for file in written if file.suffix not in _WRITTEN]
    if foreign or out.is_file() != options.single:
        found = f"contains {foreign[0].name}" if foreign else f"is a {'file' if out.is_file() else 'folder'}"
        raise ConfigError(f"--out {options.out} {found}, which is not an export: delete it, or choose another path")


def _warn(options: ExportOptions, tally: _Tally) -> None:
    if tally.unscored:
        logger.warning("export: %s of %s negatives have no score (null)", f"{tally.unscored:,}", f"{tally.negatives:,}")
    if options.gzip and not options.layout.reads_gzip:
        logger.warning("export: the loader of %s opens plain files only: decompress them first", options.to)


def _write_card(
    folder: Path,
    config: Config,
    options: ExportOptions,
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
            f"the hub rejected {folder} as {repository}: {error}",
            remedy="Log in with `hf auth login` or set HF_TOKEN; the folder is complete and can be uploaded manually",
        ) from error
    logger.info("export: pushed to %s", done.commit_url)
