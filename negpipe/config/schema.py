"""The config: one YAML file, every key typed, unknown keys refused by name.

Key names are fixed by the tables of docs/reference/config. Whether a key is part of a stage's identity (a change
re-runs the stage) is decided by the stages, not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from negpipe.config import presets
from negpipe.config.bucket import bucket_url, working_folder
from negpipe.config.encoder import OF_RUNNING, Encoder
from negpipe.config.executor import Executor, Resources
from negpipe.config.section import Section
from negpipe.config.training import DISTILLING, EVAL_SPLIT, TAKES, Ablate, Train
from negpipe.config.values import Device, Size
from negpipe.errors import ConfigError

_OWN_NAMES = ("id", "score", "rank", "grade")

ANCHOR = "anchor."
"""Comes before a column's name in `mining.never_same` and `only_same`: the anchor's own."""

Exclusion = Literal["positive_id", "positive_text", "positive_normalized", "shared_anchor", "anchor_text"]


class Dialect(Section):
    """How CSV and TSV files are written."""

    header: tuple[str, ...] | None = Field(
        None,
        description="Names of the columns of files without a header, for example [id, text]; null: the first line.",
    )
    quoting: Literal["standard", "none"] = Field(
        "standard", description="standard: fields may be in double quotes. none: a quote is a sign like others."
    )
    delimiter: str | None = Field(
        None, description="tab, comma, semicolon, pipe or one sign; null: a comma in .csv, else a tab."
    )

    @model_validator(mode="after")
    def _sign(self) -> Dialect:
        if self.delimiter is not None and len(self.sign(self.delimiter)) != 1:
            raise ValueError(f"delimiter '{self.delimiter}': write tab, comma, semicolon, pipe or one sign")
        if self.header is not None and len({*self.header}) < max(1, len(self.header)):
            raise ValueError("header: name every column once")
        return self

    def sign(self, otherwise: str) -> str:
        """The delimiter, `otherwise` where none is set."""
        name = self.delimiter or otherwise
        return {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}.get(name, name)


class Table(Section):
    """Where one table is: files, a URL or a hub dataset."""

    path: str | tuple[str, ...] = Field(
        description="File (.jsonl, .json, .csv, .tsv, .txt, .parquet, also .gz, .bz2, .xz, .zst), a pattern such as"
        " docs-*.jsonl, a list of files, URL or hub dataset name."
    )
    subset: str | None = Field(None, description="Hub dataset configuration.")
    split: str = Field("train", description="Hub dataset split.")
    table: Dialect | None = Field(None, description="How its CSV or TSV files are written; null: as data.table says.")


def _table(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | list | tuple) else value


_Table = Annotated[Table, BeforeValidator(_table)]


class Columns(Section):
    """Names of the columns that are read. The defaults are BEIR's."""

    corpus_id: str | None = Field("_id", description="Document id; null: ids are digests of the text.")
    query_id: str = Field("_id", description="Query id.")
    query_text: str = Field("text", description="Query text.")
    qrels_query_id: str = Field("query-id", description="Query id in the qrels.")
    qrels_corpus_id: str = Field("corpus-id", description="Document id in the qrels.")
    grade: str = Field("score", description="Relevance grade in the qrels; a missing column counts as 1.")
    anchor: str = Field("anchor", description="Anchor text of a pair row.")
    positive: str = Field("positive", description="Positive text of a pair row.")
    anchor_id: str | None = Field(None, description="Anchor id of a pair row; null: a digest of the text.")
    positive_id: str | None = Field(None, description="Positive id of a pair row; null: a digest of the text.")
    negative: str | None = Field(
        "negative", description="Negative texts that pair rows bring, also negative_1, negative_2 …; null: not read."
    )
    negative_id: str | None = Field(None, description="Their ids, also negative_1_id …; null: digests of the texts.")
    label: str | None = Field(
        None, description="Grades of the positives of a pair row, a number or as many in a list; null: 1."
    )


