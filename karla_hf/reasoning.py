"""Reasoning on Karla and on its bare backbone: questions of reasoning-gym, asked through lm-evaluation-harness.

Each task is asked twice: to be answered freely, and by the likelihood of the right answer among others.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from karla_hf.checkpoints import load_checkpoint
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.report import new_console, new_table, write_json


TASKS = ("chain_sum", "basic_arithmetic", "simple_equations", "letter_counting", "spell_backward")
CHOICES = 4  # answers to choose among, the right one included
ANSWER_TOKENS = 32
BATCH_SIZE = 8


@dataclass(frozen=True)
class Score:
    """Questions of one task that a model got right.

    Attributes:
        task: a name of reasoning-gym.
        asked: number of questions.
        answered: questions whose right answer was generated.
        chosen: questions whose right answer was the likeliest of `choices`.
        choices: answers to choose among.
    """

    task: str
    asked: int
    answered: int
    chosen: int
    choices: int


def measure_reasoning(directory: Path, names: Sequence[str], *, size: int, seed: int, json_file: Path | None) -> None:
    """Compare a Karla with its bare backbone on the same questions; see `karla eval reasoning`.

    Raises:
        ImportError: if what this needs is not installed.
        ValueError: for a task that does not exist, or one whose questions all have the same answer.
        OSError: if `directory` holds no Karla.
    """
    if not all(map(importlib.util.find_spec, ("lm_eval", "reasoning_gym"))):
        raise ImportError(
            "`karla eval reasoning` needs the extra `eval`; install it with `pip install 'karla-hf[eval]'`."
        )
    questions = {name: make_questions(name, size, seed) for name in dict.fromkeys(names or TASKS)}
    model, tokenizer = load_checkpoint(directory)
    backbone, karla = (ask(asked, tokenizer, questions) for asked in (bare_backbone(model), model))
    table = new_table(
        ["task", "asked", "answered: backbone", "Karla", "likeliest: backbone", "Karla"],
        title=f"{directory}, memory on",
        caption=f"Answered: generated greedily, at most {ANSWER_TOKENS} tokens. Likeliest: of up to {CHOICES} answers.",
    )
    for before, after in zip(backbone, karla, strict=True):
        counts = (before.asked, before.answered, after.answered, before.chosen, after.chosen)
        table.add_row(before.task, *map(str, counts))
    new_console().print(table)
    results = {"backbone": [asdict(score) for score in backbone], "karla": [asdict(score) for score in karla]}
    write_json(json_file, {"seed": seed, "size": size, **results})


def bare_backbone(model: KarlaForCausalLM) -> PreTrainedModel:
    """The backbone inside a Karla as a causal language model; nothing is copied or modified."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(causal_lm, causal_lm.base_model_prefix, model.model.backbone)
    causal_lm.set_output_embeddings(model.get_output_embeddings())
    causal_lm.generation_config = model.generation_config
    return causal_lm.eval()


@dataclass(frozen=True)
class Questions:
    """Questions of one task of reasoning-gym.

    Attributes:
        name: of the task.
        rows: `question`, `answer`, and `choices` with the right answer at `label`.
        score: gives what an answer to a row's question is worth, in [0, 1].
    """

    name: str
    rows: list[dict[str, Any]]
    score: Callable[[str, int], float]


def make_questions(name: str, size: int, seed: int) -> Questions:
    """Make questions, always the same for a seed.

    Raises:
        ValueError: for a task that does not exist, or if all its answers are the same.

    Example:
        >>> questions = make_questions("chain_sum", 3, seed=0)
        >>> row = questions.rows[1]
        >>> row["choices"][row["label"]] == row["answer"], questions.score(row["answer"], 1)
        (True, 1.0)
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3) or TASKS
        raise ValueError(f"reasoning-gym has no task {name!r}; give one that it has, such as {', '.join(near)}.")
    data = create_dataset(name, size=size, seed=seed)
    entries = [data[index] for index in range(size)]
    answers = sorted({str(entry["answer"]) for entry in entries})
    if len(answers) < 2:
        raise ValueError(
            f"All {size} answers of {name} are the same, so there is nothing to choose among; raise --size."
        )
    rng, rows = random.Random(seed), []
    for index, entry in enumerate(entries):
        right = str(entry["answer"])
        others = [answer for answer in answers if answer != right]
        choices = [right, *rng.sample(others, min(CHOICES - 1, len(others)))]
        rng.shuffle(choices)
        rows.append({"index": index, "question": entry["question"].strip(), "answer": right, "choices": choices,
                     "label": choices.index(right)})  # fmt: skip
    return Questions(name, rows, lambda answer, index: float(data.score_answer(answer, entries[index])))


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: dict[str, Questions]) -> list[Score]:
    """Ask a model through the harness.

    Args:
        model: any causal language model. Not modified.
        tokenizer: its tokenizer; its chat template is used if there is one.
        questions: by the names of their tasks.

    Returns:
        The scores, in the order of the tasks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of options that are not used here
    chat = tokenizer.chat_template is not None
    tasks = [
        ConfigurableTask(config=settings(asked, chat=chat))
        for asked in questions.values()
        for settings in (_free_answer, _choice)
    ]
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH_SIZE),
        tasks=tasks, apply_chat_template=chat, bootstrap_iters=0, log_samples=False,
        task_manager=TaskManager(include_defaults=False),
    )["results"]  # fmt: skip
    scores = []
    for name, asked in questions.items():
        count = len(asked.rows)
        answered, chosen = results[f"{name}_answer"]["right,none"], results[f"{name}_choice"]["acc,none"]
        choices = max(len(row["choices"]) for row in asked.rows)
        scores.append(Score(name, count, round(count * answered), round(count * chosen), choices))
    return scores


def _settings(asked: Questions, *, chat: bool) -> dict[str, Any]:
    return {
        "custom_dataset": lambda **_: {"test": Dataset.from_list(asked.rows)},
        "test_split": "test",
        "doc_to_text": "{{question}}\n" + ("Reply with the answer alone." if chat else "Answer:"),
        "target_delimiter": "" if chat else " ",
    }


def _free_answer(asked: Questions, *, chat: bool) -> dict[str, Any]:
    """A task of the harness in which the model writes one line; its last word may be the answer as well."""

    def right(row: dict[str, Any], said: list[str]) -> dict[str, float]:
        line = said[0].strip().partition("\n")[0].strip().removesuffix(".")
        return {"right": float(any(asked.score(text, row["index"]) == 1.0 for text in (line, line.split(" ")[-1])))}

    return {
        **_settings(asked, chat=chat),
        "task": f"{asked.name}_answer",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False},
        "process_results": right,
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }


def _choice(asked: Questions, *, chat: bool) -> dict[str, Any]:
    """A task of the harness in which answers are compared by their likelihood."""
    return {
        **_settings(asked, chat=chat),
        "task": f"{asked.name}_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
