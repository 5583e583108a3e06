"""A run directory in a bucket: the bytes of one on a disk, whatever is killed, fails or comes at the same time.

A machine is a folder for copies: two of them see of each other what is in the bucket, and nothing else.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
import yaml
from doc_pages import blocks
from object_server import BUCKET, CEPH, CREDENTIALS, Bucket, Request, on_both, share
from real_runs import PATIENCE, kill

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine import upkeep
from negpipe.errors import ConfigError, LockedError, MissingPartsError, NegpipeError, StorageError
from negpipe.graph import Shard
from negpipe.review import diff
from negpipe.store import lease

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee(
        "a run is in a bucket, and requests fail, answers are lost, a token expires, it is killed, a second driver"
        " comes",
        "the bytes of a run on a disk",
    ),
]

KILLS, KILLS_ON_CEPH = 200, 50
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "object-storage.md"
STAGES = ("ingest", "encode", "index", "search", "triplets")
URL = f"s3://{BUCKET}/runs/one"
OTHER = {"range_max": 10, "relative_margin": None, "num_negatives": 2}
"""Settings of mining that are not those of the local run."""
FOLDERS = ("ingest", "encode", "index", "search", "rows", "ledger")
LOCAL, MINE = {"kind": "local", "workers": 2}, f"{sys.executable} -m negpipe mine {{file}}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "blow" in metafunc.fixturenames:
        full = metafunc.config.getoption("--torture")
        moto, ceph = (range(KILLS), range(KILLS_ON_CEPH)) if full else ((3, 8, 31), (1, 4, 9))
        blows = [
            *(pytest.param("moto", blow) for blow in moto),
            *(pytest.param("ceph", blow, marks=CEPH.marks) for blow in ceph),
        ]
        metafunc.parametrize(("bucket", "blow"), blows, indirect=["bucket"])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, and its run on this disk."""
    folder = tmp_path_factory.mktemp("local")
    small.build(folder)
    graph.mine(load_config(small.settings(folder)))
    return folder


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pauses between attempts."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that shows no sign of life for two seconds counts as dead, instead of a minute."""
    monkeypatch.setattr(lease, "held", partial(lease.held, patience=2.0))


