"""Trained rows: equal to plain loops, causal, the same in pieces and with padding, and silent when new."""

import copy

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, StaticCache

from karla_hf import KarlaConfig, KarlaForCausalLM, KarlaModel
from karla_hf.modeling.cache_karla import RowsCacheLayer
from karla_hf.modeling.layer_engram_karla import LayerEngram, find_blocks
from karla_hf.modeling.reference_layer_engram import naive_added, naive_addresses
from karla_hf.modeling.vocabulary_karla import compress_vocabulary


ROWS = {
    "engram_layer_ids": [0, 2],
    "engram_layer_num_heads": 3,
    "engram_layer_head_dim": 5,
    "engram_layer_rows_per_head": 70,
}


def stir(layer_engram: LayerEngram) -> None:
    """Give every weight of the trained rows a value under which it matters."""
    for parameter in layer_engram.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.fixture
def make_trained(make_karla):
    """Function that builds a Karla in float64 whose rows (and head) speak."""

    def make(backbone=None, **options) -> KarlaForCausalLM:
        karla = make_karla(backbone, **{**ROWS, **options}).double()
        stir(karla.model.layer_engram)
        return karla

    return make


@pytest.fixture
def trained(make_trained):
    return make_trained()


@torch.no_grad()
def feed(karla, ids, sizes, cache=None, mask=None, positions=None):
    """Logits of `ids` fed in pieces of the given sizes."""
    logits, at, cache = [], 0, DynamicCache() if cache is None else cache
    past = int(cache.get_seq_length())
    for size in sizes:
        seen = None if mask is None else mask[:, : past + at + size]
        given = {} if positions is None else {"position_ids": positions[:, at : at + size]}
        logits.append(karla(ids[:, at : at + size], past_key_values=cache, attention_mask=seen, **given).logits)
        at += size
    return torch.cat(logits, dim=1)


