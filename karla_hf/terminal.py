"""Talking to a Karla in a terminal, or through a pipe."""

import sys
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console

from karla_hf.chat import ChatSession
from karla_hf.errors import as_sentence


BARS = "▁▂▃▄▅▆▇█"
HELP = """\
/read FILE     read a UTF-8 text file into the pack "default" and save the memory
/forget PACK   remove a pack and save the memory
/ticks N       think for N ticks per token; /ticks alone shows the number
/certainty C   stop at certainty C, from 0 to 1; after an answer, bars show the ticks of every token
/help          show this list
/quit          end the session, as Ctrl-D does
Ctrl-C stops an answer."""


def run_chat(session: ChatSession, console: Console) -> None:
    """Answer lines from standard input until it ends or the user quits.

    Args:
        session: the conversation.
        console: where answers go.
    """
    asks = sys.stdin.isatty()
    if asks:
        with suppress(ImportError):  # gives input() editing and history; not every Python has it
            import readline  # noqa: F401
        console.print("Type a message; /help lists the commands.", style="dim")
    while True:
        try:
            line = input("> " if asks else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends the session.", style="dim")
            continue
        if line == "/quit":
            return
        try:
            _run_line(session, line, console)
        except KeyboardInterrupt:
            console.print("\nStopped.", style="dim")
        except (OSError, ValueError, KeyError) as error:
            sentence = as_sentence(error)
            if sentence is None:
                raise
            console.print(sentence, style="red", markup=False, highlight=False)


def heat_strip(ticks: Sequence[int]) -> str:
    """A bar for every number, up to the highest; a dot for 0.

    Example:
        >>> heat_strip([0, 1, 5, 10])
        '·▁▄█'
    """
    most = max(ticks, default=0)
    return "".join("·" if tick == 0 else BARS[-(-tick * len(BARS) // most) - 1] for tick in ticks)


def _run_line(session: ChatSession, line: str, console: Console) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if not line:
        return
    if not line.startswith("/"):
        _run_answer(session, line, console)
    elif command == "/help":
        console.print(HELP, markup=False, highlight=False)
    elif command == "/ticks":
        console.print(f"{session.set_ticks(argument)} ticks per token", style="dim")
    elif command == "/certainty":
        threshold = session.set_threshold(argument)
        shown = "every token gets all its ticks" if threshold is None else f"thoughts end at certainty {threshold:g}"
        console.print(shown, style="dim", highlight=False)
    elif command in ("/read", "/forget") and not argument:
        raise ValueError(f"{command} needs a name after it; /help shows how it is used.")
    elif command == "/read":
        report = session.read(argument)
        console.print(
            f"Read {report.tokens:,} tokens at {report.tokens_per_second:,.0f} per second; surprise "
            f"{report.surprise_before:.2f} before, {report.surprise_after:.2f} after.",
            style="dim",
        )
    elif command == "/forget":
        session.forget(argument)
        console.print(f"Forgot {argument!r}.", style="dim", markup=False)
    else:
        raise ValueError(f"There is no command {command!r}; /help lists them.")


def _run_answer(session: ChatSession, line: str, console: Console) -> None:
    def show(piece: str) -> None:
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    answer = session.answer(line, show)
    console.print()
    if len(set(answer.ticks_used)) > 1:
        console.print(f"ticks {heat_strip(answer.ticks_used)}", style="dim", highlight=False, soft_wrap=True)
    console.print(
        f"{'stopped · ' if answer.stopped else ''}{answer.tokens} tokens · {answer.ticks:.1f} ticks per token · "
        f"certainty {answer.certainty:.2f} · {answer.tokens / answer.seconds:.1f} tokens/s",
        style="dim",
        highlight=False,
    )
