"""Run the fast tests with the oldest or the newest libraries that pyproject.toml allows, before a release:

    pip install uv
    python scripts/test_versions.py lowest
    python scripts/test_versions.py newest --python 3.13
    python scripts/test_versions.py newest -- -x tests/encoders     # behind --: arguments of pytest

`lowest` is without training, ONNX and OpenVINO, and their tests: the lower bounds of those extras are the versions that
`make test` runs with. It is also without s3fs, which brings newer versions than the bounds of others (buckets are
tested all the same: boto3 comes with moto), and without the tests of the documentation, whose pages are made with the
versions of `make test`. An environment is made in a temporary folder, takes 6 GB with torch from PyPI, and is deleted.
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
MINING = ("offline", "http", "ray", "slurm", "dev")
EXTRAS = {"lowest": MINING, "newest": (*MINING, "s3", "train", "onnx", "openvino")}
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
TESTS: dict[str, list[str]] = {
    "lowest": ["--ignore=tests/train", "--ignore=tests/docs"],
    "newest": [],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("versions", choices=EXTRAS)
    parser.add_argument("--python", default=sys.executable, help="a version, or a path (this one)")
    parser.add_argument("pytest", nargs="*", help="behind --: arguments of pytest")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not passes(given.versions, given.python, given.pytest):
        sys.exit(f"{given.versions}: tests failed, see above")
    logger.info("%s: all tests passed", given.versions)


def passes(versions: str, python: str, arguments: list[str]) -> bool:
    """Whether the fast tests pass in a new environment, whose versions are printed."""
    with tempfile.TemporaryDirectory() as place:
        uv, own = [sys.executable, "-m", "uv"], str(Path(place, "bin", "python"))
        package = f"{ROOT}[{','.join(EXTRAS[versions])}]"
        for command in (
            ["venv", "--quiet", "--seed", "--clear", "--python", python, place],
            ["pip", "install", "--quiet", "--python", own, "--resolution", RESOLUTIONS[versions], "-e", package],
            ["pip", "freeze", "--python", own],
        ):
            subprocess.run([*uv, *command], check=True)
        options = ["-m", "not slow", "-n", "auto", "--dist", "worksteal"]
        tests = [own, "-m", "pytest", *options, *TESTS[versions], *arguments]
        return subprocess.run(tests, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    main()
