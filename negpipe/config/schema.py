"""The config: one YAML file with typed keys; unknown keys are errors.

Key names are fixed by the tables in docs/reference/config. Whether a key is part of a stage's identity (a change
re-runs the stage) is decided by the stages, not here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from negpipe.config import presets
from negpipe.config.bucket import bucket_url, working_folder
from negpipe.config.encoder import OF_RUNNING, Encoder
from negpipe.config.executor import Executor, Resources
from negpipe.config.section import Section
from negpipe.config.training import DISTILLING, EVAL_SPLIT, TAKES, Ablate, Train
from negpipe.config.values import Device, Folder, Size
from negpipe.errors import ConfigError

_OWN_NAMES = ("id", "score", "rank", "grade")

ANCHOR = "anchor."
"""Prefix of an anchor's column in `mining.never_same` and `only_same`."""

Exclusion = Literal["positive_id", "positive_text", "positive_normalized", "shared_anchor", "anchor_text"]


class Dialect(Section):
    """Format of CSV and TSV files."""

    header: tuple[str, ...] | None = None
    """Column names of files without a header, for example [id, text]; null: the first line."""
    quoting: Literal["standard", "none"] = "standard"
    """standard: fields may be in double quotes. none: quotes are ordinary characters."""
    delimiter: str | None = None
    """tab, comma, semicolon, pipe or one character; null: comma for .csv, else tab."""

    @model_validator(mode="after")
    def _sign(self) -> Dialect:
        if self.delimiter is not None and len(self.sign(self.delimiter)) != 1:
            raise ValueError(f"delimiter '{self.delimiter}': use tab, comma, semicolon, pipe or one character")
        if self.header is not None and len({*self.header}) < max(1, len(self.header)):
            raise ValueError("header: column names must be unique")
        return self

    def sign(self, otherwise: str) -> str:
        """The delimiter, or `otherwise` if none is set."""
        name = self.delimiter or otherwise
        return {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}.get(name, name)


class Table(Section):
    """Location of one table: files, a URL or a hub dataset."""

    path: str | tuple[str, ...]
    """File (.jsonl, .json, .csv, .tsv, .txt, .parquet, also .gz, .bz2, .xz, .zst), pattern such as docs-*.jsonl, list
    of files, URL or hub dataset."""
    subset: str | None = None
    """Hub dataset configuration."""
    split: str = "train"
    """Hub dataset split."""
    table: Dialect | None = None
    """Format of its CSV or TSV files; null: data.table."""


def _table(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | list | tuple) else value


_Table = Annotated[Table, BeforeValidator(_table)]


class Columns(Section):
    """Names of the columns to read. The defaults are BEIR's."""

    corpus_id: str | None = "_id"
    """Document id; null: a digest of the text."""
    query_id: str = "_id"
    """Query id."""
    query_text: str = "text"
    """Query text."""
    qrels_query_id: str = "query-id"
    """Query id in the qrels."""
    qrels_corpus_id: str = "corpus-id"
    """Document id in the qrels."""
    grade: str = "score"
    """Relevance grade in the qrels; a missing column counts as 1."""
    anchor: str = "anchor"
    """Anchor text of a pair row."""
    positive: str = "positive"
    """Positive text of a pair row."""
    anchor_id: str | None = None
    """Anchor id of a pair row; null: a digest of the text."""
    positive_id: str | None = None
    """Positive id of a pair row; null: a digest of the text."""
    negative: str | None = "negative"
    """Negative texts of a pair row, also negative_1, negative_2 …; null: not read."""
    negative_id: str | None = None
    """Their ids, also negative_1_id …; null: digests of the texts."""
    label: str | None = None
    """Grade of a pair row's positive, or list of grades if it has several; null: 1."""


class Extra(Section):
    """Additional columns of the source."""

    corpus: tuple[str, ...] = ()
    """Columns of the corpus, or of pair rows, for example [title, url]."""
    queries: tuple[str, ...] = ()
    """Columns of the queries, or of pair rows, for example [lang]."""

    @model_validator(mode="after")
    def _names(self) -> Extra:
        for side, names in self:
            for name in names:
                if name in _OWN_NAMES:
                    raise ValueError(f"'{name}' is a column name reserved by negpipe: rename it in the source")
                if names.count(name) > 1:
                    raise ValueError(f"{side} lists '{name}' twice")
        return self

    def require(self, side: str, column: str, setting: str) -> None:
        """Raise ValueError if a column that a setting requires is not kept. `side`: corpus or queries."""
        kept = getattr(self, side)
        if column not in kept:
            whole = ", ".join((*kept, column))
            raise ValueError(
                f"{setting} requires the column '{column}', which is not kept: set data.extra.{side}: [{whole}]"
            )


