"""Recipes of Phase 2: which problems, how their prefixes are found, and how `trl.GRPOTrainer` trains."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trl import GRPOConfig

from karla_hf.arguments import ModelArguments, parse_values, read_recipe


CURRICULA = ("none", "adaptive", "staged")


@dataclass
class PopeArguments(ModelArguments):
    """The model and the problems of a recipe of Phase 2. All else is a key of TRL's `GRPOConfig`.

    The passes sample as the training does: with its `max_completion_length`, `temperature`, `top_p`, `top_k` and `seed`.

    Attributes:
        phase: "pope", by which such a recipe is known.
        problems: see `karla_hf.pope_tasks.load_problems`.
        problems_split: split of a data set on the Hub.
        problems_limit: take the first so many.
        problems_columns: what the data calls `prompt`, `solution`, `answer` and `problem_id`.
        reward: "exact", "math", "reasoning-gym", or the import path of a reward function.
        chat: whether plain prompts become a user's turn; needs a chat template.
        held_out_share: share of the hard problems that is not trained on, and measured before and after; 0 measures the
            problems of the training.
        num_samples: completions per problem in the difficulty pass, and per prefix in the search.
        eval_samples: completions per problem before and after the training, at least 16 for pass@16.
        max_correct: a problem is hard if at most so many of its samples are correct.
        min_success: correct samples that a prefix needs.
        max_fraction: longest prefix, as a share of the solution's characters.
        curriculum: "none" keeps the prefixes; "adaptive" keeps guided success near `target_success`, then withdraws
            them; "staged" searches again every `search_steps` steps.
        target_success: of the adaptive curriculum.
        search_steps: of the staged one.
        sampling_batch_size: completions generated at once in passes.
    """

    phase: str = field(default="pope", metadata={"help": "pope."})
    problems: str = field(default="", metadata={"help": "champ, chain-sum, a file, or a Hub data set."})
    problems_split: str = field(default="train", metadata={"help": "Its split on the Hub."})
    problems_limit: int | None = field(default=None, metadata={"help": "Take the first so many."})
    problems_columns: dict | None = field(default=None, metadata={"help": "Names of its columns."})
    reward: str = field(default="exact", metadata={"help": "exact, math, reasoning-gym, or an import path."})
    chat: bool = field(default=True, metadata={"help": "Whether plain prompts become a user's turn."})
    held_out_share: float = field(default=0.2, metadata={"help": "Share of the hard problems to measure on."})
    num_samples: int = field(default=16, metadata={"help": "Completions per problem and prefix."})
    eval_samples: int = field(default=16, metadata={"help": "Completions per problem, before and after."})
    max_correct: int = field(default=0, metadata={"help": "Most correct samples of a hard problem."})
    min_success: int = field(default=1, metadata={"help": "Correct samples that a prefix needs."})
    max_fraction: float = field(default=0.25, metadata={"help": "Longest prefix."})
    curriculum: str = field(default="none", metadata={"help": "none, adaptive or staged."})
    target_success: float = field(default=0.5, metadata={"help": "Of the adaptive curriculum."})
    search_steps: int = field(default=100, metadata={"help": "Of the staged curriculum."})
    sampling_batch_size: int = field(default=64, metadata={"help": "Completions generated at once."})

    def __post_init__(self):
        super().__post_init__()
        if not self.problems:
            raise ValueError("`problems` is missing; give champ, chain-sum, a file, or a data set on the Hub.")
        if self.curriculum not in CURRICULA:
            raise ValueError(f"`curriculum` is {self.curriculum!r}; give one of {', '.join(CURRICULA)}.")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(
                f"`held_out_share` is {self.held_out_share}; give a share from 0 to below 1, such as 0.2."
            )
        if self.eval_samples < 16:
            raise ValueError(f"`eval_samples` is {self.eval_samples}; give 16 or more, for pass@16.")


class PopeRecipe(NamedTuple):
    """A recipe of Phase 2 that has been read.

    Attributes:
        arguments: model and problems.
        training: how to train; a checked `trl.GRPOConfig`.
        model_options: fields of `KarlaConfig`.
    """

    arguments: PopeArguments
    training: GRPOConfig
    model_options: dict[str, Any]


def parse_pope_recipe(path: str | Path, overrides: Sequence[str] = ()) -> PopeRecipe:
    """Read a recipe of Phase 2 and check every key in it.

    Args:
        path: a YAML file, one mapping of fields of `PopeArguments`, of `trl.GRPOConfig`, and of the model options of
            `KarlaConfig`.
        overrides: see `karla_hf.arguments.parse_recipe`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no YAML mapping, for an unknown key, or for a value of the wrong kind.
    """
    return PopeRecipe(*parse_values(path, read_recipe(path, overrides), PopeArguments, GRPOConfig))
