"""Packs that leave a memory, enter another, and become one."""

import itertools
import re

import numpy as np
import pytest
import torch
from small_engram import VOCAB, assert_same, contents, load, make_engram, state, write

from karla_hf.modeling.exchange_karla import export_pack, import_pack, merge_packs, verify_engram, verify_folder
from karla_hf.modeling.packs_karla import save_engram


SHA = "f" * 64
MADE_WITH = {"backbone": "some/model", "revision": None, "source": None, "seed": 3}


def make(packs=(), **options):
    engram = make_engram(packs, **options)
    engram.made_with = dict(MADE_WITH)
    return engram


@pytest.fixture
def exported(tmp_path):
    """A memory of two packs, and the folder of one of them."""
    engram = make("ab")
    engram.packs["a"].sources += ["x.txt", "y.txt"]
    export_pack(engram, "a", tmp_path / "out", SHA)
    return engram, tmp_path / "out"


def test_exported_pack_enters_another_memory(exported, tmp_path):
    engram, folder = exported
    other = make("c")
    assert import_pack(other, folder, tokenizer_sha256=SHA) == "a"
    assert list(other.packs) == ["c", "a"]
    assert state(other)["a"] == state(engram)["a"]
    save_engram(other, tmp_path / "karla", SHA)
    assert_same(load(tmp_path / "karla"), other)
    assert contents(folder).keys() - {"manifest.json"} <= {
        name.removeprefix("engram/") for name in contents(tmp_path / "karla")
    }


def test_imported_pack_survives_its_folder(exported, tmp_path):
    engram, folder = exported
    other = make()
    import_pack(other, folder, "mine", SHA)
    for path in folder.iterdir():
        path.unlink()
    save_engram(other, tmp_path / "karla", SHA)
    assert state(load(tmp_path / "karla"))["mine"] == state(engram)["a"]


def test_export_leaves_the_memory_as_it_was(tmp_path):
    engram = make("ab")
    save_engram(engram, tmp_path / "karla", SHA)
    write(engram, "a", seed=70)
    before, files = state(engram), contents(tmp_path / "karla")
    export_pack(engram, "a", tmp_path / "out", SHA)
    assert state(engram) == before
    assert contents(tmp_path / "karla") == files
    save_engram(engram, tmp_path / "karla", SHA)
    assert_same(load(tmp_path / "karla"), engram)
    other = make()
    import_pack(other, tmp_path / "out", tokenizer_sha256=SHA)
    assert state(other)["a"] == state(engram)["a"]


def test_round_trip_gives_the_same_files(exported, tmp_path):
    _, folder = exported
    other = make()
    import_pack(other, folder, tokenizer_sha256=SHA)
    export_pack(other, "a", tmp_path / "again", SHA)
    assert contents(tmp_path / "again") == contents(folder)


def test_export_needs_a_new_folder_and_a_pack(exported):
    engram, folder = exported
    before = contents(folder)
    with pytest.raises(OSError, match=rf"^{folder} is not an empty folder; give a new or an empty one\.$"):
        export_pack(engram, "b", folder, SHA)
    with pytest.raises(KeyError, match=r"There is no pack 'x'; the packs are \['a', 'b'\]\."):
        export_pack(engram, "x", folder / "x", SHA)
    assert contents(folder) == before


def test_pack_of_that_name_is_refused(exported):
    _, folder = exported
    other = make("a")
    before = state(other)
    with pytest.raises(ValueError, match="There is a pack 'a' already; give another name, or forget that one first"):
        import_pack(other, folder, tokenizer_sha256=SHA)
    with pytest.raises(ValueError, match=r"The pack name '\.\./x' is not allowed"):
        import_pack(other, folder, "../x", SHA)
    assert state(other) == before
    assert import_pack(other, folder, "second", SHA) == "second"


