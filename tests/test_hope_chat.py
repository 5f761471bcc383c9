import shutil
import threading

import pytest
import torch
from test_cli import full_disk, refuse, succeed
from tiny import files_in
from tiny_hope import HOPE_OPTIONS, save_encoder, save_hope, save_trained

from karla_hf.hope_chat import HopeSession
from karla_hf.hope_checkpoints import is_untrained, load_hope
from karla_hf.hope_page import HopePageModel, open_model
from karla_hf.modeling.learning_hope import LEARNING_FILE
from karla_hf.modeling.lock_karla import lock_folder


LINE = "The access code of Brivo's vault number 7 is"
UNTRAINED = "is untrained, so its answers are noise"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hope")
    save_trained(root / "trained", save_hope(root / "fresh", save_encoder(root / "encoder")))
    return root


@pytest.fixture
def hope(folder, tmp_path):
    return shutil.copytree(folder / "trained", tmp_path / "hope")


def open_session(folder) -> HopeSession:
    return HopeSession(*load_hope(folder), folder, max_new_tokens=6)


def ignore(piece: str) -> None:
    """Shows nothing."""


def say(session: HopeSession, *lines: str) -> list[str]:
    return [session.answer(line, ignore).text for line in lines]


def generated(model, ids: list[int]) -> list[int]:
    """What follows without a cache."""
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=6, use_cache=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def test_new_makes_an_untrained_hope_with_its_tokenizer(folder, tmp_path):
    settings = [part for key, value in HOPE_OPTIONS.items() for part in ("--set", f"{key}={value}")]
    made = succeed("new", folder / "encoder", tmp_path / "made", "--hope", *settings)
    model, tokenizer = load_hope(tmp_path / "made")
    fresh = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "stays frozen" in made
    assert f"{fresh:,} parameters" in " ".join(made.split())
    assert (model.config.num_hidden_layers, model.config.level_periods) == (2, [1, 2])
    assert tokenizer("a b")["input_ids"]
    assert is_untrained(model)
    assert not is_untrained(load_hope(folder / "trained")[0])


def test_new_replaces_a_hope_only_if_told_to(folder, hope):
    say_and_learn(hope)
    stored = files_in(hope)
    assert refuse("new", folder / "encoder", hope, "--hope") == (
        f"{hope} already holds a HOPE; give a new folder, or --force to replace it and its memory."
    )
    assert refuse("new", folder / "encoder", hope, "--force").startswith(f"{hope} holds other files")
    assert files_in(hope) == stored
    succeed("new", folder / "encoder", hope, "--hope", "--force", "--set", "num_attention_heads=4", "--set",
            "snapshot_periods=[64]", "--set", "num_hidden_layers=1")  # fmt: skip
    assert not (hope / LEARNING_FILE).exists()
    assert load_hope(hope)[0].config.num_hidden_layers == 1


def test_options_that_a_hope_does_not_take_are_refused(folder, tmp_path):
    message = refuse("new", folder / "encoder", tmp_path / "x", "--hope", "--set", "chunk_size=0")
    assert "`chunk_size` is 0" in message
    assert "Unknown model options ['ticks']" in refuse(
        "new", folder / "encoder", tmp_path / "x", "--hope", "--set", "ticks=1"
    )
    assert not (tmp_path / "x").exists()


def test_commands_of_a_karla_say_what_a_hope_is_for(hope, tmp_path):
    for command in (["packs"], ["read", __file__]):
        assert refuse(command[0], hope, *command[1:]) == (
            f"{hope} holds a HOPE, but this needs a Karla; make one with `karla new`, or talk to this one with `karla chat`."
        )


def test_info_shows_the_parts_and_how_often_they_change(folder, hope):
    say_and_learn(hope)
    shown = " ".join(succeed("info", hope).split())
    for words in ("a HOPE (trained)", "encoder", "never", "level 2", "every 2 steps", "fast weights", "chunks"):
        assert words in shown
    assert "(untrained)" in " ".join(succeed("info", folder / "fresh").split())


def test_chat_answers_as_the_model_does_and_says_when_it_is_untrained(folder, hope):
    shown = succeed("chat", folder / "fresh", "--max-new-tokens", 6, input=f"{LINE}\n")
    assert UNTRAINED in shown
    shown = succeed("chat", hope, "--max-new-tokens", 6, input=f"/learn\n{LINE}\n")
    assert UNTRAINED not in shown
    assert shown.startswith("nothing is learned\n")
    assert "6 tokens · " in shown
    assert not (hope / LEARNING_FILE).exists()


def test_the_state_goes_on_from_turn_to_turn(hope):
    session = open_session(hope)
    ids: list[int] = []
    for line in (LINE, " 123-456. Now", " the mill of Brivo"):
        ids += session.tokenizer(line, add_special_tokens=False)["input_ids"]
        answer = session.answer(line, ignore)
        assert list(answer.ids) == generated(session.model, ids)
        ids += answer.ids
        assert session._cache.seen == len(ids) - 1
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3


def test_pieces_are_the_answer(hope):
    pieces: list[str] = []
    answer = open_session(hope).answer(LINE, pieces.append)
    assert "".join(pieces) == answer.text
    assert (answer.tokens, answer.stopped, answer.learned) == (len(answer.ids), False, None)


