import math

import pytest
import torch
from tiny import make_backbone, make_tokenizer
from torch import nn

from karla_hf.evaluation import exact_recall, perplexity
from karla_hf.facts import make_facts
from karla_hf.knn import SHARES, TEMPERATURES, KnnHead, KnnReader


FACTS = make_facts(10)
TEXTS = [fact.text for fact in FACTS]
OTHER = "Nobody has read this sentence before."


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def reader(tokenizer):
    reader = KnnReader(make_backbone(), tokenizer)
    reader.head.temperature = 1e-3
    return reader


@torch.no_grad()
def logits_of(model, tokenizer, text):
    return model(tokenizer(text, return_tensors="pt")["input_ids"]).logits


def test_without_share_or_with_nothing_stored_it_is_the_backbone_bit_for_bit(reader, tokenizer):
    expected = logits_of(make_backbone(), tokenizer, TEXTS[0])
    assert torch.equal(logits_of(reader.model, tokenizer, TEXTS[0]), expected)
    reader.read(TEXTS)
    assert not torch.equal(logits_of(reader.model, tokenizer, TEXTS[0]), expected)
    reader.head.share = 0.0
    assert torch.equal(logits_of(reader.model, tokenizer, TEXTS[0]), expected)
    reader.head.share = 0.5
    reader.remove()
    assert torch.equal(logits_of(reader.model, tokenizer, TEXTS[0]), expected)


def test_what_was_read_is_recalled_and_other_text_pays_the_share(reader, tokenizer):
    bare = {text: perplexity(make_backbone(), tokenizer, text, progress=False) for text in (TEXTS[0], OTHER)}
    assert exact_recall(reader.model, tokenizer, FACTS, progress=False).exact == 0
    reader.read(TEXTS)
    reader.head.share = 0.75
    assert exact_recall(reader.model, tokenizer, FACTS, progress=False).exact == len(FACTS)
    assert perplexity(reader.model, tokenizer, TEXTS[0], progress=False) < 1.5 < bare[TEXTS[0]]
    assert perplexity(reader.model, tokenizer, OTHER, progress=False) <= 4.001 * bare[OTHER]


def test_the_mixture_equals_the_equation():
    torch.manual_seed(0)
    head = KnnHead(nn.Linear(4, 6, bias=False))
    head.share, head.temperature = 0.3, 2.0
    keys, values = torch.randn(7, 4), torch.tensor([0, 1, 1, 2, 5, 5, 5])
    head.add(keys, values)
    state = torch.randn(4)
    weights = torch.softmax(-(state - keys.half().float()).square().sum(-1) / 2.0, 0)
    expected = 0.7 * head.lm_head(state).softmax(0)
    for weight, value in zip(weights, values, strict=True):
        expected[value] += 0.3 * weight
    torch.testing.assert_close(head(state[None])[0].exp(), expected, rtol=1e-4, atol=1e-6)
    assert math.isclose(head(state[None])[0].exp().sum().item(), 1.0, rel_tol=1e-5)


def test_tuning_takes_a_large_share_where_all_was_read_and_a_small_one_where_nothing_was(reader):
    reader.read(TEXTS)
    facts = [(fact.prompt, fact.answer) for fact in FACTS]
    assert reader.tune(facts)["share"] == SHARES[-1]
    assert reader.tune([("", OTHER)])["share"] < 0.5
    assert reader.head.temperature in TEMPERATURES
    assert reader.head.radius == math.inf


def test_a_radius_leaves_text_alone_that_is_unlike_all_that_was_read(reader, tokenizer):
    bare = perplexity(reader.model, tokenizer, OTHER, progress=False)
    reader.read(TEXTS)
    facts = [(fact.prompt, fact.answer) for fact in FACTS]
    chosen = reader.tune([*facts, ("", OTHER)], radii=(0.01, math.inf))
    assert chosen == {"share": SHARES[-1], "temperature": reader.head.temperature, "radius": 0.01}
    assert perplexity(reader.model, tokenizer, OTHER, progress=False) == pytest.approx(bare, rel=1e-5)
    assert exact_recall(reader.model, tokenizer, FACTS, progress=False).exact == len(FACTS)


@torch.no_grad()
def test_the_loss_that_tuning_sees_is_that_of_the_head(reader, tokenizer):
    reader.read(TEXTS)
    reader.head.temperature = 10.0
    base, distances, right = reader._measure("", OTHER)
    mixed = 0.5 * base + 0.5 * (torch.softmax(-distances / 10.0, -1) * right).sum(-1)
    expected = math.exp(-mixed.log().mean())
    assert perplexity(reader.model, tokenizer, OTHER, progress=False) == pytest.approx(expected, rel=1e-4)


def test_bytes_are_those_of_half_precision_keys_and_32_bit_values(reader, tokenizer):
    reader.read(TEXTS[0])
    states = len(tokenizer(TEXTS[0])["input_ids"]) - 1
    assert reader.num_bytes == states * (64 * 2 + 4)


def test_a_text_without_a_next_token_is_refused(reader):
    with pytest.raises(ValueError, match=r"^The text 'x' has 1 tokens; kNN-LM needs 2 or more.$"):
        reader.read("x")