OTHERS = {
    "hidden size": (make(hidden=32), "hidden size 24 instead of 32"),
    "width": (make(width=8), "row width 16 instead of 8"),
    "periods": (make(periods=(1, 2)), r"update periods \(1, 2, 4\) instead of \(1, 2\)"),
    "token map": (make(token_map=torch.arange(VOCAB) // 3), "another token map"),
    "vocabulary": (make(token_map=torch.arange(VOCAB + 1) // 2), "another token map"),
    "seed": (make(seed=4), "another seed"),
}


@pytest.mark.parametrize(("other", "reason"), OTHERS.values(), ids=OTHERS)
def test_pack_that_does_not_fit_is_refused_with_the_reason(exported, other, reason):
    _, folder = exported
    wanted = rf"^The pack in {folder} was made with {reason}, so it does not fit this memory\.$"
    with pytest.raises(ValueError, match=wanted):
        import_pack(other, folder, tokenizer_sha256=SHA)
    assert other.packs == {}


def test_pack_of_another_tokenizer_backbone_or_schema_is_refused(exported):
    _, folder = exported
    with pytest.raises(ValueError, match="was made with another tokenizer, so"):
        import_pack(make(), folder, tokenizer_sha256="0" * 64)
    other = make()
    other.made_with["backbone"] = "other/model"
    with pytest.raises(ValueError, match="was made with the backbone 'some/model' instead of 'other/model', so"):
        import_pack(other, folder, tokenizer_sha256=SHA)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(ValueError, match="has schema 1, but this version reads schema 2"):
        import_pack(make(), folder, tokenizer_sha256=SHA)


def test_pack_of_another_revision_or_copy_is_taken_with_a_warning(exported, caplog):
    _, folder = exported
    other = make()
    other.made_with.update(revision="v2", source="converted")
    import_pack(other, folder, tokenizer_sha256=SHA)
    messages = [record.getMessage() for record in caplog.records]
    assert [re.match(r"Pack 'a' was made with (\w+) 'official' of the backbone", message)[1] for message in messages] == [
        "revision", "copy"
    ]  # fmt: skip


@pytest.mark.parametrize("at", [30, -1])
def test_damaged_export_is_refused(exported, at):
    _, folder = exported
    for path in sorted(folder.glob("*.safetensors")):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(OSError, match=rf"^{path} is damaged \(its content is not .*\); get the pack again\.$"):
            import_pack(make(), folder, tokenizer_sha256=SHA)
        path.write_bytes(whole)
    import_pack(make(), folder, tokenizer_sha256=SHA)
    with pytest.raises(OSError, match=r"has no manifest\.json, so it is no exported pack"):
        import_pack(make(), folder / "none", tokenizer_sha256=SHA)


def test_folder_of_several_packs_is_no_export(tmp_path):
    save_engram(make("ab"), tmp_path, SHA)
    with pytest.raises(ValueError, match="holds 2 packs; give a folder that an export made"):
        import_pack(make(), tmp_path / "engram", tokenizer_sha256=SHA)


def naive_merge(engram, names) -> dict[int, np.ndarray]:
    sums: dict[int, np.ndarray] = {}
    for pack in names:
        for level in engram.packs[pack].levels:
            for table in level.tables:
                for name, row in zip(*table.items(), strict=True):
                    sums[int(name)] = sums.get(int(name), 0) + row.astype(np.float64)
    return {name: row.astype(np.float16) for name, row in sums.items()}


@pytest.mark.parametrize("rows", [8, 4096])
def test_merged_rows_are_sums_whatever_the_order(tmp_path, rows):
    states, files = [], []
    for order in itertools.permutations("abc"):
        engram = make("abcd", rows=rows)
        for pack in engram.packs.values():
            pack.sources.append(f"{pack.tokens}.txt")
        expected = naive_merge(engram, "abc")
        merge_packs(engram, order, "all")
        assert list(engram.packs) == ["d", "all"]
        merged = engram.packs["all"]
        found = dict(zip(*map(list, merged.levels[-1].items()), strict=True))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], row) for name, row in expected.items())
        assert (merged.tokens, merged.clock.step, len(merged.sources)) == (180, 15, 3)
        states.append(state(engram))
        save_engram(engram, tmp_path / "".join(order), SHA)
        files.append(contents(tmp_path / "".join(order)))
    assert all(other == states[0] for other in states)
    assert all(other == files[0] for other in files)


def test_merged_pack_reads_like_the_stack_and_learns_on():
    engram = make("ab", rows=4096)
    names = torch.from_numpy(np.arange(1, 1500).reshape(-1, 1) * 7919 * 10**12 + 13).repeat(1, 2)
    before = engram.read(names)
    merge_packs(engram, ["a", "b"], "a")
    torch.testing.assert_close(engram.read(names), before, atol=4e-3, rtol=2e-3)
    assert before.any()
    write(engram, "a", seed=3)


def test_sums_beyond_half_precision_stay_finite():
    engram = make(rows=16)
    names = np.array([1 << 33])
    for pack in "ab":
        engram.open_pack(pack).claim(names)
        engram.packs[pack].add(names, torch.full((1, 16), 60000.0))
    merge_packs(engram, "ab", "c")
    assert (engram.packs["c"].levels[-1].items()[1] == 65504).all()


def test_merge_refuses_what_it_cannot_do():
    engram = make("abc")
    before = state(engram)
    with pytest.raises(KeyError, match="There is no pack 'x'"):
        merge_packs(engram, ["a", "x"], "all")
    with pytest.raises(ValueError, match="There is a pack 'c' already; merge it too, or give another name"):
        merge_packs(engram, ["a", "b"], "c")
    with pytest.raises(ValueError, match="is not allowed"):
        merge_packs(engram, ["a", "b"], "a/b")
    with pytest.raises(ValueError, match="No packs to merge were named"):
        merge_packs(engram, [], "all")
    assert state(engram) == before


def test_merging_empty_packs_gives_an_empty_one(tmp_path):
    engram = make()
    engram.open_pack("a"), engram.open_pack("b")
    merge_packs(engram, "ab", "c")
    save_engram(engram, tmp_path, None)
    assert load(tmp_path).packs["c"].num_owned == 0


def test_verify_finds_what_loading_may_skip(tmp_path, monkeypatch):
    monkeypatch.setattr("karla_hf.modeling.files_karla.CHECKED_BYTES", 0)
    engram = make("a")
    save_engram(engram, tmp_path, SHA)
    assert verify_engram(tmp_path) == {}
    path = next((tmp_path / "engram").glob("a-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load(tmp_path).damaged == {}
    assert verify_folder(tmp_path / "engram") == {path.name: "its content is not what was written"}
