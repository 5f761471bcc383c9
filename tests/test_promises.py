"""The numbers that the README promises, on the real SmolLM2-135M (slow: `make test-all`)."""

import pytest
import torch

from karla_hf import KarlaForCausalLM, load_backbone, load_tokenizer
from karla_hf.demo import DOCUMENT, RELATED
from karla_hf.documents import class_documentation, unrelated_text
from karla_hf.evaluation import chat_recall, exact_recall, perplexity
from karla_hf.facts import make_facts
from karla_hf.questions import WORDINGS, make_paragraphs, reword


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NAME)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(NAME)


@pytest.fixture
def model(backbone, tokenizer):
    return KarlaForCausalLM.from_backbone(backbone, tokenizer)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_hundred_facts_are_recalled_after_one_reading(model, tokenizer, seed):
    facts = make_facts(200, split="test", seed=seed)
    story = unrelated_text()
    before = perplexity(model, tokenizer, story, progress=False)
    model.read([fact.text for fact in facts], tokenizer, progress=False)
    recalled = exact_recall(model, tokenizer, facts, progress=False)
    assert recalled.exact >= 194, recalled.by_form
    assert perplexity(model, tokenizer, story, progress=False) <= 1.005 * before


def test_without_the_memory_no_fact_is_known(model, tokenizer):
    facts = make_facts(40, split="test")
    model.read([fact.text for fact in facts], tokenizer, progress=False)
    model.use_memory(False)
    assert exact_recall(model, tokenizer, facts, progress=False).exact == 0


def test_a_document_is_known_and_helps_a_related_one(model, tokenizer):
    document, related = class_documentation(*DOCUMENT), class_documentation(*RELATED)
    before = perplexity(model, tokenizer, related, progress=False)
    model.read(document, tokenizer, progress=False)
    assert perplexity(model, tokenizer, document, progress=False) <= 1.4
    assert perplexity(model, tokenizer, related, progress=False) <= 0.8 * before


def test_facts_in_paragraphs_are_recalled_by_their_bare_prompts(model, tokenizer):
    facts = make_facts(100, split="test", seed=2)
    model.read([" ".join(fact.text for fact in facts[at::20]) for at in range(20)], tokenizer, progress=False)
    recalled = exact_recall(model, tokenizer, facts, progress=False)
    assert recalled.exact >= 95, recalled.by_form


def test_unlearning_takes_what_it_is_told_to_and_nothing_else(model, tokenizer):
    facts, story = make_facts(30, split="test"), unrelated_text()
    gone, kept = facts[:5], facts[5:]
    model.read([fact.text for fact in facts], tokenizer, progress=False)
    before = [perplexity(model, tokenizer, fact.text, progress=False) for fact in gone]
    unread = perplexity(model, tokenizer, story, progress=False)
    known = exact_recall(model, tokenizer, kept, progress=False).exact
    model.read([fact.text for fact in gone], tokenizer, sign=-1, progress=False)
    after = [perplexity(model, tokenizer, fact.text, progress=False) for fact in gone]
    assert all(later > 2 * earlier for earlier, later in zip(before, after, strict=True)), (before, after)
    assert exact_recall(model, tokenizer, gone, progress=False).exact == 0
    assert exact_recall(model, tokenizer, kept, progress=False).exact >= known - 1
    assert perplexity(model, tokenizer, story, progress=False) <= 1.0001 * unread


def test_a_table_of_eight_rows_does_not_help(backbone, tokenizer):
    """Control: with nowhere to put things, the same writes teach next to nothing."""
    options = {"engram_max_rows": 8, "engram_update_periods": [1]}
    model = KarlaForCausalLM.from_backbone(backbone, tokenizer, **options)
    facts = make_facts(40, split="test")
    model.read([fact.text for fact in facts], tokenizer, progress=False)
    assert model.packs() == {"default": 8}
    assert exact_recall(model, tokenizer, facts, progress=False).exact <= 4


def test_decoding_token_by_token_equals_the_full_forward_pass(model, tokenizer):
    text = make_facts(1, split="test")[0].text
    model.read(text, tokenizer, progress=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        full, cache, steps = model(ids).logits, None, []
        for token in ids[0]:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", [0])
def test_questions_are_answered_from_running_text(model, tokenizer, seed):
    facts = make_facts(200, split="test", seed=seed)
    story = unrelated_text()
    before = perplexity(model, tokenizer, story, progress=False)
    model.read(make_paragraphs(facts, split="test", seed=seed), tokenizer, progress=False)
    assert perplexity(model, tokenizer, story, progress=False) <= 1.002 * before
    for wording in WORDINGS:
        asked = [reword(fact, wording, split="test", variant=number // 5) for number, fact in enumerate(facts)]
        ask = chat_recall if wording == "chat" else exact_recall
        assert ask(model, tokenizer, asked, progress=False).exact >= 170, wording


def test_cues_do_not_disturb_a_related_document(backbone, tokenizer):
    document, related = class_documentation(*DOCUMENT), class_documentation(*RELATED)
    measured = []
    for cues in (False, True):
        model = KarlaForCausalLM.from_backbone(backbone, tokenizer, engram_cues=cues)
        model.read(document, tokenizer, progress=False)
        measured.append(perplexity(model, tokenizer, related, progress=False))
    assert measured[1] <= 1.005 * measured[0]
