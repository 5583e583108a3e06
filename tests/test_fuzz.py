"""Whatever a file holds, reading it ends in a result or in an error that negpipe explains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import small_source as small
from hypothesis import HealthCheck, given, settings
from upkeep_of import config_of

from negpipe import graph, sources
from negpipe.config.file import load_config
from negpipe.config.schema import Columns, Config, Data
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.manifest import Books
from negpipe.errors import NegpipeError
from negpipe.select import verdicts

pytestmark = [
    pytest.mark.torture,
    pytest.mark.guarantee(
        "configs, sources, records or verdicts contain any bytes",
        "a result or an explained error",
        section="input",
    ),
]

Record = Callable[[str, object], None]
SAMPLE, FULL = 40, 10_000


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, record_property: Record) -> Callable[[Any, Callable[[Any], object]], None]:
    """Call a function with values of a strategy: it may return, or raise a NegpipeError."""
    full = request.config.getoption("--torture")

    def run(values: st.SearchStrategy[Any], read: Callable[[Any], object]) -> None:
        executions = 0

        @settings(
            max_examples=FULL if full else SAMPLE,
            derandomize=not full,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(values)
        def execute(value: Any) -> None:
            nonlocal executions
            executions += 1
            try:
                read(value)
            except NegpipeError as error:
                assert str(error)
                json.dumps({"message": str(error)})

        execute()
        assert executions >= (FULL if full else SAMPLE)
        record_property("count: executions fuzzed", executions)

    return run


# --- values -----------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(codec=None), max_size=8),  # half surrogate pairs too
    st.sampled_from(["", " ", "x", "1", "nan", "1e999", "../..", "\x00", "\x1b[2J", "a" * 5000, "2001-99-99", "{}{}"]),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from([10**400, -1, 0, 2**63, 1e308])
)


def trees(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """JSON values whose objects mostly have keys that mean something."""
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys | TEXTS, inner, max_size=4)),
        max_leaves=8,
    )


def mutated(sound: bytes) -> st.SearchStrategy[bytes]:
    """Sound bytes of which some were replaced, removed or inserted."""
    cuts = st.integers(0, len(sound))
    pieces = st.one_of(
        st.binary(max_size=4), st.sampled_from([b"{", b"]", b'"', b"null", b"\\ud800", b"1e999", b"\xff"])
    )
    edits = st.lists(st.tuples(cuts, st.integers(0, 6), pieces), max_size=4)

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        content = sound
        for at, gone, piece in edits:
            content = content[:at] + piece + content[at + gone :]
        return content

    return edits.map(apply)


# --- configs ----------------------------------------------------------------------------------------------

SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}
NAMES = sorted({*SECTIONS, *(key for kind in SECTIONS.values() for key in getattr(kind, "model_fields", {}))})
KEYS = st.sampled_from(NAMES)


def part_of_config(name: str) -> st.SearchStrategy[Any]:
    """Settings of a section: its own keys with any values."""
    fields: dict[str, Any] = getattr(SECTIONS[name], "model_fields", {})
    if not fields:
        return trees(KEYS)
    return st.dictionaries(st.sampled_from(sorted(fields)), trees(KEYS), max_size=4)


def test_configs_as_mappings(fuzz: Any, tmp_path: Path) -> None:
    sound = small.settings(tmp_path)
    changes = st.fixed_dictionaries({}, optional={name: part_of_config(name) for name in SECTIONS})

    def read(changes: dict[str, Any]) -> None:
        merged = {
            name: {**sound[name], **value} if isinstance(value, dict) and isinstance(sound.get(name), dict) else value
            for name, value in changes.items()
        }
        load_config({**sound, **merged})

    fuzz(changes, read)


def test_configs_as_files(fuzz: Any, tmp_path: Path) -> None:
    path = small.write_config(tmp_path)
    marks = st.sampled_from(
        ["!!", "&a ", "*a", "<<: ", "? ", "- ", "!!int ", "!!timestamp ", "!!bool ", "|\n", "{", "[", ": "]
    )
    lines = st.lists(st.one_of(KEYS.map(lambda key: f"{key}: "), marks, TEXTS, st.just("\n")), max_size=12)
    contents = st.one_of(
        mutated(path.read_bytes()),
        lines.map(lambda parts: "".join(parts).encode(errors="surrogatepass")),
        st.binary(max_size=60),
    )

    def read(content: bytes) -> None:
        path.write_bytes(content)
        load_config(str(path))

    fuzz(contents, read)


def test_overrides(fuzz: Any, tmp_path: Path) -> None:
    sound = small.settings(tmp_path)
    paths = st.lists(KEYS | TEXTS, min_size=1, max_size=3).map(".".join)
    overrides = st.one_of(TEXTS, st.tuples(paths, TEXTS | trees(KEYS).map(repr)).map("=".join))
    fuzz(overrides, lambda override: load_config(sound, [override]))


# --- sources ----------------------------------------------------------------------------------------------

FIELDS = st.sampled_from(
    ["_id", "title", "text", "query-id", "corpus-id", "score", "query", "pos", "neg", "anchor", "positive"]
)
ROWS = st.one_of(
    st.dictionaries(FIELDS, trees(FIELDS), max_size=6).map(lambda row: json.dumps(row).encode()),
    trees(FIELDS).map(lambda row: json.dumps(row).encode()),
    mutated(b'{"_id": "d1", "title": "t", "text": "x", "query": "q", "pos": ["p"], "neg": [], "score": 1}'),
    st.binary(max_size=30),
)
FORMATS = ("pairs", "flagembedding", "columns")


def data(folder: Path, format_: str, ending: str) -> Data:
    """A source whose every table is the one file."""
    path = str(folder / f"file{ending}")
    tables = {"corpus": path, "queries": path, "qrels": path} if format_ == "columns" else {"path": path}
    ids = Columns(anchor_id="_id") if ending == ".jsonl" else Columns()
    return Data.model_validate({"format": format_, "text": "{title} {text}", "columns": ids, **tables})


def reader(folder: Path, ending: str) -> Callable[[tuple[str, bytes]], None]:
    def read(value: tuple[str, bytes]) -> None:
        format_, content = value
        (folder / f"file{ending}").write_bytes(content)
        for record in sources.read(data(folder, format_, ending)):
            assert record is not None
            if isinstance(record, sources.BadRow):
                json.dumps({"raw": record.raw}).encode()
                str(record.error).encode()

    return read


def test_json_lines(fuzz: Any, tmp_path: Path) -> None:
    contents = st.lists(ROWS, max_size=5).map(b"\n".join)
    fuzz(st.tuples(st.sampled_from(FORMATS), contents), reader(tmp_path, ".jsonl"))


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_separated_values(ending: str, fuzz: Any, tmp_path: Path) -> None:
    sign = b"," if ending == ".csv" else b"\t"
    header = sign.join([b"_id", b"title", b"text", b"query-id", b"corpus-id", b"score", b"anchor", b"positive"])
    cells = st.lists(TEXTS.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=6), max_size=9)
    rows = st.lists(st.one_of(cells.map(sign.join), st.binary(max_size=20), mutated(header)), max_size=4)
    contents = st.tuples(st.one_of(st.just(header), mutated(header)), rows).map(
        lambda both: b"\n".join([both[0], *both[1]])
    )
    fuzz(st.tuples(st.sampled_from(("pairs", "columns")), contents), reader(tmp_path, ending))


def test_compressed_and_binary_files(fuzz: Any, tmp_path: Path) -> None:
    import gzip
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"anchor": ["a", "b"], "positive": ["c", "d"], "_id": ["1", "2"]}), sink)
    packed = mutated(gzip.compress(b'{"anchor": "a", "positive": "b", "_id": "1"}\n' * 9))
    values = st.one_of(
        st.tuples(st.just(".jsonl.gz"), packed), st.tuples(st.just(".parquet"), mutated(sink.getvalue()))
    )
    fuzz(values, lambda value: reader(tmp_path, value[0])(("pairs", value[1])))


# --- what a run writes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    graph.mine(load_config(str(small.build(folder))), only="ingest")
    return folder / "run"


BOOK_KEYS = st.sampled_from(
    ["key", "kind", "rows", "files", "path", "bytes", "digest", "meta", "parts", "stats", "stage"]
)


def books(sound: bytes) -> st.SearchStrategy[bytes]:
    """A record or a manifest: damaged bytes, or a JSON document of other values, with or without a digest."""
    tree = json.loads(sound)
    tree.pop("digest")
    changed = st.dictionaries(st.sampled_from(sorted(tree)), trees(BOOK_KEYS), max_size=2)
    return st.one_of(
        mutated(sound),
        mutated(json.dumps(tree).encode()),
        changed.map(lambda changes: json.dumps(tree | changes).encode()),
        trees(BOOK_KEYS).map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=40),
        st.just(b"[" * 100_000),
    )


def test_manifests(fuzz: Any, run_dir: Path) -> None:
    path = run_dir / ".negpipe/ingest/manifest.json"
    config = load_config(small.settings(run_dir.parent))
    sound = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        graph.status(config)
        graph.inventory(config_of(run_dir))
        graph.superseded(config_of(run_dir))

    fuzz(books(sound), read)
    path.write_bytes(sound)


def test_records_of_parts(fuzz: Any, run_dir: Path) -> None:
    kept = Books(run_dir, "ingest")
    path = run_dir / kept.name(kept.recorded()[0])
    sound = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        kept.part(path.stem)
        list(kept.parts())
        graph.inventory(config_of(run_dir))

    fuzz(books(sound), read)
    path.write_bytes(sound)


def test_the_cache_of_digests(fuzz: Any, tmp_path: Path) -> None:
    path, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"x")
    expected = DigestCache(path)(file)
    cache = DigestCache(path)
    cache(file)
    cache.save()
    contents = st.one_of(mutated(path.read_bytes()), trees(TEXTS).map(lambda tree: json.dumps(tree).encode()))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        assert DigestCache(path, rehash=True)(file) == expected
        found = DigestCache(path)
        found(file)
        found.save()

    fuzz(contents | st.just(b"[" * 100_000), read)


def test_verdicts(fuzz: Any, tmp_path: Path) -> None:
    names = st.sampled_from(["anchor_id", "document_id"])
    rows = st.one_of(
        st.dictionaries(names, trees(names), max_size=3).map(lambda row: json.dumps(row).encode()),
        mutated(b'{"anchor_id": "q1", "document_id": "d1"}'),
        mutated(b"anchor_id,document_id\nq1,d1"),
        st.binary(max_size=20),
    )
    values = st.tuples(st.sampled_from([".jsonl", ".csv", ".tsv"]), st.lists(rows, max_size=4).map(b"\n".join))

    def read(value: tuple[str, bytes]) -> None:
        path = tmp_path / f"verdicts{value[0]}"
        path.write_bytes(value[1])
        for anchor, documents in verdicts.read(path).items():
            "".join([anchor, *documents]).encode()

    fuzz(values | st.just((".jsonl", b"[" * 100_000)), read)
