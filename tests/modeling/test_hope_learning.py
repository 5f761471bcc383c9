"""learn(): what it changes, when, what it leaves alone, and how it is kept."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_hope import CHUNK, letters_tokenizer, make_hope, tokens

from karla_hf import HopeForCausalLM
from karla_hf.modeling.cms_hope import named_levels
from karla_hf.modeling.learning_hope import LEARNING_FILE


TEXTS = ["the quick brown fox jumps over the lazy dog; " * 2, "pack my box with five dozen liquor jugs. " * 2]
QUIET = {"progress": False}


@pytest.fixture
def tokenizer():
    return letters_tokenizer()


def deltas(model, number=None) -> list[torch.Tensor]:
    """Copies of all deltas, or of those of one level of every block."""
    levels = [level for name, level in named_levels(model) if number is None or name.endswith(f".{number}")]
    return [delta.clone() for level in levels for delta in level.deltas]


def same(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def test_learning_lowers_the_loss_and_leaves_weights_alone(tokenizer):
    model = make_hope(torch.float32)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = model.learn(TEXTS, tokenizer, passes=4, **QUIET)
    assert all(after < before - 0.1 for before, after in zip(report.losses_before, report.losses_after, strict=True))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(d.requires_grad for _, level in named_levels(model) for d in level.deltas)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    chunks = 4 * sum(-(-(length - 1) // CHUNK) for length in lengths)
    assert report.updates == {"level 1": chunks, "level 2": chunks // 4}
    assert (report.texts, report.tokens, model.learning_step) == (2, 4 * sum(lengths), chunks)
    assert not model.training
    assert model.train().learn(TEXTS[0], tokenizer, **QUIET).texts == 1
    assert model.training


def test_reported_losses_are_those_of_one_forward_pass(tokenizer):
    model = make_hope()
    report = model.learn(TEXTS[0], tokenizer, **QUIET)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert model(ids, labels=ids).loss.item() == pytest.approx(report.losses_after[0], rel=1e-5)
    model.reset_learning()
    assert model(ids, labels=ids).loss.item() == pytest.approx(report.losses_before[0], rel=1e-5)


def test_one_step_is_the_bounded_gradient_of_the_chunk(tokenizer):
    model, text = make_hope(), "abcdefgh."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.shape[1] == CHUNK + 1
    model(ids, labels=ids).loss.backward()
    expected = [w.grad for _, level in named_levels(model) for w in level.matrices]
    fast = [level for name, level in named_levels(model) if name.endswith(".0")]
    gradients = [w.grad for level in fast for w in level.matrices]
    norm, most = (
        torch.stack([t.norm() for t in ts]).norm() for ts in (gradients, [w for lv in fast for w in lv.matrices])
    )
    model.zero_grad()
    model.learn(text, tokenizer, rate=0.5, limit=(0.5 * norm / most / 3).item(), **QUIET)
    for delta, gradient in zip(deltas(model, 0), gradients, strict=True):
        torch.testing.assert_close(delta, (-0.5 * gradient / 3).float(), rtol=1e-4, atol=1e-7)
    waiting = [w for name, level in named_levels(model) if name.endswith(".1") for w in level.waiting]
    slow = [g for g, (i, _) in zip(expected, enumerate(expected), strict=True) if i % 4 >= 2]
    for total, gradient in zip(waiting, slow, strict=True):
        torch.testing.assert_close(total, gradient.float(), rtol=1e-4, atol=1e-7)
    assert not any(delta.any() for delta in deltas(model, 1))


def test_levels_change_only_when_due_over_split_calls(tokenizer):
    model, before = make_hope(torch.float32), None
    for step in range(1, 10):
        model.learn("abcdefgh.", tokenizer, **QUIET)  # one chunk
        now = [deltas(model, number) for number in (0, 1)]
        if before is not None:
            assert [not same(a, b) for a, b in zip(now, before, strict=True)] == [True, step % 4 == 0]
        before = now


def test_two_calls_do_what_one_does(tokenizer):
    one, two = make_hope(torch.float32), make_hope(torch.float32)
    one.learn(TEXTS, tokenizer, **QUIET)
    for text in TEXTS:
        two.learn(text, tokenizer, **QUIET)
    assert same(deltas(one), deltas(two))


def test_learning_is_saved_apart_and_goes_on(tokenizer, tmp_path):
    model = make_hope(torch.float32)
    model.save_pretrained(tmp_path / "before")
    model.learn("abcdefgh. klm", tokenizer, **QUIET)
    model.save_pretrained(tmp_path / "after")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("before", "after")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "before" / LEARNING_FILE).exists()
    loaded = HopeForCausalLM.from_pretrained(tmp_path / "after")
    assert same(deltas(loaded), deltas(model))
    assert torch.equal(logits(loaded), logits(model))
    for learner in (model, loaded):
        learner.learn(TEXTS, tokenizer, **QUIET)
    assert same(deltas(loaded), deltas(model))
    loaded.reset_learning()
    loaded.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after" / LEARNING_FILE).exists()


def test_reset_and_merge(tokenizer):
    model = make_hope(torch.float32)
    fresh = logits(model)
    assert not model.has_learned
    model.learn(TEXTS, tokenizer, **QUIET)
    learned = logits(model)
    assert model.has_learned
    assert not torch.equal(learned, fresh)
    model.reset_learning()
    assert torch.equal(logits(model), fresh)
    model.learn(TEXTS, tokenizer, **QUIET)
    model.merge_learning()
    assert torch.equal(logits(model), learned)
    assert (model.has_learned, model.learning_step) == (False, 0)
    assert not any(level.learned() for _, level in named_levels(model))


def test_learning_survives_a_change_of_precision(tokenizer):
    model = make_hope(torch.float32)
    model.learn(TEXTS, tokenizer, **QUIET)
    kept = deltas(model)
    model.to(torch.bfloat16)
    assert same(deltas(model), kept)
    assert logits(model).dtype == torch.bfloat16


def test_damaged_or_foreign_learning_is_named(tokenizer, tmp_path):
    model = make_hope(torch.float32)
    model.learn(TEXTS[0], tokenizer, **QUIET)
    model.save_pretrained(tmp_path)
    path = tmp_path / LEARNING_FILE
    tensors = load_file(path)
    save_file({name: t[:1] for name, t in tensors.items()}, path, {"step": "3"})
    with pytest.raises(ValueError, match="is of a model with other levels"):
        HopeForCausalLM.from_pretrained(tmp_path)
    save_file(dict(list(tensors.items())[1:]), path, {"step": "3"})
    with pytest.raises(ValueError, match="is of a model with other levels"):
        HopeForCausalLM.from_pretrained(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(OSError, match=f"{LEARNING_FILE} cannot be read"):
        HopeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "There is no text to learn"),
        (["good text", "a"], {}, "The text 'a' has 1 tokens; learning needs 2 or more"),
        ("good text", {"passes": 0}, "`passes` is 0; give more than 0"),
        ("good text", {"rate": -1.0}, "`rate` is -1.0; give more than 0"),
        ("good text", {"limit": 0.0}, "`limit` is 0.0; give more than 0"),
    ],
)
def test_what_cannot_be_learned_is_named(tokenizer, texts, options, message):
    model = make_hope(torch.float32)
    with pytest.raises(ValueError, match=message):
        model.learn(texts, tokenizer, **options)
    assert not model.has_learned
