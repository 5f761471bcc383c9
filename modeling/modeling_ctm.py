"""A Continuous Thought Machine (https://arxiv.org/abs/2505.05522) that stands alone, exactly as published, but faster.

One tick, for features x_1 .. x_S that it may attend to:

    s^a = synchronisation of the asking pairs over z_0 .. z_{t-1}      o_t = attention(W_q s^a; x)
    a_t = synapse([o_t, z_{t-1}])                                      z_t = NLM_n(last M values of a_n), for every neuron n
    s^o = synchronisation of the answering pairs over z_0 .. z_t       y_t = W_y s^o      c_t = 1 - H(softmax y_t) / log C

What does not change over ticks is computed once: projected features, decays, sqrt(beta_t), scaled neuron models. Neurons lie
in the first dimension, so that their models are two batched products; the history is a list; the answers of all ticks are
projected together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from .attention_ctm import Memory, TickAttention
from .configuration_ctm import CtmConfig
from .ctm_karla import NeuronModels, PairSynchronisation, choose_pairs
from .synapse_ctm import Synapse, SynapseUNet


@dataclass
class CtmOutput(ModelOutput):
    """Output of `CtmModel`.

    Attributes:
        loss: mean two-tick loss in nats, if labels were given.
        predictions: [B, O, T] float32 (float64 in a float64 model), logits after every tick.
        certainties: [B, 2, T] normalised entropy and 1 - normalised entropy, mean over the answers of a prediction.
        synchronisation: [B, P] of the answering pairs after the last tick.
        attentions: [B, T, H, S] attention weights, if asked for.
    """

    loss: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    certainties: torch.FloatTensor | None = None
    synchronisation: torch.FloatTensor | None = None
    attentions: torch.FloatTensor | None = None


class State(NamedTuple):
    """What one tick hands to the next.

    Attributes:
        z: [N, B] activations.
        history: M pre-activations, each [N, B].
        alpha: [P, B] running sums of all pairs, the asking ones first.
        asked: synchronisation of the asking pairs, as many rows.
    """

    z: torch.Tensor
    history: list[torch.Tensor]
    alpha: torch.Tensor
    asked: torch.Tensor


class Fixed(NamedTuple):
    """What all ticks share.

    Attributes:
        memory: what is attended to.
        layers: of the neuron models.
        keep: [P, 1] decay.
        factors: 1 / sqrt(beta_t) [P, 1] for t = 0 .. T.
    """

    memory: Memory
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    keep: torch.Tensor
    factors: list[torch.Tensor]


class TokenFeatures(nn.Module):
    """Features of tokens: an embedding, plus W [-sin, cos] of an angle that goes from 0 to 180 degrees over the sequence.

    Args:
        vocab_size: number of tokens.
        feature_size: F.
    """

    def __init__(self, vocab_size: int, feature_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, feature_size)
        self.place = nn.Linear(2, feature_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S, F] from [B, S] int64."""
        weight = self.place.weight
        angle = torch.linspace(0, torch.pi, input_ids.shape[1], dtype=weight.dtype, device=weight.device)
        return self.embedding(input_ids) + self.place(torch.stack([-angle.sin(), angle.cos()], dim=-1))


