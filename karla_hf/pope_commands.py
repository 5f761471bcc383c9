"""What the commands `karla pope …` do."""

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from karla_hf.backbones import load_backbone, load_tokenizer
from karla_hf.checkpoints import load_checkpoint
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.pope import (
    ModelSampler,
    build_rows,
    evaluate,
    find_prefixes,
    find_reward,
    load_problems,
    mean_pass_at_k,
    measure_difficulty,
    select_hard,
)
from karla_hf.pope_journal import read_records
from karla_hf.report import new_console, new_table, write_json


CARD = """---
configs:
- config_name: default
  data_files: train.parquet
---

# POPE rows

{hard} problems of `{source}` that {model} solved in at most {max_correct} of {num_samples} samples, each twice: with the
beginning of its solution in the prompt, and without. `karla pope build` made them for `trl.GRPOTrainer`; the reward function is
`{reward}`. Columns: `prompt`, `answer`, `guided`, `num_steps` and `fraction` of the solution that the prompt gives, `problem_id`.
"""


class Options(NamedTuple):
    """What the commands have in common.

    Attributes:
        model: a causal language model: a folder, a name on the Hub, or a Karla.
        revision: its revision on the Hub.
        problems: see `load_problems`.
        limit: take the first so many problems.
        split: split of a data set on the Hub.
        reward: see `find_reward`.
        plain: whether prompts are continued as texts, instead of being a user's turn.
        num_samples: completions per problem or prefix.
        sampling: options of `ModelSampler`.
    """

    model: str
    revision: str | None
    problems: str
    limit: int | None
    split: str
    reward: str
    plain: bool
    num_samples: int
    sampling: dict[str, Any]


class Session:
    """Problems, model and reward function of a command."""

    def __init__(self, options: Options):
        self.options = options
        self.reward = find_reward(options.reward)
        self.problems = load_problems(options.problems, limit=options.limit, split=options.split)
        model, tokenizer = load_model(options.model, options.revision)
        self.chat = not options.plain and tokenizer.chat_template is not None
        self.sampler = ModelSampler(
            model, tokenizer, name=options.model, revision=options.revision, **options.sampling
        )
        self.passes: dict[str, Any] = {"num_samples": options.num_samples, "chat": self.chat}

    def measure(self, folder: Path) -> Dataset:
        """The difficulty of all problems; what the folder holds is not measured again."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "difficulty.jsonl"
        return measure_difficulty(self.problems, self.sampler, self.reward, file=file, **self.passes)

    def search(self, folder: Path, max_correct: int, min_success: int, max_fraction: float) -> tuple[Dataset, Dataset]:
        """The hard problems and their prefixes."""
        hard = select_hard(self.problems, self.measure(folder), max_correct)
        prefixes = find_prefixes(hard, self.sampler, self.reward, file=folder / "prefix.jsonl",
                                 min_success=min_success, max_fraction=max_fraction, **self.passes)  # fmt: skip
        return hard, prefixes


def load_model(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model, or a Karla, with its tokenizer.

    Raises:
        OSError: if it is found nowhere.
        ValueError: if it is no causal language model.
    """
    path = Path(name, "config.json")
    if path.is_file() and KarlaConfig.get_config_dict(name)[0].get("model_type") == KarlaConfig.model_type:
        return load_checkpoint(name)
    return load_backbone(name, revision=revision), load_tokenizer(name, revision=revision)


def difficulty(options: Options, folder: Path, json_file: Path | None) -> None:
    """Count correct samples; see `karla pope difficulty`."""
    session = Session(options)
    found = session.measure(folder)
    correct = found["num_correct"][:]
    count, n = len(found), options.num_samples
    ks = sorted({1, *(k for k in (4, 16, 64) if k <= n)})
    result = {
        "problems": count,
        "num_samples": n,
        **{f"pass@{k}": mean_pass_at_k(found, k) for k in ks},
        "never_solved": correct.count(0),
        "always_solved": correct.count(n),
        "by_correct": {str(c): correct.count(c) for c in sorted(set(correct))},
        **session.sampler.identity,
    }
    table = new_table(["difficulty", ""], caption=f"Kept in {folder / 'difficulty.jsonl'}.")
    table.add_row("problems", f"{count:,}")
    table.add_row("samples of each", f"{n:,}")
    for k in ks:
        table.add_row(f"pass@{k}", f"{result[f'pass@{k}']:.3f}")
    table.add_row("never solved", f"{correct.count(0):,}")
    table.add_row("always solved", f"{correct.count(n):,}")
    new_console().print(table)
    write_json(json_file, result)