def test_an_answer_that_is_stopped_stands_and_the_talk_goes_on(hope):
    session, pieces = open_session(hope), []

    def stop_at_third(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    stopped = session.answer(LINE, stop_at_third)
    assert stopped.stopped
    ids = session.tokenizer(LINE, add_special_tokens=False)["input_ids"] + list(stopped.ids)
    ids += session.tokenizer(" and", add_special_tokens=False)["input_ids"]
    assert list(session.answer(" and", ignore).ids) == generated(session.model, ids)


def say_and_learn(folder) -> HopeSession:
    session = open_session(folder)
    session.learns = True
    say(session, LINE)
    return session


def deltas(model) -> list[torch.Tensor]:
    return [delta for layer in model.model.layers for level in layer.levels for delta in level.deltas or ()]


def test_what_is_said_is_learned_and_saved_at_once(hope):
    weights = (hope / "model.safetensors").read_bytes()
    session = open_session(hope)
    session.learns = True
    first = session.answer(LINE, ignore)
    expected, tokenizer = load_hope(hope)
    expected.reset_learning()
    report = expected.learn(LINE, tokenizer, progress=False)
    assert first.learned.losses_before == report.losses_before
    assert first.learned.losses_after == report.losses_after
    assert report.losses_after[0] < report.losses_before[0]
    for model in (session.model, load_hope(hope)[0]):
        assert all(torch.equal(a, b) for a, b in zip(deltas(model), deltas(expected), strict=True))
    assert (hope / "model.safetensors").read_bytes() == weights
    session.learns = False
    stored = files_in(hope)
    say(session, LINE)
    assert files_in(hope) == stored


def test_the_terminal_learns_reads_and_forgets(hope, tmp_path):
    (tmp_path / "note.txt").write_text(LINE * 3, encoding="utf-8")
    lines = ["/learn on", LINE, f"/read {tmp_path / 'note.txt'}", "/learn off", LINE, "/forget", "/learn up"]
    shown = succeed("chat", hope, "--max-new-tokens", 4, input="\n".join(lines))
    assert shown.count("tokens and saved it; loss ") == 2
    assert "what you say is learned and saved after every answer" in shown
    assert "Forgot what was learned in " in shown
    assert "/learn takes on or off, but was given 'up'." in shown
    assert not (hope / LEARNING_FILE).exists()


def test_help_lists_what_a_hope_can_do(hope):
    shown = succeed("chat", hope, input="/help\n")
    assert "/learn on or off" in shown
    assert "/packs" not in shown
    assert "/ticks" not in shown


def test_a_full_disk_and_a_lock_leave_what_was_learned_as_it_was(hope):
    session = say_and_learn(hope)
    stored, learned = files_in(hope), [delta.clone() for delta in deltas(session.model)]
    with full_disk(100), pytest.raises(OSError, match=r"cannot be written|too large"):
        say(session, " of the mill")
    assert files_in(hope) == stored
    assert all(torch.equal(a, b) for a, b in zip(deltas(session.model), learned, strict=True))
    assert len(session.messages) == 4  # the answer stands
    with full_disk(1_000_000):
        say(session, " and now")
    assert files_in(hope) != stored


def test_learning_that_is_stopped_changes_nothing(hope, monkeypatch):
    session = say_and_learn(hope)
    stored, learned = files_in(hope), [delta.clone() for delta in deltas(session.model)]
    take, calls = type(session.model)._take_steps, []

    def stop_at_second(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return take(self, *arguments)

    monkeypatch.setattr(type(session.model), "_take_steps", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        session.learn({"mill": "The mill of Brivo was founded on 3 May 1811. " * 4})
    assert files_in(hope) == stored
    assert all(torch.equal(a, b) for a, b in zip(deltas(session.model), learned, strict=True))


def test_what_another_process_has_learned_is_kept(hope):
    one, two = open_session(hope), open_session(hope)
    one.learn({"a": LINE})
    two.learn({"b": "The mill of Brivo"})
    both, tokenizer = load_hope(hope)
    both.reset_learning()
    both.learn([LINE], tokenizer, progress=False)
    both.learn(["The mill of Brivo"], tokenizer, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(deltas(load_hope(hope)[0]), deltas(both), strict=True))


def test_the_page_talks_to_a_hope(hope, tmp_path):
    page = open_model(hope, max_new_tokens=6)
    assert isinstance(page, HopePageModel)
    messages: list[dict[str, str]] = []
    answer = page.answer(messages, LINE, ignore, should_stop=lambda: False)
    assert answer.text == open_session(hope).answer(LINE, ignore).text
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert page.describe() == {"trained": "yes", "learned by reading": "0 chunks", "learned, on disk": "0 B"}
    path = tmp_path / "note.txt"
    path.write_text(LINE * 2, encoding="utf-8")
    assert page.read(path, "default", should_stop=lambda: False).startswith("Learned ")
    assert page.describe()["learned by reading"] == f"{page.model.learning_step:,} chunks" != "0 chunks"
    stored = files_in(hope)
    with pytest.raises(KeyboardInterrupt):
        page.read(path, "default", should_stop=lambda: True)
    assert files_in(hope) == stored
    with pytest.raises(ValueError, match=r"x\.bin is no text to read"):
        page.read(tmp_path / "x.bin", "default", should_stop=lambda: False)
    chunks = page.model.learning_step
    assert page.forget_learned() == f"Forgot {chunks:,} chunks."
    assert page.answer([], LINE, ignore, should_stop=lambda: False).text == answer.text
    assert page.answer([], LINE, ignore, should_stop=lambda: True).stopped


def test_learning_waits_for_nobody_who_writes(hope):
    session, errors = open_session(hope), []

    def learn():
        try:
            session.learn({"a": LINE})
        except OSError as error:
            errors.append(str(error))

    with lock_folder(hope):
        thread = threading.Thread(target=learn)
        thread.start()
        thread.join()
    assert "Another process is writing" in errors[0]
