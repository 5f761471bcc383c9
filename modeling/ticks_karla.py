"""Ticks of the head in decoding, all in one call of the compiled kernel: the residual stream's and the neurons'."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import nn

from .attention_karla import WindowBlocks
from .ctm_karla import NeuronModels, Synchronisation
from .fast_bitlinear_karla import FastBitLinear
from .native_karla import c_function


MAX_HIDDEN = 256  # the kernel's scratch for one neuron
MAX_POSITIONS = 16  # beyond, torch's threads can win
_STREAM_LAYERS = ("stream_query", "stream_out", "stream_in", "stream_write")


def _structure(name: str, **kinds: str) -> type[ctypes.Structure]:
    """A C structure; the letters are those of `c_function`."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
    return type(name, (ctypes.Structure,), {"_fields_": [(field, types[kind]) for field, kind in kinds.items()]})


_HEADS = {"heads": "i", "width": "i", "keys": "i"}
_Place = _structure("karla_place", keys="p", values="p", mask="p", turn="p")
_Stream = _structure("karla_stream", query="p", out="p", into="p", write="p", **_HEADS)
_NEURON_WEIGHTS = (
    "norm_weight",
    "norm_bias",
    "weight_in",
    "bias_in",
    "weight_out",
    "bias_out",
    "keep",
    "left",
    "right",
)
_Neurons = _structure(
    "karla_neurons", query="p", synapse="p", **_HEADS, neurons="i", history="i", hidden="i", pairs="i",
    **dict.fromkeys(_NEURON_WEIGHTS, "p"), eps="d",
)  # fmt: skip


def can_tick(layers: Sequence[FastBitLinear | None], blocks: WindowBlocks, *states: torch.Tensor) -> bool:
    """Whether the kernel can run ticks on these: no gradients, CPU, float32, contiguous, a position of every sequence.

    Args:
        layers: as `BitLinear.compiled` gives them.
        blocks: keys and values.
        states: what the ticks read and change, [B, ...].
    """
    floats = (blocks.keys, blocks.values, blocks.mask, *states)
    return (
        not torch.is_grad_enabled()
        and c_function("karla_stream_ticks", "ppiippp") is not None
        and all(layer is not None for layer in layers)
        and blocks.mask.shape[2] == 1
        and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in floats)
        and all(tensor.is_contiguous() for tensor in states)
    )


def _place(blocks: WindowBlocks) -> tuple[ctypes.Structure, list[torch.Tensor]]:
    """Where keys, values, mask and rotations lie, and what must be held as long as they are read."""
    held = [
        tensor.contiguous() for tensor in (blocks.keys, blocks.values, blocks.mask, torch.view_as_real(blocks.turn))
    ]
    return _Place(*(tensor.data_ptr() for tensor in held)), held


def stream_ticks(
    layers: Sequence[FastBitLinear], blocks: WindowBlocks, stream: torch.Tensor, writes: torch.Tensor, ticks: int
) -> None:
    """Run ticks of `r <- r + W_o attention(W_r r)`, `w = W_2 silu(W_1 r)`, `r <- r + w`, `writes <- writes + w`.

    Args:
        layers: W_r, W_o, W_1, W_2; `can_tick` must hold for them and the rest.
        blocks: keys and values; one position of every sequence.
        stream: [B, D] float32. Changed in place.
        writes: [B, D] float32. Changed in place.
        ticks: turns to run.
    """
    kernel = c_function("karla_stream_ticks", "ppiippp")
    assert kernel is not None, "ask can_tick first"
    heads, count, width = blocks.keys.shape[1:]
    head = _Stream(*(layer.address for layer in layers), heads, width, count)
    scratch = stream.new_empty(2 * heads * width + count + stream.shape[1] + layers[2].out_features)
    place, held = _place(blocks)
    places = (tensor.data_ptr() for tensor in (stream, writes, scratch))
    kernel(ctypes.addressof(head), ctypes.addressof(place), len(stream), ticks, *places)
    del held  # until here


