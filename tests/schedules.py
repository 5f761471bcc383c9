"""A schedule of the three phases on a tiny backbone, and what it is overridden with in the tests."""

import json

import yaml
from tiny import CHAT_TEMPLATE, OPTIONS, TRAINING, save_backbone

from karla_hf.facts import make_facts
from karla_hf.pope import reward_function


TEXTS = {**TRAINING, "max_length": 32, "packing": True, "packing_strategy": "wrapped", "max_steps": 4, "save_steps": 2}
POPE = {
    "num_samples": 2,
    "num_generations": 2,
    "max_completion_length": 4,
    "temperature": 1.0,
    "reward": "schedules.vowels",
}
FINE_TUNE = {"tick_loss": "mean", "ponder_cost": 0.01, "eval_strategy": "steps", "eval_steps": 2, "probe_rows": 3}


@reward_function
def vowels(completion, answer, **row):
    """Never right, but sometimes better: so there is something to learn from problems that stay hard."""
    return 0.5 * sum(letter in "aeiou" for letter in completion) / max(1, len(completion))


def write_schedule(folder, name="out", **changes):
    """Write a tiny backbone, texts, problems and the recipes of the phases; returns the path of the schedule."""
    if not (folder / "backbone").exists():
        save_backbone(folder / "backbone", chat_template=CHAT_TEMPLATE)
        text = "\n\n".join(fact.text for fact in make_facts(60))
        (folder / "text.txt").write_text(text)
        steps = ["a first step\n", "a second one\n", "a third one\n", "the end\n", "and more\n"]
        rows = [
            {"prompt": f"Where is key {number}?", "solution": "".join(steps), "answer": "no such text"}
            for number in range(6)
        ]
        (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = {**TEXTS, "dataset_files": [str(folder / "text.txt")], "held_out_limit": 4}
    pope = {**TRAINING, **POPE, "phase": "pope", "problems": str(folder / "problems.jsonl"), "max_steps": 2}
    recipes = {
        "warmup": {**OPTIONS, **texts, "model_name_or_path": str(folder / "backbone")},
        "pope": {**pope, "save_steps": 1, "model_name_or_path": "outputs/warm-up"},
        "finetune": {**texts, **FINE_TUNE, "phase": "fine-tune", "model_name_or_path": "outputs/pope"},
    }
    for stem, values in recipes.items():
        (folder / f"{stem}.yaml").write_text(yaml.safe_dump(values))
    phases = {
        "warm-up": {"recipe": "warmup.yaml"},
        "pope": {"recipe": "pope.yaml"},
        "fine-tune": {"recipe": "finetune.yaml"},
    }
    values = {"phase": "all", "output_dir": str(folder / name), "phases": phases, **changes}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / f"{name}.yaml"
