"""A bucket that answers late, wrongly or not at all; and copies of it on a disk that is too small."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from object_server import BUCKET, CREDENTIALS, Bucket, Request, on_both, share

from negpipe.errors import ConfigError, DamagedError, LockedError, StorageError
from negpipe.store import lease, objects, s3
from negpipe.store.cache import FileCache
from negpipe.store.files import write_all
from negpipe.store.objects import ObjectStore
from negpipe.store.unfinished import owner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee(
        "a run is in a bucket, and requests fail, answers are lost, a token expires, it is killed, a second driver"
        " comes",
    ),
]

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pauses between attempts."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


def on(folder: Path, room: int = 2**30) -> ObjectStore:
    """A machine's view of the store: each has a disk of its own."""
    return ObjectStore(s3.Bucket(BUCKET), "run", FileCache(folder, room))


def put(store: ObjectStore, content: bytes, key: str = KEY) -> str:
    made = store.put("encode", lambda digest: f"{key}-{digest[:12]}.npy", lambda file: write_all(file, content))
    return f"encode/{made.name}"


def spoil_once(bucket: Bucket, how: str, *methods: str) -> None:
    left = [how]
    bucket.spoil = lambda request: left.pop() if left and request.method in methods else None


def test_what_another_machine_wrote_is_fetched_once(bucket: Bucket, tmp_path: Path) -> None:
    name = put(on(tmp_path / "a"), b"content")
    bucket.forget()
    other = on(tmp_path / "b")
    for _ in range(2):
        assert other.path(name).read_bytes() == b"content"
    assert bucket.counts() == {"GET": 1}


def test_what_a_machine_wrote_itself_is_not_fetched(bucket: Bucket, tmp_path: Path) -> None:
    store = on(tmp_path)
    name = put(store, b"content")
    bucket.forget()
    assert store.path(name).read_bytes() == b"content" and not bucket.seen


@on_both
@pytest.mark.parametrize("how", ["500", "503 SlowDown", "reset", "lost", "timeout"])
def test_what_fails_for_a_moment_is_tried_again(
    bucket: Bucket, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "TIMEOUT", 1.0)
    store = on(tmp_path / "a")
    spoil_once(bucket, how, "PUT")
    name = put(store, b"content")
    for method in ("GET", "HEAD"):
        spoil_once(bucket, how, method)
        assert on(tmp_path / method).path(name).read_bytes() == b"content"
        assert store.size(name) == 7 and store.names("encode") == [name]
    assert bucket.spoilt == {how: 3}


@on_both
@pytest.mark.parametrize("before", [None, b"before"])
def test_a_conditional_write_whose_answer_is_lost_is_known_as_our_own(
    bucket: Bucket, tmp_path: Path, before: bytes | None
) -> None:
    store = on(tmp_path)
    if before:
        assert store.replace("manifest.json", before, None)
    spoil_once(bucket, "lost", "PUT")
    assert store.replace("manifest.json", b"ours", before)
    assert bucket.spoilt == {"lost": 1} and store.read("manifest.json") == b"ours"


@on_both
def test_a_conditional_write_that_came_late_is_known_as_such_whatever_is_lost(bucket: Bucket, tmp_path: Path) -> None:
    store = on(tmp_path)
    spoil_once(bucket, "lost", "PUT")
    store.replace("manifest.json", b"theirs", None)
    spoil_once(bucket, "lost", "PUT")
    assert not store.replace("manifest.json", b"ours", None) and store.read("manifest.json") == b"theirs"


@on_both
def test_an_answer_that_breaks_off_is_gone_on_from_there(bucket: Bucket, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 * 2**20)
    name = put(on(tmp_path / "a"), content)
    bucket.forget()
    spoil_once(bucket, "cut", "GET")
    assert on(tmp_path / "b").path(name).read_bytes() == content
    assert bucket.counts()["GET"] == 2 and bucket.moved["down"] < 1.7 * len(content)


@on_both
def test_what_is_not_what_its_name_says_is_damage_and_leaves_no_copy(bucket: Bucket, tmp_path: Path) -> None:
    name = put(on(tmp_path / "a"), b"content")
    bucket.client.put_object(Bucket=BUCKET, Key=f"run/{name}", Body=b"another")
    store = on(tmp_path / "b")
    with pytest.raises(DamagedError, match=f"s3://bucket/run/{name} has changed since it was written.*--repair"):
        store.path(name)
    assert not list((tmp_path / "b/encode").iterdir()) and store.digest(name) != name[-16:-4]


