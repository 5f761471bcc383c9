"""Training the head: what moves, what stays, and the losses."""

import pytest
import torch
from transformers import LlamaModel


def backbone_bytes(karla) -> dict[str, bytes]:
    state = {**karla.model.backbone.state_dict(), **karla.lm_head.state_dict(prefix="lm_head.")}
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def memory_bytes(karla) -> list[tuple[bytes, bytes]]:
    tables = [table for level in karla.engram.packs["default"].levels for table in level.tables]
    return [(table.names.tobytes(), table.rows.tobytes()) for table in tables]


def test_only_the_head_trains(karla):
    trainable = {name for name, parameter in karla.named_parameters() if parameter.requires_grad}
    assert trainable == {f"model.ctm.{name}" for name, _ in karla.model.ctm.named_parameters()}
    assert isinstance(karla.model.backbone, LlamaModel)


@pytest.mark.parametrize("tick_loss", ["last", "two_tick"])
def test_training_changes_the_head_and_no_byte_of_the_backbone(make_karla, remember, random_ids, tick_loss):
    karla, ids = make_karla(speaks=False, tick_loss=tick_loss), random_ids(2, 20)
    remember(karla, random_ids(2, 20))
    before, packs = backbone_bytes(karla), memory_bytes(karla)
    karla.train()
    assert not any(
        module.training for module in (karla.model.backbone, *karla.model.backbone.modules(), karla.lm_head)
    )
    assert karla.model.ctm.training
    optimizer = torch.optim.AdamW([p for p in karla.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = karla(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        assert all(p.grad is None for p in (*karla.model.backbone.parameters(), *karla.lm_head.parameters()))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert backbone_bytes(karla) == before
    assert memory_bytes(karla) == packs
    assert all(parameter.isfinite().all() for parameter in karla.model.ctm.parameters())


def test_silent_head_trains_through_its_zero_projections_first(make_karla, random_ids):
    karla, ids = make_karla(speaks=False).train(), random_ids(1, 12)
    karla(ids, labels=ids).loss.backward()
    touched = {name for name, parameter in karla.model.ctm.named_parameters() if parameter.grad is not None
               and parameter.grad.any()}  # fmt: skip
    assert touched == {"up.weight", "stream_write.weight"}


def test_speaking_head_trains_everywhere(make_karla, random_ids):
    karla, ids = make_karla().train(), random_ids(1, 12)
    karla(ids, labels=ids).loss.backward()
    assert [name for name, parameter in karla.model.ctm.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize("tick_loss", ["last", "two_tick"])
def test_gradient_checkpointing_changes_no_gradient(make_karla, random_ids, tick_loss):
    karla, ids = make_karla(tick_loss=tick_loss).double().train(), random_ids(2, 12)
    gradients = []
    for enable in (karla.activation_checkpointing_disable, karla.activation_checkpointing_enable):
        enable()
        karla.zero_grad()
        karla(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in karla.model.ctm.parameters()])
    assert karla.model.ctm.gradient_checkpointing
    assert all(torch.equal(plain, saved) for plain, saved in zip(*gradients, strict=True))


def test_labels_give_the_mean_loss_of_the_next_tokens(karla):
    ids = karla.texts
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    logits = karla(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(karla(ids, labels=labels).loss, expected)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(karla(ids, labels=labels, num_items_in_batch=2 * count).loss, expected / 2)
    torch.testing.assert_close(karla(ids, labels=labels, logits_to_keep=1).loss, expected)


def test_two_tick_loss_is_that_of_the_best_and_the_surest_tick(make_karla, random_ids):
    karla, ids = make_karla(tick_loss="two_tick", certainty_candidates=300).double().train(), random_ids(2, 14)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    out = karla.model(ids, all_ticks=True)
    state = out.last_hidden_state - out.tick_deltas[-1]
    logits = karla.lm_head(state + out.tick_deltas)[:, :, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 2), labels[:, 1:].repeat(3, 1).flatten(), reduction="none"
    ).view(3, 2, 13)
    log_p = logits.log_softmax(-1)
    surest = (log_p.exp() * log_p).sum(-1).argmax(0)
    expected = (losses.min(0).values + losses.gather(0, surest[None])[0])[labels[:, 1:] != -100] / 2
    torch.testing.assert_close(karla(ids, labels=labels).loss.double(), expected.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        karla(ids, labels=labels, num_items_in_batch=7).loss.double(), expected.sum() / 7, rtol=1e-5, atol=1e-5
    )


def test_loss_without_any_label_is_zero_or_nan_as_in_transformers(make_karla, make_backbone, random_ids):
    karla, ids = make_karla(tick_loss="two_tick").train(), random_ids(1, 6)
    loss = karla(ids, labels=torch.full_like(ids, -100)).loss
    assert loss.item() == 0


def test_autocast_trains(karla):
    karla.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = karla(karla.texts, labels=karla.texts).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in karla.model.ctm.parameters())
