"""The Continuum Memory System's persistent levels: a chain of MLPs, each with its own update period.

    y = level_K( ... level_1(x)),      level_l(x) = x + W_2 silu(W_1 norm(x))

(Nested Learning, NeurIPS 2025, equations 30-31: the parameters of level l change only every C_l steps.) What `learn` has
learned is a delta of each matrix, so that the trained weights stay untouched: a level computes with W + delta.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional


class Level(nn.Module):
    """One persistent level of one block.

    Args:
        hidden_size: D.
        size: hidden units.
        update_period: steps between two changes.
        eps: of the norm.

    Attributes:
        deltas: what was learned by reading, for `up` and `down`, float32, or None.
        waiting: gradients of the deltas that have accumulated since the last step, or None.
    """

    def __init__(self, hidden_size: int, size: int, update_period: int, eps: float):
        super().__init__()
        self.update_period = update_period
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.up = nn.Linear(hidden_size, size, bias=False)
        self.down = nn.Linear(size, hidden_size, bias=False)
        self.deltas: list[torch.Tensor] | None = None
        self.waiting: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] from [..., D]."""
        up, down = self.matrices
        if self.deltas is not None:
            up, down = (w + d.to(w.dtype) for w, d in zip((up, down), self.deltas, strict=True))
        return x + functional.linear(functional.silu(functional.linear(self.norm(x), up)), down)

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The trained weights of `up` and `down`."""
        return self.up.weight, self.down.weight

    def begin_learning(self) -> None:
        """Make deltas and waiting gradients, all zero, unless they are there."""
        if self.deltas is None:
            self.deltas = [torch.zeros_like(w, dtype=torch.float32, requires_grad=False) for w in self.matrices]
            self.waiting = [torch.zeros_like(delta) for delta in self.deltas]

    def learned(self) -> dict[str, torch.Tensor]:
        """Deltas and waiting gradients by name; none before `begin_learning`."""
        if self.deltas is None:
            return {}
        (up, down), (waiting_up, waiting_down) = self.deltas, self.waiting
        return {"delta.up": up, "delta.down": down, "waiting.up": waiting_up, "waiting.down": waiting_down}

    def forget(self) -> None:
        """Drop deltas and waiting gradients."""
        self.deltas = self.waiting = None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the deltas to the weights (modified in place) and drop them."""
        if self.deltas is not None:
            for weight, delta in zip(self.matrices, self.deltas, strict=True):
                weight.add_(delta.to(weight.dtype))
        self.forget()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.deltas is not None:
            device = self.up.weight.device
            self.deltas, self.waiting = ([t.to(device) for t in tensors] for tensors in (self.deltas, self.waiting))
        return self


class Levels(nn.Sequential):
    """The chain of persistent levels of one block, from the fastest to the slowest."""

    def __init__(self, hidden_size: int, sizes: list[int], periods: list[int], eps: float):
        super().__init__(*(Level(hidden_size, *of_level, eps) for of_level in zip(sizes, periods, strict=True)))


def named_levels(model: nn.Module) -> Iterator[tuple[str, Level]]:
    """All persistent levels of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Level))


def level_parameter_groups(model: nn.Module) -> list[dict]:
    """Trainable parameters in groups that change at different rates, for a multi-rate optimiser.

    Returns:
        Groups with `params`, `name` and `update_period`, that of everything outside the levels (period 1) first. Every
        trainable parameter is in one group.

    Example:
        >>> model = nn.ModuleDict({"head": nn.Linear(2, 2), "levels": Levels(2, [3, 3], [1, 4], 1e-6)})
        >>> [(group["name"], group["update_period"], len(group["params"])) for group in level_parameter_groups(model)]
        [('rest', 1, 2), ('level 1', 1, 3), ('level 2', 4, 3)]
    """
    groups: dict[str, dict] = {"rest": {"params": [], "name": "rest", "update_period": 1}}
    owner: dict[int, str] = {}
    chains = (module for module in model.modules() if isinstance(module, Levels))
    for number, level in ((number, level) for chain in chains for number, level in enumerate(chain, start=1)):
        name = f"level {number}"
        groups.setdefault(name, {"params": [], "name": name, "update_period": level.update_period})
        owner |= {id(parameter): name for parameter in level.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[owner.get(id(parameter), "rest")]["params"].append(parameter)
    return list(groups.values())
