"""HOPE's fast weights in chunks against a token loop and titans-pytorch, its decoding, and the size of its state. One thread.

Batch 4, 512 tokens, 6 heads of 64. `chunk_*`, `jit_*`, `titans_*`: the self-referential core (chunks of 64) alone, as in
`delta_hope`; its peers are the same mathematics token by token, eager and scripted, and `NeuralMemory` with its projections.
`titans_layer_*` compares whole layers: projections and convolution are in ours too. `decode_*`: the default model over a
random encoder of Granite's shape, in CPU time; 64 tokens, so that one chunk's encoding is in. `state_mb` has the limit as its peer.
Freed memory stays with the process, for all alike: otherwise a peer's gigabytes are what the next call pays page faults for.
"""

import copy
import ctypes
import platform
import statistics
import time

import torch

from karla_hf import HopeConfig, HopeForCausalLM
from karla_hf.bench import Result, Row
from karla_hf.modeling.delta_hope import NORM_EPS, FastWeights, Streams, num_rows, run_fast_weights
from karla_hf.modeling.frames_hope import Frame
from karla_hf.modeling.layer_hope import Plan, SelfModifyingMemory


BATCH, LENGTH, HEADS, HEAD_DIM, CHUNK = 4, 512, 6, 64, 64
ROUNDS = 3
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names in glibc's malloc.h


def unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / ||x||."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def token_loop(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor, start: torch.Tensor, chunk: int, eps: float
) -> torch.Tensor:  # fmt: skip
    """Outputs [N, T, K] of the self-referential rule, one token after the other; TorchScript takes it as it is."""
    size = key.shape[2]
    running, snapshot = start, start
    outputs: list[torch.Tensor] = []
    for t in range(key.shape[1]):
        if t % chunk == 0:
            snapshot = running
        a, c, g = key[:, t].unsqueeze(2), value[:, t].unsqueeze(2), gates[:, t].unsqueeze(2)
        made = torch.bmm(snapshot[:, 2 * size :], a)
        k = unit((a + made[:, :size]).transpose(1, 2), eps)
        eta, alpha = torch.sigmoid(g[:, :1] + made[:, size : size + 1]), torch.sigmoid(g[:, 1:2] + made[:, size + 1 :])
        v = c + torch.bmm(snapshot[:, size : 2 * size], c)
        own = torch.bmm(snapshot, v)
        targets = unit(own[:, : 3 * size].reshape(-1, 3, size) + v.transpose(1, 2), eps).reshape(-1, 3 * size, 1)
        u = torch.cat([targets, torch.tanh(g[:, 2:] + own[:, 3 * size :])], dim=1)
        decayed = alpha * running
        error = u - torch.bmm(decayed, k.transpose(1, 2))
        running = decayed + torch.bmm(eta * error, k)
        outputs.append(torch.bmm(running[:, :size], unit(query[:, t : t + 1], eps).transpose(1, 2)).squeeze(2))
    return torch.stack(outputs, dim=1)


def without_gradient(call):
    """The call under `no_grad`."""

    def run():
        with torch.no_grad():
            call()

    return run


def with_backward(call, leaves):
    """The call, and the gradient of its outputs' sum with respect to `leaves`."""

    def run():
        torch.autograd.grad(call().sum(), leaves)

    return run


