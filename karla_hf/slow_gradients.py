"""Grokfast: gradients with their slow part amplified."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class SlowGradients:
    """Adds to each gradient its exponential moving average: g <- g + lamb m, m = alpha m + (1 - alpha) g.

    Grokfast (Lee et al., https://arxiv.org/abs/2405.20233, EMA form). Averages begin with the first gradient of a parameter,
    also of one that joins later. Sparse gradients are left alone.

    Args:
        alpha: in [0, 1).
        lamb: factor, >= 0.

    Attributes:
        averages: m by parameter name, of the parameter's shape, on its device.

    Raises:
        ValueError: for values outside.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad = torch.ones(1)
        >>> slow = SlowGradients(alpha=0.5, lamb=2.0)
        >>> slow.apply([("weight", weight)])
        >>> weight.grad
        tensor([3.])
    """

    def __init__(self, alpha: float = 0.98, lamb: float = 2.0):
        if not 0 <= alpha < 1 or lamb < 0:
            raise ValueError(f"alpha is {alpha} and lamb {lamb}; give alpha in [0, 1) and lamb of 0 or more.")
        self.alpha, self.lamb = alpha, lamb
        self.averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def apply(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Change the gradients in place; parameters without one are skipped and keep their average."""
        for name, parameter in named_parameters:
            gradient = parameter.grad
            if gradient is None or gradient.is_sparse:
                continue
            average = self.averages.get(name)
            if average is None:
                average = self.averages[name] = gradient.clone()
            else:
                average.lerp_(gradient, 1 - self.alpha)
            gradient.add_(average, alpha=self.lamb)
