"""Compute that adapts: who stops when, what then is not computed, and what trains it."""

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList

from karla_hf.modeling import losses_karla, thinking_karla
from karla_hf.modeling.certainty_karla import expected_ticks, halting_ticks
from karla_hf.modeling.losses_karla import tick_certainties
from karla_hf.modeling.reference_ctm import naive_expected_ticks


THRESHOLD, TICKS = 0.07, 5


@pytest.fixture
def double(make_karla, remember, random_ids):
    """A Karla in float64 whose positions stop at many different ticks; `ids` is [3, 20]."""
    model = make_karla(ctm_num_ticks=TICKS).double()
    for layer in model.model.ctm.zero_initialised:
        nn.init.normal_(layer.weight, std=0.2)
    model.ids = random_ids(3, 20)
    remember(model, model.ids[:, 12:])  # which then needs no thought
    return model


def offline(model, ids, threshold, **options):
    """Answers [B, T, D], ticks and certainties, chosen with the deltas of all ticks in hand."""
    out = model.model(ids, use_cache=False, all_ticks=True, **options)
    state = (out.last_hidden_state - out.tick_deltas[-1]).flatten(0, 1)
    deltas = out.tick_deltas.flatten(1, 2)
    sure = tick_certainties(state, deltas, *model.model.output_projection(), model.config.certainty_candidates)
    ticks = halting_ticks(sure, threshold)
    position = torch.arange(len(ticks))
    answers = state + torch.cat([torch.zeros_like(state)[None], deltas])[ticks, position]
    shape = ids.shape
    return answers.view(*shape, -1), ticks.view(shape), sure[ticks, position].view(shape)


