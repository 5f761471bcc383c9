import copy

import pytest
import torch
from tiny import OPTIONS, make_backbone, speak
from trl.trainer.utils import add_fused_lm_head

from karla_hf import KarlaForCausalLM, loss
from karla_hf.loss import score_labels, score_labels_only


def naive_scores(hidden, weight, bias, labels, scale, cap):
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, labels[:, None])[:, 0], entropy, logits.argmax(-1) == labels


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_scores_and_gradients_are_those_of_all_logits(monkeypatch, cap, with_bias, count):
    monkeypatch.setattr(loss, "ROWS", 4)
    hidden = torch.randn(count, 7, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(11, 7).double(), torch.randn(11).double() if with_bias else None
    labels, upstream = torch.randint(0, 11, (count,)), torch.randn(count).double()
    ours = score_labels(hidden, weight, bias, labels, 0.7, cap)
    theirs = naive_scores(hidden, weight, bias, labels, 0.7, cap)
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(scores[0] @ upstream, hidden)[0] for scores in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_output_layer_that_trains_is_refused():
    with pytest.raises(ValueError, match=r"requires gradients, which are not computed here; freeze it\.$"):
        score_labels(torch.zeros(1, 2), torch.eye(2, requires_grad=True), None, torch.tensor([0]))


@pytest.mark.parametrize("kind", ["all", "ends", "none", "single"])
def test_fused_output_is_what_trl_gives(kind):
    torch.manual_seed(3)
    karla = speak(KarlaForCausalLM.from_backbone(make_backbone(), **OPTIONS)).train()
    ours = copy.deepcopy(karla)
    outputs = ("log_probs", "entropy", "is_top1")
    for model in (karla, ours):
        add_fused_lm_head(model, outputs=outputs)
    score_labels_only(ours)
    ids = torch.randint(1, 300, (3, 1 if kind == "single" else 21))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : {"all": 0, "ends": 12, "none": 21, "single": 0}[kind]] = -100
    found = [m(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True) for m in (karla, ours)]
    for name in (*outputs, "label_mask", "loss"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-5)
    for model, out in zip((karla, ours), found, strict=True):
        out.log_probs.sum().backward()
        assert model(ids, labels=labels).logits.shape == (*ids.shape, 400)
    pairs = zip(karla.model.ctm.parameters(), ours.model.ctm.parameters(), strict=True)
    for first, second in pairs:
        torch.testing.assert_close(second.grad, first.grad, rtol=1e-3, atol=1e-4)
