"""DuckDB in a folder: it spills there what does not fit into its budget."""

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
        folder: for its file and what spills.
        budget: its memory and threads; they change no result.
        work: what it is opened for, as a subject ("the audit").

    Raises:
        BudgetError: DuckDB needs more memory, whatever it spills.
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
            f"{work} may use {budget.memory // 2**20:,} MiB for its database, and needs more"
            f" ({str(error).splitlines()[0]}): raise resources.memory_budget, for this command alone with"
            " --set resources.memory_budget=1GiB",
            there=budget.memory,
            remedy="--set resources.memory_budget=1GiB",
        ) from None
    finally:
        database.close()
