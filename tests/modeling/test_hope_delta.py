"""The fast weights: chunks against tokens, against transformers' gated DeltaNet, and their bounds."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from karla_hf.modeling.delta_hope import FastWeights, Span, Streams, num_rows, run_fast_weights, unit
from karla_hf.modeling.reference_hope import naive_run_fast_weights, naive_unit


def make(length, size=8, count=3, dtype=torch.float64, self_referential=True, requires_grad=False):
    gates = torch.randn(count, length, 4, dtype=dtype) + torch.tensor([0.0, 3.0, 0.0, 0.0], dtype=dtype)
    streams = Streams(*torch.randn(3, count, length, size, dtype=dtype), gates)
    start = torch.randn(count, num_rows(size, self_referential), size, dtype=dtype) * 0.2
    for tensor in (*streams, start) if requires_grad else ():
        tensor.requires_grad_()
    return streams, start


def state_of(start, self_referential=True):
    return FastWeights(start, start if self_referential else None)


def spans(length, chunk, periods=None, start=0):
    """Spans as a sequence at position `start` has them, with each row's snapshot due by its period."""
    found, at = [], 0
    while at < length:
        stop = min(length, at + chunk - (start + at) % chunk)
        due = True if periods is None else torch.tensor([(start + at) % p == 0 for p in periods])[:, None, None]
        found.append(Span(at, stop, due))
        at = stop
    return found


def gradients(outputs, inputs, weights):
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs)


def difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("self_referential", [True, False])
@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (16, 16), (37, 16), (50, 7), (33, 64)])
def test_chunks_equal_tokens_in_value_and_gradient(self_referential, length, chunk):
    streams, start = make(length, self_referential=self_referential, requires_grad=True)
    ours, after = run_fast_weights(streams, state_of(start, self_referential), spans(length, chunk))
    naive, naive_after = naive_run_fast_weights(streams, state_of(start, self_referential), [chunk] * 3)
    assert difference((ours, after.running), (naive, naive_after.running)) <= 1e-12
    weights = torch.randn_like(ours), torch.randn_like(start)
    inputs = (*streams, start)
    pairs = gradients((ours, after.running), inputs, weights), gradients((naive, naive_after.running), inputs, weights)
    assert difference(*[[g if g is not None else torch.zeros(()) for g in side] for side in pairs]) <= 1e-9


