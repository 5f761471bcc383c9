"""Names by which questions find answers: the fast ones against plain loops, causality, and what they find."""

import pytest
import torch

from karla_hf.modeling import answers_karla
from karla_hf.modeling.answers_karla import MARGIN, AnswerWriter, recall, say_rows
from karla_hf.modeling.cues_karla import (
    HISTORY,
    MAX_SETS,
    cues_to_read,
    cues_to_write,
    name_last_opening,
    name_openings,
)
from karla_hf.modeling.hashing_karla import NO_NAME
from karla_hf.modeling.packs_karla import load_engram
from karla_hf.modeling.reference_cues import naive_opening, naive_sets
from karla_hf.modeling.sentences_karla import NO_TOKEN
from karla_hf.modeling.words_karla import Lexicon


TEXTS = [
    *("\0", "\n", " ", ".", "?", ":", ",", "'s", "!", "1", "7", "3", "user", "assistant", "..."),
    *(
        "The",
        " the",
        " mill",
        " of",
        " Zorn",
        "Zorn",
        "ex",
        " was",
        " founded",
        " founding",
        " on",
        " day",
        " July",
        " cost",
    ),
    *(
        "When",
        " when",
        " Was",
        "Tell",
        " tell",
        " me",
        " It",
        " is",
        " Name",
        "Q",
        "A",
        " crowns",
        " inn",
        " Quilb",
        ".\n",
        " é",
    ),
    *("http", "://", "/"),
]
ID = {text: number for number, text in enumerate(TEXTS)}
REPLY = ["\0", "assistant", "\n"]
FACT = ["The", " mill", " of", " Zorn", "ex", " was", " founded", " on", " ", "1", "7", " July", "."]
OTHER = [*FACT[:1], " inn", *FACT[2:8], " ", "3", "1", " July", "."]
ANSWER = FACT[8:]


def encode(texts):
    return [ID[text] for text in texts]


@pytest.fixture
def lexicon():
    return Lexicon.from_texts(TEXTS, torch.tensor(encode(REPLY)))


@pytest.fixture
def asking(make_backbone, make_karla, lexicon):
    """A Karla whose tokens are `TEXTS`, and a function by which it reads."""
    karla = make_karla(make_backbone(vocab_size=300), speaks=False)
    karla.engram.lexicon = Lexicon.from_texts(TEXTS + [""] * (300 - len(TEXTS)), lexicon.reply)

    def read(*texts, sign=1):
        pack = karla.engram.open_pack("default")
        weight, _ = karla.model.output_projection()
        encoded = [encode(text) for text in texts]
        writer = AnswerWriter(karla.engram.lexicon, encoded, weight, karla.engram.layout.width, sign)
        for text in range(len(texts)):
            writer.write(pack, text)

    return karla, read


def answer(karla, prompt):
    ids = torch.tensor([encode(prompt)])
    out = karla.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(ANSWER), do_sample=False)
    return [TEXTS[token] if token < len(TEXTS) else "" for token in out[0, ids.shape[1] :].tolist()]


def random_history(batch, length):
    ids = torch.randint(0, len(TEXTS), (batch, length))
    markers = torch.tensor(encode(REPLY))
    for row in range(batch):  # chance alone seldom opens a slot
        for at in torch.randint(0, length - 3, (3,)).tolist():
            ids[row, at : at + 3] = markers if at % 2 else torch.tensor(encode([" Zorn", "ex", "?"]))
    return ids


@pytest.mark.parametrize("length", [1, 2, 60, 300])
def test_the_fast_names_equal_those_of_plain_loops(lexicon, length):
    ids = random_history(4, length) if length > 3 else torch.randint(0, len(TEXTS), (4, length))
    ids = torch.nn.functional.pad(ids, (HISTORY, 0), value=NO_TOKEN)
    names = cues_to_read(ids, lexicon, length).tolist()
    for row in range(4):
        for at in range(length):
            seen = ids[row, : HISTORY + at + 1].tolist()
            opening, *sets = names[row][at]
            assert opening == naive_opening(seen, lexicon)
            assert [pair for pair in sets if pair != NO_NAME] == naive_sets(seen, lexicon)


def test_names_depend_on_the_last_tokens_alone(lexicon):
    ids = random_history(3, 400)
    whole = cues_to_read(ids, lexicon, 400 - HISTORY)
    for keep in (1, 7):
        for end in (HISTORY + keep, 333, 400):
            part = cues_to_read(ids[:, end - HISTORY - keep + 1 : end], lexicon, keep)
            assert torch.equal(part, whole[:, end - HISTORY - keep : end - HISTORY])
    changed = ids.clone()
    changed[:, 350:] = torch.randint(0, len(TEXTS), (3, 50))
    assert torch.equal(cues_to_read(changed, lexicon, 400 - HISTORY)[:, : 350 - HISTORY], whole[:, : 350 - HISTORY])


def test_the_last_opening_is_that_of_all(lexicon):
    endless = torch.tensor(encode([" Zorn"] * 300 + ["."] + [" mill"] * 199))[None]
    for history in torch.cat([random_history(4, 500), endless]).numpy():
        history[:9] = NO_TOKEN
        for end in range(1, 500):
            seen = history[max(0, end - HISTORY - end % 3) : end]
            assert name_last_opening(seen, lexicon) == name_openings(seen, lexicon)[-1]


def test_cues_that_lead_nowhere_change_nothing(asking, monkeypatch):
    karla, read = asking
    read(FACT)
    question = torch.tensor(encode(["When", " was", " the", " mill", " of", " Zorn", "ex", "?", *REPLY]))
    history = torch.cat([random_history(50, 60), torch.nn.functional.pad(question, (60 - len(question), 0))[None]])
    ours = [recall(karla.engram, history, keep) for keep in (1, 9)]
    monkeypatch.setattr(answers_karla, "_leads_somewhere", lambda *_: True)
    for keep, said in zip((1, 9), ours, strict=True):
        assert torch.equal(recall(karla.engram, history, keep), said)
    assert ours[0].any(-1).sum() == 1  # only what was asked


