"""The standalone Continuous Thought Machine against the published equations, written out one sample and tick at a time."""

import subprocess
import sys

import pytest
import torch
from published import CASES, SIZES, published_view
from torch import nn
from transformers import AutoConfig, AutoModel

from karla_hf.modeling.configuration_ctm import CtmConfig
from karla_hf.modeling.ctm_karla import PairSynchronisation
from karla_hf.modeling.modeling_ctm import CtmModel, ctm_certainties, ctm_loss
from karla_hf.modeling.reference_published_ctm import naive_ctm, naive_ctm_loss, naive_features


def make_model(**options):
    """A float64 model whose every parameter is random."""
    model = CtmModel(CtmConfig(**{**SIZES, **options})).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.4)
        if ("norm" in name and name.endswith("weight")) or "temperature" in name:
            parameter.data.abs_().add_(0.5)
    return model


def naive(model, features, num_ticks):
    config = model.config
    sizes = {"num_heads": config.num_attention_heads, "num_classes": config.num_classes}
    return naive_ctm(published_view(model), features, num_ticks=num_ticks, **sizes)


def fast(model, features, num_ticks):
    out = model(features, num_ticks=num_ticks, output_attentions=True)
    return out.predictions, out.certainties, out.synchronisation, out.attentions


def assert_same_gradients(model, features, num_ticks, tolerance, inputs=()):
    variables = [*model.parameters(), *inputs]
    found = []
    for compute in (fast, naive):
        predictions, certainties, synchronisation, _ = compute(model, features, num_ticks)
        loss = predictions.sin().sum() + certainties[:, 1].square().sum() + synchronisation.sin().sum()
        found.append(torch.autograd.grad(loss, variables, allow_unused=True))
    for parameter, ours, theirs in zip(variables, *found, strict=True):
        if theirs is None:  # the start history that has been forgotten
            assert ours is None
        else:
            assert (ours - theirs).norm() <= tolerance * theirs.norm().clamp(min=1e-3), tuple(parameter.shape)