class Extra(Section):
    """Further columns of the source."""

    corpus: tuple[str, ...] = Field((), description="Columns of the corpus, or of pair rows, for example [title, url].")
    queries: tuple[str, ...] = Field((), description="Columns of the queries, or of pair rows, for example [lang].")

    @model_validator(mode="after")
    def _names(self) -> Extra:
        for side, names in self:
            for name in names:
                if name in _OWN_NAMES:
                    raise ValueError(f"'{name}' is what a column of negpipe's own is called: rename it in the source")
                if names.count(name) > 1:
                    raise ValueError(f"{side} names '{name}' twice")
        return self

    def require(self, side: str, column: str, setting: str) -> None:
        """Raise ValueError where a column that a setting needs is not kept: corpus or queries."""
        kept = getattr(self, side)
        if column not in kept:
            whole = ", ".join((*kept, column))
            raise ValueError(
                f"{setting} needs the column '{column}', which is not kept: set data.extra.{side}: [{whole}]"
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
    ] = Field(
        "auto",
        description="auto: what data.path looks like, as `negpipe inspect` says. beir: folder or hub dataset with"
        " corpus, queries, qrels. mteb: one repository with all three. pairs: rows of anchor and positive text."
        " columns: three tables, by column names. Others: as these programs write it.",
    )
    path: str | tuple[str, ...] | None = Field(
        None, description="Local folder or file, a pattern such as rows-*.jsonl, a list of files, URL, or hub dataset."
    )
    subset: str | None = Field(None, description="Hub dataset configuration (of mteb: what comes before -corpus).")
    revision: str | None = Field(None, description="Hub dataset revision; null: the newest.")
    corpus: _Table | None = Field(
        None, description="Corpus table (columns), or an extra corpus (pairs, flagembedding)."
    )
    queries: _Table | None = Field(None, description="Query table (columns).")
    qrels: _Table | None = Field(None, description="Relevance table (columns).")
    streaming: bool = Field(
        False, description="Read hub datasets as they come, without a copy on this disk: for those larger than it."
    )
    columns: Columns = Columns()
    table: Dialect = Dialect()
    split: str = Field("train", description="Which qrels make anchors, or which split of pair rows is read.")
    text: str = Field("{title} {text}", description="How a document's columns make its text.")
    extra: Extra = Field(Extra(), description="Columns to carry along: rows have them as positive_title, anchor_lang.")
    part_rows: int = Field(16384, ge=1, description="About how many rows a part holds (half to twice as many).")
    min_grade: float = Field(1, description="Least grade that makes a document a positive.")
    add_positives: bool = Field(True, description="Positives missing from the corpus can be candidates.")
    on_empty: Literal["error", "skip"] = Field("error", description="What to do with an empty or null text.")
    on_unknown_id: Literal["error", "skip"] = Field("error", description="What to do with qrels that name unknown ids.")
    max_bad_rows: int = Field(
        0,
        ge=0,
        description="Rows that may be bad (broken, of a wrong type, empty, naming unknown ids): they are left out and"
        " listed in rejected.jsonl; one more is an error.",
    )

    @model_validator(mode="after")
    def _paths(self) -> Data:
        missing = [name for name in ("corpus", "queries", "qrels") if getattr(self, name) is None]
        if self.format == "columns" and missing:
            raise ValueError(f"format 'columns' needs data.{missing[0]}: a file, URL or hub dataset")
        if self.format not in ("auto", "columns") and self.path is None:
            raise ValueError(f"format '{self.format}' needs data.path: a local folder or file, URL or hub dataset")
        if self.path is not None and not self.path:
            raise ValueError("data.path names nothing")
        if self.format == "auto" and self.path is None and missing:
            raise ValueError("the source is missing: give data.path, or data.corpus, data.queries and data.qrels")
        if self.format == "flagembedding" and self.extra.corpus and self.corpus is None:
            raise ValueError("data.extra.corpus needs data.corpus: texts in lists of pos and neg have no columns")
        return self


