"""A file that a long pass adds its results to, batch by batch, and that it goes on from after it was stopped."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


NAMES = ("model", "revision")  # told, not compared: the fingerprint says whether the model is the same


class Journal:
    """Results of a pass in a JSON Lines file: a line of settings, then a line per result.

    Args:
        path: the file, made if it is not there; None keeps the results in memory only.
        settings: what the results depend on, with the name of the `pass`. A file with others is refused.

    Attributes:
        records: all results, those found in the file first.

    Raises:
        OSError: if the file cannot be read or written.
        ValueError: if the file holds something else, or results of other settings.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Journal(Path(folder, "pass.jsonl"), {"pass": "eval", "seed": 0}).add([{"problem_id": "a"}])
        ...     Journal(Path(folder, "pass.jsonl"), {"pass": "eval", "seed": 0}).records
        [{'problem_id': 'a'}]
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.settings = dict(settings)
        self.records: list[dict[str, Any]] = []
        if self.path is None:
            return
        if self.path.is_file() and self.path.stat().st_size:
            self._resume(self.path)
        else:
            self._write([self.settings])

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append results; they are on the disk when this returns."""
        fresh = [dict(record) for record in records]
        if self.path is not None:
            self._write(fresh)
        self.records += fresh

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _resume(self, path: Path) -> None:
        settings, self.records, size = _read(path, self.settings["pass"])
        self._compare(path, settings)
        if size < path.stat().st_size:  # stopped in the middle of a line
            os.truncate(path, size)

    def _compare(self, path: Path, found: Mapping[str, Any]) -> None:
        own = json.loads(json.dumps(self.settings))
        if found.get("fingerprint") != own.get("fingerprint"):
            raise ValueError(
                f"{path} was made with another model ({_model(found)}) than this one ({_model(own)}); give that model, or "
                "another file."
            )
        for key in [key for key in {**found, **own} if key not in NAMES]:
            if found.get(key) != own.get(key):
                raise ValueError(
                    f"{path} was made with {key} {found.get(key)!r}, but now it is {own.get(key)!r}; give the same, or "
                    "another file."
                )


def read_records(path: str | Path, kind: str) -> list[dict[str, Any]]:
    """The results that a file holds, whatever model and settings they are of.

    Args:
        path: the file. Not modified.
        kind: the pass that must have written it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else.
    """
    return _read(Path(path), kind)[1]


def digest(*parts: Any) -> str:
    """A short hash of JSON data, by which a changed problem is noticed.

    Example:
        >>> digest("1 + 1 = ", "2") == digest("1 + 1 = ", "2"), digest("1 + 1 = ", "3") == digest("1 + 1 = ", "2")
        (True, False)
    """
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def _read(path: Path, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Settings, results, and the number of bytes up to the end of the last whole line."""
    whole = path.read_bytes().rpartition(b"\n")[0] + b"\n"
    try:
        settings, *records = [json.loads(line) for line in whole.splitlines()]
        found = settings["pass"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by a POPE pass ({error}); give another file, or delete it."
        ) from error
    if found != kind:
        raise ValueError(f"{path} holds the pass {found!r}, but this is the pass {kind!r}; give another file.")
    return settings, records, len(whole)


def _model(settings: Mapping[str, Any]) -> str:
    return ", ".join(str(settings[key]) for key in (*NAMES, "fingerprint") if settings.get(key) is not None)