class Data(Section):
    """Corpus, anchors and known positives."""

    format: Literal[
        "auto",
        "beir",
        "mteb",
        "columns",
        "llama_index",
        "pairs",
        "flagembedding",
        "tevatron",
        "dpr",
        "ms-swift",
        "nemo",
        "pylate",
    ] = "auto"
    """auto: detected from data.path, as shown by `negpipe inspect`. beir: folder or hub dataset with corpus, queries,
    qrels. mteb: one repository with all three. pairs: rows of anchor and positive text. columns: three tables with
    data.columns. Others: the format of that program."""
    path: str | tuple[str, ...] | None = None
    """Local folder or file, pattern such as rows-*.jsonl, list of files, URL, or hub dataset."""
    subset: str | None = None
    """Hub dataset configuration (mteb: the part before -corpus)."""
    revision: str | None = None
    """Hub dataset revision; null: the latest."""
    corpus: _Table | None = None
    """Corpus table (columns), or an extra corpus (pairs, flagembedding)."""
    queries: _Table | None = None
    """Query table (columns)."""
    qrels: _Table | None = None
    """Relevance table (columns)."""
    streaming: bool = False
    """Stream hub datasets without a local copy, for datasets larger than the disk."""
    columns: Columns = Columns()
    table: Dialect = Dialect()
    split: str = "train"
    """Split of qrels that define anchors, or split of pair rows to read."""
    text: str = "{title} {text}"
    """Template of a document's text from its columns."""
    extra: Extra = Extra()
    """Columns to keep; rows have them as positive_title, anchor_lang."""
    part_rows: int = Field(16384, ge=1)
    """Approximate rows per part (half to twice as many)."""
    min_grade: float = 1
    """Minimum grade of a positive."""
    add_positives: bool = True
    """Add positives missing from the corpus as candidates."""
    on_empty: Literal["error", "skip"] = "error"
    """Rows with an empty or null text. skip: reject them."""
    on_unknown_id: Literal["error", "skip"] = "error"
    """Judgments of unknown ids. skip: reject them."""
    max_bad_rows: int = Field(0, ge=0)
    """Maximum number of bad rows (malformed, wrong type, empty, unknown ids): they are rejected and listed in
    rejected.jsonl; more are an error."""

    @model_validator(mode="after")
    def _paths(self) -> Data:
        missing = [name for name in ("corpus", "queries", "qrels") if getattr(self, name) is None]
        if self.format == "columns" and missing:
            raise ValueError(f"format 'columns' requires data.{missing[0]}: a file, URL or hub dataset")
        if self.format not in ("auto", "columns") and self.path is None:
            raise ValueError(f"format '{self.format}' requires data.path: a local folder or file, URL or hub dataset")
        if self.path is not None and not self.path:
            raise ValueError("data.path is empty")
        if self.format == "auto" and self.path is None and missing:
            raise ValueError("the source is missing: set data.path, or data.corpus, data.queries and data.qrels")
        if self.format == "flagembedding" and self.extra.corpus and self.corpus is None:
            raise ValueError("data.extra.corpus requires data.corpus: texts in pos and neg lists have no columns")
        return self


def _kind(value: str) -> str:
    # FAISS calls an exact index Flat.
    return value.lower() if value.lower() in ("flat", "stream", "auto") else value


