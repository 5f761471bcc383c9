"""One table of rows by their names, against a dict."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karla_hf.modeling.hashing_karla import NO_NAME, scramble
from karla_hf.modeling.table_karla import BUCKET, EngramTable


WIDTH = 3


def names_for(count, seed=0):
    """[count] distinct names, none of them `NO_NAME`."""
    return scramble(np.arange(1, count + 1) + (seed << 32))


def random_rows(count):
    return np.random.standard_normal((count, WIDTH)).astype(np.float16)


def contents(table):
    """Rows by name, read slot by slot."""
    return {name: table.rows[at].tolist() for at, name in enumerate(table.names.flatten().tolist()) if name}


def buckets_of(table, name):
    """Both buckets of a name, by Python's integers."""
    bits = int(name) % 2**64
    return [(half * len(table.names)) >> 32 for half in (bits % 2**32, bits >> 32)]


NAMES = st.lists(st.sampled_from([NO_NAME, *names_for(30).tolist()]), max_size=12)
ACTIONS = st.lists(st.tuples(st.sampled_from(["claim", "add", "put", "clear"]), NAMES), max_size=15)


@settings(max_examples=150)
@given(actions=ACTIONS, size=st.sampled_from([1, 8, 17, 200]))
def test_table_holds_what_a_dict_holds(actions, size):
    """Where a name finds no place, both of its buckets are full, and the dict goes without it too."""
    table, expected = EngramTable(size, WIDTH), {}
    everything = np.append(names_for(40), NO_NAME)
    for action, chosen in actions:
        names = np.array(chosen, np.int64)
        held = set(expected)
        if action == "clear":
            table.clear()
            expected.clear()
        elif action == "claim":
            kept = table.claim(names)
            assert [name in contents(table) for name in chosen] == kept.tolist()
            for name in np.array(chosen, np.int64)[kept].tolist():
                expected.setdefault(name, [0.0] * WIDTH)
        elif action == "put":
            names = np.unique(names)
            rows = random_rows(len(names))
            kept = table.put(names, rows)
            expected.update(zip(names[kept].tolist(), rows[kept].tolist(), strict=True))
        else:
            names = np.array([name for name in dict.fromkeys(chosen) if name in expected], np.int64)
            change = torch.randn(len(names), WIDTH)
            for name, row in zip(names.tolist(), change, strict=True):
                expected[name] = (torch.tensor(expected[name]) + row).half().tolist()
            table.add(names, change)
        assert action == "clear" or held <= set(expected)
        assert contents(table) == expected
        assert table.num_owned == len(expected)
        for name in [] if action in ("clear", "add") else names[~kept].tolist():
            assert name == NO_NAME or all((table.names[bucket] != NO_NAME).all() for bucket in buckets_of(table, name))
        read = table.read(everything).tolist()
        assert read == [expected.get(name, [0.0] * WIDTH) for name in everything.tolist()]
        assert (table.find(everything) >= 0).tolist() == [name in expected for name in everything.tolist()]


