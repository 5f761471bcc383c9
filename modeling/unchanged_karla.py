"""Tells whether the frozen backbone still has the weights that its name stands for.

A checkpoint names the backbone instead of carrying it, so whatever changes those weights, such as a merged LoRA adapter,
would be lost without a word. Versions of tensors do not show it (peft writes through `.data`), and comparing all weights
would take longer than the save; one row of every weight does show it, since a merge changes whole matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class WeightSample:
    """A row of every weight, copied, to be compared with later.

    Quantised weights are compared by being the same object: bitsandbytes repacks their bytes, and peft replaces the
    whole parameter when it merges.

    Args:
        modules: whose parameters to sample; not modified.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> sample = WeightSample(layer)
        >>> sample.changed(layer)
        []
        >>> layer.weight.data += torch.ones(3, 1) @ torch.ones(1, 4)  # as peft merges
        >>> sample.changed(layer)
        ['weight']
    """

    def __init__(self, *modules: nn.Module):
        self._kept = {
            name: weight if _is_quantised(weight) else _row(weight).clone()
            for name, weight in _weights(modules)
            if not weight.is_meta
        }

    def changed(self, *modules: nn.Module) -> list[str]:
        """Names of the weights that are others than at the start; those that cannot be compared are left out.

        A weight in another dtype is unchanged if it is the old one rounded to that dtype.
        """
        return [name for name, weight in _weights(modules) if name in self._kept and self._differs(name, weight)]

    def _differs(self, name: str, weight: torch.Tensor) -> bool:
        kept = self._kept[name]
        if isinstance(kept, nn.Parameter) or _is_quantised(weight):
            return kept is not weight
        if weight.is_meta or weight.numel() == 0:  # moved away by accelerate, or divided among processes
            return False
        row = _row(weight)
        return row.shape == kept.shape and not torch.equal(row, kept.to(row))


class UnchangedBackboneMixin:
    """Of a `KarlaModel`: remembers the weights of the backbone that it was given."""

    _sample: WeightSample | None = None

    def remember_backbone(self) -> None:
        """Take the backbone's weights as they are for those that its name stands for."""
        self._sample = WeightSample(self.backbone, *self._lm_head)

    def changed_weights(self) -> list[str]:
        """Names of the backbone's weights that are no longer what was remembered; see `WeightSample`."""
        return [] if self._sample is None else self._sample.changed(self.backbone, *self._lm_head)

    def _apply(self, fn, recurse=True):
        unchanged = self._sample is not None and not self.changed_weights()
        super()._apply(fn, recurse)
        if unchanged:  # rounded or moved, but still the weights that the name stands for
            self.remember_backbone()
        return self


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that peft has wrapped."""
    return [
        name for name, part in model.named_modules() if hasattr(part, "base_layer") or hasattr(part, "original_module")
    ]


def _weights(modules: tuple[nn.Module, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by the names that they have without peft's wrappers; peft's own are left out."""
    for number, module in enumerate(modules):
        for name, weight in module.named_parameters():
            if ".lora_" not in name:
                yield f"{number}." * (number > 0) + name.replace("base_layer.", ""), weight


def _is_quantised(weight: torch.Tensor) -> bool:
    return not weight.is_floating_point() or hasattr(weight, "quant_state")


def _row(weight: torch.Tensor) -> torch.Tensor:
    """The middle row of a matrix, a vector as it is."""
    weight = weight.detach()
    return weight[len(weight) // 2] if weight.dim() > 1 else weight
