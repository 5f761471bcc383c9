"""Prefixes that change while `trl.GRPOTrainer` trains: searched again in stages, or adapted to each problem's success."""

import functools
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from karla_hf.pope_prefix import longest_prefix, search_prefixes
from karla_hf.pope_problems import Render, guide
from karla_hf.pope_rewards import RewardFunction, is_correct
from karla_hf.pope_rows import make_row
from karla_hf.pope_sampling import ModelSampler


STATE = "pope_prefixes"  # its name in trainer_state.json


class PrefixCurriculum(TrainerCallback):
    """Rows like those of `build_rows` whose prefixes are looked up when a batch is made.

    Train on `.dataset`, and give the object to the trainer as a callback. Prefixes are saved in each checkpoint's
    `trainer_state.json`, and taken from there when training is resumed. A batch that the data loader had made before a change
    still has the old prefix; its rows say so in `num_steps`.

    Args:
        problems: of `make_problems`.
        prefixes: of `find_prefixes`: the prefixes to begin with. Problems without one are left out.
        chat: whether plain prompts become a user's turn.
        render: puts a prefix into a prompt.

    Attributes:
        num_steps: by problem, the steps that its guided row gives; from 0 on, the row is unguided.

    Raises:
        ValueError: if no problem has a prefix; at the start of the training, if rows would be made in other processes, or
            the checkpoint has no prefixes.
    """

    def __init__(self, problems: Dataset, prefixes: Dataset, *, chat: bool = False, render: Render = guide):
        self.chat, self.render = chat, render
        steps = {row["problem_id"]: row["num_steps"] for row in prefixes if row["num_steps"]}
        self.problems = {row["problem_id"]: row for row in problems if row["problem_id"] in steps}
        self.num_steps: dict[str, int] = {name: steps[name] for name in self.problems}
        if not self.problems:
            raise ValueError(
                "No problem has a prefix, so there is nothing to adapt; give a larger `max_fraction` to the search."
            )

    @functools.cached_property
    def dataset(self) -> Dataset:
        """Two rows for each problem, guided and unguided, rendered with the prefixes of the moment."""
        rows = [{"problem_id": name, "guided": guided} for name in self.problems for guided in (True, False)]
        return Dataset.from_list(rows).with_transform(self._make_rows)

    def _make_rows(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = [
            make_row(self.problems[name], self.num_steps[name] if guided else 0, chat=self.chat, render=self.render)
            for name, guided in zip(batch["problem_id"], batch["guided"], strict=True)
        ]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse data loaders that would keep a copy of the prefixes."""
        if args.dataloader_num_workers > 0:
            raise ValueError(
                f"`dataloader_num_workers` is {args.dataloader_num_workers}, but other processes would not see prefixes change; "
                "set it to 0."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the prefixes of the checkpoint from which training is resumed."""
        saved: Any = state.stateful_callbacks
        if state.global_step and STATE not in saved:
            raise ValueError(
                "The checkpoint holds no prefixes, so it was not trained with a prefix curriculum; resume one that was, or "
                "start anew."
            )
        if STATE in saved:
            known = saved[STATE]["num_steps"]
            self.num_steps.update({name: known[name] for name in self.num_steps if name in known})
        self._note(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change the prefixes, the same way in every process."""
        self.num_steps.update(self.change(state.global_step, **kwargs))
        self._note(state)

    def change(self, step: int, **kwargs: Any) -> dict[str, int]:
        """The prefixes that are others from now on; called in every process."""
        return {}

    def _note(self, state: TrainerState) -> None:
        saved: Any = state.stateful_callbacks
        saved[STATE] = {"num_steps": dict(self.num_steps)}


class AdaptivePrefixes(PrefixCurriculum):
    """Keeps each problem's guided success near a target, and withdraws its prefix when it is no longer needed.

    After `num_samples` guided completions of a problem: if more than `target + tolerance` of them are correct, its prefix
    loses a step; if less than `target - tolerance`, it gains one, up to `max_fraction` of the solution. A prefix that has
    lost its last step does not come back. (The idea is that of AdaPrefix-GRPO, arXiv 2607.07674; the rule is ours.)

    Args:
        problems: of `make_problems`.
        prefixes: of `find_prefixes`.
        target: success to keep, above 0 and below 1.
        tolerance: how far off is near enough.
        num_samples: guided completions of a problem, over all processes, on which a change is based.
        max_fraction: longest prefix, as a share of the solution's characters.
        chat: whether plain prompts become a user's turn.
        render: puts a prefix into a prompt.

    Example:
        The reward function that the trainer gets is the one that is watched:

            curriculum = AdaptivePrefixes(problems, prefixes)
            GRPOTrainer(model, curriculum.watch(exact_reward), train_dataset=curriculum.dataset, callbacks=[curriculum])
    """

    def __init__(
        self,
        problems: Dataset,
        prefixes: Dataset,
        *,
        target: float = 0.5,
        tolerance: float = 0.25,
        num_samples: int = 8,
        max_fraction: float = 0.25,
        chat: bool = False,
        render: Render = guide,
    ):
        super().__init__(problems, prefixes, chat=chat, render=render)
        if not 0 < target < 1 or not 0 <= tolerance <= min(target, 1 - target):
            raise ValueError(
                f"`target` is {target} and `tolerance` {tolerance}; give a target above 0 and below 1, and a tolerance that "
                "stays within 0 to 1 around it."
            )
        self.target, self.tolerance, self.num_samples = target, tolerance, num_samples
        self.longest = {
            name: max(self.num_steps[name], longest_prefix(row["solution"], max_fraction))
            for name, row in self.problems.items()
        }
        self._seen: list[tuple[str, int, bool]] = []  # of this process since the last step
        self._counts: dict[str, tuple[int, int]] = {}  # by problem, correct and all completions since its last change

    def watch(self, reward: RewardFunction) -> RewardFunction:
        """The same reward function, whose guided rewards the curriculum sees."""

        @functools.wraps(reward)
        def watched(prompts: list, completions: list, **columns: Any) -> list[float | None]:
            rewards = reward(prompts=prompts, completions=completions, **columns)
            rows = zip(columns["problem_id"], columns["num_steps"], rewards, strict=True)
            self._seen += [
                (name, steps, is_correct(value)) for name, steps, value in rows if steps and value is not None
            ]
            return rewards

        return watched

    def change(self, step: int, **kwargs: Any) -> dict[str, int]:
        """Count what all processes saw, and adapt the prefixes with enough completions."""
        for name, steps, correct in gather_object(self._seen):
            if steps == self.num_steps[name]:  # else of a batch that was made before a change
                right, seen = self._counts.get(name, (0, 0))
                self._counts[name] = right + correct, seen + 1
        self._seen = []
        changed = {}
        for name, (right, seen) in list(self._counts.items()):
            if seen >= self.num_samples:
                del self._counts[name]
                steps = self.num_steps[name]
                if right / seen > self.target + self.tolerance:
                    changed[name] = steps - 1
                elif right / seen < self.target - self.tolerance:
                    changed[name] = min(steps + 1, self.longest[name])
        return changed


class StagedPrefixes(PrefixCurriculum):
    """Searches the prefixes again every `every` steps, from none to the present one, so that they shrink toward none.

    The processes share the problems. Each stage has random numbers of its own.

    Args:
        problems: of `make_problems`.
        prefixes: of `find_prefixes`.
        reward: a reward function; an answer is correct if its reward is 1 or more.
        every: steps between two searches.
        num_samples: completions per prefix.
        min_success: correct ones that are enough.
        sampling: options of `ModelSampler`, such as `max_new_tokens`.
        chat: whether plain prompts become a user's turn.
        render: puts a prefix into a prompt.
    """

    def __init__(
        self,
        problems: Dataset,
        prefixes: Dataset,
        reward: RewardFunction,
        *,
        every: int,
        num_samples: int = 16,
        min_success: int = 1,
        sampling: Mapping[str, Any] | None = None,
        chat: bool = False,
        render: Render = guide,
    ):
        super().__init__(problems, prefixes, chat=chat, render=render)
        if every < 1:
            raise ValueError(f"`every` is {every}; give 1 or more steps between two searches.")
        if not 1 <= min_success <= num_samples:
            raise ValueError(f"`min_success` is {min_success}; give a number from 1 to the {num_samples} samples.")
        self.reward, self.every, self.sampling = reward, every, dict(sampling or {})
        self.num_samples, self.min_success = num_samples, min_success

    def change(self, step: int, **kwargs: Any) -> dict[str, int]:
        """Search again, if it is time."""
        if step % self.every:
            return {}
        model: PreTrainedModel = kwargs["model"]
        seed = self.sampling.get("seed", 0) + step
        sampler = ModelSampler(model, kwargs["processing_class"], **{**self.sampling, "seed": seed})
        process = PartialState()
        names = [name for name, steps in self.num_steps.items() if steps]
        names = names[process.process_index :: process.num_processes]
        found: list[tuple[str, int]] = []
        if names:
            tried = search_prefixes(
                Dataset.from_list([self.problems[name] for name in names]), dict.fromkeys(names, 0), self.num_steps,
                sampler, self.reward, num_samples=self.num_samples, min_success=self.min_success, render=self.render,
                chat=self.chat, progress=process.is_main_process,
            )  # fmt: skip
            found = [
                (name, record["num_steps"]) for name, record in tried.items()
            ]  # the last tried is the present one
        return dict(gather_object(found))
