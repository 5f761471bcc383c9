"""Decoding with ten ticks and the memory on, against the bare backbone (SmolLM2-135M, batch 1)."""

from karla_hf import KarlaForCausalLM, load_backbone, load_tokenizer
from karla_hf.facts import make_facts
from karla_hf.speed import decode_row


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "The ferry crossed the river every morning, and on the other bank"


def rows():
    """One row."""
    tokenizer = load_tokenizer(NAME)
    model = KarlaForCausalLM.from_backbone(NAME, tokenizer)
    model.read([fact.text for fact in make_facts(40)], tokenizer)
    yield decode_row(model, load_backbone(NAME), tokenizer, PROMPT)
