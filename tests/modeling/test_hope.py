"""HopeModel: causality, the slow memory, what trains, and how trainers see it."""

import pytest
import torch
from small_hope import CHUNK, ENCODER, SIZES, in_pieces, make_hope, tokens

from karla_hf import HopeConfig, HopeForCausalLM
from karla_hf.modeling import layer_hope
from karla_hf.modeling.delta_hope import run_fast_weights
from karla_hf.modeling.encoder_hope import SlowMemory


CONTEXTS = ("none", "lagged", "causal")
GRANITE = {
    "model_type": "modernbert",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def leaks(run, ids) -> list[int]:
    """Positions whose change alters an output before them at all."""
    before = run(ids)
    found = []
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] - 3 + 1) % 47 + 3
        difference = (run(changed) - before).abs().amax(dim=(0, 2))
        assert difference[t] > 0, "the changed token itself must be seen"
        if t and difference[:t].max() > 0:
            found.append(t)
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_no_token_changes_what_is_before_it(context, training):
    model, ids = (
        make_hope(torch.float32, num_hidden_layers=2, encoder_context=context).train(training),
        tokens(1, 3 * CHUNK + 3),
    )
    with torch.no_grad():
        assert leaks(lambda x: model(x, use_cache=False).logits, ids) == []


@pytest.mark.parametrize("context", CONTEXTS)
def test_no_token_changes_what_is_before_it_in_cached_pieces(context):
    model, ids = make_hope(torch.float32, num_hidden_layers=2, encoder_context=context), tokens(1, 3 * CHUNK + 3)
    with torch.no_grad():
        assert leaks(lambda x: in_pieces(model, x, [5, 6, 17])[0], ids) == []


def test_an_encoder_over_the_whole_sequence_is_caught(monkeypatch):
    """The naive way leaks, and the same check sees it: the states of all tokens, read in both directions, are context."""

    def leaking(slow, input_ids, frame, cache):
        states = slow.encode(input_ids)
        told = torch.stack([states, states], dim=-2)
        return slow.norm(slow.table(input_ids)) + slow.gate * slow.context(slow.context_norm(told).flatten(-2))

    model, ids = make_hope(torch.float32), tokens(1, 3 * CHUNK + 3)
    monkeypatch.setattr(SlowMemory, "forward", leaking)
    with torch.no_grad():
        assert leaks(lambda x: model(x, use_cache=False).logits, ids) == list(range(1, ids.shape[1]))


def test_lagged_context_is_that_of_the_chunk_before():
    model, ids = make_hope(), tokens(1, 3 * CHUNK)
    slow = model.model.slow
    seen = []
    slow.context.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(ids, use_cache=False)
    (told,) = seen
    width = model.config.hidden_size
    assert not told[:, :CHUNK].any()
    for chunk in (1, 2):
        before = ids[:, (chunk - 1) * CHUNK : chunk * CHUNK]
        framed = torch.cat([torch.full((1, 1), 1), before], dim=1)  # the start token of the configuration
        states = slow.encoder(framed).last_hidden_state[:, 1:]
        here = told[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        torch.testing.assert_close(here[..., :width], slow.context_norm(states))
        torch.testing.assert_close(
            here[..., width:], slow.context_norm(states.mean(1, keepdim=True)).expand_as(states)
        )


def test_a_fresh_model_sees_only_its_table():
    torch.manual_seed(0)
    fresh, ids = HopeForCausalLM(HopeConfig(**SIZES)).eval(), tokens()
    assert not fresh.model.slow.gate.any()
    logits = fresh(ids).logits
    fresh.config.encoder_context = "none"
    assert torch.equal(fresh(ids).logits, logits)


def test_gate_of_the_context_learns_from_the_start():
    model, ids = HopeForCausalLM(HopeConfig(**SIZES)).train(), tokens()
    model(ids, labels=ids).loss.backward()
    assert model.model.slow.gate.grad.abs().max() > 0


def test_encoder_stays_frozen_and_in_eval_mode():
    model, ids = make_hope(torch.float32).train(), tokens()
    encoder = model.model.slow.encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    own = model.model.out.weight.clone()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not torch.equal(model.model.out.weight, own)
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_trainers_get_the_logits_from_the_hidden_state():
    model, ids = make_hope(), tokens()
    hidden = model.base_model(ids).last_hidden_state
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    assert head.bias is None
    assert torch.equal(hidden @ head.weight.T, model(ids).logits)


def test_loss_is_that_of_shifted_labels():
    model, ids = make_hope(), tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(ids, labels=labels, logits_to_keep=1)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(out.loss, expected, check_dtype=False, rtol=1e-5, atol=0)
    half = model(ids, labels=labels, num_items_in_batch=2 * (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(half.loss, out.loss / 2)


def test_logits_to_keep():
    model, ids = make_hope(), tokens()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 5])).logits, whole[:, [3, 5]])


