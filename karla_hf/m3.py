"""M3: an optimiser with a fast and a slow momentum, both made orthogonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration that Muon uses


class M3(torch.optim.Optimizer):
    """Multi-scale Momentum Muon of Nested Learning (https://arxiv.org/abs/2512.24695), in a form whose steps have one size.

    For a matrix W with gradient g:

        m1 = b1 m1 + (1 - b1) g,   v = b2 v + (1 - b2) g^2            at every step
        m2 = b3 m2 + (1 - b3) mean(last f gradients),  O2 = NS(m2)    at every f-th step
        u  = (NS(m1) + alpha O2) / (sqrt(v / (1 - b2^t)) + eps),   W -= lr (s u / rms(u) + decay W)

    NS is five quintic Newton-Schulz iterations, on the side with fewer rows. As published the sums are not averages and the
    step is not rescaled, so that it shrinks with the square root of time and grows without bound where gradients are small;
    here all are averages, and s = 0.2 is the root mean square of a step at lr = 1, as that of AdamW roughly is. Vectors
    and embeddings belong to another optimiser.

    Args:
        params: matrices [N, K], or groups of them.
        lr: learning rate.
        betas: b1, b2, b3, each in [0, 1).
        alpha: weight of the slow momentum.
        period: f, steps between two changes of the slow momentum.
        eps: added to the root.
        weight_decay: decoupled.

    Raises:
        ValueError: for a parameter that is no matrix, or values out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = M3([weight], lr=0.1)
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> bool((weight < 0).all()), round(weight.square().mean().sqrt().item(), 4)
        (True, 0.02)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        alpha: float = 1.0,
        period: int = 100,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if lr < 0 or not all(0 <= beta < 1 for beta in betas) or period < 1 or eps <= 0 or weight_decay < 0:
            raise ValueError(
                f"M3 was given lr {lr}, betas {betas}, period {period}, eps {eps}, weight_decay {weight_decay}; give betas in "
                "[0, 1), a period of at least 1, eps above 0, and no negative number."
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "period": period,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(
                        f"M3 was given a parameter of shape {tuple(parameter.shape)}, but it trains matrices; leave others to "
                        "AdamW."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the loss of `closure`, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient, state, (b1, b2, b3) = parameter.grad, self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            for name in ("fast", "square", "gathered", "slow", "slow_update"):
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        state["fast"].lerp_(gradient, 1 - b1)
        state["square"].lerp_(gradient.square(), 1 - b2)
        state["gathered"].add_(gradient)
        if state["step"] % group["period"] == 0:
            state["slow"].lerp_(state["gathered"] / group["period"], 1 - b3)
            state["gathered"].zero_()
            state["slow_update"] = orthogonalise(state["slow"])
        update = orthogonalise(state["fast"]) + group["alpha"] * state["slow_update"]
        update /= (state["square"] / (1 - b2 ** state["step"])).sqrt() + group["eps"]
        update *= 0.2 / update.square().mean().sqrt().clamp(min=group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """A matrix [N, K] with the singular vectors of another and singular values near 1; zero stays zero.

    Example:
        >>> orthogonalise(torch.diag(torch.tensor([3.0, 0.5]))).diag().round(decimals=1)
        tensor([0.7000, 1.0000])
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
