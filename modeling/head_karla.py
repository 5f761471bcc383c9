"""The head that thinks (L2): a residual attention + MLP block in ternary linears, looped over ticks.

One tick is, for every position on its own, one turn of a block whose weights are shared over ticks:

    r <- r + W_o attention(W_r r)        r <- r + w_t,  w_t = W_2 SiLU(W_1 r)        delta_t = sum of w up to t

Ticks, certainty and halting are those of the Continuous Thought Machine (https://arxiv.org/abs/2505.05522). Its neurons
think beside the stream with `ctm_num_neurons` > 0:

    s^a_t = synchronisation of the neurons so far        q_t = W_q s^a_t        o_t = attention(q_t, keys, values)
    a_t = LayerNorm(GLU(W_syn [o_t, z_{t-1}]))           z_t = NLM_n(last M values of a_n), a small model per neuron n
    s^o_t = synchronisation including z_t                delta_t += W_up RMSNorm(s^o_t)

The answer is `state + delta_t`. W_2 and W_up start at zero, so a new head changes nothing. Every linear is a `BitLinear`,
with an RMSNorm without weight on its input but for W_o and W_2; neuron models, synchronisation and start states are
float.
Nothing is carried from one position to the next, so prompt positions need keys and values but no ticks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .attention_karla import SourceMemory, WindowBlocks
from .bitlinear_karla import BitLinear
from .ctm_karla import NeuronModels, Synchronisation
from .ticks_karla import compiled_ticks


class Thought(NamedTuple):
    """State of n positions between two ticks; None where a part is switched off.

    Attributes:
        z: [n, N] activations.
        history: M pre-activations, each [N, n].
        alpha: [n, 2P] running sums of the synchronisation.
        stream: [n, D] residual stream.
        writes: [n, D] sum of the stream's MLP writes.
    """

    z: torch.Tensor | None = None
    history: list[torch.Tensor] | None = None
    alpha: torch.Tensor | None = None
    stream: torch.Tensor | None = None
    writes: torch.Tensor | None = None

    def keep(self, rows: torch.Tensor) -> Thought:
        """The state of the positions `rows` [n'] int64 alone."""
        z, alpha, stream, writes = (
            part if part is None else part.index_select(0, rows)
            for part in (self.z, self.alpha, self.stream, self.writes)
        )
        history = self.history and [signal.index_select(1, rows) for signal in self.history]
        return Thought(z, history, alpha, stream, writes)


class Fixed(NamedTuple):
    """What all ticks of a forward pass share.

    Attributes:
        blocks: keys and values.
        layers: quantised weights by name.
        keep: decay of the synchronisation, or None.
        factors: its normalisation by tick, or None.
    """

    blocks: WindowBlocks
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    keep: torch.Tensor | None = None
    factors: list[torch.Tensor] | None = None


class KarlaHead(nn.Module):
    """The head of a Karla. See the module's description for the equations.

    Args:
        config: a `KarlaConfig`.
    """

    def __init__(self, config):
        super().__init__()
        width, size, packed = config.text_config.hidden_size, config.ctm_hidden_size, config.ctm_packed
        self.num_heads, self.history_length = config.ctm_num_heads, config.ctm_history_length
        self.memory = SourceMemory(
            width, size, self.num_heads, len(config.ctm_source_layers), config.ctm_num_registers, packed
        )
        self.has_neurons, self.has_stream = config.ctm_num_neurons > 0, config.ctm_stream_size > 0
        self.gradient_checkpointing = False
        if self.has_neurons:
            neurons, pairs = config.ctm_num_neurons, config.ctm_num_pairs
            generator = torch.Generator().manual_seed(config.ctm_seed)
            self.start = BitLinear(width, neurons, packed=packed)
            self.start_state = nn.Parameter(torch.empty(neurons))
            self.start_history = nn.Parameter(torch.empty(neurons, self.history_length))
            self.sync = Synchronisation(neurons, pairs, config.ctm_num_self_pairs, generator)
            self.query = BitLinear(pairs, size, packed=packed)
            self.synapse = BitLinear(size + neurons, 2 * neurons, packed=packed)
            self.synapse_norm = nn.LayerNorm(neurons)
            self.neurons = NeuronModels(neurons, self.history_length, config.ctm_neuron_hidden_size)
            self.up = BitLinear(pairs, width, packed=packed)
        if self.has_stream:
            self.stream_query = BitLinear(width, size, packed=packed)
            self.stream_out = BitLinear(size, width, norm=False, packed=packed)
            self.stream_in = BitLinear(width, config.ctm_stream_size, packed=packed)
            self.stream_write = BitLinear(config.ctm_stream_size, width, norm=False, packed=packed)
        for layer in self.zero_initialised:
            layer.starts_at_zero = True

    @property
    def zero_initialised(self) -> list[BitLinear]:
        """The projections through which the head speaks; they start at zero."""
        return [
            layer for layer in (getattr(self, "up", None), getattr(self, "stream_write", None)) if layer is not None
        ]

    def quantized(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The ternary weights of a tick as they are now, by name, to pass to several calls of `forward`."""
        return {
            name: layer.quantized_weight() for name, layer in self.named_children() if isinstance(layer, BitLinear)
        }

    def forward(
        self,
        state: torch.Tensor,
        blocks: WindowBlocks,
        num_ticks: int,
        on_tick: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
        layers: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Think about every position for `num_ticks` ticks, or until it has its answer.

        Args:
            state: [B, T', D] what is known before thinking. Not modified.
            blocks: keys and values of the T' positions.
            num_ticks: S >= 1.
            on_tick: called after every tick with its number (from 1) and delta [n, D] of the positions that still think,
                at first all B * T'. Returns which of them go on, ascending, as an index [n'] int64; None for all.
            layers: `quantized()`, computed here if None.

        Returns:
            delta [n, D] of the last tick, of the positions that thought it.
        """
        layers, shape = layers or self.quantized(), state.shape[:2]
        fixed = Fixed(blocks, layers, *(self.sync.schedule(num_ticks) if self.has_neurons else ()))
        thinking = torch.inference_mode if not torch.is_grad_enabled() else contextlib.nullcontext
        with thinking():
            thought = self._begin(state.reshape(-1, state.shape[-1]), layers)
        tick = 0
        while tick < num_ticks:
            count = num_ticks if on_tick is None else 1
            with thinking():
                thought = self._think(thought, fixed, tick + 1, count, shape)
                tick += count
                delta = self._answer(thought, fixed, tick)
            going = None if on_tick is None else on_tick(tick, delta)
            if going is None or tick == num_ticks:
                continue
            if not len(going):
                break
            with thinking():
                thought, fixed = thought.keep(going), fixed._replace(blocks=fixed.blocks.keep(going))
            shape = (len(going), 1)
        return delta

    def _begin(self, state: torch.Tensor, layers: dict) -> Thought:
        thought = Thought()
        if self.has_neurons:
            z = torch.tanh(self.start_state + self.start(state, layers["start"]))
            history = list(self.start_history.t()[..., None].expand(-1, -1, len(state)))
            thought = thought._replace(z=z, history=history, alpha=self.sync.products(z))
        if self.has_stream:
            thought = thought._replace(stream=state, writes=torch.zeros_like(state))
        return thought

    def _think(self, thought: Thought, fixed: Fixed, first: int, count: int, shape: tuple[int, int]) -> Thought:
        """Think `count` ticks, beginning with tick `first`."""
        compiled = compiled_ticks(self, thought, fixed, first, count)
        if compiled is not None:
            return compiled
        for tick in range(first, first + count):
            thought = self._tick(thought, fixed, tick, shape)
        return thought

    def _tick(self, thought: Thought, fixed: Fixed, tick: int, shape: tuple[int, int]) -> Thought:
        queries = []
        if self.has_neurons:
            action = self._synchronised(thought, fixed, tick - 1).chunk(2, dim=1)[0]
            queries.append(self.query(action, fixed.layers["query"]))
        if self.has_stream:
            queries.append(self.stream_query(thought.stream, fixed.layers["stream_query"]))
        q = torch.stack(queries, dim=1).view(*shape, len(queries), self.num_heads, -1)
        seen = fixed.blocks.attend(q).flatten(0, 1).unbind(1)
        if self.has_neurons:
            thought = self._fire(thought, seen[0], fixed)
        if self.has_stream:
            stream = thought.stream + self.stream_out(seen[-1], fixed.layers["stream_out"])
            hidden = nn.functional.silu(self.stream_in(stream, fixed.layers["stream_in"]))
            write = self.stream_write(hidden, fixed.layers["stream_write"])
            thought = thought._replace(stream=stream + write, writes=thought.writes + write)
        return thought

    def _fire(self, thought: Thought, seen: torch.Tensor, fixed: Fixed) -> Thought:
        mixed = self.synapse(torch.cat([seen, thought.z], dim=-1), fixed.layers["synapse"])
        signal = self.synapse_norm(nn.functional.glu(mixed, dim=-1))
        history = [*thought.history[1:], signal.t()]
        z = self.neurons(history)
        alpha = torch.addcmul(self.sync.products(z), fixed.keep, thought.alpha)
        return thought._replace(z=z, history=history, alpha=alpha)

    def _synchronised(self, thought: Thought, fixed: Fixed, tick: int) -> torch.Tensor:
        """s_t = alpha_t / sqrt(beta_t), [n, 2P]: asking pairs, then answering pairs."""
        return (thought.alpha * fixed.factors[tick]).to(thought.z.dtype)

    def _answer(self, thought: Thought, fixed: Fixed, tick: int) -> torch.Tensor:
        if not self.has_neurons:
            return thought.writes
        answer = self._synchronised(thought, fixed, tick).chunk(2, dim=1)[1]
        spoken = self.up(answer, fixed.layers["up"])
        return spoken if thought.writes is None else thought.writes + spoken
