"""Files of the memory that are damaged, foreign or in the way, full disks, and writers that meet."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from small_engram import assert_same, contents, files_of_pack, load, make_engram, manifest_of, state, write

from karla_hf.modeling import packs_karla, stored_table_karla
from karla_hf.modeling.exchange_karla import merge_packs, verify_engram
from karla_hf.modeling.lock_karla import lock_folder
from karla_hf.modeling.packs_karla import load_engram, save_engram
from karla_hf.modeling.saving_karla import check_undamaged


SHA = "f" * 64
DAMAGES = {
    "truncated": lambda data: data[:-1],
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "flipped header": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "emptied": lambda data: b"",
    "foreign": lambda data: b"PK\x03\x04" + data[4:],
    "longer": lambda data: data + b"\0",
    "missing": lambda data: None,
}


@pytest.fixture(params=[False, True], ids=["sparse", "dense"])
def saved(tmp_path, monkeypatch, request):
    """A folder with a memory of two packs, of which `a` has several files, and that memory."""
    monkeypatch.setattr(stored_table_karla, "DENSE_BYTES", 0 if request.param else 1 << 60)
    folder = tmp_path / "karla"
    engram = make_engram("ab", rows=256)
    save_engram(engram, folder, SHA)
    for seed in range(3):
        write(engram, "a", seed=40 + seed)
        save_engram(engram, folder, SHA)
    return folder, engram


def damage(path, kind) -> bytes:
    """Damage a file; returns what it held."""
    before = path.read_bytes()
    after = DAMAGES[kind](before)
    path.unlink()
    if after is not None:
        path.write_bytes(after)
    return before


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("which", [0, -1])
def test_damaged_file_is_left_out_named_once_and_kept(saved, caplog, kind, which):
    folder, engram = saved
    path = files_of_pack(folder, "a")[which]
    whole, entry = damage(path, kind), manifest_of(folder)["packs"][0]
    loaded = load(folder)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        rf"{re.escape(str(path))} is damaged \(.*\); what it holds of pack 'a' is left out\. .*", message
    )
    assert list(loaded.damaged) == [path.name]
    assert verify_engram(folder) == loaded.damaged
    assert loaded.damaged[path.name] in message
    assert state(loaded)["b"] == state(engram)["b"]
    assert 0 < loaded.packs["a"].num_owned < engram.packs["a"].num_owned

    left = contents(folder)
    write(loaded, "b", seed=70)
    write(loaded, "c", seed=71)
    save_engram(loaded, folder, SHA)
    after = contents(folder)
    for file in {*files_of_pack(folder, "a"), path}:
        name = file.relative_to(folder).as_posix()
        assert after.get(name) == left.get(name)
    assert manifest_of(folder)["packs"][0] == entry

    path.write_bytes(whole)
    mended = load(folder)
    assert mended.damaged == {}
    assert state(mended)["a"] == state(engram)["a"]
    assert state(mended)["b"] == state(loaded)["b"]


def test_every_damaged_file_is_reported(saved):
    folder, _ = saved
    paths = {path.name: path for pack in "ab" for path in files_of_pack(folder, pack)}
    for path in paths.values():
        damage(path, "flipped")
    loaded = load(folder)
    assert loaded.damaged == dict.fromkeys(paths, "its content is not what was written")
    assert [pack.num_owned for pack in loaded.packs.values()] == [0, 0]


def test_damaged_pack_is_not_written(saved):
    folder, _ = saved
    path = files_of_pack(folder, "a")[-1]
    damage(path, "truncated")
    loaded, before = load(folder), contents(folder)
    check_undamaged(loaded, "b")
    check_undamaged(loaded, "new")
    with pytest.raises(
        OSError, match=rf"^The pack 'a' is damaged: {path.name} \(it has .*\); restore it from a good copy,"
    ):
        check_undamaged(loaded, "a")
    write(loaded, "a", seed=80)
    with pytest.raises(OSError, match="The pack 'a' is damaged"):
        save_engram(loaded, folder, SHA)
    assert contents(folder) == before


def test_what_is_left_of_a_damaged_pack_can_be_merged_or_forgotten(saved):
    folder, _ = saved
    damage(files_of_pack(folder, "a")[-1], "truncated")
    loaded = load(folder)
    rows = loaded.packs["a"].num_owned
    merge_packs(loaded, ["a"], "rest")
    save_engram(loaded, folder, SHA)
    again = load(folder)
    assert again.damaged == verify_engram(folder) == {}
    assert list(again.packs) == ["b", "rest"]
    assert 0 < again.packs["rest"].num_owned <= rows
    assert len(contents(folder)) == 2 + len(files_of_pack(folder, "b")) + len(files_of_pack(folder, "rest"))


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "missing"])
def test_damaged_constants_are_named(saved, kind):
    folder, _ = saved
    path = folder / "engram" / manifest_of(folder)["constants"]["file"]
    damage(path, kind)
    with pytest.raises(OSError, match=rf"^{re.escape(str(path))} is damaged \(.*\); restore it from a good copy\.$"):
        load(folder)


def test_missing_constants_are_named(saved):
    folder, _ = saved
    path = folder / "engram" / manifest_of(folder)["constants"]["file"]
    path.unlink()
    with pytest.raises(OSError, match=rf"^{re.escape(str(path))} is named by the manifest but missing; restore it"):
        load(folder)


def edit_manifest(folder, change):
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "engram" / "manifest.json").write_text(json.dumps(manifest))


def table_of(manifest) -> dict:
    return manifest["packs"][0]["levels"][-1]["tables"][0]


BAD_FILES = ["../x", "../x-0123456789abcdef.safetensors", "/etc/passwd", "a/b-0123456789abcdef.safetensors",
             "manifest.json", ".a-0123456789abcdef.safetensors", "a.safetensors", "", 7, None]  # fmt: skip


@pytest.mark.parametrize("file", BAD_FILES)
@pytest.mark.parametrize("where", ["pack", "constants"])
def test_manifest_cannot_name_a_file_elsewhere(saved, file, where):
    folder, _ = saved
    place = (lambda m: table_of(m)["files"][0]) if where == "pack" else (lambda m: m["constants"])
    edit_manifest(folder, lambda manifest: place(manifest).update(file=file))
    with pytest.raises(OSError, match=r"is no manifest of a memory \(.*\); restore the folder from a good copy\.$"):
        load(folder)


def test_link_to_another_place_is_not_followed(saved, tmp_path):
    folder, engram = saved
    path = files_of_pack(folder, "b")[0]
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    loaded = load(folder)
    assert loaded.damaged == {path.name: "it is a link to another place"}
    assert state(loaded)["a"] == state(engram)["a"]


def test_links_of_the_hubs_cache_are_followed(saved, tmp_path):
    folder, engram = saved
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for path in (snapshot / "engram").iterdir():
        path.rename(blobs / path.name)
        path.symlink_to(f"../../../blobs/{path.name}")
    loaded = load(snapshot)
    assert_same(loaded, engram)
    save_engram(loaded, tmp_path / "copy", SHA)
    assert_same(load(tmp_path / "copy"), engram)
    assert not any(path.is_symlink() for path in (tmp_path / "copy" / "engram").iterdir())


BROKEN_MANIFESTS = [
    "",
    "{",
    "[]",
    "{}",
    "null",
    '{"constants": {}, "packs": [], "schema": 2}',
    "\x80",
    "7",
    '"schema"',
]


@pytest.mark.parametrize("text", BROKEN_MANIFESTS)
def test_broken_manifest_is_named(saved, text):
    folder, _ = saved
    (folder / "engram" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OSError, match=r"manifest\.json is no manifest of a memory \(.*\); restore the folder"):
        load(folder)


def test_every_missing_or_wrong_entry_of_the_manifest_is_named(saved):
    folder, _ = saved
    whole = (folder / "engram" / "manifest.json").read_text()
    places = {
        "top": (lambda m: m, set()),
        "layout": (lambda m: m["layout"], set()),
        "constants": (lambda m: m["constants"], {"rows", "dense"}),
        "pack": (lambda m: m["packs"][1], set()),
        "level": (lambda m: m["packs"][0]["levels"][0], set()),
        "table": (table_of, set()),
        "file": (lambda m: table_of(m)["files"][0], {"rows", "dense"}),
    }
    for place, optional in places.values():
        for key in place(json.loads(whole)).keys() - optional:
            for change in (
                (lambda d, k: d.pop(k)),
                (lambda d, k: d.update({k: -1})),
                (lambda d, k: d.update({k: "x"})),
            ):
                if key == "schema":
                    continue
                edit_manifest(folder, lambda manifest: change(place(manifest), key))  # noqa: B023
                changed = place(manifest_of(folder)).get(key)
                if not (key in ("tokenizer_sha256", "name") and changed == "x"):
                    with pytest.raises(OSError, match=r"is no manifest of a memory \(.*\); restore the folder"):
                        load(folder)
                (folder / "engram" / "manifest.json").write_text(whole)


@pytest.mark.parametrize("name", ["../a", "", 7, None, "b"])
def test_pack_name_in_the_manifest_is_checked(saved, name):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: manifest["packs"][0].update(name=name))
    with pytest.raises(OSError, match=r"is no manifest of a memory \(.*\); restore the folder"):
        load(folder)


def test_content_that_belongs_to_another_table_is_damage(saved):
    folder, _ = saved
    path = files_of_pack(folder, "a")[-1]
    edit_manifest(folder, lambda manifest: table_of(manifest).update(num_rows=128))
    loaded = load(folder)
    assert path.name in loaded.damaged
    assert "slots that are not theirs in a table of 128 rows" in loaded.damaged[path.name]


@pytest.mark.parametrize("schema", [1, 3, "2", None])
def test_other_schema_is_refused(saved, schema):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: manifest.update(schema=schema))
    with pytest.raises(
        ValueError, match=f"has schema {schema}, but this version reads schema 2; use a matching version"
    ):
        load(folder)


def test_memory_of_another_backbone_is_refused(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match=r"for hidden size 24, but the backbone has 32; use the backbone that"):
        load(folder, hidden=32)
    with pytest.raises(
        ValueError, match=r"maps 50 token ids, but the backbone has 51; use the backbone and tokenizer"
    ):
        load(folder, vocab=51)


@pytest.mark.parametrize("call", ["replace", "fsync", "fchmod"])
def test_full_disk_at_any_step_leaves_what_was_there(saved, monkeypatch, call):
    """The n-th call fails, for every n until the save succeeds; nothing but the old state or the new one is left."""
    folder, engram = saved
    write(engram, "a", seed=60)
    write(engram, "c", seed=61)
    before, genuine = contents(folder), getattr(os, call)
    for number in range(100):
        calls = iter(range(1000))

        def fail(*arguments, calls=calls, number=number, **options):
            if next(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return genuine(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            if not _refused(engram, folder):
                break
        if contents(folder) != before:  # it was the last step, of the folder: the new state is there already
            assert call == "fsync"
            assert_same(load(folder), engram)
            before = contents(folder)
    assert number >= 3
    assert_same(load(folder), engram)


def _refused(engram, folder) -> bool:
    try:
        save_engram(engram, folder, SHA)
    except OSError as error:
        return "No space left on device" in str(error)
    return False


def test_leftovers_of_a_killed_save_are_not_read_and_removed_by_the_next(saved):
    folder, engram = saved
    (folder / "engram" / ".saving-xyz").write_bytes(b"half")
    (folder / "engram" / ".saving-dir").mkdir()
    (folder / "engram" / "a-0123456789abcdef.safetensors").write_bytes(b"half")
    (folder / "engram" / ".lock").write_bytes(b"")
    before = contents(folder)
    assert_same(load(folder), engram)
    assert contents(folder) == before
    save_engram(engram, folder, SHA)
    assert_same(load(folder), engram)
    left = {path.name for path in (folder / "engram").iterdir()}
    assert not left & {".saving-xyz", ".saving-dir", "a-0123456789abcdef.safetensors", ".lock"}


def test_memory_that_another_process_changed_is_not_overwritten(saved, tmp_path):
    folder, _ = saved
    first, second = load(folder), load(folder)
    write(first, "a", seed=50)
    write(second, "b", seed=51)
    save_engram(first, folder, SHA)
    before = contents(folder)
    with pytest.raises(
        OSError, match=rf"^The memory in {folder}/engram was changed by another process since it was loaded"
    ):
        save_engram(second, folder, SHA)
    assert contents(folder) == before
    save_engram(second, tmp_path / "elsewhere", SHA)
    assert_same(load(tmp_path / "elsewhere"), second)
    write(first, "a", seed=52)
    save_engram(first, folder, SHA)
    assert_same(load(folder), first)


def test_lock_is_held_by_one_and_a_dead_process_does_not_keep_it(saved):
    folder, engram = saved
    code = """
