"""Columns of a dataset or corpus passed by a caller, or a ValueError with the argument and the expected types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_TAKEN = "a datasets.Dataset or IterableDataset, a dict of lists, a list of dicts, or a pandas DataFrame"


def columns_of(dataset: Any) -> Mapping[str, Sequence[Any]]:
    """Column → its values, all of the same length. A stream is read to its end.

    Raises:
        ValueError: the dataset has an unsupported type, several splits, or columns of different lengths.
    """
    import pandas as pd
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Dataset):
        # Each is read when requested.
        return {name: dataset[name] for name in dataset.column_names}
    if isinstance(dataset, pd.DataFrame):
        if twice := dataset.columns[dataset.columns.duplicated()].tolist():
            raise ValueError(f"dataset: it has several columns {twice[0]!r}: give each a unique name")
        return {str(name): values.tolist() for name, values in dataset.items()}
    if isinstance(dataset, Mapping):
        splits = [name for name, split in dataset.items() if isinstance(split, Dataset | IterableDataset)]
        return _one_split(dataset, splits) if splits else _of_lists(dataset)
    if isinstance(dataset, IterableDataset | list | tuple):
        rows = list(dataset)
        if all(isinstance(row, Mapping) for row in rows):
            names = dict.fromkeys(name for row in rows for name in row)
            return {str(name): [row.get(name) for row in rows] for name in names}
    raise ValueError(f"dataset: expected {_TAKEN}, found {_named(dataset)}")


def pair_of(names: Sequence[str], anchor: str | None, positive: str | None) -> tuple[str, str]:
    """The anchor column and the positive column; by default, the first and second remaining columns.

    Raises:
        ValueError: a name is not found, both are the same, or there are too few columns.
    """
    there = ", ".join(map(repr, names))
    for argument, name in (("anchor_column_name", anchor), ("positive_column_name", positive)):
        if name is not None and name not in names:
            raise ValueError(f"{argument}: the dataset has no column {name!r}; its columns are {there}")
    if len(names) < 2:
        raise ValueError(f"the dataset must have two columns, anchors and positives; it has {there}")
    if anchor is not None and anchor == positive:
        raise ValueError(f"positive_column_name: {positive!r} is the anchor column; the columns are {there}")
    first, second = names[:2]
    if anchor is None:
        anchor = second if first == positive else first
    if positive is None:
        positive = first if second == anchor else second
    return anchor, positive


def pairs(columns: Mapping[str, Sequence[Any]], anchor: str, positive: str) -> list[tuple[str, str]]:
    """(anchor, positive), one per row; a list of positives yields one for each.

    Raises:
        ValueError: a value is not a text, or a list is empty.
    """
    found: list[tuple[str, str]] = []
    for row, (query, value) in enumerate(zip(_whole(columns[anchor]), _whole(columns[positive]), strict=True)):
        _check_text(anchor, row, query)
        answers = list(value) if _is_list(value) else [value]
        if not answers:
            raise ValueError(f"'{positive}', row {row}: expected a text or a list of texts, found an empty list")
        for answer in answers:
            _check_text(positive, row, answer)
            found.append((query, answer))
    return found


def texts_of(corpus: Any) -> list[str]:
    """Raises ValueError if the corpus is not a sequence of texts."""
    import pandas as pd
    from datasets import Dataset, IterableDataset

    if corpus is None:
        return []
    if isinstance(corpus, Dataset | IterableDataset | Mapping | pd.DataFrame):
        raise ValueError(f"corpus: expected a list of texts, found {_named(corpus)}: pass corpus['text']")
    if isinstance(corpus, str) or not isinstance(corpus, Iterable):
        raise ValueError(f"corpus: expected a list of texts, found {_named(corpus)}")
    texts = _whole(corpus)
    for row, text in enumerate(texts):
        _check_text("corpus", row, text)
    return texts


def _one_split(dataset: Mapping[str, Any], splits: list[str]) -> Mapping[str, Sequence[Any]]:
    if len(dataset) > 1:
        names = ", ".join(map(repr, dataset))
        raise ValueError(f"dataset: it has the splits {names}: pass one of them, such as dataset[{splits[0]!r}]")
    return columns_of(dataset[splits[0]])


def _of_lists(dataset: Mapping[Any, Any]) -> Mapping[str, Sequence[Any]]:
    for name, values in dataset.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"dataset: expected a list in each column, found {_named(values)} in {name!r}")
    columns = {str(name): list(values) for name, values in dataset.items()}
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name!r} {len(values):,}" for name, values in columns.items())
        raise ValueError(f"dataset: its columns differ in length: {lengths}")
    return columns


def _whole(values: Any) -> list[Any]:
    """All values; a dataset's column at once, as one by one takes a hundred times as long."""
    # By name, because datasets 3 has no such class: there, a column is a list.
    return list(values[:] if type(values).__name__ == "Column" else values)


def _is_list(value: Any) -> bool:
    """Lists, and the arrays that pandas makes of them."""
    return isinstance(value, list | tuple) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)


def _check_text(where: str, row: int, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"'{where}', row {row}: expected a text, found {text!r}")


def _named(value: Any) -> str:
    if isinstance(value, list | tuple):
        odd = next(entry for entry in value if not isinstance(entry, Mapping))
        return f"a {type(value).__name__} with a {type(odd).__name__}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
