"""Whatever shards make, in whatever order, and whatever befalls them: the bytes of an ordinary run."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import small_source as small
import yaml
from real_runs import PATIENCE, Run, kill, programs, wait
from torture import blow

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.manifest import Books
from negpipe.errors import ConfigError, LockedError, MissingPartsError, VersionsError
from negpipe.graph import Shard, Worked
from negpipe.store import registry
from negpipe.store.lock import run_lock, shared_run_lock
from negpipe.store.store import CHANGES, LocalStore
from negpipe.store.unfinished import owner

pytestmark = pytest.mark.guarantee(
    "shards run in any order, twice at once, or are killed",
    "each part is made once, by a shard that is left; the bytes of an ordinary run",
)

SHARDED = ("encode", "index", "search", "triplets")
LISTS = ("index.kind=IVF2,Flat", "index.shard_size=3000", "index.recall_anchors=20")
BESIDE = Path(__file__).parents[2]


def worked(run: Run, stage: str, number: int, of: int, *overrides: str, **options: Any) -> Worked:
    config = load_config(run.config, ["executor.kind=inline", *overrides])
    return graph.work(config, stage, Shard(number, of), **options)


def committed(run: Run, stage: str, *overrides: str, **options: Any) -> graph.Result:
    return graph.commit(load_config(run.config, ["executor.kind=inline", *overrides]), stage, **options)


def digests(run: Run) -> dict[str, str]:
    """Of each stage's manifest, as the stages after it know it."""
    manifests = {stage: Books(run.folder, stage).manifest() for stage in ("ingest", *SHARDED)}
    return {stage: f"{manifest.key} {manifest.digest}" for stage, manifest in manifests.items() if manifest}


def left(run: Run) -> list[Path]:
    """What only shards need."""
    return [path for path in run.folder.rglob("*") if path.suffix in (".claim", ".versions", ".tmp")]


def keys(run: Run, stage: str) -> list[str]:
    return [part["key"] for part in run.parts(stage)]


# --- the bytes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "overrides"),
    [([0], ()), ([2, 0, 1], ()), ([1, 0], ("index.kind=flat",)), ([2, 1, 0], LISTS)],
    ids=["one", "three", "flat", "lists"],
)
def test_shards_make_what_a_run_makes(whole: Run, tmp_path: Path, order: list[int], overrides: tuple[str, ...]) -> None:
    usual = whole
    if overrides:
        usual = whole.copied(tmp_path / "usual")
        usual.mine(*overrides)
    run = whole.at(tmp_path / "run")
    run.mine(only="ingest")
    for stage in SHARDED:
        of = len(order)
        found = [worked(run, stage, number, of, *overrides) for number in order]
        assert not run.complete(stage)
        assert sum(each.made for each in found) == len(keys(usual, stage))
        if stage != "index":  # there, what nobody works on is anybody's
            own = [sum(int(key, 16) % of == number for key in keys(usual, stage)) for number in order]
            assert [each.made for each in found] == own
        assert committed(run, stage, *overrides).ran == (stage,)
    assert run.content() == usual.content()
    assert digests(run) == digests(usual)
    assert not left(run)
    assert run.mine(*overrides).ran == ()
    # Submitted again, they do nothing.
    assert worked(run, "search", 0, 2, *overrides).made == 0 and committed(run, "search", *overrides).ran == ()


