"""Weights of the public implementation of the Continuous Thought Machine, as a `CtmModel`.

The map, name by name (left: github.com/SakanaAI/continuous-thought-machines at aecfb63; right: here):

| theirs | here |
|---|---|
| `backbone.embedding`, `positional_embedding.projection` (parity) | `tokens.embedding`, `tokens.place` |
| `kv_proj.0`, `kv_proj.1` | `project`, `project_norm` |
| `q_proj` | `query` |
| `attention.in_proj_weight`, `in_proj_bias`, `out_proj` | `attention.in_weight`, `in_bias`, `out` |
| `synapses.1`, `synapses.3` (depth 1) | `synapse.linear`, `synapse.norm` |
| `synapses.first_projection`, `down_projections`, `up_projections`, `skip_lns` (U-Net) | `synapse.first`, `down`, `up`, `norms` |
| `trace_processor.0.0` and `.2`: `w1` [in, out, N], `b1` [1, N, out], `T` | `neurons.weight_in`, `_out` [N, out, in], `bias_in`, `_out`, `temperature` |
| `start_activated_state`, `start_trace` | `start_state`, `start_history` |
| `action_neuron_indices_left`, `_right`, `out_...` | `sync.pairs` |
| `decay_params_action`, `decay_params_out`: r = exp(-clamp(w, 0, 15)) | `sync.decay`: r = exp(-softplus(rho)) |
| `output_projector.0` | `answer` |
"""

from __future__ import annotations

import re

import torch

from .configuration_ctm import CtmConfig
from .ctm_karla import pair_up
from .modeling_ctm import CtmModel


LEAST_DECAY = 2.0**-26
PLAIN = {
    "kv_proj.0": "project",
    "kv_proj.1": "project_norm",
    "q_proj": "query",
    "attention.in_proj_": "attention.in_",
    "attention.out_proj": "attention.out",
    "synapses.1": "synapse.linear",
    "synapses.3": "synapse.norm",
    "start_activated_state": "start_state",
    "start_trace": "start_history",
    "output_projector.0": "answer",
    "backbone.embedding": "tokens.embedding",
    "positional_embedding.projection": "tokens.place",
}
OWN_FEATURES = ("backbone.", "initial_rgb.", "positional_embedding.")


def from_published(
    state: dict[str, torch.Tensor], *, num_ticks: int, num_heads: int, num_classes: int | None = None
) -> CtmModel:
    """Build a `CtmModel` with the weights of the public implementation; it makes the same predictions.

    Sizes and the choice of pairs follow from the weights. The parity front end is taken over; of any other backbone and
    positional embedding nothing is: give the model their sum as features [B, S, F].

    A decay w becomes rho = log(exp(w) - 1), which is -inf for w = 0; w is therefore raised to at least 2^-26. In float32 r
    is then 1 exactly as before; in float64 r is short of 1 by 1.5e-8, and a synchronisation over T ticks wrong by less
    than T times that, relative to the sum of its terms' magnitudes. Such a decay stays where it is in further training,
    since its gradient is as small: set `model.sync.decay` to -4 there to let it learn.

    Args:
        state: their state dict, after a first forward pass has set the lazy layers. Not modified.
        num_ticks: T (their `iterations`).
        num_heads: attention heads (their `heads`).
        num_classes: last entry of their `prediction_reshaper`, or None for a single answer.

    Returns:
        The model, in the weights' dtype and in eval mode.

    Raises:
        ValueError: if the state dict holds names that are not in the map, or lacks some.
    """
    renamed, pairs = {}, {}
    for name, value in state.items():
        target = _rename(name)
        if target is not None:
            renamed[target] = value
        elif not name.startswith(OWN_FEATURES) and not _is_special(name):
            raise ValueError(f"The state dict holds {name!r}, which no published CTM with attention has; remove it.")
    _check_complete(state)
    selection = _selection(state)
    for half in ("action", "out"):
        sides = [state[f"{half}_neuron_indices_{side}"] for side in ("left", "right")]
        pairs[half] = pair_up(*(side.cpu() for side in sides), selection)
    renamed["sync.pairs"] = torch.cat([pairs["action"], pairs["out"]], dim=1).flatten()
    decay = torch.cat([state["decay_params_action"], state["decay_params_out"]])
    renamed["sync.decay"] = _inverse_softplus(decay.double().clamp(LEAST_DECAY, 15.0)).to(decay.dtype)
    renamed |= _neuron_models(state)
    model = CtmModel(_config(state, selection, num_ticks, num_heads, num_classes)).to(decay.dtype)
    model.load_state_dict(renamed)
    return model.eval()


