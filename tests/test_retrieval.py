import importlib.util
import math

import pytest
import torch
from tiny import BagOfWords, make_backbone, make_tokenizer

from karla_hf.evaluation import exact_recall, perplexity
from karla_hf.facts import make_facts
from karla_hf.retrieval import ENCODER_PACKAGE, RetrievalReader, SentenceEncoder, split_passages


FACTS = make_facts(10)
TEXTS = [fact.text for fact in FACTS]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def reader(tokenizer):
    return RetrievalReader(make_backbone(), tokenizer, BagOfWords(), top_k=1)


def test_the_planted_passage_is_found_with_the_one_that_follows_it(reader):
    words = [f"word{i}" for i in range(64 * 4)]
    document = " ".join(words)
    reader.read([*TEXTS, document])
    assert reader.retrieve(FACTS[3].prompt) == [TEXTS[3]]
    assert [text.split()[0] for text in reader.retrieve(" ".join(words[70:90]))] == ["word64", "word128"]
    assert [text.split()[0] for text in reader.retrieve(" ".join(words[200:230]))] == ["word192"]


def test_the_nearest_passage_stands_last_and_none_stands_twice(reader):
    words = [f"word{i}" for i in range(64 * 3)]
    reader.read(" ".join(words))
    reader.top_k = 3
    found = [text.split()[0] for text in reader.retrieve(" ".join(words[70:90]))]
    assert sorted(found) == ["word0", "word128", "word64"]
    assert found[-2:] == ["word64", "word128"]


def test_generation_sees_the_passage_and_returns_only_prompt_and_answer(reader, tokenizer):
    bare = exact_recall(reader.backbone, tokenizer, FACTS, progress=False)
    assert exact_recall(reader, tokenizer, FACTS, progress=False) == bare
    reader.read(TEXTS)
    shown = []
    generate = reader.backbone.generate

    def spy(**arguments):
        shown.extend(
            tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(arguments["input_ids"], arguments["attention_mask"], strict=True)
        )
        return generate(**arguments)

    reader.backbone.generate = spy
    result = exact_recall(reader, tokenizer, FACTS, progress=False)
    assert sorted(shown) == sorted(f"{fact.text}\n{fact.prompt}" for fact in FACTS)
    assert result.generated != bare.generated


def test_the_backbones_own_settings_for_generation_are_those_of_the_reader(reader):
    settings = reader.backbone.generation_config
    assert reader.generation_config is settings
    reader.generation_config = None
    assert reader.backbone.generation_config is None


def test_perplexity_with_nothing_stored_is_that_of_evaluation(reader, tokenizer):
    text = " ".join(TEXTS)
    assert len(tokenizer(text)["input_ids"]) > 200
    expected = perplexity(reader.backbone, tokenizer, text, progress=False)
    assert reader.perplexity(text) == pytest.approx(expected, rel=1e-5)
    assert reader.perplexity(text, 100) == pytest.approx(perplexity(reader.backbone, tokenizer, text, 100, False))


def test_perplexity_of_a_window_is_given_the_passages_for_what_stands_before_it(reader, tokenizer):
    text = " ".join(TEXTS)
    reader.read(text)
    ids = tokenizer(text)["input_ids"][:150]
    assert len(ids) == 150
    found = reader.retrieve(tokenizer.decode(ids[64:128]))
    before = tokenizer("".join(f"{passage.rstrip()}\n" for passage in found))["input_ids"]
    assert len(before) > 64
    with torch.no_grad():
        first = reader.backbone(torch.tensor([ids[:128]]), labels=torch.tensor([ids[:128]])).loss.item() * 127
        labels = torch.tensor([[-100] * (len(before) + 128) + ids[128:]])
        second = reader.backbone(torch.tensor([before + ids]), labels=labels).loss.item() * 22
    assert reader.perplexity(text, 150) == pytest.approx(math.exp((first + second) / 149), rel=1e-5)


def test_passages_joined_are_the_text():
    text = "  a b\n\nc   d e\n"
    assert "".join(split_passages(text, words=2)) == text
    assert [len(part.split()) for part in split_passages(text, words=2)] == [2, 2, 1]


def test_bytes_are_those_of_passages_and_rows(reader):
    reader.read(["abc", "äöü"])
    assert reader.num_bytes == 3 + 6 + 2 * 256 * 4


def test_a_text_of_one_token_is_refused(reader):
    with pytest.raises(ValueError, match=r"^The text 'x' has 1 tokens; perplexity needs 2 or more.$"):
        reader.perplexity("x")


@pytest.mark.skipif(importlib.util.find_spec(ENCODER_PACKAGE) is None, reason=f"{ENCODER_PACKAGE} is not installed")
def test_minilm_ranks_a_paraphrase_first_whatever_stands_in_its_batch():
    encoder = SentenceEncoder()
    texts = ["A ferry crosses the river.", "The boat goes over the water to the other bank.", "Bonds fell on Tuesday."]
    rows = encoder.encode(texts)
    assert rows.norm(dim=-1) == pytest.approx(torch.ones(3))
    assert rows[0] @ rows[1] > 0.3 > rows[0] @ rows[2]
    torch.testing.assert_close(encoder.encode(texts[2:]), rows[2:], rtol=1e-4, atol=1e-5)
