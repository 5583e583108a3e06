"""Whatever kills a run, and wherever: what was committed stays, and the next run ends with the same bytes."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from beir_data import numbered_folder, precomputed_config, tricky_folder
from real_runs import PATIENCE, STAGES, Run, interrupted, kill, wait

from negpipe.errors import LockedError


def committed_inodes(run: Run, stage: str) -> dict[str, int]:
    """Inodes of the files of committed parts, by the path they have once their stage is complete."""
    files = [file["path"] for part in run.committed(stage) for file in part["files"]]
    return {_published(path): (run.folder / path).stat().st_ino for path in files}


def _published(path: str) -> str:
    folder, _, name = path.partition("/")
    return f"triplets/{name}" if folder.startswith(".triplets-") else path


@pytest.mark.slow
def test_sigkill_in_every_stage(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.at(tmp_path / "run")
    survivors: dict[str, int] = {}
    for stage in STAGES:
        process = interrupted(run, stage, how=kill)
        assert process.returncode == -signal.SIGKILL
        before = committed_inodes(run, stage)
        assert 2 <= len(run.committed(stage)) < len(undisturbed.parts(stage))
        assert len(undisturbed.parts(stage)) >= 5
        survivors |= before
    run.mine()
    assert run.content() == undisturbed.content()
    after = run.inodes()
    assert {path: after.get(path) for path in survivors} == survivors
    assert sorted(path.name for path in run.folder.iterdir()) == sorted([".negpipe", "ledger", *STAGES])


@pytest.mark.slow
def test_sigkill_while_a_model_encodes_then_more_documents_and_another_instruction(golden: Run, tmp_path: Path) -> None:
    """Resumed on a grown corpus with another query instruction, it equals a run from nothing."""
    smaller = tricky_folder(tmp_path / "smaller", appended=False)
    run = golden.at(tmp_path / "run")
    before = Run(
        run.config
        | {
            "data": run.config["data"] | {"path": str(smaller)},
            "encoder": run.config["encoder"] | {"query_instruction": "file: "},
        }
    )
    before.mine(only="ingest")
    texts = before.inodes("ingest")
    corpus = len(before.parts("ingest", "corpus"))
    assert corpus >= 6
    interrupted(before, "encode", parts=corpus + 1, how=kill)
    encoded = committed_inodes(before, "encode")
    anchors = [part["files"][0]["path"] for part in before.committed("encode") if part["kind"] == "anchors"]
    assert anchors

    code, _, log = run.command("mine")
    assert code == 0
    assert "encoder.query_instruction" not in log  # the interrupted stage has no manifest to differ from
    assert run.content() == golden.content()
    after = run.inodes()
    # The part that was last has grown; every other part of the corpus is the one made before the crash.
    assert len(texts.items() & after.items()) >= corpus - 1
    kept = encoded.items() & after.items()
    assert len(kept) >= corpus - 1
    assert not kept & {(path, encoded[path]) for path in anchors}


@pytest.mark.slow
def test_signals_and_a_dead_worker(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.at(tmp_path / "run")

    def terminate(process: subprocess.Popen[str]) -> None:
        process.terminate()
        process.wait(10)

    def interrupt(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C on a terminal does
        process.wait(10)

    assert interrupted(run, "encode", how=terminate).returncode == 143
    assert "run the same command to go on" in run.log.read_text(encoding="utf-8")
    assert interrupted(run, "encode", parts=8, how=interrupt).returncode == 130
    assert not workers_of(run)

    for _ in range(10):
        before = {part["key"] for part in run.committed("encode")}
        process = run.start("encode")
        wait(process, run.begun("encode", len(before) + 2))
        worker = max(run.committed("encode"), key=lambda part: part["key"] not in before)["provenance"]["pid"]
        if Path(f"/proc/{worker}").exists():
            os.kill(worker, signal.SIGKILL)
        assert process.wait(PATIENCE) == 0
        kill(process)
        if len({part["provenance"]["pid"] for part in run.parts("encode") if part["key"] not in before}) > 1:
            break
        run.forget("encode")
    else:
        pytest.fail("the worker was always done before it could be killed")
    run.mine()
    assert run.content() == undisturbed.content()


def workers_of(run: Run) -> list[int]:
    """Processes still running that made parts of this run."""
    made = {part["provenance"]["pid"] for stage in STAGES for part in run.committed(stage)} - {os.getpid()}
    return [pid for pid in made if Path(f"/proc/{pid}").exists()]


def test_one_process_at_a_time(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.at(tmp_path / "run")
    first = run.start("ingest")
    try:
        assert wait(first, run.begun("ingest", 1))
        os.killpg(first.pid, signal.SIGSTOP)
        second = Run(run.config)
        with pytest.raises(LockedError, match=f"process {first.pid} on {platform.node()}, running since"):
            second.mine()
        other = undisturbed.at(run.folder)
        code, _, log = _second_command(other, tmp_path)
        assert code == 4
        assert str(first.pid) in log
        assert platform.node() in log
    finally:
        kill(first)
    # Nobody let go of the lock: the holder is dead, so it is free.
    run.mine()
    assert run.content() == undisturbed.content()


def _second_command(run: Run, folder: Path) -> tuple[int, str, str]:
    config = folder / "second.yaml"
    config.write_text(json.dumps(run.config), encoding="utf-8")
    command = [sys.executable, "-m", "negpipe", "mine", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


# --- the swap of triplets/ --------------------------------------------------------------------------------

# In a process of its own: run the stage, and die before the n-th change to the disk after the old manifest went.
DYING = """
import os, signal, sys
from negpipe import pipeline
from negpipe.config import load_config
import pyarrow.parquet, numpy

