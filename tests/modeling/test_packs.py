"""The memory on disk: what is saved comes back, only what changed is written, a table never has many files."""

import os
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_engram import assert_same, contents, files_of_pack, load, make_engram, manifest_of, state, write

from karla_hf.modeling import files_karla, stored_table_karla
from karla_hf.modeling.files_karla import StoredFile
from karla_hf.modeling.manifest_karla import check_pack_name
from karla_hf.modeling.packs_karla import load_engram, save_engram
from karla_hf.modeling.stored_table_karla import first_to_merge


SHA = "f" * 64


@pytest.fixture
def saved(tmp_path):
    """A folder with a memory of two packs, and that memory."""
    engram = make_engram("ab")
    save_engram(engram, tmp_path, SHA)
    return tmp_path, engram


def times(folder) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "engram").iterdir()}


@pytest.mark.parametrize("packs", [(), ("a",), ("z", "a", "m")])
@pytest.mark.parametrize("layout", [{}, {"rows": 8}, {"rows": 8, "max_rows": 24}, {"periods": (1,)}, {"width": 3}])
def test_saved_memory_comes_back_exactly(tmp_path, packs, layout):
    engram = make_engram(packs, **layout)
    for pack in engram.packs.values():
        pack.sources += ["Über.txt", "b"]
    save_engram(engram, tmp_path, SHA)
    loaded, tokenizer_sha256 = load_engram(lambda name: str(tmp_path / name), 24, 50)
    assert_same(loaded, engram)
    assert tokenizer_sha256 == SHA
    assert loaded.damaged == {}
    for seed in range(5):
        for pack in packs:
            write(engram, pack, seed=100 + seed)
            write(loaded, pack, seed=100 + seed)
    assert_same(loaded, engram)


def test_tables_that_grew_and_lost_names_come_back(tmp_path):
    engram = make_engram("a", rows=8, max_rows=24)
    slowest = engram.packs["a"].levels[-1]
    assert len(slowest.tables) == 2
    assert slowest.lost > 0
    save_engram(engram, tmp_path, None)
    assert_same(load(tmp_path), engram)


def test_empty_pack_comes_back(tmp_path):
    engram = make_engram()
    engram.open_pack("empty")
    save_engram(engram, tmp_path, None)
    assert_same(load(tmp_path), engram)
    assert files_of_pack(tmp_path, "empty") == []


def test_folder_without_a_memory_gives_none(tmp_path):
    assert load_engram(lambda name: None, 24, 50) is None


def test_saving_again_writes_nothing(saved):
    folder, engram = saved
    before, old = contents(folder), times(folder)
    save_engram(engram, folder, SHA)
    save_engram(load(folder), folder, SHA)
    assert contents(folder) == before
    assert times(folder) == old


def test_what_nothing_names_any_more_is_removed(saved):
    folder, engram = saved
    old = files_of_pack(folder, "b")
    del engram.packs["b"]
    (folder / "engram" / "notes.txt").write_text("not ours")
    save_engram(engram, folder, SHA)
    assert not any(path.exists() for path in old)
    names = {path.name for path in (folder / "engram").iterdir()}
    files = {path.name for path in files_of_pack(folder, "a")}
    assert names == files | {"manifest.json", manifest_of(folder)["constants"]["file"], "notes.txt"}
    assert_same(load(folder), engram)


def test_only_what_changed_is_written(saved):
    folder, engram = saved
    before, old = contents(folder), times(folder)
    table = engram.packs["a"].levels[-1].tables[0]
    (slots,) = np.nonzero(table.names.reshape(-1))
    names = table.names.reshape(-1)[slots[:3]]
    table.add(names, torch.ones(3, 16))
    save_engram(engram, folder, SHA)
    (new,) = contents(folder).keys() - before.keys()
    stored = load_file(folder / new)
    assert sorted(stored["names"]) == sorted(names)
    assert np.array_equal(stored["rows"], table.rows[stored["slots"]])
    kept = {name: time for name, time in times(folder).items() if name != "manifest.json" and name in old}
    assert kept.items() <= old.items()
    assert len(kept) == len(old) - 1
    assert_same(load(folder), engram)


