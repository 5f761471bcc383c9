import io
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
import torch
from rich.console import Console
from tiny import CHAT_TEMPLATE, files_in, make_tokenizer, save_backbone, save_karla, speak

from karla_hf.chat import ChatSession, _PieceStreamer
from karla_hf.checkpoints import load_checkpoint
from karla_hf.terminal import heat_strip, run_chat


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
    assert session._prompt([*session.messages, {"role": "user", "content": "The bridge"}]) == session.tokenizer.encode(
        prompt
    )
    session.answer("The bridge", ignore)
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_with_a_template_messages_go_in_and_out(templated):
    model, tokenizer = load_checkpoint(templated)
    session = ChatSession(speak(model), tokenizer, templated, max_new_tokens=5)
    session.messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    prompt = session._prompt([*session.messages, {"role": "user", "content": "three"}])
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


def test_ticks_of_every_token_are_shown(session, monkeypatch):
    ids = session.tokenizer("Hi", return_tensors="pt").input_ids
    sure = session.model(ids, use_cache=False).certainty[0, -1].item()
    lines = ["/certainty", f"/certainty {sure + 0.02}", "Hi", "/certainty 0", "Hi"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out = io.StringIO()
    run_chat(session, Console(file=out, width=300))
    shown = out.getvalue().splitlines()
    assert shown[0] == "every token gets all its ticks"
    assert shown[1] == f"thoughts end at certainty {sure + 0.02:g}"
    assert shown[-1].split(" · ")[1] == "0.0 ticks per token"
    strips = [line for line in shown if line.startswith("ticks ")]
    assert all(set(strip[6:]) <= set("·▁▂▃▄▅▆▇█") for strip in strips)
    session.messages.clear()
    session.set_threshold(str(sure + 0.02))
    answer = session.answer("Hi", ignore)
    assert len(answer.ticks_used) == answer.tokens
    assert sum(answer.ticks_used) / answer.tokens == pytest.approx(answer.ticks)
    assert strips == ([f"ticks {heat_strip(answer.ticks_used)}"] if len(set(answer.ticks_used)) > 1 else [])


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
    prompt = session.tokenizer.decode(session._prompt([*session.messages, {"role": "user", "content": "last"}]))
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


def test_ctrl_c_while_reading_leaves_the_memory_as_it_was(session, tmp_path, monkeypatch):
    (tmp_path / "note.txt").write_text("The ferry is late.", encoding="utf-8")
    (tmp_path / "long.txt").write_text(LONG * 20, encoding="utf-8")
    session.read(tmp_path / "note.txt")
    before, stored = session.model.packs(), files_in(session.directory)
    states, calls = session.model._closed_states, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return states(*args)

    monkeypatch.setattr(session.model, "_closed_states", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.read(tmp_path / "long.txt")
    assert len(calls) == 2
    assert session.model.packs() == before
    assert files_in(session.directory) == stored
    session.forget("default")


def test_pieces_never_split_a_character():
    tokenizer = make_tokenizer(vocab_size=257)  # one token per byte
    text = "né €5 🙂 ok"
    pieces: list[str] = []
    streamer = _PieceStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for token in tokenizer.encode(text):
        streamer.put(torch.tensor([token]))
    assert "".join(pieces) == text
    assert pieces[1:3] == ["é", " "]
    streamer.put(torch.tensor([tokenizer.encode("é")[0]]))  # an answer may end within one
    streamer.end()
    streamer.end()
    assert "".join(pieces) == streamer.text == text + "\ufffd"


def test_the_terminal_shows_errors_and_goes_on(session, tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("Müsli".encode("latin-1"))
    before = files_in(session.directory)
    lines = [
        "",
        "/read",
        f"/read {tmp_path / 'no.txt'}",
        f"/read {tmp_path / 'latin.txt'}",
        "/forget [bold]",
        "/go",
        "/ticks x",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "/help", "/ticks 2", "Hi", "/quit", "never"])))
    out = io.StringIO()
    run_chat(session, Console(file=out, width=300))
    shown = out.getvalue().splitlines()
    assert shown[:6] == [
        "/read needs a name after it; /help shows how it is used.",
        f"There is no file {tmp_path / 'no.txt'}; give the path of a UTF-8 text file.",
        f"{tmp_path / 'latin.txt'} is not UTF-8 text: byte 0xfc at offset 1 (line 1); convert the file to UTF-8.",
        "There is no pack '[bold]'; the packs are [].",
        "There is no command '/go'; /help lists them.",
        "/ticks takes a whole number from 1, but was given 'x'.",
    ]
    assert {"/read", "/forget", "/ticks", "/certainty", "/help", "/quit"} <= {line.split()[0] for line in shown[6:13]}
    assert "2 ticks per token" in shown
    assert re.fullmatch(r"\d+ tokens · 2\.0 ticks per token · certainty [01]\.\d\d · [\d.]+ tokens/s", shown[-1])
    assert session.messages[0]["content"] == "Hi"
    assert files_in(session.directory) == before


