"""Reading and forgetting with the whole model."""

import pytest
import torch
from transformers import AutoTokenizer

from karla_hf import KarlaForCausalLM, ReadReport
from karla_hf.modeling.memory_karla import tokenizer_hash


def logits(karla, ids):
    with torch.no_grad():
        return karla(ids).logits


def packs_of(karla) -> dict[str, list]:
    """Everything that the packs hold."""
    return {
        name: [
            pack.clock.step,
            pack.tokens,
            *((table.names.tobytes(), table.rows.tobytes()) for level in pack.levels for table in level.tables),
        ]
        for name, pack in karla.engram.packs.items()
    }


def assert_same_packs(ours, theirs):
    assert list(ours) == list(theirs)
    assert ours == theirs


def test_reading_makes_a_text_likely_and_forgetting_undoes_it_exactly(make_karla, remember, random_ids):
    karla, ids = make_karla(), random_ids(3, 40)
    before = logits(karla, ids)
    report = remember(karla, ids)
    assert isinstance(report, ReadReport)
    assert (report.texts, report.tokens) == (3, 120)
    assert report.surprise_after < 1 < 4 < report.surprise_before
    assert not torch.equal(logits(karla, ids), before)
    karla.forget("default")
    assert karla.packs() == {}
    assert torch.equal(logits(karla, ids), before)


@pytest.mark.parametrize("forgotten", ["a", "b", "c"])
def test_packs_stack_and_leave_one_by_one(make_karla, remember, random_ids, forgotten):
    texts = {name: random_ids(2, 20) for name in ("a", "b", "c")}
    karla = make_karla()
    for name, ids in texts.items():
        remember(karla, ids, pack=name)
    assert karla.packs() == {name: pack.num_owned for name, pack in karla.engram.packs.items()}
    assert list(karla.packs()) == ["a", "b", "c"]
    kept = packs_of(karla)
    karla.forget(forgotten)
    del kept[forgotten]
    assert_same_packs(packs_of(karla), kept)
    for name in kept:
        assert remember(karla, texts[name], pack="check").surprise_before < 1.5


def test_packs_of_different_texts_add_up(make_karla, remember, random_ids):
    """On text that only one of two packs knows, both read as that one alone."""
    texts, karla = random_ids(2, 30), make_karla(speaks=False, engram_rows_per_head=20011)
    remember(karla, texts[:1], pack="a")
    alone = logits(karla, texts[:1])
    remember(karla, texts[1:], pack="b")
    assert torch.equal(logits(karla, texts[:1]), alone)


def test_unread_text_keeps_its_logits_exactly(make_karla, remember, random_ids):
    karla = make_karla(engram_rows_per_head=20011)
    read, unread = random_ids(2, 40), random_ids(2, 40)
    before = logits(karla, unread)
    remember(karla, read)
    assert torch.equal(logits(karla, unread), before)


def test_reading_again_changes_little_and_claims_nothing(karla, remember):
    rows = karla.packs()
    again = remember(karla, karla.texts)
    assert again.rows_written == 0
    assert karla.packs() == rows
    assert again.surprise_before < 1


def test_several_readings_extend_a_pack(make_karla, remember, random_ids):
    karla, texts = make_karla(engram_rows_per_head=20011), random_ids(2, 30)
    first = remember(karla, texts[:1])
    second = remember(karla, texts[1:])
    assert karla.packs() == {"default": first.rows_written + second.rows_written}
    assert remember(karla, texts).rows_written == 0


def test_one_text_may_be_given_as_a_string(make_karla, tokenizer, words, random_ids):
    karla, other, text = make_karla(), None, words(random_ids(1, 20)[0])
    other = KarlaForCausalLM(karla.config)
    other.load_state_dict(karla.state_dict())
    other.use_tokenizer(tokenizer)
    karla.read(text, tokenizer, progress=False)
    other.read([text], tokenizer, progress=False)
    assert_same_packs(packs_of(karla), packs_of(other))


