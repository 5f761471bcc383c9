"""Packs on their own: exported to a folder, imported into another memory, merged into one, checked on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from .engram_karla import Engram
from .files_karla import open_tensors
from .levels_karla import Pack
from .manifest_karla import FOLDER, MANIFEST, check_pack_name, files_of, parse_manifest
from .packs_karla import load_folder
from .saving_karla import check_undamaged, save_folder


logger = logging.get_logger(__name__)
BLOCK = 65536  # names merged at once
_LARGEST = np.finfo(np.float16).max


def find_pack(engram: Engram, name: str) -> Pack:
    """A pack by its name; KeyError if there is none."""
    if name not in engram.packs:
        raise KeyError(f"There is no pack {name!r}; the packs are {sorted(engram.packs)}.")
    return engram.packs[name]


def export_pack(engram: Engram, name: str, folder: str | os.PathLike, tokenizer_sha256: str | None) -> None:
    """Write one pack, with all that its names depend on, to a folder of its own.

    Args:
        engram: the memory. Not modified.
        name: the pack.
        folder: new or empty.
        tokenizer_sha256: hash of the tokenizer that the token map was made with, or None.

    Raises:
        KeyError: if there is no such pack.
        OSError: if the folder holds something or cannot be written, or the pack is damaged.
    """
    pack, target = find_pack(engram, name), Path(folder)
    check_undamaged(engram, name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OSError(f"{target} is not an empty folder; give a new or an empty one.")
    alone = Engram(engram.constants, engram.families, engram.layout)
    alone.made_with = pack.stored.get("made_with") or engram.made_with
    alone.saved, alone.packs[name] = dict(engram.saved), pack
    save_folder(alone, target, tokenizer_sha256, remember=False)


def import_pack(
    engram: Engram, folder: str | os.PathLike, name: str | None = None, tokenizer_sha256: str | None = None
) -> str:
    """Add a pack that was exported. All of its files are read and checked first.

    Args:
        engram: the memory; modified in place.
        folder: what `export_pack` wrote.
        name: name for the pack here; None keeps its own.
        tokenizer_sha256: hash of this memory's tokenizer, or None.

    Returns:
        The name.

    Raises:
        ValueError: if the pack was made with another tokenizer, backbone, seed, layout or schema, or a pack of that name
            is here already.
        OSError: if the folder holds no pack, or a file is damaged.
    """
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise OSError(f"{folder} has no {MANIFEST}, so it is no exported pack; give a folder that an export made.")
    for file, reason in verify_folder(path.parent).items():
        raise OSError(f"{path.parent / file} is damaged ({reason}); get the pack again.")
    other, manifest = load_folder(path, lambda file: str(path.parent / file))
    difference = _difference(engram, tokenizer_sha256, other, manifest)
    if difference is not None:
        raise ValueError(f"The pack in {folder} was made with {difference}, so it does not fit this memory.")
    if len(other.packs) != 1:
        raise ValueError(f"{folder} holds {len(other.packs)} packs; give a folder that an export made.")
    ((own_name, pack),) = other.packs.items()
    name = name or own_name
    check_pack_name(name)
    if name in engram.packs:
        raise ValueError(f"There is a pack {name!r} already; give another name, or forget that one first.")
    pack.stored = {**pack.stored, "made_with": pack.stored["made_with"] or other.made_with}
    for key, what in (("revision", "revision"), ("source", "copy")):
        ours, theirs = engram.made_with.get(key), pack.stored["made_with"].get(key)
        if ours != theirs:
            logger.warning(
                f"Pack {name!r} was made with {what} {theirs or 'official'!r} of the backbone, this memory with "
                f"{ours or 'official'!r}; what it recalls may differ slightly."
            )
    engram.saved.update(other.saved)  # its files are found there when the memory is saved
    engram.packs[name] = pack
    return name


def _difference(engram: Engram, tokenizer_sha256: str | None, other: Engram, manifest: dict) -> str | None:
    """What keeps packs of another memory from being read by this one."""
    ours, theirs = engram.constants, other.constants
    backbones = engram.made_with.get("backbone"), other.made_with.get("backbone")
    if None not in backbones and backbones[0] != backbones[1]:
        return f"the backbone {backbones[1]!r} instead of {backbones[0]!r}"
    sizes = [("hidden size", "hidden_size"), ("row width", "width"), ("chunk size", "chunk_size")]
    for what, key in [*sizes, ("update periods", "update_periods")]:
        if getattr(engram.layout, key) != getattr(other.layout, key):
            return f"{what} {getattr(other.layout, key)} instead of {getattr(engram.layout, key)}"
    if (
        None not in (tokenizer_sha256, manifest["tokenizer_sha256"])
        and manifest["tokenizer_sha256"] != tokenizer_sha256
    ):
        return "another tokenizer"
    maps = [(ours.token_map, theirs.token_map), (ours.boundaries, theirs.boundaries)]
    if ours.pad_id != theirs.pad_id or not all(torch.equal(*pair) for pair in maps):
        return "another token map"
    if engram.families != other.families:
        return f"the families {[tuple(family) for family in other.families]} instead of {[tuple(family) for family in engram.families]}"
    if not torch.equal(ours.multipliers, theirs.multipliers):
        return "another seed"
    return None


def merge_packs(engram: Engram, names: Sequence[str], into: str) -> Pack:
    """Replace packs by one whose rows are their sums, which is what reads see of them; float64, rounded once.

    The result is the same to the byte in whatever order the packs are named.

    Args:
        engram: the memory; modified in place.
        names: two or more packs, or one, which is then rewritten.
        into: name of the result; one of the packs, or new.

    Raises:
        KeyError: if there is no such pack.
        ValueError: if no pack is named, or `into` cannot be a name or is that of another pack.
    """
    check_pack_name(into)
    if not names:
        raise ValueError("No packs to merge were named; name two or more.")
    packs = {name: find_pack(engram, name) for name in sorted(set(names))}
    if into in engram.packs and into not in packs:
        raise ValueError(f"There is a pack {into!r} already; merge it too, or give another name.")
    merged = engram.new_pack()
    tables = [table for pack in packs.values() for table in pack.tables]
    all_names = np.unique(np.concatenate([table.names[table.names != 0] for table in tables]))
    slowest = merged.levels[-1]
    for start in range(0, len(all_names), BLOCK):
        block = all_names[start : start + BLOCK]
        kept = block[slowest.claim(block)]
        rows = np.zeros((len(kept), engram.layout.width))
        for table in tables:
            rows += table.read(kept).numpy()
        slowest.add(kept, torch.from_numpy(rows.clip(-_LARGEST, _LARGEST).astype(np.float16)).float())
    merged.sources = [source for pack in packs.values() for source in pack.sources]
    merged.tokens = sum(pack.tokens for pack in packs.values())
    merged.clock.step = sum(pack.clock.step for pack in packs.values())
    made_with = [pack.stored.get("made_with") or engram.made_with for pack in packs.values()]
    merged.stored = {"made_with": made_with[0]} if all(made == made_with[0] for made in made_with) else {}
    for name in packs:
        del engram.packs[name]
    engram.packs[into] = merged
    return merged


def verify_engram(directory: str | os.PathLike) -> dict[str, str]:
    """Read every file of a memory and compare it with what was written.

    Args:
        directory: the checkpoint's folder.

    Returns:
        The damaged files and why; empty if all are whole.

    Raises:
        OSError: if the manifest is missing or damaged.
    """
    return verify_folder(Path(directory, FOLDER))


def verify_folder(folder: Path) -> dict[str, str]:
    """The same for a memory's own folder, or that of an exported pack."""
    path, data = folder / MANIFEST, b""
    damaged: dict[str, str] = {}
    while data != (now := path.read_bytes()):  # a writer may replace files meanwhile
        data, damaged = now, {}
        for stored in files_of(parse_manifest(path, data)):
            try:
                open_tensors(folder / stored.file, stored, check=True)
            except FileNotFoundError:
                damaged[stored.file] = "it is missing"
            except (ValueError, OSError) as error:
                damaged[stored.file] = str(error)
    return damaged
