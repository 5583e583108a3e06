"""The layouts of `data.format`: the tables of each, and the readers of their rows.

Records come in the order corpus, queries, judgments; rows of anchors with passages yield all three at once, after an
extra corpus. Judgments of all splits are read, because a positive in any split must not become a negative.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

from negpipe.config import schema
from negpipe.errors import ConfigError, InputError
from negpipe.sources import hub, readers
from negpipe.sources.anchored import Fields, Passages, anchored
from negpipe.sources.chunks import Column
from negpipe.sources.places import ALL, EXTENSIONS, PACKED, SourceTable, extension_of, locate, near, paths_of
from negpipe.sources.readers import Reader, column
from negpipe.sources.tables import column_names, inside
from negpipe.sources.trec import refuse_run

Role: TypeAlias = Callable[[SourceTable], list[Reader]]
"""The readers of the rows of a table."""
Layout: TypeAlias = Callable[[schema.Data, bool], list[tuple[SourceTable, Role]]]
"""(data, whether given negatives are kept) → the tables in reading order."""

_log = logging.getLogger(__name__)

_SAYS_MORE = ("neg", "hard_neg", "hardneg", "label", "score", "similarity", "relevance", "grade")
"""Prefixes of columns of pairs that may mark passages that are not positives."""
_METADATA, _TABLES = "merlin_metadata.json", set(EXTENSIONS) - {".txt", ".trec", ".qrels"}
"""In NeMo's corpora: the file that is not documents, and the extensions of those that are."""
_FIRST_SPLIT = schema.Table.model_fields["split"].default


def tables_of(data: schema.Data, given: bool = False) -> list[tuple[SourceTable, Role]]:
    """The tables of a source whose layout is known, in reading order; a BEIR folder's qrels carry their split.

    Args:
        data: the source.
        given: its negatives become judgments without a grade.

    Raises:
        ConfigError: ids that judgments require are missing.
        InputError: a local path that does not exist, or a folder that is not what `data.format` says.
    """
    found = LAYOUTS[data.format](data, given)
    return [(table._replace(streaming=data.streaming), role) for table, role in found]


# --- separate tables for corpus, queries and judgments -------------------------------------------------


def _documents(data: schema.Data) -> Role:
    if data.columns.corpus_id is None:
        raise ConfigError("data.columns.corpus_id: null works with pairs only, as qrels refer to documents by id")
    return lambda table: [readers.documents(table, data)]


def _queries(data: schema.Data) -> Role:
    return lambda table: [readers.queries(table, data)]


def _judged(data: schema.Data, split: str) -> Role:
    return lambda table: [readers.judged(table, data, split)]


def _judged_splits(data: schema.Data) -> Role:
    def role(table: SourceTable) -> list[Reader]:
        found = readers.judged_splits(table, data)
        if data.split not in found:
            raise _no_split(table.path, data.split, list(found))
        return list(found.values())

    return role


def _beir(data: schema.Data, _: bool) -> list[tuple[SourceTable, Role]]:
    [path] = _one(data)
    kind, folder = locate(path), Path(path)
    if kind in ("file", "url"):
        remedy = "Use its folder or a hub dataset, or set data.format: columns with three files"
        raise InputError("a BEIR source is a folder or a hub dataset", file=path, remedy=remedy)
    if (kind == "folder" and is_beir(folder)) or not (kind == "hub" or (folder / "README.md").is_file()):
        found = {name: either(folder, name) or folder / f"{name}.jsonl" for name in ("corpus", "queries")}
        for file in found.values():
            if not file.is_file():
                remedy = "A BEIR folder has corpus.jsonl, queries.jsonl and qrels/; a dataset repository has README.md"
                raise InputError("file not found", file=str(file), remedy=remedy)
        splits = qrels(folder)
        if data.split not in splits:
            raise _no_split(str(folder / "qrels" / f"{data.split}.tsv"), data.split, list(splits))
        roles = (_documents(data), _queries(data))
        return [
            *((_file(data, file), role) for file, role in zip(found.values(), roles, strict=True)),
            *(
                (_without_header(_file(data, file), None)._replace(split=split), _judged(data, split))
                for split, file in splits.items()
            ),
        ]
    judged = path.rstrip("/") + "-qrels"
    if kind == "folder" and not Path(judged).is_dir():
        remedy = f"{near(judged)}. Put the qrels there, or set data.format: columns".lstrip(". ")
        raise InputError("folder not found", file=judged, remedy=remedy)
    return [
        (SourceTable((path,), "corpus", revision=data.revision), _documents(data)),
        (SourceTable((path,), "queries", revision=data.revision), _queries(data)),
        (SourceTable((judged,)), _judged_splits(data)),
    ]