def test_texts_may_come_from_a_generator(make_karla, tokenizer, words, random_ids):
    karla, ids = make_karla(), random_ids(3, 10)
    assert karla.read((words(row) for row in ids), tokenizer, progress=False).texts == 3


def test_reading_is_the_same_every_time(make_karla, tokenizer, remember, random_ids):
    karla, ids = make_karla(), random_ids(3, 50)
    remember(karla, ids)
    first = packs_of(karla)
    karla.forget("default")
    remember(karla, ids)
    assert_same_packs(packs_of(karla), first)


def test_reading_changes_neither_backbone_nor_head_nor_mode(karla, remember, random_ids):
    before = {name: tensor.clone() for name, tensor in karla.state_dict().items()}
    for mode in (True, False):
        karla.train(mode)
        remember(karla, random_ids(1, 20), pack="more")
        assert karla.training is mode
        assert not karla.model.backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in karla.state_dict().items())
    assert all(parameter.grad is None for parameter in karla.parameters())


def test_head_has_no_part_in_reading(make_karla, remember, random_ids):
    """The memory is written at the backbone's own states, so that it stays right when the head is trained on."""
    karla, ids = make_karla(speaks=False), random_ids(2, 30)
    remember(karla, ids, pack="silent")
    torch.nn.init.normal_(karla.model.ctm.up.weight)
    silent = packs_of(karla).pop("silent")
    karla.forget("silent")
    remember(karla, ids, pack="speaking")
    assert packs_of(karla)["speaking"] == silent


def test_memory_can_be_switched_off_and_on(karla):
    remembered = logits(karla, karla.texts)
    karla.use_memory(False)
    off = logits(karla, karla.texts)
    karla.use_memory(True)
    assert torch.equal(logits(karla, karla.texts), remembered)
    karla.forget("default")
    assert torch.equal(logits(karla, karla.texts), off)


def test_compressed_words_are_remembered_alike(make_karla, remember):
    """`W5` recalls what was read after `w5`."""
    karla, ids = make_karla(speaks=False), torch.arange(10, 30)[None]
    remember(karla, ids)
    upper = ids + 200
    token_map = karla.engram.constants.token_map
    assert torch.equal(token_map[ids], token_map[upper])
    moved = []
    for text in (ids, upper):
        karla.use_memory(False)
        without = karla.model(text).last_hidden_state
        karla.use_memory(True)
        moved.append(karla.model(text).last_hidden_state - without)
    assert moved[0][:, 3:-1].any(-1).all()
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-4)


def test_closed_book_reading_stores_what_open_book_reading_knows_already(make_karla, tokenizer, words, random_ids):
    """A long window shows the backbone more; without any knowledge of its own it learns as much from both."""
    karla, text = make_karla(), words(random_ids(1, 100)[0])
    for context in ("closed", "open"):
        report = karla.read(text, tokenizer, pack=context, context=context, progress=False)
        assert report.surprise_after < 1
    assert set(karla.packs()) == {"closed", "open"}


def test_rows_live_outside_parameters_and_buffers(karla):
    assert not any("engram" in name or name.startswith("model.memory") for name, _ in karla.named_parameters())
    assert not any(key.startswith("model.memory") for key in karla.state_dict())
    before, tables = packs_of(karla), [level.tables[0] for level in karla.engram.packs["default"].levels]
    karla.to(torch.bfloat16)
    assert [level.tables[0] for level in karla.engram.packs["default"].levels] == tables
    assert packs_of(karla) == before


def test_unlearning_makes_a_text_unlikely_and_no_other(make_karla, tokenizer, words, remember, random_ids):
    karla, texts = make_karla(speaks=False), random_ids(2, 40)
    remember(karla, texts[:1], pack="kept")
    remember(karla, texts[1:])
    kept, packs = logits(karla, texts[:1]), packs_of(karla)
    report = karla.read(words(texts[1]), tokenizer, sign=-1, progress=False)
    assert report.positions_written > 30
    assert report.surprise_before < 1 < 2 < report.surprise_after
    assert torch.equal(logits(karla, texts[:1]), kept)
    assert packs_of(karla)["kept"] == packs["kept"]
    assert remember(karla, texts[1:], pack="look").surprise_before > 2


