"""`mining.where`: a condition on anchor, positive and candidate, parsed, checked and evaluated by DuckDB.

It is one SQL expression over the available names: no table, no subquery, no aggregate, no function whose result may
vary. The database that evaluates it is empty and has no access to files. A null is not true.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from negpipe.config.schema import Config
from negpipe.data.arrays import Mask
from negpipe.data.tables import EXTRA
from negpipe.errors import ConfigError, InputError, closest

if TYPE_CHECKING:
    import duckdb


SIDES = {"anchor": "queries", "positive": "corpus", "candidate": "corpus"}
"""The sides whose columns can be named, and their table in `data.extra`."""
NUMBERS: Mapping[str, pa.DataType] = {"score": pa.float32(), "rank": pa.int64(), "positive_score": pa.float32()}
_OWN = ("id", "text")
_PLAIN = (
    "CASE",
    "CAST",
    "COLUMN_REF",
    "COMPARISON",
    "CONJUNCTION",
    "CONSTANT",
    "FUNCTION",
    "BETWEEN",
    "OPERATOR",
    "TYPE",
)
_LIMITS: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "lock_configuration": True,
    "memory_limit": "128MiB",
    "temp_directory": "",
    "threads": 1,
}
_TEXTS = "Columns are text: for a number, write try_cast(candidate.year as integer), null where there is none"


@dataclass(frozen=True)
class Condition:
    """One of the conditions joined by `and`.

    Attributes:
        sql: as formatted by DuckDB.
        names: the names it uses, such as (candidate, lang) or (score,).
    """

    sql: str
    names: frozenset[tuple[str, ...]]

    @property
    def scored(self) -> bool:
        """Whether it uses a score or a rank."""
        return any(len(name) == 1 for name in self.names)


def conditions(config: Config) -> list[Condition]:
    """The conditions of `mining.where`.

    Raises:
        ConfigError: it is not a single expression over the available names.
    """
    import duckdb

    text = config.mining.where
    if text is None:
        return []
    with _connect() as database:
        statement, plain = _parse(database, text), _parse(database, "true")
        node, rest = statement["node"], {**plain["node"], "select_list": None}
        # There must be nothing but the expression, such as a table.
        if {**node, "select_list": None} != rest or len(node["select_list"]) != 1 or node["select_list"][0]["alias"]:
            raise _refusal(text, "expected one condition, such as candidate.lang = anchor.lang and score < 0.8")
        (whole,) = node["select_list"]
        _check(whole, text, database)
        joined = whole["children"] if whole["type"] == "CONJUNCTION_AND" else [whole]
        found = []
        for one in joined:
            tree = {"error": False, "statements": [{**statement, "node": {**node, "select_list": [one]}}]}
            try:
                sql = _value(database, "select json_deserialize_sql(?::json)", json.dumps(tree)).removeprefix("SELECT ")
            except duckdb.Error as error:  # version 2.0.1 reads back fewer levels than it writes
                raise _refusal(text, _first_line(error)) from None
            names = {tuple(part["column_names"]) for part in _parts(one) if part["class"] == "COLUMN_REF"}
            for name in sorted(names):
                _check_name(name, config)
            found.append(Condition(sql, frozenset(names)))
    for side, own in columns_of(found, config).items():
        if len({name.lower() for name in own}) < len(own):
            raise _refusal(text, f"SQL names are case-insensitive, so only one of {side}.{', '.join(own)} can be used")
    return found


def check(config: Config) -> None:
    """Raises ConfigError where `mining.where` cannot be evaluated, whatever the data."""
    if asked := conditions(config):
        Database(config, asked)


def columns_of(asked: Sequence[Condition], config: Config) -> dict[str, dict[str, str]]:
    """For each side: columns that the conditions use → their names in ingest's tables."""
    names = sorted(name for name in set().union(*(one.names for one in asked)) if len(name) == 2)
    return {side: {name: _stored(name, side, config) for own, name in names if own == side} for side in SIDES}


