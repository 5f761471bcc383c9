"""AdamW that also trains the rows of a large table of which every batch touches a few, and the decay of ternary weights."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from karla_hf.modeling.bitlinear_karla import BitLinear


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


class TernaryDecay(TrainerCallback):
    """Weight decay of the groups with `"ternary": True`: constant first, and 0 after a share of the training.

    It is set where it changes only, so that what others set in between stays; a checkpoint's optimiser holds it.

    Args:
        decay: weight decay before the end of the share.
        share: in [0, 1] of the training's steps.

    Raises:
        ValueError: if the share is not in [0, 1].
    """

    def __init__(self, decay: float, share: float = 1.0):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`ternary_decay_share` is {share}; give a share from 0 to 1, such as 0.5.")
        self.decay, self.share = decay, share

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        """Set the decay for the step that begins, if it is another than before."""
        end = self.share * state.max_steps
        decay = self.decay if state.global_step < end else 0.0
        if state.global_step > 0 and (state.global_step < end) == (state.global_step - 1 < end):
            return
        for group in optimizer.param_groups:
            if group.get("ternary"):
                group["weight_decay"] = decay


def split_ternary(optimizer: torch.optim.Optimizer, model: torch.nn.Module, weight_decay: float) -> None:
    """Put the masters of ternary weights into groups of their own, marked with `"ternary": True`.

    Args:
        optimizer: a fresh one, without state. Modified in place.
        model: whose `BitLinear`s are meant.
        weight_decay: of the new groups.

    Example:
        >>> model = torch.nn.Sequential(BitLinear(4, 4), torch.nn.Linear(4, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        >>> split_ternary(optimizer, model, 0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(2, 0.01), (1, 0.1)]
    """
    masters = {id(layer.weight) for layer in model.modules() if isinstance(layer, BitLinear) and not layer.is_packed}
    for group in list(optimizer.param_groups):
        ternary = [parameter for parameter in group["params"] if id(parameter) in masters]
        if ternary:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in masters]
            optimizer.add_param_group({**group, "params": ternary, "weight_decay": weight_decay, "ternary": True})
