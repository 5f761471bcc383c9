"""Slow references for ctm_karla.py, attention_karla.py and certainty_karla.py: one position after the other.

Only tests and benchmarks import this file, so it never travels to the Hub.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .reference_bitlinear import naive_bitlinear


def naive_head(
    weights: dict[str, torch.Tensor],
    sources: torch.Tensor,
    states: torch.Tensor,
    position_ids: torch.Tensor,
    valid: torch.Tensor,
    *,
    num_heads: int,
    window: int,
    num_ticks: int,
) -> torch.Tensor:
    """What the head adds to every position after every tick, as ctm_karla.py's equations are written.

    Every position thinks alone and sees the whole sequence through one full-length mask; keys, values and quantised
    weights are made anew at each tick, synchronisation is a sum over all ticks so far instead of a recurrence.

    Args:
        weights: state dict of a trainable `KarlaHead`, with what needs a gradient. Not modified.
        sources: [B, T, S, D] backbone states of the source layers.
        states: [B, T', D] what the last T' positions know before thinking.
        position_ids: [B, T] int64.
        valid: [B, T] bool, False at padding.
        num_heads: attention heads.
        window: positions seen, the own included.
        num_ticks: ticks.

    Returns:
        [num_ticks, B, T', D] deltas, differentiable.
    """
    batch, total = valid.shape
    first = total - states.shape[1]
    deltas = []
    for b in range(batch):
        for t in range(first, total):
            seen = [bool(valid[b, i]) and t - window < i <= t for i in range(total)]
            deltas.append(
                _think(weights, sources[b], states[b, t - first], position_ids[b], t, seen, num_heads, num_ticks)
            )
    return torch.stack(deltas, dim=1).unflatten(1, (batch, total - first))


def _think(w, sources, state, positions, t, seen, num_heads, num_ticks) -> torch.Tensor:
    """The deltas [num_ticks, D] of position t."""
    has_neurons, has_stream = "up.weight" in w, "stream_write.weight" in w
    if has_neurons:
        z = [torch.tanh(w["start_state"] + naive_bitlinear(state, w["start.weight"]))]
        signals = list(w["start_history"].unbind(1))
    stream, writes, deltas = state, 0.0, []
    for _ in range(num_ticks):
        delta = 0.0
        if has_neurons:
            question = naive_bitlinear(_synchronisation(w, z)[: w["query.weight"].shape[1]], w["query.weight"])
            answer = _attention(w, question, sources, positions, t, seen, num_heads)
            mixed = naive_bitlinear(torch.cat([answer, z[-1]]), w["synapse.weight"])
            half = len(mixed) // 2
            signal = mixed[:half] * torch.sigmoid(mixed[half:])
            signal = nn.functional.layer_norm(signal, (half,), w["synapse_norm.weight"], w["synapse_norm.bias"])
            signals.append(signal)
            z.append(_neurons(w, torch.stack(signals[-w["start_history"].shape[1] :], dim=1)))
            delta = delta + naive_bitlinear(_synchronisation(w, z)[-w["up.weight"].shape[1] :], w["up.weight"])
        if has_stream:
            question = naive_bitlinear(stream, w["stream_query.weight"])
            answer = _attention(w, question, sources, positions, t, seen, num_heads)
            stream = stream + naive_bitlinear(answer, w["stream_out.weight"], norm=False)
            hidden = naive_bitlinear(stream, w["stream_in.weight"])
            write = naive_bitlinear(hidden * torch.sigmoid(hidden), w["stream_write.weight"], norm=False)
            stream, writes = stream + write, writes + write
            delta = delta + writes
        deltas.append(delta)
    return torch.stack(deltas)


def _synchronisation(w, z: list[torch.Tensor]) -> torch.Tensor:
    """s = sum_k r^(t-k) z_i(k) z_j(k) / sqrt(sum_k r^(t-k)) over the ticks k so far, [2 P]: P pairs ask, P answer."""
    r = torch.exp(-torch.log1p(torch.exp(w["sync.decay"])))
    left, right = w["sync.pairs"].chunk(2)
    products = sum(r ** (len(z) - 1 - k) * z[k][left] * z[k][right] for k in range(len(z)))
    return products / torch.sqrt(sum(r ** (len(z) - 1 - k) for k in range(len(z))))


def _neurons(w, history: torch.Tensor) -> torch.Tensor:
    """Each neuron's own model of its own history [N, M], one neuron after the other; [N]."""
    activations = []
    for n, values in enumerate(history):
        hidden = w["neurons.weight_in"][n] @ values + w["neurons.bias_in"][n, :, 0]
        half = len(hidden) // 2
        hidden = hidden[:half] * torch.sigmoid(hidden[half:])
        out = w["neurons.weight_out"][n] @ hidden + w["neurons.bias_out"][n, :, 0]
        activations.append(out[0] * torch.sigmoid(out[1]))
    return torch.stack(activations)


def _attention(w, question, sources, positions, t: int, seen: list[bool], num_heads: int) -> torch.Tensor:
    """Attention of one question [E] over the registers and every layer of every position, [E]."""
    size = len(question)
    width = size // num_heads
    projected = naive_bitlinear(sources, w["memory.project.weight"]) + w["memory.layer_embedding"]  # [T, S, 2 E]
    out = []
    for h in range(num_heads):
        q = _rotated(question[h * width : (h + 1) * width], int(positions[t]))
        keys, values, mask = [], [], []
        for key, value in zip(w["memory.registers"][0, h], w["memory.registers"][1, h], strict=True):
            keys.append(key)
            values.append(value)
            mask.append(True)
        for i in range(len(projected)):
            for layer in projected[i]:
                keys.append(_rotated(layer[h * width : (h + 1) * width], int(positions[i])))
                values.append(layer[size + h * width : size + (h + 1) * width])
                mask.append(seen[i])
        scores = torch.stack(keys) @ q / math.sqrt(width)
        scores = scores.masked_fill(~torch.tensor(mask), -torch.inf)
        out.append(scores.softmax(0) @ torch.stack(values))
    return torch.cat(out)


def _rotated(x: torch.Tensor, position: int, theta: float = 1000.0) -> torch.Tensor:
    """Coordinates 2k and 2k + 1 turned by position theta^(-2k/d)."""
    turned = []
    for k in range(len(x) // 2):
        angle = position * theta ** (-2 * k / len(x))
        turned.append(x[2 * k] * math.cos(angle) - x[2 * k + 1] * math.sin(angle))
        turned.append(x[2 * k] * math.sin(angle) + x[2 * k + 1] * math.cos(angle))
    return torch.stack(turned)


def naive_certainty(logits: list[float]) -> float:
    """1 - entropy / log K of softmax(logits).

    Example:
        >>> naive_certainty([1.0, 1.0])
        0.0
    """
    largest = max(logits)
    masses = [math.exp(value - largest) for value in logits]
    entropy = 0.0
    for mass in masses:
        p = mass / sum(masses)
        entropy -= p * math.log(p) if p > 0 else 0.0
    return 1.0 - entropy / math.log(len(logits))


def naive_halting_tick(certainties: list[float], threshold: float) -> int:
    """The first tick whose certainty reaches the threshold, tick 0 (no thought) included, or the last one.

    Example:
        >>> naive_halting_tick([0.1, 0.7, 0.9], 0.7), naive_halting_tick([0.1, 0.2, 0.3], 0.7)
        (1, 2)
    """
    for tick, sure in enumerate(certainties):
        if sure >= threshold:
            return tick
    return len(certainties) - 1


def naive_expected_ticks(certainties: list[float], threshold: float, width: float) -> float:
    """Sum over ticks of tick times the probability to stop there: at t with lambda_t unless before; at the last surely.

    Example:
        >>> naive_expected_ticks([0.5, 0.5, 0.5], 0.5, 0.1)
        0.75
    """
    going, expected = 1.0, 0.0
    for tick, sure in enumerate(certainties[:-1]):
        stops = 1 / (1 + math.exp((threshold - sure) / width))
        expected += tick * going * stops
        going *= 1 - stops
    return expected + (len(certainties) - 1) * going


def naive_two_tick_loss(
    state: torch.Tensor,
    deltas: torch.Tensor,
    labels: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    count: int = 64,
) -> torch.Tensor:
    """`two_tick_loss`, one position after the other; same arguments and result.

    Example:
        >>> state, weight = torch.tensor([[0.0, 0.0]]), torch.eye(2)
        >>> deltas = torch.tensor([[[0.0, 0.0]], [[0.0, 9.0]]])  # the first tick is better, the second is surer
        >>> round(naive_two_tick_loss(state, deltas, torch.tensor([0]), weight).item(), 3)
        4.847
    """
    losses = []
    for p, label in enumerate(labels.tolist()):
        before = _logits(state[p], output_embeddings, bias)
        likeliest = [token for token in before.argsort(descending=True).tolist() if token != label]
        candidates = [label, *likeliest][: min(count, len(before))]
        best, surest = [], []
        for delta in deltas:
            logits = _logits(state[p] + delta[p], output_embeddings, bias)[candidates].tolist()
            largest = max(logits)
            best.append(logits[0] - largest - math.log(sum(math.exp(value - largest) for value in logits)))
            surest.append(naive_certainty(logits))
        chosen = [best.index(max(best)), surest.index(max(surest))]
        ends = [_logits(state[p] + deltas[tick, p], output_embeddings, bias) for tick in chosen]
        losses.append(sum(end.logsumexp(0) - end[label] for end in ends) / 2)
    return torch.stack(losses)


def _logits(state: torch.Tensor, output_embeddings: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = output_embeddings @ state
    return logits if bias is None else logits + bias
