"""Levels of an optimiser that step at different rates: nested learning by the clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch


class MultiRateOptimizer(torch.optim.Optimizer):
    """Lets parameter groups with an `update_period` C > 1 step at every C-th step only, with the mean of its gradients.

    Continuum Memory System (Nested Learning, https://arxiv.org/abs/2512.24695): theta_l changes when C_l divides the step,
    by what gathered since. Between two of its steps the bytes of a group do not change, neither does its state in the
    optimiser. A step that does not come is not made up for at the end of training.

    Args:
        optimizer: takes the steps. Its groups are those of this one, so that a scheduler changes both.

    Attributes:
        steps: taken so far.

    Raises:
        ValueError: for a period that is no integer of at least 1.

    Example:
        >>> fast, slow = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> groups = [{"params": [fast]}, {"params": [slow], "update_period": 2}]
        >>> optimizer = MultiRateOptimizer(torch.optim.SGD(groups, lr=1.0))
        >>> for gradient in (1.0, 3.0):
        ...     fast.grad, slow.grad = torch.tensor([gradient]), torch.tensor([gradient])
        ...     optimizer.step()
        ...     print(fast.item(), slow.item())
        -1.0 0.0
        -4.0 -2.0
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.steps = 0
        self._gathered: dict[torch.nn.Parameter, torch.Tensor] = {}
        for group in optimizer.param_groups:
            period = group.setdefault("update_period", 1)
            if not isinstance(period, int) or period < 1:
                raise ValueError(f"`update_period` is {period!r}; give a whole number of steps of at least 1.")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the groups that are due and gather the gradients of the others; returns the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        hidden: dict[torch.nn.Parameter, torch.Tensor] = {}
        for group in self.param_groups:
            if group["update_period"] > 1:
                hidden |= self._gather(group)
        self.optimizer.step()
        for parameter, gradient in hidden.items():
            parameter.grad = gradient
        return loss

    def _gather(self, group: dict[str, Any]) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Gradients of a group that is not due, which its parameters lose for now; a group that is due gets its means."""
        period, hidden = group["update_period"], {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                if parameter in self._gathered:
                    self._gathered[parameter].add_(parameter.grad)
                else:
                    self._gathered[parameter] = parameter.grad.clone()
                hidden[parameter] = parameter.grad
            if self.steps % period == 0:
                gathered = self._gathered.pop(parameter, None)
                parameter.grad = None if gathered is None else gathered.div_(period)
            else:
                parameter.grad = None
        return {} if self.steps % period == 0 else hidden

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser inside, the step, and what was gathered, by the parameter's number in the groups."""
        numbers = {parameter: number for number, parameter in enumerate(self._parameters())}
        gathered = {numbers[parameter]: gradient for parameter, gradient in self._gathered.items()}
        return {**self.optimizer.state_dict(), "multi_rate": {"steps": self.steps, "gathered": gathered}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` gave.

        Raises:
            ValueError: if it is of another kind of optimiser, or of other groups.
        """
        if "multi_rate" not in state_dict:
            raise ValueError(
                "The checkpoint's optimiser had no update periods; resume with the recipe that it was trained with."
            )
        rest = {key: value for key, value in state_dict.items() if key != "multi_rate"}
        self.optimizer.load_state_dict(rest)
        self._share()
        parameters, own = self._parameters(), state_dict["multi_rate"]
        self.steps = own["steps"]
        self._gathered = {
            parameters[number]: gradient.to(parameters[number]).clone() for number, gradient in own["gathered"].items()
        }

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def set_update_periods(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, periods: Mapping[str, int]
) -> MultiRateOptimizer:
    """Put parameters whose names match into groups of their own that step at a slower rate.

    Args:
        optimizer: a fresh one, without state. Modified in place.
        model: whose parameters it trains.
        periods: by regular expression, searched in the parameters' names; the first that matches counts.

    Returns:
        The optimiser, wrapped.

    Raises:
        ValueError: for an expression that is none or matches no trained parameter, or a period that is none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        >>> optimizer = set_update_periods(torch.optim.SGD(model.parameters(), lr=0.1), model, {"^0[.]": 4})
        >>> [(group["update_period"], len(group["params"])) for group in optimizer.param_groups]
        [(1, 2), (4, 2)]
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    unused = set(periods)
    for group in list(optimizer.param_groups):
        kept: list[torch.nn.Parameter] = []
        slow: dict[int, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            pattern = next((p for p in periods if _matches(p, names.get(id(parameter), ""))), None)
            if pattern is None:
                kept.append(parameter)
            else:
                unused.discard(pattern)
                slow.setdefault(periods[pattern], []).append(parameter)
        group["params"] = kept
        for period, parameters in slow.items():
            optimizer.add_param_group({**group, "params": parameters, "update_period": period})
    if unused:
        raise ValueError(
            f"`update_periods` has {sorted(unused)[0]!r}, which no trained parameter's name matches; give a part of one, such "
            f"as {next(iter(names.values()), 'weight')!r}."
        )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return MultiRateOptimizer(optimizer)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"`update_periods` has {pattern!r}, which is no regular expression ({error}).") from error
