"""Checkpoints that are damaged, belong to something else, or could not be written."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from karla_hf import KarlaForCausalLM


IDS = torch.arange(2, 40)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_moved_backbone_is_named(saved, backbone_folder):
    shutil.rmtree(backbone_folder)
    with pytest.raises(
        OSError, match=rf"^The backbone '{re.escape(str(backbone_folder))}' is neither a folder here nor"
    ):
        KarlaForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_named(saved, size):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(
        OSError, match=rf"^The weights in {re.escape(str(saved))} are damaged .*; restore them from a good"
    ):
        KarlaForCausalLM.from_pretrained(saved)


def test_missing_weights_are_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        KarlaForCausalLM.from_pretrained(saved)


def files_of(folder, name) -> list[Path]:
    """The files of a pack; the slowest level's last."""
    manifest = json.loads((folder / "engram" / "manifest.json").read_text())
    (pack,) = (pack for pack in manifest["packs"] if pack["name"] == name)
    tables = [table for level in pack["levels"] for table in level["tables"]]
    return [folder / "engram" / file["file"] for table in tables for file in table["files"]]


@pytest.mark.parametrize("missing", [False, True])
def test_damaged_pack_is_named_and_the_rest_loads(named, saved, caplog, remember, missing):
    whole = {path: path.read_bytes() for path in files_of(saved, "second")}
    for path, data in whole.items():
        path.unlink() if missing else path.write_bytes(data[:-8])
    loaded = KarlaForCausalLM.from_pretrained(saved)
    messages = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert [message.partition(" is damaged (")[0] for message in messages] == [str(path) for path in whole]
    assert loaded.engram.damaged.keys() == {path.name for path in whole}
    named.forget("second")
    assert torch.equal(logits(loaded), logits(named))
    with pytest.raises(OSError, match=r"^The pack 'second' is damaged: .*; restore it from a good copy, merge"):
        remember(loaded, IDS + 50, pack="second")
    remember(loaded, IDS + 50, pack="third")
    loaded.save_pretrained(saved)
    for path, data in whole.items():
        path.write_bytes(data)
    mended = KarlaForCausalLM.from_pretrained(saved)
    assert (mended.engram.damaged, list(mended.packs())) == ({}, ["default", "second", "third"])


def test_manifest_that_names_a_file_elsewhere_is_refused(saved):
    path = saved / "engram" / "manifest.json"
    file = files_of(saved, "second")[0]
    shutil.copy(file, saved / file.name)
    path.write_text(path.read_text().replace(f'"{file.name}"', f'"../{file.name}"'))
    with pytest.raises(OSError, match=rf"is no manifest of a memory \('\.\./{file.name}' is no name of a file in its"):
        KarlaForCausalLM.from_pretrained(saved)


def test_checkpoint_without_a_memory_loads_empty(named, saved):
    shutil.rmtree(saved / "engram")
    assert KarlaForCausalLM.from_pretrained(saved).packs() == {}


@pytest.mark.parametrize("other", [{"hidden_size": 96}, {"vocab_size": 301}, {"num_hidden_layers": 2}])
def test_backbone_that_changed_is_refused(saved, backbone_folder, make_backbone, other):
    shutil.rmtree(backbone_folder)
    make_backbone(**other).save_pretrained(backbone_folder)
    ((name, value),) = other.items()
    with pytest.raises(
        ValueError, match=rf"^The backbone .* has {name} {value}, but memory and head .*; use the backbone"
    ):
        KarlaForCausalLM.from_pretrained(saved)


def test_memory_of_another_backbone_is_refused(saved, make_backbone, make_karla, tmp_path):
    make_karla(make_backbone(hidden_size=96)).save_memory(saved)
    with pytest.raises(
        ValueError, match=r"is a memory for hidden size 96, but the backbone has 64; use the backbone that"
    ):
        KarlaForCausalLM.from_pretrained(saved)


def test_another_tokenizer_is_refused_after_loading(saved, tokenizer, words):
    loaded = KarlaForCausalLM.from_pretrained(saved)
    other = AutoTokenizer.from_pretrained(saved)
    other.add_tokens(["new"])
    with pytest.raises(
        ValueError, match="has another vocabulary than the one that this memory was made with; use the"
    ):
        loaded.read(words(IDS[0]), other)
    loaded.read(words(IDS[0]), tokenizer, progress=False)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("step", ["weights", "rename", "memory"])
def test_full_disk_leaves_what_was_there(named, saved, monkeypatch, remember, step):
    before, expected = contents(saved), logits(named)
    torch.nn.init.normal_(named.model.ctm.up.weight)
    remember(named, IDS + 60, pack="default")
    with monkeypatch.context() as patch:
        if step == "weights":
            patch.setattr("transformers.modeling_utils.safe_save_file", full_disk_in_safetensors)
        elif step == "rename":
            patch.setattr(os, "replace", full_disk)
        else:
            patch.setattr("karla_hf.modeling.files_karla.tempfile.mkstemp", full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            named.save_pretrained(saved)
    after = contents(saved)
    if step == "memory":  # the head is written whole by then, the memory is the one before
        after["model.safetensors"] = before["model.safetensors"]
    assert after == before
    loaded = KarlaForCausalLM.from_pretrained(saved)
    if step != "memory":
        assert torch.equal(logits(loaded), expected)
    named.save_pretrained(saved)
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(saved)), logits(named))


def test_really_failing_writes_leave_what_was_there(named, saved):
    """In a process that may not write more than 64 kB to a file: first the weights fail, then a pack."""
    before = contents(saved)
    code = """
import resource, signal, sys
import numpy as np
from karla_hf import KarlaForCausalLM
karla = KarlaForCausalLM.from_pretrained(sys.argv[1])
karla.engram.open_pack("large").claim(np.arange(1, 2000) * 0x1E3779B97F4A7C1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for save in (karla.save_pretrained, karla.save_memory):
    try:
        save(sys.argv[1])
    except OSError as error:
        print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, timeout=300)
    refusals = re.findall(r"^refused: .*(?:cannot be written|File too large).*$", done.stdout, re.MULTILINE)
    assert len(refusals) == 2, done.stdout + done.stderr
    assert contents(saved) == before
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(saved)), logits(named))
