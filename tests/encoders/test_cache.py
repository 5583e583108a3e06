"""The cache of vectors: what it hands out, what it keeps, and what becomes of damage, rivals, kills and full disks."""

from __future__ import annotations

import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from as_root import needs_a_namespace, needs_root, run_in_a_namespace

from negpipe.encoders.cache import VectorCache

pytestmark = pytest.mark.guarantee(
    "the cache is damaged, full, read-only, shared by processes that write at once, or one is killed",
    "never a wrong vector, no failure; one warning",
)

Floats = npt.NDArray[np.float32]
LARGE = 2**30


def keys(count: int, space: str = "model") -> list[bytes]:
    return [VectorCache.key(space, f"text {number}") for number in range(count)]


def vectors(count: int, dimension: int = 8) -> Floats:
    return np.random.default_rng(dimension).normal(size=(count, dimension)).astype(np.float32)


def known(cache: VectorCache, asked: list[bytes]) -> dict[int, Floats]:
    """Vectors by offset."""
    return {int(row): vector for rows, found in cache.known(asked) for row, vector in zip(rows, found, strict=True)}


def equal(found: dict[int, Floats], whole: Floats) -> bool:
    """Whether what is known, however much, are the very vectors."""
    return all(vector.tobytes() == whole[row].tobytes() for row, vector in found.items())


def file(folder: Path) -> Path:
    (path,) = folder.glob("*.sqlite")
    return path


@contextmanager
def opened(folder: Path, size: int = LARGE) -> Iterator[VectorCache]:
    cache = VectorCache(folder, size)
    try:
        yield cache
    finally:
        cache.close()


def fill(folder: Path, count: int, dimension: int = 8) -> Floats:
    made = vectors(count, dimension)
    with opened(folder) as cache:
        cache.put(keys(count), made)
        assert not cache.troubles
    return made


def test_what_was_put_is_known_to_others_bit_by_bit(tmp_path: Path) -> None:
    made = fill(tmp_path / "new" / "cache", 3000)
    with opened(tmp_path / "new" / "cache") as cache:
        found = known(cache, [*keys(1), *keys(2500)[::-1], b"of nobody"])
        assert [*found] == [*range(2501)]
        assert equal(found, np.concatenate([made[:1], made[2499::-1]]))
        assert not cache.troubles
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o77 == 0


def test_keys_tell_texts_and_spaces_apart() -> None:
    texts = ["", "a", "a ", "ab", "é", "e\u0301"]
    assert len({VectorCache.key(space * 64, text) for space in "ab" for text in texts}) == 2 * len(texts)


def test_memory_does_not_grow_with_the_vectors(tmp_path: Path) -> None:
    asked, made = keys(8192), vectors(8192, 256)
    with opened(tmp_path) as cache:
        tracemalloc.start()
        for start in range(0, 8192, 2048):
            cache.put(asked[start : start + 2048], made[start : start + 2048])
        assert sum(len(rows) for rows, _ in cache.known(asked)) == 8192
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < made.nbytes / 2


