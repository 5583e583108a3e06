"""Decides which findings fail an audit: parses and applies `--fail-on`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from negpipe.errors import ConfigError
from negpipe.review.audit.checks import GROUPS, Finding


@dataclass(frozen=True)
class Policy:
    """Maps checks to the share of findings allowed without failing."""

    allowed: Mapping[str, float]

    def failed(self, findings: Sequence[Finding]) -> list[Finding]:
        """The failing findings."""
        return [one for one in findings if one.check in self.allowed and one.share > self.allowed[one.check]]


def policy(text: str | None) -> Policy:
    """Parse `positive,shortage=0.05`: names of checks or groups, each with its allowed share, 0 by default.

    Raises:
        ConfigError: a name is unknown, or a share is invalid.
    """
    allowed: dict[str, float] = {}
    for item in text.split(",") if text else []:
        name, equals, share = item.strip().partition("=")
        names = GROUPS.get(name, (name,) if name in GROUPS["any"] else ())
        if not names:
            raise ConfigError(
                f"--fail-on {text}: unknown check '{name}'. Checks: {', '.join(GROUPS['any'])}."
                f" Groups: {', '.join(GROUPS)}"
            )
        try:
            least = float(share) if equals else 0.0
        except ValueError:
            least = -1.0
        if not 0 <= least <= 1:
            raise ConfigError(f"--fail-on {text}: '{share}' is not a share; write, for example, {name}=0.01")
        allowed |= dict.fromkeys(names, least)
    return Policy(allowed)
