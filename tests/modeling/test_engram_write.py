"""The delta-rule write of the memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karla_hf.modeling.engram_karla import EngramTable
from karla_hf.modeling.reference_engram import naive_write_chunk
from karla_hf.modeling.writing_karla import DEFAULT_RULE, write_chunk


HIDDEN, VOCAB = 24, 50
LOG_TARGET = math.log(DEFAULT_RULE.target)


@pytest.fixture(scope="session")
def problem(name_text):
    """Function for the arguments of a write after a text: names, random hidden states, next tokens, output layer."""

    def make(engram, ids, bias=False, dtype=torch.float32):
        weight = torch.randn(VOCAB, HIDDEN)
        states = 0.5 * torch.randn(len(ids) - 1, HIDDEN).to(dtype)
        names = name_text(engram, ids).select(slice(len(ids) - 1))
        targets = torch.as_tensor(ids[1:])
        return names, states, targets, weight.to(dtype), torch.randn(VOCAB).to(dtype) if bias else None

    return make


def copy_of(table, dtype=None):
    copy = EngramTable(*table.rows.shape)
    copy.rows, copy.owners = table.rows.to(dtype or table.rows.dtype, copy=True), table.owners.clone()
    return copy


def surprise(engram, names, states, targets, weight, bias=None):
    """-log p of every target with the memory as it is, computed in float64."""
    logits = torch.nn.functional.linear(states.double() + engram.read(names), weight.double(), bias)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def test_position_without_a_name_claims_and_writes_nothing(make_engram, problem):
    engram = make_engram(orders=(3, 5))
    names, states, targets, weight, _ = problem(engram, [1, 2, 3])
    table = engram.open_pack("a")
    result = write_chunk(engram, table, names, states, targets, weight)
    assert not result.written.any()
    assert table.num_owned == 0
    assert not table.rows.any()
    torch.testing.assert_close(result.surprise_after, result.surprise_before)


WRITES = {
    "one position": {"ids": [3, 4]},
    "short": {"ids": [1, 2, 3, 4, 5]},
    "repeats itself": {"ids": [1, 2, 3, 4] * 6},
    "same name, other successor": {"ids": [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2, 3]},
    "crowded": {"ids": list(range(1, 49)), "rows": 7},
    "one family": {"ids": list(range(1, 20)), "orders": (2,), "weights": (1.0,)},
    "four families": {"ids": list(range(1, 30)), "orders": (1, 2, 3, 8), "weights": (0.1, 0.2, 0.3, 0.4)},
    "few coordinates": {"ids": list(range(1, 20)), "heads": 2, "head_dim": 6},
    "with bias": {"ids": list(range(1, 20)), "bias": True},
}


@pytest.fixture(scope="session")
def write_both(make_engram, problem):
    """Function that writes twice, fast and naive: results, tables and reads after each. The second meets other states."""

    def write(rows_dtype, ids, bias=False, **layout):
        engram = make_engram(**layout)
        ours, theirs = (make_engram(**layout) for _ in range(2))
        packs = [engram.open_pack("a") for engram in (ours, theirs)]
        for table, dtype in zip(packs, rows_dtype, strict=True):
            table.rows = table.rows.to(dtype)
        arguments = problem(engram, ids, bias)
        for _ in range(2):
            results = write_chunk(ours, packs[0], *arguments), naive_write_chunk(theirs, packs[1], *arguments)
            yield results, packs, (ours.read(arguments[0]), theirs.read(arguments[0]))
            arguments = (arguments[0], 0.5 * torch.randn_like(arguments[1]), *arguments[2:])

    return write


@pytest.mark.parametrize("case", WRITES)
def test_write_equals_naive_without_rounding(write_both, case):
    for (ours, theirs), packs, reads in write_both((torch.float32, torch.float64), **WRITES[case]):
        torch.testing.assert_close(ours.surprise_before.double(), theirs.surprise_before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.surprise_after.double(), theirs.surprise_after, rtol=1e-3, atol=1e-3)
        assert torch.equal(ours.written, theirs.written)
        assert torch.equal(packs[0].owners, packs[1].owners)
        torch.testing.assert_close(packs[0].rows.double(), packs[1].rows, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(reads[0], reads[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", WRITES)
def test_write_equals_naive_with_rows_in_half_precision(write_both, case):
    for (ours, theirs), packs, reads in write_both((torch.float16, torch.float16), **WRITES[case]):
        assert torch.equal(ours.written, theirs.written)
        assert torch.equal(packs[0].owners, packs[1].owners)
        torch.testing.assert_close(packs[0].rows, packs[1].rows, rtol=4e-3, atol=1e-3)
        torch.testing.assert_close(reads[0], reads[1], rtol=4e-3, atol=4e-3)


@settings(max_examples=15)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=14),
    orders=st.sampled_from([(1,), (2, 3), (1, 4), (3, 2, 6)]),
    heads=st.integers(1, 3),
    rows=st.sampled_from([1, 3, 100]),
    seed=st.integers(0, 10),
)
def test_any_write_equals_naive(write_both, ids, orders, heads, rows, seed):
    torch.manual_seed(seed)
    weights = tuple(1.0 / len(orders) for _ in orders)
    layout = {"orders": orders, "weights": weights, "heads": heads, "rows": rows}
    for (ours, theirs), packs, _ in write_both((torch.float32, torch.float64), ids, **layout):
        assert torch.equal(ours.written, theirs.written)
        assert torch.equal(packs[0].owners, packs[1].owners)
        torch.testing.assert_close(packs[0].rows.double(), packs[1].rows, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("ids", [list(range(1, 40)), [1, 2, 3, 4] * 9])
def test_order_within_a_chunk_does_not_matter(make_engram, problem, ids):
    """Unless two of its names want the same row: then the first one gets it."""
    engram, shuffled = make_engram(rows=300_007), make_engram(rows=300_007)
    names, states, targets, weight, _ = problem(engram, ids)
    owners = torch.stack([names.rows.flatten(), names.fingerprints[..., None].expand_as(names.rows).flatten()])
    assert len(owners.unique(dim=1)[0]) == len(owners[0].unique())
    order = torch.randperm(len(targets))
    first = write_chunk(engram, engram.open_pack("a"), names, states, targets, weight)
    other = write_chunk(shuffled, shuffled.open_pack("a"), names.select(order), states[order], targets[order], weight)
    assert torch.equal(engram.packs["a"].owners, shuffled.packs["a"].owners)
    assert torch.equal(first.written[order], other.written)
    torch.testing.assert_close(first.surprise_after[order], other.surprise_after, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(engram.packs["a"].rows, shuffled.packs["a"].rows, rtol=2e-3, atol=1e-4)


def test_write_makes_its_targets_likely(make_engram, problem):
    engram = make_engram()
    ids = list(range(1, 49))
    names, states, targets, weight, _ = problem(engram, ids)
    before = surprise(engram, names, states, targets, weight)
    result = write_chunk(engram, engram.open_pack("a"), names, states, targets, weight)
    after = surprise(engram, names, states, targets, weight)
    named = (names.fingerprints != 0).any(-1)
    assert before.mean() > 5
    assert (after[named] < -LOG_TARGET + 0.02).all()
    torch.testing.assert_close(result.surprise_before.double(), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.surprise_after[named].double(), after[named], rtol=0.05, atol=0.02)
    assert torch.equal(result.written, named & (before > -LOG_TARGET))


def test_what_is_likely_already_is_not_written(make_engram, problem):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 20)))
    table = engram.open_pack("a")
    write_chunk(engram, table, names, states, targets, weight)
    rows, owners = table.rows.clone(), table.owners.clone()
    states = weight[targets] * 10  # sure of every target without the memory
    assert (surprise(make_engram(), names, states, targets, weight) < -LOG_TARGET).all()
    empty = engram.open_pack("b")
    result = write_chunk(engram, empty, names, states, targets, weight)
    assert not result.written.any()
    assert empty.num_owned == 0
    assert torch.equal(table.rows, rows)
    assert torch.equal(table.owners, owners)


def test_write_touches_its_own_rows_of_its_own_pack_only(make_engram, problem):
    engram = make_engram()
    other = engram.open_pack("other")
    names, states, targets, weight, _ = problem(engram, list(range(1, 20)))
    write_chunk(engram, other, names, states, targets, weight)
    table = engram.open_pack("a")
    table.owners.random_(1, 9)
    table.rows.normal_()
    names, states, targets, weight, _ = problem(engram, list(range(30, 45)))
    table.owners[names.rows.flatten()] = 0
    before, other_before = copy_of(table), copy_of(other)
    write_chunk(engram, table, names, states, targets, weight)
    untouched = torch.ones(len(table.rows), dtype=torch.bool)
    untouched[names.rows.flatten()] = False
    assert torch.equal(table.rows[untouched], before.rows[untouched])
    assert torch.equal(table.owners[untouched], before.owners[untouched])
    assert not torch.equal(table.rows, before.rows)
    assert torch.equal(other.rows, other_before.rows)
    assert torch.equal(other.owners, other_before.owners)


def test_text_never_read_gets_exactly_nothing(make_engram, name_text, problem):
    engram = make_engram(rows=200_003)
    names, states, targets, weight, _ = problem(engram, list(range(1, 30)))
    write_chunk(engram, engram.open_pack("a"), names, states, targets, weight)
    unread = name_text(engram, [40, 31, 45, 33, 47, 39, 41])
    assert not engram.read(unread).any()
    assert engram.read(names)[1:].any(-1).all()


def test_arguments_are_not_modified(make_engram, problem):
    engram = make_engram()
    arguments = problem(engram, list(range(1, 20)), bias=True)
    copies = [part.clone() for part in (*arguments[0], *arguments[1:])]
    write_chunk(engram, engram.open_pack("a"), *arguments)
    assert all(torch.equal(part, copy) for part, copy in zip((*arguments[0], *arguments[1:]), copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_hidden_states_of_other_precision_are_written_too(make_engram, problem, dtype):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 30)), dtype=dtype)
    result = write_chunk(engram, engram.open_pack("a"), names, states, targets, weight)
    assert result.surprise_before.dtype == torch.float32
    assert result.surprise_after[1:].mean() < 0.15 < result.surprise_before[1:].mean()


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e5])
def test_extreme_logits_leave_finite_rows(make_engram, problem, scale):
    engram = make_engram()
    names, states, targets, weight, _ = problem(engram, list(range(1, 30)))
    table = engram.open_pack("a")
    result = write_chunk(engram, table, names, states * scale, targets, weight * scale)
    assert torch.isfinite(table.rows).all()
    assert torch.isfinite(result.surprise_before).all()
    assert torch.isfinite(result.surprise_after).all()


@pytest.mark.parametrize("difference", [0.0, 1e-6, 1e-3])
def test_token_with_a_twin_shares_its_probability(make_engram, problem, difference):
    """No change of the state can tell the two apart, so none may grow without bound."""
    engram = make_engram()
    ids = list(range(1, 30))
    names, states, targets, weight, _ = problem(engram, ids)
    weight[45] = weight[5] + difference * weight[6]
    table = engram.open_pack("a")
    write_chunk(engram, table, names, states, targets, weight)
    after = surprise(engram, names, states, targets, weight)
    assert table.rows.abs().max() < 20
    assert after[3] == pytest.approx(math.log(2), abs=0.05)
    assert (after[4:] < -LOG_TARGET + 0.02).all()
