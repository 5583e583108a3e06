"""Types of values shared by several sections: sizes, devices."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    number = value.strip().rstrip("BbIiKkMmGgTt")
    try:
        return int(float(number) * _UNITS[value.strip()[len(number) :].upper()])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"'{value}' is not an amount of memory: write for example 2GiB or 800MB") from None


def _device(value: str) -> str:
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", value):
        raise ValueError(f"'{value}' is not a device: write cpu, cuda or cuda:1 …")
    return value


def _expanded(value: Path) -> Path:
    return Path(os.path.expanduser(value))  # noqa: PTH111 (leaves ~ of an unknown user, where Path raises RuntimeError)


Folder = Annotated[Path, AfterValidator(_expanded)]
"""A folder; ~ is the home folder, as a shell does not expand it in --set KEY=~/FOLDER."""
Size = Annotated[int, BeforeValidator(size)]
"""Bytes, also written as 2GiB."""
Device = Annotated[str, AfterValidator(_device)]
"""A device, named as in torch."""
