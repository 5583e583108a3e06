"""The arms of an ablation: by name, the config changes of each.

Arms that compare rules take as many negatives per anchor as the config does. Config settings about the data (excluded
pairs, columns that must not be shared) apply to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from negpipe.config.presets import PRESETS
from negpipe.config.schema import Config
from negpipe.config.training import DISTILLING, TAKES, Ablate, flat
from negpipe.errors import ConfigError

Changes = Mapping[str, Any]
"""Values by key; a mapping replaces an entire section."""

CALIBRATED = "calibrated"
"""The arm whose changes are only known once the candidates are."""
_OF_THE_DATA = (
    "exclude_file",
    "never_same",
    "only_same",
    "where",
    "near_duplicate",
    "given_negatives",
    "judged",
)
_OF_THE_MINER = ("exclude", "anchor_id")  # settings that presets of other miners set too


def arms(config: Config, calibrated: Callable[[], Changes | None]) -> dict[str, Changes]:
    """The changes of each arm of the config's section `ablate`, in order.

    Args:
        config: with or without the section.
        calibrated: returns the changes of the arm of that name, if requested; None: it is left out.

    Raises:
        ConfigError: a user-defined arm has the name of another arm.
    """
    settings = config.ablate or Ablate()
    found: dict[str, Changes] = {}
    for each in settings.sets:
        if each != CALIBRATED:
            found |= _SETS[each](config)
        elif (changes := calibrated()) is not None:
            found[CALIBRATED] = changes
    for name, own in settings.arms.items():
        if name in found:
            raise ConfigError(f"ablate.arms: '{name}' is the name of an arm of ablate.sets: rename it")
        found[name] = flat(own)
    return found


def rules(config: Config, **changes: Any) -> Changes:
    """Mining with negpipe's defaults, except for `changes`, the number of negatives, and facts about the data."""
    kept = _OF_THE_DATA if "compat" in changes else (*_OF_THE_DATA, *_OF_THE_MINER)
    known = config.mining.model_dump(mode="json", include=config.mining.model_fields_set & {*kept})
    return {"mining": {"num_negatives": config.mining.wanted, **known, **changes}}


def _in_batch(config: Config) -> dict[str, Changes]:
    # One row per pair of anchor and positive; its negative is ignored.
    return {"in-batch": {**rules(config, num_negatives=1, relative_margin=None), "train.negatives": False}}


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


def _losses(config: Config) -> dict[str, Changes]:
    """Losses that fit the rows. Distillation is left out: the scores to learn would be the base's own."""
    assert config.train is not None
    takes = TAKES[config.train.kind]
    return {
        loss: {"train.loss": loss}
        for loss, formats in takes.items()
        if config.output.format in formats and loss not in DISTILLING and not loss.startswith("CachedMultiple")
    }


_SETS: Mapping[str, Callable[[Config], dict[str, Changes]]] = {
    "in-batch": _in_batch,
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
