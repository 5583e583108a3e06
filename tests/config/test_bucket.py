"""A run directory in a bucket: how it is written, where this machine works for it, and what it does not go with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.errors import ConfigError
from negpipe.train.ablation import ablate
from negpipe.train.refresh import refresh

URL = "s3://my-bucket/runs/first"


def loaded(run_dir: Any, *overrides: str, **settings: Any) -> Config:
    least = {"run_dir": run_dir, "data": {"path": "set"}, "encoder": {"model": "some/model"}}
    return load_config({**least, **settings}, list(overrides))


@pytest.mark.parametrize("written", [URL, f"{URL}/", "s3://my-bucket//runs///first"])
def test_it_has_a_working_folder_here_and_stays_what_it_is(written: str, tmp_path: Path) -> None:
    config = loaded(written, resources={"cache": str(tmp_path)})
    assert config.url == config.place == URL
    assert config.run_dir.parent == tmp_path and config.run_dir.name.startswith("first-")
    for whole in (config, config.resolved(3), config.model_copy(update={"seed": 7})):
        for told in (whole.model_dump(mode="json"), whole.model_dump(mode="json", exclude_unset=True)):
            assert told["run_dir"] == URL
            assert load_config(told).run_dir == config.run_dir
    assert "run_dir" not in config.model_dump(exclude={"run_dir": True})


def test_each_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    addresses = [URL, f"{URL}/first", "s3://my-bucket/first", "s3://first", "s3://another/first"]
    folders = {loaded(address).run_dir for address in addresses}
    assert len(folders) == len(addresses) and {folder.parent for folder in folders} == {tmp_path / "negpipe"}


def test_a_folder_stays_a_folder() -> None:
    config = loaded("run")
    assert config.url is None and config.place == "run" and config.model_dump(mode="json")["run_dir"] == "run"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("gs://bucket/run", "gs:// is not supported.*s3:// only.*Use s3://BUCKET/PREFIX or a folder"),
        ("s3://key:secret@bucket/run", "a config must not contain credentials: set AWS_PROFILE"),
        ("s3://Bucket/run", "expected s3://BUCKET/PREFIX"),
        ("s3://bucket/../run", "expected s3://BUCKET/PREFIX"),
        ("s3://", "expected s3://BUCKET/PREFIX"),
        (Path("s3://bucket/run"), "expected s3://BUCKET/PREFIX"),
    ],
)
def test_what_is_no_bucket_to_write_to(address: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)run_dir: {said}") as caught:
        loaded(address)
    assert "secret" not in str(caught.value)


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ConfigError, match="store: a run_dir in a bucket stores its parts there: remove it"):
        loaded(URL, store="elsewhere")
    trained = loaded(URL, train={})
    with pytest.raises(ConfigError, match="ablate makes several runs, in folders on a disk, not in s3://my-bucket"):
        ablate(trained)
    with pytest.raises(ConfigError, match="refresh makes several runs"):
        refresh(trained, 2)