def test_more_shards_than_tasks_and_a_shard_that_has_none(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("search")
    wanted = keys(whole, "search")
    hit = {int(key, 16) % 1000 for key in wanted}
    idle = next(number for number in range(1000) if number not in hit)
    assert worked(run, "search", idle, 1000) == Worked("search", Shard(idle, 1000))
    assert sum(worked(run, "search", number, 1000).made for number in hit) == len(wanted)
    committed(run, "search")
    assert run.content() == whole.content()


def test_only_what_is_missing_is_made_again(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    kept = run.inodes("encode")
    gone = keys(whole, "encode")[1]
    (run.folder / ".negpipe/encode/manifest.json").unlink()
    (run.folder / f".negpipe/encode/{gone}.json").unlink()
    found = [worked(run, "encode", number, 2) for number in (0, 1)]
    assert [each.made for each in found] == [int(int(gone, 16) % 2 == number) for number in (0, 1)]
    assert sum(each.found for each in found) == len(keys(whole, "encode")) - 1
    committed(run, "encode")
    assert run.content() == whole.content()
    made_again = {name for name, inode in run.inodes("encode").items() if kept[name] != inode}
    assert {name.partition("/")[2].partition("-")[0] for name in made_again} == {gone}


def test_the_parts_of_a_shared_store(whole: Run, tmp_path: Path) -> None:
    run = Run({**whole.at(tmp_path / "run").config, "store": str(tmp_path / "store")})
    run.mine(only="ingest")
    for number in (1, 0):
        worked(run, "encode", number, 2)
    committed(run, "encode")
    assert registry.registered(LocalStore(tmp_path / "store")) == [run.folder]
    assert run.states()["encode"].state == "current"
    assert [part["files"] for part in run.parts("encode")] == [part["files"] for part in whole.parts("encode")]
    assert not [path for path in (tmp_path / "store").rglob("*") if path.suffix in (".claim", ".versions")]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.guarantee(
    "`commit` comes before all parts are there",
    "exit 3, with how many, which, and of which shards",
)
def test_commit_names_what_is_missing(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    worked(run, "encode", 1, 3)
    lacking = [key for key in keys(whole, "encode") if int(key, 16) % 3 != 1]
    with pytest.raises(MissingPartsError) as refused:
        committed(run, "encode", shards=3)
    said = str(refused.value)
    assert f"encode: {len(lacking)} parts are missing: {lacking[0]} (corpus, " in said and lacking[4] in said
    assert lacking[5] not in said and f"and {len(lacking) - 5} more" in said
    assert "--shard I/3` for I = 0,2," in said
    assert not run.complete("encode")
    config = run.folder.with_name("run.yaml")
    config.write_text(yaml.safe_dump(run.config), encoding="utf-8")
    outcome = small.run("commit", "encode", config)
    assert outcome.code == 3 and f"negpipe work encode {config} --shard I/N" in outcome.err


def test_the_command_line_refuses(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    for arguments, code, said in (
        (["work", "encode", config, "--shard", "3/3"], 2, "--shard 3/3: expected I/N"),
        (["work", "encode", config, "--shard", "one"], 2, "--shard one: expected I/N"),
        (["work", "encode", config, "--shard", f"0/{'9' * 5_000}"], 2, "expected I/N"),
        (["work", "slices", config, "--shard", "0/2"], 0, "slices: nothing to do, search.slice_documents is not set"),
        (["commit", "slices", config], 0, "slices: nothing to do"),
        (["work", "ingest", config], 2, f"run `negpipe ingest {config}`"),
        (["commit", "ingest", config], 2, f"run `negpipe ingest {config}`"),
        (["work", "train", config], 2, "choose from encode, index, search and triplets"),
        (["work", "encode", config], 3, "encode needs the output of ingest, which is missing"),
        (["commit", "search", config], 3, "search needs the output of ingest, which is missing"),
    ):
        outcome = small.run(*arguments)
        assert outcome.code == code and said in outcome.err.replace("\n", " "), outcome.err


@pytest.mark.guarantee(
    "`mine` or `clean` beside a shard, or a shard beside them",
    "exit 4",
)
def test_a_shard_excludes_runs_and_clean_and_is_excluded_by_them(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    with shared_run_lock(run.folder):
        with shared_run_lock(run.folder):
            worked(run, "encode", 0, 2)
        for act in (run.mine, lambda: committed(run, "encode"), lambda: graph.clean(load_config(run.config))):
            with pytest.raises(LockedError, match=f"{run.folder} is in use by"):
                act()
    worked(run, "encode", 1, 2)
    with run_lock(run.folder), pytest.raises(LockedError, match=f"in use by process {os.getpid()} on"):
        worked(run, "encode", 0, 2)
    committed(run, "encode")
    assert run.content() == whole.content()


@pytest.mark.guarantee(
    "shards, on a file system without locks",
    "refused before anything is made (exit code 2)",
)
@pytest.mark.parametrize(
    ("verb", "overrides", "flags"),
    [
        ("work encode", (), ("--shard", "0/2")),
        ("mine", ("executor.kind=slurm", "executor.slurm.cluster=local"), ()),
    ],
    ids=["work", "slurm"],
)
def test_a_file_system_without_locks_is_refused(
    whole: Run, tmp_path: Path, verb: str, overrides: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    """An ordinary run is only warned there: nobody shares its work."""
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    code, _, log = run.command(verb, *overrides, flags=flags, environment=blow(locks="not there"))
    assert code == ConfigError.exit_code, log
    said = f"cannot lock {run.folder} (No locks available): shards need a file system with locks"
    assert said in " ".join(log.split())
    assert not run.committed("encode") and not left(run)


def older(name: str) -> str:
    return "0.0.1" if name == "numpy" else version(name)


@pytest.mark.guarantee(
    "a shard has other versions of libraries",
    "refused before its first task, exit 2, with both versions",
)
def test_other_versions_of_libraries_within_a_run_are_refused(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    with monkeypatch.context() as patch:
        patch.setattr("negpipe.engine.versions.version", older)
        made = worked(run, "encode", 0, 2).made
    assert made
    with pytest.raises(VersionsError) as refused:
        worked(run, "encode", 1, 2)
    assert f"started with numpy 0.0.1, but numpy {version('numpy')} is installed on" in str(refused.value)
    assert refused.value.exit_code == ConfigError.exit_code and refused.value.code == "versions"
    assert len(run.committed("encode")) == made
    with pytest.raises(MissingPartsError, match=f"{len(keys(whole, 'encode'))} parts are missing"):
        committed(run, "encode", rebuild=True)
    for number in (0, 1):
        worked(run, "encode", number, 2)
    committed(run, "encode")
    assert run.content() == whole.content()
    assert run.states()["encode"].versions is None


def test_between_runs_they_are_warned_of(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    with monkeypatch.context() as patch:
        patch.setattr("negpipe.engine.versions.version", older)
        run.mine(only="encode")
    (run.folder / ".negpipe/encode/manifest.json").unlink()
    (run.folder / f".negpipe/encode/{keys(whole, 'encode')[0]}.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert worked(run, "encode", 0, 1).made == 1
    assert "parts were made with numpy 0.0.1" in caplog.text and "--rebuild" in caplog.text


# --- several processes ------------------------------------------------------------------------------------


def started(run: Run, stage: str, shard: str, *overrides: str, slow: int) -> tuple[subprocess.Popen[str], Path]:
    """A shard in a process of its own, whose worker takes four seconds for the n-th of its parts; and its log."""
    environment = blow(stage=stage, what="part", then="thinks", nth=slow)
    flags = ["--shard", shard, "--log-format", "json"]
    process = run.start(f"work {stage}", "executor.workers=1", *overrides, flags=flags, environment=environment)
    return process, run.log.rename(run.log.with_name(f"{process.pid}.log"))


def told(log: Path) -> dict[str, Any]:
    """What a shard said at its end."""
    done: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return done


def side_by_side(run: Run, stage: str, shards: Sequence[str], parts: int, *overrides: str) -> list[dict[str, Any]]:
    """What two processes say, of which the first stands still from its second part until there are so many."""
    both = [started(run, stage, shards[0], *overrides, slow=2)]
    books = run.folder / ".negpipe" / stage

    def works_on_the_second() -> bool:
        made = [*books.glob("[0-9a-f]*.json")]
        return bool(made) and any(not path.with_suffix(".json").exists() for path in books.glob("*.claim"))

    try:
        assert wait(both[0][0], works_on_the_second)
        with LocalStore(run.folder).lock(CHANGES, PATIENCE):  # stopped while it holds it, it would stop all others
            os.killpg(both[0][0].pid, signal.SIGSTOP)
        both.append(started(run, stage, shards[1], *overrides, slow=0))
        assert wait(both[1][0], run.begun(stage, parts))
        os.killpg(both[0][0].pid, signal.SIGCONT)
        for process, log in both:
            assert process.wait(PATIENCE) == 0, log.read_text(encoding="utf-8")
    finally:
        for process, _ in both:
            kill(process)
    return [told(log) for _, log in both]


@pytest.mark.slow
def test_two_processes_with_one_shard_do_each_task_once(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("search")
    total = len(keys(whole, "search"))
    said = side_by_side(run, "search", ("0/1", "0/1"), total - 1)
    assert [each["made"] + each["others"] + each["found"] for each in said] == [total, total]
    assert sum(each["made"] for each in said) == total and all(each["made"] for each in said)
    committed(run, "search")
    assert run.content() == whole.content()
    assert len({part["provenance"]["pid"] for part in run.parts("search")}) == 2


@pytest.mark.slow
def test_shards_share_the_rounds_of_an_approximate_index(whole: Run, tmp_path: Path) -> None:
    usual, run = whole.copied(tmp_path / "usual"), whole.copied(tmp_path / "run")
    usual.mine(*LISTS)
    run.forget("index")
    kinds = [part["kind"] for part in usual.parts("index")]
    said = side_by_side(run, "index", ("0/2", "1/2"), kinds.count("ids"), *LISTS)
    assert sum(each["made"] for each in said) == len(kinds) and all(each["made"] for each in said)
    committed(run, "index", *LISTS)
    assert run.content("index") == usual.content("index")


@pytest.mark.slow
@pytest.mark.parametrize("host", ["this", "another"])
def test_a_shard_that_was_killed_is_run_again(whole: Run, tmp_path: Path, host: str) -> None:
    """From another host, its claims are watched for a while; on this one, its process is seen to be dead."""
    run = whole.copied(tmp_path / "run")
    run.forget("search")
    process, log = started(run, "search", "0/1", slow=2)
    try:
        assert wait(process, run.begun("search", 1))
        time.sleep(1)
        with pytest.raises(LockedError, match=f"process {process.pid} on"):
            run.mine()
        with pytest.raises(LockedError, match=f"process {process.pid} on"):
            graph.clean(load_config(run.config))
    finally:
        kill(process)
    assert process.returncode == -signal.SIGKILL, log.read_text(encoding="utf-8")
    claim = next(path for path in left(run) if path.suffix == ".claim")
    if host == "another":
        who = claim.read_text(encoding="utf-8")
        claim.write_text(re.sub(r"@\S+", "@another.0123abcd", who), encoding="utf-8")
        os.utime(claim, (time.time() + 36_000,) * 2)
    before = {part["key"] for part in run.committed("search")}
    began = time.monotonic()
    said = worked(run, "search", 0, 1, patience=1.0)
    assert (time.monotonic() - began >= 1) == (host == "another")
    assert said.found == len(before) == 1 and said.made == len(keys(whole, "search")) - 1
    committed(run, "search")
    assert run.content() == whole.content()
    assert not left(run)


@pytest.mark.guarantee(
    "clocks of machines differ by hours or years",
    "nothing",
)
@pytest.mark.parametrize("years", [-10, 10])
def test_clocks_that_differ_change_nothing(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("search")
    worked(run, "search", 0, 2)
    jump, now = years * 365 * 86_400, time.time
    for path in (path for path in run.folder.rglob("*") if path.is_file()):
        os.utime(path, (now() - jump,) * 2)
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    live = keys(whole, "search")[0]
    claim = run.folder / f".negpipe/search/{live}.claim"
    claim.write_text(f"{owner().partition('@')[0]}@another.0123abcd 1\n", encoding="utf-8")
    worked(run, "search", 1, 2, patience=0.5)
    assert claim.exists() == (int(live, 16) % 2 == 0)  # of the other shard: nobody's concern
    committed(run, "search")
    assert run.content() == whole.content() and not left(run)


@pytest.mark.slow
def test_the_script_for_slurm_submits_what_makes_the_rows(whole: Run, tmp_path: Path) -> None:
    """A stand-in for sbatch runs each job at once, and refuses one that does not wait for the job before, or that would
    not be queued again after its node failed."""
    run = whole.at(tmp_path / "run")
    config = run.file(tmp_path / "a config.yaml")
    tools = programs(tmp_path / ".venv/bin", sbatch=SBATCH)
    command = [str(BESIDE / "configs/cluster/slurm.sh"), str(config), "2", "--set", "executor.kind=inline"]
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "JOBS": str(tmp_path / "jobs")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run.content() == whole.content()
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "ingest", *(f"{stage}{step}" for stage in (*SHARDED[:2], "slices", *SHARDED[2:]) for step in ("", "-commit"))
    ]  # fmt: skip


@pytest.mark.slow
def test_the_pods_of_kubernetes_make_the_rows(whole: Run, tmp_path: Path) -> None:
    """The container's command of every stage and index, as the page's loop and Kubernetes would fill them in."""
    run, shards = whole.at(tmp_path / "run"), 2
    run.file(tmp_path / "nightly.yaml")
    text = (BESIDE / "configs/cluster/kubernetes.yaml").read_text(encoding="utf-8")
    stages = re.search(r"for STAGE in (.+); do", text)
    assert stages

    def negpipe(*words: str) -> None:
        command = [sys.executable, "-m", "negpipe", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    negpipe("ingest", "nightly.yaml")
    for stage in stages[1].split():
        job = yaml.safe_load(text.replace("$STAGE", stage).replace("$SHARDS", str(shards)))
        assert (job["kind"], job["metadata"]["name"]) == ("Job", f"negpipe-{stage}")
        assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", shards)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        for index in range(shards):
            program, *words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["command"]]
            assert program == "negpipe"
            negpipe(*words)
        negpipe("commit", stage, "nightly.yaml", "--shards", str(shards))
    assert run.content() == whole.content()


SBATCH = """#!/bin/bash
job=$(($(cat "$JOBS" 2>/dev/null || echo 0) + 1))
array=0-0
while [ $# -gt 0 ]; do
    case $1 in
        --dependency=*) waits=${1#*=} ;;
        --array=*) array=${1#*=} ;;
        --requeue) again=yes ;;
        --wrap) wrapped=$2; shift ;;
    esac
    shift
done
[ "$job" = 1 ] || [ "$waits" = "afterok:$((job - 1))" ] || exit 1
[ "$again" = yes ] || exit 1
for number in $(seq "${array%-*}" "${array#*-}"); do
    SLURM_ARRAY_TASK_ID=$number sh -c "$wrapped" >&2 || exit 1
done
echo $job > "$JOBS"
echo "$job;cluster"
"""
