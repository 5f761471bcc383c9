"""The backbone's part of a forward pass: its states, run now or computed before."""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast


class BackboneStatesMixin:
    """What `KarlaModel` takes from its backbone: states of the source layers and of the last one.

    They depend on L0 alone, which is frozen, so a trainer may compute them once and give them to `forward` as
    `source_states` in every pass over its data.
    """

    @property
    def state_layers(self) -> list[int]:
        """L backbone layers: `ctm_source_layers`, and behind them the last one if it is none of them."""
        layers, last = self.config.ctm_source_layers, self.config.text_config.num_hidden_layers
        return [*layers] if last in layers else [*layers, last]

    def check_frozen(self) -> None:
        """Raise ValueError if the backbone or trained rows in it train, so that its states do not stay what they are."""
        if self.backbone_trains:
            raise ValueError(
                "The backbone or trained rows in it require gradients, so its states change with every step; freeze them "
                "(`engram_layer_ids: null` has none), or do without cached states."
            )

    @torch.no_grad()
    def backbone_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run the backbone, to give its states to `forward` later.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 0 at padding, or None.

        Returns:
            [B, T, L, D] in the backbone's dtype, in the order of `state_layers`, the last layer after its final norm.

        Raises:
            ValueError: if the backbone or trained rows in it train.
        """
        self.check_frozen()
        with self.trained_rows(input_ids, attention_mask):
            return self._states(
                self._run_backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            )

    def _run_backbone(self, output_hidden_states=None, **kwargs):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone_trains):
            wanted = output_hidden_states or self.config.ctm_source_layers
            return self.backbone(output_hidden_states=wanted, **kwargs)

    def _states(self, out) -> torch.Tensor:
        last = len(out.hidden_states) - 1
        return torch.stack(
            [out.last_hidden_state if i == last else out.hidden_states[i] for i in self.state_layers], dim=2
        )

    def _as_output(self, source_states: torch.Tensor) -> BaseModelOutputWithPast:
        """Stored states as the backbone's output, in its dtype."""
        layers, last = self.state_layers, self.config.text_config.num_hidden_layers
        dtype = self.get_input_embeddings().weight.dtype
        states = dict(zip(layers, source_states.to(dtype).unbind(2), strict=True))
        hidden = tuple(states.get(i) for i in range(last + 1))
        return BaseModelOutputWithPast(last_hidden_state=states[last], hidden_states=hidden)
