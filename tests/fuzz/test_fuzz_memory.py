"""Damaged memories: manifests, and safetensors whose hashes say that they are whole."""

import hashlib
import json
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_safetensors, damaged_text
from sandbox import cases

from karla_hf.info import describe_packs
from karla_hf.modeling.exchange_karla import import_pack, verify_folder
from karla_hf.modeling.packs_karla import load_engram, save_engram


def load(folder: Path):
    """Load a memory, read from it, describe it, check it and save it."""

    def find(name: str) -> str | None:
        path = folder / name
        return str(path) if path.is_file() else None

    loaded = load_engram(find, 64, 400)
    if loaded is None:
        return
    engram, tokenizer_sha256 = loaded
    engram.read(torch.arange(3 * len(engram.families)).view(3, -1))
    describe_packs(engram, folder)
    verify_folder(folder / "engram")
    save_engram(engram, folder, tokenizer_sha256)
    load_engram(find, 64, 400)


def replace(folder: Path, path: Path, data: bytes) -> None:
    """Put other bytes into a file of a memory, and let the manifest say that they are what was written."""
    manifest = (folder / "manifest.json").read_text()
    before = path.read_bytes()
    path.write_bytes(data)
    entry = json.dumps(path.name)
    assert entry in manifest
    manifest = manifest.replace(hashlib.sha256(before).hexdigest(), hashlib.sha256(data).hexdigest())
    manifest = manifest.replace(f'"size": {len(before)}', f'"size": {len(data)}')
    (folder / "manifest.json").write_text(manifest)


@cases(450)
@given(data=st.data())
def test_manifest(data, valid, sandbox):
    folder = sandbox.fill(valid / "memory") / "engram"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(data.draw(damaged_text(manifest)))
    sandbox.run(lambda: load(sandbox.folder))


@cases(600)
@given(data=st.data())
def test_files_of_the_memory(data, valid, sandbox):
    folder = sandbox.fill(valid / "memory") / "engram"
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    content = path.read_bytes()
    if data.draw(st.integers(0, 5)):
        replace(folder, path, data.draw(damaged_safetensors(content)))
    else:
        path.write_bytes(data.draw(damaged_bytes(content)))
    sandbox.run(lambda: load(sandbox.folder))


@cases(250)
@given(data=st.data())
def test_exported_pack(data, valid, sandbox):
    folder = sandbox.fill(valid / "pack")
    loaded = load_engram(lambda name: str(valid / "karla" / name), 64, 400)
    if data.draw(st.booleans()):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_bytes(data.draw(damaged_text(manifest)))
    else:
        path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
        replace(folder, path, data.draw(damaged_safetensors(path.read_bytes())))

    def bring() -> None:
        name = import_pack(loaded[0], folder, "c", loaded[1])
        loaded[0].read(torch.arange(3 * len(loaded[0].families)).view(3, -1))
        assert loaded[0].packs[name].num_owned >= 0

    sandbox.run(bring)
