"""What is left of 200 facts after reading 100,000 further tokens of other text into the same pack."""

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.documents import python_reference, unrelated_text
from karla_hf.evaluation import exact_recall, perplexity
from karla_hf.facts import make_facts


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FURTHER_TOKENS = 100_000


def run():
    """Recall, load and an unread story before and after."""
    tokenizer = load_tokenizer(NAME)
    model = KarlaForCausalLM.from_backbone(NAME, tokenizer)
    facts, story = make_facts(200, split="test"), unrelated_text()
    rows = {"nothing read": {"tokens read": 0, "seconds": 0.0, **_state(model, tokenizer, facts, story)}}
    report = model.read([fact.text for fact in facts], tokenizer)
    spent = {"tokens read": report.tokens, "seconds": report.seconds}
    rows["after the facts"] = {**spent, **_state(model, tokenizer, facts, story)}
    report = model.read(_further(tokenizer), tokenizer)
    spent = {"tokens read": report.tokens, "seconds": report.seconds}
    rows["after other text"] = {**spent, **_state(model, tokenizer, facts, story)}
    return {"rows": rows}


def _state(model, tokenizer, facts, story):
    pack = model.engram.open_pack("default")
    return {
        "recalled of 200": exact_recall(model, tokenizer, facts).exact,
        "load, %": 100 * pack.load,
        "unread story, perplexity": perplexity(model, tokenizer, story),
    }


def _further(tokenizer):
    """Topics of the Python reference, whole, until there are enough tokens."""
    topics, tokens = [], 0
    for _, text in sorted(python_reference().items()):
        if tokens >= FURTHER_TOKENS:
            break
        topics.append(text)
        tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return topics
