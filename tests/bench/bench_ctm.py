"""The ticks of a Continuous Thought Machine, forward and backward, against the published structure written plainly.

The peer is a module of `nn.MultiheadAttention`, which projects keys and values at every tick and returns its weights, neuron
models by einsum over weights that are stored neuron-last, and synchronisation from outer products, with the parity front
end's sizes: D = 256 neurons, 64 features of width 256, ten ticks, batch 64. Both sides learn from the same features.
"""

import torch
from torch import nn

from karla_hf import CtmConfig, CtmModel
from karla_hf.bench import Row
from karla_hf.modeling.modeling_ctm import ctm_certainties, ctm_loss


BATCH, FEATURES, SIZE, NEURONS, HEADS, TICKS, HISTORY, HIDDEN, CHOSEN, OUTPUT = 64, 64, 256, 256, 8, 10, 5, 16, 32, 128


class PerNeuronLinear(nn.Module):
    """A linear of its own for each neuron, weights [in, out, N]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        bound = (inputs + outputs) ** -0.5
        self.weight = nn.Parameter(torch.empty(inputs, outputs, NEURONS).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(1, NEURONS, outputs))
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (torch.einsum("bni,ion->bno", x, self.weight) + self.bias) / self.temperature


class PlainCtm(nn.Module):
    """The published structure, tick by tick."""

    def __init__(self):
        super().__init__()
        pairs = CHOSEN * (CHOSEN + 1) // 2
        self.features = nn.Sequential(nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE))
        self.query = nn.Linear(pairs, SIZE)
        self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
        self.synapse = nn.Sequential(nn.Linear(SIZE + NEURONS, 2 * NEURONS), nn.GLU(), nn.LayerNorm(NEURONS))
        self.neurons = nn.Sequential(
            PerNeuronLinear(HISTORY, 2 * HIDDEN), nn.GLU(), PerNeuronLinear(HIDDEN, 2), nn.GLU()
        )
        self.start_state = nn.Parameter(torch.randn(NEURONS) / NEURONS**0.5)
        self.start_history = nn.Parameter(torch.randn(NEURONS, HISTORY) / NEURONS**0.5)
        self.decay = nn.ParameterList([torch.full((pairs,), 0.02) for _ in range(2)])
        self.register_buffer("chosen", torch.randint(NEURONS, (2, 2, CHOSEN)))
        self.answer = nn.Linear(pairs, OUTPUT)

    def synchronise(self, half, z, sums):
        left, right = self.chosen[half]
        i, j = torch.triu_indices(CHOSEN, CHOSEN)
        products = (z[:, left, None] * z[:, None, right])[:, i, j]
        r = torch.exp(-self.decay[half])
        alpha, beta = sums
        sums = (products, torch.ones_like(products)) if alpha is None else (r * alpha + products, r * beta + 1)
        return sums[0] / sums[1].sqrt(), sums

    def forward(self, features, labels):
        keys = self.features(features)
        z = self.start_state.expand(len(features), -1)
        history = self.start_history.expand(len(features), -1, -1)
        asking = (None, None)
        _, answering = self.synchronise(1, z, (None, None))
        predictions = []
        for _ in range(TICKS):
            asked, asking = self.synchronise(0, z, asking)
            seen, _ = self.attention(self.query(asked)[:, None], keys, keys, average_attn_weights=False)
            signal = self.synapse(torch.cat([seen[:, 0], z], dim=-1))
            history = torch.cat([history[:, :, 1:], signal[..., None]], dim=-1)
            z = self.neurons(history)[..., 0]
            answered, answering = self.synchronise(1, z, answering)
            predictions.append(self.answer(answered))
        predictions = torch.stack(predictions, dim=-1)
        return ctm_loss(predictions, ctm_certainties(predictions, 2), labels, 2)


def rows():
    """One row, in ticks of the whole batch."""
    ours = CtmModel(
        CtmConfig(
            num_ticks=TICKS, num_neurons=NEURONS, hidden_size=SIZE, num_attention_heads=HEADS, feature_size=SIZE,
            history_length=HISTORY, neuron_hidden_size=HIDDEN, pair_selection="random", num_action_neurons=CHOSEN,
            num_output_neurons=CHOSEN, output_size=OUTPUT, num_classes=2,
        )
    ).train()  # fmt: skip
    plain = PlainCtm().train()
    features = torch.randn(BATCH, FEATURES, SIZE, requires_grad=True)
    labels = torch.randint(2, (BATCH, OUTPUT // 2))

    def learn(model):
        out = model(features, labels=labels)
        (out if model is plain else out.loss).backward()
        model.zero_grad()
        features.grad = None

    yield Row("fwd_bwd", TICKS, "ticks", lambda: learn(ours), "nn.MultiheadAttention at every tick",
              lambda: learn(plain))  # fmt: skip
