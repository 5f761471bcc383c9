"""The commands of a conversation in a terminal. A model without a memory, or without ticks, lacks theirs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console

from karla_hf.answers import printable
from karla_hf.chat import ChatSession
from karla_hf.documents import find_texts
from karla_hf.hope_chat import HopeSession
from karla_hf.info import describe_packs
from karla_hf.line_editor import LineEditor
from karla_hf.modeling.learning_hope import LearnReport
from karla_hf.report import new_table


MOST_NAMED = 5  # skipped files that are listed


@dataclass
class Chat:
    """A conversation in a terminal.

    Attributes:
        session: the conversation.
        console: where it is shown.
        editor: what keeps the history; None where standard input is no terminal.
        legend: highest number of ticks that the legend was shown for.
    """

    session: ChatSession
    console: Console
    editor: LineEditor | None
    legend: int | None = None

    def say(self, text: str) -> None:
        """Show a dim line, as it stands."""
        self.console.print(printable(text), style="dim", markup=False, highlight=False, soft_wrap=True)


class Command(NamedTuple):
    """A command.

    Attributes:
        name: with its slash.
        argument: what stands behind it in the help; "" for nothing.
        help: what it does.
        run: does it, with what was typed behind the name.
        suits: whether a conversation has it.
    """

    name: str
    argument: str
    help: str
    run: Callable[[Chat, str], None]
    suits: Callable[[Chat], bool] = lambda chat: True


def commands_of(chat: Chat) -> dict[str, Command]:
    """The commands of a conversation by name, in the order of the help."""
    return {command.name: command for command in COMMANDS if command.suits(chat)}


def help_text(commands: Sequence[Command]) -> str:
    """The list that `/help` shows."""
    width = max(len(f"{command.name} {command.argument}") for command in commands) + 2
    lines = [f"{f'{command.name} {command.argument}':{width}}{command.help}" for command in commands]
    return "\n".join(
        [*lines, f"{'/quit':{width}}end the session, as Ctrl-D does", "Ctrl-C stops an answer or a reading."]
    )


def _help(chat: Chat, argument: str) -> None:
    chat.console.print(help_text(list(commands_of(chat).values())), markup=False, highlight=False, soft_wrap=True)


def _read(chat: Chat, argument: str) -> None:
    found = find_texts(_needed("/read", argument))
    named = [f"{name} {reason}" for name, reason in list(found.skipped.items())[:MOST_NAMED]]
    if len(found.skipped) > MOST_NAMED:
        named.append(f"{len(found.skipped) - MOST_NAMED:,} more")
    if named:
        chat.say(f"Skipped: {', '.join(named)}.")
    report = chat.session.read_texts(found.texts)
    chat.say(
        f"Read {report.tokens:,} tokens at {report.tokens_per_second:,.0f} per second; surprise "
        f"{report.surprise_before:.2f} before, {report.surprise_after:.2f} after."
    )
    titles = list(found.texts)
    more = f" and {len(titles) - MOST_NAMED:,} more" if len(titles) > MOST_NAMED else ""
    chat.say(f"{report.rows_written:,} new rows in pack 'default' from {', '.join(titles[:MOST_NAMED])}{more}.")


def _packs(chat: Chat, argument: str) -> None:
    packs = describe_packs(chat.session.model.engram, chat.session.directory)
    if not packs:
        chat.say("The memory holds no packs; /read makes one.")
        return
    table = new_table(["pack", "sources", "rows", "tokens", "load"], text_columns=2)
    for pack in packs:
        sources = printable(", ".join(pack.sources))
        table.add_row(pack.name, sources, f"{pack.rows:,}", f"{pack.tokens:,}", f"{pack.load:.2%}")
    chat.console.print(table, markup=False)


def _forget(chat: Chat, argument: str) -> None:
    chat.session.forget(_needed("/forget", argument))
    chat.say(f"Forgot {argument!r}.")


def _ticks(chat: Chat, argument: str) -> None:
    chat.say(f"{chat.session.set_ticks(argument)} ticks per token")


def _certainty(chat: Chat, argument: str) -> None:
    threshold = chat.session.set_threshold(argument)
    chat.say("every token gets all its ticks" if threshold is None else f"thoughts end at certainty {threshold:g}")


def _history(chat: Chat, argument: str) -> None:
    assert chat.editor is not None
    if argument and (not argument.isdecimal() or int(argument) < 1):
        raise ValueError(f"/history takes a whole number from 1, but was given {argument!r}.")
    lines = chat.editor.lines[-int(argument or 20) :]
    first = len(chat.editor.lines) - len(lines) + 1
    for number, line in enumerate(lines, start=first):
        chat.say(f"{number:>5}  {line}")
    chat.say(f"kept in {chat.editor.path}")


def describe_learning(report: LearnReport) -> str:
    """A line on what was learned."""
    before, after = (sum(losses) / len(losses) for losses in (report.losses_before, report.losses_after))
    return f"Learned {report.tokens:,} tokens and saved it; loss {before:.2f} before, {after:.2f} after."


def _learn(chat: Chat, argument: str) -> None:
    session = _hope(chat)
    if argument not in ("", "on", "off"):
        raise ValueError(f"/learn takes on or off, but was given {argument!r}.")
    if argument:
        session.learns = argument == "on"
    chat.say("what you say is learned and saved after every answer" if session.learns else "nothing is learned")


def _learn_file(chat: Chat, argument: str) -> None:
    chat.say(describe_learning(_hope(chat).learn(find_texts(_needed("/read", argument)).texts, progress=True)))


def _forget_learned(chat: Chat, argument: str) -> None:
    chat.say(f"Forgot what was learned in {_hope(chat).forget_learned():,} chunks.")


def _hope(chat: Chat) -> HopeSession:
    assert isinstance(chat.session, HopeSession)
    return chat.session


def _learns(chat: Chat) -> bool:
    return isinstance(chat.session, HopeSession)


def _needed(command: str, argument: str) -> str:
    if not argument:
        raise ValueError(f"{command} needs a name after it; /help shows how it is used.")
    return argument


def _reads(chat: Chat) -> bool:
    return chat.session.has_memory


def _thinks(chat: Chat) -> bool:
    return chat.session.has_ticks


COMMANDS = (
    Command(
        "/read", "FILE or FOLDER", 'read UTF-8 text files into the pack "default" and save the memory', _read, _reads
    ),
    Command("/packs", "", "list the packs: what was read, tokens and rows", _packs, _reads),
    Command("/forget", "PACK", "remove a pack and save the memory", _forget, _reads),
    Command("/ticks", "N", "think for N ticks per token; /ticks alone shows the number", _ticks, _thinks),
    Command("/certainty", "C", "end a thought at certainty C, from 0 to 1; alone shows it", _certainty, _thinks),
    Command(
        "/learn", "on or off", "learn what you say after every answer, and save it; alone shows it", _learn, _learns
    ),
    Command("/read", "FILE or FOLDER", "learn UTF-8 text files and save what was learned", _learn_file, _learns),
    Command("/forget", "", "forget all that was learned", _forget_learned, _learns),
    Command(
        "/history", "N", "show the last N lines typed, 20 without N", _history, lambda chat: chat.editor is not None
    ),
    Command("/help", "", "show this list", _help),
)