class Index(Section):
    """The index of the vectors."""

    kind: Annotated[str, AfterValidator(_kind)] = Field("flat", min_length=1)
    """flat: an exact index file that faiss.read_index opens. stream: exact, directly from the embedding parts, without
    a second copy. auto: chosen by the size of the job; the log shows why. Else a FAISS factory string, such as
    IVF1024,Flat: approximate, with measured recall."""
    min_recall: float = Field(0.98, gt=0, le=1)
    """Minimum recall of an approximate index, over the stored depth and the window; less is an error."""
    recall_anchors: int = Field(1000, ge=1)
    """Sampled anchors to search exactly to measure recall."""
    nprobe: int | None = Field(None, ge=1)
    """Lists to probe per anchor (HNSW: efSearch); null: the fewest that reach min_recall."""
    shard_size: Size = Field(256 * 2**20, ge=1)
    """Size of the vectors in one file of an approximate index, as float32; filling it takes three times that memory.
    Part of the identity."""
    trained: str | None = None
    """Trained FAISS index of this kind to reuse, such as index/KEY.faiss of another run; null: train on a sample of the
    corpus."""

    @property
    def approximate(self) -> bool:
        """Whether the kind, once resolved, may miss candidates."""
        return self.kind not in ("flat", "stream")

    @model_validator(mode="after")
    def _fits(self) -> Index:
        if self.trained and self.kind in ("flat", "stream", "auto"):
            raise ValueError("index.trained requires index.kind to be its factory string")
        return self


def _cpu_or_gpu(value: str) -> str:
    if not value.startswith(("cpu", "cuda")):
        raise ValueError(f"'{value}' is not supported for search: use cpu, cuda or cuda:1 …")
    return value


