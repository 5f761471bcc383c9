"""The delta-rule write of the memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karla_hf.modeling.hashing_karla import NO_NAME
from karla_hf.modeling.reference_engram import NaivePack, rows_by_level
from karla_hf.modeling.reference_writing import naive_write_chunk
from karla_hf.modeling.writing_karla import DEFAULT_RULE, write_chunk


HIDDEN, VOCAB = 24, 50
LIKELY, UNLIKELY = -math.log(DEFAULT_RULE.target), -math.log(1 - DEFAULT_RULE.target)  # surprise of what is learned


@pytest.fixture(scope="session")
def problem(name_text):
    """Function for the arguments of a write after a text: names, random hidden states, next tokens, output layer."""

    def make(engram, ids, bias=False, dtype=torch.float32):
        weight = torch.randn(VOCAB, HIDDEN)
        states = 0.5 * torch.randn(len(ids) - 1, HIDDEN).to(dtype)
        names = name_text(engram, ids)[: len(ids) - 1]
        targets = torch.tensor(ids[1:], dtype=torch.int64)
        return names, states, targets, weight.to(dtype), torch.randn(VOCAB).to(dtype) if bias else None

    return make


def bytes_of(pack):
    return [(table.names.tobytes(), table.rows.tobytes()) for level in pack.levels for table in level.tables]


def surprise(engram, names, states, targets, weight, bias=None):
    """-log p of every target with the memory as it is, computed in float64."""
    logits = torch.nn.functional.linear(states.double() + engram.read(names), weight.double(), bias)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def assert_close_rows(ours, theirs, rtol=4e-3, atol=4e-3):
    """The same names on every level, and rows that differ in the last bits of a float16."""
    for mine, other in zip(rows_by_level(ours), rows_by_level(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, row in mine.items():
            torch.testing.assert_close(row, other[name], rtol=rtol, atol=atol)


def test_no_position_is_written_without_complaint(make_engram, problem):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, [1, 2, 3])
    pack = engram.open_pack("a")
    write_chunk(engram, pack, names, states, targets, weight)
    before = bytes_of(pack)
    result = write_chunk(engram, pack, names[:0], states[:0], targets[:0], weight)
    assert [len(part) for part in result] == [0, 0, 0]
    assert bytes_of(pack) == before


@pytest.mark.parametrize("sign", [1, -1])
def test_position_without_a_name_claims_and_writes_nothing(make_engram, problem, sign):
    engram = make_engram(orders=(3, 5))
    names, states, targets, weight, _ = problem(engram, [1, 2, 3])
    states = sign * states if sign == 1 else 10 * weight[targets]
    pack = engram.open_pack("a")
    result = write_chunk(engram, pack, names, states, targets, weight, sign=sign)
    assert not result.written.any()
    assert pack.num_owned == 0
    torch.testing.assert_close(result.surprise_after, result.surprise_before)


WRITES = {
    "one position": {"ids": [3, 4]},
    "short": {"ids": [1, 2, 3, 4, 5]},
    "repeats itself": {"ids": [1, 2, 3, 4] * 6},
    "same name, other successor": {"ids": [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2, 3]},
    "tables that grow": {"ids": list(range(1, 49)), "rows": 4, "update_periods": [1]},
    "full": {"ids": list(range(1, 20)), "rows": 4, "max_rows": 8, "update_periods": [1]},
    "one family": {"ids": list(range(1, 20)), "orders": (2,), "weights": (1.0,)},
    "four families": {"ids": list(range(1, 30)), "orders": (1, 2, 3, 8), "weights": (0.1, 0.2, 0.3, 0.4)},
    "few coordinates": {"ids": list(range(1, 20)), "heads": 2, "head_dim": 3},
    "with bias": {"ids": list(range(1, 20)), "bias": True},
    "two levels": {"ids": list(range(1, 20)), "update_periods": [1, 3]},
    "nothing to read": {"ids": [3]},
}


@pytest.fixture(scope="session")
def write_both(make_engram, problem):
    """Function that writes four times, fast and naive, into the second of two packs; yields results, packs and reads.

    Every write meets other hidden states, the first pack is filled by the first of them, and the clock goes on.
    """

    def write(ids, bias=False, sign=1, **layout):
        ours, theirs = make_engram(**layout), make_engram(**layout)
        theirs.packs = {name: NaivePack(theirs.layout) for name in ("a", "b")}
        names, noise, targets, *output = problem(ours, ids, bias)
        for name in ("a", "b", "b", "b"):
            states = noise if sign == 1 else noise + output[0][targets] / 3  # something to learn, or to unlearn
            arguments = names, states, targets, *output
            results = (
                write_chunk(ours, ours.open_pack(name), *arguments, sign=sign),
                naive_write_chunk(theirs, theirs.packs[name], *arguments, sign=sign),
            )
            yield results, (ours.packs[name], theirs.packs[name])
            ours.packs[name].tick()
            theirs.packs[name].tick()
            noise = 0.5 * torch.randn_like(noise)

    return write


def assert_same_write(ours, theirs):
    torch.testing.assert_close(ours.surprise_before.double(), theirs.surprise_before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.surprise_after.double(), theirs.surprise_after, rtol=1e-2, atol=1e-2)
    assert torch.equal(ours.written, theirs.written)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", WRITES)
def test_write_equals_naive(write_both, case, sign):
    changed = set()
    for (ours, theirs), packs in write_both(**WRITES[case], sign=sign):
        assert_same_write(ours, theirs)
        assert_close_rows(*packs)
        assert packs[0].num_lost == packs[1].lost
        changed.add(bool(ours.written.any()))
    assert (True in changed) == (case not in ("one position", "nothing to read"))


@settings(max_examples=25)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14),
    orders=st.sampled_from([(1,), (2, 3), (1, 4), (3, 2, 6)]),
    heads=st.integers(1, 3),
    rows=st.sampled_from([1, 100]),
    sign=st.sampled_from([1, -1]),
    seed=st.integers(0, 10),
)
def test_any_write_equals_naive(write_both, ids, orders, heads, rows, sign, seed):
    torch.manual_seed(seed)
    weights = tuple(1.0 / len(orders) for _ in orders)
    layout = {"orders": orders, "weights": weights, "heads": heads, "rows": rows, "update_periods": [1, 2]}
    for (ours, theirs), packs in write_both(ids, sign=sign, **layout):
        assert_same_write(ours, theirs)
        assert_close_rows(*packs)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ids", [list(range(1, 40)), [1, 2, 3, 4] * 9])
def test_order_within_a_chunk_does_not_matter(make_engram, problem, ids, sign):
    engram, shuffled = make_engram(), make_engram()
    names, states, targets, weight, _ = problem(engram, ids)
    if sign == -1:
        states = weight[targets] / 4
    order = torch.randperm(len(targets))
    first = write_chunk(engram, engram.open_pack("a"), names, states, targets, weight, sign=sign)
    arguments = names[order], states[order], targets[order], weight
    other = write_chunk(shuffled, shuffled.open_pack("a"), *arguments, sign=sign)
    assert first.written.any()
    assert torch.equal(first.written[order], other.written)
    torch.testing.assert_close(first.surprise_after[order], other.surprise_after, rtol=1e-2, atol=1e-3)
    assert_close_rows(engram.packs["a"], shuffled.packs["a"])


def test_write_makes_its_targets_likely(make_engram, problem):
    engram = make_engram()
    ids = list(range(1, 49))
    names, states, targets, weight, _ = problem(engram, ids)
    before = surprise(engram, names, states, targets, weight)
    result = write_chunk(engram, engram.open_pack("a"), names, states, targets, weight)
    after = surprise(engram, names, states, targets, weight)
    named = (names != NO_NAME).any(-1)
    assert before.mean() > 5
    assert (after[named] < LIKELY + 0.02).all()
    torch.testing.assert_close(result.surprise_before.double(), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.surprise_after[named].double(), after[named], rtol=0.05, atol=0.02)
    assert torch.equal(result.written, named & (before > LIKELY))


def test_unlearning_makes_its_targets_unlikely(make_engram, problem):
    """It moves against the direction of learning, and stops where a token is as unlikely as a learned one is likely."""
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 49)))
    pack = engram.open_pack("a")
    write_chunk(engram, pack, names, states, targets, weight)
    before = surprise(engram, names, states, targets, weight)
    result = write_chunk(engram, pack, names, states, targets, weight, sign=-1)
    after = surprise(engram, names, states, targets, weight)
    named = (names != NO_NAME).any(-1)
    assert (before[named] < LIKELY + 0.02).all()
    assert (after[named] > UNLIKELY - 0.02).all()
    assert after[named].mean() < 2 * UNLIKELY
    assert torch.equal(result.written, named & (before < UNLIKELY))
    torch.testing.assert_close(result.surprise_before.double(), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.surprise_after[named].double(), after[named], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_correction_moves_along_the_sign(make_engram, problem, sign):
    """A sign that is applied twice, to the margin and to the change, would move the other way."""
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, [1, 2, 3, 4])
    states = torch.zeros_like(states)
    rule = DEFAULT_RULE._replace(repeats=1, rounds=1, max_margin=0.5)
    pack = engram.open_pack("a")
    weight = weight / 20  # every token has about the same probability, 1 / 50
    rule = rule._replace(target=0.99, least_separation=0.0)  # both signs find something to do
    before = surprise(engram, names, states, targets, weight)
    result = write_chunk(engram, pack, names, states, targets, weight, rule=rule, sign=sign)
    after = surprise(engram, names, states, targets, weight)
    assert result.written.tolist() == [False, True, True]
    assert after[0] == before[0]
    torch.testing.assert_close(before[1:] - after[1:], torch.full((2,), sign * 0.5).double(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_as_it_should_be_is_not_written(make_engram, problem, sign):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 20)))
    states = sign * 10 * weight[targets]  # sure of every target, or of anything but it, without the memory
    found = surprise(engram, names, states, targets, weight)
    assert ((found < LIKELY) if sign == 1 else (found > UNLIKELY)).all()
    pack = engram.open_pack("a")
    result = write_chunk(engram, pack, names, states, targets, weight, sign=sign)
    assert not result.written.any()
    assert pack.num_owned == 0
    assert not any(any(rows) for _, rows in bytes_of(pack))


@pytest.mark.parametrize("sign", [1, -1])
def test_write_touches_its_own_rows_of_the_fastest_level_of_its_own_pack_only(make_engram, problem, sign):
    engram = make_engram(update_periods=[1, 2])
    pack, other = engram.open_pack("a"), engram.open_pack("other")
    for _ in range(3):  # the third stays in the fastest level
        for written in (pack, other):
            names, states, targets, weight, _ = problem(engram, list(range(1, 25)))
            write_chunk(engram, written, names, states, targets, weight)
            written.tick()
    before, slow, other_before = rows_by_level(pack)[0], bytes_of(pack)[1], bytes_of(other)
    assert before
    ids = [1, 2, 3, 4, 40, 41, 42]
    names, _, targets, weight, _ = problem(engram, ids)
    states = torch.zeros(len(targets), HIDDEN) if sign == 1 else 3 * weight[targets]
    result = write_chunk(engram, pack, names, states, targets, weight, sign=sign)
    after = rows_by_level(pack)[0]
    assert result.written.any()
    own = set(names[result.written].flatten().tolist()) - {NO_NAME}
    assert after.keys() == before.keys() | own
    assert [name for name in before if not torch.equal(before[name], after[name])] == [n for n in before if n in own]
    assert bytes_of(pack)[1] == slow
    assert bytes_of(other) == other_before


@pytest.mark.parametrize("sign", [1, -1])
def test_text_never_read_gets_exactly_nothing(make_engram, name_text, problem, sign):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 30)))
    states = sign * states if sign == 1 else 3 * weight[targets]
    write_chunk(engram, engram.open_pack("a"), names, states, targets, weight, sign=sign)
    unread = name_text(engram, [40, 31, 45, 33, 47, 39, 41])
    assert not engram.read(unread).any()
    assert engram.read(names)[1:].any(-1).all()


def test_arguments_are_not_modified(make_engram, problem):
    engram = make_engram()
    arguments = problem(engram, list(range(1, 20)), bias=True)
    copies = [part.clone() for part in arguments]
    write_chunk(engram, engram.open_pack("a"), *arguments)
    assert all(torch.equal(part, copy) for part, copy in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hidden_states_of_other_precision_are_written_too(make_engram, problem, dtype):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 30)), dtype=dtype)
    result = write_chunk(engram, engram.open_pack("a"), names, states, targets, weight)
    assert result.surprise_before.dtype == torch.float32
    assert result.surprise_after[1:].mean() < 0.15 < result.surprise_before[1:].mean()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e5])
def test_extreme_logits_leave_finite_rows(make_engram, problem, scale, sign):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 30)))
    pack = engram.open_pack("a")
    if sign == -1:
        states = weight[targets]
    for _ in range(3):
        result = write_chunk(engram, pack, names, states * scale, targets, weight * scale, sign=sign)
        assert all(torch.isfinite(row).all() for row in rows_by_level(pack)[0].values())
        assert torch.isfinite(result.surprise_before).all()
        assert torch.isfinite(result.surprise_after).all()


@pytest.mark.parametrize("difference", [0.0, 1e-6, 1e-3])
def test_token_with_a_twin_shares_its_probability(make_engram, problem, difference):
    """No change of the state can tell the two apart, so none may grow without bound."""
    engram = make_engram()
    ids = list(range(1, 30))
    names, states, targets, weight, _ = problem(engram, ids)
    weight[45] = weight[5] + difference * weight[6]
    pack = engram.open_pack("a")
    write_chunk(engram, pack, names, states, targets, weight)
    after = surprise(engram, names, states, targets, weight)
    assert max(row.abs().max() for row in rows_by_level(pack)[0].values()) < 20
    assert after[3] == pytest.approx(math.log(2), abs=0.05)
    assert (after[4:] < LIKELY + 0.02).all()
