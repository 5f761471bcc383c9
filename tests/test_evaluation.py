import copy
import math

import pytest
import torch
from tiny import OPTIONS, make_backbone, make_tokenizer, speak
from transformers import Gemma2Config, Gemma2ForCausalLM

from karla_hf import KarlaForCausalLM, evaluation
from karla_hf.evaluation import chat_recall, context_tokens, exact_recall, perplexity, without_and_with_memory
from karla_hf.facts import Fact, make_facts


TEXT = "The ferry leaves Brivo at seven. " * 12


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def karla(tokenizer):
    """A Karla that has read half of the facts."""
    model = speak(KarlaForCausalLM.from_backbone(make_backbone(), tokenizer, **OPTIONS))
    model.read([fact.text for fact in make_facts(20)[::2]], tokenizer, progress=False)
    return model


def greedy_by_hand(model, ids: list[int], count: int) -> list[int]:
    """The plain meaning of greedy generation: one full forward pass per token, no cache, no padding."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


def perplexity_by_hand(model, ids: list[int]) -> float:
    log_p = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return math.exp(-sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1)) / (len(ids) - 1))


@torch.no_grad()
@pytest.mark.parametrize("bare", [False, True], ids=["karla", "backbone"])
def test_recall_is_greedy_generation_of_one_fact_at_a_time(karla, tokenizer, bare):
    model = make_backbone() if bare else karla
    facts = make_facts(20)
    result = exact_recall(model, tokenizer, facts, progress=False)
    for fact, said, hit in zip(facts, result.generated, result.hits, strict=True):
        prompt, answer = evaluation.answer_tokens(fact, tokenizer)
        expected = greedy_by_hand(model, prompt, len(answer))
        assert said == tokenizer.decode(expected)
        assert hit == (expected == answer)
    assert result.exact == sum(result.hits)
    assert result.exact == 0 if bare else 8 <= result.exact < 20  # what it read, and nothing else


@torch.no_grad()
def test_a_chat_is_right_if_the_answer_is_said_anywhere(karla, tokenizer):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} So{% endif %}"
    asking = copy.deepcopy(tokenizer)
    asking.chat_template = template
    ids = tokenizer("Who knows? So", add_special_tokens=False)["input_ids"]
    said = tokenizer.decode(greedy_by_hand(karla, ids, 6))
    facts = [Fact("Who knows?", f" {said.strip(' .')[1:]}.", "own"), Fact("Who knows?", " nobody at all.", "own")]
    result = chat_recall(karla, asking, facts, new_tokens=6, progress=False)
    assert result.generated == (said, said)
    assert result.hits == (True, False)
    with pytest.raises(ValueError, match="no facts to ask"):
        chat_recall(karla, asking, [])


def test_recall_does_not_depend_on_the_batch(karla, tokenizer, monkeypatch):
    facts = make_facts(20)
    batched = exact_recall(karla, tokenizer, facts, progress=False)
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 1)
    assert exact_recall(karla, tokenizer, facts, progress=False) == batched
    assert exact_recall(karla, tokenizer, facts[::-1], progress=False).hits == batched.hits[::-1]


def test_recall_counts_by_form(karla, tokenizer):
    result = exact_recall(karla, tokenizer, make_facts(12), progress=False)
    assert {form: asked for form, (_, asked) in result.by_form.items()} == {
        "code": 3, "date": 3, "amount": 2, "city": 2, "name": 2
    }  # fmt: skip
    assert sum(exact for exact, _ in result.by_form.values()) == result.exact


def test_settings_of_the_checkpoint_do_not_touch_recall(karla, tokenizer):
    facts = make_facts(6)
    expected = exact_recall(karla, tokenizer, facts, progress=False)
    plain = karla.generation_config
    karla.generation_config = copy.deepcopy(plain)
    settings = karla.generation_config
    answer = evaluation.answer_tokens(facts[0], tokenizer)[1]
    settings.update(repetition_penalty=9.0, do_sample=True, temperature=9.0, eos_token_id=answer[0])
    try:
        assert exact_recall(karla, tokenizer, facts, progress=False) == expected
        assert karla.generation_config is settings
    finally:
        karla.generation_config = plain


def test_measuring_keeps_the_mode_of_the_model(karla, tokenizer):
    karla.train()
    exact_recall(karla, tokenizer, make_facts(1), progress=False)
    perplexity(karla, tokenizer, TEXT, progress=False)
    assert karla.training
    assert not karla.model.backbone.training
    karla.eval()


def test_answers_are_tokenised_as_they_follow_the_prompt(tokenizer):
    joined = Fact("The mill of Brivo", " was founded.", "own")
    prompt, answer = evaluation.answer_tokens(joined, tokenizer)
    assert tokenizer.decode(prompt + answer) == joined.text
    # Where the sentence has one token across the border, prompt and answer are taken by themselves.
    (the,) = tokenizer.encode("The")
    across = Fact("T", "he", "own")
    assert evaluation.answer_tokens(across, tokenizer) == (tokenizer.encode("T"), tokenizer.encode("he"))
    assert tokenizer.encode(across.text) == [the]


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ([], "There are no facts"),
        ([Fact("", " x", "own")], "without tokens"),
        ([Fact("x", "", "own")], "without tokens"),
    ],
    ids=["none", "no-prompt", "no-answer"],
)
def test_recall_refuses_facts_without_words(karla, tokenizer, facts, problem):
    with pytest.raises(ValueError, match=problem):
        exact_recall(karla, tokenizer, facts)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_perplexity_is_the_mean_over_all_tokens_but_the_first(karla, tokenizer, chunk, monkeypatch):
    monkeypatch.setattr(evaluation, "LOGITS_CHUNK", chunk)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    for model in (karla, make_backbone()):
        assert perplexity(model, tokenizer, TEXT, progress=False) == pytest.approx(
            perplexity_by_hand(model, ids), 1e-5
        )
        cut = perplexity(model, tokenizer, TEXT, max_tokens=9, progress=False)
        assert cut == pytest.approx(perplexity_by_hand(model, ids[:9]), 1e-5)


@torch.no_grad()
def test_perplexity_caps_logits_as_the_backbone_does(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 400, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    capped = Gemma2ForCausalLM(
        Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5, initializer_range=0.5)
    ).eval()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert perplexity(capped, tokenizer, TEXT, progress=False) == pytest.approx(perplexity_by_hand(capped, ids), 1e-5)


def test_a_text_is_cut_at_the_last_position_of_the_model(tokenizer):
    model = make_backbone(max_position_embeddings=16)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) > 16
    assert context_tokens(model, tokenizer, TEXT) == ids[:16]
    assert context_tokens(model, tokenizer, TEXT, 5) == ids[:5]
    for refused in (17, 1, 0):
        with pytest.raises(ValueError, match=rf"max_tokens is {refused}; give 2 to 16, as many as"):
            context_tokens(model, tokenizer, TEXT, refused)
    with pytest.raises(ValueError, match="has 1 tokens; perplexity needs 2 or more"):
        perplexity(model, tokenizer, "x")


def test_memory_is_off_and_on_and_then_as_it_was(karla, tokenizer):
    fact = make_facts(1)[0]
    assert without_and_with_memory(karla, lambda: exact_recall(karla, tokenizer, [fact], False).exact) == (0, 1)
    for state in (True, False):
        karla.use_memory(state)
        assert without_and_with_memory(karla, lambda: karla.engram.enabled) == (False, True)
        assert karla.engram.enabled is state
        with pytest.raises(ZeroDivisionError):
            without_and_with_memory(karla, lambda: 1 / 0)
        assert karla.engram.enabled is state
    karla.use_memory(True)
