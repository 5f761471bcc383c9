"""Levels that learn at different speeds, and the clock that says which of them may change.

Nested learning in one small object: every level has an update period, counted in steps of one clock; a level's bytes
change only at steps that its period divides.
"""

from __future__ import annotations

from typing import NamedTuple


NEVER = 0


class LevelSpec(NamedTuple):
    """One level.

    Attributes:
        name: what it is called.
        update_period: steps of the clock between two changes, >= 1, or `NEVER`.
    """

    name: str
    update_period: int

    def is_due(self, step: int) -> bool:
        """Whether the level may change at `step` >= 1.

        Example:
            >>> [LevelSpec("slow", 8).is_due(step) for step in (1, 8, 12, 16)]
            [False, True, False, True]
        """
        return self.update_period != NEVER and step % self.update_period == 0


class Clock:
    """Counts steps and tells which levels are due.

    Args:
        levels: from the fastest to the slowest.
        step: steps that have been taken already.

    Example:
        >>> clock = Clock([LevelSpec("fast", 1), LevelSpec("slow", 2)])
        >>> [level.name for level in clock.tick()], [level.name for level in clock.tick()]
        (['fast'], ['fast', 'slow'])
    """

    def __init__(self, levels: list[LevelSpec], step: int = 0):
        self.levels = list(levels)
        self.step = step

    def tick(self) -> list[LevelSpec]:
        """Take one step; returns the levels that are due at it, the fastest first."""
        self.step += 1
        return [level for level in self.levels if level.is_due(self.step)]
