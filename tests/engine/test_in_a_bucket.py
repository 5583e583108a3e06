"""A run directory in a bucket: the bytes of one on a disk, whatever is killed, fails or comes at the same time.

A machine is a folder for copies: two of them see of each other what is in the bucket, and nothing else.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
import yaml
from object_server import BUCKET, CREDENTIALS, Bucket, Request, share
from real_runs import PATIENCE, kill

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import ConfigError, LockedError, MissingPartsError, StorageError
from negpipe.graph import Shard
from negpipe.review import diff
from negpipe.store import lease

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee(
        "a run lies in a bucket, and requests fail, answers are lost, a token expires, it is killed, a second driver"
        " comes",
        "the bytes of a run on a disk",
    ),
]

KILLS = 200
STAGES = ("ingest", "encode", "index", "search", "triplets")
URL = f"s3://{BUCKET}/runs/one"
FOLDERS = ("ingest", "encode", "index", "search", "rows", "ledger")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "blow" in metafunc.fixturenames:
        metafunc.parametrize("blow", range(KILLS) if metafunc.config.getoption("--torture") else (3, 8, 31))


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


def machine(local: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The config on a machine whose disk is this folder."""
    settings = {**small.settings(local), "run_dir": URL, **changes}
    settings["resources"] = {**settings["resources"], "cache": str(folder)}
    return settings


def mine(settings: dict[str, Any], **options: Any) -> graph.Result:
    return graph.mine(load_config(settings), **options)


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
    assert not left


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


@pytest.mark.slow
def test_another_setting_on_another_machine_fetches_what_it_reads(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    mine(machine(local, tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    bucket.forget()
    mining = {"range_max": 10, "relative_margin": None, "num_negatives": 2}
    assert mine(machine(local, tmp_path / "b", mining=mining)).ran == ("triplets",)
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
    mine({**settings, "mining": {"range_max": 10, "relative_margin": None, "num_negatives": 2}})
    mine(settings)
    config = load_config(settings)
    listed = graph.superseded(config)
    assert len(listed) == 6 and graph.clean(config) == sum(size for _, size in listed)
    check(bucket, local)
    assert not graph.superseded(config)


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
@pytest.mark.parametrize("after", [12, 40, 90, 150])
def test_a_token_that_expires_is_named_and_the_run_goes_on_later(
    local: Path, tmp_path: Path, bucket: Bucket, after: int
) -> None:
    bucket.spoil = lambda _: "400 ExpiredToken" if len(bucket.seen) > after else None
    with pytest.raises(StorageError, match=r"have expired: renew them. No finished work was lost"):
        mine(machine(local, tmp_path / "a"))
    bucket.spoil = lambda _: None
    there = parts(bucket.objects("runs/one"))
    mine(machine(local, tmp_path / "a"))
    check(bucket, local)
    assert there.items() <= parts(bucket.objects("runs/one")).items()


def test_a_service_without_conditional_writes_is_refused_before_anything_is_made(
    local: Path, tmp_path: Path, bucket: Bucket
) -> None:
    bucket.spoil = lambda _: "unconditional"
    with pytest.raises(ConfigError, match="does not support conditional writes"):
        mine(machine(local, tmp_path / "a"))
    assert not bucket.objects()


@pytest.mark.slow
def test_shards_of_two_machines_make_it(local: Path, tmp_path: Path, bucket: Bucket) -> None:
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


@pytest.mark.slow
def test_requests_grow_with_the_parts_and_no_faster(tmp_path: Path, bucket: Bucket, record_property: Any) -> None:
    counts = []
    for documents in (40, 80, 160):
        folder = tmp_path / str(documents)
        small.build(folder, small.documents(documents))
        bucket.clear()
        data = {"path": str(folder / "data"), "part_rows": 4}
        mine(machine(folder, folder / "cache", data=data))
        counts.append(bucket.counts().total())
        bucket.forget()
        mine(machine(folder, folder / "cache", data=data))
        counts.append(bucket.counts().total())
    first, second, third = counts[::2]
    assert third - second <= 2.1 * (second - first)
    first, second, third = counts[1::2]
    assert third - second <= 2.1 * (second - first)


@pytest.mark.slow
@pytest.mark.torture
def test_a_run_that_is_killed_at_any_request_goes_on(
    local: Path, tmp_path: Path, bucket: Bucket, blow: int, record_property: Any
) -> None:
    file = tmp_path / "config.json"
    settings = machine(local, tmp_path / "a", executor={"kind": "local", "workers": 2})
    file.write_text(json.dumps(settings), encoding="utf-8")
    at, process = random.Random(blow).randint(5, 220), None

    failing = share(blow, 0.05)

    def strike(request: Request) -> str | None:
        if len(bucket.seen) == at and process is not None and process.poll() is None:
            kill(process)
        return failing(request)

    bucket.spoil = strike
    environment = {**os.environ, **bucket.environment}
    command = [sys.executable, "-m", "negpipe", "mine", str(file)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)
        try:
            process.wait(PATIENCE)
        finally:
            kill(process)
    bucket.spoil = lambda _: None
    record_property("count: kills of runs in a bucket", int(process.returncode != 0))
    before = parts(bucket.objects("runs/one"))
    mine(machine(local, tmp_path / "a"))
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
def test_the_rows_in_python(local: Path, tmp_path: Path, bucket: Bucket) -> None:
    mine(machine(local, tmp_path / "a"))
    import fsspec
    from datasets import load_dataset

    # docs/how-to/object-storage.md
    with fsspec.open(f"{URL}/triplets.json") as file:
        files = [f"{URL}/{path}" for path in json.load(file)["files"].values()]
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "datasets"))
    assert rows.num_rows == 36 and np.all(np.array(rows["negative_score"]) < 2)
