"""Windowed attention in blocks against attention with one full-length mask; rotary positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karla_hf.modeling.attention_karla import SourceMemory, _cut_many, _cut_one, cut_blocks, rotate, rotations


HEADS, WIDTH, SOURCES, REGISTERS = 2, 4, 3, 2


def inputs(batch, total, length, groups=1, registers=REGISTERS):
    keys_values = torch.randn(batch, 2, HEADS, total, SOURCES, WIDTH, dtype=torch.float64)
    always = torch.randn(2, HEADS, registers, WIDTH, dtype=torch.float64)
    queries = torch.randn(batch, length, groups, HEADS, WIDTH, dtype=torch.float64)
    positions = torch.arange(total - length, total).expand(batch, -1)
    return keys_values, always, queries, positions


def full_attention(keys_values, valid, registers, queries, positions, window):
    """The same with every key, one full-length mask and an explicit softmax."""
    total, length = valid.shape[1], queries.shape[1]
    keys, values = keys_values.unbind(1)  # [B, H, T, S, d]
    queries = rotate(queries, rotations(positions, WIDTH, queries.dtype)[:, :, None, None])
    query_at = torch.arange(total - length, total)[:, None]
    key_at = torch.arange(total)[None]
    allowed = (key_at <= query_at) & (key_at > query_at - window) & valid[:, None]  # [B, T', T]
    scores = torch.einsum("blghd,bhtsd->bglhts", queries, keys) / WIDTH**0.5
    scores = scores.masked_fill(~allowed[:, None, :, None, :, None], -torch.inf).flatten(-2)
    register_scores = torch.einsum("blghd,hrd->bglhr", queries, registers[0]) / WIDTH**0.5
    share = torch.cat([register_scores, scores], dim=-1).softmax(-1)
    out = torch.einsum("bglhr,hrd->blghd", share[..., : registers.shape[2]], registers[1])
    out = out + torch.einsum("bglhk,bhkd->blghd", share[..., registers.shape[2] :], values.flatten(2, 3))
    return out.flatten(-2)


def assert_equals_full(batch, total, length, window, groups=1, registers=REGISTERS, valid=None):
    keys_values, always, queries, positions = inputs(batch, total, length, groups, registers)
    if valid is None:
        valid = torch.ones(batch, total, dtype=torch.bool)
    blocks = cut_blocks(keys_values, valid, always, positions, window)
    expected = full_attention(keys_values, valid, always, queries, positions, window)
    found = blocks.attend(queries)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("total", [1, 4, 5, 6, 9, 10, 11, 23])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_equal_a_full_mask(total, window, groups):
    assert_equals_full(2, total, total, window, groups)


@settings(max_examples=80)
@given(
    batch=st.integers(1, 3),
    total=st.integers(1, 20),
    missing=st.integers(0, 19),
    window=st.integers(1, 25),
    groups=st.integers(1, 2),
    registers=st.integers(1, 3),
    padding=st.lists(st.integers(0, 20), min_size=3, max_size=3),
)
def test_any_blocks_equal_a_full_mask(batch, total, missing, window, groups, registers, padding):
    length = max(1, total - missing)
    valid = torch.arange(total)[None] >= torch.tensor(padding[:batch])[:, None]
    assert_equals_full(batch, total, length, window, groups, registers, valid)


def test_masked_positions_in_the_middle_are_not_seen():
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[0, [2, 3, 7]] = False
    assert_equals_full(1, 12, 12, window=4, valid=valid)


def test_position_that_sees_registers_only_is_finite():
    assert_equals_full(1, 6, 6, window=3, valid=torch.zeros(1, 6, dtype=torch.bool))


def test_later_keys_change_nothing_before_them():
    keys_values, always, queries, positions = inputs(1, 13, 13)
    valid = torch.ones(1, 13, dtype=torch.bool)
    before = cut_blocks(keys_values, valid, always, positions, 4).attend(queries)
    keys_values[:, :, :, 6:] = torch.randn_like(keys_values[:, :, :, 6:])
    after = cut_blocks(keys_values, valid, always, positions, 4).attend(queries)
    assert torch.equal(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6:], before[:, 6:])


def test_key_is_seen_by_its_window_and_nobody_else():
    keys_values, always, queries, positions = inputs(1, 13, 13)
    valid = torch.ones(1, 13, dtype=torch.bool)
    before = cut_blocks(keys_values, valid, always, positions, 4).attend(queries)
    keys_values[:, :, :, 6] += 1
    after = cut_blocks(keys_values, valid, always, positions, 4).attend(queries)
    assert (before != after).flatten(2).any(-1)[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9]


def test_gradients_equal_a_full_mask():
    keys_values, always, queries, positions = inputs(2, 9, 7, groups=2)
    valid = torch.ones(2, 9, dtype=torch.bool)
    variables = [tensor.requires_grad_() for tensor in (keys_values, always, queries)]
    direction = torch.randn(2, 7, 2, HEADS * WIDTH, dtype=torch.float64)
    ours = cut_blocks(keys_values, valid, always, positions, 4).attend(queries)
    theirs = full_attention(keys_values, valid, always, queries, positions, 4)
    for mine, other in zip(
        torch.autograd.grad(ours, variables, direction), torch.autograd.grad(theirs, variables, direction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_rotated_products_depend_on_distance_only():
    x, y = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    positions = torch.arange(5)[None]
    products = []
    for shift in (0, 1, 1000):
        turn = rotations(positions + shift, 8, torch.float64)
        products.append(rotate(x, turn) @ rotate(y, turn).transpose(1, 2))
    torch.testing.assert_close(products[1], products[0])
    torch.testing.assert_close(products[2], products[0])
    assert torch.equal(rotate(x, rotations(torch.zeros(1, 5), 8, torch.float64)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotation_keeps_dtype_and_length(dtype):
    x = torch.randn(1, 3, 6).to(dtype)
    turned = rotate(x, rotations(torch.tensor([[3, 50, 7]]), 6, dtype))
    assert turned.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=tolerance, atol=tolerance)


def test_keys_are_rotated_values_are_not_and_each_layer_has_its_embedding():
    memory = SourceMemory(6, HEADS * WIDTH, HEADS, SOURCES, REGISTERS).double()
    torch.nn.init.normal_(memory.layer_embedding)
    sources = torch.randn(2, 5, SOURCES, 6, dtype=torch.float64)
    positions = torch.arange(5).expand(2, -1)
    with torch.no_grad():
        found = memory(sources, positions)
        plain = memory.project(sources) + memory.layer_embedding
    assert found.shape == (2, 2, HEADS, 5, SOURCES, WIDTH)
    keys, values = plain.unflatten(-1, (2, HEADS, WIDTH)).permute(3, 0, 4, 1, 2, 5)  # [2, B, H, T, S, d]
    assert torch.equal(found[:, 1], values)
    turn = rotations(positions, WIDTH, torch.float64)
    for source in range(SOURCES):
        expected = rotate(keys[:, :, :, source].transpose(1, 2), turn[:, :, None]).transpose(1, 2)
        assert torch.equal(found[:, 0, :, :, source], expected)


@pytest.mark.parametrize(("total", "window"), [(1, 1), (5, 5), (9, 4), (7, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_query_is_cut_as_many_are(batch, total, window):
    keys_values, always, _, _ = inputs(batch, total, 1)
    valid = torch.rand(batch, total) < 0.7
    for ours, theirs in zip(
        _cut_one(keys_values, valid, always, 1, window), _cut_many(keys_values, valid, always, 1, window), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
