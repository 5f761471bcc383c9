"""Decoding: pieces equal the whole, generate() in all its ways, a state of constant size, and sessions."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_hope import CHUNK, in_pieces, make_hope, tokens
from transformers import DynamicCache, GenerationConfig

from karla_hf.modeling.cache_hope import HopeCache


CONTEXTS = ("none", "lagged", "causal")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate(model, ids, count=12, **options):
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=count, **{**GREEDY, **options})


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cuts", [[CHUNK], [3, 5, 20], [20, 21, 22, 23], list(range(1, 45))], ids=len)
def test_pieces_equal_the_whole(context, cuts):
    model, ids = make_hope(encoder_context=context), tokens()
    pieces, cache = in_pieces(model, ids, cuts)
    whole = model(ids)
    torch.testing.assert_close(pieces, whole.logits, rtol=0, atol=1e-11)
    for name, tensor in whole.past_key_values.tensors().items():
        torch.testing.assert_close(cache.tensors()[name], tensor, rtol=0, atol=1e-11)


@pytest.mark.parametrize("context", CONTEXTS)
def test_padded_pieces_equal_each_sequence_alone(context):
    """Sequences that stand at different places of their chunks, in pieces of all lengths."""
    model, ids = make_hope(encoder_context=context), tokens(3, 45)
    lengths = (45, 38, 20)
    padded, mask = torch.full((3, 45), 4), torch.zeros(3, 45, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padded[row, 45 - length :], mask[row, 45 - length :] = ids[row, :length], 1
    pieces, cache = in_pieces(model, padded, [10, 30, 31, 32], mask)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(pieces[row, 45 - length :], alone, rtol=0, atol=1e-11)
    assert cache.positions.tolist() == list(lengths)
    assert cache.get_seq_length() == 45


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_with_cache_equals_without(context, options):
    model, ids = make_hope(encoder_context=context), tokens(2, 2 * CHUNK - 3)
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_left_padded_batch_equals_single(options):
    model, ids = make_hope(), tokens(3, 20)
    padded, mask = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 20, dtype=torch.int64)
    for row, length in enumerate((20, 13, 5)):
        padded[row, 20 - length :], mask[row, 20 - length :] = ids[row, :length], 1
    together = generate(model, padded, attention_mask=mask, **options)
    for row, length in enumerate((20, 13, 5)):
        assert torch.equal(together[row, 20:], generate(model, ids[row : row + 1, :length], **options)[0, length:])


def test_generation_goes_on_from_a_returned_cache():
    model, ids = make_hope(), tokens(2, 11)
    whole = generate(model, ids, 20)
    first = generate(model, ids, 9, return_dict_in_generate=True)
    again = generate(model, first.sequences, 11, past_key_values=first.past_key_values)
    assert torch.equal(again, whole)


def test_several_sequences_of_one_prompt():
    model, ids = make_hope(), tokens(1, 11)
    out = generate(model, ids, num_beams=3, num_return_sequences=3)
    assert out.shape == (3, 23)
    assert torch.equal(out[:1], generate(model, ids, num_beams=3))


def test_a_cache_can_be_repeated_and_selected():
    model, ids = make_hope(), tokens(2, 21)
    cache = model(ids[:, :13]).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    out = model(ids[[1, 0], 13:], past_key_values=cache).logits
    torch.testing.assert_close(out, model(ids).logits[[1, 0], 13:], rtol=0, atol=1e-11)


@torch.no_grad()
def test_state_has_a_constant_size_and_is_not_modified_in_place():
    model, ids = make_hope(), tokens(1, 100)
    cache = model(ids[:, :1]).past_key_values
    size, copied = cache.num_bytes, copy.deepcopy(cache)
    held = dict(cache.tensors())
    kept = {name: tensor.clone() for name, tensor in held.items()}
    model(ids[:, 1:90], past_key_values=cache)
    model(ids[:, 90:91], past_key_values=cache)
    assert cache.num_bytes == size
    assert all(torch.equal(held[name], tensor) for name, tensor in kept.items())
    assert copied.get_seq_length() == 1
    cache.reset()
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_default_state_is_within_20_megabytes():
    from karla_hf import HopeConfig, HopeForCausalLM

    encoder = {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 1,
        "vocab_size": 10,
        "intermediate_size": 8,
    }
    model = HopeForCausalLM(HopeConfig(encoder_config=encoder, level_sizes=[1], level_periods=[1])).eval()
    with torch.no_grad():
        cache = model(torch.ones(1, 2, dtype=torch.int64)).past_key_values
    assert len(cache.layers) == 32
    assert 19e6 < cache.num_bytes <= 20e6


def test_in_context_levels_change_only_when_due():
    """The heads' snapshots, in the cache, change at multiples of their periods, whatever the pieces."""
    model, ids = make_hope(torch.float32), tokens(1, 48)
    periods, cache, before, at = model.config.head_periods, HopeCache(3), None, 0
    assert periods == [8, 8, 16, 16]
    for count in (1, 6, 1, 1, 7, 1, 16, 15):
        model(ids[:, at : at + count], past_key_values=cache)
        due = [any(t and t % period == 0 for t in range(at, at + count)) for period in periods]
        for number, layer in enumerate(cache.layers):
            if before is not None:
                changed = [not torch.equal(a, b) for a, b in zip(layer.fast.snapshot, before[number], strict=True)]
                assert changed == due
        before, at = [layer.fast.snapshot for layer in cache.layers], at + count


def test_session_is_restored(tmp_path):
    model, ids = make_hope(), tokens(2, 30)
    cache = model(ids[:, :13]).past_key_values
    model.save_session(cache, tmp_path / "talk.safetensors")
    restored = model.load_session(tmp_path / "talk.safetensors")
    expected = model(ids[:, 13:], past_key_values=cache).logits
    assert torch.equal(model(ids[:, 13:], past_key_values=restored).logits, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]


def test_wrong_sessions_are_named(tmp_path):
    model, ids = make_hope(), tokens(2, 30)
    path = tmp_path / "talk.safetensors"
    with pytest.raises(ValueError, match="The cache has seen no token"):
        model.save_session(HopeCache(3), path)
    with pytest.raises(OSError, match="cannot be read"):
        model.load_session(path)
    model.save_session(model(ids).past_key_values, path)
    tensors = load_file(path)
    other = make_hope()
    other.model.out.weight.data += 1
    with pytest.raises(ValueError, match="of a model with other weights"):
        other.load_session(path)
    metadata = {"seen": "30", **model._fingerprint()}
    save_file({**tensors, "layers.1.running": torch.zeros(1, 2, 3)}, path, metadata)
    with pytest.raises(ValueError, match=r"layers.1.running \(1, 2, 3\), but this model's is \(8, 20, 6\)"):
        model.load_session(path)
    save_file({**tensors, "more": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"has more \(1,\), but this model's is None"):
        model.load_session(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match="cannot be read"):
        model.load_session(path)


def test_what_cannot_be_done_is_named():
    model, ids = make_hope(torch.float32), tokens()
    cache = model(ids).past_key_values
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="holds fast weights, not keys and values"):
        cache.layers[0].update(ids, ids)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, but input_ids has 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        model.generate(ids, generation_config=GenerationConfig(cache_implementation="static", max_new_tokens=1))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=2)
