"""Lines typed at a terminal: edited, completed, and kept from session to session."""

import glob
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


try:  # not every Python has it
    import readline as _readline
except ImportError:
    _readline = None  # type: ignore[assignment]
readline: Any = _readline

MOST_LINES = 1000  # of a history


def history_file() -> Path:
    """Where the history of `karla chat` is kept: in the user's state folder, by the XDG Base Directory Specification."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "karla" / "chat-history.jsonl"


class LineEditor:
    """`input` with line editing, a history on the arrow keys, completion on Tab, and pasted text of several lines.

    Args:
        path: the history, one JSON string a line, for the user's eyes only; made when the first line is kept. Lines that
            are no JSON strings are left out.
        commands: what Tab completes at the start of a line; behind them it completes paths.

    Attributes:
        lines: the history, oldest first, at most `MOST_LINES`.

    Raises:
        OSError: if there is a history that cannot be read.
    """

    def __init__(self, path: Path, commands: Sequence[str] = ()):
        self.path, self.commands = path, tuple(commands)
        self.lines = _read_history(path) if path.exists() else []
        if readline is not None:
            readline.clear_history()
            readline.set_auto_history(False)
            readline.set_completer(self._complete)
            readline.set_completer_delims(" \t\n")
            for setting in ("tab: complete", "set enable-bracketed-paste on"):
                readline.parse_and_bind(setting)
            for line in self.lines:
                readline.add_history(line)

    def read(self, prompt: str) -> str:
        """Read a message, of several lines if they were pasted, without blanks around it.

        Raises:
            EOFError: at Ctrl-D.
            KeyboardInterrupt: at Ctrl-C.
        """
        return input(prompt).strip()

    def keep(self, line: str) -> None:
        """Add a line to the history and its file, unless it is the last one there.

        Raises:
            OSError: if the file cannot be written; the line is in the history of this session all the same.
        """
        if self.lines and self.lines[-1] == line:
            return
        self.lines.append(line)
        if readline is not None:
            readline.add_history(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if len(self.lines) > MOST_LINES:
            # Below the limit again by a tenth, so that the file is not written anew for every line.
            self.lines = self.lines[-MOST_LINES * 9 // 10 :]
            _replace(self.path, self.lines)
            return
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _complete(self, text: str, state: int) -> str | None:
        if readline.get_begidx() == 0:
            found = [command + " " for command in self.commands if command.startswith(text)]
        else:
            paths = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
            found = [path + os.sep if os.path.isdir(path) else path for path in paths]
        return found[state] if state < len(found) else None


def _read_history(path: Path) -> list[str]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if isinstance(line, str) and line.encode() and "\0" not in line:  # which is what readline takes
                lines.append(line)
        except (ValueError, RecursionError):
            continue
    return lines[-MOST_LINES:]


def _replace(path: Path, lines: Sequence[str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    os.replace(file.name, path)
