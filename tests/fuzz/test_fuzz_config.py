"""Damaged configurations, and weights of the head whose header lies."""

import json
import shutil

from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_safetensors, damaged_text
from sandbox import cases

from karla_hf.checkpoints import load_checkpoint, load_memory
from karla_hf.info import _checkpoint_bytes


@cases(250)
@given(data=st.data())
def test_configuration(data, valid, sandbox):
    folder = sandbox.fill(valid / "memory")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(data.draw(damaged_text(config)))
    sandbox.run(lambda: load_memory(folder))


@cases(150)
@given(data=st.data())
def test_sizes_of_weights(data, valid, sandbox):
    sandbox.folder.mkdir(exist_ok=True)
    content = (valid / "karla" / "model.safetensors").read_bytes()
    (sandbox.folder / "model.safetensors").write_bytes(data.draw(damaged_safetensors(content)))
    sandbox.run(lambda: _checkpoint_bytes(sandbox.folder, ("model.ctm.",)))


@cases(20)
@given(data=st.data())
def test_weights(data, valid, sandbox):
    shutil.rmtree(sandbox.folder, ignore_errors=True)
    shutil.copytree(valid / "karla", sandbox.folder)
    path = sandbox.folder / "model.safetensors"
    path.write_bytes(data.draw(damaged_safetensors(path.read_bytes())))
    sandbox.run(lambda: load_checkpoint(sandbox.folder))
