"""What one task may use, and the single error for what does not fit.

Code that holds arrays states the bytes per row and the bytes that do not depend on the rows; a `Budget` computes how
many rows fit, or raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from negpipe.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Requested by a stage for its tasks, granted by the executor. Does not affect results.

    Attributes:
        memory: bytes of working memory beyond the libraries.
        threads: compute threads.
        device: the device the task may use, as named by `engine.devices`; its process sees no other GPU.
    """

    memory: int
    threads: int = 1
    device: str = "cpu"

    def without(self, held: int) -> Budget:
        """The budget left after `held` bytes."""
        return replace(self, memory=self.memory - held)

    def share(self, part: float) -> Budget:
        """A fraction of the memory, with all threads."""
        return replace(self, memory=int(self.memory * part))

    def rows(self, each: int, fixed: int = 0, *, whole: int = 1) -> int:
        """How many rows of `each` bytes fit in addition to `fixed` bytes, as a multiple of `whole`; 0 if none fits."""
        return max(0, (self.memory - fixed) // each // whole * whole)

    def require(self, needed: int, what: str, remedy: str) -> None:
        """Raise an error if `needed` bytes do not fit.

        Args:
            needed: bytes.
            what: what needs them, as the subject of a sentence ("searching 10 anchors to depth 100").
            remedy: what helps other than more memory, with setting names ("lower search.depth").

        Raises:
            BudgetError: more bytes are needed than available.
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
"""Default for functions called without a config."""
