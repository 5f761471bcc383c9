"""Two hundred facts and a document: Karla against LoRA, retrieval into the prompt and a kNN-LM (SmolLM2-135M)."""

from karla_hf import load_backbone, load_tokenizer
from karla_hf.baselines import Task, best_lora, compare
from karla_hf.documents import class_documentation, python_reference, unrelated_text
from karla_hf.facts import make_facts
from karla_hf.figures import draw_baselines


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_FACTS = 200
DEVELOPMENT_WORDS = 600


def trl_documentation(trainer):
    """Documentation of a TRL trainer by its short name, such as "SFT"."""
    return class_documentation("trl", f"trl/trainer/{trainer.lower()}_trainer.py", f"{trainer}Trainer")


def run():
    """A row for each method."""
    tokenizer = load_tokenizer(NAME)
    task = Task(
        make_facts(NUM_FACTS, split="test"), trl_documentation("SFT"), trl_documentation("GRPO"), unrelated_text()
    )
    # Not the story: settings must not be chosen on what is reported.
    other = " ".join(python_reference()["execmodel"].split()[:DEVELOPMENT_WORDS])
    development = Task(make_facts(NUM_FACTS), trl_documentation("DPO"), trl_documentation("Reward"), other)
    return compare(load_backbone(NAME), tokenizer, task, development)


def draw(result, path):
    """The methods side by side, LoRA at its best learning rate for each number of epochs."""
    others = {name: row for name, row in result["rows"].items() if not name.startswith("LoRA")}
    draw_baselines({**others, **best_lora(result["rows"])}, result["facts"], path)
