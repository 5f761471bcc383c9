"""Facts read in running paragraphs and asked in other words; and what their memory does to other text (SmolLM2-135M).

`karla bench questions` prints the test split. As a script, `python tests/bench/bench_questions.py development 200 0` prints
a split, a number of facts and a seed.
"""

import math
import sys
import time

import torch

from karla_hf import KarlaForCausalLM, load_backbone, load_tokenizer
from karla_hf.documents import class_documentation, unrelated_text
from karla_hf.evaluation import chat_recall, exact_recall, perplexity
from karla_hf.facts import make_facts
from karla_hf.questions import WORDINGS, make_paragraphs, reword


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Pages, and a seed of facts, that no choice was made on.
DOCUMENT = ("trl", "trl/trainer/rloo_trainer.py", "RLOOTrainer")
RELATED = ("trl", "trl/trainer/kto_trainer.py", "KTOTrainer")
SEED = 1
FACTS = 200
CONTROLS = 40  # facts that are asked with the memory off, and facts that were not read
UNREAD_SEED = 7


def run(split="test", count=FACTS, seed=SEED):
    """A row per wording: how many are recalled with the memory on and off; a row per text: its perplexity."""
    tokenizer, backbone = load_tokenizer(NAME), load_backbone(NAME)
    model = KarlaForCausalLM.from_backbone(backbone, tokenizer)
    facts = make_facts(count, split=split, seed=seed)
    paragraphs = make_paragraphs(facts, split=split, seed=seed)
    told = " ".join(paragraphs)
    unread = [fact for fact in make_facts(4 * CONTROLS, split=split, seed=UNREAD_SEED) if _subject(fact) not in told]
    answers = {fact.answer.strip(" .") for fact in facts}
    rows = {}
    report = model.read(paragraphs, tokenizer, progress=False)
    _say("read", tokens=report.tokens, seconds=report.seconds)
    story = unrelated_text()
    rows["unrelated story, perplexity"] = _on_and_off(
        model, lambda: perplexity(model, tokenizer, story, progress=False)
    )
    for wording in ("as read", *WORDINGS):
        ask = chat_recall if wording == "chat" else exact_recall
        asked = [_reworded(fact, wording, split, i // 5) for i, fact in enumerate(facts)]
        foreign = [_reworded(fact, wording, split, i // 5) for i, fact in enumerate(unread[:CONTROLS])]
        recalled = ask(model, tokenizer, asked, progress=False)
        said = ask(model, tokenizer, foreign, progress=False).generated
        model.use_memory(False)
        off = ask(model, tokenizer, asked[:CONTROLS], progress=False)
        model.use_memory(True)
        rows[wording] = {
            "asked": len(asked),
            "recalled": recalled.exact,
            **{form: exact for form, (exact, _) in recalled.by_form.items()},
            f"memory off, of {CONTROLS}": off.exact,
            f"not read but answered, of {CONTROLS}": sum(any(answer in text for answer in answers) for text in said),
        }
        _say(wording, **rows[wording])
        for fact, text, hit in zip(recalled.facts, recalled.generated, recalled.hits, strict=True):
            if not hit:
                _say("missed", prompt=fact.prompt, answer=fact.answer, said=text)
    document, related = class_documentation(*DOCUMENT), class_documentation(*RELATED)
    for name, cues in (("n-grams alone", False), ("with cues", True)):
        model = KarlaForCausalLM.from_backbone(backbone, tokenizer, engram_cues=cues)
        model.read(document, tokenizer, progress=False)
        for kind, text in (("related page", related), ("page read", document)):
            rows[f"{kind}, {name}, perplexity"] = _on_and_off(
                model, lambda text=text, model=model: perplexity(model, tokenizer, text, progress=False)
            )
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    table = {name: {column: row.get(column, math.nan) for column in columns} for name, row in rows.items()}
    return {"rows": table, "split": split, "seed": seed}


def _subject(fact):
    return max(fact.prompt.replace("'", " ").split()[1:], key=lambda word: word[0].isupper())


def _reworded(fact, wording, split, variant):
    return fact if wording == "as read" else reword(fact, wording, split=split, variant=variant)


def _on_and_off(model, measure):
    model.use_memory(False)
    off = measure()
    model.use_memory(True)
    on = measure()
    row = {"memory off": off, "memory on": on, "change, %": 100 * (on / off - 1)}
    _say("perplexity", **row)
    return row


def _say(what, **values):
    if __name__ == "__main__":
        print(time.strftime("%H:%M:%S"), what, values, flush=True)  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