@pytest.mark.parametrize("num_ticks", [1, 10])  # 2 heads: 1 tick projects queries, 10 ticks project features
@pytest.mark.parametrize("case", CASES)
def test_ticks_and_gradients_equal_naive(case, num_ticks):
    model, features = make_model(**CASES[case]), torch.randn(2, 5, SIZES["feature_size"], dtype=torch.float64)
    features.requires_grad_()
    for ours, theirs in zip(fast(model, features, num_ticks), naive(model, features, num_ticks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert_same_gradients(model, features, num_ticks, 1e-9, [features])


@pytest.mark.parametrize("case", ["depth 1, random", "U-Net"])
@pytest.mark.parametrize("size", [14, 60])  # 25 ticks of 2 heads project features, or queries
def test_many_ticks_equal_naive(case, size):
    model = make_model(**{**CASES[case], "hidden_size": size})
    features = torch.randn(2, 3, SIZES["feature_size"], dtype=torch.float64)
    for ours, theirs in zip(fast(model, features, 25), naive(model, features, 25), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert_same_gradients(model, features, 25, 1e-9)


@pytest.mark.parametrize("num_ticks", [1, 10, 25])
@pytest.mark.parametrize("case", ["depth 1, random", "random-pairing", "first-last", "U-Net"])
def test_single_precision_equals_naive(case, num_ticks):
    """With the published initialisation, in float32."""
    model = CtmModel(CtmConfig(**{**SIZES, **CASES[case]}))
    features = torch.randn(2, 7, SIZES["feature_size"])
    for ours, theirs in zip(fast(model, features, num_ticks), naive(model, features, num_ticks), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert_same_gradients(model, features, num_ticks, 1e-5)


def test_gradients_of_a_graph_that_was_passed_in_part_before():
    """Gradients of features are collected over a whole backward pass; a pass that stops before leaves nothing behind."""
    model, features = make_model(hidden_size=60), torch.randn(2, 4, SIZES["feature_size"], dtype=torch.float64)
    features.requires_grad_()
    predictions = model(features).predictions
    expected = torch.autograd.grad(predictions.sin().sum(), features, retain_graph=True)[0]
    torch.autograd.grad(predictions.sum(), model.start_state, retain_graph=True)
    assert torch.equal(torch.autograd.grad(predictions.sin().sum(), features, retain_graph=True)[0], expected)
    first = torch.autograd.grad(predictions[..., 0].sin().sum(), features)[0]
    alone = torch.autograd.grad(model(features, num_ticks=1).predictions.sin().sum(), features)[0]
    torch.testing.assert_close(first, alone, rtol=1e-9, atol=1e-12)


def test_tokens_equal_naive():
    model, ids = make_model(vocab_size=3), torch.tensor([[0, 2, 1, 1], [1, 0, 0, 2]])
    weights = published_view(model)
    expected = naive_ctm(weights, naive_features(weights, ids), num_ticks=4, num_heads=2, num_classes=2)[0]
    torch.testing.assert_close(model(input_ids=ids, num_ticks=4).predictions, expected, rtol=0, atol=1e-12)
    alone = naive_features(weights, ids[:, :1])
    torch.testing.assert_close(model.tokens(ids[:, :1]), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("answers", [1, 4])
def test_loss_equals_naive(answers):
    predictions = torch.randn(5, 3 * answers, 7, dtype=torch.float64)
    certainties, labels = ctm_certainties(predictions, 3), torch.randint(3, (5, answers))
    torch.testing.assert_close(
        ctm_loss(predictions, certainties, labels, 3), naive_ctm_loss(predictions, certainties, labels, 3)
    )


def test_normalisation_in_closed_form_equals_recurrence():
    sync = PairSynchronisation(torch.zeros(2, 5, dtype=torch.int64)).double()
    nn.init.normal_(sync.decay, std=3.0)
    keep, factors = sync.schedule(30)
    for t, factor in enumerate(factors):
        closed = (1 - keep ** (t + 1)) / (1 - keep)
        torch.testing.assert_close(factor, closed.rsqrt(), rtol=1e-12, atol=0)


def test_query_learns_from_two_features_on_and_only_then():
    model = make_model()
    for length, learns in ((1, False), (2, True)):
        model.zero_grad()
        features = torch.randn(2, length, SIZES["feature_size"], dtype=torch.float64)
        model(features, labels=torch.randint(2, (2, 3))).loss.backward()
        assert bool(model.query.weight.grad.abs().max() > 1e-9) == learns
        assert bool(model.sync.decay.grad[: model.num_asking].abs().max() > 1e-9) == learns


@pytest.mark.parametrize("size", [14, 60])
def test_checkpointing_keeps_less_and_changes_nothing(size):
    model, features = (
        make_model(hidden_size=size).train(),
        torch.randn(3, 6, SIZES["feature_size"], dtype=torch.float64),
    )
    results = []
    for model.gradient_checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            loss = model(features, labels=torch.zeros(3, 3, dtype=torch.int64)).loss
        results.append((sum(kept), torch.autograd.grad(loss, model.parameters(), allow_unused=True)))
    (plain, expected), (saved, found) = results
    assert saved < plain / 2
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_acts_in_training_only():
    model, features = make_model(dropout=0.5), torch.randn(2, 4, SIZES["feature_size"], dtype=torch.float64)
    assert torch.equal(model.eval()(features).predictions, model(features).predictions)
    model.train()
    assert not torch.equal(model(features).predictions, model(features).predictions)


def test_forward_changes_no_parameter():
    model, features = make_model(), torch.randn(2, 4, SIZES["feature_size"], dtype=torch.float64)
    nn.init.constant_(model.sync.decay, -60.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.isfinite(model(features).predictions).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pairs_come_from_the_seed_and_travel_with_the_weights(tmp_path):
    first, same, other = (CtmModel(CtmConfig(**SIZES, pair_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.sync.pairs, same.sync.pairs)
    assert not torch.equal(first.sync.pairs, other.sync.pairs)
    other.config.pair_seed = 5
    other.save_pretrained(tmp_path)
    loaded = CtmModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.sync.pairs, other.sync.pairs)
    features = torch.randn(2, 4, SIZES["feature_size"])
    assert torch.equal(loaded(features).predictions, other.eval()(features).predictions)


def test_saved_model_loads_without_this_package(tmp_path):
    model = CtmModel(CtmConfig(**SIZES))
    CtmConfig.register_for_auto_class()
    CtmModel.register_for_auto_class("AutoModel")
    model.save_pretrained(tmp_path)
    features = torch.arange(20.0).view(1, 4, 5).sin()
    code = f"""
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
print(model(torch.arange(20.0).view(1, 4, 5).sin()).predictions.double().sum().item())
assert not any(name.startswith("karla_hf") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model.eval()(features).predictions.double().sum().item(), abs=1e-5)


def test_auto_classes_know_the_model(tmp_path):
    CtmModel(CtmConfig(**SIZES)).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_neurons == SIZES["num_neurons"]
    assert isinstance(AutoModel.from_pretrained(tmp_path), CtmModel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 15}, r"`hidden_size` is 15; give a multiple of `num_attention_heads` \(2\)\.$"),
        ({"num_classes": 4}, r"`num_classes` is 4; give a divisor of `output_size` \(6\) of 2 or more\.$"),
        ({"num_ticks": 0}, r"`num_ticks` is 0; give 1 or more\.$"),
        ({"vocab_size": 0}, r"`vocab_size` is 0; give 1 or more\.$"),
        ({"dropout": 1.0}, r"`dropout` is 1\.0; give a rate from 0 to below 1\.$"),
        ({"pair_selection": "all"}, r"`pair_selection` is 'all'; give one of first-last, random, random-pairing\.$"),
        ({"pair_selection": "first-last", "num_neurons": 8}, r"`num_neurons` is 8, but first-last needs .* \(9\)"),
        (
            {"pair_selection": "random-pairing", "num_self_pairs": 5},
            r"`num_self_pairs` is 5, more than there are pairs",
        ),
    ],
)
def test_wrong_configuration_is_named(options, message):
    with pytest.raises(Exception, match=message):
        CtmConfig(**{**SIZES, **options})


def test_wrong_inputs_are_named():
    model, features = CtmModel(CtmConfig(**SIZES)), torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match=r"Of `features` and `input_ids` neither was given; give one of them\."):
        model()
    with pytest.raises(ValueError, match=r"Of `features` and `input_ids` both was given"):
        model(features, features)
    with pytest.raises(ValueError, match=r"`input_ids` were given to a model without `vocab_size`"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`num_ticks` is 0; give 1 or more\."):
        model(features, num_ticks=0)
