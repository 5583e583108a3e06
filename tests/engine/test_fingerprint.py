"""Identity, and what is on disk: digests, the cache of digests, publishing, sidecars and manifests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import small_source as small
from hypothesis import given, settings
from hypothesis import strategies as st

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.fingerprint import Beginning, DigestCache, canonical, digest, key
from negpipe.engine.manifest import Books, File, Manifest, Part
from negpipe.engine.state import digests_of
from negpipe.errors import DamagedError, InputError, StorageError
from negpipe.store.files import BOOKS, explained, file_digest, publish, write_json
from negpipe.store.store import LocalStore

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    "value", [Path("x"), {1, 2}, b"x", float("nan"), float("inf"), object(), {1: "x"}, np.int64(1), [{"deep": {3}}]]
)
def test_a_value_without_one_obvious_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        digest({"setting": value})


@pytest.mark.parametrize("first", [["a"], [{"b": 1.0, "a": [None, "]"]}, ["é", "[,"]], [[], [], 3]])
@pytest.mark.parametrize("more", [["x"], [[]], [{"k": "]"}, 1]])
def test_a_key_that_was_begun_is_the_same_key(first: list[Any], more: list[Any]) -> None:
    begun = Beginning(*first)
    assert begun.key(*more) == begun.key(*more) == key(*first, *more)


@settings(max_examples=40, deadline=None)
@given(PLAIN)
def test_plain_values_survive_json(value: Any) -> None:
    assert digest(json.loads(json.dumps(value))) == digest(value)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), PLAIN, min_size=2, max_size=5))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert digest(dict(reversed(value.items()))) == digest(value)


def test_what_is_equal_and_what_is_not() -> None:
    assert digest(1) == digest(1.0)
    assert digest((1, 2)) == digest([1, 2])
    assert canonical({"a": (1.0, 0.5)}) == {"a": [1, 0.5]}
    different = [None, True, 1, "1", 1.5, [], {}, [1], [[1]], ["1"], "", "a", "A", "é", {"1": 1}]
    assert len({digest(value) for value in different}) == len(different)
    assert digest(1, 2) != digest([1, 2])
    assert len(key("a")) == 16


def test_digests_are_the_same_on_every_machine() -> None:
    assert digest("é", 1.5) == hashlib.sha256(rb'["\u00e9",1.5]').hexdigest()


# --- the cache of digests -----------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"before")
    return path


def change_secretly(path: Path, content: bytes) -> None:
    """Other content of the same size under the same inode and modification time: only reading it can tell."""
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remembered(file: Path, tmp_path: Path) -> Path:
    cache = DigestCache(tmp_path / "digests.json")
    assert cache(file) == hashlib.sha256(b"before").hexdigest()
    cache.save()
    return tmp_path / "digests.json"


def test_an_unchanged_file_is_not_read_again(file: Path, tmp_path: Path) -> None:
    saved = remembered(file, tmp_path)
    change_secretly(file, b"behind")
    assert DigestCache(saved)(file) == hashlib.sha256(b"before").hexdigest()
    assert DigestCache(saved, rehash=True)(file) == hashlib.sha256(b"behind").hexdigest()


def touch(path: Path) -> None:
    change_secretly(path, b"behind")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def lengthen(path: Path) -> None:
    change_secretly(path, b"behind it")


def swap(path: Path) -> None:
    stat, other = path.stat(), path.with_name("other")
    other.write_bytes(b"behind")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [touch, lengthen, swap])
def test_any_change_of_time_size_or_inode_reads_again(
    change: Callable[[Path], None], file: Path, tmp_path: Path
) -> None:
    saved = remembered(file, tmp_path)
    change(file)
    assert DigestCache(saved)(file) == file_digest(file)


def test_a_file_is_known_by_its_real_path(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = remembered(file, tmp_path)
    change_secretly(file, b"behind")
    link = tmp_path / "link"
    link.symlink_to(file)
    monkeypatch.chdir(tmp_path)
    cache = DigestCache(saved)
    assert cache(link) == cache(Path("source")) == hashlib.sha256(b"before").hexdigest()


@pytest.mark.parametrize("content", ["", "[1]", '{"PATH": 3}', '{"PATH": []}', '{"PATH": [1, 2]}', "\x00"])
def test_a_damaged_cache_only_costs_time(content: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text(content.replace("PATH", str(file)), encoding="utf-8")
    assert DigestCache(tmp_path / "digests.json")(file) == hashlib.sha256(b"before").hexdigest()


def test_a_cache_that_cannot_be_saved_is_no_error(file: Path, tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "no such folder" / "digests.json")
    cache(file)
    cache.save()


def test_what_took_long_to_read_is_remembered_at_once(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process that is killed has lost no more than some seconds."""
    monkeypatch.setattr(DigestCache, "SECONDS", 0.0)
    DigestCache(tmp_path / "digests.json")(file)
    change_secretly(file, b"behind")
    assert DigestCache(tmp_path / "digests.json")(file) == hashlib.sha256(b"before").hexdigest()