def prefix(
    options: Options, folder: Path, *, max_correct: int, min_success: int, max_fraction: float, json_file: Path | None
) -> None:
    """Search prefixes; see `karla pope prefix`."""
    session = Session(options)
    hard, prefixes = session.search(folder, max_correct, min_success, max_fraction)
    _show_prefixes(hard, prefixes, f"Kept in {folder / 'prefix.jsonl'}.")
    write_json(json_file, {**_prefix_data(session, hard, prefixes), "rows": prefixes.to_list()})


def build(
    options: Options, folder: Path, *, max_correct: int, min_success: int, max_fraction: float, json_file: Path | None
) -> None:
    """Write rows for the trainer; see `karla pope build`."""
    session = Session(options)
    hard, prefixes = session.search(folder, max_correct, min_success, max_fraction)
    rows = build_rows(hard, prefixes, chat=session.chat)
    rows.to_parquet(folder / "train.parquet")
    card = CARD.format(hard=len(rows) // 2, source=options.problems, model=options.model, max_correct=max_correct,
                       num_samples=options.num_samples, reward=options.reward)  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    _show_prefixes(hard, prefixes, f"{len(rows):,} rows, half of them guided, are in {folder}.")
    write_json(json_file, {**_prefix_data(session, hard, prefixes), "rows": len(rows)})


def evaluate_model(
    options: Options, hard: Path | None, max_correct: int, output: Path | None, json_file: Path | None
) -> None:
    """Measure pass@k without help; see `karla pope eval`."""
    session = Session(options)
    problems = session.problems
    if hard is not None:
        problems = select_hard(problems, Dataset.from_list(read_records(hard, "difficulty")), max_correct)
    ks = sorted({1, *(k for k in (4, 16, 64) if k <= options.num_samples)})
    result = evaluate(problems, session.sampler, session.reward, ks=ks, file=output, **session.passes)
    table = new_table(["unguided", ""], caption=f"{len(problems):,} problems, {options.num_samples} samples of each.")
    for k in ks:
        table.add_row(f"pass@{k}", f"{result[f'pass@{k}']:.3f}")
    new_console().print(table)
    write_json(json_file, {**result, **session.sampler.identity})


def _prefix_data(session: Session, hard: Dataset, prefixes: Dataset) -> dict[str, Any]:
    given = prefixes.filter(lambda row: row["num_steps"] > 0)
    return {
        "problems": len(session.problems),
        "hard": len(hard),
        "found": sum(prefixes["found"]),
        "longest_taken": len(given) - sum(prefixes["found"]),
        "without_step": len(prefixes) - len(given),
        "mean_fraction": sum(given["fraction"]) / len(given),
        **session.sampler.identity,
    }


def _show_prefixes(hard: Dataset, prefixes: Dataset, caption: str) -> None:
    table = new_table(["prefix", "problems", "of the solution", "correct samples"], caption=caption)
    for steps in sorted(set(prefixes["num_steps"])):
        for found in (True, False):
            rows = prefixes.filter(lambda row, s=steps, f=found: (row["num_steps"], row["found"]) == (s, f))
            if len(rows):
                name = f"{steps} step{'s' * (steps > 1)}{'' if found else ', the longest: none works'}"
                share = sum(rows["num_correct"]) / max(1, sum(rows["num_samples"]))
                cells = (f"{sum(rows['fraction']) / len(rows):.0%}", f"{share:.1%}") if steps else ("", "")
                table.add_row(name if steps else "no step is short enough", f"{len(rows):,}", *cells)
    table.add_section()
    table.add_row("hard problems", f"{len(hard):,}", "", "")
    new_console().print(table)