def is_beir(folder: Path) -> bool:
    """Whether a local folder has files with a corpus and judgments."""
    return either(folder, "corpus") is not None and bool(qrels(folder))


def qrels(folder: Path) -> dict[str, Path]:
    """The judgments of each split."""
    files = [file for file in folder.glob("qrels/*") if extension_of(str(file)) in EXTENSIONS]
    named: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (_bare(file), EXTENSIONS.index(extension_of(str(file))))):
        if _bare(file).lower() == "readme":
            continue
        if (first := named.setdefault(_bare(file), file)) != file:
            _log.warning("%s is not read: %s has the judgments of that split", file, first.name)
    single = either(folder, "qrels")
    return named or ({_FIRST_SPLIT: single} if single else {})


def _bare(file: Path) -> str:
    name = file.name
    for packed in PACKED:
        name = name.removesuffix(packed)
    return name.rpartition(".")[0]


def either(folder: Path, name: str) -> Path | None:
    """The file with a table in a folder, of any kind; None: there is none."""
    files = [file for file in folder.glob(f"{name}.*") if extension_of(str(file)) in EXTENSIONS]
    by_kind = sorted(files, key=lambda file: (EXTENSIONS.index(extension_of(str(file))), len(file.name), file.name))
    return next((file for file in by_kind if _bare(file) == name), None)


def _file(data: schema.Data, file: Path) -> SourceTable:
    return SourceTable((str(file),), dialect=data.table)


def _without_header(table: SourceTable, own: schema.Dialect | None) -> SourceTable:
    """A table of judgments, without the column names of other tables."""
    return table if own else table._replace(dialect=table.dialect.model_copy(update={"header": None}))


def _no_split(file: str, split: str, there: Sequence[str]) -> InputError:
    remedy = f"Available splits: {', '.join(there) or 'none'}. Set one in data.split"
    problem = f"no judgments for the split '{split}'"
    return InputError(problem, file=file, field="split", remedy=remedy, there=there)


def _one(data: schema.Data) -> tuple[str, ...]:
    paths = paths_of(data.path or "")
    if len(paths) != 1:
        remedy = "For tables in several files, set data.format: columns"
        raise InputError(f"data.format: {data.format} reads one folder or file", file=paths[0], remedy=remedy)
    return paths


def _mteb(data: schema.Data, _: bool) -> list[tuple[SourceTable, Role]]:
    [path] = _one(data)
    before = f"{data.subset}-" if data.subset else ""
    there = hub.subsets(path, data.revision)
    judged = next((name for name in ("qrels", "default") if before + name in there), "default")
    missing = [name for name in ("corpus", "queries", judged) if before + name not in there]
    if missing:
        remedy = (
            f"Its subsets: {', '.join(there) or 'none'}; data.subset: NAME reads NAME-corpus, NAME-queries, NAME-qrels"
        )
        raise InputError(f"the dataset has no subset '{before}{missing[0]}'", file=path, remedy=remedy)
    roles = {"corpus": _documents(data), "queries": _queries(data), judged: _judged_splits(data)}
    split = {judged: None}
    return [
        (SourceTable((path,), before + name, split.get(name, ALL), data.revision), role) for name, role in roles.items()
    ]


def _columns(data: schema.Data, _: bool) -> list[tuple[SourceTable, Role]]:
    assert data.corpus and data.queries and data.qrels, "required by the schema"
    judged = _without_header(_table(data, data.qrels, "qrels"), data.qrels.table)
    splits = judged.split is None and judged.kind in ("hub", "folder")
    return [
        (_table(data, data.corpus, "corpus"), _documents(data)),
        (_table(data, data.queries, "queries"), _queries(data)),
        (judged, _judged_splits(data) if splits else _judged(data, data.split)),
    ]


def _table(data: schema.Data, table: schema.Table, name: str) -> SourceTable:
    # A revision belongs to one repository: data.path, or the corpus's if there is no data.path.
    home = data.path or (data.corpus.path if data.corpus else None)
    split = None if table.split == _FIRST_SPLIT else table.split
    revision = data.revision if table.path == home else None
    return SourceTable(paths_of(table.path), table.subset, split, revision, table.table or data.table, f"data.{name}")


