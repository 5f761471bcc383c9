"""How an answer looks in a terminal: Markdown while it is written, and a strip of how long was thought."""

import re
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text


BARS = "▁▂▃▄▅▆▇█"
HEAT = ("blue", "cyan", "green", "yellow", "red")  # of few ticks to many
SECONDS = 0.1  # between two pictures of an unfinished paragraph
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(0x7F, 0xA0), "\ufffd"
)


def printable(text: str) -> str:
    r"""The text with control characters made visible, so that what a model or a file says cannot steer the terminal.

    Example:
        >>> printable("a\x1b[2Jb\tc\n")
        'a␛[2Jb\tc\n'
    """
    return text.translate(_CONTROLS)


class MarkdownStream:
    """Shows an answer as Markdown that grows: whole paragraphs stay, and the last one is drawn anew until it is whole.

    Args:
        console: a terminal. While the answer is written, its cursor is hidden; `close` shows it again.
    """

    def __init__(self, console: Console):
        self.console, self.rest, self.drawn = console, "", 0.0
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.live.start()

    def write(self, piece: str) -> None:
        """Take a piece of the answer."""
        self.rest += printable(piece)
        end = _end_of_blocks(self.rest)
        if end:
            self.live.update("", refresh=True)
            self.console.print(_markdown(self.rest[:end]), "")
            self.rest = self.rest[end:]
        if end or time.monotonic() - self.drawn >= SECONDS:
            self.live.update(self._last_lines(), refresh=True)
            self.drawn = time.monotonic()

    def close(self) -> None:
        """Show what is left, for good."""
        self.live.stop()
        if self.rest.strip():
            self.console.print(_markdown(self.rest))
        self.rest = ""

    def _last_lines(self) -> Segments:
        """As much of the unfinished part as the screen holds."""
        lines = self.console.render_lines(_markdown(self.rest), pad=False)[-max(self.console.height - 2, 1) :]
        return Segments([segment for line in lines for segment in (*line, Segment.line())])


def _markdown(text: str) -> Markdown:
    return Markdown(text, hyperlinks=False)  # a link shows where it leads


def _end_of_blocks(text: str) -> int:
    """Where the last paragraph begins, if those before it are whole; 0 otherwise.

    Example:
        >>> text = "One.\\n\\n```\\na\\n\\nb\\n```\\n\\nTwo"
        >>> text[_end_of_blocks(text):], _end_of_blocks(text[:12])
        ('Two', 6)
    """
    end, fence = 0, ""
    for line in re.finditer(r"^.*$", text, re.MULTILINE):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line[0])
        starts_block = line[0] and not line[0][0].isspace() and text[: line.start()].endswith("\n\n")
        if not fence and starts_block:
            end = line.start()
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line[0].strip().strip(fence[0]):
            fence = ""
    return end


def heat_strip(ticks: Sequence[int], most: int | None = None) -> Text:
    """A bar for every number, higher and warmer up to `most`; a dot for 0.

    Args:
        ticks: the numbers.
        most: the number of the highest bar; None takes the highest number.

    Example:
        >>> heat_strip([0, 1, 5, 10]).plain
        '·▁▄█'
    """
    top = max(max(ticks, default=0), most or 0)
    strip = Text()
    for tick in ticks:
        share = tick / top if tick else 0.0
        style = HEAT[min(int(share * len(HEAT)), len(HEAT) - 1)]
        strip.append(BARS[-(-tick * len(BARS) // top) - 1] if tick else "·", style)
    return strip


def heat_legend(most: int) -> Text:
    """What the bars of a strip up to `most` mean.

    Example:
        >>> heat_legend(4).plain
        '· 0  ▂ 1  ▄ 2  ▆ 3  █ 4'
    """
    shown = sorted({0, 1, most, *(round(most * part / 4) for part in (1, 2, 3))})
    return Text("  ").join(Text.assemble(heat_strip([tick], most), f" {tick}") for tick in shown)


def heat_lines(ticks: Sequence[int], most: int) -> Iterator[Text]:
    """The strip of an answer; one bar if all its tokens got the same number of ticks.

    Example:
        >>> [line.plain for line in heat_lines([4, 4, 4], 4)], [line.plain for line in heat_lines([1, 4], 4)]
        (['ticks █ 4 for each of 3 tokens'], ['ticks ▂█'])
    """
    if len(set(ticks)) > 1:
        yield Text.assemble("ticks ", heat_strip(ticks, most))
    elif ticks:
        yield Text.assemble("ticks ", heat_strip(ticks[:1], most), f" {ticks[0]} for each of {len(ticks)} tokens")
