import io
import json
import os
import pty
import re
import select
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tiny import CHAT_TEMPLATE, files_in, save_backbone, save_karla, speak

from karla_hf.answers import MarkdownStream, heat_legend, heat_lines, heat_strip, printable
from karla_hf.chat import Answer, ChatSession
from karla_hf.chat_commands import COMMANDS, Chat, commands_of
from karla_hf.checkpoints import load_checkpoint
from karla_hf.line_editor import MOST_LINES, LineEditor, history_file
from karla_hf.terminal import run_chat


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    return save_karla(folder / "plain", save_backbone(folder / "backbone", max_position_embeddings=512))


@pytest.fixture
def session(plain):
    model, tokenizer = load_checkpoint(plain)
    return ChatSession(speak(model), tokenizer, plain, max_new_tokens=12)


def ignore(piece: str) -> None:
    """Shows nothing."""


def run(session: ChatSession, *lines: str, width: int = 300) -> list[str]:
    """What a session shows that gets these lines through a pipe."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        run_chat(session, Console(file=out, width=width))
    return out.getvalue().splitlines()


def test_ticks_of_every_token_are_shown(session):
    ids = session.tokenizer("Hi", return_tensors="pt").input_ids
    sure = session.model(ids, use_cache=False).certainty[0, -1].item()
    shown = run(session, "/certainty", f"/certainty {sure + 0.02}", "Hi", "/certainty 0", "Hi")
    assert shown[0] == "every token gets all its ticks"
    assert shown[1] == f"thoughts end at certainty {sure + 0.02:g}"
    assert shown[-2].split(" · ")[1] == "0.0 ticks per token"
    strips = [line for line in shown if line.startswith("ticks ") and "token" not in line]
    session.messages.clear()
    session.set_threshold(str(sure + 0.02))
    answer = session.answer("Hi", ignore)
    assert len(answer.ticks_used) == answer.tokens
    assert sum(answer.ticks_used) / answer.tokens == pytest.approx(answer.ticks)
    assert len(set(answer.ticks_used)) > 1
    assert strips == [line.plain for line in heat_lines(answer.ticks_used, 3)]
    assert shown.count(f"ticks of a token: {heat_legend(3).plain}") == 1


def test_the_legend_comes_once_and_again_for_another_number_of_ticks(session):
    shown = run(session, "Hi", "Hi", "/ticks 5", "Hi")
    assert [line for line in shown if line.startswith("ticks of a token: ")] == [
        "ticks of a token: · 0  ▃ 1  ▆ 2  █ 3",
        "ticks of a token: · 0  ▂ 1  ▄ 2  ▇ 4  █ 5",
    ]
    assert [line for line in shown if line.startswith("ticks █")] == [
        f"ticks █ {n} for each of 12 tokens" for n in (3, 3, 5)
    ]


def test_bars_grow_with_the_ticks_in_height_and_colour():
    strip = heat_strip([0, 1, 4, 8], 8)
    assert strip.plain == "·▁▄█"
    assert [str(span.style) for span in strip.spans] == ["blue", "blue", "green", "red"]
    assert heat_strip([]).plain == ""
    assert heat_strip([9], 8).plain == "█"


def test_the_terminal_shows_errors_and_goes_on(session, tmp_path):
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
    shown = run(session, *lines, "/help", "/ticks 2", "Hi", "/quit", "never")
    assert shown[:6] == [
        "/read needs a name after it; /help shows how it is used.",
        f"There is no file {tmp_path / 'no.txt'}; give the path of a UTF-8 text file.",
        f"{tmp_path / 'latin.txt'} is not UTF-8 text: byte 0xfc at offset 1 (line 1); convert the file to UTF-8.",
        "There is no pack '[bold]'; the packs are [].",
        "There is no command '/go'; /help lists them.",
        "/ticks takes a whole number from 1, but was given 'x'.",
    ]
    names = {command.name for command in COMMANDS} - {"/history", "/learn"}  # of which a pipe or a Karla has none
    assert {line.split()[0] for line in shown[6:14]} == names | {"/quit", "Ctrl-C"}
    assert "2 ticks per token" in shown
    assert re.fullmatch(r"\d+ tokens · 2\.0 ticks per token · certainty [01]\.\d\d · [\d.]+ tokens/s", shown[-2])
    assert re.fullmatch(r"your message: surprise [\d.]+ nats per token \(perplexity [\d,.]+\)", shown[-1])
    assert session.messages[0]["content"] == "Hi"
    assert files_in(session.directory) == before


def test_a_bug_is_not_shown_as_a_sentence(session, monkeypatch):
    monkeypatch.setattr(session, "forget", lambda name: {}["gone"])
    with pytest.raises(KeyError, match="gone"):
        run(session, "/forget x")


def test_a_folder_is_read_and_what_was_read_is_shown(session, tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.md").write_text("The mill of Brivo was founded on 3 May 1811.")
    (folder / "b.txt").write_text("The bridge of Kelo was founded on 9 June 1790.")
    (folder / "c.png").write_bytes(b"\x89PNG")
    shown = run(session, f"/read {folder}", "/packs", "The mill of Brivo was founded on", "/forget default", "/packs")
    assert shown[0] == "Skipped: c.png is not UTF-8 text."
    assert re.match(r"Read [\d,]+ tokens at [\d,]+ per second; surprise \d\.\d\d before, \d\.\d\d after\.", shown[1])
    assert re.fullmatch(r"[\d,]+ new rows in pack 'default' from notes/b\.txt, notes/deep/a\.md\.", shown[2])
    (row,) = (line for line in shown if line.startswith(("  default", " default", "default")))
    assert "notes/b.txt, notes/deep/a.md" in row
    with_and_without = (
        r"your message: surprise ([\d.]+) nats per token \(.*\), without memory ([\d.]+) nats per token \(.*\)"
    )
    (known, unknown) = next(found.groups() for line in shown if (found := re.fullmatch(with_and_without, line)))
    assert float(known) < float(unknown)
    assert shown[-2:] == ["Forgot 'default'.", "The memory holds no packs; /read makes one."]


def test_many_skipped_files_are_counted(session, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.bin").write_bytes(b"\xff")
        (tmp_path / f"{number}.txt").write_text(f"This is note {number}.")
    shown = run(session, f"/read {tmp_path}", "/forget default")
    assert shown[0].count("is not UTF-8 text") == 5
    assert shown[0].endswith("4.bin is not UTF-8 text, 3 more.")
    assert re.search(r"/4\.txt and 3 more\.$", shown[2])


def test_a_model_without_packs_or_ticks_lacks_their_commands(session):
    class Plain:
        has_memory = has_ticks = False

    chat = Chat(Plain(), Console(), None)
    assert list(commands_of(chat)) == ["/help"]
    assert set(commands_of(Chat(session, Console(), None))) == {command.name for command in COMMANDS} - {
        "/history",
        "/learn",
    }


def test_control_characters_never_reach_the_terminal(session, tmp_path):
    name = "a\x1b[2J.txt"
    (tmp_path / name).write_text("The ferry is late.")
    shown = run(session, f"/read {tmp_path / name}", "/packs", "/forget \x1b]0;x\x07", "\x9b2J", "/forget default")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "".join(shown))
    assert "a␛[2J.txt" in "".join(shown)
    assert printable("a\tb\n\rc\x7f") == "a\tb\n␍c\ufffd"


def test_markdown_grows_paragraph_by_paragraph():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=10, color_system=None)
    stream = MarkdownStream(console)
    text = "# One\n\nSome *words*.\n\n```python\na = 1\n\nb = 2\n```\n\n" + "- item\n" * 30
    seen = []
    for at in range(0, len(text), 7):
        stream.write(text[at : at + 7])
        seen.append(out.getvalue())
    assert "Some words." in seen[len(seen) // 3]  # while later parts are still to come
    stream.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lasting = shown[shown.rindex("One") :]
    assert lasting.count("• item") >= 30
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is there again


def test_history_is_kept_bounded_and_private(tmp_path, monkeypatch):
    path = tmp_path / "state" / "history.jsonl"
    editor = LineEditor(path)
    for line in ("one", "two\nlines", "two\nlines", "drei ü"):
        editor.keep(line)
    assert LineEditor(path).lines == ["one", "two\nlines", "drei ü"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for number in range(MOST_LINES):
        editor.keep(f"line {number}")
    kept = LineEditor(path).lines
    assert kept == editor.lines
    assert kept[-1] == f"line {MOST_LINES - 1}"
    assert MOST_LINES * 0.9 <= len(kept) <= MOST_LINES
    assert [file.name for file in path.parent.iterdir()] == ["history.jsonl"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b'"good"\n{"bad": 1}\nno json\n\xff\n"last"\n')
    assert LineEditor(path).lines == ["good", "last"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "karla" / "chat-history.jsonl"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_file() == Path.home() / ".local" / "state" / "karla" / "chat-history.jsonl"


class Terminal:
    """`karla chat` in a pseudo-terminal, with Ctrl-C as a keyboard sends it."""

    def __init__(self, state: Path, *arguments: str):
        self.shown = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits that it is ignored
            code = "from karla_hf.cli import main; main()"
            environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "100"}
            os.execve(sys.executable, [sys.executable, "-c", code, *arguments], environment)

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
def open_terminal(tmp_path):
    terminals: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        terminals.append(Terminal(tmp_path / "state", *arguments))
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
    terminal.type("/tic\t2\r")
    terminal.wait_for(r"2 ticks per token\s+> ")
    terminal.type("The mill of\r")
    terminal.wait_for(r"The mill of\r\n\r?[^\r]{8}", 20)  # the echo, and the answer appears while it is made
    terminal.type("\x03")
    terminal.wait_for(
        r"stopped · \d+ tokens · 2\.0 ticks per token · certainty [01]\.\d\d · [\d.]+ tokens/s\s+"
        r"your message: surprise [\d.]+ nats per token \(perplexity [\d,.]+\)\s+> ",
        20,
    )
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("The mill of Brivo was founded on 3 May 1811.")
    terminal.type(f"/read {tmp_path}/no\t\r")
    terminal.wait_for(r"new rows in pack 'default' from notes/a\.txt\.\s+> ", 20)
    terminal.type("\x1b[A\x1b[A\x1b[A\x7f4\r")  # three lines up, and edit that
    terminal.wait_for(r"4 ticks per token\s+> ", 20)
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.shown
    kept = [
        json.loads(line) for line in (tmp_path / "state" / "karla" / "chat-history.jsonl").read_text().splitlines()
    ]
    assert kept == ["/ticks 2", "The mill of", f"/read {folder}/", "/ticks 4"]


@pytest.mark.slow
def test_the_history_of_one_session_is_there_in_the_next(plain, tmp_path, open_terminal):
    LineEditor(tmp_path / "state" / "karla" / "chat-history.jsonl").keep("/ticks 4")
    again = open_terminal("chat", str(plain), "--max-new-tokens", "4")
    again.wait_for(r"/help lists the commands\.\s+> ")
    again.type("\x1b[A\r")  # the last line of the session before
    again.wait_for(r"4 ticks per token\s+> ", 20)
    again.type("\x1b[200~One line\nand another\x1b[201~")  # pasted
    again.wait_for("and another", 20)
    again.type("\r")
    again.wait_for(r"your message: surprise [\d.]+ nats per token.*\s+> ", 20)
    again.type("/history 2\r")
    again.wait_for(r"One line\s+and another\s+\d+  /history 2\s+kept in \S+chat-history\.jsonl", 20)
    again.type("/quit\r")
    assert again.wait() == 0
    assert "Traceback" not in again.shown


def test_an_answer_of_a_chat_model_is_shown_as_markdown(session, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    monkeypatch.setattr(session.tokenizer, "chat_template", CHAT_TEMPLATE)

    def answer(line: str, on_text) -> Answer:
        for piece in ("# Tit", "le\n\nSome **bold** [word](https://a.example).\n\n", "- one\n- two"):
            on_text(piece)
        return Answer("", 1, 1.0, 0.5, 1.0, (1,), False)

    monkeypatch.setattr(session, "answer", answer)
    run_chat(session, Console(file=out, force_terminal=True, width=60, color_system=None))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "Some bold word (https://a.example)." in shown  # a link shows where it leads
    assert "• one" in shown
    assert "**" not in shown[shown.rindex("Title") :]
    assert "\x1b]8" not in out.getvalue()