@pytest.mark.parametrize(("asked", "given_rows"), [(1, 8), (8, 8), (9, 16), (1000, 1000)])
def test_rows_come_in_whole_buckets(asked, given_rows):
    table = EngramTable(asked, WIDTH)
    assert len(table) == given_rows == table.rows.shape[0] == table.dirty.size
    assert table.names.shape == (given_rows // BUCKET, BUCKET)
    assert (table.width, table.num_owned, table.load) == (WIDTH, 0, 0.0)


@pytest.mark.parametrize("count", [0, 1])
def test_no_name_and_one_name(count):
    table, names = EngramTable(16, WIDTH), names_for(count)
    assert table.read(names).shape == (count, WIDTH)
    assert table.claim(names).tolist() == [True] * count
    table.add(names, torch.ones(count, WIDTH))
    assert table.put(names, random_rows(count)).tolist() == [True] * count
    assert table.find(names).shape == (count,)
    assert table.read(names).shape == (count, WIDTH)
    assert table.num_owned == count


def test_first_names_win_where_a_bucket_is_full():
    table, names = EngramTable(BUCKET, WIDTH), names_for(12)
    assert table.claim(np.concatenate([names[:3], names[:11]])).tolist() == [True] * 11 + [False] * 3
    rows = random_rows(12)
    assert table.put(names, rows).tolist() == [True] * 8 + [False] * 4
    assert not table.claim(names[8:]).any()
    assert contents(table) == dict(zip(names[:8].tolist(), rows[:8].tolist(), strict=True))
    assert table.load == 1.0


def test_name_takes_the_emptier_of_its_buckets_in_the_first_empty_slot():
    table = EngramTable(4 * BUCKET, WIDTH)
    for name in names_for(25):
        used = np.count_nonzero(table.names, axis=-1)
        table.claim(np.array([name]))
        changed = np.count_nonzero(table.names, axis=-1) - used
        (bucket,) = changed.nonzero()[0]
        assert bucket in buckets_of(table, name)
        assert used[bucket] == min(used[other] for other in buckets_of(table, name))
        assert table.names[bucket, used[bucket]] == name


@pytest.mark.parametrize(("batch", "placed"), [(1, 0.99), (100, 0.99), (1000, 0.99), (7200, 0.98)])
def test_nine_tenths_of_a_table_fill_almost_without_loss(batch, placed):
    """Names that come together see the buckets as they were before them, which costs a little."""
    table = EngramTable(8000, 1)
    names = names_for(7200, seed=3)
    kept = np.concatenate([table.claim(part) for part in np.array_split(names, len(names) // batch)])
    assert placed < kept.mean() < 1
    assert table.num_owned == kept.sum()
    assert ((table.find(names) >= 0) == kept).all()


def test_no_two_names_share_a_row():
    table = EngramTable(8000, 1)
    names = names_for(6000)
    table.claim(names)
    slots = table.find(names)
    assert len(np.unique(slots[slots >= 0])) == table.num_owned > 5900
    table.add(names[slots >= 0], torch.ones(table.num_owned, 1))
    assert (table.read(names)[:, 0].numpy() == (slots >= 0)).all()


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 47, 63])
def test_name_that_differs_in_one_bit_reads_nothing(bit):
    table, names = EngramTable(8, WIDTH), names_for(8)
    table.put(names, np.ones((8, WIDTH), np.float16))
    other = (names.view(np.uint64) ^ (np.uint64(1) << np.uint64(bit))).view(np.int64)
    assert table.read(names).all()
    assert not table.read(other).any()


def test_no_name_is_never_stored_nor_found():
    table, nothing = EngramTable(16, WIDTH), np.array([NO_NAME, NO_NAME])
    table.rows[:] = 1
    table.claim(names_for(1))
    assert not table.claim(nothing).any()
    assert not table.put(nothing[:1], np.ones((1, WIDTH), np.float16)).any()
    assert table.find(nothing).tolist() == [-1, -1]
    assert not table.read(nothing).any()
    assert table.num_owned == 1


def test_cleared_table_hands_out_rows_of_zeros():
    table, names = EngramTable(8, WIDTH), names_for(8)
    table.put(names, random_rows(8))
    table.clear()
    assert table.num_owned == 0
    assert not table.read(names).any()
    assert not table.dirty.any()
    assert table.claim(names[::-1].copy()).all()
    assert not table.read(names).any()


def test_slots_are_dirty_once_written():
    table, names = EngramTable(64, WIDTH), names_for(9)
    table.put(names, random_rows(9))
    table.dirty[:] = False
    table.read(names)
    table.claim(names)
    assert not table.dirty.any()
    table.add(names[2:4], torch.ones(2, WIDTH))
    table.put(names[5:6], random_rows(1))
    new = names_for(10)[9:]
    table.claim(new)
    assert set(table.find(np.concatenate([names[[2, 3, 5]], new]))) == set(table.dirty.nonzero()[0])
    found, rows = table.items(only_dirty=True)
    assert found.tolist() == sorted([*names[[2, 3, 5]], *new])
    assert rows.tolist() == table.rows[table.find(found)].tolist()


def test_items_are_sorted_copies():
    table, names = EngramTable(64, WIDTH), names_for(30)
    rows = random_rows(30)
    table.put(names, rows)
    found, stored = table.items()
    order = np.argsort(names)
    assert found.tolist() == names[order].tolist()
    assert stored.tolist() == rows[order].tolist()
    found[:], stored[:] = 1, 7
    assert table.read(names).tolist() == rows.astype(np.float32).tolist()


def test_table_on_given_arrays_writes_in_place():
    first, names = EngramTable(16, WIDTH), names_for(5)
    first.put(names[:4], random_rows(4))
    second = EngramTable.from_arrays(first.names, first.rows, first.num_owned)
    assert not second.dirty.any()
    second.put(names[4:], random_rows(1))
    assert contents(first) == contents(second)
    assert len(contents(second)) == second.num_owned == 5


def test_a_copy_reads_its_own_rows():
    table = EngramTable(64, 4)
    names = np.arange(1, 9)
    table.claim(names)
    table.add(names, torch.ones(8, 4))
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        table.add(names, torch.ones(8, 4))
        state = torch.zeros(8, 4)
        other.add_rows_to(state, torch.from_numpy(names)[:, None], [0])
        assert torch.equal(state, other.read(names))
        assert torch.equal(other.read(names) + 1, table.read(names))
        table.add(names, -torch.ones(8, 4))