def machine(local: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The config on a machine whose disk is this folder."""
    settings = {**small.settings(local), "run_dir": URL, **changes}
    settings["resources"] = {**settings["resources"], "cache": str(folder)}
    return settings


def mine(settings: dict[str, Any], **options: Any) -> graph.Result:
    return graph.mine(load_config(settings), **options)


def killed_when(
    due: Callable[[], bool],
    local: Path,
    folder: Path,
    bucket: Bucket,
    failing: Callable[[Request], str | None] = lambda _: None,
    executor: Mapping[str, Any] = LOCAL,
    command: str = MINE,
) -> bool:
    """A run by two workers in processes of their own, all killed at a request; whether it came to that."""
    file, process = folder / "config.json", None
    settings = machine(local, folder / "a", executor=executor)
    file.write_text(json.dumps(settings), encoding="utf-8")

    def strike(request: Request) -> str | None:
        if process is not None and process.poll() is None and due():
            kill(process)
        return failing(request)

    bucket.spoil = strike
    environment = {**os.environ, **bucket.environment}
    words = command.format(file=file).split()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)
        try:
            process.wait(5 * PATIENCE)
        finally:
            kill(process)
    bucket.spoil = lambda _: None
    assert process.returncode in (0, -signal.SIGKILL), (folder / "log").read_text()
    return process.returncode != 0


def parts(objects: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in objects.items() if name.partition("/")[0] in FOLDERS}


def expected(local: Path) -> dict[str, bytes]:
    run = local / "run"
    return {f"{folder}/{path.name}": path.read_bytes() for folder in FOLDERS for path in (run / folder).iterdir()}


def check(bucket: Bucket, local: Path, *, others: bool = False) -> None:
    """In the bucket are the files of the local run, and nothing that is not finished; `others`: beside them."""
    objects = bucket.objects("runs/one")
    there, wanted = parts(objects), expected(local)
    assert {name: there.get(name) for name in wanted} == wanted
    assert others or there.keys() == wanted.keys()
    manifests = {stage: json.loads(objects[f".negpipe/{stage}/manifest.json"]) for stage in STAGES}
    for stage, manifest in manifests.items():
        on_disk = json.loads((local / f"run/.negpipe/{stage}/manifest.json").read_text())
        assert manifest["key"] == on_disk["key"]
        assert [part["files"] for part in manifest["parts"]] == [part["files"] for part in on_disk["parts"]]
    named = json.loads(objects["triplets.json"])["files"]
    shown = sorted((local / "run/triplets").iterdir())
    assert {name: objects[path] for name, path in named.items()} == {path.name: path.read_bytes() for path in shown}
    assert not bucket.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    left = {name for name in objects if name.startswith(".negpipe/locks") or "probe" in name or "claim" in name}
    left |= {name for name in objects if name.endswith(".versions")}
    assert not left


@on_both
def test_it_is_the_run_of_a_disk_and_the_next_has_nothing_to_do(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    assert mine(machine(local, tmp_path / "a")).ran == STAGES
    check(bucket, local)
    for disk in ("a", "b"):  # this machine, and one that never saw the run
        bucket.forget()
        assert mine(machine(local, tmp_path / disk)).ran == ()
        lists = [request.query["prefix"] for request in bucket.seen if request.kind == "LIST"]
        assert lists == [["runs/one/.negpipe/locks/"]]
        read = [request.key.removeprefix("runs/one/") for request in bucket.seen if request.kind == "GET"]
        assert not any(name.startswith(FOLDERS) for name in read)
        assert bucket.counts()["GET"] <= 16 and bucket.counts()["PUT"] <= 8
    check(bucket, local)


def test_parts_come_before_what_names_them(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    """So that no reader, at any moment, finds a record, a manifest or a pointer that names what is not there."""
    mine(machine(local, tmp_path / "a"))
    puts = [request for request in bucket.seen if request.method == "PUT" and request.key.startswith("runs/one/")]
    order = {request.key.removeprefix("runs/one/"): place for place, request in enumerate(puts)}
    headers = {request.key.removeprefix("runs/one/"): request.headers for request in puts}
    objects = bucket.objects("runs/one")
    for stage in STAGES:
        name = f".negpipe/{stage}/manifest.json"
        parts = json.loads(objects[name])["parts"]
        assert parts and "If-None-Match" in headers[name]
        for part in parts:
            record = f".negpipe/{stage}/{part['key']}.json"
            assert max(order[file["path"]] for file in part["files"]) < order[record] < order[name]
    rows = json.loads(objects["triplets.json"])["files"].values()
    assert max(order[path] for path in rows) < order["triplets.json"] and "If-None-Match" in headers["triplets.json"]


@pytest.mark.slow
def test_another_setting_on_another_machine_fetches_what_it_reads(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    mine(machine(local, tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    bucket.forget()
    assert mine(machine(local, tmp_path / "b", mining=OTHER)).ran == ("triplets",)
    fetched = [request.key.split("/")[2] for request in bucket.seen if request.kind == "GET"]
    assert fetched.count("search") == 2 and not {"index", "rows", "ledger"} & {*fetched}
    check_again = mine(machine(local, tmp_path / "c"))
    assert check_again.ran == ("triplets",)
    check(bucket, local, others=True)


@pytest.mark.slow
def test_every_command_that_looks_at_a_run(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    config = tmp_path / "config.yaml"
    settings = machine(local, tmp_path / "a", output={"report": True})
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert "run_dir: s3:" in config.read_text(encoding="utf-8")
    outcome = small.run("mine", config)
    assert outcome.code == 0, outcome.err
    assert f"Parquet files: {URL}/triplets.json" in outcome.out.replace("\n", " "), outcome.out
    shutil.rmtree(tmp_path / "a")
    said = {
        "status": "current",
        "verify": f"files in {URL} are intact",
        "audit": "",
        "plan": "",
        "report": "report.html",
        "explain": "",
        "clean --yes": f"Nothing to clean in {URL}",
        "export --to flagembedding": "",
    }
    extra: dict[str, list[object]] = {"explain": ["--anchor", "q1"], "export": ["--out", tmp_path / "out.jsonl"]}
    for command, expectation in said.items():
        verb, *flags = command.split()
        more = extra.get(verb, [])
        outcome = small.run(verb, config, *flags, *more)
        assert outcome.code == 0, (command, outcome.err)
        assert expectation in outcome.out + outcome.err, (command, outcome.out)
    objects = bucket.objects("runs/one")
    assert b"<html" in objects["report.html"] and "rows" in json.loads(objects["audit.json"])
    assert diff.compare(diff.source_of(str(config)), diff.source_of(str(local / "run"))).added == 0
    secrets = [value.encode() for value in [*CREDENTIALS.values()][:2]]
    written = [*objects.values(), *(path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file())]
    assert not any(secret in content for secret in secrets for content in written)


@pytest.mark.slow
def test_damage_is_found_and_made_again(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(machine(local, tmp_path / "a")), encoding="utf-8")
    mine(machine(local, tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    changed, gone = sorted(name for name in bucket.objects("runs/one") if name.startswith("encode/"))[:2]
    content = bucket.objects("runs/one")[changed]
    bucket.client.put_object(Bucket=BUCKET, Key=f"runs/one/{changed}", Body=content[:-1] + b"?")
    outcome = small.run("verify", config)
    assert outcome.code == 5 and f"{changed} has changed since it was written" in outcome.err
    bucket.client.delete_object(Bucket=BUCKET, Key=f"runs/one/{gone}")
    assert f"{gone} is missing" in str(graph.status(load_config(machine(local, tmp_path / "a")))[1])
    assert small.run("mine", config, "--repair").code == 0
    check(bucket, local)
    copy = tmp_path / "a/cache" if (tmp_path / "a/cache").is_dir() else tmp_path / "a"
    struck = next(path for path in sorted(copy.rglob("encode/*.npy")))
    struck.write_bytes(struck.read_bytes()[:-1] + b"?")  # on this machine's disk alone
    outcome = small.run("verify", config)
    assert outcome.code == 5 and f"{struck.name} has changed since it was written" in outcome.err
    assert small.run("mine", config, "--repair").code == 0
    assert small.run("verify", config).code == 0
    check(bucket, local)


@pytest.mark.slow
def test_clean_deletes_what_no_manifest_names(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    settings = machine(local, tmp_path / "a")
    mine({**settings, "mining": OTHER})
    mine(settings)
    config = load_config(settings)
    listed = graph.superseded(config)
    assert len(listed) == 6 and graph.clean(config) == sum(size for _, size in listed)
    check(bucket, local)
    assert not graph.superseded(config)


@on_both
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_of_requests_that_fail_nothing_is_lost(local: Path, tmp_path: Path, bucket: Bucket, seed: int) -> None:
    bucket.spoil = share(seed, 0.05)
    for disk in ("a", "a", "b"):
        mine(machine(local, tmp_path / disk))
    assert sum(bucket.spoilt.values()) > 5
    bucket.spoil = lambda _: None
    check(bucket, local)


@pytest.mark.slow
@pytest.mark.parametrize("after", [20, 40, 90, 150])
def test_a_token_that_expires_is_named_and_the_run_goes_on_later(
    local: Path, tmp_path: Path, bucket: Bucket, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "held", partial(lease.held, patience=2.0))  # the first run's lease outlives it
    bucket.spoil = lambda _: "400 ExpiredToken" if len(bucket.seen) > after else None
    with pytest.raises(StorageError, match=r"have expired: renew them. No finished work was lost"):
        mine(machine(local, tmp_path / "a"))
    bucket.spoil = lambda _: None
    there = parts(bucket.objects("runs/one"))
    mine(machine(local, tmp_path / "a"))
    check(bucket, local)
    assert there.items() <= parts(bucket.objects("runs/one")).items()


LATE: dict[str, Callable[[float], float]] = {
    "three seconds": lambda _: time.monotonic() - 3,
    "a command": lambda began: began,
}


@pytest.mark.slow
@pytest.mark.parametrize("late", LATE)
def test_lists_that_are_late_hide_nothing_and_bring_nothing_back(
    local: Path, tmp_path: Path, bucket: Bucket, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed, resumed, changed, cleaned and repaired where objects are listed as they were before."""
    monkeypatch.setattr("negpipe.store.objects._FEW", 2)

    def command(act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        bucket.listed_at = lambda: LATE[late](began)
        bucket.forget()
        return act(*arguments, **options)

    def written(*folders: str) -> set[str]:
        keys = {request.key.removeprefix("runs/one/") for request in bucket.seen if request.method == "PUT"}
        return {key for key in keys if key.startswith(folders or FOLDERS)}

    assert command(killed_when, lambda: len(written("search")) >= 2, local, tmp_path, bucket)
    there = bucket.objects("runs/one")
    records = [json.loads(there[name]) for name in there if re.fullmatch(r"\.negpipe/\w+/[0-9a-f]{16}\.json", name)]
    finished = {file["path"] for record in records for file in record["files"]}
    assert finished and {name.partition("/")[0] for name in finished} >= {"ingest", "encode", "index"}

    assert command(mine, machine(local, tmp_path / "a")).ran[-2:] == ("search", "triplets")
    assert not finished & written()
    check(bucket, local)
    assert command(mine, machine(local, tmp_path / "b")).ran == ()

    assert command(mine, machine(local, tmp_path / "b", mining=OTHER)).ran == ("triplets",)
    assert written()
    assert command(mine, machine(local, tmp_path / "a")).ran == ("triplets",)
    assert not written()
    check(bucket, local, others=True)

    command(graph.clean, load_config(machine(local, tmp_path / "a")))
    check(bucket, local, others=True)


@pytest.mark.slow
def test_lists_that_still_show_what_was_deleted(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    config = load_config(machine(local, tmp_path / "a"))
    mine(machine(local, tmp_path / "a", mining=OTHER))
    mine(machine(local, tmp_path / "a"))
    before = time.monotonic()
    graph.clean(config)
    bucket.listed_at = lambda: before
    assert graph.superseded(config) == []
    found = graph.inventory(config)
    assert not found.unreadable and not upkeep.verify(config, found)
    graph.clean(config)
    assert mine(machine(local, tmp_path / "b"), repair=True).ran == ()
    check(bucket, local)


@pytest.mark.slow
def test_what_no_list_shows_is_repaired_and_rebuilt(
    local: Path, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("negpipe.engine.versions.version", lambda name: "0.0.1")
        mine(machine(local, tmp_path / "a"))
    bucket.listed_at = lambda: 0.0
    assert mine(machine(local, tmp_path / "a"), rebuild=True).ran == STAGES
    check(bucket, local)
    damaged, content = min((name, content) for name, content in expected(local).items() if name.startswith("encode/"))
    bucket.client.put_object(Bucket=BUCKET, Key=f"runs/one/{damaged}", Body=b"?" * len(content))
    assert "encode" in mine(machine(local, tmp_path / "b"), repair=True).ran
    check(bucket, local)


def test_a_service_without_conditional_writes_is_refused_before_anything_is_made(
    local: Path, tmp_path: Path, bucket: Bucket
) -> None:
    bucket.spoil = lambda _: "unconditional"
    with pytest.raises(ConfigError, match="does not support conditional writes"):
        mine(machine(local, tmp_path / "a"))
    assert not bucket.objects()


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False])
def test_shards_of_two_machines_make_it(local: Path, tmp_path: Path, bucket: Bucket, listed: bool) -> None:
    """Also where no list shows what the other machine made."""
    bucket.listed_at = None if listed else lambda: 0.0
    settings = [machine(local, tmp_path / disk) for disk in "ab"]
    mine(settings[0], only="ingest")
    for stage in STAGES[1:]:
        worked = graph.work(load_config(settings[1]), stage, Shard(1, 2))
        if worked.made < len(json.loads((local / f"run/.negpipe/{stage}/manifest.json").read_text())["parts"]):
            with pytest.raises(MissingPartsError):
                graph.commit(load_config(settings[1]), stage)
        graph.work(load_config(settings[0]), stage, Shard(0, 2))
        graph.commit(load_config(settings[1]), stage)
    check(bucket, local)


@on_both
@pytest.mark.slow
def test_a_second_driver_is_refused_by_the_name_of_the_first(
    local: Path, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "held", partial(lease.held, patience=2.0))
    refused: list[BaseException] = []

    def second(request: Request) -> None:
        if "encode/" in request.key and request.method == "PUT" and not refused:
            refused.append(StopIteration())
            with pytest.raises(LockedError, match="is in use by") as caught:
                mine(machine(local, tmp_path / "b"))
            refused[0] = caught.value

    bucket.spoil = second
    mine(machine(local, tmp_path / "a"))
    assert isinstance(refused[0], LockedError)
    check(bucket, local)


@on_both
@pytest.mark.slow
def test_two_drivers_that_know_nothing_of_each_other_spoil_nothing(
    local: Path, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "held", lambda *_, **__: nullcontext())
    start = threading.Barrier(2)

    def drive(disk: str) -> tuple[str, ...]:
        start.wait()
        return mine(machine(local, tmp_path / disk)).ran

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(drive, "ab"))
    check(bucket, local)


@on_both
@pytest.mark.slow
def test_two_drivers_with_other_rules_show_the_rows_of_one_of_them(
    local: Path, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both believe to hold the run: rows are never of both, and each gets its own by running alone."""
    other = tmp_path / "other"
    shutil.copytree(local, other)
    other_rules = {"mining": OTHER, "run_dir": str(other / "run")}
    graph.mine(load_config({**small.settings(local), **other_rules}))
    mine(machine(local, tmp_path / "a"))
    start = threading.Barrier(2)

    def drive(disk: str, changes: dict[str, Any]) -> NegpipeError | None:
        config = load_config(machine(local, tmp_path / disk, **changes))
        start.wait()
        try:
            graph.mine(config)
        except NegpipeError as error:  # it noticed the other
            return error
        return None

    def shown() -> list[bytes]:
        objects = bucket.objects("runs/one")
        return sorted(objects[path] for path in json.loads(objects["triplets.json"])["files"].values())

    own = {
        folder: sorted(path.read_bytes() for path in (folder / "run/triplets").iterdir()) for folder in (local, other)
    }
    with monkeypatch.context() as patch:
        patch.setattr(lease, "held", lambda *_, **__: nullcontext())
        for _ in range(4):
            # Both have something to select, and begin at once.
            mine(machine(local, tmp_path / "a", mining={**OTHER, "num_negatives": 1}))
            with ThreadPoolExecutor(2) as pool:
                noticed = list(pool.map(drive, "ab", [{}, {"mining": OTHER}]))
            assert noticed.count(None) >= 1
            assert shown() in own.values()
    for folder, changes in ((local, {}), (other, {"mining": OTHER})):
        mine(machine(local, tmp_path / "a", **changes))
        assert shown() == own[folder]
        assert {state.state for state in graph.status(load_config(machine(local, tmp_path / "a", **changes)))} == {
            "current"
        }


@pytest.fixture
def no_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many a run gives depends on how long it takes."""
    monkeypatch.setattr(lease, "held", partial(lease.held, patience=3600.0))


@pytest.mark.slow
@pytest.mark.usefixtures("no_signs_of_life")
def test_the_page_shows_how_many_requests_a_run_makes(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    """Exactly; bytes within a tenth: records name this machine, its libraries and seconds."""
    kinds = ("PUT", "GET", "HEAD", "LIST", "DELETE")
    triplets = "`triplets` with another setting, on another machine"
    made: dict[str, list[int]] = {}
    for run, disk, changes in (
        ("complete run", "a", {}),
        ("nothing to do", "a", {}),
        ("nothing to do, on another machine", "b", {}),
        (triplets, "c", {"mining": OTHER}),
    ):
        bucket.forget()
        mine(machine(local, tmp_path / disk, **changes))
        made[run] = [*(bucket.counts()[kind] for kind in kinds), bucket.moved["up"], bucket.moved["down"]]
    rows = [f"| {run} | {' | '.join(f'{number:,}' for number in numbers)} |" for run, numbers in made.items()]
    text = PAGE.read_text(encoding="utf-8")
    assert " | ".join(["", *kinds, "bytes up", "bytes down"]) in text
    for run, numbers in made.items():
        shown = re.search(rf"^\| {re.escape(run)} \| (.+) \|$", text, re.MULTILINE)
        assert shown, rows
        said = [int(number.replace(",", "")) for number in shown[1].split(" | ")]
        assert said[: len(kinds)] == numbers[: len(kinds)], rows
        assert said[len(kinds) :] == pytest.approx(numbers[len(kinds) :], rel=0.1), rows


@pytest.mark.slow
@pytest.mark.usefixtures("no_signs_of_life")
def test_requests_grow_with_the_parts_and_no_faster(tmp_path: Path, bucket: Bucket) -> None:
    sizes, first, again = [], [], []
    for documents in (40, 80, 160, 320):
        folder = tmp_path / str(documents)
        small.build(folder, small.documents(documents))
        bucket.clear()
        settings = machine(folder, folder / "cache")
        mine(settings)
        first.append(bucket.counts())
        bucket.forget()
        mine(settings)
        again.append(bucket.counts())
        manifests = [bucket.objects(f"runs/one/.negpipe/{stage}/manifest")[".json"] for stage in STAGES]
        sizes.append(sum(len(json.loads(manifest)["parts"]) for manifest in manifests))
    assert sizes[-1] > 5 * sizes[0]
    assert {counts["PUT"] - 2 * parts for counts, parts in zip(first, sizes, strict=True)} == {15}
    each = [counts.total() / parts for counts, parts in zip(first, sizes, strict=True)]
    assert each == sorted(each, reverse=True)
    assert again[-1].total() < again[0].total()


@pytest.mark.slow
@pytest.mark.torture
def test_a_run_that_is_killed_at_any_request_goes_on(
    local: Path, tmp_path: Path, bucket: Bucket, blow: int, record_property: Any, impatient: None
) -> None:
    at = random.Random(blow).randint(5, 220)
    died = killed_when(lambda: len(bucket.seen) >= at, local, tmp_path, bucket, share(blow, 0.05))
    assert died or len(bucket.seen) < at
    record_property("count: kills of runs in a bucket", int(died))
    before = parts(bucket.objects("runs/one"))
    mine(machine(local, tmp_path / "a"))
    graph.clean(load_config(machine(local, tmp_path / "a")))
    check(bucket, local)
    assert before.items() <= parts(bucket.objects("runs/one")).items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "stage"),
    [
        ("inline", "encode"),
        ("inline", "triplets"),
        ("shards", "encode"),
        pytest.param("ray", "search", marks=pytest.mark.cluster),
        pytest.param("slurm", "encode", marks=pytest.mark.cluster),
    ],
)
def test_the_driver_of_any_executor_is_killed(
    executor: str, stage: str, local: Path, tmp_path: Path, bucket: Bucket, impatient: None
) -> None:
    """Once it has written a part of the stage, or all shards once one of them has."""
    if executor == "ray":
        pytest.importorskip("ray")
    folder = "rows" if stage == "triplets" else stage
    inline: dict[str, Any] = {"kind": "inline"}
    settings: dict[str, dict[str, Any]] = {
        "ray": {"kind": "ray", "workers": 2, "ray": {"address": "local", "wait": "5min"}},
        "slurm": {"kind": "slurm", "slurm": {"cluster": "local", "shards": 2, "folder": str(tmp_path / "logs")}},
    }
    tools = f"make -C {ROOT} mine-shards SHARDS=2 CONFIG={{file}} BIN={Path(sys.executable).parent}"
    assert killed_when(
        lambda: any(request.kind == "PUT" and f"/one/{folder}/" in request.key for request in bucket.seen),
        local,
        tmp_path,
        bucket,
        executor=settings.get(executor, inline),
        command=tools if executor == "shards" else MINE,
    )
    before = parts(bucket.objects("runs/one"))
    assert any(name.startswith(f"{folder}/") for name in before) and "triplets.json" not in before
    mine(machine(local, tmp_path / "a", executor=settings["slurm"] if executor == "slurm" else inline))
    graph.clean(load_config(machine(local, tmp_path / "a")))
    check(bucket, local)
    assert before.items() <= parts(bucket.objects("runs/one")).items()


@pytest.fixture(scope="module")
def remote_source(local: Path) -> Iterator[dict[str, Path]]:
    yield {
        **{str(path.relative_to(local)): path for path in (local / "data").rglob("*") if path.is_file()},
        **{name: local / name for name in ("corpus.npy", "anchors.npy")},
    }


@pytest.mark.slow
def test_sources_lie_in_a_bucket_too(
    local: Path, tmp_path: Path, bucket: Bucket, remote_source: dict[str, Path]
) -> None:
    for name, path in remote_source.items():
        bucket.client.upload_file(str(path), BUCKET, f"source/{name}")
    source = f"s3://{BUCKET}/source"
    data = {
        "corpus": {"path": f"{source}/data/corpus.jsonl"},
        "queries": {"path": f"{source}/data/queries.jsonl"},
        "qrels": {"path": f"{source}/data/qrels/train.tsv"},
        "part_rows": 8,
    }
    vectors = {
        f"{name}_vectors": f"{source}/{file}" for name, file in (("corpus", "corpus.npy"), ("anchor", "anchors.npy"))
    }
    settings = machine(local, tmp_path / "a", data=data)
    settings["encoder"] = {"backend": "precomputed", **vectors}
    mine(settings)
    bucket.forget()
    assert mine(settings).ran == () and not any(
        "npy" in request.key for request in bucket.seen if request.kind == "GET"
    )
    objects = bucket.objects("runs/one")
    named = json.loads(objects["triplets.json"])["files"]
    shown = sorted((local / "run/triplets").iterdir())
    assert [objects[path] for path in named.values()] == [path.read_bytes() for path in shown]


@pytest.mark.slow
def test_the_rows_in_python(local: Path, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says."""
    mine(machine(local, tmp_path / "a"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (block,) = (block for block in blocks("python") if block.page.name == "object-storage.md")
    names: dict[str, Any] = {}
    exec(block.text.replace("s3://my-bucket/runs/first", URL), names)
    rows = names["rows"]
    assert rows.num_rows == 36 and np.all(np.array(rows["negative_score"]) < 2)