def test_level_that_was_emptied_has_no_file(tmp_path):
    engram = make_engram("a")  # five steps: the fastest level holds one of them
    save_engram(engram, tmp_path, None)
    fast = files_of_pack(tmp_path, "a")[0]
    for seed in range(3):
        write(engram, "a", seed=50 + seed)
    save_engram(engram, tmp_path, None)
    assert [level.num_owned for level in engram.packs["a"].levels[:2]] == [0, 0]
    assert not fast.exists()
    assert_same(load(tmp_path), engram)


@pytest.mark.parametrize("dense", [False, True])
def test_a_hundred_saves_leave_few_files_and_the_same_memory(tmp_path, monkeypatch, dense):
    monkeypatch.setattr(stored_table_karla, "DENSE_BYTES", 0 if dense else 1 << 60)
    engram = make_engram()
    names = torch.from_numpy(np.arange(1, 1500).reshape(-1, 1) * 7919 * 10**12 + 13).repeat(1, 2)
    for seed in range(100):
        write(engram, "a", seed=seed, count=6)
        save_engram(engram, tmp_path, None)
        loaded = load(tmp_path)
        assert_same(loaded, engram)
        assert torch.equal(loaded.read(names), engram.read(names))
        assert all(len(table["files"]) <= 10 for table in manifest_of(tmp_path)["packs"][0]["levels"][-1]["tables"])
        if seed % 7 == 0:
            engram = loaded
    files = manifest_of(tmp_path)["packs"][0]["levels"][-1]["tables"][0]["files"]
    assert files[0]["dense"] is dense
    assert not any(file["dense"] for file in files[1:])


def test_merging_leaves_large_files_alone():
    def first(sizes, fresh):
        return first_to_merge([StoredFile("", "", 0, rows) for rows in sizes], fresh)

    assert first([], 5) == 0
    assert first([1], 1) == 1
    assert first([1] * 8, 1) == 0
    assert first([1000] + [1] * 8, 1) == 1
    assert first([1000] + [1] * 8, 0) == 9
    assert first([20, 10, *[1] * 8], 2) == 0
    assert first([2**k for k in range(12, 3, -1)], 1) == 9


def test_a_thousand_equal_writes_are_written_a_few_times_each():
    files, written = [], 0
    for _ in range(1000):
        first = first_to_merge(files, 1)
        rows = 1 + sum(stored.rows for stored in files[first:])
        files = [*files[:first], StoredFile("", "", 0, rows)]
        written += rows
    assert len(files) <= 12
    assert written <= 12 * 1000


def test_dense_table_is_mapped_and_its_file_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_table_karla, "DENSE_BYTES", 0)
    engram = make_engram("a", periods=(1,), rows=128)
    save_engram(engram, tmp_path, None)
    (path,) = files_of_pack(tmp_path, "a")
    before = path.read_bytes()
    stored = load_file(path)
    table = engram.packs["a"].levels[0].tables[0]
    assert np.array_equal(stored["names"], table.names)
    assert np.array_equal(stored["rows"], table.rows)
    assert (8 + int.from_bytes(before[:8], "little")) % 64 == 0
    loaded = load(tmp_path)
    mapped = loaded.packs["a"].levels[0].tables[0]
    assert not mapped.rows.flags.owndata
    assert mapped.names.ctypes.data % 64 == mapped.rows.ctypes.data % 64 == 0
    write(loaded, "a", seed=77)
    assert path.read_bytes() == before
    save_engram(loaded, tmp_path, None)
    assert path.read_bytes() == before
    assert len(files_of_pack(tmp_path, "a")) == 2
    assert_same(load(tmp_path), loaded)


def test_nothing_of_what_a_level_forgot_is_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_table_karla, "DENSE_BYTES", 0)
    engram = make_engram("a", periods=(1,), rows=16)
    table = engram.packs["a"].levels[0].tables[0]
    table.clear()
    assert table.rows.any()
    table.claim(np.arange(1, 9) << 33)
    save_engram(engram, tmp_path, None)
    assert not load_file(files_of_pack(tmp_path, "a")[0])["rows"].any()