def assert_same(ours, theirs, bound=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("orders", [[2, 3], [1], [3, 1, 4]])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_module_equals_plain_loops_in_outputs_and_gradients(orders, length):
    text = GPT2Config(n_embd=7, n_head=1, n_layer=5, vocab_size=19)
    options = {**ROWS, "engram_num_heads": 1, "engram_layer_orders": orders}
    engram = LayerEngram(KarlaConfig(text_config=text, **options)).double()
    stir(engram)
    engram.rows.use_token_map(torch.arange(19) // 2, pad_id=3)
    ids = torch.randint(0, 19, (2, length))
    hidden = torch.randn(2, length, 7, dtype=torch.float64, requires_grad=True)
    history = nn.functional.pad(engram.rows.compress(ids), (max(orders) - 1, 0), value=-1)
    assert engram.rows.addresses(history).tolist() == [naive_addresses(engram.rows, row.tolist()) for row in ids]
    gathered = engram.rows(history)
    valid, past = torch.ones(2, length, 1, dtype=torch.bool), torch.zeros(2, engram.reach, 7, dtype=torch.float64)
    weights = [hidden, *engram.parameters()]
    for layer, gate in enumerate(engram.gates):
        ours, _ = gate(hidden, gathered[:, :, layer], valid, past)
        naive = torch.stack(
            [naive_added(engram.rows, gate, layer, i.tolist(), h) for i, h in zip(ids, hidden, strict=True)]
        )
        assert_same(ours, naive)
        toward = torch.randn_like(ours)
        pair = [
            torch.autograd.grad((out * toward).sum(), weights, retain_graph=True, allow_unused=True)
            for out in (ours, naive)
        ]
        for first, second in zip(*pair, strict=True):
            assert (first is None) == (second is None)
            if first is not None:
                assert_same(first.to_dense() if first.is_sparse else first, second, 1e-11)


def test_addresses_are_the_published_ones(trained, tokenizer):
    """Multipliers from `seed + 10007 * layer`; primes follow one another, distinct over layers, orders and heads."""
    rows, config = trained.model.layer_engram.rows, trained.config
    assert torch.equal(rows.token_map, compress_vocabulary(tokenizer, config.text_config.vocab_size))
    bound = (np.iinfo(np.int64).max // (int(rows.token_map.max()) + 1)) // 2
    for layer, multipliers in zip([0, 2], rows.multipliers, strict=True):
        drawn = np.random.default_rng(config.engram_seed + 10007 * layer).integers(0, bound, size=3, dtype=np.int64)
        assert multipliers.tolist() == (drawn * 2 + 1).tolist()
    assert rows.primes.flatten().tolist()[:4] == [71, 73, 79, 83]
    assert len(set(rows.primes.flatten().tolist())) == 2 * 2 * 3
    assert rows.weight.shape == (rows.primes.sum(), 5)


@pytest.mark.parametrize("layers", [[0], [1], [0, 1, 2]])
def test_fresh_rows_change_no_bit(make_karla, make_backbone, random_ids, layers):
    backbone, ids = make_backbone(), random_ids(2, 17)
    expected = backbone(ids).logits
    karla = make_karla(backbone, speaks=False, **{**ROWS, "engram_layer_ids": layers})
    assert torch.equal(karla(ids).logits, expected)
    assert karla.model.layer_engram.rows.weight.std().item() == pytest.approx(0.02, rel=0.1)
    stir(karla.model.layer_engram)
    assert not torch.allclose(karla(ids).logits, expected, atol=1e-2)
    assert torch.equal(backbone(ids).logits, expected)  # outside a Karla the backbone is bare


def test_later_tokens_change_nothing_before_them(trained, random_ids):
    ids = random_ids(2, 30)
    whole = trained(ids).logits
    for at in (1, 12, 29):
        other = ids.clone()
        other[:, at] = (ids[:, at] - 1) % 198 + 2
        changed = trained(other).logits
        assert torch.equal(changed[:, :at], whole[:, :at])
        assert not torch.allclose(changed[:, at], whole[:, at], atol=1e-3)


PIECES = [[1] * 30, [9] + [1] * 21, [3, 1, 2, 11, 13], [30]]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("static", [False, True])
def test_pieces_equal_the_whole(trained, random_ids, pieces, static):
    ids = random_ids(3, 30)
    cache = StaticCache(config=trained.config.get_text_config(), max_cache_len=31) if static else None
    assert_same(feed(trained, ids, pieces, cache), trained(ids, use_cache=False).logits)


@pytest.mark.parametrize("options", [{"engram_layer_orders": [1]}, {"engram_layer_orders": [5], "ctm_window": 1}])
def test_pieces_equal_the_whole_for_any_reach(make_trained, random_ids, options):
    karla, ids = make_trained(**options), random_ids(2, 30)
    assert_same(feed(karla, ids, PIECES[2]), karla(ids, use_cache=False).logits)


def test_pieces_equal_the_whole_in_single_precision(trained, random_ids):
    karla, ids = trained.float(), random_ids(2, 30)
    assert_same(feed(karla, ids, PIECES[1]), karla(ids, use_cache=False).logits, 1e-4)


@pytest.mark.parametrize("padding", [1, 7, 14])
@pytest.mark.parametrize("pieces", PIECES[1:])
def test_left_padding_changes_nothing(trained, random_ids, padding, pieces):
    ids = random_ids(2, 30)
    mask, padded = torch.ones_like(ids), ids.clone()
    mask[0, :padding] = padded[0, :padding] = 0
    alone = trained(ids[:1, padding:]).logits[0]
    together = feed(trained, padded, pieces, mask=mask, positions=(mask.cumsum(-1) - 1).clamp(min=0))
    assert_same(together[0, padding:], alone)
    assert_same(together[1], trained(ids[1:]).logits[0])
    # Without positions a Llama counts the padding, and its rotations are float32: an activation of the head that lies
    # near a half is rounded the other way to its eight bits, and its position is off by that.
    off = (feed(trained, padded, pieces, mask=mask)[0, padding:] - alone).abs().amax(-1) / alone.abs().max()
    assert off.max() < 1e-2
    assert (off > 1e-4).float().mean() < 0.1


@pytest.mark.parametrize("removed", [1, 8])
def test_cropped_cache_continues_as_if_nothing_had_been_there(trained, random_ids, removed):
    ids, other, cache = random_ids(2, 30), random_ids(2, 4), DynamicCache()
    feed(trained, ids, [30], cache)
    cache.crop(-removed)
    whole = torch.cat([ids[:, : 30 - removed], other], dim=1)
    assert_same(feed(trained, other, [1, 3], cache), trained(whole).logits[:, 30 - removed :])


def test_batch_operations_and_reset_reach_the_rows(trained, random_ids):
    ids, cache, order = random_ids(3, 30), DynamicCache(), torch.tensor([2, 0, 0])
    feed(trained, ids[:, :20], [20], cache)
    assert isinstance(cache.layers[-2], RowsCacheLayer)
    assert cache.layers[-2].keys.shape == (3, 1, 1, 9 + 8, 2, 64)
    cache.reorder_cache(order)
    mixed = torch.cat([ids[order, :20], ids[:, 20:]], dim=1)
    assert_same(feed(trained, mixed[:, 20:], [1, 9], cache), trained(mixed).logits[:, 20:])
    cache = StaticCache(config=trained.config.get_text_config(), max_cache_len=30)
    feed(trained, ids.flip(1), [30], cache)
    cache.reset()
    assert_same(feed(trained, ids, [7, 23], cache), trained(ids).logits)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}]
)
def test_generation_with_a_cache_is_generation_without(trained, random_ids, options):
    ids = random_ids(1, 12)
    plain = {"num_beams": options.get("num_beams", 1), "max_new_tokens": 8, "do_sample": False}
    expected = trained.generate(ids, **plain, use_cache=False)
    assert torch.equal(trained.generate(ids, **{**plain, **options}), expected)


