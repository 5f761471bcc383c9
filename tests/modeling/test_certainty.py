"""Certainty, the rule that ends a thought, and the two-tick loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karla_hf.modeling.certainty_karla import Candidates, StoppingRule, certainty
from karla_hf.modeling.losses_karla import two_tick_loss
from karla_hf.modeling.reference_ctm import naive_certainty, naive_two_tick_loss


POSITIONS, TICKS, WIDTH, VOCAB, COUNT = 40, 5, 6, 30, 8


def thought(dtype=torch.float64):
    """State before thinking, deltas of every tick, output layer and its bias."""
    sizes = [(POSITIONS, WIDTH), (TICKS, POSITIONS, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    return [torch.randn(size, dtype=dtype) for size in sizes]


def offline(state, deltas, weight, bias, threshold, most_certain, count=COUNT):
    """Ticks, certainties and deltas of the answers, chosen with all ticks in hand."""
    ticks, sure, answers = [], [], []
    for p in range(len(state)):
        before = weight @ state[p] + bias
        index = before.topk(count).indices
        options = [(0, torch.zeros_like(state[p])), *enumerate(deltas[:, p], start=1)]
        reached = [naive_certainty((weight @ (state[p] + delta) + bias)[index].tolist()) for _, delta in options]
        tick = next((t for t, _ in options if threshold is not None and reached[t] >= threshold), None)
        answer = tick  # which is also the surest so far
        if tick is None:
            tick = len(deltas)
            answer = 1 + reached[1:].index(max(reached[1:])) if most_certain else tick
        ticks.append(tick)
        sure.append(reached[answer])
        answers.append(options[answer][1])
    return torch.tensor(ticks), torch.tensor(sure), torch.stack(answers)


def online(state, deltas, weight, bias, threshold, most_certain, count=COUNT):
    rule = StoppingRule(Candidates(state, weight, bias, count), state, threshold, most_certain)
    rows = rule.thinking
    for tick, delta in enumerate(deltas, start=1):
        going = rule(tick, delta[rows])
        rows = rows if going is None else rows[going]
    return rule.ticks_used, rule.certainty, rule.answer(state)


@pytest.mark.parametrize("size", [2, 3, 64])
def test_certainty_equals_naive_and_lies_between_zero_and_one(size):
    logits = 3 * torch.randn(20, size, dtype=torch.float64)
    found = certainty(logits)
    torch.testing.assert_close(found, torch.tensor([naive_certainty(row) for row in logits.tolist()]).double())
    assert ((found > 0) & (found < 1)).all()


def test_certainty_of_extreme_logits():
    logits = torch.tensor([[0.0, 0.0, 0.0], [1e4, 0.0, 0.0], [7.0, 7.0, 7.0]])
    torch.testing.assert_close(certainty(logits), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_candidates_are_the_likeliest_tokens_before_thinking():
    state, deltas, weight, bias = thought()
    candidates = Candidates(state, weight, bias, COUNT)
    logits = state @ weight.T + bias
    torch.testing.assert_close(candidates.logits(state).double(), logits.topk(COUNT).values)
    later = (state + deltas[0]) @ weight.T + bias
    index = logits.topk(COUNT).indices
    torch.testing.assert_close(candidates.logits(state + deltas[0]).double(), later.gather(1, index))


def test_label_comes_first_among_the_candidates_and_never_twice():
    state, _, weight, bias = thought()
    logits = state @ weight.T + bias
    labels = torch.randint(VOCAB, (POSITIONS,))
    labels[0] = logits[0].argmax()
    found = Candidates(state, weight, bias, COUNT, labels).logits(state).double()
    torch.testing.assert_close(found[:, 0], logits.gather(1, labels[:, None])[:, 0])
    others = logits.scatter(1, labels[:, None], -torch.inf).topk(COUNT - 1).values
    torch.testing.assert_close(found[:, 1:], others)


def test_more_candidates_than_tokens_takes_all():
    state, _, weight, _ = thought()
    assert Candidates(state, weight, None, 64).logits(state).shape == (POSITIONS, VOCAB)


@pytest.mark.parametrize("most_certain", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.4, 0.6, 0.8, 0.99, 1.0])
def test_stopping_equals_the_choice_with_all_ticks_in_hand(threshold, most_certain):
    arguments = thought()
    ours, theirs = (rule(*arguments, threshold, most_certain) for rule in (online, offline))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1].double(), theirs[1].double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[2], theirs[2])
    if threshold in (0.4, 0.6):
        assert len(set(ours[0].tolist())) > 3, "the thresholds of this test separate the positions"


def test_threshold_that_is_just_reached_stops():
    state, deltas, weight, bias = thought()
    just = certainty(Candidates(state, weight, bias, COUNT).logits(state))[3].item()
    assert online(state, deltas, weight, bias, just, False)[0][3] == 0
    assert online(state, deltas, weight, bias, just + 1e-6, False)[0][3] > 0


@settings(max_examples=30)
@given(threshold=st.floats(0, 1), seed=st.integers(0, 100))
def test_higher_threshold_never_thinks_less(threshold, seed):
    torch.manual_seed(seed)
    arguments = thought()
    fewer, more = (online(*arguments, tau, False)[0] for tau in (threshold / 2, threshold))
    assert (fewer <= more).all()


def test_answer_of_a_position_does_not_depend_on_the_others():
    state, deltas, weight, bias = thought()
    together = online(state, deltas, weight, bias, 0.5, False)
    for p in (0, 7, 39):
        alone = online(state[p : p + 1], deltas[:, p : p + 1], weight, bias, 0.5, False)
        assert together[0][p] == alone[0][0]
        assert torch.equal(together[2][p], alone[2][0])


@pytest.mark.parametrize("count", [2, 8, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_two_tick_loss_and_gradient_equal_naive(count, with_bias):
    state, deltas, weight, bias = thought()
    deltas.requires_grad_()
    labels = torch.randint(VOCAB, (POSITIONS,))
    arguments = (state, deltas, labels, weight, bias if with_bias else None, count)
    ours, theirs = two_tick_loss(*arguments), naive_two_tick_loss(*arguments)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    direction = torch.rand(POSITIONS)
    gradients = [torch.autograd.grad((loss * direction).sum(), deltas)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    touched = (gradients[0] != 0).any(-1).sum(0)
    assert set(touched.tolist()) == {1, 2}, "a position trains its best and its surest tick, which may be one"


def test_two_tick_loss_with_all_tokens_as_candidates_chooses_by_the_true_loss():
    state, deltas, weight, bias = thought()
    labels = torch.randint(VOCAB, (POSITIONS,))
    logits = (state + deltas) @ weight.T + bias
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(TICKS), reduction="none").view(
        TICKS, POSITIONS
    )
    surest = certainty(logits).argmax(0)
    expected = (losses.min(0).values + losses.gather(0, surest[None])[0]) / 2
    torch.testing.assert_close(two_tick_loss(state, deltas, labels, weight, bias, VOCAB).double(), expected)


def test_two_tick_loss_of_no_position_is_empty():
    state, deltas, weight, bias = thought()
    assert two_tick_loss(state[:0], deltas[:, :0], torch.empty(0, dtype=torch.int64), weight, bias).shape == (0,)


def test_equal_ticks_train_the_first():
    state, deltas, weight, bias = thought()
    deltas = deltas[:1].repeat(TICKS, 1, 1).requires_grad_()
    two_tick_loss(state, deltas, torch.zeros(POSITIONS, dtype=torch.int64), weight, bias).sum().backward()
    assert deltas.grad[0].any(-1).all()
    assert not deltas.grad[1:].any()