@pytest.mark.parametrize("error", [InputError("a bad row"), OSError("no disk"), KeyboardInterrupt()])
def test_what_was_read_is_remembered_however_the_work_ends(error: BaseException, file: Path, tmp_path: Path) -> None:
    config = load_config(small.settings(tmp_path))
    (config.run_dir / BOOKS).mkdir(parents=True)
    with pytest.raises(type(error)), digests_of(config) as digests:
        digests(file)
        raise error
    change_secretly(file, b"behind")
    with digests_of(config) as digests:
        assert digests(file) == hashlib.sha256(b"before").hexdigest()


def test_a_run_that_fails_in_ingest_has_read_its_sources_once(tmp_path: Path) -> None:
    config = load_config(str(small.build(tmp_path)))
    with (tmp_path / "data/corpus.jsonl").open("a", encoding="utf-8") as corpus:
        corpus.write("no JSON\n")
    with pytest.raises(InputError):
        graph.mine(config)
    known = json.loads((config.run_dir / BOOKS / "digests.json").read_text(encoding="utf-8"))
    sources = [path for path in tmp_path.rglob("*") if path.is_file() and "run" not in path.parts]
    sources.remove(tmp_path / "config.yaml")
    assert {name: entry[-1] for name, entry in known.items()} == {str(path): file_digest(path) for path in sources}


def test_looking_makes_no_run_directory(file: Path, tmp_path: Path) -> None:
    config = load_config(small.settings(tmp_path))
    with digests_of(config) as digests:
        digests(file)
    assert not config.run_dir.exists()


# --- publishing ---------------------------------------------------------------------------------------


def writer(content: bytes, error: BaseException | None = None) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(content)
        if error:
            raise error

    return write


def test_the_name_comes_from_the_content(tmp_path: Path) -> None:
    made = publish(tmp_path / "new" / "folder", lambda name: f"part-{name[:12]}.bin", writer(b"content"))
    expected = hashlib.sha256(b"content").hexdigest()
    assert (made.name, made.bytes, made.digest) == (f"part-{expected[:12]}.bin", 7, expected)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [made.name]


def test_a_published_file_is_replaced_whole(tmp_path: Path) -> None:
    publish(tmp_path, lambda _: "file", writer(b"one"))
    with (tmp_path / "file").open("rb") as reading:
        publish(tmp_path, lambda _: "file", writer(b"two"))
        assert reading.read() == b"one"
    assert (tmp_path / "file").read_bytes() == b"two"


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    publish(tmp_path, lambda _: "file", writer(b"one"))
    with pytest.raises((ValueError, StorageError, KeyboardInterrupt)):
        publish(tmp_path, lambda _: "file", writer(b"half", error))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"one")]


def test_json_without_a_form_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"score": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on the device"),
        (OSError(errno.EDQUOT, "x"), "quota is exceeded"),
        (OSError(errno.EROFS, "x"), "read-only"),
        (PermissionError(errno.EACCES, "x"), "no permission"),
        (OSError(errno.ENOTDIR, "x"), "part of its path is a file"),
        # Libraries that write files themselves say it in words.
        (RuntimeError("IO Error: could not write: No space left on device"), "no space left on the device"),
    ],
)
def test_refusals_of_the_file_system_are_explained(error: Exception, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="run the same command again") as caught, explained(tmp_path):
        raise error
    assert str(caught.value).startswith(f"cannot write {tmp_path}: ")
    assert reason in str(caught.value)
    assert ("bytes are free there" in str(caught.value)) == any(word in reason for word in ("space", "quota", "large"))


