"""Slow references for modeling_ctm.py: the published Continuous Thought Machine, one sample and one tick after the other.

Only tests and benchmarks import this file, so it never travels to the Hub.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def naive_ctm(
    weights: dict[str, torch.Tensor],
    features: torch.Tensor,
    *,
    num_ticks: int,
    num_heads: int,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The equations of https://arxiv.org/abs/2505.05522 for weights with the public implementation's names and layout.

    Keys and values are projected anew at each tick, each neuron's model is computed by itself, and synchronisation is a
    sum over all ticks so far, with r = exp(-clamp(w, 0, 15)).

    Args:
        weights: a state dict, with what needs a gradient. Not modified.
        features: [B, S, F].
        num_ticks: T.
        num_heads: attention heads.
        num_classes: C classes of every answer.

    Returns:
        Predictions [B, O, T], certainties [B, 2, T], synchronisation [B, P] for the last answer, attention weights
        [B, T, H, S]; differentiable.
    """
    thoughts = [_think(weights, x, num_ticks, num_heads, num_classes) for x in features]
    return tuple(torch.stack(parts) for parts in zip(*thoughts, strict=True))


def naive_features(weights: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """Features [B, S, F] of the parity front end: an embedding, and [0, 1] rotated by 0 to 180 degrees, projected."""
    length = input_ids.shape[1]
    places = []
    for s in range(length):
        angle = math.pi * s / (length - 1) if length > 1 else 0.0
        turned = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=weights["backbone.embedding.weight"].dtype)
        places.append(_linear(weights, "positional_embedding.projection", turned))
    embedded = [torch.stack([weights["backbone.embedding.weight"][token] for token in row]) for row in input_ids]
    return torch.stack(embedded) + torch.stack(places)


def naive_ctm_loss(
    predictions: torch.Tensor, certainties: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """`ctm_loss`, one sample after the other; same arguments and result.

    Example:
        >>> predictions = torch.tensor([[[0.0, 0.0], [0.0, 9.0]]])
        >>> round(naive_ctm_loss(predictions, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0]]), 2).item(), 3)
        4.847
    """
    total = 0.0
    for prediction, certainty, answers in zip(predictions, certainties, labels.view(len(labels), -1), strict=True):
        losses = []
        for tick in prediction.unbind(1):
            logits = tick.view(-1, num_classes)
            mistakes = [logit.logsumexp(0) - logit[y] for logit, y in zip(logits, answers, strict=True)]
            losses.append(sum(mistakes) / len(mistakes))
        best = min(range(len(losses)), key=lambda t: losses[t].item())
        surest = max(range(len(losses)), key=lambda t: certainty[1, t].item())
        total = total + (losses[best] + losses[surest]) / 2
    return total / len(predictions)


def _think(w, features, num_ticks, num_heads, num_classes):
    """One sample's predictions [O, T], certainties [2, T], last synchronisation [P] and attention weights [T, H, S]."""
    keys = _norm(w, "kv_proj.1", _linear(w, "kv_proj.0", features))
    z = [w["start_activated_state"]]
    signals = list(w["start_trace"].unbind(1))
    memory = len(signals)
    predictions, certainties, attentions = [], [], []
    for _ in range(num_ticks):
        query = _linear(w, "q_proj", _synchronisation(w, "action", z))
        seen, attention = _attention(w, query, keys, num_heads)
        signals.append(_synapse(w, torch.cat([seen, z[-1]])))
        z.append(_neurons(w, torch.stack(signals[-memory:], dim=1)))
        spoken = _synchronisation(w, "out", z)
        predictions.append(_linear(w, "output_projector.0", spoken))
        certainties.append(_certainty(predictions[-1].view(-1, num_classes)))
        attentions.append(attention)
    return torch.stack(predictions, 1), torch.stack(certainties, 1), spoken, torch.stack(attentions)


def _synchronisation(w, half: str, z: list[torch.Tensor]) -> torch.Tensor:
    """s = sum_k r^(t-k) z_i(k) z_j(k) / sqrt(sum_k r^(t-k)) over the activations so far, for the pairs of one half."""
    r = torch.exp(-w[f"decay_params_{half}"].clamp(0, 15))
    left, right = w[f"{half}_neuron_indices_left"].tolist(), w[f"{half}_neuron_indices_right"].tolist()
    if len(r) == len(left):
        pairs = list(zip(left, right, strict=True))
    else:
        pairs = [(left[a], right[b]) for a in range(len(left)) for b in range(a, len(left))]
    i, j = (list(side) for side in zip(*pairs, strict=True))
    ages = range(len(z) - 1, -1, -1)
    above = sum(r**age * state[i] * state[j] for age, state in zip(ages, z, strict=True))
    return above / torch.sqrt(sum(r**age for age in ages))


def _attention(w, query, keys, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention of one query [E] over keys [S, E] that are also the values; [E] and weights [H, S]."""
    size = len(query)
    width = size // num_heads
    weight, bias = w["attention.in_proj_weight"], w["attention.in_proj_bias"]
    parts = [slice(k * size, (k + 1) * size) for k in range(3)]
    q = weight[parts[0]] @ query + bias[parts[0]]
    k, v = (keys @ weight[part].t() + bias[part] for part in parts[1:])
    out, weights = [], []
    for h in range(num_heads):
        head = slice(h * width, (h + 1) * width)
        weights.append((k[:, head] @ q[head] / math.sqrt(width)).softmax(0))
        out.append(weights[-1] @ v[:, head])
    return _linear(w, "attention.out_proj", torch.cat(out)), torch.stack(weights)


def _synapse(w, x: torch.Tensor) -> torch.Tensor:
    """Pre-activations [N] of [o, z]: GLU and LayerNorm of one linear, or the U-Net with its skips."""
    if "synapses.1.weight" in w:
        return _norm(w, "synapses.3", _glu(_linear(w, "synapses.1", x)))
    x = _silu(_norm(w, "synapses.first_projection.1", _linear(w, "synapses.first_projection.0", x)))
    levels = [x]
    while f"synapses.down_projections.{len(levels) - 1}.1.weight" in w:
        levels.append(_block(w, f"synapses.down_projections.{len(levels) - 1}", levels[-1]))
    y = levels.pop()
    while levels:
        k = len(levels) - 1
        y = _norm(w, f"synapses.skip_lns.{k}", _block(w, f"synapses.up_projections.{k}", y) + levels.pop())
    return y


def _neurons(w, history: torch.Tensor) -> torch.Tensor:
    """Each neuron's own model of its own history [N, M], one neuron after the other; [N]."""
    activations = []
    for n, x in enumerate(history):
        for layer in ("trace_processor.0.0", "trace_processor.0.2"):
            if f"{layer}.w1" in w:
                x = _glu((x @ w[f"{layer}.w1"][:, :, n] + w[f"{layer}.b1"][0, n]) / w[f"{layer}.T"])
        activations.append(x[0])
    return torch.stack(activations)


def _certainty(logits: torch.Tensor) -> torch.Tensor:
    """[H, 1 - H] with H the entropy over log C, mean over the answers [n, C]."""
    p = logits.softmax(-1)
    entropy = torch.stack([-(q * q.log()).sum() / math.log(len(q)) for q in p]).mean()
    return torch.stack([entropy, 1 - entropy])


def _block(w, name: str, x: torch.Tensor) -> torch.Tensor:
    return _silu(_norm(w, f"{name}.2", _linear(w, f"{name}.1", x)))


def _linear(w, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]


def _norm(w, name: str, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def _glu(x: torch.Tensor) -> torch.Tensor:
    half = len(x) // 2
    return x[:half] * torch.sigmoid(x[half:])


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)