def _check_complete(state: dict[str, torch.Tensor]) -> None:
    needed = {f"{half}_neuron_indices_{side}" for half in ("action", "out") for side in ("left", "right")}
    needed |= {"kv_proj.0.weight", "trace_processor.0.0.w1", "decay_params_action", "decay_params_out"}
    needed |= {"output_projector.0.weight"}
    if "backbone.embedding.weight" in state:
        needed |= {"positional_embedding.projection.weight"}
    missing = sorted(needed - set(state))
    if missing:
        raise ValueError(
            f"The state dict lacks {', '.join(missing)}; give that of a ContinuousThoughtMachine with attention."
        )


def _rename(name: str) -> str | None:
    """Our name of a weight that is taken as it is."""
    for theirs, ours in PLAIN.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    found = re.fullmatch(r"synapses\.(first_projection|down_projections\.\d+|up_projections\.\d+)\.(\d)\.(\w+)", name)
    if found:
        block, layer, kind = found.groups()
        at = int(layer) + (block == "first_projection")  # theirs has no dropout there
        return f"synapse.{block.replace('_projections', '').replace('_projection', '')}.{at}.{kind}"
    return name.replace("synapses.skip_lns", "synapse.norms") if name.startswith("synapses.skip_lns.") else None


def _is_special(name: str) -> bool:
    return bool(
        re.fullmatch(
            r"decay_params_(action|out)|(action|out)_neuron_indices_(left|right)|trace_processor\.0\.[02]\.(w1|b1|T)",
            name,
        )
    )


def _selection(state: dict[str, torch.Tensor]) -> str:
    """How the pairs were chosen."""
    left, right = state["out_neuron_indices_left"], state["out_neuron_indices_right"]
    if len(left) == len(state["decay_params_out"]):
        return "random-pairing"
    return "first-last" if torch.equal(left, right) else "random"


def _inverse_softplus(value: torch.Tensor) -> torch.Tensor:
    return value + torch.log(-torch.expm1(-value))


def _neuron_models(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed, temperatures = {}, []
    for theirs, ours in (("trace_processor.0.0", "in"), ("trace_processor.0.2", "out")):
        if f"{theirs}.w1" in state:
            renamed[f"neurons.weight_{ours}"] = state[f"{theirs}.w1"].permute(2, 1, 0)
            renamed[f"neurons.bias_{ours}"] = state[f"{theirs}.b1"].permute(1, 2, 0)
            temperatures.append(state[f"{theirs}.T"])
    return {**renamed, "neurons.temperature": torch.cat(temperatures)}


def _config(state: dict, selection: str, num_ticks: int, num_heads: int, num_classes: int | None) -> CtmConfig:
    history, hidden, neurons = state["trace_processor.0.0.w1"].shape
    size, features = state["kv_proj.0.weight"].shape
    blocks = sum(name.startswith("synapses.skip_lns.") and name.endswith(".weight") for name in state)
    embedding = state.get("backbone.embedding.weight")
    return CtmConfig(
        num_ticks=num_ticks,
        num_neurons=neurons,
        hidden_size=size,
        num_attention_heads=num_heads,
        feature_size=features,
        vocab_size=None if embedding is None else len(embedding),
        history_length=history,
        neuron_hidden_size=hidden // 2 if "trace_processor.0.2.w1" in state else 0,
        synapse_depth=blocks + 1,
        pair_selection=selection,
        num_action_neurons=len(state["action_neuron_indices_left"]),
        num_output_neurons=len(state["out_neuron_indices_left"]),
        output_size=len(state["output_projector.0.weight"]),
        num_classes=num_classes,
    )
