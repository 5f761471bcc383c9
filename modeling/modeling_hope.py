"""HOPE: fast weights that rewrite themselves over a frozen encoder (https://arxiv.org/abs/2512.24695), causal and O(1) a token.

h = slow(x);  h = levels(h + fast_weights(h)) for every block;  answer = W norm(h);  logits = E answer,

where E is the encoder's frozen table, both input and output. W is the last layer of `HopeModel`, so that trainers which
multiply its `last_hidden_state` by the output embeddings themselves get the same logits as `HopeForCausalLM`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_hope import HopeCache
from .checkpoint_hope import HopeCheckpointMixin
from .cms_hope import Level, level_parameter_groups
from .configuration_hope import HopeConfig
from .encoder_hope import (
    SlowMemory,
    default_encoder,
    encoder_folder,
    load_encoder,
    load_encoder_tokenizer,
    weights_sha256,
)
from .frames_hope import Frame
from .layer_hope import START_RATE, Block, Plan, SelfModifyingMemory, residual_scale, start_decays, start_taps
from .learning_hope import HopeLearningMixin, LearnedLevelsMixin


class HopePreTrainedModel(HopeCheckpointMixin, LearnedLevelsMixin, PreTrainedModel):
    """What the HOPE models share: initialisation, saving and loading."""

    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module):
        std, scale = self.config.initializer_range, residual_scale(self.config.num_hidden_layers, 1)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, SlowMemory) and self.config.encoder_context != "none":
            init.zeros_(module.gate)
        if isinstance(module, SelfModifyingMemory):
            query, _, value = module.streams.weight.chunk(3)
            init.copy_(module.streams.weight, torch.cat([query, query, value]))
            init.copy_(module.conv, start_taps(*module.conv.shape))
            init.normal_(module.start, std=std)
            init.normal_(module.out.weight, std=std * scale)
            bias = torch.zeros(module.num_heads, 4)
            bias[:, 0] = START_RATE
            bias[:, 1] = start_decays(module.num_heads)
            init.copy_(module.gates.bias, bias.flatten())
        elif isinstance(module, Level):
            init.normal_(module.down.weight, std=std * scale)

    @property
    def hope(self) -> HopeModel:
        """The `HopeModel` of this model."""
        return self.base_model


class HopeModel(HopePreTrainedModel):
    """Slow memory, blocks, and the map into the encoder's table.

    Args:
        config: a `HopeConfig`.
        init_encoder: build the encoder from `config.encoder_config` with random weights; otherwise one is attached later.
    """

    def __init__(self, config: HopeConfig, init_encoder: bool = True):
        super().__init__(config)
        self.slow = SlowMemory(config, init_encoder)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        """The encoder's frozen token embeddings."""
        return None if self.slow.encoder is None else self.slow.table

    def set_input_embeddings(self, value):
        """Refused: the table is the encoder's."""
        raise NotImplementedError(
            "The encoder is frozen, so its table cannot be replaced; use an encoder that has it."
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the slow memory and all blocks.

        Args:
            input_ids: [B, T] int64; the encoder reads token ids, so `inputs_embeds` is refused.
            attention_mask: [B, past + T], 0 at padding, which may stand anywhere, or None.
            past_key_values: a `HopeCache`; its state moves on.
            inputs_embeds: refused.
            use_cache: whether to return a cache; None takes the configuration's outside training.
            kwargs: ignored.

        Raises:
            ValueError: without `input_ids`, for a mask of another shape, or a cache of another kind or batch.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing; the encoder reads token ids, so inputs_embeds is not enough.")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache:
            cache = HopeCache(self.config.num_hidden_layers)
        frame = self._frame(input_ids, attention_mask, cache)
        plan = self._plan(frame, input_ids.device)
        hidden = self.slow(frame.compact(input_ids), frame, cache)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, plan, None if cache is None else cache.layers[number])
        if cache is not None:
            cache.seen += input_ids.shape[1]
            cache.positions = frame.positions + frame.counts
        hidden = frame.restore(self.out(self.norm(hidden)))
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache if use_cache else None)

    def _frame(self, input_ids, attention_mask, cache) -> Frame:
        batch, length = input_ids.shape
        if cache is not None and not hasattr(cache, "pending"):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, but HOPE keeps fast weights in a HopeCache; give one that "
                "this model returned, or None."
            )
        past = 0 if cache is None else cache.seen
        positions = torch.zeros(batch, dtype=torch.int64)
        if cache is not None and cache.positions is not None:
            positions = cache.positions
            if len(positions) != batch:
                raise ValueError(
                    f"past_key_values holds {len(positions)} sequences, but input_ids has {batch}; repeat or select its "
                    "sequences (`cache.batch_repeat_interleave`, `cache.batch_select_indices`)."
                )
        if attention_mask is not None and attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but {batch} sequences of {past} + {length} "
                "tokens need [batch, past + new]."
            )
        mask = None if attention_mask is None else attention_mask[:, -length:]
        return Frame(positions, length, mask, self.config.chunk_size)

    def _plan(self, frame: Frame, device: torch.device) -> Plan:
        heads = self.config.num_attention_heads
        real = frame.real(device)
        real = None if real is None else real.repeat_interleave(heads, dim=0)
        return Plan(frame, frame.spans(self.config.head_periods, device), real)


