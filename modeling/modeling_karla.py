"""Karla: a frozen causal language model (L0), a memory that learns by reading (L1) and a head that thinks (L2).

h = backbone(x);  u = h + memory(n-grams of x);  answer = u + head(u; several layers of the backbone);  logits = W answer.

The fused hidden state is the contract: trainers that multiply `KarlaModel(...).last_hidden_state` by the output
embeddings themselves get the same logits as `KarlaForCausalLM`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .answers_karla import recall
from .backbone_karla import load_backbone, load_tokenizer, quantization_config, resolve_backbone, split_backbone
from .bitlinear_karla import set_packed
from .cache_karla import KarlaCacheLayer, karla_layer
from .certainty_karla import certainty
from .configuration_karla import KarlaConfig, check_config_keys
from .engram_karla import new_engram
from .generating_karla import KarlaGenerationMixin
from .head_karla import KarlaHead
from .layer_engram_karla import LayerEngram
from .losses_karla import TickJudge
from .memory_karla import KarlaMemoryMixin, tokenizer_hash
from .pretrained_karla import (
    KarlaCausalLMOutput,
    KarlaModelOutput,
    KarlaPreTrainedModel,
    finish_logits,
    logit_scale,
)
from .sentences_karla import sentence_boundaries
from .states_karla import BackboneStatesMixin
from .thinking_karla import Plan, Sources, think
from .unchanged_karla import UnchangedBackboneMixin
from .vocabulary_karla import compress_vocabulary
from .words_karla import Lexicon


class KarlaModel(UnchangedBackboneMixin, BackboneStatesMixin, KarlaPreTrainedModel):
    """Backbone, memory and head; returns fused hidden states.

    Args:
        config: a `KarlaConfig`.
        init_backbone: build the backbone from `config.text_config` with random weights; otherwise one is attached later.
    """

    def __init__(self, config: KarlaConfig, init_backbone: bool = True):
        super().__init__(config)
        self.backbone: nn.Module | None = None
        self._lm_head: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule of this model
        self.ctm = KarlaHead(config)
        self.layer_engram = None if config.engram_layer_ids is None else LayerEngram(config)
        with torch.device("cpu"):  # also while the rest is built on the meta device
            size = config.text_config.vocab_size
            self.memory = new_engram(config, torch.arange(size), torch.zeros(size, dtype=torch.uint8), pad_id=0)
        self.memory_tokenizer: str | None = None
        if init_backbone:
            self.link(*split_backbone(AutoModelForCausalLM.from_config(config.text_config).requires_grad_(False)))
        self.post_init()

    def link(self, backbone: nn.Module, lm_head: nn.Module) -> None:
        """Take a backbone and the output layer that belongs to it. The output layer stays outside `state_dict`."""
        self.backbone, self._lm_head = backbone, (lm_head,)
        if self.layer_engram is not None:
            self.layer_engram.insert(backbone)

    def get_input_embeddings(self):
        """The backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Refused: the memory's token map belongs to the backbone's vocabulary."""
        raise NotImplementedError(
            "The backbone is frozen, so its embeddings cannot be replaced; resize it beforehand."
        )

    def output_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows [V, D] and bias [V] or None of the output layer, scaled so that logits = h W^T + b (before a soft cap)."""
        weight, bias = self._lm_head[0].weight, getattr(self._lm_head[0], "bias", None)
        if weight.is_meta:
            raise ValueError(
                "This KarlaModel was loaded without the output layer that certainty is measured with; load the checkpoint "
                "as KarlaForCausalLM and take its `model`."
            )
        scale = logit_scale(self.config.text_config)
        return (weight, bias) if scale == 1.0 else (weight * scale, None if bias is None else bias * scale)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        max_ticks: int | None = None,
        certainty_threshold: float | None = None,
        all_ticks: bool = False,
        judge: TickJudge | None = None,
        source_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> KarlaModelOutput:
        """Run the backbone, add what the memory knows, and think.

        Args:
            input_ids: [B, T] int64; the memory needs them, so `inputs_embeds` alone is refused.
            attention_mask: [B, past + T], 0 at padding, or None.
            position_ids: [B, T] or None; for the backbone.
            past_key_values: a cache that this model filled, or an empty one.
            inputs_embeds: refused.
            use_cache: whether to return a cache; None takes the backbone's setting.
            output_hidden_states: whether to return the backbone's hidden states.
            logits_to_keep: think and answer for the last so many positions only; 0 or a tensor of indices means all.
            max_ticks: S >= 1 for this call; None takes the configuration's.
            certainty_threshold: in [0, 1], for this call; None takes the configuration's.
            all_ticks: return the changes after every tick and stop at none.
            judge: return the losses of all ticks by its labels, and stop at none.
            source_states: [B, T, L, D] what `backbone_states` gave for these tokens; the backbone is not run then, and
                `use_cache` must be false.
            kwargs: ignored.

        Raises:
            ValueError: for a mask that is not [B, past + T], or a cache that another model filled.
        """
        if input_ids is None:
            raise ValueError(
                "input_ids is missing; the memory is addressed by token ids, so inputs_embeds is not enough."
            )
        # int: a static cache gives a tensor that it counts up in place
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if attention_mask is None and isinstance(past_key_values, StaticCache):
            # without one, transformers attends to unwritten slots of a static cache that cannot be compiled, as ours
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        if attention_mask is not None and attention_mask.shape != (len(input_ids), past + input_ids.shape[1]):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but {len(input_ids)} sequences of "
                f"{past} + {input_ids.shape[1]} tokens need [batch, past + new]."
            )
        if use_cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", True)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        if source_states is not None:
            out = self._as_output(source_states)
        else:
            with self.trained_rows(input_ids, attention_mask, past_key_values, past):
                out = self._run_backbone(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    output_hidden_states=output_hidden_states,
                )
        length = input_ids.shape[1]
        keep = logits_to_keep if isinstance(logits_to_keep, int) and 0 < logits_to_keep < length else length
        plan = self._plan(max_ticks, certainty_threshold, all_ticks, judge)
        sources = self._sources(input_ids, attention_mask, out, past_key_values, past)
        history = torch.cat([part for part in (sources.cached.values, sources.token_ids) if part is not None], dim=1)
        hidden = out.last_hidden_state[:, -keep:]
        state = hidden + recall(self.memory, history, keep).to(hidden)
        projection = self.output_projection() if plan.measures else None
        thoughts = think(self.ctm, state, sources, self.config.ctm_window, plan, projection)
        return KarlaModelOutput(
            last_hidden_state=thoughts.state,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=out.hidden_states if output_hidden_states else None,
            ticks_used=thoughts.ticks_used,
            certainty=thoughts.certainty,
            tick_deltas=thoughts.deltas,
            tick_losses=thoughts.losses,
            logits=thoughts.logits if logit_scale(self.config.text_config) == 1.0 else None,
        )

    def cache_layer(self, cache: Cache, past: int) -> KarlaCacheLayer:
        """This model's layer of a cache, appended if the cache held nothing (`past` 0) before."""
        if self.layer_engram is not None:
            self.layer_engram.cache_layer(cache, past)
        return karla_layer(cache, keep=self._reach, slack=self.config.ctm_window, past=past)

    @property
    def _reach(self) -> int:
        """Positions before a new one that head and memory look at."""
        return max(self.config.ctm_window - 1, self.memory.reach)

    def _sources(self, input_ids, attention_mask, out, cache, past) -> Sources:
        """What the head's keys and values are made of, and the token history."""
        batch, length = input_ids.shape
        last = len(out.hidden_states) - 1
        layers = [out.last_hidden_state if i == last else out.hidden_states[i] for i in self.config.ctm_source_layers]
        if attention_mask is None:
            positions = torch.arange(past, past + length, device=layers[0].device).expand(batch, -1)
        else:  # padding takes no position, so that registers see a padded text as the text alone
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        mask = None if attention_mask is None else attention_mask[:, -length:]
        cached = KarlaCacheLayer(self._reach, slack=0) if cache is None else self.cache_layer(cache, past)
        return Sources(layers, positions, self.memory.history_ids(input_ids, mask), cached)

    def _plan(self, max_ticks, threshold, all_ticks, judge) -> Plan:
        config = self.config
        ticks = config.ctm_num_ticks if max_ticks is None else max_ticks
        if ticks < 1:
            raise ValueError(f"max_ticks is {ticks}; give 1 or more.")
        threshold = config.certainty_threshold if threshold is None else threshold
        return Plan(ticks, threshold, config.tick_loss == "two_tick", all_ticks, config.certainty_candidates, judge)


