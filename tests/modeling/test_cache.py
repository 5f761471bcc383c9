"""Incremental decoding equals the full forward pass; the extra cache layer follows every operation on a cache."""

import copy

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from karla_hf.modeling.cache_karla import KarlaCacheLayer, karla_layer


LENGTH = 36  # the window is 8, the longest n-gram 24: a layer stores 23 + 8 positions


@pytest.fixture
def double(make_karla, remember, random_ids):
    """A Karla in float64 that speaks and has read `texts`."""
    model = make_karla().double()
    model.texts = random_ids(3, LENGTH)
    remember(model, model.texts)
    return model


@torch.no_grad()
def feed(karla, ids, sizes, cache=None, mask=None, **options):
    """Logits of `ids` fed in pieces of the given sizes."""
    logits, at = [], 0
    cache = cache if cache is not None else DynamicCache()
    past = cache.get_seq_length()
    for size in sizes:
        seen = None if mask is None else mask[:, : past + at + size]
        out = karla(ids[:, at : at + size], past_key_values=cache, attention_mask=seen, use_cache=True, **options)
        logits.append(out.logits)
        at += size
    return torch.cat(logits, dim=1)


def assert_same(ours, theirs, bound=None):
    if bound is None:
        bound = 1e-12 if ours.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * max(1.0, theirs.abs().max().item()))


