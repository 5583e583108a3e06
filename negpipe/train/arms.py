"""The arms of an ablation: by name, what each changes in the config.

Arms that compare rules take as many negatives an anchor as the config does, so that they differ by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from negpipe.config.presets import PRESETS
from negpipe.config.schema import Ablate, Config
from negpipe.errors import ConfigError

Changes = Mapping[str, Any]
"""Values by key; a mapping takes the place of a whole section."""

CALIBRATED = "calibrated"
"""The arm whose changes are known once the candidates are."""


def arms(config: Config, calibrated: Callable[[], Changes]) -> dict[str, Changes]:
    """What each arm of the config's section `ablate` changes, in order.

    Args:
        config: with or without the section.
        calibrated: asked for the changes of the arm of that name, where there is one.

    Raises:
        ConfigError: an arm of the user has the name of another.
    """
    settings = config.ablate or Ablate()
    found: dict[str, Changes] = {}
    for each in settings.sets:
        found |= {CALIBRATED: calibrated()} if each == CALIBRATED else _SETS[each](config)
    for name, changes in settings.arms.items():
        if name in found:
            raise ConfigError(f"ablate.arms: '{name}' is the name of an arm of ablate.sets: give it another")
        found[name] = changes
    return found


def rules(config: Config, **changes: Any) -> Changes:
    """Mining by negpipe's defaults but for these, and for the number of negatives."""
    return {"mining": {"num_negatives": config.mining.wanted, **changes}}


def _peers(config: Config) -> dict[str, Changes]:
    return {name: rules(config, compat=name) for name in PRESETS}


def _windows(_: Config) -> dict[str, Changes]:
    return {
        f"ranks from {first}": {"mining.range_min": first, "mining.range_max": first + 192} for first in (0, 5, 10, 30)
    }


def _margins(_: Config) -> dict[str, Changes]:
    named = {f"margin {margin:.0%}": margin for margin in (0.02, 0.05, 0.1, 0.2)}
    return {name: {"mining.relative_margin": margin} for name, margin in {"no margin": None, **named}.items()}


def _negatives(_: Config) -> dict[str, Changes]:
    return {f"{count} negatives": {"mining.num_negatives": count} for count in (1, 3, 7)}


def _batch_sizes(_: Config) -> dict[str, Changes]:
    return {f"batches of {size}": {"train.batch_size": size} for size in (16, 32, 64)}


def _losses(_: Config) -> dict[str, Changes]:
    names = ("MultipleNegativesRankingLoss", "CachedGISTEmbedLoss", "MarginMSELoss", "DistillKLDivLoss")
    return {name: {"train.loss": name} for name in names}


_SETS: Mapping[str, Callable[[Config], dict[str, Changes]]] = {
    # A row for each pair of anchor and positive, whose negative is not looked at.
    "in-batch": lambda config: {
        "in-batch": {"mining": {"num_negatives": 1, "relative_margin": None}, "train.negatives": False}
    },
    "random": lambda config: {"random": rules(config, num_negatives=0, num_random=config.mining.wanted)},
    "peers": _peers,
    "default": lambda config: {"default": rules(config)},
    "configured": lambda config: {"configured": {}},
    "windows": _windows,
    "margins": _margins,
    "negatives": _negatives,
    "batch_sizes": _batch_sizes,
    "losses": _losses,
}
