"""Tells from probes of a training run whether it grokked: fitted by heart first, and understood much later.

Grokking (Power et al., https://arxiv.org/abs/2201.02177) is shown on small algorithmic data learned from scratch. Elsewhere
the same states are a monitor of the gap between training and validation data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch


MEMORISED_SCORE, MEMORISED_GAP = 0.99, 0.5  # of the training probe, and to the validation probe
GROKKED_SCORE = 0.95  # of the validation probe
CONFIRMATIONS = 2  # probes that must agree
DELAY = 3.0  # least t95 / mem_step of a run that grokked; below, it generalised in the ordinary way
TREND = 5  # probes over which a fall of the validation loss is looked for
LOSS_FALL, NORM_FALL = 0.25, 0.05  # shares of their maxima that validation loss or weight norm must have fallen by


class State(StrEnum):
    """What a run does, in the order in which it may pass through them."""

    FIT = "FIT"
    MEMORISED = "MEMORISED"
    PRE_GROK = "PRE-GROK"
    STALLED = "STALLED"
    GROKKED = "GROKKED"


@dataclass(frozen=True)
class Probe:
    """What was measured at one step, on a fixed part of the training data and on validation data.

    Attributes:
        step: optimiser steps so far.
        train_loss, val_loss: in nats.
        weight_norm: of all trained parameters together.
        train_score, val_score: accuracies in [0, 1], or `explained(loss, classes)` where there are none.
    """

    step: int
    train_loss: float
    val_loss: float
    weight_norm: float
    train_score: float
    val_score: float


def explained(loss: float, num_classes: int) -> float:
    """Share of a uniform guess's loss that is explained: 1 - loss / ln(classes). Negative for worse than guessing.

    Example:
        >>> round(explained(0.01, 31), 3), explained(math.log(31), 31)
        (0.997, 0.0)
    """
    return 1.0 - loss / math.log(num_classes)


def slope(values: Sequence[float]) -> float:
    """Least-squares slope of values one apart.

    Example:
        >>> round(slope([3.0, 2.5, 2.0]), 6)
        -0.5
    """
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64) - (len(y) - 1) / 2
    return float((x @ y) / (x @ x))


class GrokkingDetector:
    """Takes probes in the order of their steps and says in which `State` the run is.

    * MEMORISED: the training score is at least .99 and .5 above that of validation, twice in a row.
    * PRE-GROK: memorised still, and the validation loss has been falling for five probes, to three quarters of its maximum
      since then, or together with a weight norm that is 5 % below its own.
    * GROKKED: the validation score was .95 at two of three probes, first after at least three times the steps that
      memorising took. If it came sooner, the run generalised in the ordinary way: its state is FIT again, and it starts anew.
    * STALLED: no sign of it after `stall_ratio` times the steps that memorising took. A sign that comes later still counts.

    Args:
        stall_ratio: > 1.

    Attributes:
        state: the present one.
        probes: all of them.
        states: the state after each.
        mem_step: the step at which it was memorised, or None; so are `t50`, `t95` and `t99`, the first steps after it with
            that validation score.
        detected_step: the step at which it was found to have grokked, or None.

    Raises:
        ValueError: for a ratio of 1 or less.

    Example:
        >>> detector = GrokkingDetector()
        >>> for step, val in [(50, 0.0), (75, 0.0), (400, 0.6), (800, 0.96), (825, 1.0)]:
        ...     state = detector.update(Probe(step, 0.0, 1.0, 40.0, 1.0, val))
        >>> state.value, detector.mem_step, detector.t95, detector.detected_step
        ('GROKKED', 75, 800, 825)
    """

    def __init__(self, stall_ratio: float = 20.0):
        if stall_ratio <= 1:
            raise ValueError(f"`stall_ratio` is {stall_ratio}; give a number above 1, such as 20.")
        self.stall_ratio = stall_ratio
        self.state = State.FIT
        self.probes: list[Probe] = []
        self.states: list[State] = []
        self.mem_step: int | None = None
        self.t50: int | None = None
        self.t95: int | None = None
        self.t99: int | None = None
        self.detected_step: int | None = None

    def update(self, probe: Probe) -> State:
        """Take a probe; returns the state after it.

        Raises:
            ValueError: if its step is not above those before.
        """
        if self.probes and probe.step <= self.probes[-1].step:
            raise ValueError(
                f"A probe of step {probe.step} came after one of step {self.probes[-1].step}; give them in order."
            )
        self.probes.append(probe)
        if self.state is State.FIT:
            self._look_for_memory()
        else:
            self._note_times(probe)
            if self.state is not State.GROKKED:
                self.state = self._state_after_memory()
        self.states.append(self.state)
        return self.state

    @property
    def delay_ratio(self) -> float | None:
        """t95 / mem_step, or None."""
        return None if self.t95 is None or not self.mem_step else self.t95 / self.mem_step

    def summary(self) -> dict[str, Any]:
        """State and times, as JSON takes them."""
        times = {name: getattr(self, name) for name in ("mem_step", "t50", "t95", "t99", "detected_step")}
        return {"state": self.state.value, **times, "delay_ratio": self.delay_ratio}

    def to_dict(self) -> dict[str, Any]:
        """All that `from_dict` needs, as JSON takes it."""
        probes = [
            {**asdict(probe), "state": state.value} for probe, state in zip(self.probes, self.states, strict=True)
        ]
        return {**self.summary(), "stall_ratio": self.stall_ratio, "probes": probes}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GrokkingDetector:
        """The detector that `to_dict` described."""
        detector = cls(data["stall_ratio"])
        detector.state = State(data["state"])
        probes = [dict(probe) for probe in data["probes"]]
        detector.states = [State(probe.pop("state")) for probe in probes]
        detector.probes = [Probe(**probe) for probe in probes]
        for name in ("mem_step", "t50", "t95", "t99", "detected_step"):
            setattr(detector, name, data[name])
        return detector

    def _look_for_memory(self) -> None:
        last = self.probes[-CONFIRMATIONS:]
        by_heart = [p.train_score >= MEMORISED_SCORE and p.train_score - p.val_score >= MEMORISED_GAP for p in last]
        if len(last) == CONFIRMATIONS and all(by_heart):
            self.state, self.mem_step = State.MEMORISED, last[-1].step

    def _note_times(self, probe: Probe) -> None:
        for name, score in (("t50", 0.5), ("t95", GROKKED_SCORE), ("t99", 0.99)):
            if getattr(self, name) is None and probe.val_score >= score:
                setattr(self, name, probe.step)

    def _state_after_memory(self) -> State:
        recent = self.probes[-CONFIRMATIONS - 1 :]
        if sum(probe.val_score >= GROKKED_SCORE for probe in recent) >= CONFIRMATIONS:
            assert self.delay_ratio is not None
            if self.delay_ratio >= DELAY:
                self.detected_step = self.probes[-1].step
                return State.GROKKED
            self.mem_step = self.t50 = self.t95 = self.t99 = None
            return State.FIT
        if self._generalisation_begins():
            return State.PRE_GROK
        assert self.mem_step is not None
        stalled = self.probes[-1].step >= self.stall_ratio * max(1, self.mem_step)
        return State.STALLED if stalled else State.MEMORISED

    def _generalisation_begins(self) -> bool:
        since = [probe for probe in self.probes if probe.step >= (self.mem_step or 0)]
        losses, norms = [probe.val_loss for probe in since], [probe.weight_norm for probe in since]
        if len(since) <= TREND or max(losses) in losses[-TREND:] or slope(losses[-TREND:]) >= 0:
            return False
        by_heart = all(probe.train_score >= MEMORISED_SCORE for probe in since[-TREND:])
        fallen = losses[-1] <= (1 - LOSS_FALL) * max(losses) or norms[-1] <= (1 - NORM_FALL) * max(norms)
        return by_heart and fallen
