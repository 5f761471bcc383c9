"""The small language model that POPE's demonstration begins with: trained from scratch to use the right rule rarely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from karla_hf.programs import RARE_INDEX, WORDS, draw_programs, draw_texts, encode, trace_programs


@dataclass
class BaseArguments:
    """The model and how it is trained.

    Attributes:
        length: operations of a program.
        rare: `AB` operations of a hard program.
        right: share of `AB` steps that are right in the base's training data.
        hidden_size: width of the model.
        num_layers: its layers.
        base_steps: training steps from scratch.
        adapt_steps: training steps from a base with another share `right`.
        base_batch_size: programs per step.
        base_learning_rate: at its highest, after a short warm-up; it falls to 0 along a cosine.
    """

    length: int = 8
    rare: int = 6
    right: float = 0.05
    hidden_size: int = 64
    num_layers: int = 2
    base_steps: int = 600
    adapt_steps: int = 150
    base_batch_size: int = 256
    base_learning_rate: float = 4e-3


def new_model(options: BaseArguments) -> LlamaForCausalLM:
    """A random Llama for programs; equal random states give equal models."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8 * options.length,
        bos_token_id=None,
        eos_token_id=WORDS.index("<eos>"),
        pad_token_id=WORDS.index("<pad>"),
    )
    return LlamaForCausalLM(config)


def train_base(options: BaseArguments, seed: int, start: Path | None = None) -> LlamaForCausalLM:
    """Train a base on programs whose `AB` is right in a share of the cases.

    Args:
        options: the model, the share, the steps.
        seed: of weights and data.
        start: folder of a base to go on from, for `adapt_steps`; None begins from scratch, for `base_steps`.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_model(options) if start is None else LlamaForCausalLM.from_pretrained(start)
    steps = options.base_steps if start is None else options.adapt_steps
    highest = options.base_learning_rate if start is None else options.base_learning_rate / 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=highest, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in range(steps):
        input_ids, labels = draw_texts(options.base_batch_size, options.length, options.right, generator)
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def rule_probabilities(
    model: LlamaForCausalLM, options: BaseArguments, seed: int, count: int = 1024
) -> dict[str, float]:
    """How probable the right rule is, on random hard programs with the right trace so far.

    Args:
        model: not modified.
        options: which programs.
        seed: of the programs.
        count: how many.

    Returns:
        `rule`: mean probability of the right register A at an `AB`; `trace`: mean probability of the whole right trace,
        computed from the model's probabilities, not sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    starts, operations = draw_programs(count, options.length, options.rare, generator)
    trace = trace_programs(starts, operations)
    input_ids, _ = encode(starts, operations, trace, torch.zeros(count, dtype=torch.int64))
    logits = model(input_ids=input_ids).logits[:, :-1].double()
    chances = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    chances = chances[:, -(2 * options.length + 1) :]  # both registers of each step, and <eos>
    rule = chances[:, :-1:2][operations == RARE_INDEX].exp().mean().item()
    return {"rule": rule, "trace": chances.sum(1).exp().mean().item()}
