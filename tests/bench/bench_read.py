"""Reading a document into the memory, against a forward pass with logits over the same tokens (SmolLM2-135M)."""

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.documents import class_documentation
from karla_hf.speed import read_row


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def rows():
    """One row."""
    tokenizer = load_tokenizer(NAME)
    model = KarlaForCausalLM.from_backbone(NAME, tokenizer)
    yield read_row(model, tokenizer, class_documentation("trl", "trl/trainer/grpo_trainer.py", "GRPOTrainer"))
