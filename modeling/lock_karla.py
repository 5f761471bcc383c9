"""The lock of a folder: one process at a time writes to it, and one that dies does not keep it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path


LOCK = ".lock"
_held: set[tuple[Path, int]] = set()


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
    descriptor = _take_lock(path)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # while it is held: whoever has opened it sees that it is gone
        os.close(descriptor)


def _take_lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except FileNotFoundError:
            pass  # its holder has just removed it
        except BlockingIOError as error:
            os.close(descriptor)
            raise OSError(
                f"Another process is writing to the memory in {path.parent}; try again when it has finished."
            ) from error
        os.close(descriptor)
