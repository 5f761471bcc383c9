"""The two speeds that a Karla is judged by: reading against a forward pass, decoding against the bare backbone."""

from __future__ import annotations

import torch

from karla_hf.bench import Row


def read_row(model, tokenizer, text: str, context: int = 512) -> Row:
    """Reading a text into a pack against running the backbone over the same tokens with logits.

    Args:
        model: a `KarlaForCausalLM`; the pack `timing` is made and forgotten on every call.
        tokenizer: its tokenizer.
        text: what is read; its tokens are also cut into contexts for the peer.
        context: tokens per forward pass of the peer.

    Returns:
        A row in tokens per second.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    device = model.get_input_embeddings().weight.device

    def read() -> None:
        model.read(text, tokenizer, pack="timing", progress=False)
        model.forget("timing")

    @torch.no_grad()
    def forward() -> None:
        for part in ids.split(context):
            states = model.model.backbone(input_ids=part[None].to(device), use_cache=False).last_hidden_state
            model.lm_head(states)

    return Row("read_vs_forward", len(ids), "tokens", read, "forward pass with logits", forward)


def decode_row(model, causal_lm, tokenizer, prompt: str, new_tokens: int = 40) -> Row:
    """Greedy decoding with memory and head against the bare backbone, batch 1.

    Args:
        model: a `KarlaForCausalLM`.
        causal_lm: its backbone as a causal language model of its own.
        tokenizer: the tokenizer of both.
        prompt: text to continue.
        new_tokens: tokens to generate.

    Returns:
        A row in tokens per second.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def decode(decoder) -> None:
        decoder.generate(**inputs.to(decoder.device), **options)

    return Row(
        "karla_vs_backbone", new_tokens, "tokens", lambda: decode(model), "bare backbone", lambda: decode(causal_lm)
    )
