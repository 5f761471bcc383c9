"""How surprising a message was to the model that answers it, without a second pass of the backbone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from karla_hf.modeling.modeling_karla import KarlaForCausalLM


BLOCK = 64  # tokens whose logits are held at once


class Surprise(NamedTuple):
    """Mean -log p of the tokens of a message, in nats per token; its exponential is the perplexity.

    Attributes:
        tokens: tokens measured.
        without_memory: of backbone and head alone.
        with_memory: of the whole model; None where the memory holds nothing.
    """

    tokens: int
    without_memory: float
    with_memory: float | None


@contextmanager
def first_states(model: KarlaForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Inside `with`, collects the backbone's states of the first call, which in `generate` is the one over the prompt.

    Args:
        model: the model. Not modified but for a hook that is gone afterwards.

    Yields:
        A list to which that call adds [1, T, L, D], as `backbone_states` gives them.
    """
    states: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, out: Any) -> None:
        if not states:
            states.append(model.model._states(out))

    assert model.model.backbone is not None
    handle = model.model.backbone.register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


@torch.no_grad()
def measure_surprise(
    model: KarlaForCausalLM, ids: torch.Tensor, start: int, end: int, states: torch.Tensor, **options: Any
) -> Surprise | None:
    """Measure a part of a text that the backbone has seen already; only the head runs again.

    Args:
        model: the model. Not modified.
        ids: [1, T] int64, the text.
        start: the first token measured; the very first of a text follows nothing and is not.
        end: the token behind the last one measured.
        states: [1, T, L, D] the backbone's states of the text.
        options: `max_ticks` and `certainty_threshold`, as `generate` takes them.

    Returns:
        The surprise; None if there is no token to measure.
    """
    start = max(start, 1)
    if start >= end:
        return None

    def mean() -> float:
        total = 0.0
        for at in range(start, end, BLOCK):  # a prefix has the states that it has in the whole text
            last = min(at + BLOCK, end)
            seen = ids[:, : last - 1], states[:, : last - 1]
            out = model(seen[0], source_states=seen[1], use_cache=False, logits_to_keep=last - at, **options)
            total += cross_entropy(out.logits[0].float(), ids[0, at:last], reduction="sum").item()
        return total / (end - start)

    enabled = model.engram.enabled
    try:
        model.use_memory(False)
        without = mean()
        model.use_memory(enabled)
        return Surprise(end - start, without, mean() if enabled and any(model.packs().values()) else None)
    finally:
        model.use_memory(enabled)
