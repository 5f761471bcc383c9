"""What the Karla models share: their outputs, initialisation, and the frozen backbone."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .attention_karla import SourceMemory
from .backbone_karla import split_backbone
from .bitlinear_karla import BitLinear
from .checkpoint_karla import KarlaCheckpointMixin
from .configuration_karla import KarlaConfig
from .ctm_karla import NeuronModels, Synchronisation
from .engram_karla import Engram
from .head_karla import KarlaHead
from .layer_engram_karla import HashedRows, RowGate
from .publishing_karla import KarlaPublishingMixin


logger = logging.get_logger(__name__)


@dataclass
class KarlaModelOutput(ModelOutput):
    """Output of `KarlaModel`.

    Attributes:
        last_hidden_state: [B, N, D] fused states of the last N positions (N = T unless `logits_to_keep` is given).
        past_key_values: the cache.
        hidden_states: the backbone's, if asked for.
        ticks_used: [B, N] int64 ticks of the answers.
        certainty: [B, N] float32 in [0, 1]; None unless a rule measured it.
        tick_deltas: [S, B, N, D] changes after every tick, if `all_ticks`.
        tick_losses: [B, N] losses of what was judged; None without a judge.
        logits: [B, N, V] the output layer's result, where it is known already because no position thought.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    ticks_used: torch.LongTensor | None = None
    certainty: torch.FloatTensor | None = None
    tick_deltas: torch.FloatTensor | None = None
    tick_losses: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


@dataclass
class KarlaCausalLMOutput(ModelOutput):
    """Output of `KarlaForCausalLM`.

    Attributes:
        loss: mean loss in nats, if labels were given.
        logits: [B, N, V]; None while the model trains with a loss over several ticks.
        past_key_values: the cache.
        hidden_states: the backbone's, if asked for.
        ticks_used: [B, N] int64 ticks of the answers.
        certainty: [B, N] float32 in [0, 1] of the answers: over the candidates before thinking where a rule used them,
            else over the likeliest tokens of the answer.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    ticks_used: torch.LongTensor | None = None
    certainty: torch.FloatTensor | None = None


class KarlaPreTrainedModel(KarlaPublishingMixin, KarlaCheckpointMixin, PreTrainedModel):
    """What the Karla models share: a frozen backbone, initialisation, and access to the output layer."""

    config_class = KarlaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["decay"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, KarlaHead):
            if module.has_neurons:
                bound = (len(module.start_state)) ** -0.5
                init.uniform_(module.start_state, -bound, bound)
                bound = sum(module.start_history.shape) ** -0.5
                init.uniform_(module.start_history, -bound, bound)
        elif isinstance(module, BitLinear) and not module.is_packed:
            if getattr(module, "starts_at_zero", False):
                init.zeros_(module.weight)
            else:
                bound = module.in_features**-0.5
                init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, HashedRows):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, RowGate):
            for weight in module.zero_initialised:
                init.zeros_(weight)
        elif isinstance(module, SourceMemory):
            init.normal_(module.layer_embedding, std=0.02)
            init.normal_(module.registers, std=0.02)
        elif isinstance(module, Synchronisation):
            init.constant_(module.decay, -4.0)  # r about 0.98
        elif isinstance(module, NeuronModels):
            for weight, bias in ((module.weight_in, module.bias_in), (module.weight_out, module.bias_out)):
                bound = (weight.shape[1] + weight.shape[2]) ** -0.5
                init.uniform_(weight, -bound, bound)
                init.zeros_(bias)

    def train(self, mode: bool = True):
        """Set the mode of the head; the backbone and its output layer stay in eval mode."""
        if mode and self.config.ctm_packed:
            logger.warning_once(
                "The head is packed, so its ternary weights stay as they are in training; to train them too, load it with "
                "`ctm_packed=False` or call `model.pack(False)` before the optimizer is made."
            )
        super().train(mode)
        if self.karla_model.backbone is not None:
            self.karla_model.backbone.eval()
            self.karla_model._lm_head[0].eval()
        return self

    @property
    def karla_model(self) -> PreTrainedModel:
        """The `KarlaModel` of this model."""
        return self.base_model

    @property
    def head_prefix(self) -> str:
        """Prefix of the head's weights in the state dict."""
        return "ctm." if self.karla_model is self else "model.ctm."

    @property
    def own_prefixes(self) -> tuple[str, ...]:
        """Prefixes of all weights that are not the backbone's: the head's, and those of trained rows if there are any."""
        head = self.head_prefix
        rows = head.removesuffix("ctm.") + "layer_engram."
        return (head,) if self.karla_model.layer_engram is None else (head, rows)

    @property
    def engram(self) -> Engram:
        """The memory (L1)."""
        return self.karla_model.memory

    @property
    def tokenizer_sha256(self) -> str | None:
        """Hash of the tokenizer that the memory's token map was made with; None for a map that changes nothing."""
        return self.karla_model.memory_tokenizer

    def set_engram(self, engram: Engram, tokenizer_sha256: str | None) -> None:
        """Replace the memory."""
        self.karla_model.memory, self.karla_model.memory_tokenizer = engram, tokenizer_sha256

    @property
    def backbone_trains(self) -> bool:
        """Whether gradients must pass through the backbone: to trained rows, or to weights of its own such as LoRA's."""
        parts = (self.karla_model.backbone, self.karla_model.layer_engram)
        return any(weight.requires_grad for part in parts if part is not None for weight in part.parameters())

    def trained_rows(self, input_ids, attention_mask=None, cache=None, past=0) -> contextlib.AbstractContextManager:
        """Inside `with`, trained rows take part in the backbone's pass over these tokens; see `LayerEngram.reading`."""
        layer = self.karla_model.layer_engram
        return contextlib.nullcontext() if layer is None else layer.reading(input_ids, attention_mask, cache, past)

    def attach_backbone(self, causal_lm: PreTrainedModel) -> None:
        """Take a causal language model as level L0: it is frozen, and its output layer becomes this model's."""
        backbone, lm_head = split_backbone(causal_lm)
        self.karla_model.link(backbone.requires_grad_(False).eval(), lm_head.requires_grad_(False).eval())
        self._no_split_modules = sorted(set(causal_lm._no_split_modules or ()))
        self._retie()
        self.karla_model.remember_backbone()

    def _retie(self) -> None:
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)


def logit_scale(text_config) -> float:
    """Factor between the output layer and the logits, which some backbones apply (1.0 for most).

    Example:
        >>> from transformers import LlamaConfig
        >>> logit_scale(LlamaConfig())
        1.0
    """
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            return float(getattr(text_config, name))
    divisor = getattr(text_config, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)


def finish_logits(logits: torch.Tensor, text_config) -> torch.Tensor:
    """Scale and soft-cap the output layer's result as the backbone does. Returns [..., V]; `logits` is not modified."""
    scale, cap = logit_scale(text_config), getattr(text_config, "final_logit_softcapping", None)
    if scale != 1.0:
        logits = logits / (1.0 / scale) if getattr(text_config, "logits_scaling", None) else logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap
