"""The lock of a folder: one process at a time writes to it, and one that dies does not keep it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path


LOCK = ".lock"
_held: dict[tuple[Path, int], int] = {}  # by folder and thread, the open file


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the only one who writes to a folder, which is made if it is not there. The lock of a process that dies is free.

    A thread that holds the lock may take it again.

    Raises:
        OSError: if another process or thread holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = (folder.resolve(), threading.get_ident())
    if key in _held:
        yield
        return
    path = folder / LOCK
    _held[key] = _take_lock(path)
    try:
        yield
    finally:
        descriptor = _held.pop(key, None)
        if descriptor is not None:  # else this is a process forked from the one that holds it
            with contextlib.suppress(FileNotFoundError):
                if _is_at(descriptor, path):
                    path.unlink()  # while it is held: whoever has opened it sees that it is gone
            os.close(descriptor)


def _take_lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except FileNotFoundError:
            pass  # its holder has just removed it
        except BlockingIOError as error:
            os.close(descriptor)
            raise OSError(
                f"Another process is writing to the memory in {path.parent}; try again when it has finished."
            ) from error
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), path.stat())


def _let_go() -> None:
    """In a new process: the locks are its parent's, and shall not outlive it."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