def _kind(value: str) -> str:
    # FAISS's name of an exact index is Flat.
    return value.lower() if value.lower() in ("flat", "stream", "auto") else value


class Index(Section):
    """How the vectors are searched."""

    kind: Annotated[str, AfterValidator(_kind)] = Field(
        "flat",
        min_length=1,
        description="flat: writes an exact index file that faiss.read_index opens. stream: exact, straight from the"
        " embedding parts, no second copy. auto: chooses by the sizes of the job, and logs why. Else a FAISS factory"
        " string, such as IVF1024,Flat: approximate, with its recall measured.",
    )
    min_recall: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Least recall of an approximate index, over the stored depth and over the window; an error where it"
        " is not reached.",
    )
    recall_anchors: int = Field(1000, ge=1, description="Sampled anchors that are searched exactly to measure recall.")
    nprobe: int | None = Field(
        None, ge=1, description="Lists an anchor probes (efSearch of HNSW); null: as few as reach min_recall."
    )
    shard_size: Size = Field(
        256 * 2**20,
        ge=1,
        description="Vectors of a file of an approximate index, in bytes of float32; filling one takes three times as"
        " much memory. Part of the identity.",
    )
    trained: str | None = Field(
        None,
        description="A trained FAISS index of this kind to keep, such as index/KEY.faiss of another run; null: one is"
        " trained on a sample of the corpus.",
    )

    @property
    def approximate(self) -> bool:
        """Whether the kind, once resolved, may miss candidates."""
        return self.kind not in ("flat", "stream")

    @model_validator(mode="after")
    def _fits(self) -> Index:
        if self.trained and self.kind in ("flat", "stream", "auto"):
            raise ValueError("index.trained needs index.kind to be the factory string it was made with")
        return self


def _cpu_or_gpu(value: str) -> str:
    if not value.startswith(("cpu", "cuda")):
        raise ValueError(f"'{value}' makes no products here: write cpu, cuda or cuda:1 …")
    return value