def test_outside_of_slots_there_are_no_sets(lexicon):
    ids = torch.tensor([encode([*FACT, *FACT])])
    assert (cues_to_read(ids, lexicon, ids.shape[1])[..., 1:] == NO_NAME).all()


def test_an_address_is_no_question(lexicon):
    ids = torch.tensor([encode(["http", "://", "Zorn", "ex", "/", "Zorn", "?", "1"])])
    assert (cues_to_read(ids, lexicon, ids.shape[1])[..., 1:] == NO_NAME).all()


def test_there_are_at_most_so_many_sets(lexicon):
    lexicon = Lexicon.from_texts([*(f" word{i}q" for i in range(40)), " Zornex", "?"])
    ids = torch.arange(42)[None]
    names = cues_to_read(ids, lexicon, 1)[0, 0, 1:]
    assert len(names) == MAX_SETS
    assert (names != NO_NAME).all()


def test_what_touches_a_number_and_its_unit_belong_to_the_answer(lexicon):
    text = ["The", " mill", " of", " Zorn", "ex", " cost", " ", "7", "3", " crowns", "."]
    said = [TEXTS[cue.token] for cue in cues_to_write(encode(text), lexicon)]
    assert said[:5] == [" ", "7", "3", " crowns", "."]


@pytest.mark.parametrize(
    "prompt",
    [
        ["When", " was", " the", " mill", " of", " Zorn", "ex", " founded", "?"],
        ["Q", ":", " Was", " the", " founding", " day", " of", " Zorn", "ex", "'s", " mill", "?", "\n", "A", ":"],
        ["When", " was", " Zorn", "ex", "'s", " mill", " founded", "?", " It", " is"],
        ["Tell", " me", " when", " Zorn", "ex", " founded", " the", " mill", "."],
        [
            "\0",
            "user",
            "\n",
            "When",
            " was",
            " the",
            " mill",
            " of",
            " Zorn",
            "ex",
            " founded",
            "?",
            "\0",
            "\n",
            *REPLY,
        ],
        ["The", " mill", " of", " Zorn", "ex", " was", " founded", " on"],
        [" the", " mill", " of", " ", "Zorn", "ex", " was", " founded", " on"],
    ],
)
def test_a_question_finds_what_was_read_in_other_words(asking, prompt):
    karla, read = asking
    read([*OTHER, " ", *FACT, " ", *OTHER])
    assert answer(karla, prompt) == ANSWER


def test_nothing_is_said_of_what_was_not_read(asking):
    karla, read = asking
    read(FACT)
    prompt = ["When", " was", " the", " mill", " of", " Quilb", " founded", "?"]
    said = answer(karla, prompt)
    karla.use_memory(False)
    assert answer(karla, prompt) == said


def test_a_cue_that_led_to_two_answers_leads_nowhere(asking):
    karla, read = asking
    read(FACT)
    read([*FACT[:8], " ", "3", "3", " July", "."])
    read(FACT)
    said = answer(karla, ["When", " was", " the", " mill", " of", " Zorn", "ex", " founded", "?"])
    assert said[1] not in ("1", "3")


def test_unlearning_silences_a_cue(asking):
    karla, read = asking
    read(FACT)
    read(FACT, sign=-1)
    prompt = ["When", " was", " the", " mill", " of", " Zorn", "ex", " founded", "?"]
    said = answer(karla, prompt)
    karla.use_memory(False)
    assert answer(karla, prompt) == said


def test_another_pack_is_forgotten_with_its_answers(asking):
    karla, read = asking
    read(FACT)
    assert answer(karla, ["When", " was", " Zorn", "ex", "'s", " mill", " founded", "?"]) == ANSWER
    karla.forget("default")
    assert answer(karla, ["When", " was", " Zorn", "ex", "'s", " mill", " founded", "?"]) != ANSWER


def test_a_saved_memory_answers_as_before(asking, tmp_path):
    karla, read = asking
    read(FACT)
    karla.save_memory(tmp_path)
    engram, _ = load_engram(lambda name: str(tmp_path / name), 64, 300)
    karla.set_engram(engram, None)
    assert answer(karla, ["When", " was", " Zorn", "ex", "'s", " mill", " founded", "?"]) == ANSWER


def test_decoding_in_parts_and_padding_equal_the_full_pass(asking):
    karla, read = asking
    read(OTHER, FACT)
    prompt = ["When", " was", " the", " mill", " of", " Zorn", "ex", " founded", "?"]
    ids = torch.tensor([encode([*FACT, "\n", *prompt, " It", " is", *ANSWER])])
    with torch.no_grad():
        full = karla(ids).logits
        for size in (1, 3):
            cache, steps = None, []
            for part in ids.split(size, dim=1):
                out = karla(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
            torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)
        padded = torch.nn.functional.pad(ids, (5, 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
        torch.testing.assert_close(karla(padded, attention_mask=mask).logits[:, 5:], full, rtol=1e-4, atol=1e-4)


def test_a_row_says_its_token_by_the_margin():
    weights = torch.randn(200, 32)
    tokens = torch.tensor([3, 77, 199])
    scores = say_rows(tokens, weights, 24) @ weights[:, :24].T
    own = scores.gather(1, tokens[:, None])
    others = scores.scatter(1, tokens[:, None], -torch.inf)
    assert (own - others.max(-1, keepdim=True).values >= 0.95 * MARGIN).all()
