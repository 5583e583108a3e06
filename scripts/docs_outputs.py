"""Runs the tutorials as a reader would, and inserts the output of the commands: `python scripts/docs_outputs.py`.

The pages are followed from top to bottom, one after the other, in one new folder that has this checkout's configs and
scripts. A block of bash or python is run, a block with a title is written to the file of that name. A comment in the
line before a block marks special cases:

    <!-- output -->     the output of the previous block, including the log; it is rewritten
    <!-- exit 1 -->     the block ends with this exit code
    <!-- not run -->    the block is not run

`--check` rewrites nothing: it ends with exit code 1 if a block fails or prints lines of another shape. The shape of
a line is its words: numbers, times and the texts of samples differ between machines and versions of Python.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("first-run", "your-data", "train", "review")]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<info>[^\n`]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
PROGRESS = re.compile(r"\w+: [\d,]+ (of [\d,]+ )?\w+( after|, about| \(|$)|it/s\]$")
"""Lines that are left out, because their number depends on timing."""
PATIENCE = 1800


@dataclass
class Ran:
    """The output of a block (standard output and log, without progress lines), and its exit code."""

    code: int
    printed: str


def follow(page: Path, folder: Path) -> Iterator[tuple[re.Match[str], str]]:
    """Run a page's blocks; yields each output block with the text that was printed.

    Raises:
        RuntimeError: the exit code of a block is not the one on the page.
    """
    ran = Ran(0, "")
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, _, title = block["info"].partition(" ")
        mark = block["mark"] or ""
        if mark == "output":
            yield block, ran.printed
        elif name := re.search(r'title="([^"]+)"', title):
            (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / name[1]).write_text(block["text"], encoding="utf-8")
        elif language in ("bash", "python") and mark != "not run":
            ran = _run(language, block["text"], folder)
            expected = int(mark.removeprefix("exit ")) if mark.startswith("exit ") else 0
            if ran.code != expected:
                raise RuntimeError(f"{page.name}: exit code {ran.code} of\n{block['text']}{ran.printed}")


def shape(printed: str) -> list[str]:
    """Lines without numbers, verdicts and samples, which differ from one version of Python or processor to another."""
    lines = []
    for line in printed.splitlines():
        words = re.sub(r"[-+]?\.?\d[\d,.:]*", "#", line)
        words = re.sub(r"\b(WIN|LOSS|TIE)\b", "VERDICT", words)
        words = " ".join(re.sub(r"-{2,}|[─━╭╮╰╯│]+", " ", words).split())
        sample = re.match(r"anchor \S|(anchor|positive|negative|candidate)s? (#|[A-Z])", words)
        if words and not sample:
            lines.append(words)
    return lines


def _run(language: str, text: str, folder: Path) -> Ran:
    shell = ["bash", "-e", "-o", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "TERM": "dumb"}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    done = subprocess.run(
        shell,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines() if not PROGRESS.search(line)]
    return Ran(done.returncode, "".join(f"{line}\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the shapes of lines; rewrite nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("configs", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            for block, printed in follow(page, folder):
                if check and shape(block["text"]) != shape(printed):
                    sys.exit(f"{page.name} shows\n{block['text']}\nand now it prints\n{printed}")
                new = f"<!-- output -->\n```{block['info']}\n{printed}```"
                text = text if check else text.replace(block[0], new, 1)
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
