"""A run directory in place of CONFIG: the config that a run keeps of itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import get_args

import pytest
import small_source as small
import yaml
from pydantic import BaseModel

from negpipe.config import kept
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.config.training import flat
from negpipe.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import command_page

SECRET = "https://ann:s3cret@example.org/rows.jsonl?token=s3cret"

COMMANDS: dict[str, list[str]] = {
    "ingest": [],
    "encode": [],
    "index": [],
    "search": [],
    "triplets": [],
    "calibrate": ["--second", "../runs/small"],
    "quality": [],
    "plan": [],
    "verify": [],
    "audit": [],
    "explain": ["--anchor", "q0"],
    "report": [],
    "export": ["--to", "jsonl", "--out", "out.jsonl"],
    "config check": [],
    "config show": [],
    "clean": ["--yes"],
    "diff": ["../runs/small"],
    "commit encode": [],
    "work encode": [],
}
SECTIONS = {
    "slices": "is not a stage of this run",
    "train": "the config has no section train",
    "ablate": "the config has no section train",
    "refresh": "the config has no section train",
}
"""What the run lacks for a command: the error names it, so the run directory was read."""


def relative(folder: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str = "runs/small") -> Path:
    """A config whose paths are relative to `folder`, where this process stands then."""
    small.build(folder)
    tree = small.settings(Path())
    tree["run_dir"] = run_dir
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    monkeypatch.chdir(folder)
    return path


@pytest.mark.slow
def test_every_command_takes_it_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    assert small.run("mine", "config.yaml", "--set", "mining.num_negatives=2").code == 0
    before = small.made(tmp_path / "runs/small")
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = "../runs/small"
    status = small.run("status", run, "--format", "json")
    assert {row["state"] for row in json.loads(status.out)} == {"current"}
    again = small.run("mine", run)
    assert (again.code, again.out.splitlines()[0]) == (0, "Nothing to do: every stage is up to date.")
    assert small.made(tmp_path / "runs/small") == before
    for command, options in COMMANDS.items():
        outcome = small.run(*command.split(), run, *options)
        assert outcome.code == 0, (command, outcome.err)
    assert yaml.safe_load(small.run("config", "show", run).out)["mining"]["num_negatives"] == 2
    assert before.items() <= small.made(tmp_path / "runs/small").items()
    for command, section in SECTIONS.items():
        outcome = small.run(command, run)
        assert outcome.code == 2 and section in outcome.err, (command, outcome.err)


def test_every_command_with_a_config_is_tried() -> None:
    found = command_page.commands()
    taking = {name for name, command in found if {"config", "a"} & {param.name for param in command.params}}
    assert taking - {"status", "mine"} == {name.removesuffix(" encode") for name in (*COMMANDS, *SECTIONS)}


def test_next_names_it_where_it_keeps_this_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    mined = small.run("mine", "config.yaml", "--set", "mining.num_negatives=2", "--set", "seed=7")
    assert "negpipe audit runs/small\n" in mined.out
    assert "negpipe status runs/small\n" in mined.out
    assert "negpipe mine runs/small --set mining.relative_margin=0.1\n" in mined.out
    assert "--set seed=7" not in mined.out
    # Settings that it was not made with are named as they were typed.
    refused = small.run("explain", "config.yaml", "--set", "data.min_grade=2", "--anchor", "q0")
    assert "config.yaml --set data.min_grade=2`" in refused.err


def test_what_changes_is_shown_and_kept_once_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    assert small.run("mine", "config.yaml").code == 0
    keeps = kept.path_in(tmp_path / "runs/small")
    before = keeps.read_text(encoding="utf-8")
    plain = small.run("status", "runs/small")
    assert "was made with" not in plain.err
    (row, *_) = json.loads(small.run("status", "runs/small", "--format", "json").out)
    by_the_clock_of_the_log = datetime.fromisoformat(row["finished"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert plain.out.splitlines()[1].endswith(f"  {by_the_clock_of_the_log}")
    changed = ("--set", "mining.num_negatives=2")
    quality = small.run("quality", "runs/small", *changed)
    assert quality.err.count("mining.num_negatives: 2; the run was made with 3") == 1
    # Commands that say why a stage is stale say it once.
    for command in (["status", "runs/small"], ["explain", "runs/small", "--anchor", "q0"]):
        outcome = small.run(*command, *changed)
        said = outcome.out + outcome.err
        assert (said.count("mining.num_negatives"), said.count("changed from 3 to 2")) == (1, 1), said
    failed = small.run("mine", "runs/small", "--set", "data.path=nowhere/at/all")
    assert failed.code == 3
    assert keeps.read_text(encoding="utf-8") == before
    again = small.run("mine", "runs/small", *changed)
    assert again.code == 0
    assert re.findall(".*mining.num_negatives.*", again.err)[0].endswith(
        " triplets: starting, mining.num_negatives changed from 3 to 2"
    )
    assert again.err.count("mining.num_negatives") == 1
    assert load_config("runs/small").mining.num_negatives == 2


def test_a_run_that_failed_keeps_its_config_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    vectors = (tmp_path / "corpus.npy").read_bytes()
    (tmp_path / "corpus.npy").unlink()
    assert small.run("mine", "config.yaml", "--set", "seed=7").code == 3
    (tmp_path / "corpus.npy").write_bytes(vectors)
    assert small.run("mine", "runs/small").code == 0
    assert load_config("runs/small").seed == 7


def test_a_copy_is_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    assert small.run("mine", "config.yaml").code == 0
    shutil.copytree("runs/small", "runs/copy", symlinks=True)
    assert load_config("runs/copy").run_dir == Path("runs/copy")
    assert small.run("mine", "runs/copy", "--set", "mining.num_negatives=1").code == 0
    assert load_config("runs/small").mining.num_negatives == 3


def test_secrets_are_asked_for_or_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    tree = small.settings(Path())
    tree["data"] = {"format": "pairs", "path": [SECRET, "data"], "corpus": SECRET}
    path = kept.path_in(tmp_path / "run")
    path.parent.mkdir(parents=True)
    path.write_text(kept.text(load_config(tree)), encoding="utf-8")
    assert "s3cret" not in path.read_text(encoding="utf-8")
    with pytest.raises(ConfigError) as missing:
        load_config("run")
    assert re.search(r"--set 'data.path=…' or the environment variable NEGPIPE_DATA_PATH", str(missing.value))
    assert "NEGPIPE_DATA_CORPUS_PATH" in str(missing.value)
    monkeypatch.setenv("NEGPIPE_DATA_PATH", f"[{json.dumps(SECRET)}, data]")
    config = load_config("run", [f"data.corpus={SECRET}"])
    assert config.data.path == (SECRET, "data")
    assert config.data.corpus is not None and config.data.corpus.path == SECRET


def paths_of(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """The settings that are paths."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        for kind in kinds:
            if issubclass(kind, BaseModel):
                yield from paths_of(kind, f"{before}{name}.")
        if "Path" in str(field.annotation):
            yield before + name