@pytest.mark.parametrize("dimension", [8, 384, 512, 1024, 4096])
def test_the_file_keeps_within_its_size(tmp_path: Path, dimension: int) -> None:
    size, made = 2**20, vectors(2**19 // (4 * dimension + 200), dimension)
    for number in range(4):  # each about half of what fits
        with opened(tmp_path, size) as cache:
            cache.put(keys(len(made), str(number)), made)
            assert not cache.troubles
        assert file(tmp_path).stat().st_size <= size
    assert file(tmp_path).stat().st_size > size / 2
    with opened(tmp_path, size) as cache:
        assert len(known(cache, keys(len(made), str(number)))) == len(made)


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    size, made = 2**20, vectors(100, 384)
    old, used, new = (keys(100, space) for space in ("old", "used", "new"))
    for asked in (used, old):
        with opened(tmp_path, size) as cache:
            cache.put(asked, made)
    with opened(tmp_path, size) as cache:
        assert len(known(cache, used)) == 100
    with opened(tmp_path, size) as cache:
        cache.put(new, made)
        cache.put(keys(200, "newer"), vectors(200, 384))
    with opened(tmp_path, size) as cache:
        assert len(known(cache, used)) == len(known(cache, new)) == 100
        assert len(known(cache, old)) < 100


def test_of_more_texts_than_fit_some_stay(tmp_path: Path) -> None:
    """Each run asks for all of them, in order: nothing would ever be known if the oldest made way for the newest."""
    size, made, asked = 2**20, vectors(1000, 384), keys(1000)
    counts = []
    for _ in range(3):
        with opened(tmp_path, size) as cache:
            found = known(cache, asked)
            left = [row for row in range(1000) if row not in found]
            cache.put([asked[row] for row in left], made[left])
            assert equal(found, made)
            (trouble,) = cache.troubles
            assert "raise encoder.cache_size" in trouble
            counts.append(len(found))
    assert counts[0] == 0 and 200 < counts[1] <= counts[2]


def test_a_smaller_size_makes_the_file_smaller(tmp_path: Path) -> None:
    fill(tmp_path, 2000, 384)
    assert file(tmp_path).stat().st_size > 2**21
    with opened(tmp_path, 2**20) as cache:
        cache.put(keys(10, "another"), vectors(10, 384))
        assert len(known(cache, keys(10, "another"))) == 10
    assert file(tmp_path).stat().st_size <= 2**20


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE vectors SET entry = substr(entry, 1, length(entry) - 4)",
        "UPDATE vectors SET entry = entry || x'00000000'",
        "UPDATE vectors SET entry = x''",
        "UPDATE vectors SET entry = 'text'",
        "UPDATE vectors SET entry = 1.5",
        "UPDATE vectors SET entry = (SELECT entry FROM vectors AS other WHERE other.rowid <> vectors.rowid)",
    ],
)
def test_entries_of_another_length_or_text_count_as_absent(tmp_path: Path, change: str) -> None:
    made = fill(tmp_path, 20)
    with sqlite3.connect(file(tmp_path)) as db:
        db.execute(f"{change} WHERE rowid % 2")
    db.close()
    with opened(tmp_path) as cache:
        found = known(cache, keys(20))
        assert len(found) == 10 and equal(found, made)
        assert len(cache.troubles) == 1 and "damaged" in cache.troubles[0]
        left = [row for row in range(20) if row not in found]
        cache.put([keys(20)[row] for row in left], made[left])
        assert len(known(cache, keys(20))) == 20 and len(cache.troubles) == 1


def test_flipped_bytes_never_give_a_wrong_vector(tmp_path: Path) -> None:
    made, lost = fill(tmp_path / "whole", 300, 32), 0
    content = file(tmp_path / "whole").read_bytes()
    for seed in range(30):
        draw, damaged = random.Random(seed), bytearray(content)
        for _ in range(1 + 20 * (seed % 2)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "vectors-0.sqlite").write_bytes(damaged)
        with opened(folder) as cache:
            found = known(cache, keys(300))
            assert equal(found, made)
            lost += len(found) < 300
            cache.put(keys(300), made)
            assert equal(known(cache, keys(300)), made)
    assert lost > 10


@pytest.mark.parametrize("content", ["garbage", "half", "a gap"])
def test_a_damaged_file_is_begun_again(tmp_path: Path, content: str) -> None:
    made = fill(tmp_path, 2000, 32)
    whole = file(tmp_path).read_bytes()
    third = len(whole) // 3
    damaged = {
        "garbage": b"no database" * 1000,
        "half": whole[: len(whole) // 2],
        "a gap": whole[:third] + bytes(third) + whole[2 * third :],
    }
    file(tmp_path).write_bytes(damaged[content])
    with opened(tmp_path) as cache:
        assert equal(known(cache, keys(2000)), made)
        cache.put(keys(2000), made)
        cache.put(keys(2000), made)
        assert any("is damaged" in trouble and str(tmp_path) in trouble for trouble in cache.troubles)
        assert len(known(cache, keys(2000))) == 2000
    assert file(tmp_path).name == "vectors-1.sqlite"
    with opened(tmp_path) as cache:
        assert len(known(cache, keys(2000))) == 2000 and not cache.troubles


def test_a_rival_notices_the_damage_too(tmp_path: Path) -> None:
    """Two processes have the damaged file open; both end up with the new one."""
    made = fill(tmp_path, 2000, 32)
    with opened(tmp_path) as first, opened(tmp_path) as second:
        with file(tmp_path).open("r+b") as damaged:
            damaged.write(b"x" * 2**16)
        for cache in (first, second):
            assert equal(known(cache, keys(2000)), made)
            assert any("is damaged" in trouble for trouble in cache.troubles)
        first.put(keys(2000), made)
        assert len(known(second, keys(2000))) == 2000
    assert [path.name for path in tmp_path.iterdir()] == ["vectors-1.sqlite"]


def test_a_folder_that_is_none_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with opened(folder) as cache:
            cache.put(keys(3), vectors(3))
            assert known(cache, keys(3)) == {}
            assert len(cache.troubles) == 1 and str(folder) in cache.troubles[0]


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "vectors-0.sqlite") as db:
        db.execute("CREATE TABLE vectors (name TEXT)")
    db.close()
    before = (tmp_path / "vectors-0.sqlite").read_bytes()
    with opened(tmp_path) as cache:
        cache.put(keys(3), vectors(3))
        assert known(cache, keys(3)) == {}
        assert len(cache.troubles) == 1
    assert (tmp_path / "vectors-0.sqlite").read_bytes() == before


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@needs_a_namespace
def test_as_root_of_a_namespace() -> None:
    run_in_a_namespace(__file__)


