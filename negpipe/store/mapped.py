"""Memory-mapped files: memory holds only the pages in use, and the system may reclaim them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def arrow(path: Path) -> pa.MemoryMappedFile:
    """A mapped file for Arrow."""
    return pa.memory_map(str(path))


def npy(path: Path) -> np.memmap[Any, np.dtype[Any]]:
    """The array of a .npy file. Raises what `numpy.load` raises for an incomplete file, see `data.npy.BROKEN`."""
    array: np.memmap[Any, np.dtype[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def numbers(path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """Numbers stored in a file from an offset on."""
    return np.memmap(path, dtype, "r", offset, shape)
