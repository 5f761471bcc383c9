"""Watches a `Trainer` for grokking, says what it sees, and acts on it if asked to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from karla_hf.grokking import GrokkingDetector, Probe, State, explained
from karla_hf.slow_gradients import SlowGradients


logger = logging.get_logger(__name__)
SLOW_FILE = "slow_gradients.safetensors"
DECAY_FACTOR, DECAY_LIMIT, DECAY_FLOOR = 3.0, 1.0, 0.01
RATE_DECAY, FINAL_RATE = 0.95, 0.1  # of the learning rate at every evaluation once it grokked, and what remains of it
SUSPENDED = -(10**9)  # an early-stopping counter that reaches no patience


@dataclass
class GrokkingOptions:
    """Where the probes come from, and what is done about what they show.

    Every action is logged. It is taken back when its time is over, or when a run is resumed with its option off.

    Attributes:
        grokking_train: name of the fixed part of the training data in the trainer's `eval_dataset`.
        grokking_validation: name of the validation data there.
        grokking_metric: accuracy that `compute_metrics` gives for both; where it is missing, the explained share of the loss
            is taken, which needs `grokking_classes`.
        grokking_classes: number of classes, or of tokens in the vocabulary; None if there is an accuracy.
        grokking_stall_ratio: multiple of the steps that memorising took after which the run has stalled.
        grokking_raise_decay: from memorising on, multiply the weight decay by 3 at every evaluation, up to 1, until the
            validation score is .99.
        grokking_slow_gradients: from stalling until it groks, amplify the slow part of the gradients (Grokfast).
        grokking_finish: when it grokked, keep the checkpoint as `grokked-<step>`, and from then on multiply the learning rate by
            .95 at every evaluation, down to a tenth.
    """

    grokking_train: str = "train"
    grokking_validation: str = "val"
    grokking_metric: str = "accuracy"
    grokking_classes: int | None = None
    grokking_stall_ratio: float = 20.0
    grokking_raise_decay: bool = False
    grokking_slow_gradients: bool = False
    grokking_finish: bool = False


class GrokkingCallback(TrainerCallback, ExportableState):
    """Feeds a `GrokkingDetector` from a trainer's evaluations, reports every change of its state, and takes actions.

    The trainer evaluates a mapping, `eval_dataset={"train": a fixed part of the training data, "val": ...}`. Everything that
    happens is kept in the trainer's `log_history` under `grokking/...`, and so reaches its trackers, once `watch_grokking` has
    added the callback. It is saved with checkpoints and goes on from there.

    The steps at which it was memorised and reached .5, .95 and .99 are logged when they are known. Early stopping, where an
    `EarlyStoppingCallback` is passed, is suspended from memorisation until the run grokked.

    Args:
        options: `GrokkingOptions` or their fields as a mapping.
        early_stopping: the trainer's callback of that kind.

    Attributes:
        detector: the `GrokkingDetector`.
    """

    def __init__(
        self,
        options: GrokkingOptions | dict[str, Any] | None = None,
        early_stopping: EarlyStoppingCallback | None = None,
    ):
        self.options = GrokkingOptions(**options) if isinstance(options, dict) else options or GrokkingOptions()
        self.early_stopping = early_stopping
        self.detector = GrokkingDetector(self.options.grokking_stall_ratio)
        self.report: Callable[[dict[str, Any]], None] | None = None
        self.slow: SlowGradients | None = None
        self.decays: list[float] | None = None  # of the optimiser's groups, before they were raised
        self.rate_factor = 1.0
        self._suspended = False
        self._pending: dict[str, dict[str, float]] = {}
        self._tag: int | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON takes it."""
        return {
            "args": {"options": asdict(self.options)},
            "attributes": {
                "detector": self.detector.to_dict(),
                "decays": self.decays,
                "rate_factor": self.rate_factor,
                "slow": self.slow is not None,
            },
        }

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Go on from a checkpoint, if the trainer does."""
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(saved, dict) and isinstance(saved["attributes"]["detector"], dict):
            attributes = saved["attributes"]
            self.detector = GrokkingDetector.from_dict(attributes["detector"])
            self.decays, self.rate_factor = attributes["decays"], attributes["rate_factor"]
            self.slow = self._load_slow(args, state) if attributes["slow"] else None
            self._suspend_early_stopping(control, state)

    def on_evaluate(self, args, state, control, metrics=None, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        """Take the metrics of one part; when both parts of a step are there, update the detector and act."""
        names = (self.options.grokking_train, self.options.grokking_validation)
        for name in names:
            if f"eval_{name}_loss" in metrics:
                self._pending[name] = {**metrics, "step": state.global_step}
        if any(self._pending.get(name, {}).get("step") != state.global_step for name in names):
            return
        before, known = self.detector.state, self.detector.summary()
        probe = self._probe(state.global_step, model)
        self._pending.clear()
        if self.detector.probes and probe.step <= self.detector.probes[-1].step:
            return  # evaluated twice at one step, as a trainer may at the end
        now = self.detector.update(probe)
        entry: dict[str, Any] = {"grokking/weight_norm": probe.weight_norm, "grokking/state": list(State).index(now)}
        if now is not before:
            self._announce(before, now)
        times = {name: value for name, value in self.detector.summary().items() if value != known[name]}
        entry |= {f"grokking/{name}": value for name, value in times.items() if name != "state" and value is not None}
        entry |= self._act(before, now, state, control, optimizer, lr_scheduler)
        entry |= self._suspend_early_stopping(control, state)
        self._log(state, entry)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Amplify slow gradients, if that is on. Gradients have been clipped before."""
        if self.slow is not None:
            self.slow.apply(model.named_parameters())

    def on_save(self, args, state, control, **kwargs):
        """Keep the averages of slow gradients in the checkpoint, and the checkpoint of a run that grokked."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if not state.is_world_process_zero or not folder.is_dir():
            return
        if self.slow is not None:
            save_file({name: average.contiguous() for name, average in self.slow.averages.items()}, folder / SLOW_FILE)
        if self._tag is not None:
            shutil.copytree(folder, Path(args.output_dir, f"grokked-{self._tag}"), dirs_exist_ok=True)
            self._tag = None

    def _probe(self, step: int, model: torch.nn.Module) -> Probe:
        found: dict[str, float] = {}
        for side, name in (("train", self.options.grokking_train), ("val", self.options.grokking_validation)):
            metrics = self._pending[name]
            loss, score = metrics[f"eval_{name}_loss"], metrics.get(f"eval_{name}_{self.options.grokking_metric}")
            if score is None:
                if self.options.grokking_classes is None:
                    raise ValueError(
                        f"The evaluation of {name!r} has no {self.options.grokking_metric!r}; let `compute_metrics` give it, or "
                        "set `grokking_classes` to judge by the loss."
                    )
                score = explained(loss, self.options.grokking_classes)
            found |= {f"{side}_loss": loss, f"{side}_score": score}
        squares = [p.detach().float().square().sum() for p in model.parameters() if p.requires_grad]
        return Probe(step=step, weight_norm=torch.stack(squares).sum().sqrt().item(), **found)

    def _act(self, before: State, now: State, state, control, optimizer, lr_scheduler) -> dict[str, Any]:
        """Take or take back the actions that are on; returns what to log."""
        logged: dict[str, Any] = {}
        options, over = self.options, now in (State.FIT, State.GROKKED)
        if options.grokking_raise_decay and now is not State.FIT and self.detector.t99 is None:
            logged |= self._raise_decay(optimizer)
        elif self.decays is not None:
            logged |= self._restore_decay(optimizer)
        if options.grokking_slow_gradients and now is State.STALLED and self.slow is None:
            self.slow = SlowGradients()
            logged["grokking/slow_gradients"] = 1
        elif self.slow is not None and (over or not options.grokking_slow_gradients):
            self.slow = None
            logged["grokking/slow_gradients"] = 0
        factor = 1.0
        if options.grokking_finish and now is State.GROKKED:
            factor = max(FINAL_RATE, RATE_DECAY * self.rate_factor)
            if before is not now:
                self._tag, control.should_save = state.global_step, True
        if factor != self.rate_factor:
            _scale_rate(optimizer, lr_scheduler, factor / self.rate_factor)
            self.rate_factor = logged["grokking/learning_rate_factor"] = factor
        for name, value in logged.items():
            logger.info(f"step {state.global_step}: {name} {value}")
        return logged

    def _raise_decay(self, optimizer) -> dict[str, Any]:
        groups = optimizer.param_groups
        if self.decays is None:
            self.decays = [group["weight_decay"] for group in groups]
        chosen = [group for group, decays in zip(groups, _decaying(groups, self.decays), strict=True) if decays]
        for group in chosen:
            group["weight_decay"] = min(DECAY_LIMIT, max(DECAY_FLOOR, DECAY_FACTOR * group["weight_decay"]))
        return {"grokking/weight_decay": max((group["weight_decay"] for group in chosen), default=0.0)}

    def _restore_decay(self, optimizer) -> dict[str, Any]:
        assert self.decays is not None
        for group, decay in zip(optimizer.param_groups, self.decays, strict=True):
            group["weight_decay"] = decay
        highest, self.decays = max(self.decays), None
        return {"grokking/weight_decay": highest}

    def _suspend_early_stopping(self, control, state) -> dict[str, Any]:
        """Keep early stopping from stopping while the run may still grok; returns what to log."""
        if self.early_stopping is None:
            return {}
        before, self._suspended = self._suspended, self.detector.state not in (State.FIT, State.GROKKED)
        if self._suspended:
            counter = self.early_stopping.early_stopping_patience_counter
            if counter >= self.early_stopping.early_stopping_patience and state.global_step < state.max_steps:
                control.should_training_stop = False  # it asked to stop at this very evaluation
            self.early_stopping.early_stopping_patience_counter = SUSPENDED
        elif before:
            self.early_stopping.early_stopping_patience_counter = 0
        return {} if before is self._suspended else {"grokking/early_stopping": int(not self._suspended)}

    def _announce(self, before: State, now: State) -> None:
        step, found = self.detector.probes[-1].step, self.detector
        text = {
            State.MEMORISED: "the training data are known by heart, the validation data are not",
            State.PRE_GROK: "validation loss or weight norm are falling",
            State.STALLED: f"no sign of generalisation after {found.stall_ratio:g} times the steps of memorising",
            State.GROKKED: f"validation reached .95 at step {found.t95}, {found.delay_ratio or 0:.1f} times as late",
            State.FIT: "training and validation agree",
        }[now]
        logger.warning(f"grokking: {before.value} -> {now.value} at step {step}: {text}.")

    def _log(self, state, entry: dict[str, Any]) -> None:
        if self.report is not None:
            self.report(entry)
        else:
            state.log_history.append({**entry, "step": state.global_step})

    def _load_slow(self, args, state) -> SlowGradients:
        slow = SlowGradients()
        resumed = args.resume_from_checkpoint
        folders = [Path(args.output_dir, f"checkpoint-{state.global_step}")]
        folders += [Path(resumed)] if isinstance(resumed, str) else []
        found = next((folder / SLOW_FILE for folder in folders if (folder / SLOW_FILE).is_file()), None)
        if found is None:
            logger.warning(f"{SLOW_FILE} is not in the checkpoint; averages of gradients begin anew.")
        else:
            slow.averages = load_file(found)
        return slow


def watch_grokking(
    trainer: Trainer,
    options: GrokkingOptions | None = None,
    early_stopping: EarlyStoppingCallback | None = None,
) -> GrokkingCallback:
    """Add a `GrokkingCallback` to a trainer, so that what it sees reaches the trainer's log and trackers.

    Args:
        trainer: whose `eval_dataset` is a mapping with both parts. Modified in place.
        options: None takes the defaults: watch only.
        early_stopping: the trainer's callback of that kind.

    Returns:
        The callback, whose `detector` holds the result.

    Raises:
        ValueError: if the trainer does not evaluate both parts.
    """
    options = options or GrokkingOptions()
    wanted = {options.grokking_train, options.grokking_validation}
    parts = set(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else set()
    if not wanted <= parts or trainer.args.eval_strategy == "no":
        raise ValueError(
            f"Grokking is seen by evaluating {' and '.join(sorted(wanted))}, but the trainer evaluates "
            f"{', '.join(sorted(parts)) or 'neither'}; pass `eval_dataset` as a mapping of both and set `eval_strategy`."
        )
    callback = GrokkingCallback(options, early_stopping)
    callback.report = trainer.log
    trainer.add_callback(callback)
    return callback


def _decaying(groups: list[dict[str, Any]], decays: list[float]) -> list[bool]:
    """Which groups of an optimiser have a weight decay; where none has, those of matrices. Never a table's sparse rows."""
    if any(decays):
        return [decay > 0 for decay in decays]
    return [not group.get("sparse") and all(p.dim() > 1 for p in group["params"]) for group in groups]


def _scale_rate(optimizer, lr_scheduler, factor: float) -> None:
    """Multiply the learning rate from here on; a scheduler overwrites the groups' own, so its base changes."""
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate may have wrapped it
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] *= factor
