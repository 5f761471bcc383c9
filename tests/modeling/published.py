"""State dicts with the names and layout of the public Continuous Thought Machine, random in every weight."""

import torch
from torch import nn


CASES = {
    "depth 1, random": {},
    "random-pairing": {"pair_selection": "random-pairing", "num_self_pairs": 2},
    "first-last": {"pair_selection": "first-last"},
    "U-Net": {"synapse_depth": 3},
    "deeper U-Net, random-pairing": {"synapse_depth": 5, "pair_selection": "random-pairing", "num_neurons": 23},
    "one-layer neuron models": {"neuron_hidden_size": 0},
    "one head, no history": {"num_attention_heads": 1, "history_length": 1},
    "one answer": {"output_size": 3, "num_classes": 3},
}
SIZES = {
    "num_neurons": 19,
    "hidden_size": 14,
    "num_attention_heads": 2,
    "feature_size": 5,
    "history_length": 3,
    "neuron_hidden_size": 3,
    "pair_selection": "random",
    "num_action_neurons": 5,
    "num_output_neurons": 4,
    "output_size": 6,
    "num_classes": 2,
}


def published_view(model):
    """Our weights under their names, as differentiable functions of ours (softplus(rho) is their decay w)."""
    ours = model.state_dict(keep_vars=True)
    theirs = {
        "kv_proj.0": "project", "kv_proj.1": "project_norm", "q_proj": "query", "attention.out_proj": "attention.out",
        "output_projector.0": "answer",
    }  # fmt: skip
    if "synapse.linear.weight" in ours:
        theirs |= {"synapses.1": "synapse.linear", "synapses.3": "synapse.norm"}
    else:
        theirs |= {"synapses.first_projection.0": "synapse.first.1", "synapses.first_projection.1": "synapse.first.2"}
        for k in range(model.config.synapse_depth - 1):
            theirs[f"synapses.skip_lns.{k}"] = f"synapse.norms.{k}"
            for way in ("up", "down"):
                theirs |= {f"synapses.{way}_projections.{k}.{n}": f"synapse.{way}.{k}.{n}" for n in (1, 2)}
    view = {f"{name}.{kind}": ours[f"{mine}.{kind}"] for name, mine in theirs.items() for kind in ("weight", "bias")}
    view["attention.in_proj_weight"], view["attention.in_proj_bias"] = (
        ours["attention.in_weight"],
        ours["attention.in_bias"],
    )
    view["start_activated_state"], view["start_trace"] = ours["start_state"], ours["start_history"]
    for k, (layer, side) in enumerate(zip(("trace_processor.0.0", "trace_processor.0.2"), ("in", "out"), strict=True)):
        if f"neurons.weight_{side}" in ours:
            view[f"{layer}.w1"] = ours[f"neurons.weight_{side}"].permute(2, 1, 0)
            view[f"{layer}.b1"] = ours[f"neurons.bias_{side}"].permute(2, 0, 1)
            view[f"{layer}.T"] = ours["neurons.temperature"][k]
    decay, pairs = nn.functional.softplus(ours["sync.decay"]), ours["sync.pairs"].view(2, -1)
    halves = zip(("action", "out"), decay.split([model.num_asking, model.num_answering]),
                 pairs.split([model.num_asking, model.num_answering], dim=1), strict=True)  # fmt: skip
    for half, rates, (left, right) in halves:
        view[f"decay_params_{half}"] = rates  # as many as neurons below: taken as pairs one to one
        view[f"{half}_neuron_indices_left"], view[f"{half}_neuron_indices_right"] = left, right
    if model.tokens is not None:
        view["backbone.embedding.weight"] = ours["tokens.embedding.weight"]
        for kind in ("weight", "bias"):
            view[f"positional_embedding.projection.{kind}"] = ours[f"tokens.place.{kind}"]
    return view


def published_state(*, num_neurons, hidden_size, feature_size, history_length, neuron_hidden_size, pair_selection,
                    num_action_neurons, num_output_neurons, output_size, synapse_depth=1, num_self_pairs=0,
                    vocab_size=None, **_):  # fmt: skip
    """A state dict as the public implementation would save it, float64; some decays are 0, some outside the clamp."""
    n, e, m, h = num_neurons, hidden_size, history_length, neuron_hidden_size
    state = {}

    def linear(name, rows, columns):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.randn(rows, columns) / columns**0.5,
            torch.randn(rows) / 3,
        )

    def norm(name, size):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(size) / 3, torch.randn(size) / 3

    def block(name, at, rows, columns):
        linear(f"{name}.{at}", rows, columns)
        norm(f"{name}.{at + 1}", rows)

    linear("kv_proj.0", e, feature_size)
    norm("kv_proj.1", e)
    state["attention.in_proj_weight"], state["attention.in_proj_bias"] = (
        torch.randn(3 * e, e) / e**0.5,
        torch.randn(3 * e),
    )
    linear("attention.out_proj", e, e)
    if synapse_depth == 1:
        linear("synapses.1", 2 * n, e + n)
        norm("synapses.3", n)
    else:
        step = (16 - n) / (synapse_depth - 1)
        widths = [int(n + k * step) for k in range(synapse_depth)]
        block("synapses.first_projection", 0, n, e + n)
        for k in range(synapse_depth - 1):
            block(f"synapses.down_projections.{k}", 1, widths[k + 1], widths[k])
            block(f"synapses.up_projections.{k}", 1, widths[k], widths[k + 1])
            norm(f"synapses.skip_lns.{k}", widths[k])
    shapes = {"0": (m, 2 * h), "2": (h, 2)} if h else {"0": (m, 2)}
    for k, (into, out) in shapes.items():
        state[f"trace_processor.0.{k}.w1"] = torch.randn(into, out, n) / into**0.5
        state[f"trace_processor.0.{k}.b1"] = torch.randn(1, n, out) / 3
        state[f"trace_processor.0.{k}.T"] = torch.tensor([0.7])
    state["start_activated_state"], state["start_trace"] = torch.randn(n), torch.randn(n, m)
    for half, count, first in (("action", num_action_neurons, n - num_action_neurons), ("out", num_output_neurons, 0)):
        left, right = torch.randint(n, (2, count))
        if pair_selection == "first-last":
            left = right = torch.arange(first, first + count)
        if pair_selection == "random-pairing":
            right[:num_self_pairs] = left[:num_self_pairs]
        state[f"{half}_neuron_indices_left"], state[f"{half}_neuron_indices_right"] = left, right
        pairs = count if pair_selection == "random-pairing" else count * (count + 1) // 2
        decay = torch.rand(pairs)
        decay[:3] = torch.tensor([0.0, -0.5, 20.0])  # both outside values are clamped
        state[f"decay_params_{half}"] = decay
        linear("q_proj" if half == "action" else "output_projector.0", e if half == "action" else output_size, pairs)
    if vocab_size is not None:
        state["backbone.embedding.weight"] = torch.randn(vocab_size, feature_size)
        linear("positional_embedding.projection", feature_size, 2)
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