class HopeForCausalLM(HopeLearningMixin, HopePreTrainedModel, GenerationMixin):
    """HOPE with the encoder's frozen table as output layer: generates, trains, and keeps learning.

    Args:
        config: a `HopeConfig`.
        init_encoder: see `HopeModel`.

    Example:
        >>> encoder = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
        ...            "intermediate_size": 8, "vocab_size": 9}
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 3 - 1, "snapshot_periods": [64, 128]}
        >>> hope = HopeForCausalLM(HopeConfig(encoder_config=encoder, **sizes)).eval()
        >>> hope(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 9])
    """

    def __init__(self, config: HopeConfig, init_encoder: bool = True):
        super().__init__(config)
        self.model = HopeModel(config, init_encoder)
        self.lm_head: nn.Module | None = None
        if init_encoder:
            self._tie_head()
        self.post_init()

    @classmethod
    def from_encoder(cls, name: str | None = None, *, revision: str | None = None, **config_options: Any):
        """Put fresh fast weights and levels on a frozen sentence encoder.

        Args:
            name: a folder or a Hub name; None takes `ibm-granite/granite-embedding-small-english-r2`, or, offline and
                without a copy of it, the installed all-MiniLM-L6-v2.
            revision: the encoder's revision on the Hub.
            config_options: fields of `HopeConfig`.

        Raises:
            ValueError: for unknown options.
            OSError: if the encoder is found nowhere.
        """
        unknown = sorted(set(config_options) - set(HopeConfig.__annotations__))
        if unknown:
            raise ValueError(f"Unknown model options {unknown}; the options are {sorted(HopeConfig.__annotations__)}.")
        name = name or default_encoder()
        encoder, tokenizer = load_encoder(name, revision), load_encoder_tokenizer(name, revision)
        commit = None if encoder_folder(name, revision) != name else getattr(encoder.config, "_commit_hash", None)
        config = HopeConfig(
            encoder_config=copy.deepcopy(encoder.config),
            encoder_name_or_path=name,
            encoder_revision=commit or revision,
            encoder_sha256=weights_sha256(encoder),
            encoder_included=False,
            bos_token_id=_first(tokenizer.bos_token_id, tokenizer.cls_token_id),
            eos_token_id=_first(tokenizer.eos_token_id, tokenizer.sep_token_id),
            pad_token_id=tokenizer.pad_token_id,
            **{"hidden_size": encoder.config.hidden_size, **config_options},
        )
        model = cls(config, init_encoder=False)
        model.attach_encoder(encoder)
        return model.eval()

    def attach_encoder(self, encoder: nn.Module) -> None:
        """Take an encoder as slow memory: it is frozen, and its table becomes input and output embeddings."""
        super().attach_encoder(encoder)
        self._tie_head()

    def _tie_head(self) -> None:
        """Make the output layer of the encoder's table itself."""
        table = self.model.slow.table.weight
        with torch.device("meta"):
            self.lm_head = nn.Linear(table.shape[1], table.shape[0], bias=False)
        self.lm_head.weight = table
        name = next(name for name, p in self.model.slow.encoder.named_parameters() if p is table)
        self._tied_weights_keys = {"lm_head.weight": f"model.slow.encoder.{name}"}
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def get_input_embeddings(self):
        """The encoder's frozen token embeddings."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        """The same table as output layer; `HopeModel`'s last hidden state times its weight gives the logits."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """Refused: the table is the encoder's."""
        raise NotImplementedError(
            "The encoder is frozen, so its table cannot be replaced; use an encoder that has it."
        )

    def level_parameter_groups(self) -> list[dict]:
        """Trainable parameters in groups with an `update_period`; see `cms_hope.level_parameter_groups`."""
        return level_parameter_groups(self)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, but HOPE's state is a HopeCache of "
                "constant size; leave it None."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HopeCache(self.config.num_hidden_layers)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where labels are given.

        Args:
            labels: [B, T] int64, -100 where there is no loss; shifted here.
            logits_to_keep: logits of the last so many positions only, or of those in a tensor of indices; 0 for all.
            num_items_in_batch: labels in the whole accumulated batch, to divide the loss by; None takes this batch's.

        Other arguments are those of `HopeModel.forward`.
        """
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep if labels is None else slice(None)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


def _first(*tokens: int | None) -> int | None:
    return next((token for token in tokens if token is not None), None)


HopeConfig.register_for_auto_class()
HopeModel.register_for_auto_class("AutoModel")
HopeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
