"""Muon for the ternary weights of a head, AdamW for the rest of it, and the way from float to ternary weights."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from karla_hf.modeling.bitlinear_karla import set_ternary_share
from karla_hf.optimizer import RowsAdamW


class MuonAdamW(RowsAdamW):
    """`RowsAdamW` whose groups with `"muon": True` take the steps of `torch.optim.Muon` instead.

    One optimiser for all, since a trainer has one scheduler and one checkpoint. Muon (https://kellerjordan.github.io/posts/muon)
    makes the update of a matrix nearly orthogonal: W -= lr (NewtonSchulz(momentum) sqrt(max(1, N / K)) + decay W).

    Args:
        params, kwargs: as of `AdamW`. Parameters of a group with `"muon": True` are matrices [N, K].

    Raises:
        ValueError: if a parameter of such a group is no matrix.

    Example:
        >>> matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = MuonAdamW([{"params": [matrix], "muon": True, "lr": 1.0}, {"params": [vector]}], lr=0.5)
        >>> (matrix.diag().sum() * 100 + vector.sum()).backward()
        >>> optimizer.step()
        >>> bool((matrix.diag() < -0.5).all()), vector.detach().round(decimals=3).tolist()
        (True, [-0.5, -0.5])
    """

    matrix_optimizer: type[torch.optim.Optimizer] = torch.optim.Muon

    def __init__(self, params: Any, **kwargs: Any):
        groups = [dict(group) for group in params]
        matrices = [parameter for group in groups if group.get("muon") for parameter in group["params"]]
        self._muon = self.matrix_optimizer(matrices, weight_decay=0.0)  # type: ignore[call-arg]
        super().__init__([{**self._muon.defaults, **g} if g.get("muon") else g for g in groups], **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the loss of `closure`, if one is given."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        self._muon.param_groups = [group for group in groups if group.get("muon")]
        self._muon.state = self.state
        self._muon.step()
        for group in self._muon.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("step", torch.zeros(()))  # which loading an AdamW looks for
        return loss


class TernaryWarmup(TrainerCallback):
    """Weights of the head go from float to ternary, in equal steps, over a share of the training; see `set_ternary_share`.

    It depends on the number of the step alone, so a resumed run goes on as it would have. At the end of training all
    weights are ternary.

    Args:
        share: in [0, 1] of the training's steps; 0 trains ternary weights from the first step.

    Raises:
        ValueError: if the share is not in [0, 1].
    """

    def __init__(self, share: float):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`ternary_warmup` is {share}; give a share of the training from 0 to 1, such as 0.5.")
        self.share = share

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Set the share of ternary weights for the step that begins."""
        steps = self.share * state.max_steps
        set_ternary_share(model, min(1.0, state.global_step / steps) if steps else 1.0)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Leave ternary weights."""
        set_ternary_share(model, 1.0)
