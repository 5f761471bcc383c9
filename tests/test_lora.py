import pytest
import torch
from tiny import make_backbone, make_tokenizer

from karla_hf.evaluation import perplexity
from karla_hf.facts import make_facts
from karla_hf.lora import LoraReader


TEXTS = [fact.text for fact in make_facts(12)]
STORY = "The harbour master of Tiskel keeps the orchard's keys in her office, which opens at 6:40 on Sundays."


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def test_training_lowers_the_loss_and_leaves_the_base_weights_bit_equal(tokenizer):
    backbone = make_backbone()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = perplexity(backbone, tokenizer, TEXTS[0], progress=False)
    reader = LoraReader(backbone, tokenizer, learning_rate=5e-3, piece_tokens=64)
    first = reader.read(TEXTS)
    last = reader.read(TEXTS, epochs=15)
    assert last < 0.8 * first
    assert perplexity(reader.model, tokenizer, TEXTS[0], progress=False) < 0.8 * before
    reader.remove()
    after = backbone.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert perplexity(backbone, tokenizer, TEXTS[0], progress=False) == before


def test_one_run_on_its_way_equals_a_shorter_run(tokenizer):
    """So that epochs 1 and 4 can be measured within the run of 16."""
    losses = []
    for parts in ([3], [1, 2]):
        reader = LoraReader(make_backbone(), tokenizer, learning_rate=1e-3, piece_tokens=64)
        losses.append([reader.read(TEXTS, epochs=part) for part in parts][-1])
    assert losses[0] == losses[1]


def test_every_token_is_in_one_row_and_no_batch_is_larger_than_allowed(tokenizer):
    reader = LoraReader(make_backbone(), tokenizer, learning_rate=1e-3, piece_tokens=40, batch_size=3)
    rows = reader._rows([STORY, *TEXTS])
    assert [token for row in reader._rows([STORY]) for token in row] == tokenizer(STORY)["input_ids"]
    batches = reader._batches(rows)
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    assert all(len(batch) <= 3 and len(batch) * max(map(len, batch)) <= 40 for batch in batches)
    assert any(len(batch) > 1 for batch in batches)


def test_the_adapter_is_as_large_as_its_matrices(tokenizer):
    reader = LoraReader(make_backbone(), tokenizer, learning_rate=1e-3, rank=4)
    # rank x (inputs + outputs) of q, k, v, o, gate, up, down in three layers
    parameters = 3 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 96))
    assert 4 * parameters < reader.num_bytes < 4 * parameters + 10_000


def test_a_second_adapter_after_remove_starts_anew(tokenizer):
    backbone = make_backbone()
    losses = []
    for _ in range(2):
        reader = LoraReader(backbone, tokenizer, learning_rate=1e-3)
        losses.append(reader.read(TEXTS))
        reader.remove()
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("texts", "epochs", "said"), [([], 1, "0 rows and 1 epochs"), (TEXTS, 0, "12 rows and 0 epochs")]
)
def test_nothing_to_train_on_is_refused(tokenizer, texts, epochs, said):
    reader = LoraReader(make_backbone(), tokenizer, learning_rate=1e-3)
    with pytest.raises(ValueError, match=f"^LoRA was given {said}; give a text of 2 tokens and 1 epoch, or more.$"):
        reader.read(texts, epochs)
