"""A memory whose rows are spread over processes: a name belongs to process `name mod world`.

Each process holds the rows of its own names. A read sends the distinct names to their owners and gets back their rows,
summed over packs and levels (all-to-all). A write needs no exchange: every process works out the same corrections of a
chunk and keeps those of its own rows. Names, values and clock are therefore those of one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import distributed

from .engram_karla import Engram
from .hashing_karla import NO_NAME
from .levels_karla import GROWTH, EngramLayout, Level, Pack, PackCount
from .ranks_karla import Ranks
from .table_karla import EngramTable


BLOCK = 1 << 16  # rows of one message


class ShardedPack(Pack):
    """The part of a pack that this process owns.

    Args:
        layout: sizes of the whole memory.
        num_families: F.
        ranks: the processes.
    """

    def __init__(self, layout: EngramLayout, num_families: int, ranks: Ranks):
        limit = None if layout.max_rows is None else -(-layout.max_rows // ranks.size)
        super().__init__(layout._replace(num_rows=-(-layout.num_rows // ranks.size), max_rows=limit), num_families)
        self.ranks = ranks

    def claim(self, names: np.ndarray) -> np.ndarray:
        """As in one process; a collective where the fastest level has a limit, of which all learn whose names are lost."""
        mine = owners(names, self.ranks.size) == self.ranks.rank
        kept = names != NO_NAME
        kept[mine] = super().claim(names[mine])
        if self.levels[0].max_rows is not None:
            lost = torch.from_numpy(names[mine & ~kept])
            counts = self.ranks.gather_numbers([len(lost)])[:, 0].long().tolist()
            kept &= ~np.isin(names, self.ranks.gather(lost, counts).numpy())
        return kept

    def add(self, names: np.ndarray, change: torch.Tensor) -> None:
        """Add change [N, width] float32 to those of the rows that belong to this process."""
        mine = owners(names, self.ranks.size) == self.ranks.rank
        super().add(names[mine], change[torch.from_numpy(mine)])

    def count(self) -> PackCount:
        """The counts of all processes together; a collective."""
        totals = self.ranks.gather_numbers(list(super().count())).sum(0)
        return PackCount(*(int(total) for total in totals))


class ShardedEngram(Engram):
    """A memory of which this process holds a share; `read` is a collective. Arguments as for `Engram`, and `ranks`."""

    def __init__(self, constants, families, layout: EngramLayout, ranks: Ranks):
        super().__init__(constants, families, layout)
        self.ranks = ranks

    def new_pack(self) -> ShardedPack:
        """An empty share of a pack."""
        return ShardedPack(self.layout, len(self.families), self.ranks)

    def take_pack(self, name: str, pack: Pack) -> None:
        """Take this process's share of a pack that every process holds whole; `pack` is not modified."""
        share = self.packs[name] = self.new_pack()
        _copy_history(pack, share)
        for ours, level in zip(share.levels, pack.levels, strict=True):
            ours.lost = level.lost if self.ranks.rank == 0 else 0
            for names, rows in _blocks(level, self.ranks):
                _fill(ours, names, rows)

    def read(self, names: torch.Tensor) -> torch.Tensor:
        """As for `Engram`; a collective, which processes may call with different numbers of positions."""
        if not self.active:
            return super().read(names)
        rows = self._ask_owners(names.reshape(-1).numpy(), self._sum_of_packs)
        states = self.scatter(rows.view(-1, len(self.families), self.layout.width))
        return states.view(*names.shape[:-1], self.hidden_size)

    def look_up(self, names: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As for `Engram`; a collective."""
        local = super().look_up

        def answer(asked: np.ndarray) -> torch.Tensor:
            rows, held = local(asked)
            return torch.cat([rows, held[..., None].float()], dim=-1).movedim(0, 1).flatten(1)

        shape = len(names), len(self.packs), self.layout.width + 1
        answers = self._ask_owners(names, answer).view(shape).movedim(1, 0)
        return answers[..., :-1], answers[..., -1] > 0

    def _sum_of_packs(self, names: np.ndarray) -> torch.Tensor:
        """[N, width] float32: the sum of the rows of every name [N] int64 over packs and levels, of those held here."""
        found = torch.zeros(len(names), self.layout.width)
        for pack in self.packs.values():
            found += pack.read(names)
        return found

    def _ask_owners(self, names: np.ndarray, answer: Callable[[np.ndarray], torch.Tensor]) -> torch.Tensor:
        """[N, ...] float32: what the owner of every name [N] int64 answers to it."""
        distinct, inverse = np.unique(names, return_inverse=True)
        owner = owners(distinct, self.ranks.size)
        order = np.argsort(owner, kind="stable")
        sizes = np.bincount(owner, minlength=self.ranks.size).tolist()
        asked, askers = self.ranks.swap(torch.from_numpy(distinct[order]), sizes)
        answers, _ = self.ranks.swap(answer(asked.numpy()), askers)
        values = torch.empty_like(answers)
        values[torch.from_numpy(order)] = answers
        return values[torch.from_numpy(inverse)]


def owners(names: np.ndarray, size: int) -> np.ndarray:
    """The process that each name belongs to.

    Args:
        names: [N] int64.
        size: number of processes.

    Returns:
        [N] int64 in [0, size): the name as an unsigned number, modulo `size`.

    Example:
        >>> owners(np.array([7, -1]), 4).tolist()
        [3, 3]
    """
    return (names.view(np.uint64) % np.uint64(size)).astype(np.int64)


def shard(engram: Engram, ranks: Ranks) -> ShardedEngram:
    """This process's share of a memory that every process holds whole, such as one loaded from a checkpoint.

    Args:
        engram: the memory, not sharded. Not modified.
        ranks: the processes.
    """
    sharded = ShardedEngram(engram.constants, engram.families, engram.layout, ranks)
    sharded.enabled, sharded.made_with, sharded.lexicon = engram.enabled, engram.made_with, engram.lexicon
    for name, pack in engram.packs.items():
        sharded.take_pack(name, pack)
    return sharded


def collect(engram: Engram) -> Engram | None:
    """The whole memory as an ordinary one on process 0, and None on the others; of a sharded memory a collective.

    Args:
        engram: the memory; one that every process holds whole is returned as it is. Not modified.
    """
    ranks = engram.ranks
    if not isinstance(engram, ShardedEngram):
        return engram if ranks.rank == 0 else None
    whole = Engram(engram.constants, engram.families, engram.layout)
    whole.enabled, whole.made_with, whole.lexicon = engram.enabled, engram.made_with, engram.lexicon
    for name, pack in engram.packs.items():
        target = whole.open_pack(name)
        _copy_history(pack, target)
        for level, part in zip(target.levels, pack.levels, strict=True):
            level.lost = int(ranks.gather_numbers([part.lost]).sum())
            _collect_level(level, part, ranks)
    return whole if ranks.rank == 0 else None


def _collect_level(level: Level, part: Level, ranks: Ranks) -> None:
    """Put the rows of every process's `part` into `level` of process 0, block by block."""
    if ranks.rank:
        first = distributed.get_global_rank(ranks.group, 0)
        for names, rows in _blocks(part, ranks):
            for message in (torch.tensor([len(names)]), torch.from_numpy(names), torch.from_numpy(rows)):
                distributed.send(message, first, ranks.group)
        distributed.send(torch.tensor([0]), first, ranks.group)
        return
    for names, rows in _blocks(part, ranks):
        _fill(level, names, rows)
    for rank in range(1, ranks.size):
        source, length = distributed.get_global_rank(ranks.group, rank), torch.tensor([0])
        while count := int(_receive(length, source, ranks)):
            block = (
                torch.empty(count, dtype=torch.int64),
                torch.empty(count, level.tables[0].width, dtype=torch.float16),
            )
            _fill(level, *(_receive(message, source, ranks).numpy() for message in block))


def _receive(message: torch.Tensor, source: int, ranks: Ranks) -> torch.Tensor:
    distributed.recv(message, source, ranks.group)
    return message


def _blocks(level: Level, ranks: Ranks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Names [N] and rows [N, width] of a level that belong to this process, some at a time; copies."""
    for table in level.tables:
        flat = table.names.reshape(-1)
        (slots,) = np.nonzero((flat != NO_NAME) & (owners(flat, ranks.size) == ranks.rank))
        for at in range(0, len(slots), BLOCK):
            block = slots[at : at + BLOCK]
            yield flat[block], table.rows[block]


def _copy_history(source: Pack, target: Pack) -> None:
    """Give `target` everything of `source` but its rows."""
    target.clock.step = source.clock.step
    facts = {name: fact for name, fact in vars(source).items() if name not in ("levels", "clock", "ranks")}
    vars(target).update(copy.deepcopy(facts))


def _fill(level: Level, names: np.ndarray, rows: np.ndarray) -> None:
    """Store rows [N, width] float16 of distinct names [N] that the level does not hold, also beyond its limit."""
    here = np.zeros(len(names), np.bool_)
    for table in level.tables:
        here[~here] = table.put(names[~here], rows[~here])
    while not here.all():
        crowd = len(level.tables[-1]) if level.max_rows is None else len(names) - int(here.sum())
        level.tables.append(EngramTable(GROWTH * crowd, rows.shape[1]))
        here[~here] = level.tables[-1].put(names[~here], rows[~here])
