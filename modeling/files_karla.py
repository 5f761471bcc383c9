"""Files of the memory: safetensors that are written once, named by their content, and mapped when they are read.

Whatever is written goes to a temporary file in its folder, to the disk, and then to its name in one step, so that a
process that dies leaves what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


TEMPORARY = ".saving-"
ALIGNMENT = 64  # bytes; a bucket of names is a cache line
CHECKED_BYTES = 256 << 20  # up to here a file's content is checked whenever it is opened
LINKED_BYTES = 64 << 20  # from here on a file gets a second name instead of a copy
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8"),
           "U8": np.dtype("u1")}  # fmt: skip
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{16}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class DamagedError(ValueError):
    """What is wrong with a file, in words that follow its name in a sentence."""


class StoredFile(NamedTuple):
    """A file as a manifest names it.

    Attributes:
        file: its name, without a folder.
        sha256: of its content, 64 hexadecimal digits.
        size: its bytes.
        rows: rows of a table that it holds; 0 for other files.
        dense: whether it is a whole table, to be mapped, instead of some of its rows.
    """

    file: str
    sha256: str
    size: int
    rows: int = 0
    dense: bool = False

    def check(self) -> StoredFile:
        """Return itself; raise DamagedError unless every value is possible and the name stays within its folder."""
        if not isinstance(self.file, str) or not _FILE_NAME.fullmatch(self.file):
            raise DamagedError(f"{self.file!r} is no name of a file in its folder")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise DamagedError(f"{self.file} has no SHA-256")
        if not all(type(number) is int and number >= 0 for number in (self.size, self.rows)):
            raise DamagedError(f"{self.file} has no size")
        return self


class Blocks(NamedTuple):
    """A tensor that is written block by block, so that it need not be in RAM.

    Attributes:
        dtype: its name in safetensors.
        shape: its shape.
        blocks: arrays that together are the tensor, along its first axis.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]


def whole(array: np.ndarray) -> Blocks:
    """An array as one block.

    Example:
        >>> whole(np.zeros(3)).dtype
        'F64'
    """
    (name,) = (name for name, dtype in _DTYPES.items() if dtype == array.dtype)
    return Blocks(name, array.shape, [array])


def write_tensors(
    folder: Path, stem: str, tensors: Mapping[str, Blocks], *, rows: int = 0, dense: bool = False
) -> StoredFile:
    """Write a safetensors file `<stem>-<hash>.safetensors` whose data begin at a multiple of 64 bytes.

    Args:
        folder: where to.
        stem: first part of its name.
        tensors: by name; multiples of 64 bytes in size, but for the last, keep all of them aligned.
        rows: rows of a table among them.
        dense: whether they are a whole table.

    Raises:
        OSError: if it cannot be written; nothing is left of it then.
    """
    head = tensors_head(tensors)
    sha256 = hashlib.sha256()
    with _temporary(folder) as (descriptor, path):
        with open(descriptor, "wb", closefd=False) as file:
            blocks: Iterator[Any] = (
                np.ascontiguousarray(block) for tensor in tensors.values() for block in tensor.blocks
            )
            for part in itertools.chain([head], blocks):
                sha256.update(part)
                file.write(part)
            size = file.tell()
        os.fsync(descriptor)
        digest = sha256.hexdigest()
        name = f"{stem}-{digest[:16]}.safetensors"
        os.replace(path, folder / name)
    return StoredFile(name, digest, size, rows, dense)


def tensors_head(tensors: Mapping[str, Blocks]) -> bytes:
    """What a safetensors file begins with: the length of its header, and the header, filled up with spaces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def open_tensors(
    path: Path, stored: StoredFile, *, check: bool | None = None
) -> tuple[dict[str, np.ndarray], mmap.mmap]:
    """Map a safetensors file privately: what is written to its arrays stays in this process.

    Args:
        path: the file.
        stored: what it should be.
        check: whether to read all of it and compare its hash; None does so up to 256 MB.

    Returns:
        Its arrays by name, and the map below them.

    Raises:
        DamagedError: if it is not what it should be.
        OSError: if it cannot be read.
    """
    _check_place(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != stored.size or size < 8:
            raise DamagedError(f"it has {size} bytes instead of {stored.size}")
        pages = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    checked = size <= CHECKED_BYTES if check is None else check
    if checked and hashlib.sha256(pages).hexdigest() != stored.sha256:
        raise DamagedError("its content is not what was written")
    try:
        data = 8 + int.from_bytes(pages[:8], "little")
        header = json.loads(pages[8:data]) if data <= size else {}
        arrays = {
            name: np.frombuffer(pages, _DTYPES[entry["dtype"]], math.prod(entry["shape"]), data + entry["data_offsets"][0])
            .reshape(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise DamagedError(f"it is no safetensors file of a memory: {error}") from error
    return arrays, pages


def _check_place(path: Path) -> None:
    """Refuse a link out of the folder; the Hub's cache links from a snapshot to its blobs."""
    if path.is_symlink():
        target = path.resolve()
        if target.parent.name != "blobs" or target.parent.parent not in path.absolute().parents:
            raise DamagedError("it is a link to another place")


def advise(pages: mmap.mmap) -> None:
    """Tell the system how a table will be used: all of it if it takes up to half of the free RAM, else row by row."""
    fits = len(pages) <= available_bytes() // 2
    pages.madvise(mmap.MADV_WILLNEED if fits else mmap.MADV_RANDOM)


def machine_bytes() -> int:
    """RAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """RAM that can be had without swapping."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10  # type: ignore[index]
    except (OSError, TypeError):
        return machine_bytes() // 2


def bring_file(source: Path, folder: Path) -> None:
    """Give a folder a file of another one under the same name: a copy, or a second name if it is large."""
    with _temporary(folder) as (_, path):
        linked = False
        if source.stat().st_size >= LINKED_BYTES:
            with contextlib.suppress(OSError):  # another disk, or one without links
                path.unlink()
                os.link(source.resolve(), path)
                linked = True
        if not linked:
            with source.open("rb") as original, path.open("wb") as copy:
                shutil.copyfileobj(original, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(path, folder / source.name)


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Write a file and give it its name in one step, for good when this returns."""
    with _temporary(folder) as (descriptor, path):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(descriptor)
        os.replace(path, folder / name)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, keep: set[str]) -> None:
    """Remove the files of a memory that are not among those to keep, and what processes left that died while saving."""
    for path in folder.iterdir():
        if path.name.startswith(TEMPORARY) or (_FILE_NAME.fullmatch(path.name) and path.name not in keep):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    name = None
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=TEMPORARY)
        try:
            os.fchmod(descriptor, 0o644)
            yield descriptor, Path(name)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror or error}); what was there before is unchanged."
        ) from error
    finally:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