class Database:
    """Evaluates conditions.

    Attributes:
        columns: see `columns_of`.
        numbers: the names of `NUMBERS` in use.

    Raises:
        ConfigError: types do not match, or a condition is neither true nor false.
    """

    def __init__(self, config: Config, asked: Sequence[Condition]) -> None:
        self.numbers = [name for name in NUMBERS if any((name,) in one.names for one in asked)]
        self.columns = columns_of(asked, config)
        self._text = str(config.mining.where)
        self._query = f"select ({' and '.join(f'({one.sql})' for one in asked)}) as holds from cells"
        self._database = _connect()
        columns: dict[str, pa.DataType] = {
            side: pa.struct([(name, pa.large_string()) for name in own]) for side, own in self.columns.items() if own
        }
        columns |= {name: NUMBERS[name] for name in self.numbers} | {"cell": pa.int64()}
        import duckdb

        try:
            self._database.register("cells", pa.schema(list(columns.items())).empty_table())
            kinds = self._database.sql(f"select {', '.join(f'({one.sql})' for one in asked)} from cells").types
        except duckdb.Error as error:
            raise _refusal(self._text, f"{_first_line(error)}. {_TEXTS}") from None
        for one, kind in zip(asked, kinds, strict=True):
            if str(kind) != "BOOLEAN":
                raise _refusal(self._text, f"{one.sql} is a {kind}, expected a condition that is true or false")

    def hold(self, count: int, texts: Mapping[str, Sequence[pa.Array]], numbers: Mapping[str, pa.Array]) -> Mask:
        """Whether all conditions are true.

        Args:
            count: number of pairs.
            texts: side → values of its columns, in the order of `columns`, one per pair.
            numbers: those in use, one per pair.

        Raises:
            InputError: a value cannot be converted.
        """
        import duckdb

        cells: dict[str, pa.Array] = {
            side: pa.StructArray.from_arrays(values, names=list(self.columns[side]))
            for side, values in texts.items()
            if values
        }
        self._database.register("cells", pa.table({**cells, **numbers, "cell": pa.array(np.arange(count))}))
        try:
            found = self._database.sql(self._query).to_arrow_table()["holds"]
        except duckdb.Error as error:
            raise InputError(_first_line(error), field="mining.where", remedy=_TEXTS) from None
        return np.asarray(found.combine_chunks().fill_null(False).to_numpy(zero_copy_only=False))


def _connect() -> duckdb.DuckDBPyConnection:
    import duckdb

    return duckdb.connect(config=_LIMITS)


def _parse(database: duckdb.DuckDBPyConnection, text: str) -> Any:
    try:
        tree = json.loads(_value(database, "select json_serialize_sql(?)", f"select {text}"))
    except RecursionError:
        raise _refusal(text, "it is nested too deeply") from None
    if tree["error"]:
        raise _refusal(text, tree["error_message"])
    if len(tree["statements"]) != 1:
        raise _refusal(text, "it is more than one expression")
    return tree["statements"][0]


def _check(whole: Any, text: str, database: duckdb.DuckDBPyConnection) -> None:
    """Refuse everything except plain expressions, and functions whose result may vary."""
    for part in _parts(whole):
        if part["class"] not in _PLAIN:
            raise _refusal(text, f"a {part['class'].lower()} is not allowed")
        if part["class"] == "FUNCTION":
            name = part["function_name"]
            pure = _value(
                database,
                "select coalesce(bool_and(function_type = 'scalar' and stability = 'CONSISTENT'), false)"
                " from duckdb_functions() where function_name = ?",
                name,
            )
            if not pure or name.startswith("current_"):
                raise _refusal(text, f"'{name}' is not allowed: it is unknown, or not a plain function of a row")


def _check_name(name: tuple[str, ...], config: Config) -> None:
    shown, text = ".".join(name), str(config.mining.where)
    if name in [(number,) for number in NUMBERS]:
        return
    if len(name) != 2 or name[0] not in SIDES:
        known = [*NUMBERS, *(f"{side}.{own}" for side in SIDES for own in (*_OWN, *_kept(side, config)))]
        near = closest(shown, known)
        hint = f"did you mean {near}?" if near else f"names are {', '.join(known)}; put texts in single quotes"
        raise _refusal(text, f"'{shown}' does not exist: {hint}")
    if name[1] not in _OWN:
        try:
            config.data.extra.require(SIDES[name[0]], name[1], f"mining.where: '{shown}'")
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _kept(side: str, config: Config) -> tuple[str, ...]:
    kept: tuple[str, ...] = getattr(config.data.extra, SIDES[side])
    return kept


def _stored(name: str, side: str, config: Config) -> str:
    return EXTRA + name if name in _kept(side, config) else name


def _parts(tree: Any) -> Iterator[Any]:
    """All expressions within a serialised one."""
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if "class" in part:
                yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _value(database: duckdb.DuckDBPyConnection, query: str, value: str) -> Any:
    row = database.execute(query, [value]).fetchone()
    assert row is not None
    return row[0]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _refusal(text: str, problem: str) -> ConfigError:
    return ConfigError(f"mining.where ({text}): {problem}")
