"""The wheel, in an empty environment and without the repository: a first config, and the quickstart mined."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
SMALL = [f"encoder.{name}={value}" for name, value in (("passage_max_length", 32), ("query_max_length", 16))]


def test_the_config_of_the_wheel_is_that_of_the_repository() -> None:
    assert (ROOT / "negpipe/quickstart.yaml").read_bytes() == (ROOT / "configs/quickstart.yaml").read_bytes()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / "scripts/build_wheel.py"), str(folder)]
    built = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert {path.suffix for path in folder.iterdir()} == {".whl", ".gz"}
    return built


@pytest.mark.slow
def test_a_folder_of_this_name_does_not_hide_it(tmp_path: Path) -> None:
    """As where `git clone` was typed; workers are started with the current folder on Python's path."""
    (tmp_path / "negpipe" / "negpipe").mkdir(parents=True)
    program = "import negpipe.worker, negpipe.data.candidates as there; print(there.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and str(tmp_path) not in done.stdout, done.stderr


def test_everything_is_in_it(wheel: Path) -> None:
    have = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "negpipe").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= have
    assert not [name for name in have if name.startswith(("tests", "scripts", "docs"))]


@pytest.mark.slow
def test_it_mines_the_quickstart(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    # What negpipe requires is the one thing that is taken from here: an editable install of negpipe is not.
    (site / "required.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = ["install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def call(*words: str) -> str:
        command = [str(tmp_path / "env/bin/negpipe"), *words]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [str(python), "-c", "import negpipe; print(negpipe.__file__)"]
    assert subprocess.run(
        where, cwd=work, env=environment, capture_output=True, text=True, check=True
    ).stdout.startswith(str(site))
    assert re.fullmatch(r"written to quickstart\.yaml: \S*negpipe mine quickstart\.yaml\n", call("init"))
    mined = call("mine", "quickstart.yaml", *(word for change in SMALL for word in ("--set", change)))
    assert "negpipe calibrate runs/quickstart" in mined
    rows = pq.read_table(work / "runs/quickstart/triplets")
    assert rows.num_rows > 1000
    assert (work / "runs/quickstart/report.html").is_file()
    assert "runs/quickstart" in call("report", "runs/quickstart")