class Search(Section):
    """How deep candidates are stored, and where they are looked for."""

    depth: int | None = Field(
        None, ge=1, description="Candidates per anchor; null: the least multiple of 64 from mining.range_max + 64 on."
    )
    device: Annotated[Device, AfterValidator(_cpu_or_gpu)] | None = Field(
        None,
        description="Where the products of large searches are made: cpu, or one GPU, cuda, cuda:1 …; null: the"
        " encoder's first, which is a GPU where there is one. Changes no byte.",
    )
    slice_documents: int | None = Field(
        None,
        ge=1,
        description="Search the corpus in slices of so many documents, whole parts and of an index whole shards, and"
        " merge what is found: a task then reads one slice, for a corpus that does not fit one machine's disk or cache."
        " null: a task reads it all. Changes no byte.",
    )


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Mining(Section):
    """Which candidates become negatives."""

    compat: Literal["sentence-transformers", "flagembedding", "nemo", "nv-retriever"] | None = Field(
        None, description="Take the settings that are not given here from another miner; null: from this table."
    )
    range_min: int = Field(0, ge=0, description="First rank of the window, 0-based.")
    range_max: int | None = Field(
        192,
        ge=1,
        description="Rank after the last of the window; null: range_min + num_negatives + the most positives of an"
        " anchor, num_negatives counted 10 times if a margin or max_score is set.",
    )
    rank_over: Literal["raw", "survivors"] = Field(
        "survivors", description="raw: rank among all documents. survivors: rank among what passed every filter."
    )
    num_negatives: int = Field(3, ge=0, description="Mined negatives per anchor; 0 with num_random alone.")
    num_random: int = Field(
        0, ge=0, description="Random negatives per anchor beside them, by seed; the same exclusions, no cutoffs."
    )
    depth: Annotated[int, Field(ge=1)] | Literal["range_max+max_positives"] | None = Field(
        None,
        description="Candidates per anchor that are looked at; range_max+max_positives: room for the most positives of"
        " an anchor; null: all stored.",
    )
    max_depth: int | None = Field(
        1024,
        ge=0,
        description="How deep anchors that lack negatives are searched again, doubling what is stored; null or 0: not."
        " Needs rank_over survivors and depth null.",
    )
    sampling_strategy: Literal["top", "random", "simans", "weighted"] = Field(
        "top",
        description="Which of the window are taken. top: the first. random: any. simans: likeliest at positive +"
        " simans_b. weighted: by softmax(score / temperature). All but top draw without replacement, by seed.",
    )
    simans_a: float = Field(1.0, ge=0, description="simans: weight = exp(-a * (score - positive - b)^2).")
    simans_b: float = Field(0.0, description="simans: above 0 prefers scores above the positive's.")
    temperature: float = Field(1.0, gt=0, description="weighted: lower is closer to top.")
    margin_reference: Literal["min", "max", "each"] = Field(
        "min",
        description="Which positive score margins refer to: the anchor's lowest, its highest, or each positive's own,"
        " with negatives of its own.",
    )
    given_negatives: Literal["ignore", "first", "keep"] = Field(
        "ignore",
        description="Negatives that the source brings. ignore: documents like others. first: taken before mined ones."
        " keep: beside them, all of them.",
    )
    judged: Literal["allow", "prefer", "only"] = Field(
        "allow",
        description="Documents judged for the anchor with a grade below data.min_grade. allow: candidates like others."
        " prefer: taken first. only: nothing else is taken.",
    )
    score: str = Field(
        "dense",
        min_length=1,
        description="Which of the candidates' scores ranks, windows, margins and cutoffs use; dense: the vectors'.",
    )
    strict: bool = Field(False, description="Drop what equals a cutoff too.")
    absolute_margin: float | None = Field(None, description="Drop scores above positive - absolute_margin.")
    relative_margin: float | None = Field(
        0.05, description="Drop scores above positive - |positive| * relative_margin; null: no margin."
    )
    max_score: float | None = Field(None, description="Drop scores above it.")
    min_score: float | None = Field(None, description="Drop scores below it.")
    exclude: tuple[Exclusion, ...] = Field(
        ("positive_id", "positive_text", "positive_normalized", "shared_anchor", "anchor_text"),
        description="What is never a negative.",
    )
    anchor_id: Literal["contained", "always", "never"] = Field(
        "contained",
        description="Whether a document with the anchor's own id, no known positive of it, is left out. contained:"
        " where its normalised text equals or contains the anchor's, or the other way round, as equal ids alone prove"
        " nothing.",
    )
    exclude_file: str | None = Field(
        None,
        description="JSONL or CSV of anchor_id, document_id: pairs that are never negatives, a reviewer's verdicts.",
    )
    never_same: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (),
        description="Columns of data.extra, such as [doc]: drop candidates that share the value of one with a known"
        " positive, or with the anchor where it has the column. anchor.NAME: with the anchor alone. A null or an"
        " empty text equals nothing.",
    )
    only_same: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (),
        description="Columns of data.extra, such as [lang]: drop candidates that do not share the value of each with a"
        " known positive. anchor.NAME: with the anchor.",
    )
    where: str | None = Field(
        None,
        min_length=1,
        description="Drop candidates for which this SQL condition does not hold, over anchor.NAME, positive.NAME and"
        " candidate.NAME (id, text and the columns of data.extra, all texts), score, rank and positive_score.",
    )
    near_duplicate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Drop candidates whose normalised text is as similar as this to that of a known positive: 1 -"
        " (characters to insert or delete) / (length of both).",
    )
    on_shortage: Literal["keep", "drop", "fail", "random"] = Field(
        "keep",
        description="Anchors with fewer negatives: keep what there is, drop the anchor, fail, or fill up with random"
        " ones.",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, settings: Any) -> Any:
        return presets.with_preset(settings)

    @model_validator(mode="after")
    def _window(self) -> Mining:
        if not self.wanted:
            raise ValueError("mining.num_negatives and mining.num_random are both 0: ask for one of them")
        if self.range_max is None:  # as wide as it must be
            return self
        width = self.range_max - self.range_min
        if width < 1:
            raise ValueError(f"mining.range_max ({self.range_max}) must be above mining.range_min ({self.range_min})")
        if width < self.num_negatives:
            raise ValueError(
                f"the window of {width} ranks (mining.range_min {self.range_min} to mining.range_max {self.range_max})"
                f" is smaller than mining.num_negatives ({self.num_negatives}): widen the window or ask for fewer"
            )
        return self

    @property
    def wanted(self) -> int:
        """Negatives of an anchor that lacks none."""
        return self.num_negatives + self.num_random

    @property
    def prefers(self) -> bool:
        """Whether negatives that the source names may be among them."""
        return self.given_negatives != "ignore" or self.judged != "allow"

    @property
    def draws(self) -> bool:
        """Whether random negatives may be among them."""
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
    """What the triplets stage writes."""

    format: Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"] = Field(
        "triplet",
        description="triplet: a row for each positive and negative. n-tuple: a row for each positive with all its"
        " negatives in columns, none if one is missing. labeled-pair: a row for each document, label 1 or 0."
        " labeled-list: a row for each positive, with lists of documents and labels.",
    )
    ids: bool = Field(True, description="Ids beside the texts.")
    scores: bool = Field(True, description="Scores of positives and negatives.")
    ranks: bool = Field(True, description="Raw ranks, null beyond the stored depth.")
    grades: bool = Field(
        False, description="Relevance grades; null, in labelled rows 0, for negatives that nobody judged."
    )
    include_positives: bool = Field(
        False,
        description="An anchor's own positives are candidates too: n-tuple then holds the ranking as it was found, to"
        " evaluate rerankers. mining.relative_margin is then null unless it is given.",
    )
    extra_columns: tuple[str, ...] | None = Field(None, description="Which of data.extra rows have; null: all of them.")
    rows_per_file: int | None = Field(
        None, ge=1, description="Rows a Parquet file, the last of a part may have fewer; null: one file a part."
    )
    min_rows: int = Field(
        1, ge=0, description="Fewer rows end `mine` and `triplets` with exit code 1; they are complete all the same."
    )
    report: bool = Field(True, description="Make RUN_DIR/report.html at the end of `mine`; changes no row.")

    @model_validator(mode="after")
    def _ranking(self) -> Output:
        if self.include_positives and self.format != "n-tuple":
            raise ValueError("include_positives keeps a ranking, which output.format: n-tuple alone can hold")
        return self


