import hashlib
from collections import Counter

import pytest
import torch
from tiny import CHAT_TEMPLATE, OPTIONS, make_backbone, make_tokenizer, speak

from karla_hf import KarlaForCausalLM
from karla_hf.pope import ModelSampler, model_fingerprint


PROMPTS = ["The access code of", "a", "Where is the key to the vault of Orlin, and who", "7"]


@pytest.fixture(scope="module", params=["llama", "karla"])
def model(request, tmp_path_factory):
    if request.param == "llama":
        return make_backbone(max_position_embeddings=64)
    folder = tmp_path_factory.mktemp("backbone")
    make_backbone(max_position_embeddings=64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    karla = KarlaForCausalLM.from_backbone(str(folder), make_tokenizer(), **OPTIONS, certainty_threshold=0.3)
    karla.read(["The access code of Orlin's vault number 7 is 123-456."], make_tokenizer())
    return speak(karla).eval()


def naive_sample(model, tokenizer, prompt, key, sample, *, tokens, temperature=1.0, seed=0):
    """One sequence, one forward pass over everything per token."""
    source = hashlib.sha256(f"{seed}/{sample}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(source[:7], "big"))
    uniforms = torch.rand(tokens, generator=generator, dtype=torch.float64)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    for uniform in uniforms:
        with torch.no_grad():
            probs = (model(ids, use_cache=False).logits[0, -1] / temperature).softmax(-1).double()
        token = int((probs.cumsum(0) <= uniform * probs.sum()).sum())
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokenizer.decode(ids[0, start:])


def test_samples_are_those_of_one_sequence_at_a_time(model):
    tokenizer = make_tokenizer()
    sampler = ModelSampler(model, tokenizer, max_new_tokens=6, temperature=0.7)
    said = sampler(PROMPTS, 3, ["p", "q", "r", "s"])
    expected = [
        [naive_sample(model, tokenizer, prompt, key, j, tokens=6, temperature=0.7) for j in range(3)]
        for prompt, key in zip(PROMPTS, "pqrs", strict=True)
    ]
    assert said == expected
    assert len({text for texts in said for text in texts}) > 8


@pytest.mark.parametrize(
    ("batch_size", "order"), [(1, [0, 1, 2, 3]), (2, [3, 1, 0, 2]), (5, [2, 0, 1, 3]), (64, [1, 0])]
)
def test_batches_and_their_order_change_nothing(model, batch_size, order):
    tokenizer = make_tokenizer()
    whole = ModelSampler(model, tokenizer, max_new_tokens=8)(PROMPTS, 4, "pqrs")
    sampler = ModelSampler(model, tokenizer, max_new_tokens=8, batch_size=batch_size)
    assert sampler([PROMPTS[i] for i in order], 4, ["pqrs"[i] for i in order]) == [whole[i] for i in order]


def test_first_samples_of_more_are_the_same(model):
    sampler = ModelSampler(model, make_tokenizer(), max_new_tokens=4)
    assert [texts[:2] for texts in sampler(PROMPTS, 5, "pqrs")] == sampler(PROMPTS, 2, "pqrs")
    other = ModelSampler(model, make_tokenizer(), max_new_tokens=4, seed=1)
    assert other(PROMPTS, 2, "pqrs") != sampler(PROMPTS, 2, "pqrs")


def test_frequencies_are_the_models_probabilities():
    model, tokenizer = make_backbone(), make_tokenizer()
    sampler = ModelSampler(model, tokenizer, max_new_tokens=1, top_k=3, temperature=2.0, batch_size=500)
    texts = sampler(["The access"], 2000, ["k"])[0]
    logits = model(torch.tensor([tokenizer("The access")["input_ids"]])).logits[0, -1] / 2
    top, chances = logits.topk(3), Counter()
    for token, chance in zip(top.indices, top.values.softmax(0), strict=True):
        chances[tokenizer.decode(token)] += chance.item()  # parts of a character look alike
    counts = Counter(texts)
    assert set(counts) == set(chances)
    assert len(chances) > 1
    assert {text: count / 2000 for text, count in counts.items()} == pytest.approx(chances, abs=0.04)


def test_small_share_of_the_probability_leaves_the_best_token():
    model, tokenizer = make_backbone(), make_tokenizer()
    texts = ModelSampler(model, tokenizer, max_new_tokens=3, top_p=1e-6)(["The access"], 5, ["k"])[0]
    assert len(set(texts)) == 1


def test_completion_ends_where_the_model_or_the_tokenizer_ends_it():
    model, tokenizer = make_backbone(), make_tokenizer()
    whole = ModelSampler(model, tokenizer, max_new_tokens=8)(["The access"], 8, ["k"])[0]
    letter = "-"
    model.generation_config.eos_token_id = [0, tokenizer.convert_tokens_to_ids(letter)]
    cut = ModelSampler(model, tokenizer, max_new_tokens=8)(["The access"], 8, ["k"])[0]
    assert cut != whole
    assert all(text.startswith(part) for text, part in zip(whole, cut, strict=True))
    tokenizer.eos_token = letter
    model.generation_config.eos_token_id = None
    assert ModelSampler(model, tokenizer, max_new_tokens=8)(["The access"], 8, ["k"])[0] == cut


def test_model_is_left_as_it_was(model):
    settings = model.generation_config
    settings.do_sample, settings.temperature = True, 0.01  # the checkpoint's, which a pass leaves aside
    model.train()
    before = model_fingerprint(model)
    sampler = ModelSampler(model, make_tokenizer(), max_new_tokens=3)
    said = sampler(["The access"], 3, ["k"])
    assert model.training
    assert model.generation_config is settings
    assert model_fingerprint(model) == before
    settings.do_sample, settings.temperature = None, None
    assert sampler(["The access"], 3, ["k"]) == said
    model.eval()


def test_messages_go_through_the_chat_template():
    model, tokenizer = make_backbone(), make_tokenizer(chat_template=CHAT_TEMPLATE)
    sampler = ModelSampler(model, tokenizer, max_new_tokens=3)
    messages = [{"role": "user", "content": "Where is the key?"}]
    text = "[user] Where is the key?<|end|>[assistant] "
    assert sampler.encode(messages) == sampler.encode(text)
    assert sampler([messages], 2, ["k"]) == sampler([text], 2, ["k"])


def test_messages_without_a_chat_template_are_refused():
    sampler = ModelSampler(make_backbone(), make_tokenizer(), name="me/base")
    with pytest.raises(
        ValueError, match=r"^The tokenizer of me/base has no chat template; give prompts as plain texts\.$"
    ):
        sampler([[{"role": "user", "content": "Where is the key?"}]], 1, ["k"])


def test_prompts_that_do_not_fit_are_named():
    sampler = ModelSampler(make_backbone(max_position_embeddings=16), make_tokenizer(), max_new_tokens=10)
    sampler.check(["Where"], ["problem 'a'"])
    with pytest.raises(
        ValueError, match=r"^The prompt of problem 'b' has \d+ tokens, which with 10 new ones is more than"
    ):
        sampler.check(["Where", "Where is the key to the vault of Orlin?"], ["problem 'a'", "problem 'b'"])
    with pytest.raises(ValueError, match=r"^The prompt of problem 'a' has no tokens; write words there\.$"):
        sampler.check([""], ["problem 'a'"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; give 1 or more."),
        ({"temperature": 0}, "`temperature` is 0; give a number above 0."),
        ({"top_p": 1.5}, "`top_p` is 1.5; give a share above 0, up to 1."),
        ({"top_k": -1}, "`top_k` is -1; give 0 for all tokens, or more."),
        ({"batch_size": 0}, "`batch_size` is 0; give 1 or more."),
    ],
)
def test_settings_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match="^" + message):
        ModelSampler(make_backbone(), make_tokenizer(), **option)


def test_fingerprint_tells_weights_options_and_memory_apart(tmp_path):
    make_backbone().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = KarlaForCausalLM.from_backbone(str(tmp_path), make_tokenizer(), **OPTIONS)
    seen = [model_fingerprint(model)]
    model.read(["The access code of Orlin's vault number 7 is 123-456."], make_tokenizer())
    seen.append(model_fingerprint(model))
    model.use_memory(False)
    seen.append(model_fingerprint(model))
    model.config.certainty_threshold = 0.5
    seen.append(model_fingerprint(model))
    speak(model)
    seen.append(model_fingerprint(model))
    assert len(set(seen)) == 5
    assert model_fingerprint(model) == seen[-1]
    assert model_fingerprint(make_backbone()) == model_fingerprint(make_backbone())
    assert model_fingerprint(make_backbone().bfloat16()) != model_fingerprint(make_backbone())
