"""What the head allocates, measured: activations kept for the backward pass, and everything during inference."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from karla_hf import KarlaConfig
from karla_hf.modeling.bitlinear_karla import set_packed
from karla_hf.modeling.cache_karla import KarlaCacheLayer
from karla_hf.modeling.head_karla import KarlaHead
from karla_hf.modeling.losses_karla import TickJudge
from karla_hf.modeling.thinking_karla import Plan, Sources, think


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they are alive.

    Attributes:
        peak: the most bytes alive after an operation.
    """

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def shape_of(hidden: int, layers: int, vocabulary: int) -> dict:
    heads = {"num_attention_heads": hidden // 64, "num_hidden_layers": layers}
    return {"text_config": LlamaConfig(hidden_size=hidden, vocab_size=vocabulary, intermediate_size=8, **heads)}


def make_head(config: KarlaConfig) -> KarlaHead:
    head = KarlaHead(config)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.02)
    return head


def make_inputs(hidden: int, batch: int, length: int, sources: int = 5, reach: int = 127):
    layers = list(torch.randn(sources, batch, length, hidden).unbind(0))
    ids, positions = torch.zeros(batch, length, dtype=torch.int64), torch.arange(length).expand(batch, -1)
    return torch.randn(batch, length, hidden), Sources(layers, positions, ids, KarlaCacheLayer(reach, slack=0))


@pytest.mark.parametrize(("threshold", "length"), [(None, 2048), (0.5, 256)])
def test_inference_of_the_head_stays_below_fifty_megabytes(threshold, length):
    """Positions teacher-forced at the shape of Qwen2.5-1.5B, with the packed weights that a checkpoint holds."""
    config = KarlaConfig(**shape_of(1536, 28, 151_936), ctm_num_ticks=3)  # memory does not grow with ticks
    head = make_head(config).eval()
    set_packed(head, True)
    weights = sum(tensor.nbytes for tensor in (*head.parameters(), *head.buffers()))
    state, sources = make_inputs(1536, 1, length)
    projection = torch.randn(151_936, 1536, dtype=torch.bfloat16).mul_(0.02), None
    plan = Plan(3, threshold, False, False, config.certainty_candidates)
    known = (state, *sources.layers, sources.position_ids, sources.token_ids, projection[0])
    with torch.no_grad(), Allocations(*known, *head.parameters(), *head.buffers()) as counted:
        think(head, state, sources, config.ctm_window, plan, projection)
    print(f"weights {weights / 1e6:.1f} MB, peak of the rest {counted.peak / 1e6:.1f} MB")
    assert weights + counted.peak <= 50e6


def kept_bytes(run) -> int:
    """Bytes of the distinct storages that are kept for the backward pass of `run()`, once it is over."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(size for storage, size in kept.values() if not storage.expired())


@pytest.mark.parametrize("tick_loss", ["last", "mean", "two_tick"])
@pytest.mark.parametrize("hidden", [576, 1536])
def test_training_keeps_ten_kilobytes_per_position_and_tick(hidden, tick_loss):
    """With the default head: what 100 further positions add, the backbone's states included."""
    config = KarlaConfig(**shape_of(hidden, 4, 500), tick_loss=tick_loss, ponder_cost=0.1)
    head = make_head(config).train()
    head.gradient_checkpointing = True
    projection = torch.randn(500, hidden).mul_(0.05), None

    def run(length: int) -> torch.Tensor:
        state, sources = make_inputs(hidden, 2, length)
        judge = TickJudge(config, torch.randint(500, (2, length)), *projection)
        plan = Plan(config.ctm_num_ticks, None, False, False, config.certainty_candidates, judge)
        return think(head, state, sources, config.ctm_window, plan, projection).losses.sum()

    more = kept_bytes(lambda: run(200)) - kept_bytes(lambda: run(100))
    per = more / (2 * 100 * config.ctm_num_ticks)
    print(f"{hidden} {tick_loss}: {per:.0f} bytes per position and tick")
    assert 0 < per <= 10_000