def test_gradient_checkpointing_changes_no_gradient():
    ids, found = tokens(), []
    for checkpointing in (False, True):
        model = make_hope().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padding_changes_nothing(where):
    model, ids = make_hope(), tokens(3, 30)
    mask = torch.ones(3, 45, dtype=torch.int64)
    for row, count in enumerate((15, 9 + 6, 3 + 12)):
        places = {"left": range(count), "right": range(30, 45), "middle": range(4 + row, 4 + row + 15)}[where]
        mask[row, list(places)] = 0
    padded = torch.full((3, 45), 4)
    padded[mask.bool()] = ids.flatten()
    logits = model(padded, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits, model(ids).logits.flatten(0, 1), rtol=0, atol=1e-12)


def test_levels_come_as_parameter_groups():
    model = make_hope(torch.float32)
    groups = model.level_parameter_groups()
    assert [(group["name"], group["update_period"]) for group in groups] == [
        ("rest", 1),
        ("level 1", 1),
        ("level 2", 4),
    ]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(groups[2]["params"]) == 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("conv_size", [1, 4])
def test_fresh_keys_are_the_queries_of_the_token_before(conv_size, monkeypatch):
    model, ids, seen = make_hope(num_hidden_layers=1, conv_size=conv_size), tokens(), []

    def watched(streams, *rest):
        seen.append(streams)
        return run_fast_weights(streams, *rest)

    monkeypatch.setattr(layer_hope, "run_fast_weights", watched)
    model(ids, use_cache=False)
    query, key, _, _ = seen[0]
    late = conv_size > 1  # a convolution of one token has no token before
    torch.testing.assert_close(key[:, late:], query[:, : query.shape[1] - late])


def test_trained_keys_are_not_started_anew_by_loading(tmp_path):
    model, ids = make_hope(torch.float32), tokens()
    memory = model.model.layers[0].memory
    torch.nn.init.normal_(memory.streams.weight, std=0.3)
    torch.nn.init.normal_(memory.conv)
    model.save_pretrained(tmp_path)
    assert torch.equal(HopeForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_granite_shaped_encoder():
    """The default model has about 100 million parameters, and ModernBERT takes both kinds of context."""
    with torch.device("meta"):
        default = HopeForCausalLM(HopeConfig())
    assert type(default.model.slow.encoder).__name__ == "ModernBertModel"
    assert sum(p.numel() for p in default.model.slow.encoder.parameters()) == pytest.approx(47.66e6, rel=1e-3)
    assert 95e6 < default.num_parameters() < 110e6
    ids = torch.randint(0, 499, (1, 70))
    for context in ("lagged", "causal"):
        encoder = {**GRANITE, "vocab_size": 500, "pad_token_id": 0}  # of the shape, but for the size of the table
        config = HopeConfig(encoder_config=encoder, num_hidden_layers=1, encoder_context=context, eos_token_id=7)
        model = HopeForCausalLM(config).eval()
        torch.nn.init.normal_(model.model.slow.gate)
        with torch.no_grad():
            whole, changed = model(ids).logits, ids.clone()
            changed[0, 66] += 1
            assert torch.equal(model(changed).logits[:, :66], whole[:, :66])
            pieces, _ = in_pieces(model, ids, [30, 64, 65])
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("self_referential", [True, False])
def test_half_precision_runs_and_stays_close(self_referential):
    model, ids = make_hope(torch.float32, self_referential=self_referential, initializer_range=0.05), tokens()
    exact = model(ids).logits
    half = model.to(torch.bfloat16)
    out = half(ids)
    assert out.past_key_values.layers[0].fast.running.dtype == torch.float32
    assert (out.logits - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 5}, "`hidden_size` is 24; give a multiple of `num_attention_heads`"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0; give 1 or more"),
        ({"snapshot_periods": [8, 12]}, "`snapshot_periods` is .* growing multiples of `chunk_size`"),
        ({"snapshot_periods": [8, 16, 24]}, "`snapshot_periods` has 3 entries"),
        ({"level_sizes": [8]}, "give one size and one period per level"),
        ({"level_periods": [2, 4]}, "`level_periods` is .* give 1 first"),
        ({"encoder_context": "future"}, "`encoder_context` is 'future'"),
        ({"hidden_size": 32}, "the encoder's is 24"),
    ],
)
def test_wrong_configuration_is_named(options, message):
    with pytest.raises(Exception, match=message):
        HopeConfig(**{**SIZES, "encoder_config": ENCODER, **options})


def test_wrong_inputs_are_named():
    model, ids = make_hope(torch.float32), tokens()
    with pytest.raises(ValueError, match="input_ids is missing"):
        model(inputs_embeds=torch.zeros(1, 2, 24))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        model(ids, attention_mask=torch.ones(2, 3))
    for setter in (model.set_input_embeddings, model.model.set_input_embeddings, model.set_output_embeddings):
        with pytest.raises(NotImplementedError, match="The encoder is frozen"):
            setter(None)
