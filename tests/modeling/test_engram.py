"""Levels, packs and what they add to the hidden state."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karla_hf.modeling.hashing_karla import NO_NAME, scramble
from karla_hf.modeling.levels_karla import EngramLayout, Level, Pack
from karla_hf.modeling.reference_engram import NaivePack, coordinates_of, naive_read, rows_by_level


WIDTH = 4
PERIODS = (1, 2, 6)
LAYOUT = EngramLayout(hidden_size=8, width=WIDTH, chunk_size=5, update_periods=PERIODS, num_rows=400)


def names_for(count, seed=0):
    return scramble(np.arange(1, count + 1) + (seed << 32))


def bytes_of(level):
    return [(table.names.tobytes(), table.rows.tobytes()) for table in level.tables]


def fill(pack, names):
    """Write random rows for names [..., F]; a level gets them as it takes over from those before it."""
    distinct = names.flatten().unique().numpy()
    distinct = distinct[pack.claim(distinct)]
    pack.add(distinct, torch.randn(len(distinct), pack.levels[0].tables[0].width))


def read(level, names):
    """The rows of a level, from whichever table has them."""
    return sum(table.read(names) for table in level.tables)


@pytest.fixture
def recall(make_engram):
    """Function for what a memory of one pack adds for names [N] of one family: [N, WIDTH]."""
    engram = make_engram(orders=(2,), weights=(1.0,), heads=1, head_dim=WIDTH)

    def read_pack(pack, names):
        engram.packs = {"a": pack}
        return engram.read(torch.from_numpy(names)[:, None])[:, :WIDTH]

    return read_pack


def assert_same_rows(ours, theirs):
    for mine, other in zip(rows_by_level(ours), rows_by_level(theirs), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(row, other[name]) for name, row in mine.items())


def test_bytes_of_a_level_change_only_when_it_is_due():
    """The period of a level is also when it is emptied: what it held has gone to the next one."""
    pack = Pack(LAYOUT, num_families=2)
    for step in range(1, 25):
        slow = [bytes_of(level) for level in pack.levels[1:]]
        names = names_for(10, seed=step % 4)
        assert pack.claim(names).all()
        pack.add(names, torch.randn(10, WIDTH))
        assert [bytes_of(level) for level in pack.levels[1:]] == slow
        pack.tick()
        assert pack.clock.step == step
        changed = [bytes_of(level) != before for level, before in zip(pack.levels[1:], slow, strict=True)]
        assert changed == [step % 2 == 0, step % 6 == 0]
        assert (pack.levels[0].num_owned == 0) == (step % 2 == 0)
        assert (pack.levels[1].num_owned == 0) == (step % 6 < 2)


@settings(max_examples=40)
@given(
    periods=st.sampled_from([(1,), (1, 2), (1, 3, 6), (1, 2, 4, 8)]),
    chunks=st.lists(st.lists(st.integers(0, 25), max_size=8, unique=True), max_size=20),
    max_rows=st.sampled_from([None, 8]),
)
def test_pack_holds_what_dicts_hold(periods, chunks, max_rows):
    layout = LAYOUT._replace(update_periods=periods, num_rows=8, max_rows=max_rows)
    pack, naive, everything = Pack(layout, 2), NaivePack(layout), np.append(NO_NAME, names_for(25))
    for chosen in chunks:
        names = everything[chosen]
        kept = pack.claim(names)
        assert kept.tolist() == naive.claim(names.tolist())
        change = torch.randn(int(kept.sum()), WIDTH)
        pack.add(names[kept], change)
        naive.add(dict(zip(names[kept].tolist(), change.double(), strict=True)))
        pack.tick()
        naive.tick()
        assert_same_rows(pack, naive)
        assert pack.clock.step == naive.step
        assert pack.num_lost == naive.lost
        assert pack.num_owned == len(set().union(*naive.levels))
        for level in pack.levels:
            assert level.num_owned == len(level.items()[0]) == len(set(level.items()[0]))  # of all tables


def test_hand_over_leaves_the_sum_as_it_was(recall):
    """Up to rounding to float16, which is all that a hand-over may change."""
    pack, names = Pack(LAYOUT, num_families=2), names_for(30)
    for step in range(1, 13):
        written = names[(step % 3) * 5 : (step % 3) * 5 + 15]
        pack.claim(written)
        pack.add(written, torch.randn(15, WIDTH))
        before, held = recall(pack, names), [level.num_owned for level in pack.levels]
        pack.tick()
        after = recall(pack, names)
        assert ([level.num_owned for level in pack.levels] != held) == (step % 2 == 0)
        torch.testing.assert_close(after, before, rtol=2**-10, atol=2**-10)
        assert (before != 0).any()


def test_read_sums_all_levels(recall):
    pack, names = Pack(LAYOUT, num_families=2), names_for(3)
    for level, value in zip(pack.levels, (1, 10, 100), strict=True):
        level.claim(names[:2])
        level.add(names[:2], torch.full((2, WIDTH), float(value)))
    pack.levels[2].add(names[1:2], torch.full((1, WIDTH), 1000.0))
    assert recall(pack, names).tolist() == [[111.0] * WIDTH, [1111.0] * WIDTH, [0.0] * WIDTH]


def test_name_counts_once_in_whatever_levels_it_lives():
    pack, names = Pack(LAYOUT, num_families=2), names_for(8)
    assert (pack.num_owned, pack.load) == (0, 0.0)
    pack.levels[0].claim(names[:4])
    pack.levels[1].claim(names[2:6])
    pack.levels[2].claim(names[3:7])
    assert pack.num_owned == 7
    assert pack.load == 7 / 400


def test_fast_levels_hold_what_comes_between_two_hand_overs_in_one_table():
    layout = LAYOUT._replace(chunk_size=64, update_periods=(1, 8, 64), num_rows=200_000)
    pack = Pack(layout, num_families=4)
    for step in range(63):
        pack.claim(names_for(256, seed=step))
        pack.tick()
    pack.claim(names_for(256, seed=63))
    assert [len(level.tables) for level in pack.levels] == [1, 1, 1]
    assert pack.num_owned == 64 * 256
    pack.tick()
    assert [level.num_owned for level in pack.levels] == [0, 0, 64 * 256]


def test_level_that_is_full_opens_a_table_of_twice_the_rows_and_reads_as_before():
    level, names = Level(80, WIDTH), names_for(1000)
    stored = torch.randn(1000, WIDTH).half().float()
    for at in range(0, 1000, 50):
        assert level.claim(names[: at + 50]).all()
        level.add(names[at : at + 50], stored[at : at + 50])
        assert torch.equal(read(level, names[: at + 50]), stored[: at + 50])
        assert not read(level, names[at + 50 :]).any()
    assert [len(table) for table in level.tables] == [80, 160, 320, 640]
    assert level.num_rows == 1200
    assert level.num_owned == 1000
    assert level.lost == 0
    level.add(names, stored)
    assert torch.equal(read(level, names), 2 * stored)
    found, rows = level.items()
    assert found.tolist() == sorted(names)
    assert torch.equal(torch.from_numpy(rows).float(), read(level, found))


def test_level_stays_with_its_tables_when_its_names_come_again():
    level, names = Level(8, WIDTH), names_for(20)
    level.claim(names)
    tables = bytes_of(level)
    assert level.claim(names[::-1].copy()).all()
    assert bytes_of(level) == tables
    assert level.num_owned == 20


def test_cleared_level_keeps_one_empty_table():
    level, names = Level(8, WIDTH), names_for(20)
    level.claim(names)
    level.add(names, torch.ones(20, WIDTH))
    level.clear()
    assert [len(table) for table in level.tables] == [8]
    assert level.num_owned == 0
    assert not read(level, names).any()


@pytest.mark.parametrize("max_rows", [8, 40, 100])
def test_full_memory_warns_once_counts_what_is_lost_and_keeps_the_first_names(max_rows, caplog):
    level, names = Level(16, WIDTH, max_rows), names_for(400)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    first = level.claim(names[:200])
    level.add(names[:200][first], torch.ones(int(first.sum()), WIDTH))
    held = level.items()
    second = level.claim(np.concatenate([names[200:], names[200:], [NO_NAME]]))
    logger.removeHandler(caplog.handler)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        f"The memory is full: {first.sum()} of {level.num_rows} rows have names, and engram_max_rows allows no more; "
        "what is new will be stored in part or not at all. Forget a pack or raise the limit."
    )
    assert 0.8 * max_rows <= level.num_owned <= level.num_rows < max_rows + 8
    assert first[:8].all()
    assert second[:200].tolist() == second[200:400].tolist()
    assert not second[400]
    assert level.lost == 400 - level.num_owned
    assert torch.equal(read(level, held[0]), torch.ones(len(held[0]), WIDTH))
    assert not read(level, names[200:]).any()


def test_only_the_slowest_level_is_limited(recall):
    layout = LAYOUT._replace(max_rows=8, num_rows=8)
    pack, names = Pack(layout, num_families=2), names_for(40)
    assert pack.claim(names).all()
    pack.add(names, torch.ones(40, WIDTH))
    for _ in range(5):
        pack.tick()
        assert pack.num_lost == 0
        assert recall(pack, names).all()
    pack.tick()
    assert pack.num_lost == 32
    assert pack.num_owned == 8
    assert recall(pack, np.sort(names))[:, 0].tolist() == [1.0] * 8 + [0.0] * 32


def test_new_memory_reads_zero(make_engram, name_text):
    engram = make_engram()
    names = name_text(engram, [1, 2, 3, 4])
    assert torch.equal(engram.read(names), torch.zeros(4, 24))
    engram.open_pack("a")
    assert torch.equal(engram.read(names), torch.zeros(4, 24))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (2, 0, 2), (2, 3, 2)])
@pytest.mark.parametrize("packs", [0, 1])
def test_read_has_the_shape_of_its_names(make_engram, shape, packs):
    engram = make_engram()
    for pack in range(packs):
        engram.open_pack(str(pack))
    memory = engram.read(torch.ones(shape, dtype=torch.int64))
    assert memory.shape == (*shape[:-1], 24)
    assert memory.dtype == torch.float32


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [4, 1000])
@pytest.mark.parametrize("ids", [[4], [4, 5], [1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_read_equals_naive(make_engram, name_text, rows, ids, heads):
    engram = make_engram(rows, heads=heads, orders=(2, 3, 1), weights=(0.2, 0.3, 0.5), update_periods=PERIODS)
    names = name_text(engram, ids)
    for pack in ("a", "b"):
        for _ in range(7):  # the last chunk is in the fastest level, those before it in the slowest
            fill(engram.open_pack(pack), names[torch.randperm(len(ids))[: len(ids) // 2 + 1]])
            engram.packs[pack].tick()
    assert all(pack.levels[0].num_owned and pack.levels[2].num_owned for pack in engram.packs.values())
    read = engram.read(names)
    assert read.any()
    torch.testing.assert_close(read.double(), naive_read(engram, names), rtol=0, atol=1e-5)


def test_read_of_a_batch_is_the_read_of_each_text(make_engram, name_text):
    engram = make_engram()
    names = name_text(engram, [1, 2, 3, 4, 5, 6])
    fill(engram.open_pack("a"), names)
    assert torch.equal(engram.read(names.unflatten(0, (2, 3))).flatten(0, 1), engram.read(names))
    for position, alone in zip(engram.read(names), names, strict=True):
        assert torch.equal(engram.read(alone), position)
    assert engram.read(names)[1:].any(-1).all()


def test_packs_add_up(make_engram, name_text):
    engram = make_engram()
    names, alone = name_text(engram, [1, 2, 3, 4]), []
    for pack in ("a", "b", "c"):
        other = make_engram()
        fill(other.open_pack(pack), names)
        engram.packs[pack] = other.packs[pack]
        alone.append(other.read(names))
    torch.testing.assert_close(engram.read(names), sum(alone))
    del engram.packs["b"]
    torch.testing.assert_close(engram.read(names), alone[0] + alone[2])


def test_disabled_memory_reads_zero_and_keeps_its_rows(make_engram, name_text):
    engram = make_engram()
    names = name_text(engram, [1, 2, 3])
    fill(engram.open_pack("a"), names)
    engram.enabled = False
    assert not engram.active
    assert not engram.read(names).any()
    assert not naive_read(engram, names).any()
    engram.enabled = True
    assert engram.read(names)[1:].any()


def test_pack_is_opened_once(make_engram):
    engram = make_engram(max_rows=160, chunk_size=3, update_periods=[1, 4])
    pack = engram.open_pack("a")
    assert engram.open_pack("a") is pack
    assert engram.new_pack() is not pack
    assert list(engram.packs) == ["a"]
    assert engram.layout == EngramLayout(24, 24, 3, (1, 4), num_rows=2000, max_rows=160)
    assert [level.num_rows for level in pack.levels] == [2 * 4 * 3 * 2, 160]


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (1, 20), (3, 8)])
def test_each_family_owns_a_run_of_coordinates_that_wraps_around(make_engram, heads, head_dim):
    engram, width = make_engram(heads=heads, head_dim=head_dim), heads * head_dim
    coordinates = torch.tensor([coordinates_of(engram.layout, family, 2) for family in range(2)])
    assert coordinates.tolist() == [[(start + k) % 24 for k in range(width)] for start in (0, 12)]
    rows = torch.randn(5, 2, width)
    expected = torch.zeros(5, 24).index_add_(1, coordinates.flatten(), rows.flatten(1))
    torch.testing.assert_close(engram.scatter(rows), expected)
    states = torch.randn(5, 24)
    assert torch.equal(engram.gather(states), states[:, coordinates])
