"""Weights with the public implementation's names make the published predictions."""

import pytest
import torch
from published import CASES, SIZES, published_state

from karla_hf.modeling.published_ctm import from_published
from karla_hf.modeling.reference_published_ctm import naive_ctm, naive_features


TOKENS = {"vocab_size": 2, "feature_size": 14}


@pytest.mark.parametrize("case", CASES)
def test_imported_weights_predict_what_the_published_equations_do(case):
    options = {**SIZES, **CASES[case]}
    state = published_state(**options)
    model = from_published(
        state, num_ticks=10, num_heads=options["num_attention_heads"], num_classes=options["num_classes"]
    )
    features = torch.randn(2, 6, options["feature_size"], dtype=torch.float64)
    expected = naive_ctm(state, features, num_ticks=10, num_heads=options["num_attention_heads"],
                         num_classes=options["num_classes"])  # fmt: skip
    out = model(features, output_attentions=True)
    found = (out.predictions, out.certainties, out.synchronisation, out.attentions)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # decays of 0: r is short of 1 by 1.5e-8
    for name in ("pair_selection", "synapse_depth", "neuron_hidden_size", "history_length"):
        assert getattr(model.config, name) == {"synapse_depth": 1, **options}[name]


def test_a_decay_of_zero_is_exact_in_single_precision():
    state = {
        name: value.float() if value.is_floating_point() else value for name, value in published_state(**SIZES).items()
    }
    state["decay_params_action"].zero_()
    state["decay_params_out"].zero_()
    model = from_published(state, num_ticks=4, num_heads=2, num_classes=2)
    keep, _ = model.sync.schedule(4)
    assert torch.isfinite(model.sync.decay).all()
    assert torch.equal(keep, torch.ones_like(keep))


def test_other_decays_are_exact():
    state = published_state(**SIZES)
    for half in ("action", "out"):
        state[f"decay_params_{half}"] = torch.rand_like(state[f"decay_params_{half}"]) + 0.01
    features = torch.randn(2, 6, SIZES["feature_size"], dtype=torch.float64)
    expected = naive_ctm(state, features, num_ticks=10, num_heads=2, num_classes=2)[0]
    model = from_published(state, num_ticks=10, num_heads=2, num_classes=2)
    torch.testing.assert_close(model(features).predictions, expected, rtol=0, atol=1e-12)


def test_parity_front_end_is_taken_over():
    state, ids = published_state(**SIZES | TOKENS), torch.randint(2, (3, 6))
    model = from_published(state, num_ticks=5, num_heads=2, num_classes=2)
    expected = naive_ctm(state, naive_features(state, ids), num_ticks=5, num_heads=2, num_classes=2)[0]
    torch.testing.assert_close(model(input_ids=ids).predictions, expected, rtol=0, atol=1e-6)


def test_another_backbone_is_left_to_the_caller():
    state = published_state(**SIZES) | {"backbone.conv1.weight": torch.zeros(1), "initial_rgb.weight": torch.zeros(1)}
    assert from_published(state, num_ticks=2, num_heads=2).tokens is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"trace_processor.0.0.layernorm.weight": torch.ones(3)},
            r"holds 'trace_processor\.0\.0\.layernorm\.weight', which",
        ),
        (
            {"decay_params_action": None},
            r"The state dict lacks decay_params_action; give that of a ContinuousThoughtMachine",
        ),
        ({"backbone.embedding.weight": torch.zeros(2, 5)}, r"lacks positional_embedding\.projection\.weight"),
    ],
)
def test_wrong_state_dicts_are_named(change, message):
    state = {name: value for name, value in {**published_state(**SIZES), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_published(state, num_ticks=2, num_heads=2)
