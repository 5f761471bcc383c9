"""The speeds that a Karla is judged by: reading against a forward pass, decoding and ticks against the bare backbone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from transformers import DynamicCache

from karla_hf.bench import Result, Row
from karla_hf.modeling import head_karla
from karla_hf.modeling.attention_karla import cut_blocks


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


@torch.no_grad()
def tick_results(model, causal_lm, past: int = 64, rounds: int = 30) -> Iterator[Result]:
    """The ticks of one decoded token against the bare backbone's step, in turn, so that each finds the other's caches.

    One thread's processor time, so that whatever else runs counts little. The head sees a full window. Its ticks are those
    of the configuration; `ticks_share_torch` has them tick by tick in torch operations, `ticks_share_c` in the compiled
    kernel where there is one.

    Args:
        model: a `KarlaForCausalLM`.
        causal_lm: its backbone as a causal language model of its own.
        past: tokens in the backbone's cache.
        rounds: timed calls of each side.

    Yields:
        Two results in ms; their ratio is the share of a step.
    """
    think, step, threads = _thinks(model), _steps(causal_lm, past), torch.get_num_threads()
    seconds: dict[str, list[float]] = {"step": [], "ticks_share_torch": [], "ticks_share_c": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        started = time.thread_time()
        call()
        seconds[name].append(time.thread_time() - started)

    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            timed("step", step)
            with patch.object(head_karla, "compiled_ticks", lambda *_: None):
                timed("ticks_share_torch", think)
            timed("step", step)
            timed("ticks_share_c", think)
    finally:
        torch.set_num_threads(threads)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    for name in ("ticks_share_torch", "ticks_share_c"):
        yield Result(name, medians[name], "ms", "a step of the bare backbone", medians["step"])


def _thinks(model) -> Callable[[], object]:
    """A call of the head for one position with a full window."""
    config, head = model.config, model.model.ctm.eval()
    registers, window = head.memory.registers, config.ctm_window
    size = config.text_config.hidden_size
    sources = torch.randn(1, window, len(config.ctm_source_layers), size).to(registers)
    positions = torch.arange(window, device=registers.device)[None]
    valid = torch.ones(1, window, dtype=torch.bool, device=registers.device)
    blocks = cut_blocks(head.memory(sources, positions), valid, registers, positions[:, -1:], window)
    state, layers = torch.randn(1, 1, size).to(registers), head.quantized()
    return lambda: head(state, blocks, config.ctm_num_ticks, None, layers)


def _steps(causal_lm, past: int) -> Callable[[], object]:
    """A call of a language model for one token after `past` others."""
    cache = DynamicCache(config=causal_lm.config)
    causal_lm(input_ids=torch.ones(1, past, dtype=torch.int64, device=causal_lm.device), past_key_values=cache)
    token = torch.ones(1, 1, dtype=torch.int64, device=causal_lm.device)

    def step() -> None:
        causal_lm(input_ids=token, past_key_values=cache)
        cache.crop(-1)

    return step