CACHES = {
    "dynamic": lambda karla: DynamicCache(),
    "dynamic with its configuration": lambda karla: DynamicCache(config=karla.config.get_text_config()),
    "dynamic with Karla's configuration": lambda karla: DynamicCache(config=karla.config),
    "static": lambda karla: StaticCache(config=karla.config.get_text_config(), max_cache_len=LENGTH + 2),
}
PIECES = {
    "token by token": [1] * LENGTH,
    "prompt, then token by token": [9] + [1] * 27,
    "pieces across the window": [7, 1, 8, 9, 11],
    "one piece": [LENGTH],
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("cache", CACHES)
def test_pieces_equal_the_whole(double, pieces, cache):
    whole = double(double.texts, use_cache=False).logits
    assert_same(feed(double, double.texts, PIECES[pieces], CACHES[cache](double)), whole)


@pytest.mark.parametrize("options", [{"ctm_num_neurons": 0}, {"ctm_stream_size": 0}])
def test_pieces_equal_the_whole_with_either_part_alone(make_karla, random_ids, options):
    karla, ids = make_karla(**options).double(), random_ids(2, LENGTH)
    whole = karla(ids, use_cache=False).logits
    for pieces in ("prompt, then token by token", "pieces across the window"):
        assert_same(feed(karla, ids, PIECES[pieces]), whole)


@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_equal_the_whole_in_single_precision(karla, pieces):
    """But where an activation of the head lies so near a half that it is rounded the other way to its eight bits."""
    ids = karla.texts[:, :LENGTH]
    ours, whole = feed(karla, ids, PIECES[pieces]), karla(ids, use_cache=False).logits
    assert_same(ours, whole, bound=1e-3)
    assert ((ours - whole).abs().amax(-1) > 1e-4 * whole.abs().max()).float().mean() < 0.1


@pytest.mark.parametrize("options", [{"certainty_threshold": 0.5}, {"max_ticks": 1}, {"logits_to_keep": 1}])
def test_pieces_equal_the_whole_with_options(double, options):
    whole = double(double.texts, use_cache=False, **{**options, "logits_to_keep": 0})
    cache = DynamicCache()
    outs = [double(double.texts[:, t : t + 1], past_key_values=cache, **options) for t in range(LENGTH)]
    assert_same(torch.cat([out.logits for out in outs], dim=1), whole.logits)
    assert torch.equal(torch.cat([out.ticks_used for out in outs], dim=1), whole.ticks_used)


@pytest.mark.parametrize("family", [{"order": 1}, {"order": 2}, {"order": 40}])
@pytest.mark.parametrize("window", [1, 3, 64])
def test_pieces_equal_the_whole_for_any_reach(make_karla, remember, random_ids, family, window):
    families = [{"kind": "ngram", "weight": 1.0, **family}]
    karla, ids = make_karla(engram_families=families, ctm_window=window).double(), random_ids(2, LENGTH)
    remember(karla, ids)
    assert_same(feed(karla, ids, [4, 1, 1, 6, 24]), karla(ids, use_cache=False).logits)


@pytest.mark.parametrize("padding", [1, 6, 12])
@pytest.mark.parametrize("given_positions", [False, True])
@pytest.mark.parametrize("pieces", [[LENGTH], [13, 1, 9, 13], [1] * LENGTH])
def test_left_padding_changes_nothing(double, padding, given_positions, pieces):
    """A padded row of a batch gets the logits that it gets alone."""
    ids = double.texts.clone()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ids[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options, at = {}, 0
    cache, logits = DynamicCache(), []
    for size in pieces:
        if given_positions:
            options["position_ids"] = positions[:, at : at + size]
        seen = mask[:, : at + size]
        out = double(ids[:, at : at + size], attention_mask=seen, past_key_values=cache, **options)
        logits.append(out.logits)
        at += size
    together = torch.cat(logits, dim=1)
    alone = double(double.texts[:1, padding:]).logits[0]
    assert_same(together[1:], double(double.texts[1:]).logits)
    if given_positions:
        assert_same(together[0, padding:], alone)
    else:  # a Llama counts the padding then, and its rotations are float32, so that a few activations are rounded apart
        assert_same(together[0, padding:], alone, bound=1e-2)
        assert ((together[0, padding:] - alone).abs().amax(-1) > 1e-4 * alone.abs().max()).float().mean() < 0.1


def test_right_padding_changes_nothing_before_it(double):
    mask = torch.ones_like(double.texts)
    mask[0, 20:] = 0
    assert_same(double(double.texts, attention_mask=mask).logits[0, :20], double(double.texts[:1, :20]).logits[0])


def test_whole_row_of_padding_is_finite(double):
    mask = torch.ones_like(double.texts)
    mask[0] = 0
    logits = double(double.texts, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    assert_same(logits[1:], double(double.texts[1:]).logits)


def test_learned_positions_with_left_padding(make_karla, remember, random_ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    backbone = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4)).eval()
    karla, ids = make_karla(backbone).double(), random_ids(1, 20)
    remember(karla, ids)
    padded, mask = torch.nn.functional.pad(ids, (5, 0)), torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = karla(padded, attention_mask=mask, position_ids=positions).logits
    assert_same(together[:, 5:], karla(ids).logits)
    assert_same(feed(karla, ids, [6, 1, 13]), karla(ids).logits)


def test_no_cache_is_made_unless_asked_for(karla):
    assert karla(karla.texts, use_cache=False).past_key_values is None
    cache = karla(karla.texts).past_key_values
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == 40
    assert len(cache.layers) == 4
    assert isinstance(cache.layers[-1], KarlaCacheLayer)


def test_cache_keeps_no_more_than_the_reach(karla):
    cache = DynamicCache()
    feed(karla, karla.texts, [40], cache)
    layer = cache.layers[-1]
    assert layer.seen == 40
    assert layer.values.shape == (3, 23 + 8)
    assert layer.keys.shape[3] == 23 + 8


@pytest.mark.parametrize("pieces", [[LENGTH], [20] + [1] * 16])
@pytest.mark.parametrize("removed", [0, 1, 5, 8])
def test_cropped_cache_continues_as_if_nothing_had_been_there(double, removed, pieces):
    cache = DynamicCache()
    feed(double, double.texts, pieces, cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == LENGTH - removed
    other = double.texts.flip(1)[:, : removed + 2]
    ids = torch.cat([double.texts[:, : LENGTH - removed], other], dim=1)
    assert_same(feed(double, other, [1] * (removed + 2), cache), double(ids).logits[:, LENGTH - removed :])


@pytest.mark.parametrize("seen", [3, 8])
def test_short_cache_can_be_cropped_to_its_beginning(double, seen):
    cache = DynamicCache()
    feed(double, double.texts[:, :seen], [seen], cache)
    cache.crop(-(seen - 1))
    ids = torch.cat([double.texts[:, :1], double.texts[:, 9:12]], dim=1)
    assert_same(feed(double, double.texts[:, 9:12], [1, 2], cache), double(ids).logits[:, 1:])


def test_crop_beyond_the_slack_is_refused(karla):
    cache = DynamicCache()
    feed(karla, karla.texts, [40], cache)
    with pytest.raises(
        ValueError, match=r"^crop got -9, but Karla's cache can take back at most 8 tokens of the 40 seen"
    ):
        cache.layers[-1].crop(-9)
    with pytest.raises(ValueError, match=r"^crop got 3; give minus the number of tokens to remove\.$"):
        cache.layers[-1].crop(3)


def test_slack_is_used_up_by_crops_and_renewed_by_tokens(double):
    cache = DynamicCache()
    feed(double, double.texts, [LENGTH], cache)
    cache.crop(-8)
    with pytest.raises(ValueError, match="can take back at most"):
        cache.layers[-1].crop(-1)
    feed(double, double.texts[:, -8:], [8], cache)
    cache.crop(-8)
    assert_same(feed(double, double.texts[:, -8:], [8], cache), double(double.texts).logits[:, -8:])


def test_cache_of_the_bare_backbone_is_refused(karla):
    cache = karla.model.backbone(karla.texts, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"^past_key_values holds 40 positions but no Karla layer; give a cache that this"
    ):
        karla(karla.texts[:, :1], past_key_values=cache)


def test_batch_operations_reach_every_layer(double):
    cache = DynamicCache()
    feed(double, double.texts[:, :20], [20], cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    ids = torch.cat([double.texts[order, :20], double.texts[:, 20:]], dim=1)
    assert_same(feed(double, ids[:, 20:24], [1, 3], cache), double(ids[:, :24]).logits[:, 20:])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 1]))
    ids = ids[[2, 0]]
    assert_same(feed(double, ids[:, 24:], [12], cache), double(ids).logits[:, 24:])


def test_reset_cache_starts_again(double):
    cache = StaticCache(config=double.config.get_text_config(), max_cache_len=LENGTH)
    feed(double, double.texts.flip(1), [LENGTH], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same(feed(double, double.texts, [5, LENGTH - 5], cache), double(double.texts).logits)


def test_copied_cache_goes_its_own_way(double):
    cache = DynamicCache()
    feed(double, double.texts[:, :10], [10], cache)
    twin = copy.deepcopy(cache)
    feed(double, double.texts[:, 20:25], [5], twin)
    assert_same(feed(double, double.texts[:, 10:], [26], cache), double(double.texts).logits[:, 10:])


def test_memory_read_between_two_calls_counts_at_once(double, remember, random_ids):
    """Addresses are in the cache, not what was read through them."""
    ids, cache = random_ids(1, LENGTH), DynamicCache()
    feed(double, ids[:, :20], [20], cache)
    remember(double, ids, pack="new")
    assert_same(feed(double, ids[:, 20:], [1] * 16, cache), double(ids).logits[:, 20:])


def test_layer_with_no_reach_keeps_its_slack_only():
    layer = KarlaCacheLayer(keep=0, slack=2)
    for step in range(4):
        keys, ids = layer.update(torch.full((1, 2, 1, 1, 1, 1), float(step)), torch.tensor([[step]]))
        assert ids.tolist() == [[step]]
        assert keys.flatten().tolist() == [step, step]
    assert layer.values.tolist() == [[2, 3]]
    assert (layer.get_seq_length(), layer.get_mask_sizes(3), layer.get_max_length()) == (4, (7, 0), -1)


def test_layer_is_appended_once():
    cache = DynamicCache()
    first = karla_layer(cache, keep=3, slack=1)
    assert karla_layer(cache, keep=3, slack=1, past=9) is first


class Plain(KarlaCacheLayer):
    """The same, made of copies."""

    def _followed_by(self, new):
        return torch.cat([self.keys, new], dim=3), None


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad])
def test_layer_with_room_equals_one_made_of_copies(inference):
    ours, theirs, held = KarlaCacheLayer(5, 4), Plain(5, 4), []
    with inference():
        for step in range(200):
            count = 9 if step % 67 == 66 else 1 + (step % 23 == 7)
            new = torch.randn(2, 2, 1, count, 3, 2), torch.randint(9, (2, count))
            seen, wanted = ours.update(*new), theirs.update(*new)
            held.append((seen[0], wanted[0]))
            assert torch.equal(seen[1], wanted[1])
            for layer in (ours, theirs):
                if step % 31 == 30:
                    layer.crop(-2)
                if step % 41 == 40:
                    layer.reorder_cache(torch.tensor([1, 0]))
                if step == 120:
                    layer.reset()
        assert all(torch.equal(seen, wanted) for seen, wanted in held)  # also long after they were returned


@torch.no_grad()
def test_copies_of_a_layer_part_ways():
    layer = KarlaCacheLayer(5, 4)
    for _ in range(3):
        layer.update(torch.randn(1, 2, 1, 1, 3, 2), torch.zeros(1, 1, dtype=torch.int64))
    others = [copy.copy(layer), copy.deepcopy(layer), layer.part(slice(0, 1))]
    for number, one in enumerate([layer, *others]):
        one.update(torch.full((1, 2, 1, 1, 3, 2), float(number)), torch.zeros(1, 1, dtype=torch.int64))
    assert [one.keys[0, 0, 0, -1, 0, 0].item() for one in [layer, *others]] == [0, 1, 2, 3]
    assert all(torch.equal(one.keys[:, :, :, :-1], layer.keys[:, :, :, :-1]) for one in others)


def test_room_made_in_inference_mode_is_left_outside():
    layer, new = KarlaCacheLayer(5, 4), (torch.ones(1, 2, 1, 1, 3, 2), torch.zeros(1, 1, dtype=torch.int64))
    with torch.inference_mode():
        for _ in range(3):
            layer.update(*new)
    with torch.no_grad():
        assert torch.equal(layer.update(*new)[0], torch.ones(1, 2, 1, 4, 3, 2))
