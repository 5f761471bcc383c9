"""The whole model: a fresh Karla is its backbone, and nothing looks ahead."""

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from karla_hf import KarlaForCausalLM, KarlaModel


SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0}


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


OTHERS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=4)),
    "granite, scaled logits": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, logits_scaling=8.0)),
    "cohere2, scaled logits": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, **HEADS, logit_scale=0.25)),
    "gemma2, soft-capped logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **HEADS, head_dim=16, final_logit_softcapping=0.5, sliding_window=8)
    ),
}


@pytest.mark.parametrize("tied", [False, True])
def test_fresh_karla_is_its_backbone(make_backbone, make_karla, random_ids, tied):
    backbone = make_backbone(tie_word_embeddings=tied)
    ids, mask = random_ids(2, 21), torch.ones(2, 21, dtype=torch.int64)
    mask[0, :5] = 0
    expected = backbone(ids, attention_mask=mask).logits
    karla = make_karla(backbone, speaks=False)
    assert torch.equal(karla(ids, attention_mask=mask).logits, expected)
    assert torch.equal(karla.train()(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_fresh_karla_is_any_backbone_and_speaks_in_its_scale(make_karla, random_ids, remember, name):
    backbone, ids = OTHERS[name]().eval(), random_ids(2, 21)
    expected = backbone(ids).logits
    karla = make_karla(backbone, speaks=False)
    assert torch.equal(karla(ids).logits, expected)
    report = remember(karla, ids)
    again = remember(karla, ids, pack="default")
    assert again.surprise_before < 0.5 * report.surprise_before
    losses = [torch.nn.functional.cross_entropy(logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten()) for logits in
              (expected, karla(ids).logits)]  # fmt: skip
    if name != "gemma2, soft-capped logits":  # the cap of 0.5 is below what the write needs
        assert losses[1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", OTHERS)
def test_any_backbone_generates_the_same_with_and_without_a_cache(make_karla, random_ids, remember, name):
    karla, ids = make_karla(OTHERS[name]().eval()).double(), random_ids(2, 11)
    remember(karla, ids)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found, expected = (
        karla.generate(
            ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cache
        )
        for cache in (True, False)
    )
    assert torch.equal(found, expected)


def test_karla_model_gives_the_states_of_the_causal_lm(karla):
    out = karla.model(karla.texts)
    logits = torch.nn.functional.linear(out.last_hidden_state, karla.get_output_embeddings().weight)
    assert torch.equal(logits, karla(karla.texts).logits)
    assert not torch.equal(logits, karla.lm_head(karla.model.backbone(karla.texts).last_hidden_state))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changed", [1, 7, 8, 9, 15, 29])
def test_later_token_changes_nothing_before_it(karla, training, changed):
    karla.train(training)
    ids = karla.texts[:, :30].clone()
    before = karla(ids).logits
    ids[:, changed] = (ids[:, changed] - 1) % 298 + 2
    after = karla(ids).logits
    assert torch.equal(after[:, :changed], before[:, :changed])
    assert (after[:, changed] != before[:, changed]).any(-1).all()


@pytest.mark.parametrize("options", [{"certainty_threshold": 0.3}, {"tick_loss": "two_tick"}])
def test_later_token_changes_no_earlier_halting(make_karla, remember, random_ids, options):
    karla, ids = make_karla(**options), random_ids(2, 20)
    remember(karla, ids)
    before = karla(ids)
    ids[:, 13] = (ids[:, 13] - 1) % 298 + 2
    after = karla(ids)
    assert torch.equal(after.logits[:, :13], before.logits[:, :13])
    assert torch.equal(after.ticks_used[:, :13], before.ticks_used[:, :13])
    assert torch.equal(after.certainty[:, :13], before.certainty[:, :13])


def test_rows_of_a_batch_do_not_meet(karla):
    karla.double()
    together = karla(karla.texts).logits
    for row, ids in enumerate(karla.texts):
        torch.testing.assert_close(
            karla(ids[None]).logits[0], together[row], rtol=0, atol=1e-12 * together.abs().max().item()
        )


def test_memory_and_head_both_move_the_logits(make_karla, remember, random_ids):
    ids = random_ids(1, 30)
    karla = make_karla(speaks=False)
    silent = karla(ids).logits
    remember(karla, ids)
    remembered = karla(ids).logits
    # the shortest family names a position after four tokens, and only where one was written
    assert torch.equal(remembered[:, :3], silent[:, :3])
    assert (remembered[:, 3:29] != silent[:, 3:29]).any(-1).sum() > 20
    torch.nn.init.normal_(karla.model.ctm.up.weight)
    assert (karla(ids).logits != remembered).any(-1).all()


@pytest.mark.parametrize("keep", [1, 3, 21, 40])
def test_last_logits_alone_are_those_of_all(karla, keep):
    everything, last = karla(karla.texts), karla(karla.texts, logits_to_keep=keep)
    assert last.logits.shape == (3, keep, 300)
    torch.testing.assert_close(last.logits, everything.logits[:, -keep:], rtol=1e-4, atol=1e-4)
    assert last.ticks_used.shape == last.certainty.shape == (3, keep)


def test_chosen_logits_are_those_of_all(karla):
    everything, chosen = karla(karla.texts), karla(karla.texts, logits_to_keep=torch.tensor([0, 7, 39]))
    assert torch.equal(chosen.logits, everything.logits[:, [0, 7, 39]])
    assert torch.equal(chosen.certainty, everything.certainty[:, [0, 7, 39]])
    assert chosen.ticks_used.shape == (3, 3)
    everything, chosen = (
        karla(karla.texts, logits_to_keep=keep, certainty_threshold=0.5) for keep in (0, torch.tensor([0, 7, 39]))
    )
    for name in ("logits", "certainty", "ticks_used"):
        assert torch.equal(chosen[name], everything[name][:, [0, 7, 39]])


def test_max_ticks_of_a_call_is_the_configuration_of_fewer_ticks(karla):
    two = karla(karla.texts, max_ticks=2)
    assert (two.ticks_used == 2).all()
    karla.config.ctm_num_ticks = 2
    assert torch.equal(karla(karla.texts).logits, two.logits)
    with pytest.raises(ValueError, match=r"^max_ticks is 0; give 1 or more\.$"):
        karla(karla.texts, max_ticks=0)


def test_half_precision(make_backbone, make_karla, random_ids, remember):
    karla, ids = make_karla(make_backbone().to(torch.bfloat16)), random_ids(2, 20)
    remember(karla, ids)
    full = karla(ids).logits
    assert full.dtype == torch.bfloat16
    karla.model.ctm.to(torch.bfloat16)
    half = karla(ids).logits
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()
    assert (half.float() - full.float()).abs().mean() < 0.1 * full.float().std()


MISTAKES = {
    "no ids": (
        {"inputs_embeds": torch.zeros(1, 3, 64)},
        r"^input_ids is missing; the memory is addressed by token ids",
    ),
    "mask too short": (
        {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 4)},
        r"^attention_mask has shape \(2, 4\), but 2 sequences of 0 \+ 5 tokens need \[batch, past \+ new\]\.$",
    ),
    "mask of four dimensions": (
        {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 1, 5, 5)},
        r"^attention_mask has shape \(2, 1, 5, 5\), but",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_call_gets_one_clear_sentence(karla, mistake):
    arguments, sentence = MISTAKES[mistake]
    with pytest.raises(ValueError, match=sentence):
        karla(**arguments)


def test_unknown_model_option_is_refused(make_backbone):
    with pytest.raises(ValueError, match=r"Unknown model options \['ctm_ticks'\]; the options are"):
        KarlaForCausalLM.from_backbone(make_backbone(), ctm_ticks=3)


def test_options_for_loading_need_a_name(make_backbone):
    with pytest.raises(ValueError, match="are for a backbone given by name; load it so"):
        KarlaForCausalLM.from_backbone(make_backbone(), quantization="nf4")


def test_backbone_whose_logits_are_made_otherwise_is_refused(make_backbone):
    backbone = make_backbone()
    forward = backbone.forward

    def odd_forward(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits + 1
        return out

    backbone.forward = odd_forward
    with pytest.raises(
        ValueError, match="LlamaForCausalLM turns hidden states into logits in a way that Karla does not"
    ):
        KarlaForCausalLM.from_backbone(backbone)


def test_embeddings_cannot_be_replaced(karla):
    with pytest.raises(NotImplementedError, match="backbone is frozen"):
        karla.resize_token_embeddings(400)
    with pytest.raises(NotImplementedError, match="backbone is frozen"):
        karla.set_output_embeddings(torch.nn.Linear(64, 300))


def test_model_without_output_layer_is_refused(make_backbone):
    with pytest.raises(ValueError, match="give a causal LM"):
        KarlaForCausalLM.from_backbone(make_backbone().model)


def test_model_can_be_built_from_its_configuration_alone(karla):
    fresh = KarlaForCausalLM(karla.config)
    assert not any(parameter.requires_grad for parameter in fresh.model.backbone.parameters())
    assert fresh(karla.texts).logits.shape == (3, 40, 300)
    assert KarlaModel(karla.config)(karla.texts).last_hidden_state.shape == (3, 40, 64)


def test_hidden_states_of_the_backbone_can_be_had(karla):
    states = karla(karla.texts, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert karla(karla.texts).hidden_states is None


def test_certainty_lies_between_zero_and_one(karla):
    out = karla(karla.texts)
    assert out.certainty.shape == out.ticks_used.shape == (3, 40)
    assert ((out.certainty >= 0) & (out.certainty <= 1)).all()
    assert (out.ticks_used == 3).all()
