"""Rows gathered across parts, and lists taken apart, against the same done in plain Python."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negpipe.data.tables import Rows, documents, open_table, ragged, to_bytes
from negpipe.engine.manifest import File, Manifest, Part
from negpipe.errors import DamagedError

TEXTS = ["", "a", "zwei Wörter", "字" * 40, "\x1b[31m", "a"]


def write(folder: Path, sizes: list[int]) -> list[Path]:
    """Parts of these sizes; a row knows its number."""
    paths, first = [], 0
    for part, size in enumerate(sizes):
        rows = np.arange(first, first + size)
        table = pa.table(
            {
                "text": pa.array([f"{row} {TEXTS[row % len(TEXTS)]}" for row in rows], pa.large_string()),
                "short": pa.array([str(row) for row in rows], pa.string()),
                "hash": pa.array(rows.astype(np.uint64) + np.uint64(2**63)),
                "score": pa.array(rows / 4, pa.float32()),
            }
        )
        paths.append(folder / f"{part}.arrow")
        paths[-1].write_bytes(to_bytes(table))
        first += size
    return paths


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), data=st.data())
def test_a_gather_is_what_indexing_gives(
    sizes: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = Rows(write(tmp_path_factory.mktemp("parts"), sizes))
    total = sum(sizes)
    assert len(rows) == total
    anything = st.lists(st.integers(0, total - 1), max_size=12) if total else st.just([])
    wanted = np.array(data.draw(anything), dtype=np.int64)

    assert rows.strings("text", wanted).to_pylist() == [f"{row} {TEXTS[row % len(TEXTS)]}" for row in wanted]
    assert rows.strings("short", wanted).to_pylist() == [str(row) for row in wanted]
    assert rows.strings("short", wanted).type == pa.large_string()
    for column in ("text", "short"):
        lengths = [len(text.encode()) for text in rows.strings(column, wanted).to_pylist()]
        assert rows.sizes(column, wanted).tolist() == lengths
    for shape in ((-1,), (1, -1), (len(wanted), 1)):
        shaped = wanted.reshape(shape)
        hashes, scores = rows.numbers("hash", shaped), rows.numbers("score", shaped)
        assert [hashes.dtype.name, scores.dtype.name] == ["uint64", "float32"]
        np.testing.assert_array_equal(hashes, shaped.astype(np.uint64) + np.uint64(2**63))
        np.testing.assert_array_equal(scores, (shaped / 4).astype(np.float32))


def test_no_parts_at_all() -> None:
    rows = Rows([])
    assert len(rows) == 0
    assert rows.strings("text", np.array([], np.int64)).to_pylist() == []
    assert rows.numbers("hash", np.empty((0, 3), np.int64)).shape == (0, 3)


LISTS = st.lists(st.lists(st.integers(-5, 5), max_size=4), max_size=8)


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(LISTS, min_size=1, max_size=3), large=st.booleans(), data=st.data())
def test_lists_come_apart_also_in_slices(pieces: list[Any], large: bool, data: st.DataObject) -> None:
    kind = pa.large_list(pa.int64()) if large else pa.list_(pa.int64())
    column = pa.chunked_array([pa.array(piece, kind) for piece in pieces])
    everything = [own for piece in pieces for own in piece]
    start = data.draw(st.integers(0, len(everything)))
    length = data.draw(st.integers(0, len(everything) - start))
    chosen = everything[start : start + length]

    values, offsets = ragged(column.slice(start, length))

    assert offsets.dtype == np.int64
    assert [values[low:high].tolist() for low, high in pairwise(offsets)] == chosen
    assert len(values) == offsets[-1]


VALUES = st.lists(st.tuples(st.integers(0, 9), st.text(max_size=3), st.lists(st.text(max_size=2), max_size=3)))


@settings(max_examples=60, deadline=None)
@given(before=VALUES, rows=VALUES, after=VALUES, data=st.data())
def test_equal_tables_have_equal_bytes_wherever_they_were_cut_from(
    before: list[Any], rows: list[Any], after: list[Any], data: st.DataObject
) -> None:
    def table(values: list[Any]) -> pa.Table:
        numbers, texts, lists = zip(*values, strict=True) if values else ((), (), ())
        kinds = {"a": pa.int64(), "b": pa.large_string(), "c": pa.list_(pa.string())}
        return pa.table(dict(zip(kinds, (numbers, texts, lists), strict=True)), schema=pa.schema(kinds))

    alone, within = table(rows), table([*before, *rows, *after]).slice(len(before), len(rows))
    cut = data.draw(st.integers(0, len(rows)))
    pieces = pa.concat_tables([within.slice(0, cut), alone.slice(cut)])
    assert to_bytes(alone) == to_bytes(within) == to_bytes(pieces)
    assert pa.ipc.open_file(pa.py_buffer(to_bytes(within))).read_all().to_pylist() == alone.to_pylist()


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_part_that_is_cut_off_is_damage(cut: int, tmp_path: Path) -> None:
    path = write(tmp_path, [5])[0]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedError, match="run `negpipe verify`") as caught:
        open_table(path)
    assert str(path) in str(caught.value)


def test_a_part_that_is_gone_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"gone\.arrow"):
        open_table(tmp_path / "gone.arrow")


def test_documents_are_the_corpus_and_then_what_was_added() -> None:
    def part(kind: str, number: int) -> Part:
        return Part(key=f"{number}", kind=kind, rows=1, files=(File(path=f"{number}", bytes=1, digest=""),))

    kinds = ("corpus", "added", "anchors", "corpus", "counts")
    parts = tuple(part(kind, number) for number, kind in enumerate(kinds))
    manifest = Manifest(stage="ingest", version=1, key="k", settings={}, inputs={}, parts=parts)
    assert [found.key for found in documents(manifest)] == ["0", "3", "1"]


READ_ALL_FLIPPED = """
import sys
from pathlib import Path
from negpipe.errors import DamagedError
from negpipe.data.tables import open_table

path, content, refused = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes(), 0
for at in range(len(content)):
    for flip in (0x01, 0x80, 0xFF):
        changed = bytearray(content)
        changed[at] ^= flip
        path.write_bytes(changed)
        try:
            open_table(path).to_pylist()
        except (DamagedError, UnicodeDecodeError):
            refused += 1
print(refused)
"""


@pytest.mark.slow
def test_no_changed_byte_ends_the_process(tmp_path: Path) -> None:
    """A damaged offset of a text or list led out of the file, and the worker died without a word."""
    table = pa.table(
        {
            "text": pa.array(TEXTS, pa.large_string()),
            "ids": pa.array([[text, "x"] if text else [] for text in TEXTS], pa.list_(pa.large_string())),
            "rows": pa.array([[1, 2], [], [3], [4], [5], [6]], pa.list_(pa.int64())),
        }
    )
    path = tmp_path / "part.arrow"
    path.write_bytes(to_bytes(table))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL_FLIPPED, str(path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 100