def test_cache_of_a_model_without_rows_is_refused(trained, make_karla, random_ids):
    ids = random_ids(1, 5)
    cache = make_karla().double()(ids).past_key_values
    with pytest.raises(ValueError, match=r"^past_key_values holds 5 positions but no Karla layer"):
        trained(ids, past_key_values=cache)


def test_reading_sees_the_rows(trained, remember, random_ids):
    """What is written corrects the states that answers are made of, trained rows included."""
    ids = random_ids(1, 40)
    report = remember(trained, ids)
    trained.use_memory(False)
    bare = trained.model.ctm.requires_grad_(False)
    for layer in bare.zero_initialised:
        nn.init.zeros_(layer.weight)
    loss = trained(ids, labels=ids).loss
    assert report.surprise_before == pytest.approx(loss.item(), rel=0.2)
    stir(trained.model.layer_engram)
    assert trained(ids, labels=ids).loss.item() != pytest.approx(loss.item(), rel=1e-3)


def test_other_architectures(make_trained, random_ids):
    backbone = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4)).eval()
    karla, ids = make_trained(backbone), random_ids(2, 20)
    assert_same(feed(karla, ids, [6, 1, 13]), karla(ids).logits)
    assert find_blocks(karla.model.backbone) is karla.model.backbone.h


def test_backbone_without_blocks_is_refused():
    backbone = nn.Module()
    backbone.config = LlamaConfig(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"^Module has no list of 2 blocks to insert trained rows into; set"):
        find_blocks(backbone)


def test_backbone_is_hooked_once(trained, random_ids):
    ids = random_ids(1, 9)
    before = trained(ids).logits
    trained.model.link(trained.model.backbone, trained.lm_head)
    assert torch.equal(trained(ids).logits, before)
    assert torch.equal(copy.deepcopy(trained)(ids).logits, before)
    twin = copy.deepcopy(trained)
    stir(twin.model.layer_engram)
    assert torch.equal(trained(ids).logits, before)
    assert not torch.equal(twin(ids).logits, before)


def test_rows_stay_on_the_cpu_and_take_the_dtype(trained):
    rows = trained.model.layer_engram.rows
    trained.model.layer_engram.to("meta", torch.bfloat16)
    assert (rows.weight.device.type, rows.weight.dtype) == ("cpu", torch.bfloat16)
    assert (rows.primes.device.type, rows.primes.dtype) == ("cpu", torch.int64)
    assert trained.model.layer_engram.gates[0].conv.is_meta


@pytest.mark.parametrize("trains", [True, False])
def test_gradients_reach_the_rows_only_if_they_train(trained, random_ids, trains):
    trained.model.layer_engram.requires_grad_(trains)
    ids = random_ids(2, 9)
    trained.train()(ids, labels=ids).loss.backward()
    rows = trained.model.layer_engram.rows.weight
    assert (rows.grad is not None) == trains
    assert all(parameter.grad is None for parameter in trained.model.backbone.parameters())
    if trains:
        assert rows.grad.is_sparse
        assert len(rows.grad.coalesce().indices()[0]) < len(rows) / 2
        assert all(parameter.grad.abs().sum() > 0 for parameter in trained.model.layer_engram.gates.parameters())


