"""What damaged files did before they were checked: one small test for each."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from karla_hf.arguments import parse_recipe
from karla_hf.checkpoints import load_checkpoint, load_config
from karla_hf.corpora import _read_rows
from karla_hf.facts import read_facts
from karla_hf.info import _checkpoint_bytes
from karla_hf.line_editor import LineEditor
from karla_hf.modeling.constants_karla import read_constants
from karla_hf.modeling.files_karla import DamagedError
from karla_hf.modeling.manifest_karla import parse_manifest
from karla_hf.modeling.stored_table_karla import _mapped_table, _some_rows


DEEP = "[" * 100_000


@pytest.fixture
def copy(valid, tmp_path):
    return shutil.copytree(valid / "memory", tmp_path / "memory")


@pytest.fixture
def constants():
    return {
        "multipliers": np.array([3, 5, 7]), "token_map": np.array([0, 1, 1, 2]), "boundaries": np.zeros(4, np.uint8),
        "pad_id": np.array([0]), "orders": np.array([2, 3]), "weights": np.array([0.5, 0.5]),
        "sentences": np.array([0, 1], np.uint8), "token_texts": np.frombuffer(b"abcd", np.uint8),
        "token_text_ends": np.array([1, 2, 3, 4]), "reply_marker": np.array([1]),
    }  # fmt: skip


WRONG_CONSTANTS = {
    "an order beyond the multipliers, which C would read": ("orders", np.array([2, 4]), "orders"),
    "an order of nothing": ("orders", np.array([0, 3]), "orders"),
    "no family": ("orders", np.array([], np.int64), "families"),
    "more families than coordinates take": ("orders", np.full(99, 2), "families"),
    "a weight that is no number": ("weights", np.array([0.5, np.nan]), "weights"),
    "a weight too few": ("weights", np.array([0.5]), "one order, weight and kind each"),
    "two padding tokens": ("pad_id", np.array([0, 1]), "one order, weight and kind each"),
    "floats for ids": ("token_map", np.array([0.0, 1.0, 1.0, 2.0]), "token_map is float64"),
    "a table for a column": ("multipliers", np.ones((3, 3), np.int64), "multipliers is int64 with 2 axes"),
    "a token without a boundary": ("boundaries", np.zeros(3, np.uint8), "do not fit each other"),
    "an id below 0": ("token_map", np.array([0, -1, 1, 2]), "do not fit each other"),
    "texts that end before they begin": ("token_text_ends", np.array([1, 3, 2, 4]), "do not fit their ends"),
    "texts beyond the last": ("token_text_ends", np.array([1, 2, 3, 5]), "do not fit their ends"),
}


@pytest.mark.parametrize(("name", "value", "message"), WRONG_CONSTANTS.values(), ids=WRONG_CONSTANTS.keys())
def test_constants_are_checked_before_c_reads_them(constants, name, value, message):
    read = read_constants(constants, 8, 4)
    assert read[1][1].order == 3
    assert read[2].text([0, 3]) == "ad"
    with pytest.raises(DamagedError, match=message):
        read_constants({**constants, name: value}, 8, 4)
    with pytest.raises(DamagedError, match=rf"has no {name}$"):
        read_constants({key: column for key, column in constants.items() if key != name}, 8, 4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 65, "its rows have 65 of 64 coordinates"),
        ("width", 0, "its rows have 0 of 64"),
        ("update_periods", [1, 8, 12], "update_periods is"),
        ("update_periods", [2, 4, 8], "update_periods is"),
        ("update_periods", [1, "8", 64], "update_periods is"),
        ("chunk_size", 2**40, "positions"),
        ("chunk_size", 0, "positions"),
        ("num_rows", 2**60, "larger than the memory of this machine"),
        ("num_rows", 0, "num_rows is 0"),
        ("more", 1, "unexpected keyword"),
    ],
)
def test_a_layout_that_no_memory_has_is_refused(copy, key, value, message):
    path = copy / "engram" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["layout"][key] = value
    with pytest.raises(OSError, match=rf"is no manifest of a memory \(.*{message}.*\); restore the folder"):
        parse_manifest(path, json.dumps(manifest).encode())


def test_a_table_larger_than_the_machine_is_refused(copy):
    path = copy / "engram" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["packs"][0]["levels"][0]["tables"][0]["num_rows"] = 2**50
    with pytest.raises(OSError, match=r"a table of 1125899906842624 rows is larger than the memory of this machine"):
        parse_manifest(path, json.dumps(manifest).encode())
    with pytest.raises(OSError, match="is no manifest of a memory"):
        parse_manifest(path, DEEP.encode())


def test_tables_of_other_kinds_of_numbers_are_refused():
    names, rows = np.zeros((2, 8), np.int64), np.zeros((16, 4), np.float16)
    assert len(_mapped_table({"names": names, "rows": rows}, _stored(), 16, 4)) == 16
    wrong = {"names": names.astype(np.uint8)}, {"names": names.reshape(-1)}, {"rows": rows.astype(np.float64)}
    for change in wrong:
        with pytest.raises(DamagedError, match="does not hold the names of a table and its rows"):
            _mapped_table({"names": names, "rows": rows, **change}, _stored(), 16, 4)
    some = {"slots": np.arange(3), "names": np.arange(3), "rows": rows[:3]}
    assert len(_some_rows(some, 4)[0]) == 3
    for name, value in (("slots", np.zeros(3)), ("names", np.arange(2)), ("rows", rows[:2]), ("rows", rows[:3, :2])):
        with pytest.raises(DamagedError, match="does not hold a slot and a name for each of its rows"):
            _some_rows({**some, name: value}, 4)
    with pytest.raises(DamagedError, match="does not hold a slot"):
        _some_rows({}, 4)


def _stored():
    from karla_hf.modeling.files_karla import StoredFile

    return StoredFile("a-" + "0" * 16 + ".safetensors", "0" * 64, 1, rows=3, dense=True)


def test_json_with_too_many_digits_or_brackets_is_refused(tmp_path):
    for number, line in enumerate((DEEP, "9" * 5000)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line)
        with pytest.raises(ValueError, match=r"line 1 is JSON with too many digits or brackets; write one"):
            read_facts(path)
        with pytest.raises(ValueError, match=r"line 1 is JSON with too many digits or brackets; correct the line\.$"):
            _read_rows(path)
        assert LineEditor(path).lines == []
    (tmp_path / "history").write_text('"\\ud800"\n"a\\u0000b"\n"good"\n')
    assert LineEditor(tmp_path / "history").lines == ["good"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x]\nb: *a\n", "a recipe takes no aliases; write the value out"),
        ("a: &a [*a]\n", "a recipe takes no aliases; write the value out"),
        ("[" * 5000, "it is nested too deeply"),
        ("max_steps: 1" + "0" * 5000, "is not YAML"),
        (
            "{model_name_or_path: a, dataset_name: b, max_steps: 0x" + "f" * 5000 + "}",
            r"recipe\.yaml: Exceeds the limit",
        ),
        ("7: 1", "has a key that is a int, but keys are words"),
        ("date: 2001-99-99", "is not YAML"),
        ("x: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("{model_name_or_path: a, dataset_name: b, bf16: false, held_out_share: [1]}", r"recipe\.yaml: '<' not"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "change",
    [{"text_config": 7}, {"text_config": {"model_type": "llama", "hidden_size": "x"}}, {"text_config": {"model_type": "no"}},
     {"engram_num_heads": "8"}, {"ctm_source_layers": {"a": 1}}, {"engram_families": 3}],
)  # fmt: skip
def test_a_configuration_with_values_of_other_kinds_is_refused(copy, change):
    from karla_hf.errors import as_sentence

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which of the closed list, the next line says
        load_config(copy)
    assert as_sentence(caught.value)


def test_a_configuration_that_is_nested_too_deeply_is_refused(copy):
    (copy / "config.json").write_text(DEEP)
    with pytest.raises(OSError, match=r"config\.json is no JSON object"):
        load_config(copy)


def test_a_header_longer_than_its_file_is_not_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(OSError, match=r"model\.safetensors is damaged \(.*\); restore it from a good copy\.$"):
        _checkpoint_bytes(tmp_path, ("model.ctm.",))


def test_a_head_with_missing_weights_is_refused(valid, tmp_path):
    folder = shutil.copytree(valid / "karla", tmp_path / "karla")
    weights = load_file(folder / "model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lack 1 of the head, such as model\.ctm\..*; restore them from a good copy\.$"):
        load_checkpoint(folder)