class CtmModel(PreTrainedModel):
    """A Continuous Thought Machine over features or tokens. See the module's description for the equations.

    Args:
        config: a `CtmConfig`.

    Example:
        >>> sizes = {"num_neurons": 8, "hidden_size": 4, "num_attention_heads": 2, "feature_size": 3, "num_ticks": 5}
        >>> model = CtmModel(CtmConfig(**sizes, num_action_neurons=4, num_output_neurons=4))
        >>> model(torch.zeros(2, 6, 3), labels=torch.tensor([0, 1])).predictions.shape
        torch.Size([2, 2, 5])
    """

    config_class = CtmConfig
    base_model_prefix = "ctm"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["decay"]

    def __init__(self, config: CtmConfig):
        super().__init__(config)
        neurons, size = config.num_neurons, config.hidden_size
        self.gradient_checkpointing = False
        self.tokens = None if config.vocab_size is None else TokenFeatures(config.vocab_size, config.feature_size)
        self.project = nn.Linear(config.feature_size, size)
        self.project_norm = nn.LayerNorm(size)
        asking, answering = choose_pairs(
            config.pair_selection,
            neurons,
            config.num_action_neurons,
            config.num_output_neurons,
            config.num_self_pairs,
            torch.Generator().manual_seed(config.pair_seed),
        )
        self.num_asking, self.num_answering = asking.shape[1], answering.shape[1]
        self.sync = PairSynchronisation(torch.cat([asking, answering], dim=1))
        self.query = nn.Linear(self.num_asking, size)
        self.attention = TickAttention(size, config.num_attention_heads, config.dropout)
        if config.synapse_depth == 1:
            self.synapse = Synapse(size + neurons, neurons, config.dropout)
        else:
            self.synapse = SynapseUNet(size + neurons, neurons, config.synapse_depth, config.dropout)
        self.neurons = NeuronModels(
            neurons, config.history_length, config.neuron_hidden_size, temperature=True, dropout=config.dropout
        )
        self.start_state = nn.Parameter(torch.empty(neurons))
        self.start_history = nn.Parameter(torch.empty(neurons, config.history_length))
        self.answer = nn.Linear(self.num_answering, config.output_size)
        self.post_init()

    def get_input_embeddings(self):
        """The embedding of tokens, or None."""
        return None if self.tokens is None else self.tokens.embedding

    @torch.no_grad()
    def _init_weights(self, module):
        """As published, except for the decay, which starts at .982 instead of at the edge of what is allowed, 1."""
        if isinstance(module, CtmModel):
            for weight in (module.start_state, module.start_history):
                bound = sum(weight.shape) ** -0.5
                init.uniform_(weight, -bound, bound)
        elif isinstance(module, PairSynchronisation):
            init.constant_(module.decay, -4.0)
        elif isinstance(module, NeuronModels):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    bound = (parameter.shape[1] + parameter.shape[2]) ** -0.5
                    init.uniform_(parameter, -bound, bound)
                elif name.startswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.ones_(parameter)
        elif isinstance(module, TickAttention):
            init.xavier_uniform_(module.in_weight)
            init.zeros_(module.in_bias)
            init.zeros_(module.out.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    def forward(
        self,
        features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_ticks: int | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> CtmOutput:
        """Think for `num_ticks` ticks.

        Args:
            features: [B, S, F], S >= 1. With a single one attention is constant and queries learn nothing.
            input_ids: [B, S] int64 tokens instead, for a model with `vocab_size`.
            labels: [B, O / C] or, for a single answer, [B] int64 classes.
            num_ticks: T >= 1; None takes the configuration's.
            output_attentions: whether to return the attention weights.
            kwargs: ignored.

        Raises:
            ValueError: unless exactly one of `features` and `input_ids` is given, and `num_ticks` is 1 or more.
        """
        features = self._features(features, input_ids)
        ticks = self.config.num_ticks if num_ticks is None else num_ticks
        if ticks < 1:
            raise ValueError(f"`num_ticks` is {ticks}; give 1 or more.")
        state, fixed = self._begin(features, ticks)
        spoken, attentions = [], []
        for tick in range(1, ticks + 1):
            state, answering, weights = self._run(state, fixed, tick)
            spoken.append(answering)
            attentions.append(weights)
        answers = torch.stack(spoken).transpose(1, 2).to(state.z.dtype)  # [T, B, P]
        predictions = self.answer(answers)
        predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32)).permute(1, 2, 0)
        certainties = ctm_certainties(predictions, self.config.num_classes)
        return CtmOutput(
            loss=None if labels is None else ctm_loss(predictions, certainties, labels, self.config.num_classes),
            predictions=predictions,
            certainties=certainties,
            synchronisation=answers[-1],
            attentions=torch.stack(attentions, dim=1) if output_attentions else None,
        )

    def _features(self, features: torch.Tensor | None, input_ids: torch.Tensor | None) -> torch.Tensor:
        if (features is None) == (input_ids is None):
            given = "neither" if features is None else "both"
            raise ValueError(f"Of `features` and `input_ids` {given} was given; give one of them.")
        if input_ids is None:
            return features
        if self.tokens is None:
            raise ValueError("`input_ids` were given to a model without `vocab_size`; give `features`, or set it.")
        return self.tokens(input_ids)

    def _begin(self, features: torch.Tensor, num_ticks: int) -> tuple[State, Fixed]:
        """The start state, and what all ticks share."""
        memory = self.attention.remember(self.project_norm(self.project(features)), num_ticks)
        keep, factors = self.sync.schedule(num_ticks)
        z = self.start_state[:, None].expand(-1, len(features))
        history = list(self.start_history.t()[..., None].expand(-1, -1, len(features)))
        fixed = Fixed(memory, self.neurons.layers(), keep[:, None], [factor[:, None] for factor in factors])
        alpha = self.sync.products(z, dim=0)
        return State(z, history, alpha, self._synchronised(alpha, fixed.factors[0])[0]), fixed

    def _synchronised(self, alpha: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha / sqrt(beta) of the asking pairs and of the answering ones."""
        return (alpha * factor).split([self.num_asking, self.num_answering])

    def _run(self, state: State, fixed: Fixed, tick: int) -> tuple[State, torch.Tensor, torch.Tensor]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._tick, state, fixed, tick, use_reentrant=False)
        return self._tick(state, fixed, tick)

    def _tick(self, state: State, fixed: Fixed, tick: int) -> tuple[State, torch.Tensor, torch.Tensor]:
        """The state after tick 1, 2 ..., the answering pairs' synchronisation [P, B], and attention weights [B, H, S]."""
        query = self.query(state.asked.t().to(state.z.dtype))
        seen, weights = self.attention(query, fixed.memory)
        signal = self.synapse(torch.cat([seen, state.z.t()], dim=-1))
        history = [*state.history[1:], signal.t()]
        z = self.neurons(history, fixed.layers).t()
        alpha = torch.addcmul(self.sync.products(z, dim=0), fixed.keep, state.alpha)
        asked, answering = self._synchronised(alpha, fixed.factors[tick])
        return State(z, history, alpha, asked), answering, weights


def ctm_certainties(predictions: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Normalised entropy and 1 - normalised entropy, mean over the answers of each prediction.

    Args:
        predictions: [B, O, T] logits, O being answers of `num_classes` each. Not modified.
        num_classes: C >= 2.

    Returns:
        [B, 2, T] in [0, 1].

    Example:
        >>> ctm_certainties(torch.zeros(1, 6, 1), 3)[0, :, 0].tolist()
        [1.0, 0.0]
    """
    log_p = predictions.unflatten(1, (-1, num_classes)).log_softmax(2)
    entropy = -(log_p.exp() * log_p).sum(2).mean(1) / torch.log(torch.tensor(num_classes, dtype=log_p.dtype))
    return torch.stack([entropy, 1 - entropy], dim=1)


def ctm_loss(
    predictions: torch.Tensor, certainties: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Mean over the batch of (loss at the best tick + loss at the most certain tick) / 2 (CTM, section 2.5).

    A tick's loss is the mean cross-entropy of its answers; both ticks are chosen for each sample.

    Args:
        predictions: [B, O, T] logits.
        certainties: [B, 2, T] as from `ctm_certainties`.
        labels: [B, O / C] or [B] int64.
        num_classes: C.

    Returns:
        Scalar, in nats.

    Example:
        >>> predictions = torch.tensor([[[0.0, 0.0], [0.0, 9.0]]])  # the first tick is better, the second is surer
        >>> loss = ctm_loss(predictions, ctm_certainties(predictions, 2), torch.tensor([0]), 2)
        >>> round(loss.item(), 3)
        4.847
    """
    logits = predictions.unflatten(1, (-1, num_classes)).movedim(2, 1)  # [B, C, answers, T]
    expanded = labels.view(len(labels), -1, 1).expand(-1, -1, predictions.shape[-1])
    losses = nn.functional.cross_entropy(logits, expanded, reduction="none").mean(1)  # [B, T]
    chosen = torch.stack([losses.argmin(1), certainties[:, 1].argmax(1)], dim=1)
    return losses.gather(1, chosen).mean()