@pytest.mark.parametrize("error", [InputError("No space left on device"), KeyError("x"), FileNotFoundError("x")])
def test_other_errors_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, explained(tmp_path):
        raise error
    assert caught.value is error


# --- sidecars and manifests ---------------------------------------------------------------------------


KEYS = ["1" * 16, "2" * 16, "9" * 16]


def make_part(run_dir: Path, name: str = KEYS[0], content: bytes = b"data") -> Part:
    made = publish(run_dir / "encode", lambda found: f"{name}-{found[:12]}.npy", writer(content))
    file = File(path=f"encode/{made.name}", bytes=made.bytes, digest=made.digest)
    return Part(key=name, kind="corpus", rows=3, files=(file,), meta={"dimension": 2})


def test_a_part_is_done_when_its_files_are_there(tmp_path: Path) -> None:
    books, part = Books(tmp_path, "encode"), make_part(tmp_path)
    assert books.part(KEYS[0]) is None
    books.write_part(part)
    assert books.part(KEYS[0]) == part
    assert list(books.parts()) == [part]
    (tmp_path / part.files[0].path).write_bytes(b"dat")
    assert books.part(KEYS[0]) is None
    assert part.files[0].problem(LocalStore(tmp_path)) == f"{part.files[0].path} has 3 bytes, expected 4"
    (tmp_path / part.files[0].path).write_bytes(b"dada")
    assert books.part(KEYS[0]) == part  # its size is right: only a full check sees it
    assert part.files[0].problem(LocalStore(tmp_path)) is None
    assert (
        part.files[0].problem(LocalStore(tmp_path), full=True)
        == f"{part.files[0].path} has changed since it was written"
    )
    (tmp_path / part.files[0].path).unlink()
    assert books.part(KEYS[0]) is None
    assert part.files[0].problem(LocalStore(tmp_path)) == f"{part.files[0].path} is missing"
    assert not list(books.parts())


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"key": "1111111111111111"}', None])
def test_unreadable_sidecars_are_ignored(damage: bytes | None, tmp_path: Path) -> None:
    books = Books(tmp_path, "encode")
    books.write_part(make_part(tmp_path))
    good = make_part(tmp_path, KEYS[1], b"more")
    books.write_part(good)
    sidecar = tmp_path / books.folder / f"{KEYS[0]}.json"
    # None: a sidecar under a name that is not its part's.
    sidecar.write_bytes((tmp_path / books.folder / f"{KEYS[1]}.json").read_bytes() if damage is None else damage)
    assert books.part(KEYS[0]) is None
    assert list(books.parts()) == [good]


def make_manifest(part: Part, **changes: Any) -> Manifest:
    facts: dict[str, Any] = {"stage": "encode", "version": 1, "key": "k", "settings": {}, "inputs": {}}
    return Manifest(**facts | {"parts": (part,)} | changes)


def test_a_manifest_reads_as_it_was_written(tmp_path: Path) -> None:
    books, manifest = Books(tmp_path, "encode"), make_manifest(make_part(tmp_path), stats={"scores": [0.1, 1e-9, None]})
    assert books.manifest() is None
    assert books.write_manifest(manifest, None)
    assert not books.write_manifest(manifest, None)  # somebody was there before
    assert books.manifest() == manifest
    assert list(books.parts()) == []  # the manifest is no sidecar


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"\xff", b'{"stage": "encode"}'])
def test_a_damaged_manifest_is_an_error(damage: bytes, tmp_path: Path) -> None:
    books = Books(tmp_path, "encode")
    books.write_manifest(make_manifest(make_part(tmp_path)), None)
    books.manifest_path.write_bytes(damage)
    with pytest.raises(DamagedError, match="delete it and run the stage again; finished parts are reused") as caught:
        books.manifest()
    assert str(books.manifest_path) in str(caught.value)


def test_the_digest_of_a_manifest_is_its_content_alone(tmp_path: Path) -> None:
    part, other = make_part(tmp_path), make_part(tmp_path, KEYS[1], b"more")
    same = part.model_copy(update={"key": KEYS[2], "provenance": {"pid": 1}, "meta": {}})
    first = make_manifest(part).digest
    assert make_manifest(same, key="another", stats={"rows": 1}, settings={"a": 1}).digest == first
    assert make_manifest(other).digest != first
    assert make_manifest(part, parts=(part, other)).digest != make_manifest(part, parts=(other, part)).digest
