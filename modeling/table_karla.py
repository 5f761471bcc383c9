"""A table of rows found by their exact 64-bit names, in one or two looks whatever its size.

Every name may live in two buckets of eight slots, one picked by each half of its bits, and takes the emptier one
(two-choice hashing: Azar, Broder, Karlin and Upfal, "Balanced Allocations", 1994). A bucket's names fill one cache line,
and a name is compared whole: what was never written is never found. Rows are plain memory outside `nn.Module`, or a
private map of a file, of which the operating system loads the pages that are touched.
"""

from __future__ import annotations

import math
import mmap

import numpy as np
import torch

from .hashing_karla import NO_NAME
from .native_karla import c_function, c_integers


BUCKET = 8  # names of 8 bytes: a cache line


class EngramTable:
    """Rows by name.

    Args:
        num_rows: least number of rows; a multiple of eight is taken.
        width: coordinates of a row.

    Attributes:
        names: [N / 8, 8] int64, `NO_NAME` where a slot is empty; full slots come first in a bucket.
        rows: [N, width] float16; what an empty slot holds has no meaning.
        num_owned: slots that have a name.
        dirty: [N] bool, slots written since the table was last saved.
        files: the files that hold all the other slots, see `packs_karla`.

    Example:
        >>> table = EngramTable(16, width=2)
        >>> table.claim(np.array([7, 9])), table.add(np.array([9]), torch.ones(1, 2))
        (array([ True,  True]), None)
        >>> table.read(np.array([7, 8, 9])).tolist()
        [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, num_rows: int, width: int):
        buckets = max(1, -(-num_rows // BUCKET))
        self._take(_zeros((buckets, BUCKET), np.int64), _zeros((buckets * BUCKET, width), np.float16), num_owned=0)

    @classmethod
    def from_arrays(cls, names: np.ndarray, rows: np.ndarray, num_owned: int) -> EngramTable:
        """A table on top of arrays, which are written in place: private maps of files, for example."""
        table = cls.__new__(cls)
        table._take(names, rows, num_owned)
        return table

    def _take(self, names: np.ndarray, rows: np.ndarray, num_owned: int) -> None:
        self.files: list = []
        self.names, self.rows, self.num_owned = names, rows, num_owned
        self.dirty = _zeros((names.size,), np.bool_)
        self._addresses = names.ctypes.data, rows.ctypes.data

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_addresses"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._addresses = self.names.ctypes.data, self.rows.ctypes.data  # of a copy, not of what was copied

    def __len__(self) -> int:
        return self.names.size

    @property
    def width(self) -> int:
        """Coordinates of a row."""
        return self.rows.shape[1]

    @property
    def load(self) -> float:
        """Rows that have a name over all rows, 0 to 1."""
        return self.num_owned / len(self)

    def find(self, names: np.ndarray) -> np.ndarray:
        """Slot of every name.

        Args:
            names: [N] int64.

        Returns:
            [N] int64 in [0, `len(self)`), or -1 where the name is not here.
        """
        buckets = self._buckets(names)
        same = (self.names[buckets] == names[:, None, None]).reshape(-1, 2 * BUCKET)
        at = same.argmax(1)
        index = np.arange(len(names))
        slots = buckets[index, at >> 3] * BUCKET + (at & 7)
        return np.where(same[index, at] & (names != NO_NAME), slots, -1)

    def read(self, names: np.ndarray) -> torch.Tensor:
        """[N, width] float32: the row of every name, zero where it is not here."""
        values = torch.zeros(len(names), self.width)
        if self.num_owned:
            slots = self.find(names)
            (hits,) = np.nonzero(slots >= 0)
            if len(hits):
                values[torch.from_numpy(hits)] = torch.from_numpy(self.rows[slots[hits]]).float()
        return values

    def add_rows_to(self, state: torch.Tensor, names: torch.Tensor, starts: list[int]) -> None:
        """Add the row of every name to a state, at the coordinates of its family.

        Args:
            state: [..., D] float32, contiguous; modified in place.
            names: [..., F] int64, contiguous.
            starts: first coordinate of each of the F families; a row's coordinates wrap around at D.
        """
        if not self.num_owned:
            return
        kernel, families, hidden = c_function("karla_add_rows", "piipipipip"), len(starts), state.shape[-1]
        if kernel is None:
            rows = self.read(names.numpy().reshape(-1)).view(-1, families, self.width)
            spread(state.view(-1, hidden), rows, starts)
            return
        at_names, at_rows = self._addresses
        kernel(names.data_ptr(), names.numel() // families, families, at_names, len(self.names), at_rows, self.width,
               c_integers(*starts), hidden, state.data_ptr())  # fmt: skip

    def claim(self, names: np.ndarray) -> np.ndarray:
        """Give every name a row, zero at first, unless it has one; where both buckets are full, the first names win.

        Args:
            names: [N] int64.

        Returns:
            [N] bool: which names have a row now; never for `NO_NAME`.
        """
        found = self.find(names)
        missing = (found < 0) & (names != NO_NAME)
        if missing.any():
            fresh, first, inverse = np.unique(names[missing], return_index=True, return_inverse=True)
            order = np.argsort(first, kind="stable")  # of appearance
            placed = np.empty(len(fresh), np.int64)
            placed[order] = self._place(fresh[order])
            found[missing] = placed[inverse]
        return found >= 0

    def _place(self, names: np.ndarray) -> np.ndarray:
        """Put distinct names that are not here into empty slots, in rounds; returns their slots, or -1."""
        slots = np.full(len(names), -1, np.int64)
        buckets = self._buckets(names)
        waiting = np.arange(len(names))
        while len(waiting):
            choice = buckets[waiting]
            taken = np.count_nonzero(self.names[choice], axis=-1)
            better = np.arange(len(waiting)), taken.argmin(1)
            bucket, used = choice[better], taken[better]
            # the first of those that want the same bucket gets it; the others look again
            _, first = np.unique(bucket, return_index=True)
            first = first[used[first] < BUCKET]
            winners = waiting[first]
            slots[winners] = bucket[first] * BUCKET + used[first]
            self.names.reshape(-1)[slots[winners]] = names[winners]
            still = used < BUCKET
            still[first] = False
            waiting = waiting[still]
        new = slots[slots >= 0]
        self.rows[new] = 0
        self.dirty[new] = True
        self.num_owned += len(new)
        return slots

    def add(self, names: np.ndarray, change: torch.Tensor) -> None:
        """Add to rows.

        Args:
            names: [N] int64, distinct, all of them here.
            change: [N, width] float32. Not modified.
        """
        slots = self.find(names)
        rows = torch.from_numpy(self.rows[slots]).float() + change
        self.rows[slots] = rows.to(torch.float16).numpy()
        self.dirty[slots] = True

    def items(self, only_dirty: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Names [M] int64, ascending, and their rows [M, width] float16; copies."""
        flat = self.names.reshape(-1)
        (slots,) = np.nonzero(self.dirty if only_dirty else flat)
        slots = slots[np.argsort(flat[slots], kind="stable")]
        return flat[slots], self.rows[slots]

    def put(self, names: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Replace rows, claiming them where necessary.

        Args:
            names: [N] int64, distinct.
            rows: [N, width] float16. Not modified.

        Returns:
            [N] bool: which were stored; False where the table is full.
        """
        kept = self.claim(names)
        slots = self.find(names[kept])
        self.rows[slots] = rows[kept]
        self.dirty[slots] = True
        return kept

    def restore(self, slots: np.ndarray, names: np.ndarray, rows: np.ndarray) -> None:
        """Put names [N] int64 and rows [N, width] float16 where they were: at distinct slots [N] int64.

        Raises:
            ValueError: if a name does not belong where it should go.
        """
        inside = len(slots) == 0 or (slots.min() >= 0 and slots.max() < len(self))
        if not inside or not ((self._buckets(names) == (slots >> 3)[:, None]).any(1) & (names != NO_NAME)).all():
            raise ValueError(f"Names were given slots that are not theirs in a table of {len(self)} rows.")
        flat = self.names.reshape(-1)
        self.num_owned += int(np.count_nonzero(flat[slots] == NO_NAME))
        flat[slots], self.rows[slots] = names, rows

    def clear(self) -> None:
        """Forget everything."""
        self.files = []
        self.names[:] = NO_NAME
        self.dirty[:] = False
        self.num_owned = 0

    def _buckets(self, names: np.ndarray) -> np.ndarray:
        """[N, 2] both buckets of every name: each half of its bits, scaled to the number of buckets."""
        halves = np.ascontiguousarray(names).view(np.uint32).reshape(-1, 2).astype(np.uint64)
        return ((halves * np.uint64(len(self.names))) >> np.uint64(32)).astype(np.int64)


def spread(state: torch.Tensor, rows: torch.Tensor, starts: list[int]) -> None:
    """Add rows [P, F, width] to a state [P, D], in place, each family's from its first coordinate on, around the end."""
    width, hidden = rows.shape[-1], state.shape[1]
    for family, start in enumerate(starts):
        run = min(width, hidden - start)
        state[:, start : start + run] += rows[:, family, :run]
        state[:, : width - run] += rows[:, family, run:]


def _zeros(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Zeros at the start of a page, which the operating system provides as they are touched."""
    size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, count=math.prod(shape)).reshape(shape)
