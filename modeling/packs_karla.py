"""Engram on disk: a folder of safetensors files and a manifest that names them.

`engram/constants-<hash>.safetensors` holds what addresses depend on, `engram/<pack>-<hash>.safetensors` the owned rows
of a pack. Files are named by their content and never changed; the manifest is replaced last, in one step, so a save that
dies leaves the state before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .engram_karla import Engram, EngramTable
from .hashing_karla import HashConstants, NgramFamily


SCHEMA = 1
FOLDER = "engram"
MANIFEST = "manifest.json"
_PACK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


def check_pack_name(name: str) -> None:
    """Raise ValueError unless `name` can be the name of a pack (letters, digits, `.`, `_`, `-`; at most 64).

    Example:
        >>> check_pack_name("handbook-2026")
    """
    if not _PACK_NAME.fullmatch(name):
        raise ValueError(f"The pack name {name!r} is not allowed; use letters, digits, '.', '_' and '-', at most 64.")


def save_engram(engram: Engram, directory: str | os.PathLike, tokenizer_sha256: str | None) -> None:
    """Write the memory below `directory`, in the folder `engram`.

    Args:
        engram: the memory. Not modified.
        directory: the checkpoint's folder.
        tokenizer_sha256: hash of the tokenizer that the token map was made with, or None.

    Raises:
        OSError: if the disk is full or not writable; what was there before is still whole.
    """
    folder = Path(directory) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    c = engram.constants
    tensors = {
        "multipliers": c.multipliers,
        "primes": c.primes,
        "offsets": c.offsets,
        "token_map": c.token_map,
        "pad_id": torch.tensor([c.pad_id]),
        "coordinates": engram.coordinates,
        "orders": torch.tensor([family.order for family in engram.families]),
        "weights": torch.tensor([family.weight for family in engram.families], dtype=torch.float64),
    }
    manifest: dict = {
        "schema": SCHEMA,
        "tokenizer_sha256": tokenizer_sha256,
        "hidden_size": engram.hidden_size,
        "constants": _write_tensors(folder, "constants", tensors),
        "packs": [
            {"name": name, "rows": table.num_owned, **_write_tensors(folder, name, _owned_rows(table))}
            for name, table in engram.packs.items()
        ],
    }
    _replace(folder, MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8"))
    used = {manifest["constants"]["file"], *(pack["file"] for pack in manifest["packs"])}
    for path in folder.glob("*.safetensors"):
        if path.name not in used:
            path.unlink()


def load_engram(
    find: Callable[[str], str | None], hidden_size: int, vocab_size: int
) -> tuple[Engram, str | None] | None:
    """Read a memory.

    Args:
        find: maps a file name such as `engram/manifest.json` to a local path, or None where there is none.
        hidden_size: width of the backbone's hidden state.
        vocab_size: rows of the backbone's embedding.

    Returns:
        The memory and the hash of its tokenizer; None if there is no manifest.

    Raises:
        ValueError: if the memory belongs to another backbone or schema.
        OSError: if a file is missing or damaged, naming it.
    """
    path = find(f"{FOLDER}/{MANIFEST}")
    if path is None:
        return None
    manifest = _read_manifest(path)
    if manifest["hidden_size"] != hidden_size:
        raise ValueError(
            f"{path} is a memory for hidden size {manifest['hidden_size']}, but the backbone has {hidden_size}; use the "
            "backbone that the memory was made for."
        )
    t = _read_tensors(find, manifest["constants"])
    if len(t["token_map"]) != vocab_size:
        raise ValueError(
            f"{path} maps {len(t['token_map'])} token ids, but the backbone has {vocab_size}; use the backbone and "
            "tokenizer that the memory was made for."
        )
    constants = HashConstants(t["multipliers"], t["primes"], t["offsets"], t["token_map"], int(t["pad_id"]))
    families = [
        NgramFamily(order, weight) for order, weight in zip(t["orders"].tolist(), t["weights"].tolist(), strict=True)
    ]
    engram = Engram(constants, families, t["coordinates"], hidden_size)
    for pack in manifest["packs"]:
        _fill_table(engram.open_pack(pack["name"]), _read_tensors(find, pack), pack["file"])
    return engram, manifest["tokenizer_sha256"]


def _owned_rows(table: EngramTable) -> dict[str, torch.Tensor]:
    index = (table.owners != 0).nonzero()[:, 0]
    return {"index": index, "owners": table.owners[index], "rows": table.rows[index]}


def _fill_table(table: EngramTable, tensors: dict[str, torch.Tensor], name: str) -> None:
    index = tensors["index"]
    if len(index) and int(index.max()) >= len(table.owners):
        raise OSError(f"{name} addresses row {int(index.max())}, but the table has {len(table.owners)}; read again.")
    table.owners[index] = tensors["owners"]
    table.rows[index] = tensors["rows"]


def _write_tensors(folder: Path, stem: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write tensors to a file named by its content; returns its entry for the manifest."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        path = Path(staging) / "tensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written ({error}); what was there before is unchanged.") from error
        digest = _sha256(path)
        name = f"{stem}-{digest[:16]}.safetensors"
        if not (folder / name).exists():
            _fsync(path)
            os.replace(path, folder / name)
    return {"file": name, "sha256": digest}


def _replace(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        path = Path(staging) / name
        write(path)
        _fsync(path)
        os.replace(path, folder / name)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: str) -> dict:
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        schema, _, _ = (manifest[key] for key in ("schema", "hidden_size", "tokenizer_sha256"))
        for entry in ({"name": "constants", **manifest["constants"]}, *manifest["packs"]):
            name, file, _ = (entry[key] for key in ("name", "file", "sha256"))
            check_pack_name(name)
            if not _FILE_NAME.fullmatch(file):
                raise ValueError("it names a file outside its folder")
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is no manifest of a memory ({error}); restore the folder from a good copy.") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, but this version reads schema {SCHEMA}; use a matching version."
        )
    return manifest


def _read_tensors(find: Callable[[str], str | None], entry: dict) -> dict[str, torch.Tensor]:
    name = f"{FOLDER}/{entry['file']}"
    path = find(name)
    if path is None:
        raise OSError(f"{name} is named by the manifest but missing; restore it from a good copy.")
    if _sha256(path) != entry["sha256"]:
        raise OSError(f"{path} is damaged (its content is not what was written); restore it from a good copy.")
    return load_file(path)