def _llama_index(data: schema.Data, given: bool) -> list[tuple[SourceTable, Role]]:
    paths = _one(data)
    names = {"corpus_id": "key", "query_id": "key", "query_text": "value"}
    keyed = data.model_copy(update={"text": "{value}", "columns": data.columns.model_copy(update=names)})
    key = "data.format (llama_index has queries, corpus and relevant_docs)"
    fields = Fields(None, Column("key", key), (Passages(Column("value", key)),), by_id=True)
    return [
        (SourceTable(paths, inside="corpus"), _documents(keyed)),
        (SourceTable(paths, inside="queries"), _queries(keyed)),
        (SourceTable(paths, inside="relevant_docs"), _rows(data, fields, in_corpus=False, given=given)),
    ]


def _pylate(data: schema.Data, given: bool) -> list[tuple[SourceTable, Role]]:
    [path] = _one(data)
    names = {"corpus_id": "document_id", "query_id": "query_id"}
    named = data.model_copy(update={"columns": data.columns.model_copy(update=names)})
    key = "data.format (pylate has query_id, document_ids and scores)"
    documents = Column("document_ids", key)
    # Like its trainers: the first is the positive.
    first, others = Passages(documents, part=slice(1)), Passages(documents, part=slice(1, None))
    fields = Fields(None, Column("query_id", key), (first,), (others,), by_id=True)
    roles = {
        "documents": _documents(named),
        "queries": _queries(named),
        "train": _rows(data, fields, in_corpus=False, given=given),
    }
    files = {name: either(Path(path), name) for name in roles}
    return [
        (_file(data, file) if (file := files[name]) else SourceTable((path,), name, revision=data.revision), role)
        for name, role in roles.items()
    ]


# --- rows of anchors with passages ---------------------------------------------------------------------


def _rows(data: schema.Data, fields: Fields, *, in_corpus: bool, given: bool) -> Role:
    return lambda table: [anchored(table, data, fields, in_corpus=in_corpus, given=given)]


def _source(data: schema.Data) -> SourceTable:
    """The table in `data.path`."""
    table = SourceTable(paths_of(data.path or ""), data.subset, data.split, data.revision, data.table)
    refuse_run(table.path, table.dialect)
    return table if table.kind in ("hub", "folder") else table._replace(split=None)


def _pooled(fields: Callable[[schema.Data, SourceTable], Fields]) -> Layout:
    """A layout of rows with passages, with an optional extra corpus."""

    def layout(data: schema.Data, given: bool) -> list[tuple[SourceTable, Role]]:
        source, pool = _source(data), data.corpus

        @cache
        def of_rows() -> Fields:
            return fields(data, source)

        def role(table: SourceTable) -> list[Reader]:
            of_row = of_rows()
            if of_row.by_id and pool is None:
                remedy = "Set the table of the documents in data.corpus"
                raise InputError("its rows have ids of documents", file=table.path, field="data.corpus", remedy=remedy)
            return [anchored(table, data, of_row, in_corpus=pool is None, given=given)]

        def of_pool(table: SourceTable) -> list[Reader]:
            return [readers.documents(table, data, pool=not of_rows().by_id)]

        extra = [(_table(data, pool, "corpus"), of_pool)] if pool else []
        return [*extra, (source, role)]

    return layout


def _pair(data: schema.Data, table: SourceTable) -> Fields:
    names = data.columns
    ids = {
        key: Column(name, f"data.columns.{key}")
        for key in ("anchor_id", "positive_id")
        if (name := getattr(names, key))
    }
    label = Column(names.label, "data.columns.label") if names.label else None
    there = column_names(table)
    negatives = tuple(_negatives(names, there)) if names.negative else ()
    read = {one.column.name for one in negatives} | {names.label, names.positive, names.anchor}
    unread = [name for name in there if name not in read and name.startswith(_SAYS_MORE) and not name.endswith("_id")]
    if unread:
        remedy = "Set data.columns.negative or data.columns.label to read such columns"
        _log.warning("%s: ignored columns: %s. %s", table.path, ", ".join(unread), remedy)
    positives = Passages(column(data, "positive"), ids.get("positive_id"))
    anchor, extra = column(data, "anchor"), data.extra.corpus
    return Fields(anchor, ids.get("anchor_id"), (positives,), negatives, label, extra=extra, watched=_SAYS_MORE)


