"""Decoding with ten ticks and the memory on, against the bare backbone (SmolLM2-135M, float32, batch 1).

`karla_vs_backbone` is the ratio of tokens per second; `ticks_share_torch` and `ticks_share_c` are what ten ticks take of one
step of the backbone, without the compiled kernel and with it: at most 0.08 and 0.03.
"""

from karla_hf import KarlaForCausalLM, load_backbone, load_tokenizer
from karla_hf.facts import make_facts
from karla_hf.speed import decode_row, tick_results


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "The ferry crossed the river every morning, and on the other bank"


def rows():
    """A row of decoding, and the ticks' shares."""
    tokenizer = load_tokenizer(NAME)
    model = KarlaForCausalLM.from_backbone(NAME, tokenizer)
    model.read([fact.text for fact in make_facts(40)], tokenizer)
    backbone = load_backbone(NAME)
    yield decode_row(model, backbone, tokenizer, PROMPT)
    yield from tick_results(model, backbone)
