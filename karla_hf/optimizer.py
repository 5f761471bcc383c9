"""AdamW that also trains the rows of a large table of which every batch touches a few."""

from collections.abc import Callable
from typing import Any

import torch


class RowsAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose groups with `"sparse": True` take steps in the rows that have a gradient only.

    A row without a gradient in a step keeps its value and its moments, as with `torch.optim.SparseAdam`, whose update
    this is: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, row -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps).
    Such groups have no weight decay. One optimiser for both, since a trainer has one scheduler and one checkpoint.

    Args:
        params, kwargs: as of `AdamW`. Gradients in a sparse group are sparse, [rows, width] with one sparse dimension.

    Example:
        >>> table = torch.nn.Embedding(3, 1, sparse=True, _weight=torch.ones(3, 1))
        >>> optimizer = RowsAdamW([{"params": [table.weight], "sparse": True}], lr=0.5)
        >>> table(torch.tensor([1])).sum().backward()
        >>> optimizer.step()
        >>> table.weight.flatten().detach()
        tensor([1.0000, 0.5000, 1.0000])
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the loss of `closure`, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if group.get("sparse") and parameter.grad is not None:
                    self._step_rows(parameter, group)
                    gradients[parameter], parameter.grad = parameter.grad, None  # hidden from AdamW, which refuses it
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _step_rows(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()
        rows, change = gradient.indices()[0], gradient.values()
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        mean = torch.lerp(state["exp_avg"][rows], change, 1 - beta1)
        square = torch.lerp(state["exp_avg_sq"][rows], change * change, 1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        size = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        parameter[rows] -= size * mean / (square.sqrt() + group["eps"])