import sys
from pathlib import Path
from karla_hf.modeling.lock_karla import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(folder / "engram")]
    write(engram, "a", seed=50)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        before = contents(folder)
        with pytest.raises(OSError, match=rf"^Another process is writing to the memory in {folder}/engram; try again"):
            save_engram(engram, folder, SHA)
        assert contents(folder) == before
        load(folder)
        other.kill()
    assert (folder / "engram" / ".lock").exists()
    save_engram(engram, folder, SHA)
    assert not (folder / "engram" / ".lock").exists()
    assert_same(load(folder), engram)


def test_process_forked_from_a_dead_writer_does_not_keep_its_lock(tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from karla_hf.modeling.lock_karla import lock_folder
with lock_folder(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(100)
    print(child, flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        child = int(writer.stdout.readline())
        with pytest.raises(OSError, match="Another process is writing"), lock_folder(tmp_path):
            pass
        writer.kill()
        writer.wait()
        try:
            os.kill(child, 0)  # it lives
            with lock_folder(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_lock_may_be_taken_again_by_its_holder_and_by_no_other_thread(tmp_path):
    refused = []

    def take():
        try:
            with lock_folder(tmp_path):
                pass
        except OSError as error:
            refused.append(str(error))

    with lock_folder(tmp_path):
        with lock_folder(tmp_path):
            pass
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        assert refused
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    take()
    assert len(refused) == 1


def test_reader_that_meets_a_writer_reads_the_new_state(saved, monkeypatch):
    """Between manifest and files, another process commits: the files that the reader looks for are gone."""
    folder, engram = saved
    parse = packs_karla.parse_manifest
    commits = iter(range(3))

    def parse_and_commit(path, data):
        manifest = parse(path, data)
        if next(commits, None) is not None:
            del engram.packs[next(iter(engram.packs))]
            write(engram, "n", seed=90)
            write(engram, "o", seed=91)
            save_engram(engram, folder, SHA)
        return manifest

    monkeypatch.setattr(packs_karla, "parse_manifest", parse_and_commit)
    loaded = load(folder)
    assert next(commits, None) is None
    assert loaded.damaged == {}
    assert_same(loaded, engram)


def test_unreadable_folder_is_named(saved):
    folder, engram = saved
    write(engram, "a", seed=50)
    blocked = folder / "file"
    blocked.write_text("x")
    with pytest.raises(OSError, match="file"):
        save_engram(engram, blocked, SHA)


def test_values_of_every_kind_come_back(tmp_path):
    engram = make_engram(periods=(1,), rows=16)
    names = np.array([1, -1, 2**63 - 1, -(2**63), 5 << 32], np.int64)
    values = torch.tensor([0.0, -0.0, 65504.0, 6e-8, torch.inf]).repeat(16, 1).T.contiguous()
    pack = engram.open_pack("a")
    assert pack.claim(names).all()
    pack.add(names, values)
    save_engram(engram, tmp_path, None)
    assert_same(load(tmp_path), engram)
    assert load_engram(lambda name: str(tmp_path / name), 24, 50)[1] is None
