"""What the page shows: HTML in which everything that came from people, files or models is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from transformers import PreTrainedTokenizerBase

from karla_hf.chat import Answer
from karla_hf.info import Pack
from karla_hf.report import format_bytes


MOST_SOURCES = 3  # of a pack, shown by name
CSS = """
footer { display: none !important }
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: auto }
.karla-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2em .8em; margin: .2em 0 }
.karla-head b { font-size: 1.5em }
.karla-head span, .karla-dim { color: var(--body-text-color-subdued); font-size: var(--text-sm) }
.karla-said { white-space: pre-wrap; overflow-wrap: anywhere }
.karla-said i { font-style: normal; border-radius: 3px; padding: .1em 0;
  background: color-mix(in srgb, var(--color-accent) calc(40% * var(--ticks)), transparent);
  box-shadow: inset 0 -2px 0 rgb(220 60 40 / var(--doubt)) }
.karla-facts { display: grid; grid-template-columns: auto 1fr; gap: .15em 1em; margin: 0; font-size: var(--text-sm) }
.karla-facts dt { color: var(--body-text-color-subdued) }
.karla-facts dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums }
.karla-packs label { width: 100%; overflow-wrap: anywhere }
"""
LEGEND = (
    '<div class="karla-dim karla-said">Shade: ticks, <i style="--ticks:.1;--doubt:0"> few </i> to '
    '<i style="--ticks:1;--doubt:0"> all </i>. Underline: <i style="--ticks:0;--doubt:1"> uncertain </i>. '
    "Point at a word for its numbers.</div>"
)
WAITING = '<div style="min-height: 5em"></div>'  # the progress bar is shown over it


@dataclass
class Tab:
    """The conversation in one browser tab.

    Attributes:
        messages: what was said so far.
        drawn: each answer with its ticks drawn over it.
        asked: the line that is being answered, or None.
        partial: its answer so far.
        stop: whether the answer shall end.
        stop_reading: whether what is being read shall end.
        speed: facts on the last answer.
        listed: packs that it shows.
        ended: how many answers and readings have ended, however they did.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    asked: str | None = None
    partial: str = ""
    stop: bool = False
    stop_reading: bool = False
    speed: dict[str, str] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    ended: int = 0

    def show(self, draws: bool) -> list[dict[str, str]]:
        """The conversation as the chatbot takes it: what people said as it stands, answers drawn or as Markdown."""
        shown = []
        for number, message in enumerate(self.messages):
            content, says = message["content"], message["role"] == "assistant"
            shown.append({**message, "content": self._answer(number // 2, draws) if says else draw_text(content)})
        if self.asked is not None:
            shown.append({"role": "user", "content": draw_text(self.asked)})
            if self.partial:
                partial = draw_text(self.partial) if draws else self.partial
                shown.append({"role": "assistant", "content": partial})
        return shown

    def _answer(self, number: int, draws: bool) -> str:
        return self.drawn[number] if draws else self.messages[2 * number + 1]["content"]


def draw_head(title: str) -> str:
    """The line at the top of the page."""
    return f'<div class="karla-head"><b>Karla</b><span>{escape(title)}</span></div>'


def draw_text(text: str) -> str:
    r"""A text as it stands, as one block that Markdown leaves alone.

    Example:
        >>> draw_text("a <b>\n\n*c*")
        '<div class="karla-said">a &lt;b&gt;<br><br>*c*</div>'
    """
    return _block(_lines(text))


def draw_thoughts(answer: Answer, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """An answer with the ticks and the certainty of every token drawn over it.

    Tokens that make one character together are drawn together, with the most ticks and the least certainty of them.

    Args:
        answer: the answer.
        tokenizer: its tokenizer.
        most: ticks that have the darkest shade.
    """
    drawn, text, first = [], "", 0
    for last in range(len(answer.ticks_used)):
        so_far = str(
            tokenizer.decode(
                list(answer.ids[: last + 1]), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        if so_far.endswith("\ufffd") and last + 1 < len(answer.ticks_used):
            continue  # the last token ends within a character
        piece, text = so_far[len(text) :], so_far
        if piece:
            ticks, sure = max(answer.ticks_used[first : last + 1]), min(answer.certainties[first : last + 1])
            said = f"{ticks} of {most} tick{'s' if most > 1 else ''}, certainty {sure:.2f}"
            style = f"--ticks:{ticks / most:.2f};--doubt:{max(0.0, 1 - sure):.2f}"
            drawn.append(f'<i style="{style}" title="{said}">{_lines(piece)}</i>')
        first = last + 1
    return _block("".join(drawn) + _lines(answer.text[len(text) :]))


def draw_facts(facts: Mapping[str, str], ended: int) -> str:
    """Names and values in two columns.

    Args:
        facts: values by name.
        ended: how many answers and readings have ended, for scripts that wait for one.

    Example:
        >>> draw_facts({"packs": "2"}, ended=3)
        '<dl class="karla-facts" data-ended="3"><dt>packs</dt><dd>2</dd></dl>'
    """
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="karla-facts" data-ended="{ended}">{rows}</dl>'


def draw_note(text: str) -> str:
    """A quiet line."""
    return f'<div class="karla-dim">{escape(text)}</div>'


def describe_speed(answer: Answer, thinks: bool) -> dict[str, str]:
    """Speed and thoughts of an answer, for people.

    Args:
        answer: the answer.
        thinks: whether its model has ticks.
    """
    facts = {
        "last answer": f"{answer.tokens:,} tokens{', stopped' if answer.stopped else ''}",
        "speed": f"{answer.tokens / answer.seconds:.1f} tokens/s",
    }
    if thinks:
        facts |= {"ticks per token": f"{answer.ticks:.1f}", "certainty": f"{answer.certainty:.2f}"}
    return facts


def pack_label(pack: Pack) -> str:
    """A pack in one line of plain text."""
    sources = ", ".join(pack.sources[:MOST_SOURCES])
    if len(pack.sources) > MOST_SOURCES:
        sources += f" and {len(pack.sources) - MOST_SOURCES} more"
    parts = [pack.name, f"{pack.rows:,} rows", format_bytes(pack.bytes_on_disk), sources]
    if pack.damaged:
        parts.append(f"damaged files: {len(pack.damaged)}")
    return " · ".join(part for part in parts if part)


def _lines(text: str) -> str:
    return re.sub(r"\r\n?|\n", "<br>", escape(text))  # a blank line would end the block


def _block(html: str) -> str:
    return f'<div class="karla-said">{html}</div>'
