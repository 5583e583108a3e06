"""The YAML header of a dataset card: the files of each config, for `load_dataset(FOLDER, NAME)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from negpipe.engine.fingerprint import digest
from negpipe.store.files import file_digest


def configs(folder: Path, patterns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entry `configs`.

    Args:
        patterns: config → its files, all of split train.
    """
    return [
        {
            "config_name": name,
            "data_files": [{"split": "train", "path": pattern}],
            # `datasets` reuses a cached copy of the folder if this YAML is the same, even if the files differ.
            "description": f"content {digest([file_digest(path) for path in sorted(folder.glob(pattern))])[:16]}",
        }
        for name, pattern in patterns.items()
    ]


def write_configs(folder: Path, patterns: Mapping[str, str]) -> None:
    """Write a README.md with only the configs."""
    front = yaml.safe_dump({"configs": configs(folder, patterns)}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{front}---\n", encoding="utf-8")