def test_a_bug_is_not_shown_as_a_sentence(session, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/read x\n"))
    monkeypatch.setattr(session, "read", lambda path: {}["gone"])
    with pytest.raises(KeyError, match="gone"):
        run_chat(session, Console(file=io.StringIO()))


class Terminal:
    """`karla chat` in a pseudo-terminal, with Ctrl-C as a keyboard sends it."""

    def __init__(self, *arguments: str):
        self.shown = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits that it is ignored
            code = "from karla_hf.cli import main; main()"
            os.execv(sys.executable, [sys.executable, "-c", code, *arguments])

    def wait_for(self, pattern: str, seconds: float = 60, keys: str = "") -> None:
        """Read on until the text since the last call matches, pressing the keys again after every second of silence."""
        seen, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, seen):
            ready, _, _ = select.select([self.master], [], [], 1.0)
            assert ready or time.monotonic() < deadline, f"{pattern!r} did not appear in {seen!r}"
            if not ready:
                self.type(keys)
                continue
            try:
                data = os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # how Linux says that the other side is closed
                data = ""
            assert data, f"the session ended without {pattern!r}: {seen!r}"
            seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)
            self.shown += data

    def type(self, text: str) -> None:
        """Type keys."""
        os.write(self.master, text.encode())

    def wait(self, seconds: float = 30) -> int:
        """Wait for the end and return the exit code."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise AssertionError(f"The session did not end: {self.shown!r}")

    def close(self) -> None:
        """Kill what still runs."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def open_terminal():
    terminals: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        terminals.append(Terminal(*arguments))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_a_session_in_a_real_terminal(tmp_path, open_terminal):
    backbone = save_backbone(tmp_path / "backbone", max_position_embeddings=100_000, eos_token_id=None)
    _, tokenizer = load_checkpoint(save_karla(tmp_path / "karla", backbone))
    tokenizer.eos_token = None  # so that only Ctrl-C ends an answer
    tokenizer.save_pretrained(tmp_path / "karla")
    terminal = open_terminal("chat", str(tmp_path / "karla"), "--max-new-tokens", "90000")
    terminal.wait_for(r"/help lists the commands\.\s+> ")
    terminal.type("\x03")  # Python may miss one that comes just before it waits for keys
    terminal.wait_for(r"/quit or Ctrl-D ends the session\.\s+> ", keys="\x03")
    terminal.type("/ticks 2\r")
    terminal.wait_for(r"2 ticks per token\s+> ")
    terminal.type("The mill of\r")
    terminal.wait_for(r"The mill of\r\n[^\r]{8}")  # the echo, and the answer appears while it is made
    terminal.type("\x03")
    terminal.wait_for(r"stopped · \d+ tokens · 2\.0 ticks per token · certainty [01]\.\d\d · [\d.]+ tokens/s\s+> ")
    terminal.type("/quit\r")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.shown
