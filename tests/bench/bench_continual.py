"""Six documents of six kinds, one after another: the forgetting matrix of Karla and of LoRA (SmolLM2-135M)."""

import json
from importlib.metadata import files

from karla_hf import load_backbone, load_tokenizer
from karla_hf.continual import compare_streams, first_tokens
from karla_hf.documents import class_documentation, package_description, python_reference, unrelated_text
from karla_hf.facts import make_facts
from karla_hf.figures import draw_forgetting


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENS = 600


def installed_text(distribution, name):
    """A text file that an installed distribution carries."""
    return next(file for file in files(distribution) if file.name == name).read_text(encoding="utf-8")


def solutions(category):
    """Worked problems of competitions, of one field."""
    problems = json.loads(installed_text("champ-dataset", "v0.json"))["problems"].values()
    texts = []
    for problem in problems:
        if problem["category"] == category:
            steps = "\n".join(step["_text"] for step in problem["solution"]["steps"])
            texts.append(f"Problem: {problem['_text']}\nSolution: {steps}\n")
    return "\n".join(texts)


def fact_list(split):
    """Made-up facts as one text."""
    return "\n".join(fact.text for fact in make_facts(60, split=split))


def documents():
    """The stream: six texts of six kinds by title."""
    return {
        "TRL docs": class_documentation("trl", "trl/trainer/reward_trainer.py", "RewardTrainer"),
        "Python": python_reference()["with"] + python_reference()["raise"],
        "maths": solutions("Number-Theory"),
        "package": package_description("rich"),
        "licence": installed_text("typing_extensions", "LICENSE"),
        "facts": fact_list("test"),
    }


def development():
    """Other texts of such kinds, to choose rates on."""
    return [
        class_documentation("trl", "trl/trainer/dpo_trainer.py", "DPOTrainer"),
        package_description("sortedcontainers"),
        fact_list("development"),
    ]


def run():
    """Perplexities of all documents read so far after each of them."""
    tokenizer = load_tokenizer(NAME)
    cut = {title: first_tokens(text, tokenizer, TOKENS) for title, text in documents().items()}
    others = [first_tokens(text, tokenizer, TOKENS) for text in development()]
    return compare_streams(load_backbone(NAME), tokenizer, cut, unrelated_text(), others)


def draw(result, path):
    """Heat maps, one for each method."""
    draw_forgetting(result["matrices"], result["titles"], path)
