"""The memory's tables: reading, claiming, adding."""

import pytest
import torch

from karla_hf.modeling.engram_karla import EngramTable
from karla_hf.modeling.hashing_karla import Names
from karla_hf.modeling.reference_engram import naive_read


def test_new_memory_reads_zero(make_engram, name_text):
    engram = make_engram()
    engram.open_pack("a")
    assert torch.equal(engram.read(name_text(engram, [1, 2, 3, 4])), torch.zeros(4, 24))


@pytest.mark.parametrize("rows", [5, 2003])
@pytest.mark.parametrize("ids", [[4], [4, 5], [1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_read_equals_naive(make_engram, name_text, rows, ids):
    engram = make_engram(rows)
    names = name_text(engram, ids)
    for pack in ("a", "b"):
        table = engram.open_pack(pack)
        table.claim(names.select(torch.randperm(len(ids))[: len(ids) // 2 + 1]))
        table.rows.normal_()
    read = engram.read(names)
    assert (read != 0).any() == (len(ids) > 1)
    torch.testing.assert_close(read.double(), naive_read(engram, names), rtol=0, atol=1e-6)


def test_read_of_a_batch_is_the_read_of_each_text(make_engram, name_text):
    engram = make_engram()
    names = name_text(engram, [1, 2, 3, 4, 5, 6])
    table = engram.open_pack("a")
    table.claim(names)
    table.rows.normal_()
    batch = Names(names.rows.unflatten(0, (2, 3)), names.fingerprints.unflatten(0, (2, 3)))
    assert torch.equal(engram.read(batch).flatten(0, 1), engram.read(names))


def test_disabled_memory_reads_zero_and_keeps_its_rows(make_engram, name_text):
    engram = make_engram()
    names = name_text(engram, [1, 2, 3])
    table = engram.open_pack("a")
    table.claim(names)
    table.rows.fill_(1.0)
    engram.enabled = False
    assert not engram.read(names).any()
    assert not naive_read(engram, names).any()
    engram.enabled = True
    assert engram.read(names)[1:].any()


def test_row_of_another_name_reads_zero(make_engram, name_text):
    engram = make_engram()
    names = name_text(engram, [1, 2, 3, 4])
    table = engram.open_pack("a")
    table.rows.fill_(1.0)
    table.claim(names)
    other = Names(names.rows, torch.where(names.fingerprints == 0, 0, names.fingerprints + 1).to(torch.int16))
    assert engram.read(names)[2:].any()
    assert not engram.read(other).any()


def test_first_name_claims_a_row_and_keeps_it():
    table = EngramTable(4, 2)
    rows = torch.tensor([[[2, 3]], [[2, 1]], [[3, 1]]])
    first = Names(rows, torch.tensor([[7], [8], [9]], dtype=torch.int16))
    table.claim(first)
    assert table.owners.tolist() == [0, 8, 7, 7]
    table.claim(Names(torch.tensor([[[0, 2]]]), torch.tensor([[5]], dtype=torch.int16)))
    assert table.owners.tolist() == [5, 8, 7, 7]
    assert table.num_owned == 4


def test_first_of_many_claims_wins_every_time():
    rows = torch.randint(0, 50, (5000, 1, 4))
    prints = torch.arange(1, 5001, dtype=torch.int16)[:, None]
    expected: dict[int, int] = {}
    for addressed, print_ in zip(rows.flatten(1).tolist(), prints.flatten().tolist(), strict=True):
        for row in addressed:
            expected.setdefault(row, print_)
    table = EngramTable(50, 1)
    table.claim(Names(rows, prints))
    assert table.owners.tolist() == [expected[row] for row in range(50)]


def test_shared_row_gets_the_mean_of_its_changes():
    table = EngramTable(5, 2)
    names = Names(torch.tensor([[[1]], [[1]], [[1]], [[4]]]), torch.tensor([[7], [7], [7], [8]], dtype=torch.int16))
    table.claim(names)
    table.rows[1] = 1.0
    change = torch.tensor([[3.0, 0.0], [0.0, 6.0], [0.0, 0.0], [2.0, 2.0]])[:, None, None]
    table.add(names, change)
    assert table.rows.tolist() == [[0, 0], [2, 3], [0, 0], [0, 0], [2, 2]]


def test_a_change_for_another_names_row_is_dropped_and_counts_for_nothing():
    table = EngramTable(2, 1)
    owner = Names(torch.tensor([[[1]]]), torch.tensor([[7]], dtype=torch.int16))
    table.claim(owner)
    both = Names(torch.tensor([[[1]], [[1]]]), torch.tensor([[7], [8]], dtype=torch.int16))
    table.add(both, torch.tensor([4.0, 100.0])[:, None, None, None])
    assert table.rows.flatten().tolist() == [0, 4]


def test_each_head_holds_its_own_coordinates(make_engram):
    engram = make_engram(heads=3, head_dim=8)
    assert engram.coordinates.flatten(1).sort().values.tolist() == [list(range(24))] * 2
    assert not torch.equal(engram.coordinates[0], engram.coordinates[1])