def assert_same(out, expected, mask=None):
    answers, ticks, sure = expected
    mask = torch.ones_like(ticks, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.equal(out.ticks_used[mask], ticks[mask])
    torch.testing.assert_close(out.last_hidden_state[mask], answers[mask], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.certainty[mask], sure[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 5, 16, 64])
@pytest.mark.parametrize("threshold", [0.0, 0.03, THRESHOLD, 0.1, 1.0])
@torch.no_grad()
def test_positions_stop_as_with_all_ticks_in_hand(double, monkeypatch, threshold, size):
    expected = offline(double, double.ids, threshold)
    monkeypatch.setattr(thinking_karla, "CHUNK", {"cpu": size})
    assert_same(double.model(double.ids, certainty_threshold=threshold), expected)
    if threshold == THRESHOLD:
        assert len(expected[1].unique()) > 3, "the positions of this test stop at different ticks"


@pytest.mark.parametrize("padding", [3, 12])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_decoding_stops_as_with_all_ticks_in_hand(double, batch, padding):
    """Token by token with left padding: rows of the batch leave at different ticks."""
    ids, mask = double.ids[:batch].clone(), torch.ones(batch, 20, dtype=torch.int64)
    ids[0, :padding], mask[0, :padding] = 0, 0
    expected = offline(double, ids, THRESHOLD, attention_mask=mask)
    cache, outs = None, []
    for t in range(20):
        outs.append(double.model(ids[:, t : t + 1], mask[:, : t + 1], past_key_values=cache, use_cache=True,
                                 certainty_threshold=THRESHOLD))  # fmt: skip
        cache = outs[-1].past_key_values
    for name, value in zip(("last_hidden_state", "ticks_used", "certainty"), expected, strict=True):
        found = torch.cat([getattr(out, name) for out in outs], dim=1)
        torch.testing.assert_close(found[mask.bool()], value[mask.bool()], rtol=0, atol=1e-12)


@torch.no_grad()
def test_what_has_stopped_is_not_computed(double):
    """Linears see the positions that still think and no others."""
    rows: list[int] = []
    double.model.ctm.stream_in.register_forward_hook(lambda module, inputs, out: rows.append(len(inputs[0])))
    ticks = double.model(double.ids, certainty_threshold=THRESHOLD).ticks_used
    assert sum(rows) == ticks.sum() < ticks.numel() * TICKS
    rows.clear()
    double.model(double.ids, certainty_threshold=0.0)
    assert rows == []


@torch.no_grad()
def test_blocks_for_some_queries_only(double):
    from karla_hf.modeling.attention_karla import cut_blocks

    keys_values = torch.randn(2, 2, 4, 11, 3, 8, dtype=torch.float64)
    registers, positions = torch.randn(2, 4, 2, 8, dtype=torch.float64), torch.arange(11).expand(2, -1)
    queries = torch.randn(2, 11, 2, 4, 8, dtype=torch.float64)
    blocks = cut_blocks(keys_values, torch.ones(2, 11, dtype=torch.bool), registers, positions, 4)  # of 4, 4 and 3
    rows = torch.tensor([1, 2, 9, 11, 13, 14, 21])
    kept = blocks.keep(rows)
    whole = blocks.attend(queries).flatten(0, 1)
    torch.testing.assert_close(kept.attend(queries.flatten(0, 1)[rows][:, None])[:, 0], whole[rows])
    assert len(kept.keys) == 4, "of six blocks, four hold a query"
    assert kept.mask.shape[2] == 3
    again = kept.keep(torch.tensor([0, 4, 6]))
    asked = queries.flatten(0, 1)[rows[[0, 4, 6]]][:, None]
    torch.testing.assert_close(again.attend(asked)[:, 0], whole[rows[[0, 4, 6]]])
    assert (len(again.keys), again.mask.shape[2]) == (3, 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_the_tick_that_answers(double, monkeypatch, checkpointing):
    double.train()
    monkeypatch.setattr(thinking_karla, "TRAINED_TICKS", 16 * TICKS)
    direction = torch.randn(3, 20, 64, dtype=torch.float64)
    expected = offline(double, double.ids, THRESHOLD)
    weights = list(double.model.ctm.parameters())
    theirs = torch.autograd.grad((expected[0] * direction).sum(), weights)
    if checkpointing:
        double.activation_checkpointing_enable()
    out = double.model(double.ids, use_cache=False, certainty_threshold=THRESHOLD)
    assert_same(out, expected)
    ours = torch.autograd.grad((out.last_hidden_state * direction).sum(), weights)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


def test_log_probabilities_of_a_rollout_are_those_of_training(double):
    """As GRPO compares them: sampled with a cache, then in one forward pass with labels and gradients."""
    double.config.certainty_threshold = THRESHOLD
    torch.manual_seed(1)
    rollout = double.generate(double.ids[:, :9], do_sample=True, max_new_tokens=8, min_new_tokens=8, pad_token_id=0,
                              attention_mask=torch.ones(3, 9), output_logits=True, return_dict_in_generate=True)  # fmt: skip
    out = double.train()(rollout.sequences, labels=rollout.sequences)
    assert out.loss.requires_grad
    ours = torch.stack(rollout.logits, dim=1).double().log_softmax(-1)
    theirs = out.logits[:, 8:-1].log_softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # generate keeps float32
    assert torch.equal(rollout.ticks_used, out.ticks_used[:, 8:-1])
    assert len(rollout.ticks_used.unique()) > 2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_beams_stop_alike_with_and_without_a_cache(double, options):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(double.generate(double.ids[:, :9], attention_mask=torch.ones(3, 9), max_new_tokens=8,
                                     certainty_threshold=THRESHOLD, use_cache=use_cache, return_dict_in_generate=True,
                                     output_scores=True, **options))  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(found[0].ticks_used, found[1].ticks_used)
    whole = double(found[0].sequences, use_cache=False, certainty_threshold=THRESHOLD).ticks_used
    ended = found[0].beam_indices[:, : found[0].ticks_used.shape[1]] < 0
    expected = whole[:, 8:-1][:, : ended.shape[1]].masked_fill(ended, 0)
    assert torch.equal(found[0].ticks_used, expected)


@torch.no_grad()
def test_output_layer_runs_once_where_nothing_is_thought(double):
    calls = []
    double.lm_head.register_forward_hook(lambda *_: calls.append(1))
    cache = double(double.ids[:, :9], use_cache=True, certainty_threshold=0.0, logits_to_keep=1).past_key_values
    out = double(double.ids[:, 9:10], past_key_values=cache, certainty_threshold=0.0)
    assert calls == []
    assert out.logits.shape == (3, 1, 300)
    expected = double.lm_head(double.model(double.ids[:, :10], certainty_threshold=0.0).last_hidden_state[:, -1:])
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-12)


def losses_of_all_ticks(model, ids):
    """Cross-entropies [S, B, T - 1] over the whole vocabulary."""
    out = model.model(ids, use_cache=False, all_ticks=True)
    logits = model.lm_head(out.last_hidden_state - out.tick_deltas[-1] + out.tick_deltas)[:, :, :-1]
    following = ids[:, 1:].expand(len(logits), -1, -1)
    return nn.functional.cross_entropy(logits.flatten(0, 2), following.flatten(), reduction="none").view(
        following.shape
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mean_loss_and_its_gradient(double, monkeypatch, checkpointing):
    double.config.tick_loss = "mean"
    double.train()
    weights = list(double.model.ctm.parameters())
    expected = losses_of_all_ticks(double, double.ids).mean()
    theirs = torch.autograd.grad(expected, weights)
    monkeypatch.setattr(losses_karla, "CHUNK", 7)
    monkeypatch.setattr(thinking_karla, "TRAINED_TICKS", 16 * TICKS)
    if checkpointing:
        double.activation_checkpointing_enable()
    out = double(double.ids, labels=double.ids)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    for mine, other in zip(torch.autograd.grad(out.loss, weights), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)
    count = torch.tensor(7)
    total = double(double.ids, labels=double.ids, num_items_in_batch=count).loss
    torch.testing.assert_close(total, expected * 57 / 7)
    evaluated = double.eval()(double.ids, labels=double.ids)
    torch.testing.assert_close(evaluated.loss.double(), losses_of_all_ticks(double, double.ids)[-1].mean())


def test_mean_loss_of_a_soft_capped_backbone_counts_the_cap():
    state, weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.randn(20, 6, dtype=torch.float64)
    bias, labels = torch.randn(20, dtype=torch.float64), torch.randint(20, (9,))
    ours = losses_karla.frozen_cross_entropy(state, labels, weight, bias, cap=2.0)
    logits = 2.0 * torch.tanh(nn.functional.linear(state, weight, bias) / 2.0)
    theirs = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours, theirs)
    direction = torch.rand(9, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, state, direction)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_expected_ticks_equal_naive_and_those_of_the_rule_where_it_is_hard():
    sure = torch.rand(TICKS + 1, 50, dtype=torch.float64)
    expected = [naive_expected_ticks(column, THRESHOLD, 0.1) for column in sure.t().tolist()]
    torch.testing.assert_close(expected_ticks(sure, THRESHOLD), torch.tensor(expected, dtype=torch.float64))
    hard = expected_ticks(sure, THRESHOLD, width=1e-6)
    torch.testing.assert_close(hard, halting_ticks(sure, THRESHOLD).double(), rtol=0, atol=0.01)


@pytest.mark.parametrize("tick_loss", ["last", "mean", "two_tick"])
def test_ponder_cost_is_added_to_every_loss(double, tick_loss):
    double.config.tick_loss = tick_loss
    double.train()
    plain = double(double.ids, labels=double.ids, certainty_threshold=THRESHOLD).loss
    out = double.model(double.ids, use_cache=False, all_ticks=True)
    deltas = out.tick_deltas[:, :, :-1].flatten(1, 2)
    state = (out.last_hidden_state - out.tick_deltas[-1])[:, :-1].flatten(0, 1)
    sure = tick_certainties(state, deltas, *double.model.output_projection())
    double.config.ponder_cost = 0.5
    loss = double(double.ids, labels=double.ids, certainty_threshold=THRESHOLD).loss
    torch.testing.assert_close(loss - plain, 0.5 * expected_ticks(sure, THRESHOLD).mean(), rtol=0, atol=1e-5)


def test_ponder_cost_makes_thoughts_shorter(make_karla, random_ids):
    ids, used = random_ids(4, 24), []
    for cost in (0.0, 2.0):
        torch.manual_seed(0)
        karla = make_karla(
            ctm_num_ticks=TICKS, tick_loss="mean", ponder_cost=cost, certainty_threshold=0.3, speaks=False
        ).train()
        optimizer = torch.optim.Adam(karla.model.ctm.parameters(), lr=1e-2)
        for _ in range(20):
            karla(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            used.append(karla.eval()(ids).ticks_used.double().mean().item())
    assert used[1] < 0.8 * used[0], used


@pytest.mark.parametrize("part", ["ctm_num_neurons", "ctm_stream_size"])
def test_head_without_one_of_its_parts_is_silent_at_first(make_karla, make_backbone, random_ids, part):
    backbone, ids = make_backbone(), random_ids(2, 9)
    expected = backbone(ids).logits
    karla = make_karla(backbone, speaks=False, **{part: 0})
    assert torch.equal(karla(ids).logits, expected)
    assert [layer.weight.any().item() for layer in karla.model.ctm.zero_initialised] == [False]
    karla.train()(ids, labels=ids).loss.backward()
    assert all(layer.weight.grad.any() for layer in karla.model.ctm.zero_initialised)


def test_generation_says_how_long_was_thought(double):
    out = double.generate(double.ids[:, :9], attention_mask=torch.ones(3, 9), max_new_tokens=6, min_new_tokens=6,
                          do_sample=False, certainty_threshold=THRESHOLD, return_dict_in_generate=True,
                          logits_processor=LogitsProcessorList())  # fmt: skip
    whole = double(out.sequences, use_cache=False, certainty_threshold=THRESHOLD)
    assert torch.equal(out.ticks_used, whole.ticks_used[:, 8:-1])
    torch.testing.assert_close(out.certainty, whole.certainty[:, 8:-1], rtol=0, atol=1e-12)
    assisted = double.generate(double.ids[:1, :3].repeat(1, 3), max_new_tokens=6, prompt_lookup_num_tokens=2, do_sample=False,
                               return_dict_in_generate=True)  # fmt: skip
    assert "ticks_used" not in assisted
