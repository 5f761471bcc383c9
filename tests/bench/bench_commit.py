"""Committing what a reading changed, against the same rows in a file that is mapped for writing and synchronised.

8,192 names with rows of 512 half floats, spread over a table of 262,144: as many numbers as 65,536 rows of 64. A commit
is a file of these rows and a manifest, both on the disk when it returns; the peer is `msync`, after which a crash may
have left any part of the change.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from karla_hf.bench import Row
from karla_hf.modeling.engram_karla import Engram
from karla_hf.modeling.hashing_karla import NgramFamily, name_constants
from karla_hf.modeling.levels_karla import EngramLayout
from karla_hf.modeling.packs_karla import save_engram


ROWS, WIDTH, TABLE = 8192, 512, 262_144


def rows():
    """One row."""
    place = tempfile.TemporaryDirectory(prefix="karla-bench-", dir=".")
    random = np.random.default_rng(0)
    change = torch.ones(ROWS, WIDTH)

    constants = name_constants(4, torch.arange(50_000), torch.zeros(50_000, dtype=torch.uint8), 0, seed=0)
    engram = Engram(constants, [NgramFamily(4, 1.0)], EngramLayout(WIDTH, WIDTH, 64, (1,), TABLE))
    names = np.unique(random.integers(1, 2**62, TABLE // 2))
    pack = engram.open_pack("default")
    pack.claim(names)
    save_engram(engram, place.name, None)

    def commit() -> None:
        pack.add(random.choice(names, ROWS, replace=False), change)
        save_engram(engram, place.name, None)

    shared = np.memmap(Path(place.name, "peer"), np.float16, "w+", shape=(TABLE, WIDTH))
    shared[:] = 1
    shared.flush()

    def synchronise() -> None:
        slots = random.choice(TABLE, ROWS, replace=False)
        shared[slots] = (torch.from_numpy(shared[slots]).float() + change).half().numpy()
        shared.flush()

    yield Row("commit_65k", ROWS * WIDTH // 64, "rows of 64", commit, "msync of a shared map", synchronise)
    place.cleanup()