class Config(Section):
    """A whole negpipe config."""

    run_dir: Path = Field(description="Folder that holds everything a run makes, or s3://BUCKET/PREFIX.")
    store: Path | None = Field(
        None,
        description="Folder for the parts that stages make, to be shared by several run directories, so that variants"
        " of one job encode and search once; null: in run_dir.",
    )
    seed: int = Field(42, ge=0, description="Seed of every random choice.")
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
        """Of a run directory in a bucket: where. `run_dir` is then its working folder on this machine."""
        return self._url

    @property
    def place(self) -> str:
        """The run directory as people know it."""
        return self._url or str(self.run_dir)

    @model_validator(mode="wrap")
    @classmethod
    def _in_a_bucket(cls, tree: Any, build: ModelWrapValidatorHandler[Config]) -> Config:
        named = str(tree.get("run_dir")) if isinstance(tree, dict) else ""
        if not ("://" in named or named.startswith("s3:/")):  # a Path takes one of the slashes away
            return build(tree)
        url = bucket_url(named)
        config = build({**tree, "run_dir": "."})
        if config.store is not None:
            raise ValueError("store: a run_dir in a bucket keeps its parts there: leave it out")
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
        """Candidates per anchor that search stores, before it is clamped to the corpus; of a resolved config."""
        range_max, looked_at = self.mining.range_max, self.mining.depth or 0
        assert range_max is not None and isinstance(looked_at, int), "the config is not resolved"
        return self.search.depth or -(-max(range_max + 64, looked_at) // 64) * 64

    @model_validator(mode="before")
    @classmethod
    def _whole_ranking(cls, tree: Any) -> Any:
        # The default margin would drop the very positives that include_positives asks for.
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
                "mining.given_negatives: keep takes all there are, for which the columns of output.format: n-tuple have"
                " no room: take another format, or given_negatives: first"
            )
        if self.mining.judged == "only" and self.mining.draws:
            raise ValueError(
                "mining.judged: only leaves no random negatives: set mining.num_random: 0, and not on_shortage: random"
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
                    " executor.workers to how many"
                )
            for section in ("encoder", "search"):
                if (named := getattr(self, section).device) not in (None, "cpu", "cuda"):
                    raise ValueError(
                        f"{section}.device: '{named}' is one of a machine; with executor.kind: ray write cpu or cuda,"
                        " which GPU it is Ray decides"
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
            raise ValueError(f"train.loss: {loss} trains no {kind}: take {' or '.join(TAKES[kind])}")
        if output.format not in formats:
            raise ValueError(
                f"train.loss: {loss} takes output.format {' or '.join(formats)}, not {output.format}:"
                f" set {'one of them' if len(formats) > 1 else 'it'}"
            )
        if output.include_positives:
            raise ValueError(
                "train: a ranking with positives among its negatives is no training row:"
                " set output.include_positives: false"
            )
        if loss in DISTILLING and not self.train.negatives:
            raise ValueError(f"train.negatives: {loss} learns the scores of negatives: set it to true")
        if loss in DISTILLING and not output.scores:
            raise ValueError(f"train.loss: {loss} learns the rows' scores: set output.scores: true")
        if self.train.guide is not None and loss != "CachedGISTEmbedLoss":
            raise ValueError(f"train.guide: {loss} has no guide, CachedGISTEmbedLoss has")
        return self

    @model_validator(mode="after")
    def _served(self) -> Config:
        # With a section train they are those of train.base.
        if self.encoder.backend == "http" and self.train is None:
            for name in OF_RUNNING:
                if getattr(self.encoder, name) != Encoder.model_fields[name].default:
                    raise ValueError(
                        f"encoder.{name} is for a model that runs here, and with encoder.backend: http the server alone"
                        " decides on it: leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Config:
        if self.train is None:
            return self
        if not self.encoder.runs_here:
            have = "a server has" if self.encoder.backend == "http" else "vectors that you bring have"
            if self.train.kind == "reranker":
                raise ValueError(
                    f"train.kind: a reranker orders what the encoder finds for held-out anchors, and {have} no encoder"
                    " that runs here: set encoder.backend and encoder.model"
                )
            if self.train.base is None:
                raise ValueError(f"train.base: {have} no model to train: name one")
        if split := self.train.split:
            if split.by != "positive":
                self.data.extra.require("corpus", split.by, f"train.split.by: '{split.by}'")
        elif (self.train.eval_split or EVAL_SPLIT) == self.data.split:
            raise ValueError(
                f"train.eval_split: '{self.data.split}' is data.split too, which the model is trained on: name a split"
                " that it never sees, or hold a part of this one out with train.split"
            )
        return self

    def resolved(self, max_positives: int) -> Config:
        """The config with the settings that depend on the data as numbers, once they are known.

        Args:
            max_positives: rows of the anchor with the most positives, as ingest counts them.

        Raises:
            ConfigError: `search.depth` does not reach as far as they do.
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
        """What lies beyond `search.depth`, or None."""
        for name in ("range_max", "depth"):
            needed = getattr(self.mining, name)
            if self.search.depth and isinstance(needed, int) and needed > self.search.depth:
                return (
                    f"search.depth ({self.search.depth}) is below mining.{name} ({needed}):"
                    " raise search.depth or leave it null"
                )
        return None
