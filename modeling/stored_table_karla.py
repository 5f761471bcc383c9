"""A table on disk: a list of files of which later ones win, and the first may be the whole table, to be mapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .files_karla import Blocks, DamagedError, StoredFile, advise, open_tensors, whole, write_tensors
from .hashing_karla import NO_NAME
from .manifest_karla import stored_file
from .table_karla import BUCKET, EngramTable


MOST_FILES = 8  # of a table, from where on they are merged
DENSE_BYTES = 64 << 20  # from here on a table is stored whole,
DENSE_LOAD = 0.25  # if so many of its rows have names
BLOCK = 65536  # rows copied at once
_NOTHING = np.empty(0, np.bool_)


def first_to_merge(files: list[StoredFile], fresh: int) -> int:
    """Index from which on files are merged with `fresh` rows: of many, all that are no longer than what follows them.

    Every row is then written again a number of times that grows with the logarithm of the table only.

    Example:
        >>> sizes = [900, 10, 10, 10, 10, 10, 10, 10]
        >>> first_to_merge([StoredFile("", "", 0, rows) for rows in sizes], 10)
        1
    """
    if not files:
        return 0
    first, after = len(files), fresh
    if fresh and len(files) >= MOST_FILES:
        for index in reversed(range(len(files))):
            first = index if files[index].rows <= after else first
            after += files[index].rows
    return first


def write_table(folder: Path, stem: str, table: EngramTable, slots: np.ndarray | None) -> StoredFile:
    """Write some slots of a table, or all that have a name: as the whole table if it is large and well filled."""
    if slots is None:
        large = table.names.nbytes + table.rows.nbytes >= DENSE_BYTES
        if large and table.load >= DENSE_LOAD:
            return _write_dense(folder, stem, table)
        (slots,) = np.nonzero(table.names.reshape(-1))
    names = table.names.reshape(-1)[slots]
    blocks = (table.rows[slots[start : start + BLOCK]] for start in range(0, len(slots), BLOCK))
    tensors = {"slots": whole(slots), "names": whole(names), "rows": Blocks("F16", (len(slots), table.width), blocks)}
    return write_tensors(folder, stem, tensors, rows=len(slots))


def _write_dense(folder: Path, stem: str, table: EngramTable) -> StoredFile:
    flat = table.names.reshape(-1)

    def blocks():
        for start in range(0, len(flat), BLOCK):
            rows = table.rows[start : start + BLOCK].copy()
            rows[flat[start : start + BLOCK] == NO_NAME] = 0  # nothing of what was forgotten
            yield rows

    tensors = {"names": whole(table.names), "rows": Blocks("F16", table.rows.shape, blocks())}
    return write_tensors(folder, stem, tensors, rows=table.num_owned, dense=True)


def load_table(entry: dict, width: int, find: Callable[[str], str | None], damaged: dict[str, str]) -> EngramTable:
    """Read a table.

    Args:
        entry: what the manifest says of it.
        width: coordinates of a row.
        find: maps the name of a file to a local path, or None where there is none.
        damaged: takes the files that cannot be used, and why; the table is without them then.
    """
    files = [stored_file(file) for file in entry["files"]]
    table = None
    for stored in files:
        place = find(stored.file)
        try:
            if place is None:
                raise FileNotFoundError
            tensors, pages = open_tensors(Path(place), stored)
            if stored.dense and table is None:
                table = _mapped_table(tensors, stored, entry["num_rows"], width)
                advise(pages)
            else:
                table = EngramTable(entry["num_rows"], width) if table is None else table
                table.restore(*_some_rows(tensors, width))
        except FileNotFoundError:
            damaged[stored.file] = "it is missing"
        except (ValueError, KeyError, OSError) as error:
            damaged[stored.file] = str(error)
    table = EngramTable(entry["num_rows"], width) if table is None else table
    table.files = files
    return table


def _some_rows(tensors: dict[str, np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slots [N], names [N] and rows [N, width] of a file; DamagedError if they are not that."""
    slots, names, rows = (tensors.get(name, _NOTHING) for name in ("slots", "names", "rows"))
    kinds = slots.dtype == names.dtype == np.int64 and rows.dtype == np.float16
    if not kinds or slots.ndim != 1 or names.shape != slots.shape or rows.shape != (len(slots), width):
        raise DamagedError("it does not hold a slot and a name for each of its rows")
    return slots, names, rows


def _mapped_table(tensors: dict[str, np.ndarray], stored: StoredFile, num_rows: int, width: int) -> EngramTable:
    names, rows = (tensors.get(name, _NOTHING) for name in ("names", "rows"))
    if names.size != num_rows or rows.shape != (num_rows, width):
        raise DamagedError(f"it holds {names.size} rows instead of {num_rows}")
    if names.dtype != np.int64 or rows.dtype != np.float16 or names.shape != (num_rows // BUCKET, BUCKET):
        raise DamagedError("it does not hold the names of a table and its rows")  # which C reads without looking
    return EngramTable.from_arrays(names, rows, stored.rows)
