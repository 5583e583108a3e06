"""The settings to try: a start of the window, at most one cutoff, and a sampling strategy each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from negpipe.config.schema import Config, Output

RANGE_MIN = (0, 5, 10, 30)
RELATIVE_MARGIN = (0.02, 0.05, 0.1, 0.2)
ABSOLUTE_MARGIN = (0.05, 0.1)
SAMPLING = ("top", "random")


@dataclass(frozen=True, order=True)
class Setting:
    """Settings of `mining` that are tried together; the others come from the config."""

    range_min: int
    range_max: int
    sampling_strategy: str
    relative_margin: float | None = None
    absolute_margin: float | None = None
    max_score: float | None = None

    @property
    def cutoff(self) -> str:
        """Its cutoffs, for display."""
        given = {"relative": self.relative_margin, "absolute": self.absolute_margin, "score ≤": self.max_score}
        return ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None) or "none"

    def applied(self, config: Config) -> Config:
        """A resolved config with these settings, for selection alone: shortages are only counted."""
        changes = {**asdict(self), "on_shortage": "keep", "num_random": 0}
        return config.model_copy(
            update={"mining": config.mining.model_copy(update=changes), "output": Output()},
        )

    def yaml(self) -> str:
        """Lines to paste into a config."""
        lines = [f"  {name}: {'null' if value is None else value}" for name, value in asdict(self).items()]
        return "\n".join(["mining:", *lines])

    def changes(self, other: Setting) -> list[str]:
        """What turns another setting into this one, as values of `--set`."""
        before = asdict(other)
        return [
            f"mining.{name}={'null' if value is None else value}"
            for name, value in asdict(self).items()
            if value != before[name]
        ]


def of_config(config: Config) -> Setting:
    """The settings of a resolved config."""
    mining = config.mining
    assert mining.range_max is not None, "the config is not resolved"
    names = ("range_min", "range_max", "sampling_strategy", "relative_margin", "absolute_margin", "max_score")
    return Setting(**{name: getattr(mining, name) for name in names})


def grid(
    config: Config,
    *,
    range_min: Sequence[int] = RANGE_MIN,
    relative_margin: Sequence[float] = RELATIVE_MARGIN,
    absolute_margin: Sequence[float] = ABSOLUTE_MARGIN,
    max_score: Sequence[float] = (),
    sampling: Sequence[str] = SAMPLING,
) -> list[Setting]:
    """Every window start with every strategy and every cutoff (including none); the config's setting first.

    The window ends where the config's does, or later if needed for all negatives. A start at or beyond
    the stored depth is left out.
    """
    mine = of_config(config)
    cutoffs: list[dict[str, Any]] = [{}]
    cutoffs += [{"relative_margin": value} for value in relative_margin]
    cutoffs += [{"absolute_margin": value} for value in absolute_margin]
    cutoffs += [{"max_score": value} for value in max_score]
    settings = [
        Setting(first, max(mine.range_max, first + config.mining.num_negatives), strategy, **cutoff)
        for strategy, cutoff, first in product(sampling, cutoffs, range_min)
        if first < config.depth
    ]
    return list(dict.fromkeys([mine, *settings]))
