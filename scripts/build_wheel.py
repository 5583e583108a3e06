"""Build the source distribution, and the wheel from it, into a folder: python scripts/build_wheel.py dist

Builds from a copy, so that neither contains leftovers of earlier builds, and with the installed setuptools: nothing
is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("negpipe", "pyproject.toml", "README.md", "LICENSE")
_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def build(folder: Path) -> Path:
    """The wheel, in `folder` beside the source distribution it was built from."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "negpipe"
        copy.mkdir()
        for name in KEPT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy)
        _run([sys.executable, "-c", _SDIST, str(copy / "dist")], copy)
        (sdist,) = (copy / "dist").iterdir()
        options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
        _run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(copy / "dist"), str(sdist)], copy)
        built = [Path(shutil.copy(path, folder)) for path in (copy / "dist").iterdir()]
    return next(path for path in built if path.suffix == ".whl")


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}the build failed")


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