@on_both
@pytest.mark.slow
@pytest.mark.parametrize("how", [None, "500", "reset", "lost"])
def test_a_large_file_appears_when_its_last_part_is_there(
    bucket: Bucket, tmp_path: Path, how: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "LONGEST_PUT", 20 * 2**20)
    content = random.Random(2).randbytes(23 * 2**20)
    if how:
        spoil_once(bucket, how, "POST" if how == "lost" else "PUT")
    completed = [False]

    def lose_the_end(request: Request) -> str | None:
        if request.method == "POST" and "uploadId" in request.query and not completed[0]:
            completed[0] = True
            assert "run/encode" not in str(bucket.client.list_objects_v2(Bucket=BUCKET).get("Contents"))
            return "lost"
        return None

    if how == "lost":
        bucket.spoil = lose_the_end
    name = put(on(tmp_path / "a"), content)
    assert sum(request.method == "PUT" for request in bucket.seen) >= 5
    assert on(tmp_path / "b").path(name).read_bytes() == content
    if how == "lost":
        assert completed[0]


def test_a_listing_that_is_late_hides_nothing(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = on(tmp_path)
    monkeypatch.setattr(objects, "_FEW", 2)
    names = [put(store, str(number).encode(), f"{number:016x}") for number in range(6)]
    old = [*store.bucket.listed("run/encode/")][:3]
    monkeypatch.setattr(s3.Bucket, "listed", lambda *_: iter(old))
    assert store.sizes(names) == dict.fromkeys(names, 1)


def test_copies_asked_for_longest_ago_make_room(bucket: Bucket, tmp_path: Path) -> None:
    store = ObjectStore(s3.Bucket(BUCKET), "run", FileCache(tmp_path, 5000, in_use=0.0))
    names = []
    for number in range(5):
        names.append(put(store, bytes([number]) * 1000, f"{number:016x}"))
        time.sleep(0.02)
    assert store.path(names[0]).exists()
    time.sleep(0.02)
    names.append(put(store, b"x" * 1000, f"{9:016x}"))
    there = [name for name in names if (tmp_path / name).exists()]
    assert names[0] in there and names[1] not in there and len(there) == 5
    assert store.path(names[1]).read_bytes() == b"\1" * 1000


def test_what_is_in_use_stays_and_is_told(bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = on(tmp_path, 1500)
    names = [put(store, bytes([number]) * 1000, f"{number:016x}") for number in range(3)]
    assert all((tmp_path / name).exists() for name in names)
    assert "resources.cache_size" in caplog.text


REFUSED = {
    "404 NoSuchBucket": (ConfigError, "the bucket does not exist"),
    "403 AccessDenied": (StorageError, "lack a permission.*s3:PutObject.*run the same command again"),
    "400 ExpiredToken": (StorageError, "have expired: renew them.*run the same command again"),
    "403 InvalidAccessKeyId": (StorageError, "are not valid: check AWS_PROFILE"),
    "403 SignatureDoesNotMatch": (StorageError, "are not valid: check AWS_PROFILE"),
    "301 PermanentRedirect": (StorageError, "another region: set AWS_DEFAULT_REGION"),
    "400 AuthorizationHeaderMalformed": (StorageError, "another region: set AWS_DEFAULT_REGION"),
    "411 MissingContentLength": (StorageError, "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    "403 RequestTimeTooSkewed": (StorageError, "clock is off"),
    "503 SlowDown": (StorageError, "S3 answers SlowDown"),
    "reset": (StorageError, "cannot be reached.*check the network and AWS_ENDPOINT_URL"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_refusals_are_named_and_hold_no_secret(bucket: Bucket, tmp_path: Path, how: str) -> None:
    store, (kind, said) = on(tmp_path), REFUSED[how]
    name = put(store, b"content")
    # Whoever is sent to another region asks the bucket for it.
    bucket.spoil = lambda request: how if request.method != "HEAD" or request.key else None
    asked: list[Any] = [
        lambda: put(store, b"other"),
        lambda: store.size(name) if "NoSuchBucket" not in how else store.names("encode"),
        lambda: store.names("encode"),
        lambda: store.read(name),
        lambda: store.replace("manifest.json", b"", None),
        lambda: on(tmp_path / "b").path(name),
        lambda: store.delete(name),
    ]
    for ask in asked:
        with pytest.raises(kind, match=f"(?s)s3://bucket/run.*{said}") as caught:
            ask()
        assert not any(secret in str(caught.value) for secret in list(CREDENTIALS.values())[:2])
    bucket.spoil = lambda _: None
    assert store.size(name) == 7


def test_without_credentials_it_says_where_they_belong(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3._client.cache_clear()
    with pytest.raises(ConfigError, match=r"no credentials found: set AWS_PROFILE.*they do not belong in a config"):
        on(tmp_path).size("x")


@pytest.mark.guarantee(
    "a service has no conditional writes",
    "refused before anything is made (exit code 2)",
)
def test_a_bucket_without_conditional_writes_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    on(tmp_path).check_conditions()
    bucket.spoil = lambda _: "unconditional"
    told = r"does not support conditional writes \(If-None-Match\), so two drivers could both"
    with pytest.raises(ConfigError, match=told):
        on(tmp_path).check_conditions()
    for how in ("unconditional", "412 PreconditionFailed"):  # it writes always, or never
        bucket.spoil = lambda request, how=how: how if "If-Match" in request.headers else None  # type: ignore[misc]
        with pytest.raises(ConfigError, match=r"does not support conditional writes \(If-Match\)"):
            on(tmp_path).check_conditions()
    assert not bucket.objects()


@pytest.mark.guarantee(
    "a service compares the tags of conditional writes without their quotes, as Ceph does, or only with them",
    "conditional writes work",
)
@pytest.mark.parametrize("refused", ["quoted", "bare"])
def test_a_tag_is_sent_as_the_service_compares_it(bucket: Bucket, tmp_path: Path, refused: str) -> None:
    how = "412 PreconditionFailed" if refused == "quoted" else "400 InvalidArgument"

    def spoil(request: Request) -> str | None:
        tag = request.headers.get("If-Match", "") if request.method == "PUT" else ""
        return how if tag and tag.startswith('"') == (refused == "quoted") else None

    store, bucket.spoil = on(tmp_path), spoil
    store.check_conditions()
    assert store.replace("manifest.json", b"first", None) and store.replace("manifest.json", b"second", b"first")
    assert not store.replace("manifest.json", b"late", b"first") and store.read("manifest.json") == b"second"
    changed = [False]

    def change(request: Request) -> str | None:
        if request.method == "PUT" and not changed[0]:
            changed[0] = True
            bucket.client.put_object(Bucket=BUCKET, Key="run/manifest.json", Body=b"theirs")
        return spoil(request)

    bucket.spoil = change
    assert not store.replace("manifest.json", b"ours", b"second") and store.read("manifest.json") == b"theirs"


@on_both
def test_of_random_failures_nothing_is_lost(bucket: Bucket, tmp_path: Path) -> None:
    bucket.spoil = share(5, 0.2)
    store = on(tmp_path / "a")
    names = {put(store, random.Random(n).randbytes(1000 * n), f"{n:016x}"): n for n in range(20)}
    content = None
    for number in range(10):
        assert store.replace("manifest.json", f"{number}".encode(), content)
        content = f"{number}".encode()
    other = on(tmp_path / "b")
    assert all(other.path(name).read_bytes() == random.Random(n).randbytes(1000 * n) for name, n in names.items())
    assert store.sizes(names) == {name: 1000 * n for name, n in names.items()}
    assert sum(bucket.spoilt.values()) > 5


# --- leases ---------------------------------------------------------------------------------------------


def left_by(bucket: Bucket, who: str, key: str = "run") -> None:
    bucket.client.put_object(Bucket=BUCKET, Key=f"run/{lease.FOLDER}/{key}.claim", Body=f"{who} 7\n".encode())


def elsewhere() -> str:
    return owner().partition("@")[0] + "@another.0123abcd"


@on_both
def test_who_lives_keeps_it_and_others_are_refused_by_name(bucket: Bucket, tmp_path: Path) -> None:
    refused = pytest.raises(LockedError, match=r"s3://bucket/run is in use by .*: wait for it or stop it")
    with lease.held(on(tmp_path), "run", patience=2.0):
        with refused, lease.held(on(tmp_path / "b"), "run", patience=2.0):
            pass
        with pytest.raises(LockedError), lease.held(on(tmp_path / "b"), "run", shared=True, patience=2.0):
            pass
    assert not bucket.objects()


@on_both
def test_who_is_dead_elsewhere_keeps_it_for_a_while_whatever_any_clock_says(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = random.Random(3)
    monkeypatch.setattr("negpipe.store.claims.time.time", lambda: wild.uniform(0, 4e9))
    left_by(bucket, elsewhere())
    began = time.monotonic()
    with lease.held(on(tmp_path), "run", patience=1.0):
        assert time.monotonic() - began > 1.0


def test_the_dead_of_this_machine_hold_nothing(bucket: Bucket, tmp_path: Path) -> None:
    left_by(bucket, f"{2**22 + 1}.7@{owner().partition('@')[2]}")
    began = time.monotonic()
    with lease.held(on(tmp_path), "run", patience=60.0):
        assert time.monotonic() - began < 30


@on_both
def test_shards_share_it_and_who_wants_it_alone_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    with (
        lease.held(on(tmp_path), "run", shared=True, patience=2.0),
        lease.held(on(tmp_path), "run", shared=True, patience=2.0),
        pytest.raises(LockedError),
        lease.held(on(tmp_path), "run", patience=2.0),
    ):
        pass
    left_by(bucket, elsewhere(), f"run-{'0' * 32}")
    with lease.held(on(tmp_path), "run", patience=1.0):
        pass
    assert not bucket.objects()


@on_both
def test_a_holder_that_was_taken_for_dead_does_not_take_it_back(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lease.held(on(tmp_path), "run", patience=0.6):
        left_by(bucket, elsewhere())
        deadline = time.monotonic() + 30
        while "another process has taken this claim" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "another process has taken this claim" in caplog.text
    assert elsewhere().encode() in next(iter(bucket.objects().values()))
