"""The clock, and the levels that are due at its steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karla_hf.modeling.nested_karla import NEVER, Clock, LevelSpec


@given(periods=st.lists(st.integers(1, 12), max_size=4), steps=st.integers(0, 50))
def test_level_is_due_at_every_multiple_of_its_period(periods, steps):
    clock = Clock([LevelSpec(str(k), period) for k, period in enumerate(periods)])
    due = [[level.name for level in clock.tick()] for _ in range(steps)]
    assert clock.step == steps
    for k, period in enumerate(periods):
        assert [step for step, names in enumerate(due, start=1) if str(k) in names] == [
            *range(period, steps + 1, period)
        ]


def test_due_levels_come_in_the_order_of_the_clock():
    levels = [LevelSpec("a", 2), LevelSpec("b", 3), LevelSpec("c", 1)]
    assert Clock(levels, step=5).tick() == levels


def test_clock_goes_on_from_the_step_that_it_is_given():
    levels = [LevelSpec("fast", 1), LevelSpec("slow", 4)]
    whole, resumed = Clock(levels), Clock(levels, step=6)
    for _ in range(6):
        whole.tick()
    for _ in range(9):
        assert whole.tick() == resumed.tick()


@pytest.mark.parametrize("step", [1, 2, 64, 10**12])
def test_level_that_never_changes_is_never_due(step):
    assert not LevelSpec("frozen", NEVER).is_due(step)


def test_clock_keeps_its_own_list_of_levels():
    levels = [LevelSpec("fast", 1)]
    clock = Clock(levels)
    levels.append(LevelSpec("slow", 1))
    assert [level.name for level in clock.tick()] == ["fast"]