config, folders = sys.argv[1], sys.argv[2:]
for n, folder in enumerate(folders):
    if os.fork():
        _, status = os.wait()
        print(folder, os.waitstatus_to_exitcode(status), flush=True)
        continue
    left = None

    def watch(event, arguments):
        global left
        if event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if left is None and event == "os.remove" and str(arguments[0]).endswith("triplets/manifest.json"):
            left = n
        if left is not None:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)
    pipeline.mine(load_config(config, [f"run_dir={folder}", "mining.relative_margin=0.3", "executor.kind=inline"]))
    os._exit(0)
"""


@pytest.mark.slow
def test_swap_cut_short_at_any_step(tmp_path: Path) -> None:
    old = Run(precomputed_config(tmp_path / "old", numbered_folder(tmp_path / "beir", 60, 30)))
    old.mine()
    new = old.copied(tmp_path / "new")
    new.mine("mining.relative_margin=0.3")
    versions = [published(old), published(new)]
    different = [name for name in versions[1] if versions[0].get(name) != versions[1][name]]
    assert different
    steps = [old.copied(tmp_path / f"step{n}") for n in range(24)]
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(old.config), encoding="utf-8")
    command = [sys.executable, "-c", DYING, str(config), *(str(run.folder) for run in steps)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    codes = [int(line.split()[-1]) for line in output]
    deaths = codes.index(0)
    assert codes == [-signal.SIGKILL] * deaths + [0] * (len(steps) - deaths)
    assert 8 < deaths < len(steps)
    for run in steps[: deaths + 1]:
        # What a reader of triplets/ finds is the one or the other, or for a moment nothing.
        assert published(run) in [*versions, {}]
        made = {path.read_bytes(): path.stat().st_ino for path in run.folder.glob("*triplets*/*")}
        run.mine("mining.relative_margin=0.3")
        for path in (run.folder / "triplets" / name for name in different):
            assert path.stat().st_ino == made[path.read_bytes()]
        assert published(run) == versions[1]
        assert run.content() == new.content()
        assert not [path for path in run.folder.glob(".*") if path.name != ".negpipe"]
        assert not list((run.folder / ".negpipe" / "triplets").glob("swap*"))


def published(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.folder / "triplets").glob("*")}


# --- clean, verify, status --------------------------------------------------------------------------------


def test_clean_leaves_a_current_run_current(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.copied(tmp_path / "run")
    run.mine("mining.relative_margin=0.3", "index.kind=stream")
    run.mine()
    current = run.inodes()
    spare = {path for path in data_files(run) if str(path.relative_to(run.folder)) not in current}
    assert spare
    code, output, _ = run.command("clean")
    assert code == 0
    assert "Freed" in output
    assert {str(path.relative_to(run.folder)) for path in data_files(run)} == set(current)
    assert run.inodes() == current
    assert {state.state for state in run.states().values()} == {"current"}
    assert run.mine().ran == ()
    assert run.mine("mining.relative_margin=0.3", "index.kind=stream").ran == ("index", "search", "triplets")


def data_files(run: Run) -> set[Path]:
    return {path for path in run.folder.rglob("*") if path.is_file() and ".negpipe" not in path.parts}


@pytest.mark.parametrize("stage", STAGES)
def test_truncated_file_is_seen_and_made_again(undisturbed: Run, tmp_path: Path, stage: str) -> None:
    run = undisturbed.copied(tmp_path / "run")
    before = run.inodes()
    path = run.files(stage)[1]
    os.truncate(path, path.stat().st_size - 1)
    state = run.states()[stage]
    assert state.state == "damaged"
    assert str(path.relative_to(run.folder)) in state.reason
    assert run.mine().ran == (stage,)
    assert run.content() == undisturbed.content()
    remade = {name for name, inode in run.inodes().items() if before[name] != inode}
    assert str(path.relative_to(run.folder)) in remade
    assert len(remade) <= 2  # the file, and in triplets the ledger that goes with it


def test_verify_names_a_flipped_byte(undisturbed: Run, tmp_path: Path) -> None:
    run = undisturbed.copied(tmp_path / "run")
    path = run.files("search")[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, _, log = run.command("verify")
    assert code == 5
    assert str(path.relative_to(run.folder)) in log.replace("\n", "")
    assert "1 of " in log
