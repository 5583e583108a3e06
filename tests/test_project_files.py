"""What stands beside the code agrees with it: versions, make targets, workflows, links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from negpipe import __version__

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)) | {
    *re.findall(r"VERBS := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[0].split()
}
PAGES: tuple[str, ...] = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/reference/api.md",
    "docs/reference/glossary.md",
)
PAGES += ("docs/how-to/run-directories.md", "docs/how-to/containers.md", "examples/README.md")


def test_versions_agree() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", log, re.MULTILINE)[:2] == ["Unreleased", __version__]


def test_hosted_checks_call_targets_that_there_are() -> None:
    called = set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            called |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
            runs = [step["run"] for step in job["steps"] if "run" in step]
            called |= {name for run in runs for name in re.findall(r"^make ([a-z-]+)$", run, re.MULTILINE)}
    assert called >= {"test", "test-slow", "test-loaders", "wheel"}
    assert called <= TARGETS


def test_what_ci_runs_here_is_run_there_too() -> None:
    ours = set(re.findall(r"make ([a-z-]+)", (ROOT / ".ci/run").read_text(encoding="utf-8")))
    assert all(target in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8") for target in ours)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make looks at, without an environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def installs(target: str, checkout: Path) -> list[str]:
    """What make would install for a target, in order."""
    done = subprocess.run(["make", "-n", target], cwd=checkout, capture_output=True, text=True, check=True)
    return re.findall(r"pip install .* (?:-e )?'(?:\.|negpipe)\[(.*)\]'", done.stdout)


def test_a_target_installs_what_it_needs(checkout: Path) -> None:
    assert installs("mine", checkout) == ["offline"]
    assert installs("train", checkout) == ["offline", "train"]
    (offline, rest) = installs("test", checkout)
    assert offline == "offline"
    extras = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert {offline, *rest.split(",")} == set(extras)
    # After make mine, make test installs the rest alone; after a change of the versions, both again.
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.ready-mining").touch()
    assert installs("mine", checkout) == []
    assert installs("test", checkout) == [rest]
    (checkout / ".venv/.ready").touch()
    assert installs("test", checkout) == []
    os.utime(checkout / "constraints.txt", (2**32, 2**32))
    assert installs("test", checkout) == [offline, rest]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_named_targets_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= TARGETS


def test_the_container_is_not_roots() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert "USER 1000" in lines
    copied = {
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    }
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_the_container_passes_the_linter(tmp_path: Path) -> None:
    """And its commands pass shellcheck, which the linter contains. No machine of ours builds the image."""
    bad = tmp_path / "Dockerfile"
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    bad.write_text(text.replace("USER 1000", "USER root").replace('"$VARIANT" in', "'$VARIANT' in"), "utf-8")
    linter = [str(Path(sysconfig.get_path("scripts"), "hadolint")), "--no-color"]
    checked, refused = (
        subprocess.run([*linter, str(path)], capture_output=True, text=True, check=False)
        for path in (ROOT / "Dockerfile", bad)
    )
    assert checked.returncode == 0, checked.stdout
    assert refused.returncode == 1
    assert {"DL3002", "SC2016"} <= set(re.findall(r"\w+\d{4}", refused.stdout)), refused.stdout


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_forms_of_issues_are_whole(form: Path) -> None:
    read = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert form.name == "config.yml" or {"name", "description", "body"} <= set(read)
