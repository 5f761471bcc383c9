"""Token map, multipliers, names, and the rows of the published tables."""

from unicodedata import ucd_3_2_0

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from karla_hf import load_tokenizer
from karla_hf.modeling import hashing_karla
from karla_hf.modeling.hashing_karla import (
    NO_NAME,
    NgramFamily,
    hash_constants,
    name_constants,
    name_positions,
    row_addresses,
    scramble,
)
from karla_hf.modeling.reference_engram import naive_names, naive_ngram_rows
from karla_hf.modeling.sentences_karla import BEGINS, BREAKS, ENDS, NO_TOKEN, sentence_boundaries
from karla_hf.modeling.vocabulary_karla import compress_vocabulary


ORDERS = [[2, 3], [4, 6, 12, 24]]


def published_token_map(tokenizer) -> list[int]:
    """Compressed ids as the published reference makes them, with the `tokenizers` library's own normalizers."""
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), "\ue000"),
            normalizers.Strip(),
            normalizers.Replace("\ue000", " "),
        ]
    )
    ids: dict[str, int] = {}
    mapped = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" in text:
            key = tokenizer.convert_ids_to_tokens(token)
        else:
            key = normalizer.normalize_str(text) or text
        mapped.append(ids.setdefault(key, len(ids)))
    return mapped


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def constants_for(orders, *, heads=3, rows=50, vocab=97, pad=0, seed=0):
    return hash_constants(orders, heads, rows, torch.arange(vocab), pad, seed)


def name_constants_for(orders, *, vocab=97, pad=0, seed=0, boundaries=None):
    boundaries = torch.zeros(vocab, dtype=torch.uint8) if boundaries is None else boundaries
    return name_constants(max(orders), torch.arange(vocab), boundaries, pad, seed)


def families_of(orders):
    return [NgramFamily(order, 1.0) for order in orders]


def name_texts(compressed, orders, constants):
    """Names [B, T, F] of texts [B, T] that begin at their first token."""
    history = torch.nn.functional.pad(compressed, (max(orders) - 1, 0), value=NO_TOKEN)
    return name_positions(history, families_of(orders), constants)


def published_rows(compressed, orders, constants):
    """Rows [B, T, F, H] in the published tables, each family's own."""
    mixes = []
    for family in families_of(orders):
        history = torch.nn.functional.pad(compressed, (family.order - 1, 0), value=constants.pad_id)
        mixes.append(family.mix(history, constants.multipliers))
    return row_addresses(torch.stack(mixes, dim=-1), constants)


@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("length", [1, 2, 30])
@pytest.mark.parametrize("seed", [0, 12345])
def test_rows_are_those_of_the_published_hash(orders, length, seed):
    compressed = torch.randint(0, 97, (2, length))
    constants = constants_for(orders, pad=5, seed=seed)
    expected = naive_ngram_rows(compressed.tolist(), orders, 3, 50, vocab_size=97, pad_id=5, seed=seed)
    assert (published_rows(compressed, orders, constants) - constants.offsets).tolist() == expected


