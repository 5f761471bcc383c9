"""A causal transformer of the size of a HOPE, between the same frozen table: what HOPE is compared with."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from karla_hf.modeling.modeling_hope import HopeForCausalLM


class TransformerPeer(nn.Module):
    """Llama blocks in the place of HOPE's fast weights and levels; input norm, output map and frozen table as there.

    It has as many blocks as HOPE; their hidden units are chosen so that it has as many trainable parameters.

    Args:
        hope: the model to be like. Not modified; its table is shared.
        length: tokens of a sequence.
    """

    def __init__(self, hope: HopeForCausalLM, length: int):
        super().__init__()
        config, size = hope.config, hope.config.hidden_size
        wanted = num_trainable(hope) - size * size - (2 * config.num_hidden_layers + 2) * size
        units = round((wanted / config.num_hidden_layers - 4 * size * size) / (3 * size))
        body = LlamaConfig(
            hidden_size=size,
            intermediate_size=max(units, 1),
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=length,
            initializer_range=config.initializer_range,
            vocab_size=1,
        )
        self.body = LlamaModel(body)
        del self.body.embed_tokens
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.out = nn.Linear(size, size, bias=False)
        nn.init.normal_(self.out.weight, std=config.initializer_range)
        self.register_buffer("table", hope.get_output_embeddings().weight.detach(), persistent=False)

    table: torch.Tensor

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> dict[str, torch.Tensor]:
        """`loss` and `logits` [B, T, V] of token ids and labels [B, T]; see `HopeForCausalLM.forward`."""
        hidden = self.norm(nn.functional.embedding(input_ids, self.table))
        hidden = self.body(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits = nn.functional.linear(self.out(hidden), self.table)
        kind = "mean" if num_items_in_batch is None else "sum"
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=kind
        )
        return {"loss": loss if num_items_in_batch is None else loss / num_items_in_batch, "logits": logits}


def num_trainable(model: nn.Module) -> int:
    """Trainable parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