@needs_root
def test_a_full_disk_is_read_and_no_more_written(tmp_path: Path) -> None:
    made, asked = vectors(2000, 384), keys(2000)
    with mounted(tmp_path / "disk"):
        with opened(tmp_path / "disk") as cache:
            for start in range(0, 2000, 50):
                cache.put(asked[start : start + 50], made[start : start + 50])
            found = known(cache, asked)
            assert 100 < len(found) < 600 and equal(found, made)
            (trouble,) = cache.troubles
            assert "cannot be written (database or disk is full)" in trouble
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with opened(tmp_path / "disk") as cache:
            assert known(cache, asked).keys() == found.keys()
            cache.put(keys(3, "another"), made[:3])
            (trouble,) = cache.troubles
            assert "cannot be written (attempt to write a readonly database)" in trouble
        with opened(tmp_path / "disk" / "new") as cache:
            assert known(cache, asked) == {} and len(cache.troubles) == 1


def test_a_file_that_may_not_grow_is_read(tmp_path: Path) -> None:
    """As on a full disk, for those who are not root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    made = fill(tmp_path, 100, 384)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
        with opened(tmp_path) as cache:
            cache.put(keys(1000, "another"), vectors(1000, 384))
            assert len(cache.troubles) == 1 and "cannot be written" in cache.troubles[0]
            found = known(cache, keys(100))
            assert len(found) == 100 and equal(found, made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from negpipe.encoders.cache import VectorCache

folder, size, first, last, step = sys.argv[1], *map(int, sys.argv[2:])
cache = VectorCache(Path(folder), size)
print("ready", flush=True)
sys.stdin.readline()
for start in range(first, last, step):
    rows = range(start, start + step)
    keys = [VectorCache.key("model", f"text {row}") for row in rows]
    cache.put(keys, np.array([[row] * 64 for row in rows], np.float32))
    if len(list(cache.known(keys))) != 1:
        sys.exit("an entry that was just written is missing")
    print(start, flush=True)
cache.close()
sys.exit("; ".join(cache.troubles) or 0)
"""


def writer(folder: Path, first: int, last: int, step: int, size: int = LARGE) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), *map(str, (size, first, last, step))]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def numbers(folder: Path, count: int) -> set[int]:
    """The texts that are known, each with its own vector."""
    with opened(folder) as cache:
        found = known(cache, keys(count))
        assert not cache.troubles
    assert all((vector == row).all() and len(vector) == 64 for row, vector in found.items())
    return {*found}


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    """Three begin a new folder in the same moment, and overlap."""
    rivals = [writer(tmp_path, first, first + 1000, 100) for first in (0, 500, 500)]
    for rival in rivals:
        assert rival.stdout and rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin
        rival.stdin.write("go\n")
        rival.stdin.flush()
    for rival in rivals:
        _, error = rival.communicate(timeout=60)
        assert rival.returncode == 0, error
    assert numbers(tmp_path, 1500) == {*range(1500)}


@pytest.mark.slow
def test_killed_while_it_writes(tmp_path: Path) -> None:
    kept: set[int] = set()
    for seed in range(3):
        process = writer(tmp_path, 5000 * seed, 5000 * (seed + 1), 500)
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        told = int(process.stdout.readline())
        time.sleep(random.Random(seed).uniform(0, 0.05))
        process.kill()
        process.wait(60)
        found = numbers(tmp_path, 15000)
        assert kept <= found and {*range(told, told + 500)} <= found  # what was once there, and what it said
        assert all(len(found & {*range(start, start + 500)}) in (0, 500) for start in range(0, 15000, 500))
        kept = found
    with sqlite3.connect(file(tmp_path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
