"""Levels and packs of the memory: what is written goes to the fastest level, and slower ones take over when they are due.

When a slower level is due, it takes over all that the level before it holds, and that one starts again from nothing: the
sum, which is what reads see, stays as it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from .hashing_karla import NO_NAME
from .nested_karla import Clock, LevelSpec
from .table_karla import EngramTable


logger = logging.get_logger(__name__)
GROWTH = 2


class EngramLayout(NamedTuple):
    """Sizes that all packs of a memory share.

    Attributes:
        hidden_size: D.
        width: coordinates of a row, at most D.
        chunk_size: positions written together: one step of a pack's clock.
        update_periods: of every level in chunks; the first is 1, each is a multiple of the one before.
        num_rows: rows of the slowest level's first table.
        max_rows: most rows of the slowest level; None lets it grow.
    """

    hidden_size: int
    width: int
    chunk_size: int
    update_periods: tuple[int, ...]
    num_rows: int
    max_rows: int | None = None


class Level:
    """Tables of one update period. New names go into the last one; what finds no place opens a further one.

    Args:
        num_rows: rows of the first table.
        width: coordinates of a row.
        max_rows: most rows of all tables; None for no limit.

    Attributes:
        tables: the tables; a name lives in one of them at the most.
        lost: names that found no place because `max_rows` allows no further table.
    """

    def __init__(self, num_rows: int, width: int, max_rows: int | None = None):
        self.max_rows, self.lost = max_rows, 0
        self.tables = [EngramTable(num_rows if max_rows is None else min(num_rows, max_rows), width)]

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(len(table) for table in self.tables)

    @property
    def num_owned(self) -> int:
        """Rows that have a name."""
        return sum(table.num_owned for table in self.tables)

    def claim(self, names: np.ndarray) -> np.ndarray:
        """Give every name a row unless it has one.

        Args:
            names: [N] int64.

        Returns:
            [N] bool; False for `NO_NAME`, and where `max_rows` leaves no place.
        """
        kept = self.has(names)
        kept[~kept] = self.tables[-1].claim(names[~kept])
        homeless = ~kept & (names != NO_NAME)
        while homeless.any() and self._open_table():
            kept[homeless] = self.tables[-1].claim(names[homeless])
            homeless = ~kept & (names != NO_NAME)
        if homeless.any():
            if not self.lost:
                logger.warning(
                    f"The memory is full: {self.num_owned} of {self.num_rows} rows have names, and engram_max_rows allows "
                    "no more; what is new will be stored in part or not at all. Forget a pack or raise the limit."
                )
            self.lost += len(np.unique(names[homeless]))
        return kept

    def has(self, names: np.ndarray) -> np.ndarray:
        """[N] bool: which of the names [N] int64 have a row."""
        found = np.zeros(len(names), np.bool_)
        for table in self.tables:
            found |= table.find(names) >= 0
        return found

    def _open_table(self) -> bool:
        rows = GROWTH * len(self.tables[-1])
        if self.max_rows is not None:
            rows = min(rows, self.max_rows - self.num_rows)
        if rows < 1:
            return False
        logger.info(f"A memory table of {len(self.tables[-1])} rows is full; opening one of {rows} beside it.")
        self.tables.append(EngramTable(rows, self.tables[0].width))
        return True

    def add(self, names: np.ndarray, change: torch.Tensor) -> None:
        """Add change [N, width] float32 to the rows of distinct names [N] int64, all of them here."""
        if len(self.tables) == 1:
            self.tables[0].add(names, change)
            return
        for table in self.tables:
            here = table.find(names) >= 0
            table.add(names[here], change[torch.from_numpy(here)])

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """All names [M] int64, ascending, and their rows [M, width] float16; copies."""
        parts = [table.items() for table in self.tables]
        names, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.argsort(names, kind="stable")
        return names[order], rows[order]

    def clear(self) -> None:
        """Forget everything; one table stays."""
        del self.tables[1:]
        self.tables[0].clear()


class PackCount(NamedTuple):
    """Rows of a pack.

    Attributes:
        owned: rows that have a name, over all levels.
        lost: names that found no row.
        rows: rows of the slowest level.
    """

    owned: int
    lost: int
    rows: int


class Pack:
    """One body of reading.

    Args:
        layout: the sizes.
        num_families: F.

    Attributes:
        levels: the fastest first.
        clock: counts chunks.
        stored: what the manifest says of it if it was loaded; "made_with" is the backbone that it was made with.
        sources: titles of what was read, in the order of reading.
        tokens: tokens read.
    """

    def __init__(self, layout: EngramLayout, num_families: int):
        specs = [LevelSpec(f"level {k}", period) for k, period in enumerate(layout.update_periods)]
        self.clock = Clock(specs)
        # a fast level holds what comes between two hand-overs, half filled; the slowest grows
        sizes = [2 * period * layout.chunk_size * num_families for period in layout.update_periods[1:]]
        self.levels = [Level(size, layout.width) for size in sizes]
        self.levels.append(Level(layout.num_rows, layout.width, layout.max_rows))
        self.stored: dict = {}
        self.sources: list[str] = []
        self.tokens = 0

    @property
    def tables(self) -> list[EngramTable]:
        """The tables of all levels."""
        return [table for level in self.levels for table in level.tables]

    @property
    def num_owned(self) -> int:
        """Names that have a row; one that several levels know counts once."""
        total = self.levels[-1].num_owned
        for k, level in enumerate(self.levels[:-1]):
            names, _ = level.items()
            for slower in self.levels[k + 1 :]:
                names = names[~slower.has(names)]
            total += len(names)
        return total

    @property
    def num_lost(self) -> int:
        """Names that found no row."""
        return sum(level.lost for level in self.levels)

    @property
    def load(self) -> float:
        """Names that have a row over the rows of the slowest level."""
        return self.num_owned / self.levels[-1].num_rows

    def count(self) -> PackCount:
        """Rows of the whole pack, also where its rows are spread over processes."""
        return PackCount(self.num_owned, self.num_lost, self.levels[-1].num_rows)

    def read(self, names: np.ndarray) -> torch.Tensor:
        """[N, width] float32: the sum of all tables' rows of every name [N] int64, zero where there is none."""
        values = torch.zeros(len(names), self.tables[0].width)
        for table in self.tables:
            if table.num_owned:
                values += table.read(names)
        return values

    def holds(self, names: np.ndarray) -> np.ndarray:
        """[N] bool: which of names [N] int64 have a row in some table."""
        return np.logical_or.reduce([table.find(names) >= 0 for table in self.tables])

    def claim(self, names: np.ndarray) -> np.ndarray:
        """Give names [N] int64 rows in the fastest level; returns [N] bool, which have one."""
        return self.levels[0].claim(names)

    def add(self, names: np.ndarray, change: torch.Tensor) -> None:
        """Add change [N, width] float32 to rows of the fastest level; names [N] int64 are distinct and claimed."""
        self.levels[0].add(names, change)

    def tick(self) -> None:
        """Count one chunk; every slower level that is due takes over what the level before it holds."""
        due = {spec.name for spec in self.clock.tick()}
        for spec, fast, slow in zip(self.clock.levels[1:], self.levels, self.levels[1:], strict=False):
            if spec.name in due:
                names, rows = fast.items()
                kept = slow.claim(names)
                slow.add(names[kept], torch.from_numpy(rows[kept]).float())
                fast.clear()
