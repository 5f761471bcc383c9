"""Large tables: they are mapped, so a cold start is short, and RAM grows with the rows that are touched."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from small_engram import files_of_pack, make_engram

from karla_hf.modeling import stored_table_karla
from karla_hf.modeling.files_karla import Blocks, advise, available_bytes, tensors_head
from karla_hf.modeling.packs_karla import save_engram
from karla_hf.modeling.table_karla import EngramTable


WIDTH = 512
STRIDE = 0x1E3779B97F4A7C1  # of names
MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
from karla_hf.modeling import packs_karla

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssFile")))

folder, touched, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before, started = resident(), time.perf_counter()
engram, _ = packs_karla.load_engram(lambda name: str(folder / name), 512, 50)
first = engram.packs["a"].levels[-1].tables[0].read(np.array([stride]))
seconds, loaded = time.perf_counter() - started, resident()
assert (first == 1).all()
table = engram.packs["a"].levels[-1].tables[0]
names = np.arange(1, touched + 1) * stride
values = table.read(names)
read = resident() - values.nbytes
assert (values == 1).all()
del values
print(json.dumps({"seconds": seconds, "size": table.rows.nbytes + table.names.nbytes, "load": loaded - before,
                  "read": read - loaded}))
"""


def save_large(folder, num_rows, owned, monkeypatch) -> None:
    """A memory with one table of 512 coordinates a row; its file has holes where no row has a name."""
    monkeypatch.setattr(stored_table_karla, "DENSE_BYTES", 0)
    monkeypatch.setattr(stored_table_karla, "DENSE_LOAD", 0.0)
    engram = make_engram("a", periods=(1,), width=WIDTH, hidden=WIDTH, rows=128)
    save_engram(engram, folder, None)
    table = EngramTable(num_rows, WIDTH)
    assert table.put(np.arange(1, owned + 1) * STRIDE, np.ones((owned, WIDTH), np.float16)).all()
    (path,) = files_of_pack(folder, "a")
    head = tensors_head({"names": Blocks("I64", table.names.shape, []), "rows": Blocks("F16", table.rows.shape, [])})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + table.names.nbytes + table.rows.nbytes)
        for slot in np.nonzero(table.names.reshape(-1))[0].tolist():
            os.pwrite(file.fileno(), table.names.reshape(-1)[slot].tobytes(), len(head) + 8 * slot)
            place = len(head) + table.names.nbytes + slot * 2 * WIDTH
            os.pwrite(file.fileno(), table.rows[slot].tobytes(), place)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # cold
    manifest = folder / "engram" / "manifest.json"
    content = json.loads(manifest.read_text())
    (entry,) = content["packs"][0]["levels"][0]["tables"]
    entry["num_rows"] = num_rows
    entry["files"][0].update(size=path.stat().st_size, rows=owned)
    manifest.write_text(json.dumps(content))


def measure(folder, touched) -> dict:
    command = [sys.executable, "-c", MEASURE, str(folder), str(touched), str(STRIDE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(touched, found)  # noqa: T201
    return found


@pytest.mark.slow
def test_six_gigabytes_start_in_a_second_and_take_ram_by_rows_touched(tmp_path, monkeypatch):
    save_large(tmp_path, 5_900_000, 40_000, monkeypatch)
    cold = measure(tmp_path, 1)
    few, many = measure(tmp_path, 1_000), measure(tmp_path, 4_000)
    assert cold["size"] > 6e9
    assert cold["seconds"] < 1
    for found, touched in ((cold, 1), (few, 1_000), (many, 4_000)):
        assert found["load"] < 50e6
        # a row and its two buckets lie in three pages; of a page that is in RAM already, the system maps 15 neighbours
        assert found["read"] < 20e6 + touched * 3 * 65536
    assert many["read"] < 0.2 * many["size"]


@pytest.mark.slow
def test_ram_does_not_grow_with_the_table(tmp_path, monkeypatch):
    save_large(tmp_path / "small", 600_000, 2_000, monkeypatch)
    save_large(tmp_path / "large", 5_900_000, 2_000, monkeypatch)
    small, large = measure(tmp_path / "small", 2_000), measure(tmp_path / "large", 2_000)
    assert large["read"] < 1.5 * small["read"] + 20e6
    assert abs(large["load"] - small["load"]) < 20e6


def test_table_is_announced_whole_if_it_fits_and_row_by_row_if_not(monkeypatch):
    import mmap

    advice = []

    class Pages:
        def __len__(self):
            return 1000

        def madvise(self, option):
            advice.append(option)

    for available in (2000, 1999):
        monkeypatch.setattr("karla_hf.modeling.files_karla.available_bytes", lambda available=available: available)
        advise(Pages())
    assert advice == [mmap.MADV_WILLNEED, mmap.MADV_RANDOM]
    assert 10**7 < available_bytes() < 10**14
