"""Run the fast tests with the oldest or the newest libraries that pyproject.toml allows, before a release:

    pip install uv
    python scripts/test_versions.py lowest
    python scripts/test_versions.py newest --python 3.13
    python scripts/test_versions.py newest -- -x tests/encoders     # behind --: arguments of pytest

`lowest` tests two sets, because training needs newer libraries than mining; the first runs without the tests of
training. Each environment is made in a temporary folder, takes 6 GB with torch from PyPI, and is deleted afterwards.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
MINING = ("offline", "http", "ray", "slurm", "s3", "dev")
TRAINING = (*MINING, "train")
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "lowest": {"mining": MINING, "training": TRAINING},
    "newest": {"everything": (*TRAINING, "onnx", "openvino")},
}
_RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("versions", choices=SETS)
    parser.add_argument("--python", default=sys.executable, help="a version, or a path (this one)")
    parser.add_argument("pytest", nargs="*", help="behind --: arguments of pytest")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    failed = []
    for name, extras in SETS[given.versions].items():
        arguments = [*given.pytest, *(["--ignore=tests/train"] if name == "mining" else [])]
        if not passes(extras, _RESOLUTIONS[given.versions], given.python, arguments):
            failed.append(name)
    if failed:
        sys.exit(f"{given.versions}: tests failed with the libraries of {' and '.join(failed)}, see above")
    logger.info("%s: all tests passed", given.versions)


def passes(extras: tuple[str, ...], resolution: str, python: str, arguments: list[str]) -> bool:
    """Whether the fast tests pass in a new environment, whose versions are printed."""
    with tempfile.TemporaryDirectory() as place:
        uv, own = [sys.executable, "-m", "uv"], str(Path(place, "bin", "python"))
        package = f"{ROOT}[{','.join(extras)}]"
        for command in (
            ["venv", "--quiet", "--clear", "--python", python, place],
            ["pip", "install", "--quiet", "--python", own, "--resolution", resolution, "--editable", package],
            ["pip", "freeze", "--python", own],
        ):
            subprocess.run([*uv, *command], check=True)
        tests = [own, "-m", "pytest", "-m", "not slow", "-n", "auto", "--dist", "worksteal", *arguments]
        return subprocess.run(tests, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    main()