def test_gradients_pass_a_quantised_backbone(backbone_folder, make_karla, random_ids):
    """They are those of the same weights unpacked, though passes without gradients came before."""
    karla = make_karla(str(backbone_folder), speaks=False, quantization="nf4", **{**ROWS, "engram_layer_ids": [0]})
    stir(karla.model.layer_engram)
    ids, rows = random_ids(2, 9), karla.model.layer_engram.rows
    with torch.no_grad():
        karla(ids)
    loss = karla(ids, labels=ids).loss
    loss.backward()
    ours, rows.weight.grad = rows.weight.grad.to_dense(), None
    for module in list(karla.model.backbone.modules()):
        for name, linear in list(module.named_children()):
            if hasattr(linear.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
                plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
                plain.weight = nn.Parameter(dequantize_4bit(linear.weight.data, linear.weight.quant_state), False)
                setattr(module, name, plain)
    unpacked = karla(ids, labels=ids).loss
    unpacked.backward()
    torch.testing.assert_close(loss, unpacked, rtol=1e-4, atol=0)
    theirs = rows.weight.grad.to_dense()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_packed_backbone_is_refused(make_trained):
    karla = make_trained()
    karla.model.backbone.layers[0].mlp.up_proj.weight.quant_state = type("State", (), {"packing_format_for_cpu": True})
    with pytest.raises(
        ValueError, match=r"^The backbone's 4-bit weights are packed for inference, .*; load the backbone"
    ):
        karla.model.layer_engram.insert(karla.model.backbone)


@pytest.mark.parametrize("by_name", [True, False])
def test_checkpoint_comes_back_equal(backbone_folder, make_karla, random_ids, tmp_path, by_name, tokenizer):
    backbone = {"backbone": str(backbone_folder)} if by_name else {}
    karla, ids = make_karla(**backbone, **ROWS), random_ids(2, 20)
    stir(karla.model.layer_engram)
    rows = karla.model.layer_engram.rows
    rows.multipliers += 2  # constants are loaded, not derived again
    karla.save_pretrained(tmp_path / "karla")
    loaded, report = KarlaForCausalLM.from_pretrained(tmp_path / "karla", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    state, again = karla.model.layer_engram.state_dict(), loaded.model.layer_engram.state_dict()
    assert state.keys() == again.keys() >= {"rows.weight", "rows.multipliers", "rows.token_map", "gates.1.conv"}
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert torch.equal(loaded(ids).logits, karla(ids).logits)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in karla.named_parameters() if p.requires_grad
    }
    inner = KarlaModel.from_pretrained(tmp_path / "karla")
    assert torch.equal(inner(ids).last_hidden_state, karla.model(ids).last_hidden_state)
    half = KarlaForCausalLM.from_pretrained(tmp_path / "karla", dtype=torch.bfloat16)
    assert half.model.layer_engram.rows.multipliers.dtype == torch.int64
    assert torch.isfinite(half(ids).logits).all()


def test_checkpoint_without_rows_gets_none(saved):
    assert KarlaForCausalLM.from_pretrained(saved).model.layer_engram is None
    with pytest.raises(
        ValueError, match=r"karla has no trained rows as engram_layer_ids asks for; load it without, or"
    ):
        KarlaForCausalLM.from_pretrained(saved, engram_layer_ids=[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engram_layer_ids": [3]}, r"`engram_layer_ids` is \[3\]; give distinct blocks from 0 to 2, or None for no"),
        ({"engram_layer_ids": [-1]}, "give distinct blocks from 0 to 2"),
        ({"engram_layer_ids": [1, 1]}, "give distinct blocks from 0 to 2"),
        ({"engram_layer_ids": []}, "give distinct blocks from 0 to 2"),
        ({"engram_layer_orders": []}, r"`engram_layer_orders` is \[\]; give orders of 1 or more\."),
        ({"engram_layer_orders": [0, 2]}, r"`engram_layer_orders` is \[0, 2\]; give orders of 1 or more\."),
        ({"engram_layer_rows_per_head": 0}, r"`engram_layer_rows_per_head` is 0; give 1 or more\."),
        ({"engram_layer_num_heads": 0}, r"`engram_layer_num_heads` is 0; give 1 or more\."),
        ({"engram_layer_head_dim": 0}, r"`engram_layer_head_dim` is 0; give 1 or more\."),
    ],
)
def test_wrong_options_are_named(options, message):
    text = LlamaConfig(hidden_size=64, num_hidden_layers=3, vocab_size=9)
    with pytest.raises(Exception, match="Class validation error") as error:
        KarlaConfig(text_config=text, **options)
    assert error.match(message)
