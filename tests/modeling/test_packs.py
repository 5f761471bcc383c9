"""The memory on disk: what is saved comes back, a save that dies leaves what was there, damage is named."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from karla_hf import KarlaConfig
from karla_hf.modeling import packs_karla
from karla_hf.modeling.engram_karla import new_engram
from karla_hf.modeling.hashing_karla import Names
from karla_hf.modeling.packs_karla import check_pack_name, load_engram, save_engram


HIDDEN, VOCAB = 24, 50


def make_engram(packs=("a", "b"), rows=60):
    config = KarlaConfig(
        text_config=LlamaConfig(hidden_size=HIDDEN, num_attention_heads=1, vocab_size=VOCAB),
        engram_rows_per_head=rows,
        engram_num_heads=2,
        engram_seed=3,
    )
    engram = new_engram(config, torch.randint(20, (VOCAB,)), pad_id=7)
    for pack in packs:
        write(engram, pack)
    return engram


def write(engram, pack):
    """Claim random rows and fill them."""
    table = engram.open_pack(pack)
    names = Names(torch.randint(engram.constants.num_rows, (9, 4, 2)), torch.randint(1, 2**15, (9, 4)).short())
    table.claim(names)
    table.rows[table.owners != 0] = torch.randn(table.num_owned, table.rows.shape[1]).half()


def find_in(folder):
    return lambda name: str(folder / name) if (folder / name).exists() else None


def load(folder, hidden=HIDDEN, vocab=VOCAB):
    return load_engram(find_in(folder), hidden, vocab)


def assert_same(ours, theirs):
    assert list(ours.packs) == list(theirs.packs)
    for pack, table in ours.packs.items():
        assert torch.equal(table.rows, theirs.packs[pack].rows)
        assert torch.equal(table.owners, theirs.packs[pack].owners)
    for mine, other in zip(ours.constants, theirs.constants, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))
    assert torch.equal(ours.coordinates, theirs.coordinates)
    assert ours.families == theirs.families
    assert torch.equal(ours.weights, theirs.weights)
    assert ours.hidden_size == theirs.hidden_size


def manifest_of(folder) -> dict:
    return json.loads((folder / "engram" / "manifest.json").read_text())


def pack_file(folder, pack) -> Path:
    return folder / "engram" / next(entry["file"] for entry in manifest_of(folder)["packs"] if entry["name"] == pack)


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path):
    """A folder with a memory of two packs, and that memory."""
    engram = make_engram()
    save_engram(engram, tmp_path, "f" * 64)
    return tmp_path, engram


@pytest.mark.parametrize("packs", [(), ("a",), ("z", "a", "m")])
def test_saved_memory_comes_back_exactly(tmp_path, packs):
    engram = make_engram(packs)
    save_engram(engram, tmp_path, "f" * 64)
    loaded, tokenizer_sha256 = load(tmp_path)
    assert_same(loaded, engram)
    assert tokenizer_sha256 == "f" * 64


def test_empty_pack_comes_back(tmp_path):
    engram = make_engram(())
    engram.open_pack("empty")
    save_engram(engram, tmp_path, None)
    loaded, tokenizer_sha256 = load(tmp_path)
    assert_same(loaded, engram)
    assert tokenizer_sha256 is None


def test_folder_without_a_memory_gives_none(tmp_path):
    assert load(tmp_path) is None


def test_only_owned_rows_take_room(saved):
    folder, engram = saved
    stored = load_file(pack_file(folder, "a"))
    assert len(stored["index"]) == engram.packs["a"].num_owned < 0.5 * len(engram.packs["a"].owners)


def test_saving_again_writes_nothing_new_and_keeps_no_old_file(saved):
    folder, engram = saved
    before, times = contents(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    save_engram(engram, folder, "f" * 64)
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == times
    old = pack_file(folder, "a")
    write(engram, "a")
    del engram.packs["b"]
    save_engram(engram, folder, "f" * 64)
    assert not old.exists()
    assert sorted(path.name for path in (folder / "engram").iterdir()) == sorted(
        ["manifest.json", manifest_of(folder)["constants"]["file"], pack_file(folder, "a").name]
    )
    assert_same(load(folder)[0], engram)


def test_manifest_tells_rows_and_digests(saved):
    folder, engram = saved
    manifest = manifest_of(folder)
    assert [(pack["name"], pack["rows"]) for pack in manifest["packs"]] == [
        (name, table.num_owned) for name, table in engram.packs.items()
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", pack["sha256"]) for pack in manifest["packs"])


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 64])
def test_allowed_pack_names(name):
    check_pack_name(name)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "../a", "a b", "ä", "x" * 65, "a\n"])
def test_other_pack_names_are_refused(name):
    with pytest.raises(ValueError, match=r"is not allowed; use letters, digits"):
        check_pack_name(name)


@pytest.mark.parametrize("name", ["constants", "manifest.json", "CON"])
def test_pack_may_be_called_like_another_file(tmp_path, name):
    engram = make_engram((name,))
    save_engram(engram, tmp_path, None)
    assert_same(load(tmp_path)[0], engram)


DAMAGES = {
    "truncated": lambda data: data[:-1],
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["constants", "a"])
def test_damaged_file_is_named(saved, which, damage):
    folder, _ = saved
    path = next((folder / "engram").glob(f"{which}-*.safetensors"))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(OSError, match=rf"{re.escape(str(path))} is damaged .*; restore it from a good copy\.$"):
        load(folder)


def test_missing_file_is_named(saved):
    folder, _ = saved
    path = pack_file(folder, "b")
    path.unlink()
    with pytest.raises(OSError, match=rf"engram/{path.name} is named by the manifest but missing; restore it"):
        load(folder)


def edit_manifest(folder, change):
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "engram" / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "file", ["../x", "../x.safetensors", "/etc/passwd", "a/b.safetensors", "manifest.json", ".a.safetensors", 7]
)
def test_manifest_cannot_name_a_file_elsewhere(saved, file):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: manifest["packs"][0].update(file=file))
    with pytest.raises(OSError, match=r"is no manifest of a memory \(.*\); restore the folder from a good copy\.$"):
        load(folder)


BROKEN_MANIFESTS = ["", "{", "[]", "{}", "null", '{"constants": {}, "packs": [], "schema": 1}', "\x80"]


@pytest.mark.parametrize("text", BROKEN_MANIFESTS)
def test_broken_manifest_is_named(saved, text):
    folder, _ = saved
    (folder / "engram" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OSError, match=r"manifest\.json is no manifest of a memory \(.*\); restore the folder"):
        load(folder)


def test_every_missing_entry_of_the_manifest_is_named(saved):
    folder, _ = saved
    whole = (folder / "engram" / "manifest.json").read_text()
    for key in json.loads(whole):
        edit_manifest(folder, lambda manifest, key=key: manifest.pop(key))
        with pytest.raises(OSError, match=rf"is no manifest of a memory \('{key}'\); restore the folder"):
            load(folder)
        (folder / "engram" / "manifest.json").write_text(whole)
    for key in ("name", "file", "sha256"):
        edit_manifest(folder, lambda manifest, key=key: manifest["packs"][1].pop(key))
        with pytest.raises(OSError, match=rf"is no manifest of a memory \('{key}'\); restore the folder"):
            load(folder)
        (folder / "engram" / "manifest.json").write_text(whole)


@pytest.mark.parametrize("name", ["../a", "", 7, None])
def test_pack_name_in_the_manifest_is_checked(saved, name):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: manifest["packs"][0].update(name=name))
    with pytest.raises(OSError, match=r"is no manifest of a memory \(.*\); restore the folder"):
        load(folder)


def test_other_schema_is_refused(saved):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: manifest.update(schema=2))
    with pytest.raises(ValueError, match="has schema 2, but this version reads schema 1; use a matching version"):
        load(folder)


def test_memory_of_another_width_is_refused(saved):
    with pytest.raises(ValueError, match=r"for hidden size 24, but the backbone has 32; use the backbone that"):
        load(saved[0], hidden=32)


def test_memory_of_another_vocabulary_is_refused(saved):
    with pytest.raises(
        ValueError, match=r"maps 50 token ids, but the backbone has 51; use the backbone and tokenizer"
    ):
        load(saved[0], vocab=51)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written_text(path, text, **kwargs):
    path.write_bytes(text.encode()[: len(text) // 2])
    full_disk()


def half_written_tensors(tensors, path):
    Path(path).write_bytes(b"half")
    full_disk()


FULL_DISKS = {
    "tensors": (packs_karla, "save_file", half_written_tensors),
    "manifest": (Path, "write_text", half_written_text),
    "rename": (os, "replace", full_disk),
    "sync": (os, "fsync", full_disk),
}


@pytest.mark.parametrize("step", FULL_DISKS)
def test_full_disk_at_any_step_leaves_what_was_there(saved, monkeypatch, step):
    folder, engram = saved
    before = contents(folder)
    write(engram, "a")
    write(engram, "c")
    with monkeypatch.context() as patch:
        patch.setattr(*FULL_DISKS[step])
        with pytest.raises(OSError, match="No space left on device"):
            save_engram(engram, folder, "f" * 64)
    old, _ = load(folder)
    assert list(old.packs) == ["a", "b"]
    assert {name: data for name, data in contents(folder).items() if name in before} == before
    save_engram(engram, folder, "f" * 64)
    assert_same(load(folder)[0], engram)
    assert len(contents(folder)) == 5


def test_leftovers_of_a_killed_save_are_not_read(saved):
    folder, engram = saved
    (folder / "engram" / ".saving-xyz").mkdir()
    (folder / "engram" / ".saving-xyz" / "tensors").write_bytes(b"half")
    (folder / "engram" / "a-0123456789abcdef.safetensors").write_bytes(b"half")
    assert_same(load(folder)[0], engram)
    save_engram(engram, folder, "f" * 64)
    assert_same(load(folder)[0], engram)
    assert not (folder / "engram" / "a-0123456789abcdef.safetensors").exists()
