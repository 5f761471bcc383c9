"""Talking to a Karla in a terminal, or through a pipe."""

import math
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from karla_hf.answers import MarkdownStream, heat_legend, heat_lines, printable
from karla_hf.chat import Answer, ChatSession
from karla_hf.chat_commands import Chat, commands_of, describe_learning
from karla_hf.errors import as_sentence
from karla_hf.line_editor import LineEditor, history_file
from karla_hf.surprise import Surprise


def run_chat(session: ChatSession, console: Console, history: Path | None = None) -> None:
    """Answer lines from standard input until it ends or the user quits.

    Args:
        session: the conversation.
        console: where answers go: as Markdown if it is a terminal and the model has a chat template, else as they come.
        history: file of the lines typed at a terminal; None takes `history_file()`.
    """
    chat = Chat(session, console, None)
    if sys.stdin.isatty():
        chat.editor = LineEditor(history or history_file())
        chat.editor.commands = (*commands_of(chat), "/quit")
        console.print("Type a message; /help lists the commands.", style="dim")
    while True:
        try:
            line = chat.editor.read("> ") if chat.editor else input().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends the session.", style="dim")
            continue
        if line == "/quit":
            return
        try:
            _run_line(chat, line)
        except KeyboardInterrupt:
            console.print("\nStopped.", style="dim")
        except (OSError, ValueError, KeyError) as error:
            sentence = as_sentence(error)
            if sentence is None:
                raise
            console.print(printable(sentence), style="red", markup=False, highlight=False, soft_wrap=True)


def _run_line(chat: Chat, line: str) -> None:
    if not line:
        return
    if chat.editor is not None:
        chat.editor.keep(line)
    name, _, argument = line.partition(" ")
    if not line.startswith("/"):
        _answer(chat, line)
    elif name in (commands := commands_of(chat)):
        commands[name].run(chat, argument.strip())
    else:
        raise ValueError(f"There is no command {name!r}; /help lists them.")


def _answer(chat: Chat, line: str) -> None:
    console = chat.console
    if console.is_terminal and chat.session.tokenizer.chat_template is not None:
        stream = MarkdownStream(console)
        try:
            answer = chat.session.answer(line, stream.write)
        finally:
            stream.close()
    else:

        def show(piece: str) -> None:
            console.print(printable(piece), end="", markup=False, highlight=False, soft_wrap=True)

        answer = chat.session.answer(line, show)
        console.print()
    if chat.session.has_ticks and any(answer.ticks_used):
        _show_ticks(chat, answer)
    facts = ["stopped"] if answer.stopped else []
    facts.append(f"{answer.tokens} tokens")
    if chat.session.has_ticks:
        facts += [f"{answer.ticks:.1f} ticks per token", f"certainty {answer.certainty:.2f}"]
    chat.say(" · ".join([*facts, f"{answer.tokens / answer.seconds:.1f} tokens/s"]))
    if answer.surprise is not None:
        chat.say(_surprise(answer.surprise))
    if answer.learned is not None:
        chat.say(describe_learning(answer.learned))


def _show_ticks(chat: Chat, answer: Answer) -> None:
    most = max(chat.session.set_ticks(""), *answer.ticks_used)
    if chat.legend != most:
        chat.legend = most
        chat.console.print(Text.assemble("ticks of a token: ", heat_legend(most)), style="dim", soft_wrap=True)
    for strip in heat_lines(answer.ticks_used, most):
        chat.console.print(strip, style="dim", soft_wrap=True)


def _surprise(surprise: Surprise) -> str:
    def shown(nats: float) -> str:
        return f"{nats:.2f} nats per token (perplexity {math.exp(min(nats, 700.0)):,.1f})"

    if surprise.with_memory is None:
        return f"your message: surprise {shown(surprise.without_memory)}"
    return f"your message: surprise {shown(surprise.with_memory)}, without memory {shown(surprise.without_memory)}"