def _negatives(names: schema.Columns, there: Sequence[str]) -> Iterator[Passages]:
    """`negative`, `negative_1`, `negative_2` …, with their ids."""
    numbered = sorted(
        (int(end), name)
        for name in there
        if (begin_end := name.rpartition("_"))[0] == names.negative and (end := begin_end[2]).isdecimal()
    )
    plain = names.negative or ""
    for name in ([plain] if plain in there else []) + [name for _, name in numbered]:
        known = (names.negative_id or "").replace("_id", f"{name.removeprefix(plain)}_id")
        ids = Column(known, "data.columns.negative_id", required=False) if known in there else None
        yield Passages(Column(name, "data.columns.negative", required=False), ids)


def _named(key: str, anchor: str, positives: str, *negatives: str) -> Callable[[schema.Data, SourceTable], Fields]:
    """Rows with columns of these names, and optional columns of ids."""

    def passages(name: str, required: bool) -> Passages:
        return Passages(Column(name, key, required), Column(f"{name}_ids", key, required=False))

    rest = tuple(passages(name, False) for name in negatives)
    fields = Fields(Column(anchor, key), Column("query_id", key, required=False), (passages(positives, True),), rest)
    return lambda data, table: fields


def _tevatron(data: schema.Data, table: SourceTable) -> Fields:
    key = "data.path (tevatron rows have query_id, and positive_passages or positive_document_ids)"
    by_id = "positive_document_ids" in column_names(table)
    positives, negatives = (
        ("positive_document_ids", "negative_document_ids") if by_id else ("positive_passages", "negative_passages")
    )
    query = Column("query_text", key, others=("query",)) if by_id else Column("query", key, others=("query_text",))
    given = (Passages(Column(negatives, key, required=False)),)
    identity = Column("query_id", key, required=False)
    return Fields(query, identity, (Passages(Column(positives, key)),), given, by_id=by_id)


def _nemo(data: schema.Data, given: bool) -> list[tuple[SourceTable, Role]]:
    paths = _one(data)
    file = paths[0]
    if locate(file) == "folder":
        file = str(either(Path(file), "train") or Path(file) / "train.json")
    key = "data.path (nemo rows have question_id, question, pos_doc and neg_doc)"
    fields = Fields(
        Column("question", key),
        Column("question_id", key),
        (Passages(Column("pos_doc", key)),),
        (Passages(Column("neg_doc", key, required=False)),),
        by_id=True,
    )
    if data.corpus:
        corpus = _table(data, data.corpus, "corpus")
    else:
        corpus = SourceTable(tuple(_nemo_corpus(file)), dialect=data.table)
    return [
        (corpus, _documents(data)),
        (SourceTable((file,), inside="data"), _rows(data, fields, in_corpus=False, given=given)),
    ]


def _nemo_corpus(file: str) -> list[str]:
    """The files of the corpora in a train.json."""
    entries = [json.loads(text) for text in inside(file, "corpus")]
    named = [str(entry.get("path") or "") if isinstance(entry, dict) else str(entry) for entry in entries]
    if not all(named) or not named:
        remedy = 'Write "corpus": [{"path": "./corpus/"}], or set the documents in data.corpus'
        raise InputError("the corpora are not a list of paths", file=file, field="corpus", remedy=remedy)
    found: list[str] = []
    for folder in dict.fromkeys((Path(file).parent / one).resolve() for one in named):
        files = [
            str(path) for path in hub.files(folder) if extension_of(path.name) in _TABLES and path.name != _METADATA
        ]
        if not files:
            remedy = "Put its documents there (train.parquet with id and text), or set them in data.corpus"
            raise InputError("the corpus has no documents", file=str(folder), remedy=remedy)
        found += files
    return found


_DPR = "data.path (DPR rows have question, positive_ctxs and hard_negative_ctxs)"
_FLAGEMBEDDING = "data.path (FlagEmbedding rows have query, pos and neg)"
_SWIFT = "data.path (ms-swift rows have messages, positive_messages and negative_messages)"

LAYOUTS: dict[str, Layout] = {
    "beir": _beir,
    "mteb": _mteb,
    "columns": _columns,
    "llama_index": _llama_index,
    "pylate": _pylate,
    "pairs": _pooled(_pair),
    "flagembedding": _pooled(_named(_FLAGEMBEDDING, "query", "pos", "neg")),
    "tevatron": _pooled(_tevatron),
    "dpr": _pooled(_named(_DPR, "question", "positive_ctxs", "hard_negative_ctxs", "negative_ctxs")),
    "ms-swift": _pooled(_named(_SWIFT, "messages", "positive_messages", "negative_messages")),
    "nemo": _nemo,
}
"""Layouts by their name in `data.format`."""