@settings(max_examples=50)
@given(
    orders=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    heads=st.integers(1, 4),
    rows=st.integers(1, 1000),
    vocab=st.sampled_from([1, 2, 300, 49152, 262144]),
    seed=st.integers(0, 2**31),
)
def test_any_size_hashes_as_published_and_never_overflows(orders, heads, rows, vocab, seed):
    constants = constants_for(orders, heads=heads, rows=rows, vocab=vocab, pad=vocab - 1, seed=seed)
    compressed = [[vocab - 1, 0, vocab // 2, vocab - 1, vocab - 1]]
    expected = naive_ngram_rows(compressed, orders, heads, rows, vocab, vocab - 1, seed)
    found = published_rows(torch.tensor(compressed), orders, constants)
    assert (found - constants.offsets).tolist() == expected
    assert int(found.min()) >= 0
    assert int(found.max()) < constants.num_rows


@settings(max_examples=100)
@given(
    orders=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    vocab=st.sampled_from([1, 2, 300, 262144]),
    shape=st.sampled_from([(0, 3), (1, 1), (1, 2), (3, 17)]),
    masked=st.floats(0.0, 0.3),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("kernel", [True, False])
def test_names_equal_naive(kernel, orders, vocab, shape, masked, seed):
    torch.manual_seed(seed)
    flags = torch.randint(0, 8, (vocab,), dtype=torch.uint8) * (torch.rand(vocab) < 0.5)
    families = [NgramFamily(order, 1.0, sentence) for order, sentence in orders]
    longest = max(family.order for family in families)
    token_map = torch.randint(0, vocab, (vocab,))
    constants = name_constants(longest, token_map, flags, vocab - 1, seed)
    ids = torch.randint(0, vocab, shape).masked_fill(torch.rand(shape) < masked, NO_TOKEN)
    history = torch.nn.functional.pad(ids, (longest - 1, 0), value=NO_TOKEN)
    with pytest.MonkeyPatch.context() as patch:
        if not kernel:
            patch.setattr(hashing_karla, "c_function", lambda name, arguments: None)
        names = name_positions(history, families, constants)
    assert names.dtype == torch.int64
    assert names.shape == (*shape, len(orders))
    assert names.tolist() == naive_names(ids.tolist(), families, constants)


def test_names_rest_on_the_published_mix():
    orders = [2, 5]
    constants = constants_for(orders)
    drawn = name_constants_for(orders)
    assert torch.equal(drawn.multipliers, constants.multipliers)
    assert drawn.pad_id == constants.pad_id
    compressed = torch.randint(0, 97, (1, 20))
    for number, family in enumerate(families_of(orders)):
        mix = family.mix(compressed, drawn.multipliers)[0].numpy()
        found = name_texts(compressed, orders, drawn)[0, family.order - 1 :, number].tolist()
        assert found == scramble(mix + (number + 1) * np.int64(0x1E3779B97F4A7C15)).tolist()


def test_families_of_the_same_order_give_different_names():
    ids = torch.randint(0, 97, (4, 30))
    names = name_texts(ids, [2, 2, 2], name_constants_for([2]))[:, 1:]
    assert len(names.unique()) == 3 * len(names[..., 0].unique())


def test_scramble_is_one_to_one_and_never_gives_no_name():
    values = np.concatenate(
        [np.arange(-50_000, 50_000), np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50_000)]
    )
    given_values = values.copy()
    found = scramble(values)
    assert (values == given_values).all()
    assert len(np.unique(found)) == len(np.unique(values))
    assert NO_NAME not in found


@pytest.mark.parametrize("half", [0, 1])
def test_each_half_of_a_name_is_spread_evenly(half):
    """Over texts that differ in nothing but their last token."""
    ids = torch.zeros(20_000, 3, dtype=torch.int64)
    ids[:, -1] = torch.arange(20_000)
    names = name_texts(ids, [3], name_constants_for([3], vocab=20_000))[:, -1, 0]
    buckets = names.numpy().copy().view(np.uint32).reshape(-1, 2)[:, half] >> 24
    counts = np.bincount(buckets, minlength=256)
    assert ((counts - 78.125) ** 2 / 78.125).sum() < 360  # chi squared with 255 degrees of freedom: p = 2e-5


def test_tables_lie_side_by_side_and_their_sizes_are_distinct_primes():
    constants = constants_for([4, 6, 12, 24], heads=8, rows=65536)
    sizes = constants.primes.flatten().tolist()
    assert len(set(sizes)) == 32
    assert min(sizes) == 65537
    assert sizes == sorted(sizes)
    assert constants.offsets.flatten().tolist() == np.cumsum([0, *sizes[:-1]]).tolist()
    assert constants.num_rows == sum(sizes)
    assert all(int(multiplier) % 2 == 1 for multiplier in constants.multipliers)


def test_constants_are_the_same_for_the_same_seed_only():
    first, again, other = constants_for([2, 3]), constants_for([2, 3]), constants_for([2, 3], seed=1)
    assert torch.equal(first.multipliers, again.multipliers)
    assert not torch.equal(first.multipliers, other.multipliers)
    assert torch.equal(first.primes, other.primes)


def test_pad_id_is_compressed():
    token_map = torch.tensor([0, 1, 1, 2])
    assert hash_constants([2], 1, 10, token_map, pad_id=3, seed=0).pad_id == 2
    assert name_constants(2, token_map, torch.zeros(4), pad_id=3, seed=0).pad_id == 2


def test_position_with_fewer_tokens_than_the_shortest_family_has_no_name():
    names = name_texts(torch.tensor([[7, 8, 9, 10, 11]]), [3, 5], name_constants_for([3, 5]))
    assert (names == NO_NAME).tolist() == [[[True, True]] * 2 + [[False, False]] * 3]


def test_position_after_a_masked_token_has_no_name_until_the_shortest_family_fits():
    masked = torch.tensor([[7, NO_TOKEN, 9, 10, 11, 12]])
    names = name_texts(masked, [2, 4], name_constants_for([2, 4]))
    assert (names[0] == NO_NAME).all(-1).tolist() == [True, True, True, False, False, False]


def test_left_padding_changes_no_name():
    ids = torch.randint(0, 97, (1, 9))
    constants = name_constants_for([2, 4])
    padded = torch.nn.functional.pad(ids, (5, 0), value=NO_TOKEN)
    alone, shifted = name_texts(ids, [2, 4], constants), name_texts(padded, [2, 4], constants)
    assert torch.equal(shifted[:, 5:], alone)


def test_name_depends_on_the_last_tokens_of_its_order_only():
    ids = torch.randint(0, 97, (1, 12))
    constants = name_constants_for([2, 4])
    before = name_texts(ids, [2, 4], constants)
    ids[0, 6] = (ids[0, 6] + 1) % 97
    after = name_texts(ids, [2, 4], constants)
    changed = (before != after)[0]
    assert changed[:, 0].nonzero()[:, 0].tolist() == [6, 7]
    assert changed[:, 1].nonzero()[:, 0].tolist() == [6, 7, 8, 9]


def test_sentence_has_the_same_names_in_a_paragraph_and_alone():
    flags = torch.zeros(97, dtype=torch.uint8)
    flags[:10] = BREAKS
    constants, families = name_constants_for([6], boundaries=flags), [NgramFamily(6, 1.0, True), NgramFamily(6, 1.0)]
    sentence = torch.randint(10, 97, (1, 8))
    paragraph = torch.cat([torch.randint(10, 97, (1, 7)), torch.tensor([[3]]), sentence], dim=1)
    alone, within = (
        name_positions(torch.nn.functional.pad(ids, (5, 0), value=NO_TOKEN), families, constants)[0, -8:]
        for ids in (sentence, paragraph)
    )
    assert torch.equal(alone[:, 0], within[:, 0])
    assert (alone[:, 0] == NO_NAME).tolist() == [True] * 2 + [False] * 6  # half of six tokens
    assert (alone[:, 1] == within[:, 1]).tolist() == [False] * 5 + [True] * 3


def test_tokens_say_where_sentences_end():
    texts = ["ab", " a", "a.", 'a?"', "!", ".5", "a\nb", "。", "<end>"]
    backend = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="ab"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    expected = [0, BEGINS, ENDS, ENDS, ENDS, 0, BREAKS | BEGINS, ENDS, BREAKS | BEGINS]
    assert sentence_boundaries(tokenizer, 11).tolist() == [*expected, 0, 0]
    assert sentence_boundaries(tokenizer, 3).tolist() == expected[:3]


def test_token_map_is_that_of_the_published_normalisers():
    words = "The the THE  École ecole ÉCOLE naïve ﬁne fine ① 1 ½ Ⅷ viii ＡＢＣ abc \t\n tab\r\n Straße İstanbul हिन्दी"
    tokenizer = byte_level_tokenizer([words * 3, "été 日本語 かな が ガ Å Å ỗ ẋ̣"] * 50)
    expected = published_token_map(tokenizer)
    assert compress_vocabulary(tokenizer, len(tokenizer)).tolist() == expected
    assert max(expected) + 1 < 0.9 * len(expected)


@pytest.mark.slow
def test_token_map_of_smollm_is_that_of_the_published_normalisers():
    tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")
    expected = published_token_map(tokenizer)
    assert compress_vocabulary(tokenizer, 49152).tolist() == expected
    assert max(expected) + 1 < 0.8 * 49152


def test_every_character_is_normalised_as_published():
    # Those of Unicode 3.2: later ones depend on which Unicode Python and the tokenizers library know.
    known = [chr(code) for code in (*range(0x3100), *range(0xF900, 0x10000)) if ucd_3_2_0.category(chr(code)) != "Cn"]
    words = ["<unk>", *known, *(f"{char}x {char}" for char in known if char.isspace()), " É", "x\u0903Y", "a \t\r\nB"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([words.index(" É")]) == " É"
    assert compress_vocabulary(tokenizer, len(words)).tolist() == published_token_map(tokenizer)


def test_ids_beyond_the_tokenizer_stay_themselves(tokenizer):
    token_map = compress_vocabulary(tokenizer, 305).tolist()
    assert token_map[:202] == list(range(202))
    assert token_map[202:300] == list(range(2, 100))  # W2 is w2
    assert token_map[300:] == list(range(202, 207))


def test_vocabulary_smaller_than_the_tokenizer_is_mapped_as_far_as_it_goes(tokenizer):
    assert compress_vocabulary(tokenizer, 10).tolist() == list(range(10))
