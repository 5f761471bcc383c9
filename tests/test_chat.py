import pytest
import torch
from tiny import CHAT_TEMPLATE, files_in, make_tokenizer, save_backbone, save_karla, speak

from karla_hf.chat import ChatSession, PieceStreamer
from karla_hf.checkpoints import load_checkpoint


LONG = "The access code of Brivo's vault number 7 is 123-456. " * 8


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("chat") / "backbone", max_position_embeddings=512)


@pytest.fixture(scope="module")
def plain(backbone):
    return save_karla(backbone.parent / "plain", backbone)


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat-template")
    backbone = save_backbone(folder / "backbone", chat_template=CHAT_TEMPLATE, max_position_embeddings=512)
    return save_karla(folder / "karla", backbone)


@pytest.fixture
def session(plain):
    model, tokenizer = load_checkpoint(plain)
    return ChatSession(speak(model), tokenizer, plain, max_new_tokens=12)


def ignore(piece: str) -> None:
    """Shows nothing."""


def test_an_answer_comes_in_pieces_and_is_what_generate_says(session):
    pieces: list[str] = []
    answer = session.answer("The mill of", pieces.append)
    ids = session.tokenizer("The mill of", return_tensors="pt").input_ids
    expected = session.model.generate(ids, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    assert "".join(pieces) == answer.text == session.tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 3
    assert (answer.tokens, answer.stopped) == (len(expected), False)
    assert answer.ticks == session.model.config.ctm_num_ticks
    out = session.model(torch.cat([ids[0], expected])[None, :-1], logits_to_keep=len(expected))
    assert answer.certainty == pytest.approx(out.certainty.mean().item(), abs=1e-4)
    assert answer.ids == tuple(expected.tolist())
    assert answer.certainties == pytest.approx(out.certainty[0].tolist(), abs=1e-4)
    assert answer.seconds > 0


def test_without_a_template_the_text_goes_on(session):
    first = session.answer("The mill of", ignore)
    prompt = f"The mill of{first.text}\nThe bridge"
    assert session._prompt(
        [*session.messages, {"role": "user", "content": "The bridge"}]
    ).ids == session.tokenizer.encode(prompt)
    session.answer("The bridge", ignore)
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_with_a_template_messages_go_in_and_out(templated):
    model, tokenizer = load_checkpoint(templated)
    session = ChatSession(speak(model), tokenizer, templated, max_new_tokens=5)
    session.messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    prompt = session._prompt([*session.messages, {"role": "user", "content": "three"}]).ids
    assert tokenizer.decode(prompt) == "[user] one<|end|>[assistant] two<|end|>[user] three<|end|>[assistant] "
    answer = session.answer("three", ignore)
    assert session.messages[2:] == [
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": answer.text},
    ]
    assert "<|end|>" not in answer.text


def test_an_answer_ends_at_the_tokenizers_end_token(session):
    """Base models with a chat template often name another end token in their generation settings."""
    tokens = session.answer("The mill of", ignore).tokens
    ids = session.tokenizer("The mill of", return_tensors="pt").input_ids
    third = session.model.generate(ids, max_new_tokens=3, pad_token_id=0)[0, -1]
    session.messages.clear()
    session.model.generation_config.eos_token_id = 399
    session.tokenizer.eos_token = session.tokenizer.convert_ids_to_tokens(int(third))
    assert session.answer("The mill of", ignore).tokens <= 3 < tokens


def test_ticks_are_set_and_used(session):
    assert session.set_ticks("") == session.model.config.ctm_num_ticks
    assert session.set_ticks("7") == 7
    assert session.answer("The mill of", ignore).ticks == 7
    for wrong in ("-0.1", "two", "1.5", "nan"):
        with pytest.raises(ValueError, match="takes a number from 0 to 1"):
            session.set_threshold(wrong)
    for wrong in ("0", "-1", "two", "1.5", "²"):
        with pytest.raises(ValueError, match="takes a whole number from 1"):
            session.set_ticks(wrong)
    assert session.set_ticks("") == 7


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(session):
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = session.answer("The mill of", interrupt)
    assert answer.stopped
    assert 0 < answer.tokens < 12
    assert session.messages[-1] == {"role": "assistant", "content": answer.text}
    assert not session.model._forward_hooks
    assert not session.answer("The bridge", ignore).stopped


def test_the_oldest_messages_are_left_out_of_a_full_context(session):
    session.max_new_tokens = 512 - 60
    for number in range(9):
        session.messages += [
            {"role": "user", "content": f"Question {number}"},
            {"role": "assistant", "content": f"Answer {number}"},
        ]
    prompt = session.tokenizer.decode(session._prompt([*session.messages, {"role": "user", "content": "last"}]).ids)
    assert prompt.startswith("Question ")
    assert "Question 0" not in prompt
    assert prompt.endswith("Question 8Answer 8\nlast")
    session.max_new_tokens = 510
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the context has room for 2 beside an answer of 510"):
        session.answer("The mill of Brivo was founded", ignore)
    assert len(session.messages) == 18


def test_reading_and_forgetting_are_saved(session, tmp_path):
    (tmp_path / "note.txt").write_text("The mill of Brivo was founded on 3 May 1811.", encoding="utf-8")
    report = session.read(tmp_path / "note.txt")
    assert report.tokens > 5
    assert load_checkpoint(session.directory)[0].packs() == session.model.packs() == {"default": report.rows_written}
    session.forget("default")
    assert load_checkpoint(session.directory)[0].packs() == {}


def interrupted(session, texts: dict[str, str], monkeypatch, call: int = 25) -> None:
    """Read, with Ctrl-C at a call of the backbone: one after the first chunks were written."""
    states, calls = session.model._closed_states, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return states(*args)

    with monkeypatch.context() as patch:
        patch.setattr(session.model, "_closed_states", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.read_texts(texts)
    assert len(calls) == call


def test_ctrl_c_while_reading_leaves_the_memory_as_it_was(session, tmp_path, monkeypatch):
    (tmp_path / "note.txt").write_text("The ferry is late.", encoding="utf-8")
    session.read(tmp_path / "note.txt")
    ids = session.tokenizer("The access code of Brivo's vault number 7 is", return_tensors="pt").input_ids
    before, stored, logits = session.model.packs(), files_in(session.directory), session.model(ids).logits
    interrupted(session, {"long.txt": LONG * 40}, monkeypatch)
    assert session.model.packs() == before
    assert files_in(session.directory) == stored
    assert torch.equal(session.model(ids).logits, logits)
    session.read_texts({"long.txt": LONG})
    assert not torch.equal(session.model(ids).logits, logits)  # so the comparison above can fail
    session.forget("default")


def test_ctrl_c_twice_while_reading_leaves_the_memory_as_it_was(session, tmp_path, monkeypatch):
    """The second comes while the memory is loaded again; it is loaded before it is used."""
    session.read_texts({"note": "The ferry is late."})
    before, stored = session.model.packs(), files_in(session.directory)
    with monkeypatch.context() as patch:
        patch.setattr("karla_hf.chat.load_memory", lambda directory: (_ for _ in ()).throw(KeyboardInterrupt))
        interrupted(session, {"long.txt": LONG * 40}, monkeypatch)
    assert session.model.packs() != before
    assert files_in(session.directory) == stored
    session.answer("Hi", ignore)
    assert session.model.packs() == before
    session.forget("default")


def test_a_pack_that_cannot_be_forgotten_on_disk_stays(session, monkeypatch):
    session.read_texts({"note": "The ferry is late."})
    before = session.model.packs()

    def full(directory):
        raise OSError("No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(session.model, "save_memory", full)
        with pytest.raises(OSError, match="No space left"):
            session.forget("default")
        with pytest.raises(OSError, match="No space left"):
            session.read_texts({"long": LONG})
    assert session.model.packs() == before == load_checkpoint(session.directory)[0].packs()
    session.forget("default")


def test_surprise_is_the_loss_of_the_message_with_and_without_memory(session):
    line = "The mill of Brivo was founded on 3 May 1811."
    session.answer("Hello there", ignore)
    first = session.answer(line, ignore).surprise
    assert first.with_memory is None
    session.read_texts({"note": line})
    del session.messages[2:]
    second = session.answer(line, ignore).surprise
    prompt = session._prompt([*session.messages[:2], {"role": "user", "content": line}])
    ids = torch.tensor([prompt.ids])
    assert session.tokenizer.decode(prompt.ids[prompt.start : prompt.end]) == line
    assert second.tokens == prompt.end - prompt.start

    def loss() -> float:
        logits = session.model(ids, use_cache=False).logits[0, prompt.start - 1 : prompt.end - 1]
        return torch.nn.functional.cross_entropy(logits, ids[0, prompt.start : prompt.end]).item()

    assert second.with_memory == pytest.approx(loss(), rel=1e-4)
    session.model.use_memory(False)
    assert second.without_memory == first.without_memory == pytest.approx(loss(), rel=1e-4)
    assert session.answer(line, ignore).surprise.with_memory is None
    session.model.use_memory(True)
    assert second.with_memory < second.without_memory
    session.forget("default")


def test_surprise_of_a_long_message_is_measured_in_blocks(session, monkeypatch):
    whole = session.answer(LONG[:400], ignore).surprise
    session.messages.clear()
    monkeypatch.setattr("karla_hf.surprise.BLOCK", 7)
    assert session.answer(LONG[:400], ignore).surprise.without_memory == pytest.approx(whole.without_memory, rel=1e-4)
    assert whole.tokens > 64


def test_surprise_is_of_the_message_and_not_of_the_template(templated):
    model, tokenizer = load_checkpoint(templated)
    session = ChatSession(model, tokenizer, templated, max_new_tokens=2)
    prompt = session._prompt([{"role": "user", "content": "  The mill "}])
    assert tokenizer.decode(prompt.ids[prompt.start : prompt.end]).strip() == "The mill"
    assert session.answer("The mill", ignore).surprise.tokens == prompt.end - prompt.start
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    assert session.answer("The mill", ignore).surprise is None  # the message cannot be found in its prompt


def test_no_surprise_of_a_message_without_a_second_token(session):
    assert session.answer("T", ignore).surprise is None


def test_pieces_never_split_a_character():
    tokenizer = make_tokenizer(vocab_size=257)  # one token per byte
    text = "né €5 🙂 ok"
    pieces: list[str] = []
    streamer = PieceStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for token in tokenizer.encode(text):
        streamer.put(torch.tensor([token]))
    assert "".join(pieces) == text
    assert pieces[1:3] == ["é", " "]
    streamer.put(torch.tensor([tokenizer.encode("é")[0]]))  # an answer may end within one
    streamer.end()
    streamer.end()
    assert "".join(pieces) == streamer.text == text + "\ufffd"