def core_rows():
    """The core against the token loop, scripted and not, and against titans-pytorch."""
    count, rows = BATCH * HEADS, num_rows(HEAD_DIM, True)
    leaves = [torch.randn(count, LENGTH, HEAD_DIM) for _ in range(3)]
    leaves += [
        torch.randn(count, LENGTH, 4) + torch.tensor([0.0, 4.0, 0.0, 0.0]),
        torch.randn(count, rows, HEAD_DIM) * 0.02,
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    spans = Frame(torch.zeros(1, dtype=torch.int64), LENGTH, None, CHUNK).spans([CHUNK], "cpu")

    def ours():
        *streams, start = leaves
        return run_fast_weights(Streams(*streams), FastWeights(start, start), spans)[0]

    scripted = torch.jit.script(token_loop)
    peers = {"chunk": (token_loop, "token loop"), "jit": (scripted, "torch.jit.script of it")}
    torch.testing.assert_close(ours(), token_loop(*leaves, CHUNK, NORM_EPS), rtol=0, atol=1e-5)
    amount = BATCH * LENGTH
    for name, (loop, what) in peers.items():
        peer = lambda loop=loop: loop(*leaves, CHUNK, NORM_EPS)  # noqa: E731
        yield Row(f"{name}_fwd", amount, "tokens", without_gradient(ours), what, without_gradient(peer))
        yield Row(f"{name}_fwd_bwd", amount, "tokens", with_backward(ours, leaves), what, with_backward(peer, leaves))
    yield from titans_rows("titans", ours, leaves)


def titans_rows(name, ours, leaves):
    """A call against titans-pytorch's NeuralMemory of the same width and heads."""
    from titans_pytorch import NeuralMemory

    peer, x = (
        NeuralMemory(HEADS * HEAD_DIM, CHUNK, dim_head=HEAD_DIM, heads=HEADS),
        torch.randn(BATCH, LENGTH, HEADS * HEAD_DIM),
    )
    theirs = [*peer.parameters(), x.requires_grad_()]

    def call():
        return peer(x)[0]

    def train():
        torch.autograd.grad(call().sum(), theirs, allow_unused=True)

    what, amount = "titans-pytorch NeuralMemory", BATCH * LENGTH
    yield Row(f"{name}_fwd", amount, "tokens", without_gradient(ours), what, without_gradient(call))
    yield Row(f"{name}_fwd_bwd", amount, "tokens", with_backward(ours, leaves), what, train)


def layer_rows():
    """The whole layer against titans-pytorch."""
    torch.manual_seed(0)
    encoder = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 1, "vocab_size": 10}
    model = HopeForCausalLM(HopeConfig(encoder_config=encoder, num_hidden_layers=1, snapshot_periods=[CHUNK]))
    layer: SelfModifyingMemory = model.model.layers[0].memory
    frame = Frame(torch.zeros(BATCH, dtype=torch.int64), LENGTH, None, CHUNK)
    plan, x = Plan(frame, frame.spans([CHUNK] * HEADS, "cpu"), None), torch.randn(BATCH, LENGTH, HEADS * HEAD_DIM)
    leaves = [*layer.parameters(), x.requires_grad_()]
    yield from titans_rows("titans_layer", lambda: layer(x, plan, None), leaves)


@torch.no_grad()
def decode_results():
    """Decoding with the cache at three lengths, and without one."""
    model = HopeForCausalLM(HopeConfig()).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, 4096))
    caches = {n: model(ids[:, :n], logits_to_keep=1, use_cache=True).past_key_values for n in (128, 512, 4096)}

    def decode(length):
        cache = copy.deepcopy(caches[length])
        started = time.process_time()
        for t in range(CHUNK):
            model(ids[:, t : t + 1], past_key_values=cache)
        return CHUNK / (time.process_time() - started)

    def reencode():
        started = time.process_time()
        model(ids[:, :LENGTH], use_cache=False, logits_to_keep=1)
        return 1 / (time.process_time() - started)

    found = [(decode(128), decode(512), decode(4096), reencode()) for _ in range(ROUNDS)]
    at_128, at_512, at_4096, without = (statistics.median(values) for values in zip(*found, strict=True))
    yield Result("decode_vs_reencode", at_512, "tokens/CPU s", "all 512 tokens again", without)
    yield Result("decode_4096_vs_128", at_4096, "tokens/CPU s", "at context 128", at_128)
    yield Result("state_mb", caches[512].num_bytes / 1e6, "MB", "limit", 20.0)


def keep_freed_memory():
    """Let glibc give nothing back, as `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_MAX_` do; elsewhere nothing is changed."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_MAX, 0)


def rows():
    """All rows."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield from core_rows()
    yield from layer_rows()
    yield from decode_results()
