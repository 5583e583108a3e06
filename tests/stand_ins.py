"""What stands in for a GPU, which machines that test have not: torch on the processor, through the code for devices."""

from __future__ import annotations

from typing import Any

import numpy as np

from negpipe.ann.pairs import pair_scores
from negpipe.ann.products import OnDevice, Operand


def on_device() -> OnDevice:
    return OnDevice("cpu", 2, 2**28)


class Off(OnDevice):
    """Products off by all that float32 allows, or several times as much, where it hurts: great ones down, others up.

    Sums of d products in two orders are 2 * d * u / (1 - d * u) * |q| * |v| apart at most, u = 2**-24, beside what is
    lost where each of d products and d sums below the least normal number becomes 0.
    """

    def __init__(self, times: float = 1.0) -> None:
        super().__init__("cpu", 1, 2**28)
        self._times = times

    def multiply(self, anchors: Operand, rows: Operand, scratch: Any) -> Any:
        import torch

        q, v = (operand.values.numpy() for operand in (anchors, rows))
        anchor_of, row_of = (index.ravel() for index in np.indices((len(q), len(v))))
        scores = pair_scores(q, anchor_of, v, row_of).reshape(len(q), len(v))
        units = q.shape[1] * 2.0**-24
        lengths = np.outer(*(np.linalg.norm(values.astype(np.float64), axis=1) for values in (q, v)))
        bounds = 2 * units / (1 - units) * lengths + 2 * q.shape[1] * float(np.finfo(np.float32).tiny)
        signs = np.where(scores < np.median(scores, axis=1, keepdims=True), 1, -1)
        exact = scores + signs * self._times * bounds
        products = exact.astype(np.float32)
        beyond = np.where(signs > 0, products > exact, products < exact)  # by rounding
        products[beyond] = np.nextafter(products, scores)[beyond]
        return torch.from_numpy(products)
