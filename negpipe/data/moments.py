"""Count, mean, deviation and range of numbers that arrive in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np

from negpipe.data.arrays import Floats

Moments = dict[str, Any]


def of(values: Floats) -> Moments:
    """The moments of some numbers, as JSON."""
    if not len(values):
        return {"count": 0, "sum": 0.0, "squares": 0.0, "min": None, "max": None}
    wide = values.astype(np.float64)
    return {
        "count": len(wide),
        "sum": float(wide.sum()),
        "squares": float((wide**2).sum()),
        "min": float(wide.min()),
        "max": float(wide.max()),
    }


def merge(pieces: list[Moments]) -> Moments:
    """The moments of all pieces together, summed in order."""
    filled = [piece for piece in pieces if piece["count"]]
    if not filled:
        return of(np.empty(0, np.float32))
    totals = {name: sum(piece[name] for piece in filled) for name in ("count", "sum", "squares")}
    return totals | {"min": min(piece["min"] for piece in filled), "max": max(piece["max"] for piece in filled)}


def summary(moments: Moments) -> dict[str, Any]:
    """Count, mean, standard deviation, minimum and maximum."""
    count = moments["count"]
    if not count:
        return {"count": 0}
    mean = moments["sum"] / count
    deviation = max(0.0, moments["squares"] / count - mean**2) ** 0.5
    return {"count": count, "mean": mean, "std": deviation, "min": moments["min"], "max": moments["max"]}
