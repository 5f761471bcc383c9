"""What Karla adds to `generate`: its cache layer, and how long was thought about every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationMixin


@contextlib.contextmanager
def recorded_thoughts(model) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inside `with`, collects ticks used and certainty of every call of the model.

    Args:
        model: a `KarlaForCausalLM`.

    Yields:
        A list to which every call adds ([B, N] int64, [B, N] float); N is 1 where one token is generated.
    """
    thoughts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(module, inputs, out) -> None:
        sure = torch.zeros_like(out.ticks_used) if out.certainty is None else out.certainty
        thoughts.append((out.ticks_used, sure))

    handle = model.register_forward_hook(record)
    try:
        yield thoughts
    finally:
        handle.remove()


class KarlaGenerationMixin(GenerationMixin):
    """`generate`, which with `return_dict_in_generate` also says how long was thought about every token."""

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any):
        """Generate as transformers does; `max_ticks` and `certainty_threshold` hold for every token.

        With `return_dict_in_generate`, the output also has `ticks_used` [B, N] int64 and `certainty` [B, N] of the N
        generated tokens (0 after the end of a sequence), unless an assistant proposes several tokens at once.
        """
        with recorded_thoughts(self) as thoughts:
            out = super().generate(inputs, *args, **kwargs)
        if not isinstance(out, torch.Tensor):
            _add_thoughts(out, thoughts)
        return out

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and len(cache.layers) >= self.config.text_config.num_hidden_layers:
            # up front, so that a static cache knows from the first step that this layer cannot be compiled
            self.model.cache_layer(cache, past=int(cache.get_seq_length()))


def _add_thoughts(out, thoughts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put `ticks_used` and `certainty` into an output of `generate`, if every call of the model made one token."""
    beams = getattr(out, "beam_indices", None)
    steps = len(thoughts) if beams is None else min(len(thoughts), beams.shape[1])
    if not steps or any(ticks.shape[1] > 1 or len(ticks) != len(thoughts[0][0]) for ticks, _ in thoughts):
        return
    for name, values in zip(("ticks_used", "certainty"), zip(*thoughts[:steps], strict=True), strict=True):
        table = torch.cat(values, dim=1)  # [rows, N]
        if beams is not None:
            chosen = beams[:, :steps]
            table = table.gather(0, chosen.clamp(min=0)).masked_fill(chosen < 0, 0)
        out[name] = table