def test_chunks_equal_tokens_in_single_precision_at_full_size():
    streams, start = make(200, size=64, count=6, dtype=torch.float32, requires_grad=True)
    ours, after = run_fast_weights(streams, state_of(start), spans(200, 64))
    naive, naive_after = naive_run_fast_weights(streams, state_of(start), [64] * 6)
    assert difference((ours, after.running), (naive, naive_after.running)) <= 1e-5
    weights = torch.randn_like(ours), torch.randn_like(start)
    inputs = (*streams, start)
    ours_g = gradients((ours, after.running), inputs, weights)
    naive_g = gradients((naive, naive_after.running), inputs, weights)
    for mine, theirs in zip(ours_g, naive_g, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_slow_snapshots_equal_tokens():
    periods = [8, 16, 32]
    streams, start = make(70)
    ours, after = run_fast_weights(streams, state_of(start), spans(70, 8, periods))
    naive, naive_after = naive_run_fast_weights(streams, state_of(start), periods)
    assert difference((ours, *after), (naive, *naive_after)) <= 1e-12


def test_continued_sequence_equals_whole():
    periods = [8, 16, 32]
    streams, start = make(61)
    whole, after = run_fast_weights(streams, state_of(start), spans(61, 8, periods))
    state, outputs, at = state_of(start), [], 0
    for count in (3, 5, 1, 1, 20, 31):
        piece = Streams(*(stream[:, at : at + count] for stream in streams))
        output, state = run_fast_weights(piece, state, spans(count, 8, periods, start=at))
        outputs.append(output)
        at += count
    assert difference((torch.cat(outputs, dim=1), *state), (whole, *after)) <= 1e-12


def test_snapshot_changes_only_when_due():
    streams, start = make(48)
    state, periods = state_of(start), [8, 16, 32]
    for t in range(48):
        before = state.snapshot.clone()
        piece = Streams(*(stream[:, t : t + 1] for stream in streams))
        _, state = run_fast_weights(piece, state, spans(1, 8, periods, start=t))
        changed = [not torch.equal(a, b) for a, b in zip(state.snapshot, before, strict=True)]
        assert changed == [t > 0 and t % period == 0 for period in periods]


def test_what_is_not_real_writes_nothing():
    streams, start = make(20)
    real = torch.rand(3, 20) < 0.6
    ours, after = run_fast_weights(streams, state_of(start), spans(20, 8), real)
    naive, naive_after = naive_run_fast_weights(streams, state_of(start), [8] * 3, real=real)
    assert difference((ours[real], after.running), (naive[real], naive_after.running)) <= 1e-12
    _, kept = run_fast_weights(streams, state_of(start), spans(20, 8), torch.zeros(3, 20, dtype=torch.bool))
    assert torch.equal(kept.running, start)


def test_plain_form_is_transformers_gated_delta_net():
    streams, start = make(70, size=16, dtype=torch.float32, self_referential=False)
    ours, after = run_fast_weights(streams, state_of(start, False), spans(70, 64))
    per_head = [stream.transpose(0, 1)[None] for stream in streams]
    query, key, value, gates = per_head
    out, final = torch_chunk_gated_delta_rule(
        unit(query) * query.shape[-1] ** 0.5,  # it scales queries itself
        unit(key),
        value,
        g=torch.nn.functional.logsigmoid(gates[..., 1]),
        beta=gates[..., 0].sigmoid(),
        initial_state=start.mT[None],
        output_final_state=True,
    )
    assert (out[0].transpose(0, 1) - ours).abs().max() <= 1e-5
    assert (final[0].mT - after.running).abs().max() <= 1e-5


def test_a_key_written_once_is_read_back():
    """At learning rate 1 and without decay, delta-rule memory gives exactly the target, also for a key written before."""
    streams, _ = make(5, self_referential=False)
    gates = torch.full_like(streams.gates, 40.0)
    key = streams.key[:, :1].expand(-1, 5, -1)
    start = torch.zeros(3, 8, 8, dtype=torch.float64)
    out, _ = run_fast_weights(Streams(key, key, streams.value, gates), FastWeights(start), spans(5, 4))
    torch.testing.assert_close(out, streams.value, atol=1e-5, rtol=0)


def test_fast_weights_are_exactly_differentiable():
    streams, start = make(7, size=3, count=1, requires_grad=True)

    def run(*tensors):
        *given, first = tensors
        out, state = run_fast_weights(Streams(*given), state_of(first), spans(7, 3))
        return out, state.running

    assert torch.autograd.gradcheck(run, (*streams, start))


def test_unit_equals_naive():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert (unit(x) - naive_unit(x)).abs().max() <= 1e-15
    assert torch.autograd.gradcheck(unit, (x,))
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_state_is_bounded_over_16k_tokens(dtype):
    """With decays near 1 and streams of large norm; in float16 the state and the solve are float32."""
    torch.manual_seed(0)
    state, largest = state_of(torch.randn(2, 50, 16) * 0.02), 0.0
    for at in range(0, 16384, 1024):
        streams = Streams(*(torch.randn(3, 2, 1024, 16) * 5).to(dtype), (torch.randn(2, 1024, 4) + 6).to(dtype))
        out, state = run_fast_weights(streams, state, spans(1024, 64, start=at))
        largest = max(largest, state.running.abs().max().item())
        assert out.dtype == dtype
        assert out.isfinite().all()
    assert state.running.dtype == torch.float32
    assert 0.05 < largest < 4


def test_autocast_does_not_reach_the_fast_weights():
    streams, start = make(20, dtype=torch.float32)
    plain, _ = run_fast_weights(streams, state_of(start), spans(20, 8))
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = run_fast_weights(streams, state_of(start), spans(20, 8))
    assert torch.equal(plain, cast)


def test_rebound_keys_are_recalled_where_a_hebbian_memory_mixes_them():
    """8 keys are written, then written again with other values: delta memory answers with the later ones."""
    size, keys = 32, 8
    key = torch.randn(1, keys, size, dtype=torch.float64)
    first, second = torch.randn(2, 1, keys, size, dtype=torch.float64)
    written = torch.cat([key, key], dim=1), torch.cat([first, second], dim=1)
    gates = torch.full((1, 2 * keys, 4), 40.0, dtype=torch.float64)
    start = FastWeights(torch.zeros(1, size, size, dtype=torch.float64))
    _, delta = run_fast_weights(Streams(written[0], *written, gates), start, spans(2 * keys, 8))
    hebbian = torch.einsum("btr,btk->brk", written[1], unit(written[0]))

    def recalled(memory):
        answers = unit(key) @ memory.mT
        return (
            (torch.cdist(answers, torch.cat([first, second], dim=1)).argmin(-1) - keys == torch.arange(keys))
            .sum()
            .item()
        )

    assert recalled(delta.running) == keys
    assert recalled(hebbian) < keys
