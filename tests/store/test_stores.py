"""What every `Store` promises, on a disk and in a bucket alike."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_server import BUCKET, CEPH, Bucket

from negpipe.errors import LockedError
from negpipe.store.cache import FileCache
from negpipe.store.files import Published, write_all
from negpipe.store.objects import ObjectStore
from negpipe.store.s3 import Bucket as S3
from negpipe.store.store import LocalStore, Store

KEY = "0123456789abcdef"


@pytest.fixture(params=["disk", "moto", "whole bucket", CEPH])
def store(request: pytest.FixtureRequest, tmp_path: Path, reach: Callable[[Bucket], Bucket]) -> Store:
    if request.param == "disk":
        return LocalStore(tmp_path / "store")
    reach(request.getfixturevalue("ceph" if request.param == "ceph" else "moto"))
    prefix = "" if request.param == "whole bucket" else f"runs/{tmp_path.name}"
    return ObjectStore(S3(BUCKET), prefix, FileCache(tmp_path / "store", 2**30))


def put(store: Store, content: bytes, folder: str = "encode", key: str = KEY) -> Published:
    return store.put(folder, lambda digest: f"{key}-{digest[:12]}.npy", lambda file: write_all(file, content))


@pytest.mark.slow
def test_a_file_is_there_whole_under_the_name_its_content_gives(store: Store) -> None:
    content = bytes(range(256)) * 5000
    made = put(store, content)
    assert made == Published(f"{KEY}-{hashlib.sha256(content).hexdigest()[:12]}.npy", len(content), made.digest)
    name = f"encode/{made.name}"
    assert store.path(name).read_bytes() == content
    assert store.size(name) == len(content) and store.digest(name) == made.digest == hashlib.sha256(content).hexdigest()
    assert store.names("encode") == [name]
    store.delete(name)
    store.delete(name)
    assert store.size(name) is None and store.digest(name) is None and not store.path(name).exists()
    assert store.names("encode") == store.names("nowhere") == []


def test_what_fails_to_be_written_leaves_nothing(store: Store) -> None:
    def broken(file: object) -> None:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        store.put("encode", lambda digest: f"{KEY}-{digest[:12]}.npy", broken)
    assert store.names("encode") == [] and not list((store.scratch / "encode").iterdir())


@pytest.mark.slow
def test_many_files_at_once(store: Store) -> None:
    made = [put(store, f"{number}".encode() * number, key=f"{number:016x}") for number in range(40)]
    put(store, b"deeper", "encode/below")
    names = [f"encode/{each.name}" for each in made]
    assert store.names("encode") == sorted(names)
    for wanted in (names, names[:3], []):
        asked = [*wanted, "encode/none", "search/none"]
        assert store.sizes(asked) == {name: len(store.path(name).read_bytes()) for name in wanted}
    assert store.reads([*names[:2], "encode/none"]) == {name: store.path(name).read_bytes() for name in names[:2]}


def test_a_record_may_be_written_again(store: Store) -> None:
    for content in (b"first", b"second"):
        store.put("books", lambda _: "record.json", lambda file, content=content: write_all(file, content))  # type: ignore[misc]
        assert store.read("books/record.json") == content
    assert store.read("books/none.json") is None


@pytest.mark.slow
def test_what_changes_is_written_only_where_nobody_did(store: Store) -> None:
    name = "books/manifest.json"
    assert not store.replace(name, b"second", b"first")
    assert store.replace(name, b"first", None) and store.read(name) == b"first"
    assert not store.replace(name, b"other", None) and not store.replace(name, b"other", b"another")
    assert store.replace(name, b"second", b"first") and store.read(name) == b"second"
    store.delete(name)
    assert not store.replace(name, b"third", b"second") and store.replace(name, b"third", None)


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, b"before"])
def test_of_many_at_once_one_wins(store: Store, before: bytes | None) -> None:
    rivals = 16
    start = threading.Barrier(rivals)

    def attempt(name: str, number: int) -> bool:
        start.wait()
        return store.replace(name, f"of {number}".encode(), before)

    with ThreadPoolExecutor(rivals) as pool:
        for name in (f"books/manifest-{number}.json" for number in range(5)):
            if before:
                store.replace(name, before, None)
            won = [*pool.map(attempt, [name] * rivals, range(rivals))]
            assert won.count(True) == 1 and store.read(name) == f"of {won.index(True)}".encode()


@pytest.mark.slow
def test_a_lock_is_had_by_one(store: Store) -> None:
    with store.lock("books/some.lock"):
        if isinstance(store, LocalStore):
            with pytest.raises(LockedError), store.lock("books/some.lock"):
                pass
        with store.lock("books/another.lock"):
            pass
    with store.lock("books/some.lock"):
        pass


@pytest.mark.slow
def test_a_name_shows_files_in_one_step(store: Store) -> None:
    rows = [f"rows/{put(store, f'rows {number}'.encode(), 'rows', f'{number:016x}').name}" for number in range(3)]
    single = f"ingest/{put(store, b'rejected', 'ingest').name}"
    old: Callable[[], set[str]] = set
    for version, names in (("one", rows[:2]), ("two", rows[1:]), ("one", rows[:2])):
        what = {f"part-{number:05}.parquet": name for number, name in enumerate(names)}
        assert not store.shows("triplets", what, version, store)
        store.show("triplets", what, version, store, old)
        assert store.shows("triplets", what, version, store)
        contents = [store.path(name).read_bytes() for name in names]
        assert [store.path(name).read_bytes() for name in store.entries("triplets")] == contents
        assert [(store.folder("triplets") / entry).read_bytes() for entry in what] == contents
    assert store.shows("rejected.jsonl", None, "", store) and not store.shows("rejected.jsonl", single, "", store)
    store.show("rejected.jsonl", single, "", store, old)
    assert store.shows("rejected.jsonl", single, "", store)
    store.show("rejected.jsonl", None, "", store, old)
    assert store.shows("rejected.jsonl", None, "", store)