@pytest.mark.parametrize("linked", [False, True])
def test_another_folder_gets_everything_and_the_first_can_be_saved_to_again(saved, tmp_path, monkeypatch, linked):
    monkeypatch.setattr(files_karla, "LINKED_BYTES", 0 if linked else 1 << 60)
    first, engram = saved
    other = tmp_path / "other"
    write(engram, "a", seed=90)
    save_engram(engram, other, SHA)
    assert_same(load(other), engram)
    assert load(first).packs["a"].tokens < engram.packs["a"].tokens
    shared = {path.stat().st_ino for path in (first / "engram").iterdir()}
    assert bool(shared & {path.stat().st_ino for path in (other / "engram").iterdir()}) is linked
    save_engram(engram, first, SHA)
    assert_same(load(first), engram)
    assert contents(first / "engram") == contents(other / "engram")


def test_folder_that_vanished_is_made_up_for(saved, tmp_path):
    first, engram = saved
    save_engram(engram, tmp_path / "other", SHA)
    write(engram, "a", seed=90)
    save_engram(engram, tmp_path / "other", SHA)
    for path in (tmp_path / "other" / "engram").iterdir():
        path.unlink()
    for path in files_of_pack(first, "b"):
        path.unlink()
    save_engram(engram, first, SHA)
    assert_same(load(first), engram)


def test_table_on_arrays_of_its_own_is_saved(tmp_path):
    engram = make_engram("a", periods=(1,))
    table = engram.packs["a"].levels[0].tables[0]
    engram.packs["a"].levels[0].tables[0] = type(table).from_arrays(table.names, table.rows, table.num_owned)
    save_engram(engram, tmp_path, None)
    assert_same(load(tmp_path), engram)


def test_manifest_tells_what_a_pack_is(tmp_path):
    engram = make_engram("a")
    engram.made_with = {"backbone": "some/model", "revision": "main", "source": None, "seed": 3}
    engram.packs["a"].sources.append("notes.txt")
    save_engram(engram, tmp_path, SHA)
    manifest = manifest_of(tmp_path)
    assert (manifest["schema"], manifest["hidden_size"], manifest["tokenizer_sha256"]) == (2, 24, SHA)
    assert manifest["layout"] == {
        "width": 16, "chunk_size": 4, "update_periods": [1, 2, 4], "num_rows": 64, "max_rows": None
    }  # fmt: skip
    (entry,) = manifest["packs"]
    assert entry["made_with"] == engram.made_with
    assert (entry["sources"], entry["tokens"], entry["step"]) == (["notes.txt"], 60, 5)
    assert entry["rows"] == engram.packs["a"].num_owned
    files = [file for level in entry["levels"] for table in level["tables"] for file in table["files"]]
    for file in (manifest["constants"], *files):
        assert re.fullmatch("[0-9a-f]{64}", file["sha256"])
        assert file["file"].endswith(f"-{file['sha256'][:16]}.safetensors")
        assert os.path.getsize(tmp_path / "engram" / file["file"]) == file["size"]
    constants = load_file(tmp_path / "engram" / manifest["constants"]["file"])
    assert set(constants) == {
        "multipliers", "token_map", "pad_id", "orders", "weights", "sentences", "boundaries"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 64])
def test_allowed_pack_names(name, tmp_path):
    check_pack_name(name)
    engram = make_engram([name])
    save_engram(engram, tmp_path, None)
    assert_same(load(tmp_path), engram)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "../a", "a b", "ä", "x" * 65, "a\n", None, 7])
def test_other_pack_names_are_refused(name):
    with pytest.raises(ValueError, match=r"is not allowed; use letters, digits"):
        check_pack_name(name)


@pytest.mark.parametrize("name", ["constants", "manifest.json", "CON"])
def test_pack_may_be_called_like_another_file(tmp_path, name):
    engram = make_engram([name])
    save_engram(engram, tmp_path, None)
    assert_same(load(tmp_path), engram)


def test_saving_does_not_change_the_memory(saved, tmp_path):
    _, engram = saved
    before = state(engram)
    save_engram(engram, tmp_path / "x", SHA)
    assert state(engram) == before
