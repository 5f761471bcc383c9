"""The memory on disk: a folder of files that never change, and a manifest that names them.

A table is a list of files: each holds some of its slots with their names and rows, later ones win, and the first may be
the whole table, which is mapped instead of read. Saving adds one file with the slots that were written since, or merges
files so that a table never has many. The manifest is replaced last and in one step; only then are files removed that it
no longer names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from .constants_karla import read_constants
from .engram_karla import Engram
from .files_karla import open_tensors
from .levels_karla import EngramLayout
from .manifest_karla import FOLDER, MANIFEST, parse_manifest, stored_file
from .saving_karla import content_hash, damaged_files, save_folder
from .stored_table_karla import load_table


logger = logging.get_logger(__name__)
ATTEMPTS = 100  # of a reader that meets files which a writer has just replaced


def save_engram(engram: Engram, directory: str | os.PathLike, tokenizer_sha256: str | None) -> None:
    """Write what has changed of a memory below `directory`, in the folder `engram`.

    Args:
        engram: the memory. What it holds is not modified.
        directory: the checkpoint's folder.
        tokenizer_sha256: hash of the tokenizer that the token map was made with, or None.

    Raises:
        OSError: if another process is writing there, or has done so since the memory was loaded; if a damaged pack was
            written; if the disk is full or not writable. What was there before is still whole.
    """
    save_folder(engram, Path(directory) / FOLDER, tokenizer_sha256)


def load_engram(
    find: Callable[[str], str | None], hidden_size: int, vocab_size: int
) -> tuple[Engram, str | None] | None:
    """Read a memory. Files of packs that are damaged or missing are left out, logged, and kept in `Engram.damaged`.

    Args:
        find: maps a file name such as `engram/manifest.json` to a local path, or None where there is none.
        hidden_size: width of the backbone's hidden state.
        vocab_size: rows of the backbone's embedding.

    Returns:
        The memory and the hash of its tokenizer; None if there is no manifest.

    Raises:
        ValueError: if the memory belongs to another backbone or schema.
        OSError: if the manifest or the constants are missing or damaged.
    """
    path = find(f"{FOLDER}/{MANIFEST}")
    if path is None:
        return None
    engram, manifest = load_folder(Path(path), lambda name: find(f"{FOLDER}/{name}"))
    if manifest["hidden_size"] != hidden_size:
        raise ValueError(
            f"{path} is a memory for hidden size {manifest['hidden_size']}, but the backbone has {hidden_size}; use the "
            "backbone that the memory was made for."
        )
    if len(engram.constants.token_map) != vocab_size:
        raise ValueError(
            f"{path} maps {len(engram.constants.token_map)} token ids, but the backbone has {vocab_size}; use the "
            "backbone and tokenizer that the memory was made for."
        )
    for name, pack in engram.packs.items():
        for file in damaged_files(engram, pack):
            logger.error(
                f"{Path(path).parent / file} is damaged ({engram.damaged[file]}); what it holds of pack {name!r} is left "
                "out. Restore it from a good copy, or forget the pack."
            )
    return engram, manifest["tokenizer_sha256"]


def load_folder(path: Path, find: Callable[[str], str | None]) -> tuple[Engram, dict]:
    """Read the memory that a manifest describes, without locking it: if a writer replaces it meanwhile, read it again.

    Args:
        path: the manifest.
        find: maps the name of a file beside it to a local path, or None where there is none.

    Returns:
        The memory and the manifest.
    """
    for _ in range(ATTEMPTS):
        data = path.read_bytes()
        manifest = parse_manifest(path, data)
        try:
            engram = _load(path, manifest, find)
        except FileNotFoundError:
            if path.read_bytes() == data:
                raise
            continue
        if not engram.damaged or path.read_bytes() == data:
            break
    engram.saved[path.parent.resolve()] = content_hash(data)
    return engram, manifest


def _load(path: Path, manifest: dict, find: Callable[[str], str | None]) -> Engram:
    stored = stored_file(manifest["constants"])
    place = find(stored.file)
    if place is None:
        raise FileNotFoundError(
            f"{path.parent / stored.file} is named by the manifest but missing; restore it from a good copy."
        )
    try:
        tensors, _ = open_tensors(Path(place), stored)
        sizes = manifest["hidden_size"], manifest["layout"]["width"]
        constants, families, lexicon = read_constants(tensors, *sizes)
    except ValueError as error:
        raise OSError(f"{place} is damaged ({error}); restore it from a good copy.") from error
    layout = {**manifest["layout"], "update_periods": tuple(manifest["layout"]["update_periods"])}
    engram = Engram(constants, families, EngramLayout(hidden_size=manifest["hidden_size"], **layout))
    engram.made_with, engram.lexicon = manifest["made_with"], lexicon
    for entry in manifest["packs"]:
        pack = engram.open_pack(entry["name"])
        pack.stored, pack.sources, pack.tokens = entry, list(entry["sources"]), entry["tokens"]
        pack.clock.step = entry["step"]
        for level, stored_level in zip(pack.levels, entry["levels"], strict=True):
            level.lost = stored_level["lost"]
            level.tables = [
                load_table(table, layout["width"], find, engram.damaged) for table in stored_level["tables"]
            ]
    return engram