class Search(Section):
    """Depth of the stored candidates, and where to search."""

    depth: int | None = Field(None, ge=1)
    """Candidates per anchor; null: mining.range_max + 64, rounded up to a multiple of 64."""
    device: Annotated[Device, AfterValidator(_cpu_or_gpu)] | None = None
    """Device for large searches: cpu, or one GPU, cuda, cuda:1 …; null: the encoder's first device, which is a GPU if
    available. Changes no byte."""
    slice_documents: int | None = Field(None, ge=1)
    """Search the corpus in slices of this many documents, rounded to parts or index shards, and merge the results: each
    task reads one slice, for a corpus that does not fit one machine's disk or cache. null: each task reads the entire
    corpus. Changes no byte."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Mining(Section):
    """Which candidates become negatives."""

    compat: Literal["sentence-transformers", "flagembedding", "nemo", "nv-retriever"] | None = None
    """Preset: take missing settings from another miner; null: the defaults of this table."""
    range_min: int = Field(0, ge=0)
    """First rank of the window, 0-based."""
    range_max: int | None = Field(192, ge=1)
    """End of the window, exclusive; null: range_min + num_negatives + the most positives of an anchor, with 10 *
    num_negatives if a margin or max_score is set."""
    rank_over: Literal["raw", "survivors"] = "survivors"
    """raw: rank among all documents. survivors: rank among those that passed every filter."""
    num_negatives: int = Field(3, ge=0)
    """Mined negatives per anchor; 0 for random ones only (num_random)."""
    num_random: int = Field(0, ge=0)
    """Additional random negatives per anchor, by seed; the same exclusions, no cutoffs."""
    depth: Annotated[int, Field(ge=1)] | Literal["range_max+max_positives"] | None = None
    """Candidates per anchor to consider; range_max+max_positives: with room for the most positives of an anchor; null:
    all stored."""
    max_depth: int | None = Field(1024, ge=0)
    """Maximum depth to search anchors that lack negatives again, by doubling; null or 0: never. Requires rank_over:
    survivors and depth: null."""
    sampling_strategy: Literal["top", "random", "simans", "weighted"] = "top"
    """Sampler of the window. top: the first. random: uniform. simans: likeliest at positive + simans_b. weighted: by
    softmax(score / temperature). All except top draw without replacement, by seed."""
    simans_a: float = Field(1.0, ge=0)
    """simans: weight = exp(-a * (score - positive - b)^2)."""
    simans_b: float = 0.0
    """simans: above 0 prefers scores above the positive's."""
    temperature: float = Field(1.0, gt=0)
    """weighted: lower is closer to top."""
    margin_reference: Literal["min", "max", "each"] = "min"
    """Positive score that margins refer to: the anchor's lowest, its highest, or that of each positive, with separate
    negatives per positive."""
    given_negatives: Literal["ignore", "first", "keep"] = "ignore"
    """Negatives in the source. ignore: treat them like other documents. first: take them before mined ones. keep: add
    all of them to the mined ones."""
    judged: Literal["allow", "prefer", "only"] = "allow"
    """Documents judged for the anchor with a grade below data.min_grade. allow: ordinary candidates. prefer: taken
    first. only: no others are taken."""
    score: str = Field("dense", min_length=1)
    """Score of the candidates that ranks, windows, margins and cutoffs use; dense: of the vectors."""
    strict: bool = False
    """Also drop scores equal to a cutoff."""
    absolute_margin: float | None = None
    """Drop scores above positive - absolute_margin."""
    relative_margin: float | None = Field(0.05, le=1)
    """Drop scores above positive - |positive| * relative_margin; null: no margin."""
    max_score: float | None = None
    """Drop higher scores."""
    min_score: float | None = None
    """Drop lower scores."""
    exclude: tuple[Exclusion, ...] = (
        "positive_id",
        "positive_text",
        "positive_normalized",
        "shared_anchor",
        "anchor_text",
    )
    """Rules for documents that are never negatives."""
    anchor_id: Literal["contained", "always", "never"] = "contained"
    """Whether to drop a document with the anchor's id that is not a known positive. contained: only if its normalized
    text equals or contains the anchor's, or vice versa, as equal ids alone prove nothing."""
    exclude_file: str | None = None
    """JSONL or CSV of anchor_id, document_id: pairs that are never negatives, such as review verdicts."""
    never_same: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Columns of data.extra, such as [doc]: drop candidates that share the value of any with a known positive, or with
    the anchor if it has the column. anchor.NAME: with the anchor only. Null and empty texts equal nothing."""
    only_same: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Columns of data.extra, such as [lang]: drop candidates that do not share the value of each with a known positive.
    anchor.NAME: with the anchor."""
    where: str | None = Field(None, min_length=1)
    """Drop candidates that do not meet this SQL condition over anchor.NAME, positive.NAME and candidate.NAME (id, text
    and the columns of data.extra, all texts), score, rank and positive_score."""
    near_duplicate: float | None = Field(None, gt=0, le=1)
    """Drop candidates whose normalized text is at least this similar to that of a known positive: 1 - (characters to
    insert or delete) / (length of both)."""
    on_shortage: Literal["keep", "drop", "fail", "random"] = "keep"
    """Anchors with too few negatives: keep them, drop them, fail, or fill up with random negatives."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, settings: Any) -> Any:
        return presets.with_preset(settings)

    @model_validator(mode="after")
    def _window(self) -> Mining:
        if not self.wanted:
            raise ValueError("mining.num_negatives and mining.num_random are both 0: set one of them")
        if self.range_max is None:  # as wide as needed
            return self
        width = self.range_max - self.range_min
        if width < 1:
            raise ValueError(f"mining.range_max ({self.range_max}) must be above mining.range_min ({self.range_min})")
        if width < self.num_negatives:
            raise ValueError(
                f"the window of {width} ranks (mining.range_min {self.range_min} to mining.range_max {self.range_max})"
                f" is smaller than mining.num_negatives ({self.num_negatives}): widen the window or lower num_negatives"
            )
        return self

    @property
    def wanted(self) -> int:
        """Negatives of an anchor that has all of them."""
        return self.num_negatives + self.num_random

    @property
    def prefers(self) -> bool:
        """Whether negatives named by the source may be taken."""
        return self.given_negatives != "ignore" or self.judged != "allow"

    @property
    def draws(self) -> bool:
        """Whether random negatives may be taken."""
        return self.num_random > 0 or self.on_shortage == "random"

    def resolved(self, max_positives: int) -> Mining:
        """The settings with `range_max` and `depth` as numbers, see `Config.resolved`."""
        range_max = self.range_max
        if range_max is None:
            filtered = not (self.absolute_margin is self.relative_margin is self.max_score is None)
            range_max = presets.derived_range_max(self.range_min, self.num_negatives, max_positives, filtered=filtered)
        depth = range_max + max_positives if self.depth == presets.DERIVED_DEPTH else self.depth
        return self.model_copy(update={"range_max": range_max, "depth": depth})


class Output(Section):
    """The output of the triplets stage."""

    format: Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"] = "triplet"
    """triplet: a row per positive and negative. n-tuple: a row per positive, with all its negatives in columns; no row
    if one is missing. labeled-pair: a row per document, with label 1 or 0. labeled-list: a row per positive, with lists
    of documents and labels."""
    ids: bool = True
    """Write ids next to the texts."""
    scores: bool = True
    """Write scores of positives and negatives."""
    ranks: bool = True
    """Write raw ranks; null beyond the stored depth."""
    grades: bool = False
    """Write relevance grades; null, or 0 in labeled rows, for unjudged negatives."""
    include_positives: bool = False
    """Treat an anchor's positives as candidates: n-tuple rows then hold the original ranking, to evaluate rerankers.
    mining.relative_margin is then null unless set."""
    extra_columns: tuple[str, ...] | None = None
    """Columns of data.extra to write; null: all."""
    rows_per_file: int | None = Field(None, ge=1)
    """Rows per Parquet file; the last of a part may have fewer. null: one file per part."""
    min_rows: int = Field(1, ge=0)
    """With fewer rows, `mine` and `triplets` exit with code 1, and `triplets/` stays as it was."""
    report: bool = True
    """Write RUN_DIR/report.html at the end of `mine`; changes no row."""

    @model_validator(mode="after")
    def _ranking(self) -> Output:
        if self.include_positives and self.format != "n-tuple":
            raise ValueError("include_positives requires output.format: n-tuple, the only format for a ranking")
        return self


class Config(Section):
    """A complete negpipe config."""

    run_dir: Folder
    """Folder for all output of a run, or s3://BUCKET/PREFIX."""
    store: Folder | None = None
    """Folder for the parts of all stages, shared by several run directories, so that variants of a job encode and
    search once; null: in run_dir."""
    seed: int = Field(42, ge=0)
    """Seed of every random choice."""
    data: Data
    encoder: Encoder
    index: Index = Index()
    search: Search = Search()
    mining: Mining = Mining()
    output: Output = Output()
    train: Train | None = None
    ablate: Ablate | None = None
    executor: Executor = Executor()
    resources: Resources = Resources()
    _url: str | None = PrivateAttr(None)

    @property
    def url(self) -> str | None:
        """The address of a run directory in a bucket. `run_dir` is then its working folder on this machine."""
        return self._url

    @property
    def place(self) -> str:
        """The run directory as shown to users."""
        return self._url or str(self.run_dir)

    @model_validator(mode="wrap")
    @classmethod
    def _in_a_bucket(cls, tree: Any, build: ModelWrapValidatorHandler[Config]) -> Config:
        named = str(tree.get("run_dir")) if isinstance(tree, dict) else ""
        if not ("://" in named or named.startswith("s3:/")):  # a Path drops one of the slashes
            return build(tree)
        url = bucket_url(named)
        config = build({**tree, "run_dir": "."})
        if config.store is not None:
            raise ValueError("store: a run_dir in a bucket stores its parts there: remove it")
        config = config.model_copy(update={"run_dir": working_folder(url, config.resources.cache)})
        config._url = url
        return config

    @model_serializer(mode="wrap")
    def _as_stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = dump(self)
        if self._url and "run_dir" in tree:
            tree["run_dir"] = self._url
        return tree

    @property
    def depth(self) -> int:
        """Candidates per anchor that search stores, before clamping to the corpus. Requires a resolved config."""
        range_max, looked_at = self.mining.range_max, self.mining.depth or 0
        assert range_max is not None and isinstance(looked_at, int), "the config is not resolved"
        return self.search.depth or -(-max(range_max + 64, looked_at) // 64) * 64

    @model_validator(mode="before")
    @classmethod
    def _whole_ranking(cls, tree: Any) -> Any:
        # The default margin would drop the positives that include_positives requests.
        match tree:
            case {"mining": {"relative_margin": _} | {"compat": str()}}:
                return tree
            case {"output": {"include_positives": True}}:
                return {**tree, "mining": {**(tree.get("mining") or {}), "relative_margin": None}}
        return tree

    @model_validator(mode="after")
    def _preferred(self) -> Config:
        if self.mining.given_negatives == "keep" and self.output.format == "n-tuple":
            raise ValueError(
                "mining.given_negatives: keep takes any number of negatives, but output.format: n-tuple has fixed"
                " columns: use another format, or given_negatives: first"
            )
        if self.mining.judged == "only" and self.mining.draws:
            raise ValueError(
                "mining.judged: only excludes random negatives: set mining.num_random: 0, and not on_shortage: random"
            )
        return self

    @model_validator(mode="after")
    def _extra(self) -> Config:
        kept = {*self.data.extra.corpus, *self.data.extra.queries}
        for name in self.output.extra_columns or ():
            if name not in kept:
                raise ValueError(f"output.extra_columns: '{name}' is not kept: add it to data.extra.corpus or .queries")
        return self

    @model_validator(mode="after")
    def _devices_of_a_cluster(self) -> Config:
        if self.executor.kind == "ray":
            if self.encoder.devices:
                raise ValueError(
                    "encoder.devices are those of one machine; with executor.kind: ray, set encoder.device: cuda, and"
                    " executor.workers to their number"
                )
            for section in ("encoder", "search"):
                if (named := getattr(self, section).device) not in (None, "cpu", "cuda"):
                    raise ValueError(
                        f"{section}.device: '{named}' is a device of one machine; with executor.kind: ray, use cpu or"
                        " cuda: Ray chooses the GPU"
                    )
        return self

    @model_validator(mode="after")
    def _rules_by_column(self) -> Config:
        for setting in ("never_same", "only_same"):
            for name in getattr(self.mining, setting):
                column = name.removeprefix(ANCHOR)
                for side in ("corpus", "queries") if name.startswith(ANCHOR) else ("corpus",):
                    self.data.extra.require(side, column, f"mining.{setting}: '{name}'")
        return self

    @model_validator(mode="after")
    def _learnable(self) -> Config:
        if self.train is None:
            return self
        kind, loss, output = self.train.kind, self.train.loss, self.output
        if (formats := TAKES[kind].get(loss)) is None:
            raise ValueError(f"train.loss: {loss} cannot train a {kind}: use {' or '.join(TAKES[kind])}")
        if output.format not in formats:
            raise ValueError(
                f"train.loss: {loss} requires output.format {' or '.join(formats)}, not {output.format}:"
                f" set {'one of them' if len(formats) > 1 else 'it'}"
            )
        if output.include_positives:
            raise ValueError(
                "train: a ranking with positives among its negatives is not a training row:"
                " set output.include_positives: false"
            )
        if loss in DISTILLING and not self.train.negatives:
            raise ValueError(f"train.negatives: {loss} learns the scores of negatives: set it to true")
        if loss in DISTILLING and not output.scores:
            raise ValueError(f"train.loss: {loss} learns the rows' scores: set output.scores: true")
        if self.train.guide is not None and loss != "CachedGISTEmbedLoss":
            raise ValueError(f"train.guide: {loss} has no guide: remove it, or use CachedGISTEmbedLoss")
        return self

    @model_validator(mode="after")
    def _served(self) -> Config:
        # With a section train, they apply to train.base.
        if self.encoder.backend == "http" and self.train is None:
            for name in OF_RUNNING:
                if getattr(self.encoder, name) != Encoder.model_fields[name].default:
                    raise ValueError(
                        f"encoder.{name} is for a model on this machine; with encoder.backend: http, the server decides"
                        " it: remove it"
                    )
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Config:
        if self.train is None:
            return self
        if not self.encoder.runs_here:
            have = "a server has" if self.encoder.backend == "http" else "precomputed vectors have"
            if self.train.kind == "reranker":
                raise ValueError(
                    f"train.kind: a reranker orders the documents that the encoder finds for held-out anchors, but"
                    f" {have} no encoder on this machine: set encoder.backend and encoder.model"
                )
            if self.train.base is None:
                raise ValueError(f"train.base: {have} no model to train: set train.base")
        if split := self.train.split:
            if split.by != "positive":
                self.data.extra.require("corpus", split.by, f"train.split.by: '{split.by}'")
        elif (self.train.eval_split or EVAL_SPLIT) == self.data.split:
            raise ValueError(
                f"train.eval_split: '{self.data.split}' is also data.split, which the model is trained on: set another"
                " split, or hold out a share of this one with train.split"
            )
        return self

    def resolved(self, max_positives: int) -> Config:
        """The config with numbers for the settings that depend on the data.

        Args:
            max_positives: rows of the anchor with the most positives, as ingest counts them.

        Raises:
            ConfigError: `search.depth` is smaller than they require.
        """
        config = self.model_copy(update={"mining": self.mining.resolved(max_positives)})
        if problem := config._shallow():
            raise ConfigError(problem)
        return config

    @model_validator(mode="after")
    def _depth(self) -> Config:
        if problem := self._shallow():
            raise ValueError(problem)
        return self

    def _shallow(self) -> str | None:
        """An error if a setting exceeds `search.depth`, or None."""
        for name in ("range_max", "depth"):
            needed = getattr(self.mining, name)
            if self.search.depth and isinstance(needed, int) and needed > self.search.depth:
                return (
                    f"search.depth ({self.search.depth}) is below mining.{name} ({needed}):"
                    " raise search.depth or set it to null"
                )
        return None
