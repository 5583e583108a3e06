"""YAML from anybody: plain values only, and no more of them than a person writes.

PyYAML's safe loader makes no objects, but an alias costs a few bytes and stands for all it names: nested aliases
would grow without bound as soon as somebody walks through them. So the size is counted before anything is made.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 10_000


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: it is not YAML, asks for Python objects, or holds too many values; the text says where.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, aliases counted as often as they are used")
        return yaml.SafeLoader("").construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # a value that does not go with its tag raises all sorts of them
        raise ValueError(" ".join(str(error).split())) from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node makes once every alias is written out."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # whoever meets it while it is being counted is inside it: endless
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = [part for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in pairs)
    return known[id(node)]
