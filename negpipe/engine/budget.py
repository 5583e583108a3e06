"""What one task may use, and the one refusal of what does not fit.

Code that holds arrays says how many bytes a row takes and how many are taken whatever the rows; a `Budget` says how
many rows fit, or refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from negpipe.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Stated by a stage for its tasks, given by the executor. Changes no result.

    Attributes:
        memory: bytes of working memory beyond the libraries.
        threads: that compute.
        device: on which the task may compute, by its name in `engine.devices`; a process is shown no other GPU.
    """

    memory: int
    threads: int = 1
    device: str = "cpu"

    def without(self, held: int) -> Budget:
        """What is left beside so many bytes."""
        return replace(self, memory=self.memory - held)

    def share(self, part: float) -> Budget:
        """A part of the memory, all of the threads."""
        return replace(self, memory=int(self.memory * part))

    def rows(self, each: int, fixed: int = 0, *, whole: int = 1) -> int:
        """How many rows of `each` bytes fit beside `fixed` bytes, a multiple of `whole`; 0 where none does."""
        return max(0, (self.memory - fixed) // each // whole * whole)

    def require(self, needed: int, what: str, remedy: str) -> None:
        """Refuse what does not fit.

        Args:
            needed: bytes.
            what: what takes them, as a subject ("searching 10 anchors to depth 100").
            remedy: what helps beside more memory, with the names of settings ("lower search.depth").

        Raises:
            BudgetError: they are more than there are.
        """
        if needed > self.memory:
            raise BudgetError(
                f"{what} needs {-(-needed // 2**20):,} MiB per worker, {max(0, self.memory) // 2**20:,} are available:"
                f" raise resources.memory_budget, or {remedy}",
                needed=needed,
                there=self.memory,
                remedy=remedy,
            )


DEFAULT = Budget(2**30)
"""Of functions that are called without a config."""
