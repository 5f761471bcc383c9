"""Saving a memory: only what has changed is written, and the folder is at every moment the old state or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from .engram_karla import Engram
from .files_karla import (
    StoredFile,
    bring_file,
    open_tensors,
    replace_file,
    sweep,
    sync_folder,
    whole,
    write_tensors,
)
from .levels_karla import Pack
from .lock_karla import lock_folder
from .manifest_karla import MANIFEST, SCHEMA, files_of, parse_manifest, stored_file
from .stored_table_karla import first_to_merge, write_table
from .table_karla import EngramTable


def check_undamaged(engram: Engram, name: str) -> None:
    """Raise OSError if files of a pack could not be loaded: what is written to it now could not be told from them."""
    pack = engram.packs.get(name)
    damaged = [] if pack is None else [f"{file} ({engram.damaged[file]})" for file in damaged_files(engram, pack)]
    if damaged:
        raise OSError(
            f"The pack {name!r} is damaged: {', '.join(damaged)}; restore it from a good copy, merge what is left into "
            "another pack, or forget it."
        )


def damaged_files(engram: Engram, pack: Pack) -> list[str]:
    """Names of a pack's files that could not be loaded."""
    return [stored.file for table in pack.tables for stored in table.files if stored.file in engram.damaged]


def save_folder(engram: Engram, folder: Path, tokenizer_sha256: str | None, *, remember: bool = True) -> None:
    """Write a memory into a folder of its own; see `save_engram`.

    Args:
        engram: the memory.
        folder: where to.
        tokenizer_sha256: hash of the tokenizer, or None.
        remember: whether the memory counts as saved then; False for a part of it.
    """
    with lock_folder(folder):
        saver, path, data = _Saver(engram, folder), folder / MANIFEST, b""
        try:
            data = saver.write(tokenizer_sha256)
            if data != saver.before:
                sync_folder(folder)
                replace_file(folder, MANIFEST, data)
        finally:  # however this ended, what counts is what the folder says
            if remember and path.is_file() and path.read_bytes() == data:
                saver.remember(data)
            _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what the manifest does not name; with a manifest that cannot be read, nothing."""
    try:
        manifest = parse_manifest(folder / MANIFEST, (folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        sweep(folder, set())
    except (OSError, ValueError):
        return
    else:
        sweep(folder, {stored.file for stored in files_of(manifest)})


class _Saver:
    """One save: what is in the folder, and what was written to it."""

    def __init__(self, engram: Engram, folder: Path):
        self.engram, self.folder = engram, folder
        path = folder / MANIFEST
        self.before = path.read_bytes() if path.is_file() else None
        expected = engram.saved.get(folder.resolve())
        self.present: set[str] = set()
        self.old: dict | None = None
        if self.before is not None and expected is not None:
            if content_hash(self.before) != expected:
                raise OSError(
                    f"The memory in {folder} was changed by another process since it was loaded; load it again, or save "
                    "to another folder."
                )
            self.old = parse_manifest(path, self.before)
            self.present = {stored.file for stored in files_of(self.old)}
        self.written: list[tuple[EngramTable, list[StoredFile], np.ndarray]] = []

    def write(self, tokenizer_sha256: str | None) -> bytes:
        """Write the files; returns the manifest."""
        engram, layout = self.engram, self.engram.layout
        manifest = {
            "schema": SCHEMA,
            "hidden_size": layout.hidden_size,
            "layout": {key: value for key, value in layout._asdict().items() if key != "hidden_size"},
            "tokenizer_sha256": tokenizer_sha256,
            "constants": self._constants()._asdict(),
            "made_with": engram.made_with,
            "packs": [self._pack(name, pack) for name, pack in engram.packs.items()],
        }
        return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()

    def remember(self, data: bytes) -> None:
        """Make the memory know its new files."""
        for table, files, slots in self.written:
            table.files = files
            table.dirty[slots] = False
        self.engram.saved[self.folder.resolve()] = content_hash(data)

    def _constants(self) -> StoredFile:
        constants, families = self.engram.constants, self.engram.families
        tensors = {
            "multipliers": constants.multipliers.numpy(),
            "token_map": constants.token_map.numpy(),
            "pad_id": np.array([constants.pad_id]),
            "orders": np.array([family.order for family in families]),
            "weights": np.array([family.weight for family in families], np.float64),
            "sentences": np.array([family.sentence for family in families], np.uint8),
            "boundaries": constants.boundaries.numpy(),
        }
        if self.engram.lexicon is not None:
            tensors |= self.engram.lexicon.arrays()
        if self.old is not None:
            old = stored_file(self.old["constants"])
            with contextlib.suppress(OSError, ValueError):
                found, _ = open_tensors(self.folder / old.file, old)
                if found.keys() == tensors.keys() and all(
                    np.array_equal(found[name], array) for name, array in tensors.items()
                ):
                    return old
        return write_tensors(self.folder, "constants", {name: whole(array) for name, array in tensors.items()})

    def _pack(self, name: str, pack: Pack) -> dict:
        if damaged_files(self.engram, pack):
            if any(table.dirty.any() for table in pack.tables):
                check_undamaged(self.engram, name)
            for stored in (stored for table in pack.tables for stored in table.files):
                if stored.file not in self.present:
                    self._bring(stored)
            return {**pack.stored, "name": name}
        return {
            "name": name,
            "made_with": pack.stored.get("made_with") or self.engram.made_with,
            "sources": pack.sources,
            "tokens": pack.tokens,
            "step": pack.clock.step,
            "rows": pack.num_owned,
            "levels": [
                {"lost": level.lost, "tables": [self._table(name, table) for table in level.tables]}
                for level in pack.levels
            ],
        }

    def _table(self, name: str, table: EngramTable) -> dict:
        (dirty,) = np.nonzero(table.dirty)
        files = list(table.files)
        first = first_to_merge(files, len(dirty)) if all(map(self._bring, files)) else 0
        if len(dirty) or first < len(files) or (table.num_owned and not files):
            slots = self._slots(files[first:], dirty) if first else None
            files = [*(files[:first] if slots is not None else ()), write_table(self.folder, name, table, slots)]
        self.written.append((table, files, dirty))
        return {"num_rows": len(table), "files": [stored._asdict() for stored in files]}

    def _slots(self, files: list[StoredFile], slots: np.ndarray) -> np.ndarray | None:
        """Slots that files hold or that are given; None, for all, if a file cannot be read any more."""
        try:
            for stored in files:
                slots = np.union1d(slots, open_tensors(self.folder / stored.file, stored)[0]["slots"])
        except (OSError, ValueError):
            return None
        return slots

    def _bring(self, stored: StoredFile) -> bool:
        """Whether a file is in the folder, brought from another folder that holds the memory if necessary."""
        places = [self.folder] if stored.file in self.present else []
        for place in places + [place for place in self.engram.saved if place != self.folder.resolve()]:
            path = place / stored.file
            if path.is_file() and path.stat().st_size == stored.size:
                if place is not self.folder:
                    bring_file(path, self.folder)
                self.present.add(stored.file)
                return True
        return False


def content_hash(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
