"""DuckDB in a folder, where it spills data beyond its memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from negpipe.engine.budget import Budget
from negpipe.errors import BudgetError

if TYPE_CHECKING:
    import duckdb


@contextmanager
def opened(folder: Path, budget: Budget, work: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database, closed at the end.

    Args:
        folder: for its file and spilled data.
        budget: its memory and threads, which change no result.
        work: its purpose as a subject ("the audit"), for the error.

    Raises:
        BudgetError: DuckDB needs more memory even when spilling.
    """
    import duckdb

    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{budget.memory // 2**20}MiB",
        "threads": budget.threads,
        "temp_directory": str(folder / "spill"),
    }
    database = duckdb.connect(str(folder / "work.duckdb"), config=config)
    try:
        yield database
    except duckdb.OutOfMemoryException as error:
        raise BudgetError(
            f"{work} needs more than the {budget.memory // 2**20:,} MiB available for its database"
            f" ({str(error).splitlines()[0]}): raise resources.memory_budget, for this command only with"
            " --set resources.memory_budget=1GiB",
            there=budget.memory,
            remedy="--set resources.memory_budget=1GiB",
        ) from None
    finally:
        database.close()


def number_of(database: duckdb.DuckDBPyConnection, query: str) -> int:
    """The number that is the only result of a query."""
    row = database.execute(query).fetchone()
    assert row is not None
    return int(row[0])