def test_every_setting_that_is_a_path_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    monkeypatch.setenv("HOME", "/home/someone")
    paths = [*paths_of(Config)]
    assert {"run_dir", "store", "encoder.cache", "executor.slurm.folder"} <= {*paths}
    tree = {**small.settings(Path()), "encoder": {"model": "m"}}
    stored = flat(yaml.safe_load(kept.text(load_config(tree, [f"{name}=a/folder" for name in paths]))))
    assert {stored[name] for name in paths} == {str(tmp_path / "a/folder")}
    home = load_config(tree, [f"{name}=~/logs" for name in paths])
    stored = flat(yaml.safe_load(kept.text(home)))
    assert {stored[name] for name in paths} == {"/home/someone/logs"}


def test_names_of_the_hub_and_of_servers_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/model").mkdir(parents=True)
    tree = {"run_dir": "run", "data": {"path": "mteb/scifact"}, "encoder": {"model": "org/model"}}
    read = yaml.safe_load(kept.text(load_config(tree)))
    assert read["data"]["path"] == "mteb/scifact"
    assert read["encoder"]["model"] == str(tmp_path / "org/model")
    served = {**tree, "encoder": {"model": "org/model", "backend": "http", "http": {"url": "http://localhost:1"}}}
    assert yaml.safe_load(kept.text(load_config(served)))["encoder"]["model"] == "org/model"
    packaged = {**tree, "encoder": {"model": "pkg://some/thing"}, "store": "s", "data": {"path": "rows-*.jsonl"}}
    read = yaml.safe_load(kept.text(load_config(packaged)))
    assert (read["encoder"]["model"], read["store"]) == ("pkg://some/thing", str(tmp_path / "s"))
    assert read["data"]["path"] == str(tmp_path / "rows-*.jsonl")


@pytest.mark.parametrize(
    "change", ["mining.compat=nemo", "output={format: n-tuple, include_positives: true}", "seed=1"]
)
def test_a_change_is_what_it_is_on_top_of_the_config(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = relative(tmp_path, monkeypatch)
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["mining"] = {"near_duplicate": 0.9}
    path = kept.path_in(tmp_path / "runs/small")
    path.parent.mkdir(parents=True)
    path.write_text(kept.text(load_config(tree)), encoding="utf-8")
    assert load_config("runs/small", [change]).mining == load_config(tree, [change]).mining


def test_a_folder_without_one_is_named(tmp_path: Path) -> None:
    (tmp_path / ".negpipe").mkdir()
    assert "has no stored config" in small.run("status", tmp_path).err
    assert small.run("status", tmp_path).code == 2


@pytest.mark.parametrize("name", ["quickstart", "scifact", "ablate"])
def test_what_is_kept_is_the_whole_config(name: str, tmp_path: Path) -> None:
    config = load_config(str(Path(__file__).parents[2] / f"configs/{name}.yaml"), [f"run_dir={tmp_path}"])
    path = kept.path_in(tmp_path)
    path.parent.mkdir()
    path.write_text(kept.text(config), encoding="utf-8")
    again = load_config(tmp_path)
    assert kept.text(again) == kept.text(config)
    places = {"store", "data", "encoder"}
    assert again.model_dump(exclude=places) == config.model_dump(exclude=places)
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(config.model_dump())


def test_where_nothing_runs_what_changes_no_row_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative(tmp_path, monkeypatch)
    assert small.run("mine", "config.yaml").code == 0
    path = kept.path_in(Path("runs/small"))
    before = path.stat()
    assert small.run("mine", "config.yaml", "--set", "executor.kind=local", "--set", "resources.cpus=2").code == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    shutil.move("data", "moved")
    assert "Nothing to do" in small.run("mine", "config.yaml", "--set", "data.path=moved").out
    assert load_config("runs/small").data.path == str(tmp_path / "moved")
    path.write_text("{half", encoding="utf-8")
    assert small.run("mine", "config.yaml", "--set", "data.path=moved").code == 0
    assert load_config("runs/small").data.path == str(tmp_path / "moved")