class KarlaForCausalLM(KarlaMemoryMixin, KarlaPreTrainedModel, KarlaGenerationMixin):
    """Karla with the backbone's frozen output layer: generates, trains, and reads.

    Args:
        config: a `KarlaConfig`.
        init_backbone: see `KarlaModel`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
        >>> karla = KarlaForCausalLM.from_backbone(LlamaForCausalLM(LlamaConfig(**sizes)), engram_rows_per_head=50)
        >>> karla(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 9])
    """

    def __init__(self, config: KarlaConfig, init_backbone: bool = True):
        super().__init__(config)
        self.model = KarlaModel(config, init_backbone)
        self.lm_head: nn.Module | None = self.model._lm_head[0] if init_backbone else None
        self._tied_weights_keys = _tied_weights(self)
        self.post_init()

    @classmethod
    def from_backbone(
        cls, backbone: str | PreTrainedModel, tokenizer=None, *, revision=None, quantization=None, backbone_kwargs=None,
        **config_options: Any,
    ) -> KarlaForCausalLM:  # fmt: skip
        """Put a fresh memory and head on a backbone; the logits are the backbone's.

        Args:
            backbone: a name that `load_backbone` finds, or a loaded causal language model (frozen here).
            tokenizer: the backbone's tokenizer, for the memory's token map. Loaded by name if None; with a loaded model
                and none given, every token id stands for itself.
            revision: the backbone's revision on the Hub.
            quantization: None, `"nf4"`, `"int8"` or arguments of `BitsAndBytesConfig`; for a name only.
            backbone_kwargs: further arguments for loading the backbone, such as `dtype` or `device_map`.
            config_options: `engram_`, `ctm_`, `certainty_` and `tick_` fields of `KarlaConfig`.

        Raises:
            ValueError: for unknown options, a model that is no causal LM, or one whose logits are made in a way that
                Karla does not reproduce.
            OSError: if the backbone is found nowhere.
        """
        check_config_keys(config_options)
        name = source = None
        if isinstance(backbone, str):
            name, source = backbone, resolve_backbone(backbone, revision=revision).source
            tokenizer = tokenizer or load_tokenizer(name, revision=revision)
            causal_lm = load_backbone(name, revision=revision, quantization=quantization, **(backbone_kwargs or {}))
            if isinstance(quantization, dict):  # dtypes by name, as the configuration is saved
                quantization = quantization_config(quantization).to_dict()
        elif quantization is not None or backbone_kwargs or revision is not None:
            raise ValueError(
                "quantization, revision and backbone_kwargs are for a backbone given by name; load it so."
            )
        else:
            causal_lm = backbone
        split_backbone(causal_lm)
        text_config = _plain_config(causal_lm.config)
        config = KarlaConfig(
            text_config=text_config, base_model_name_or_path=name, base_model_revision=revision,
            base_model_source=source, backbone_quantization=quantization, backbone_included=name is None,
            **config_options,
        )  # fmt: skip
        model = cls(config, init_backbone=False)
        model.attach_backbone(causal_lm)
        if tokenizer is not None:
            model.use_tokenizer(tokenizer)
        model.generation_config = causal_lm.generation_config or model.generation_config
        model._check_same_logits(causal_lm)
        return model.eval()

    @torch.no_grad()
    def _check_same_logits(self, causal_lm: PreTrainedModel) -> None:
        ids = torch.arange(1, 5, device=causal_lm.device)[None] % self.config.text_config.vocab_size
        if not torch.equal(self.eval()(ids).logits, causal_lm.eval()(ids).logits):
            raise ValueError(
                f"{type(causal_lm).__name__} turns hidden states into logits in a way that Karla does not reproduce; "
                "give a backbone whose logits are its output layer's, scaled or soft-capped at the most."
            )

    def attach_backbone(self, causal_lm: PreTrainedModel) -> None:
        """Take a causal language model as level L0: it is frozen, and its output layer becomes this model's."""
        super().attach_backbone(causal_lm)
        self.lm_head = self.model._lm_head[0]
        self._retie()

    def _retie(self) -> None:
        self._tied_weights_keys = _tied_weights(self)
        super()._retie()

    def use_tokenizer(self, tokenizer) -> None:
        """Make a new, empty memory whose token map comes from `tokenizer`."""
        pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        size = self.config.text_config.vocab_size
        maps = compress_vocabulary(tokenizer, size), sentence_boundaries(tokenizer, size)
        engram = new_engram(self.config, *maps, pad)
        if self.config.engram_cues:
            engram.lexicon = Lexicon.from_tokenizer(tokenizer, size)
        self.set_engram(engram, tokenizer_hash(tokenizer))
        if self.model.layer_engram is not None:
            self.model.layer_engram.rows.use_token_map(maps[0], pad)

    def get_output_embeddings(self):
        """The backbone's frozen output layer."""
        return self.lm_head

    def get_input_embeddings(self):
        """The backbone's token embeddings."""
        return self.model.get_input_embeddings()

    def set_output_embeddings(self, value):
        """Refused: the output layer is the backbone's."""
        raise NotImplementedError("The backbone is frozen, so its output layer cannot be replaced; do so beforehand.")

    def pack(self, packed: bool = True) -> KarlaForCausalLM:
        """Store the head's ternary weights with 2 bits each (in place), or make them trainable floats again."""
        set_packed(self.model.ctm, packed)
        self.config.ctm_packed = packed
        return self

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        max_ticks: int | None = None,
        certainty_threshold: float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        source_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> KarlaCausalLMOutput:
        """Logits of the next token, and the loss where labels are given.

        Args:
            labels: [B, T] int64, -100 where there is no loss; shifted here. The loss follows `config.tick_loss`.
            num_items_in_batch: labels in the whole accumulated batch, to divide the loss by; None takes this batch's.

        Other arguments are those of `KarlaModel.forward`.
        """
        judge = None
        if labels is not None and self.training and self.config.computes_own_loss:
            judge = self._judge(labels, certainty_threshold)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            logits_to_keep=0 if labels is not None else logits_to_keep,
            max_ticks=max_ticks,
            certainty_threshold=certainty_threshold,
            judge=judge,
            source_states=source_states,
        )
        keep = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = loss = None
        if judge is not None:
            count = (judge.labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = out.tick_losses.sum() / count
        else:
            logits = self.lm_head(out.last_hidden_state[:, keep]) if out.logits is None else out.logits[:, keep]
            logits = finish_logits(logits, self.config.text_config)
        if labels is not None and judge is None:
            loss = self.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        sure = None if out.certainty is None else out.certainty[:, keep]
        if sure is None and not self.training:
            top = logits.detach().float().topk(min(self.config.certainty_candidates, logits.shape[-1]), dim=-1)
            sure = certainty(top.values)
        return KarlaCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            ticks_used=out.ticks_used[:, keep],
            certainty=sure,
        )

    def _judge(self, labels: torch.Tensor, threshold: float | None) -> TickJudge:
        """What judges all ticks of every position by the token that follows."""
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        threshold = self.config.certainty_threshold if threshold is None else threshold
        return TickJudge(self.config, following, *self.model.output_projection(), threshold)

    def _closed_states(self, input_ids, attention_mask):
        with self.trained_rows(input_ids, attention_mask):
            return super()._closed_states(input_ids, attention_mask)


def _plain_config(config):
    """The backbone's configuration without its quantisation, which is the loader's business."""
    plain = type(config).from_dict(config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def _tied_weights(model: KarlaForCausalLM) -> dict[str, str]:
    """The output layer's weight and the input embedding that it is, if the backbone ties them."""
    if model.lm_head is None or not model.config.text_config.tie_word_embeddings:
        return {}
    embedding = model.get_input_embeddings().weight
    name = next(name for name, p in model.model.backbone.named_parameters() if p is embedding)
    return {"lm_head.weight": f"model.backbone.{name}"}


KarlaConfig.register_for_auto_class()
KarlaModel.register_for_auto_class("AutoModel")
KarlaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
