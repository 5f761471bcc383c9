"""Valid files to damage, and the folder to do it in."""

import shutil

import pytest
from sandbox import Sandbox
from tiny import save_backbone, save_karla

from karla_hf.checkpoints import load_checkpoint


TEXT = "The mill of Brivo was founded on 3 May 1811. The bridge of Kelo was founded on 9 June 1790."


@pytest.fixture(scope="session")
def valid(tmp_path_factory):
    """A folder with a Karla, `karla`, whose memory holds the packs a and b; `memory`, that alone; `pack`, a exported."""
    root = tmp_path_factory.mktemp("valid")
    folder = save_karla(root / "karla", save_backbone(root / "backbone"), engram_rows_per_head=64)
    model, tokenizer = load_checkpoint(folder)
    for name in "ab":
        model.read([TEXT, TEXT[45:]], tokenizer, pack=name, title=f"{name}.txt", progress=False)
        model.save_memory(folder)
    model.export_pack("a", root / "pack")
    shutil.copytree(folder / "engram", root / "memory" / "engram")
    shutil.copy(folder / "config.json", root / "memory")
    return root


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory):
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


def pytest_collection_modifyitems(items):
    """Count at the end."""
    items.sort(key=lambda item: item.name == "test_enough_cases_were_run")