def test_full_memory_says_so_in_its_report(make_karla, remember, random_ids):
    karla, texts = make_karla(engram_max_rows=40, engram_update_periods=[1]), random_ids(2, 40)
    report = remember(karla, texts)
    assert karla.packs() == {"default": report.rows_written}
    assert 30 < report.rows_written <= 40
    assert report.rows_lost > 50


REFUSED = {
    "no text": ([], {}, ValueError, r"^There is no text to read; give at least one\.$"),
    "empty text": ([""], {}, ValueError, r"^Text 0 \(''\) has 0 tokens; reading needs 2 or more\.$"),
    "one token": ("w5", {}, ValueError, r"^Text 0 \('w5'\) has 1 tokens; reading needs 2 or more\.$"),
    "one of several": (
        ["w5 w6 w7", "w8"],
        {},
        ValueError,
        r"^Text 1 \('w8'\) has 1 tokens; reading needs 2 or more\.$",
    ),
    "other context": (
        ["w5 w6"],
        {"context": "half"},
        ValueError,
        r"^context is 'half'; give one of \['closed', 'open'\]",
    ),
    "other sign": (
        ["w5 w6"],
        {"sign": 0},
        ValueError,
        r"^sign is 0; give 1 to learn the texts or -1 to unlearn them\.$",
    ),
    "bad pack name": (["w5 w6"], {"pack": "a/b"}, ValueError, r"^The pack name 'a/b' is not allowed; use letters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_reading_writes_nothing(karla, tokenizer, case):
    texts, options, error, sentence = REFUSED[case]
    before = packs_of(karla)
    with pytest.raises(error, match=sentence):
        karla.read(texts, tokenizer, **{"pack": "new", "progress": False, **options})
    assert_same_packs(packs_of(karla), before)


def test_tokenizer_with_another_vocabulary_is_refused(karla, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    same, other = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    other.add_tokens(["new"])
    assert tokenizer_hash(same) == karla.tokenizer_sha256 != tokenizer_hash(other)
    before = packs_of(karla)
    with pytest.raises(
        ValueError, match=r"^The tokenizer .* has another vocabulary than the one that this memory was"
    ):
        karla.read("w5 w6 w7", other, progress=False)
    assert_same_packs(packs_of(karla), before)
    karla.read("w5 w6 w7", same, progress=False)


def test_unknown_pack_cannot_be_forgotten(karla):
    with pytest.raises(KeyError, match=r"There is no pack 'x'; the packs are \['default'\]\."):
        karla.forget("x")
    assert list(karla.packs()) == ["default"]


def test_new_tokenizer_makes_a_new_memory(karla, tokenizer):
    karla.use_tokenizer(tokenizer)
    assert karla.packs() == {}


def test_without_a_tokenizer_every_token_stands_for_itself(make_backbone, tokenizer):
    karla = KarlaForCausalLM.from_backbone(make_backbone(), engram_rows_per_head=500)
    assert karla.tokenizer_sha256 is None
    assert torch.equal(karla.engram.constants.token_map, torch.arange(300))
    assert karla.read("w5 w6 w7 w8 w9 w10", tokenizer, progress=False).positions_written > 0


def test_masked_tokens_are_no_part_of_an_address(karla):
    ids, mask = karla.texts[:1].clone(), torch.ones(1, 40, dtype=torch.int64)
    mask[0, :10] = 0
    changed = ids.clone()
    changed[0, :10] = 7
    assert torch.equal(
        karla(ids, attention_mask=mask).logits[:, 10:], karla(changed, attention_mask=mask).logits[:, 10:]
    )