def neuron_ticks(
    layers: Sequence[FastBitLinear],
    parts: tuple[nn.LayerNorm, NeuronModels, Synchronisation],
    schedule: tuple[torch.Tensor, torch.Tensor],
    blocks: WindowBlocks,
    z: torch.Tensor,
    past: torch.Tensor,
    alpha: torch.Tensor,
) -> None:
    """Run ticks of the neurons: ask, look, mix, fire, synchronise.

    Args:
        layers: W_q and W_syn; `can_tick` must hold for them and the rest.
        parts: the synapse's norm, the neuron models (depth two, at most 256 hidden units) and the synchronisation.
        schedule: decay r [2P], and 1 / sqrt(beta) [ticks, 2P] before each tick to run.
        blocks: keys and values; one position of every sequence.
        z: [B, N] float32 activations. Changed in place.
        past: [B, N, M] float32 pre-activations, oldest first. Changed in place.
        alpha: [B, 2P] float32 sums of the synchronisation. Changed in place.
    """
    kernel = c_function("karla_neuron_ticks", "pppiipppp")
    assert kernel is not None, "ask can_tick first"
    (norm, models, sync), (keep, factors), (heads, count, width) = parts, schedule, blocks.keys.shape[1:]
    left, right = sync.pairs.chunk(2)
    weights = (norm.weight, norm.bias, models.weight_in, models.bias_in, models.weight_out, models.bias_out, keep)
    held = [tensor.contiguous() for tensor in (*weights, left, right, factors)]
    sizes = (z.shape[1], past.shape[2], models.weight_out.shape[2], alpha.shape[1])
    pointers = [tensor.data_ptr() for tensor in held]
    addresses = (layer.address for layer in layers)
    head = _Neurons(*addresses, heads, width, count, *sizes, *pointers[:-1], norm.eps)
    scratch = z.new_empty(sync.pairs.numel() // 4 + 2 * heads * width + count + 3 * z.shape[1])
    place, held_too = _place(blocks)
    places = (tensor.data_ptr() for tensor in (z, past, alpha, scratch))
    kernel(ctypes.addressof(head), ctypes.addressof(place), pointers[-1], len(z), len(factors), *places)
    del held, held_too  # until here


def _suits(head, blocks: WindowBlocks) -> bool:
    """Whether the kernel knows these neurons, and so few positions are its business."""
    keys = blocks.keys
    if not keys.is_cpu or keys.dtype != torch.float32 or blocks.mask.shape[2] > 1 or len(keys) > MAX_POSITIONS:
        return False
    return not head.has_neurons or _two_layers(head.neurons)


def _two_layers(models: NeuronModels) -> bool:
    """Whether these are the neuron models of the kernel: two layers, no temperatures, no dropout."""
    if models.temperature is not None or (models.dropout and models.training):
        return False
    return hasattr(models, "weight_out") and models.weight_out.shape[2] <= MAX_HIDDEN


def compiled_ticks(head, thought, fixed, first: int, ticks: int):
    """Ticks `first` to `first + ticks - 1` of a head in compiled calls; None where they cannot run.

    Args:
        head: a `KarlaHead`.
        thought: its `Thought` after tick `first - 1`. Not modified.
        fixed: its `Fixed`; one position of every sequence.
        first: number of the first tick, from 1.
        ticks: how many.

    Returns:
        The `Thought` after the last of them, or None.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _suits(head, fixed.blocks):
        return None
    names = [("query", "synapse") if head.has_neurons else (), _STREAM_LAYERS if head.has_stream else ()]
    asking, streaming = [[getattr(head, n).compiled(fixed.layers[n]) for n in group] for group in names]
    states = [
        state.clone() for state in (thought.z, thought.alpha, thought.stream, thought.writes) if state is not None
    ]
    if not can_tick([*asking, *streaming], fixed.blocks, *states):
        return None
    if head.has_neurons:
        (z, alpha), past = states[:2], torch.stack(thought.history, dim=2).transpose(0, 1).contiguous()
        schedule = fixed.keep, torch.stack(fixed.factors[first - 1 : first - 1 + ticks])
        neuron_ticks(asking, (head.synapse_norm, head.neurons, head.sync), schedule, fixed.blocks, z, past, alpha)
        thought = thought._replace(z=z, history=list(past.permute(2, 1, 0)), alpha=alpha)
    if head.has_stream:
        stream_ticks(streaming, fixed.blocks, *states[-2:], ticks)
        thought = thought._replace(stream=states[-2], writes=states[-1])
    return thought
