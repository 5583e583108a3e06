"""The wheel, in an empty environment and without the repository: a first config, and the quickstart mined."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
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


@pytest.fixture
def empty() -> Iterator[Path]:
    """A new environment, deleted afterwards: what negpipe requires takes 2 GB, and pytest keeps its folders."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        yield Path(folder)


@pytest.mark.slow
def test_it_mines_the_quickstart(wheel: Path, empty: Path, tmp_path: Path) -> None:
    """With what `pip install` brings from the package index: a requirement that is not declared is missing here."""
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def call(program: str, *words: str) -> str:
        command = [str(empty / "bin" / program), *words]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert call("pip", "list", "--format=freeze", "--exclude=pip", "--exclude=setuptools") == ""
    call("pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), f"{wheel}[offline]")
    assert call("python", "-c", "import negpipe; print(negpipe.__file__)").startswith(str(empty / "lib"))
    assert re.fullmatch(r"written to quickstart\.yaml: \S*negpipe mine quickstart\.yaml\n", call("negpipe", "init"))
    small = (word for change in SMALL for word in ("--set", change))
    mined = call("negpipe", "mine", "quickstart.yaml", *small)
    assert "negpipe calibrate runs/quickstart" in mined
    rows = pq.read_table(work / "runs/quickstart/triplets")
    assert rows.num_rows > 1000
    assert (work / "runs/quickstart/report.html").is_file()
    assert "runs/quickstart" in call("negpipe", "report", "runs/quickstart")
