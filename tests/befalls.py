"""What befalls the processes that run tasks, wherever an executor starts them, and what they note.

`injected_workers/sitecustomize.py` does it, in every process with this environment.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INJECTED = Path(__file__).with_name("injected_workers")


@dataclass(frozen=True)
class Control:
    """A file in a folder of its own that says what befalls them, and the notes beside it."""

    file: Path

    @property
    def environment(self) -> Mapping[str, str]:
        path = os.pathsep.join([str(_INJECTED), os.environ.get("PYTHONPATH", "")])
        return {"PYTHONPATH": path, "WORKER_CONTROL": str(self.file)}

    def tell(self, **what: Any) -> None:
        """Say what befalls whoever publishes into these folders from now on, and forget what was noted."""
        for path in self.file.parent.iterdir():
            path.unlink()
        self.file.write_text(json.dumps(what), encoding="utf-8")

    def notes(self, *folders: str) -> list[tuple[str, int]]:
        """Files that were published, and the processes that did."""
        return [(name, pid) for name, pid, *_ in self._noted(*folders)]

    def parents(self, *folders: str) -> Counter[int]:
        """How many files were published, by the parents of the processes that did: on Ray, by node."""
        return Counter(parent for _, _, parent, _ in self._noted(*folders))

    def threads(self, *folders: str) -> set[str]:
        """How many threads the libraries of those processes are told to use."""
        return {threads for *_, threads in self._noted(*folders)}

    def done_again(self, *folders: str) -> int:
        """Files that were published a second time."""
        return sum(count - 1 for count in Counter(name for name, _ in self.notes(*folders)).values())

    def _noted(self, *folders: str) -> list[tuple[str, int, int, str]]:
        path = Path(f"{self.file}.notes")
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [
            (name, int(pid), int(parent), threads)
            for at, name, pid, parent, threads in lines
            if at in (folders or (at,))
        ]
