"""Finds `mining` settings for an encoder: how often they take relevant documents, and how hard their negatives are.

The settings are tried with the real selection code on the candidates stored by `search`. Nothing is
encoded or searched; the same config, candidates and settings give the same numbers.
"""

from __future__ import annotations

from negpipe.review.calibrate.estimate import Calibration, Estimate, calibrate, to_table
from negpipe.review.calibrate.grid import Setting, grid, of_config
from negpipe.review.calibrate.plot import draw_leak
from negpipe.review.calibrate.recommend import Recommendation, recommend
from negpipe.review.calibrate.trials import METHODS, Trials, hidden, near_anchors, second_opinion

__all__ = [
    "METHODS",
    "Calibration",
    "Estimate",
    "Recommendation",
    "Setting",
    "Trials",
    "calibrate",
    "draw_leak",
    "grid",
    "hidden",
    "near_anchors",
    "of_config",
    "recommend",
    "second_opinion",
    "to_table",
]
