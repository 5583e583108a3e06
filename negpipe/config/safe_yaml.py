"""Untrusted YAML: plain values only, and no more of them than a person writes.

PyYAML's safe loader does not create arbitrary objects, but an alias takes a few bytes and stands for everything it
refers to: nested aliases grow without bound once traversed. The size is therefore counted before anything is built.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 10_000


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: the text is not YAML, requests Python objects, sets a key twice, or has too many values; the message
            says where.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, counting every use of an alias")
        return yaml.SafeLoader("").construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_explained(error)) from None
    except Exception as error:  # a value that does not match its tag raises various errors
        raise ValueError(" ".join(str(error).split())) from None


def _explained(error: yaml.MarkedYAMLError) -> str:
    """What is wrong and in which line; for two mistakes that PyYAML describes in terms of its own work, what to do."""
    problem, mark = error.problem or "", error.problem_mark
    if mark and "another document" in problem:
        return f"line {mark.line + 1}: a second document begins (---): keep one"
    if mark and "'\\t'" in problem:
        return f"line {mark.line + 1}: indent with spaces, not a tab"
    said = ": ".join(filter(None, [error.context, problem]))
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}" if mark else said


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values of a node with every alias expanded."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # met again while being counted, it contains itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            _check_once(node)
        pairs = [part for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in pairs)
    return known[id(node)]


def _check_once(node: yaml.MappingNode) -> None:
    """PyYAML keeps the last of equal keys and drops the others without a word."""
    lines: dict[str, int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"'{key.value}' is set twice, in lines {lines[key.value]} and {line}: merge them")
        lines[key.value] = line
