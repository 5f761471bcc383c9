"""The manifest of a memory: what it must say, and the files that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from .files_karla import DamagedError, StoredFile, machine_bytes
from .table_karla import BUCKET


SCHEMA = 2
FOLDER = "engram"
MANIFEST = "manifest.json"
MOST_LEVELS = 16
MOST_POSITIONS = 1 << 24  # between two hand-overs to the slowest level
_PACK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LAYOUT = {"width": int, "chunk_size": int, "update_periods": list, "num_rows": int, "max_rows": int | None}
_PACK = {"made_with": dict, "sources": list, "tokens": int, "step": int, "rows": int, "levels": list}


def check_pack_name(name: str) -> None:
    """Raise ValueError unless `name` can be the name of a pack (letters, digits, `.`, `_`, `-`; at most 64).

    Example:
        >>> check_pack_name("handbook-2026")
    """
    if not isinstance(name, str) or not _PACK_NAME.fullmatch(name):
        raise ValueError(f"The pack name {name!r} is not allowed; use letters, digits, '.', '_' and '-', at most 64.")


def parse_manifest(path: str | Path, data: bytes) -> dict:
    """Check a manifest and return it.

    Args:
        path: where it was read, for messages.
        data: its content.

    Raises:
        OSError: if it is damaged, or names a file outside its folder.
        ValueError: if it has another schema.
    """
    try:
        manifest = json.loads(data)
        schema = manifest["schema"]
        if schema == SCHEMA:
            _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is no manifest of a memory ({error}); restore the folder from a good copy.") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, but this version reads schema {SCHEMA}; use a matching version."
        )
    return manifest


def files_of(manifest: dict) -> Iterator[StoredFile]:
    """All files that a manifest names."""
    yield stored_file(manifest["constants"])
    for pack in manifest["packs"]:
        yield from files_of_pack(pack)


def files_of_pack(pack: dict) -> Iterator[StoredFile]:
    """The files that an entry of a manifest names for a pack."""
    for level in pack["levels"]:
        for table in level["tables"]:
            yield from map(stored_file, table["files"])


def stored_file(entry: dict) -> StoredFile:
    """A file as an entry of a manifest names it. Raises ValueError or TypeError if that is no file of a folder."""
    return StoredFile(**entry).check()


def _check(manifest: dict) -> None:
    if manifest["tokenizer_sha256"] is not None and not isinstance(manifest["tokenizer_sha256"], str):
        raise DamagedError("tokenizer_sha256 is no text")
    _check_types({"hidden_size": int, "layout": dict, "made_with": dict, "packs": list}, manifest)
    _check_types(_LAYOUT, manifest["layout"])
    _check_layout(manifest["hidden_size"], **manifest["layout"])
    stored_file(manifest["constants"])
    names = set()
    for pack in manifest["packs"]:
        check_pack_name(pack["name"])
        if pack["name"] in names:
            raise DamagedError(f"it has two packs {pack['name']!r}")
        names.add(pack["name"])
        _check_types(_PACK, pack)
        if not all(isinstance(source, str) for source in pack["sources"]):
            raise DamagedError(f"the sources of pack {pack['name']!r} are no texts")
        if len(pack["levels"]) != len(manifest["layout"]["update_periods"]):
            raise DamagedError(f"pack {pack['name']!r} has {len(pack['levels'])} levels")
        for level in pack["levels"]:
            _check_types({"lost": int, "tables": list}, level)
            if not level["tables"]:
                raise DamagedError(f"pack {pack['name']!r} has a level without a table")
            for table in level["tables"]:
                _check_types({"num_rows": int, "files": list}, table)
                if table["num_rows"] < BUCKET or table["num_rows"] % BUCKET:
                    raise DamagedError(f"pack {pack['name']!r} has a table of {table['num_rows']} rows")
                if not any(stored_file(file).dense for file in table["files"][:1]):  # else its file is as large
                    _check_room(table["num_rows"], manifest["layout"]["width"])
        for _ in files_of_pack(pack):
            pass


def _check_layout(
    hidden_size: int, width: int, chunk_size: int, update_periods: list, num_rows: int, max_rows: int | None
) -> None:
    if not 1 <= width <= hidden_size:
        raise DamagedError(f"its rows have {width} of {hidden_size} coordinates")
    if not update_periods or update_periods[0] != 1 or not all(type(period) is int for period in update_periods):
        raise DamagedError(f"update_periods is {update_periods}")
    if any(slow < fast or slow % fast for fast, slow in pairwise(update_periods)):
        raise DamagedError(f"update_periods is {update_periods}")
    if not chunk_size or chunk_size * update_periods[-1] > MOST_POSITIONS or len(update_periods) > MOST_LEVELS:
        raise DamagedError(f"{len(update_periods)} levels take over {chunk_size} * {update_periods[-1]} positions")
    if not num_rows or max_rows == 0:
        raise DamagedError(f"num_rows is {num_rows} and max_rows {max_rows}")
    _check_room(num_rows if max_rows is None else min(num_rows, max_rows), width)


def _check_room(num_rows: int, width: int) -> None:
    """Refuse a table that no process on this machine could have written."""
    if num_rows * (9 + 2 * width) > machine_bytes():
        raise DamagedError(f"a table of {num_rows} rows is larger than the memory of this machine")


def _check_types(expected: dict, found: dict) -> None:
    for key, kind in expected.items():
        value = found[key]
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise DamagedError(f"{key} is {value!r}")
