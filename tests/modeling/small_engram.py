"""Small memories without a backbone, and folders that hold them: what storage is tested on."""

import json
from pathlib import Path

import numpy as np
import torch

from karla_hf.modeling.engram_karla import Engram
from karla_hf.modeling.hashing_karla import NgramFamily, name_constants
from karla_hf.modeling.levels_karla import EngramLayout
from karla_hf.modeling.packs_karla import load_engram


HIDDEN, VOCAB, WIDTH = 24, 50, 16


def make_engram(packs=(), *, rows=64, periods=(1, 2, 4), width=WIDTH, hidden=HIDDEN, seed=3, token_map=None, **layout):
    """A memory; every pack it is given has been written to."""
    token_map = torch.arange(VOCAB) // 2 if token_map is None else token_map
    boundaries = (torch.arange(len(token_map)) % 5).to(torch.uint8)
    constants = name_constants(3, token_map, boundaries, pad_id=7, seed=seed)
    families = [NgramFamily(2, 0.4), NgramFamily(3, 0.6, sentence=True)]
    engram = Engram(constants, families, EngramLayout(hidden, width, 4, periods, rows, **layout))
    for number, pack in enumerate(packs):
        for step in range(5):
            write(engram, pack, seed=10 * number + step)
    return engram


def write(engram, pack, seed=0, count=12):
    """Write random rows of random names, some of them known, in one step of the clock."""
    random = np.random.default_rng(seed)
    names = np.unique(random.integers(1, 1500, count)) * 7919 * 10**12 + 13
    pack = engram.open_pack(pack)
    kept = names[pack.claim(names)]
    pack.add(kept, torch.from_numpy(random.standard_normal((len(kept), engram.layout.width), np.float32)))
    pack.tick()
    pack.tokens += count


def state(engram) -> dict:
    """All that a memory holds, to be compared; rows by their slots."""
    packs = {}
    for name, pack in engram.packs.items():
        tables = [
            (
                table.names.tobytes(),
                np.where(table.names.reshape(-1, 1) != 0, table.rows, 0).tobytes(),
                table.num_owned,
            )
            for level in pack.levels
            for table in level.tables
        ]
        lost = [level.lost for level in pack.levels]
        packs[name] = (tables, lost, pack.clock.step, list(pack.sources), pack.tokens)
    return packs


def find_in(folder):
    return lambda name: str(folder / name) if (folder / name).exists() else None


def load(folder, hidden=HIDDEN, vocab=VOCAB) -> Engram:
    engram, _ = load_engram(find_in(folder), hidden, vocab)
    return engram


def assert_same(ours, theirs):
    assert list(ours.packs) == list(theirs.packs)
    assert state(ours) == state(theirs)
    for mine, other in zip(ours.constants, theirs.constants, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))
    assert ours.families == theirs.families
    assert ours.layout == theirs.layout


def manifest_of(folder) -> dict:
    return json.loads((folder / "engram" / "manifest.json").read_text())


def files_of_pack(folder, pack) -> list[Path]:
    """A pack's files: the slowest level's last, the newest of a table last."""
    (entry,) = (entry for entry in manifest_of(folder)["packs"] if entry["name"] == pack)
    return [
        folder / "engram" / file["file"]
        for level in entry["levels"]
        for table in level["tables"]
        for file in table["files"]
    ]


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
