"""The web page of `karla ui`: a conversation, files to read, packs, ticks. It needs the extra `karla-hf[ui]`.

One thread has the model, and what the pages in all browser tabs ask of it waits its turn there. A conversation belongs to
its tab; the memory is everyone's.
"""

from __future__ import annotations

import contextvars
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr

from karla_hf.chat import Answer
from karla_hf.errors import as_sentence
from karla_hf.page_html import (
    LEGEND,
    WAITING,
    Tab,
    describe_speed,
    draw_facts,
    draw_head,
    draw_note,
    draw_text,
    draw_thoughts,
    pack_label,
)
from karla_hf.page_model import LearningModel, PackedModel, PageModel


logger = logging.getLogger(__name__)
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
IN_TURN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
QUIETLY: dict[str, Any] = {**IN_TURN, "show_progress": "hidden"}


class Page:
    """The page and what its buttons do.

    Args:
        model: the model behind it.

    Attributes:
        blocks: the Gradio app, to be mounted on a server.
    """

    def __init__(self, model: PageModel):
        self.model = model
        self.packed = model if isinstance(model, PackedModel) else None
        self.learner = model if isinstance(model, LearningModel) else None
        self.closing = False
        self._worker = ThreadPoolExecutor(1, "karla-model")
        self.blocks = self._build()

    def close(self) -> None:
        """End what is being answered or read, and the thread that has the model."""
        self.closing = True
        self._worker.shutdown(cancel_futures=True)

    def _build(self) -> gr.Blocks:
        thinking = self.model.thinking
        with gr.Blocks(title=f"Karla: {self.model.title}", analytics_enabled=False, fill_width=True) as blocks:
            self.tab = gr.State(Tab())
            gr.HTML(draw_head(self.model.title))
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=340):
                    self.chat = gr.Chatbot(show_label=False, height="62vh", min_height=320, buttons=[], layout="bubble",
                                           latex_delimiters=[], allow_tags=False, feedback_options=None,
                                           placeholder="Say something, or drop a text to read.", elem_id="chat")  # fmt: skip
                    with gr.Row():
                        self.line = gr.Textbox(show_label=False, placeholder="Message", max_lines=8, scale=6,
                                               container=False, elem_id="line")  # fmt: skip
                        self.send = gr.Button("Send", variant="primary", min_width=80, scale=1, elem_id="send")
                        self.stop = gr.Button("Stop", variant="stop", min_width=80, scale=1, visible=False,
                                              elem_id="stop")  # fmt: skip
                    if thinking:
                        gr.HTML(LEGEND)
                with gr.Column(scale=3, min_width=300):
                    self._build_reading()
                    if self.packed:
                        self._build_packs()
                    if thinking:
                        self._build_thinking(thinking.ticks, thinking.threshold)
                    with gr.Accordion("Memory and speed"):
                        self.facts = gr.HTML(elem_id="facts")
            self._connect(blocks)
        return blocks

    def _build_reading(self) -> None:
        with gr.Accordion("Read"):
            self.file = gr.File(label="Drop a text file", height=110, elem_id="file")
            self.pack = gr.Textbox("default", label="into the pack", visible=self.packed is not None, max_length=64,
                                   elem_id="pack")  # fmt: skip
            self.note = gr.HTML(elem_id="note")
            self.stop_reading = gr.Button("Stop reading", variant="stop", size="sm", visible=False,
                                          elem_id="stop-reading")  # fmt: skip
            if self.learner:
                self.forget = gr.Button("Forget all that was learned", size="sm", elem_id="forget")

    def _build_packs(self) -> None:
        with gr.Accordion("Packs"):
            self.loaded = gr.CheckboxGroup(
                show_label=False, container=False, elem_classes="karla-packs", elem_id="packs"
            )
            gr.HTML(draw_note("A pack without its tick is kept, but not used."))
            with gr.Row():
                self.victim = gr.Dropdown(show_label=False, container=False, min_width=120, scale=3, elem_id="victim")
                self.forget = gr.Button("Forget", variant="stop", min_width=70, scale=1, elem_id="forget")

    def _build_thinking(self, ticks: int, threshold: float | None) -> None:
        with gr.Accordion("Thinking"):
            self.ticks = gr.Slider(1, max(2 * ticks, 4), value=ticks, step=1, label="Ticks per token, at the most",
                                   elem_id="ticks")  # fmt: skip
            self.threshold = gr.Slider(0, 1, value=1 if threshold is None else threshold, step=0.01, elem_id="certainty",
                                       label="Certainty that ends a thought (1: none does)")  # fmt: skip
            self.draws = gr.Checkbox(True, label="Draw ticks and certainty over the answers", elem_id="draws")

    def _connect(self, blocks: gr.Blocks) -> None:
        """Say what happens when; the model is asked for things one after the other, whichever tab asks."""
        settings = [self.draws, self.ticks, self.threshold] if self.model.thinking else []
        tab, draws, chat = self.tab, settings[:1], [self.line, self.chat, self.send, self.stop]
        memory = [self.facts, *([self.loaded, self.victim] if self.packed else [])]
        blocks.load(self.show_memory, tab, memory, **QUIETLY)

        asked = gr.on([self.line.submit, self.send.click], self.ask, [self.line, tab, *draws], chat, **AT_ONCE)
        replied = asked.success(self.reply, [tab, *settings], self.chat, **QUIETLY)
        replied.then(self.after_answer, [tab, *draws], chat, **AT_ONCE).then(self.show_memory, tab, memory, **QUIETLY)
        cleared = self.chat.clear(self.end, tab, None, **AT_ONCE)
        cleared.then(self.clear, [tab, *draws], self.chat, **QUIETLY)

        dropped = self.file.upload(self.before_reading, tab, [self.stop_reading, self.note], **AT_ONCE)
        read = dropped.then(self.read, [self.file, self.pack, tab], self.note, **IN_TURN)
        done = read.then(self.after_reading, tab, [self.file, self.stop_reading], **AT_ONCE)
        done.then(self.show_memory, tab, memory, **QUIETLY)

        self.stop.click(self.end, tab, None, **AT_ONCE)
        self.stop_reading.click(self.end_reading, tab, None, **AT_ONCE)
        if self.packed:
            self.loaded.input(self.use_packs, [self.loaded, tab], memory, **QUIETLY)
            self.forget.click(self.forget_pack, [self.victim, tab], [self.note, *memory], **QUIETLY)
        if self.learner:
            self.forget.click(self.forget_learned, tab, [self.note, *memory], **QUIETLY)
        if self.model.thinking:
            self.draws.change(Tab.show, [tab, self.draws], self.chat, **AT_ONCE)

    def ask(self, line: str, tab: Tab, draws: bool = False) -> tuple:
        """Take in a line, which `reply` then answers."""
        if tab.asked is not None:
            raise gr.Error("An answer is still on its way; wait for it, or press Stop.", print_exception=False)
        if not line.strip():
            raise gr.Error("The message is blank; type one first.", print_exception=False)
        tab.asked, tab.partial, tab.stop = line.strip(), "", False
        return "", tab.show(draws), gr.update(visible=False), gr.update(visible=True)

    def reply(
        self, tab: Tab, draws: bool = False, ticks: int | None = None, threshold: float | None = None
    ) -> Iterator:
        """Answer what was asked, piece by piece."""
        thinking = self.model.thinking
        if thinking and threshold == 1 and thinking.threshold is None:
            threshold = None
        pieces: SimpleQueue[str | None] = SimpleQueue()
        messages = list(tab.messages)  # the worker adds to them while pieces of the answer are still to be shown
        with suppress(KeyboardInterrupt), _told():
            future = self._submit(
                self.model.answer, messages, tab.asked, pieces.put, should_stop=lambda: tab.stop or self.closing,
                ticks=ticks, threshold=threshold,
            )  # fmt: skip
            future.add_done_callback(lambda future: pieces.put(None))
            try:
                for piece in iter(pieces.get, None):
                    tab.partial += piece
                    yield tab.show(draws)
            except GeneratorExit:  # the tab was closed
                tab.stop = True
                raise
            answer: Answer = future.result()
            tab.messages, tab.asked, tab.speed = messages, None, describe_speed(answer, thinking is not None)
            most = ticks or (thinking.ticks if thinking else 1)
            drawn = draw_thoughts(answer, self.model.tokenizer, most) if thinking else draw_text(answer.text)
            tab.drawn.append(drawn)
            yield tab.show(draws)

    def after_answer(self, tab: Tab, draws: bool = False) -> tuple:
        """Make ready for the next line; one that could not be answered is given back."""
        line, tab.asked, tab.ended = tab.asked, None, tab.ended + 1
        back = gr.skip() if line is None else line
        return back, tab.show(draws), gr.update(visible=True), gr.update(visible=False)

    def before_reading(self, tab: Tab) -> tuple:
        """Show that a file waits for its turn."""
        tab.stop_reading = False
        return gr.update(visible=True), WAITING

    def read(self, file: str, pack: str, tab: Tab, progress: gr.Progress = gr.Progress(track_tqdm=True)) -> str:  # noqa: B008
        """Read an uploaded file, which is removed then."""
        note = ""
        try:
            with _told():
                run = contextvars.copy_context().run  # so that the progress bar is shown in this tab
                note = self._submit(
                    run, self.model.read, Path(file), pack.strip(),
                    should_stop=lambda: tab.stop_reading or self.closing,
                ).result()  # fmt: skip
        except KeyboardInterrupt:
            note = "Stopped; the memory is as it was."
        finally:
            shutil.rmtree(Path(file).parent, ignore_errors=True)
        return draw_note(note)

    def after_reading(self, tab: Tab) -> tuple:
        """Make ready for the next file."""
        tab.ended += 1
        return None, gr.update(visible=False)

    def end(self, tab: Tab) -> None:
        """End the answer."""
        tab.stop = True

    def end_reading(self, tab: Tab) -> None:
        """End what is being read; the memory stays as it was."""
        tab.stop_reading = True

    def clear(self, tab: Tab, draws: bool = False) -> list:
        """Begin a new conversation."""
        tab.messages, tab.drawn = [], []
        return tab.show(draws)

    def use_packs(self, names: list[str], tab: Tab) -> list:
        """Use the packs that are ticked, of those that this tab has listed."""
        assert self.packed is not None
        with _told():
            self._submit(self.packed.use_packs, names, [name for name in tab.listed if name not in names]).result()
        return self.show_memory(tab)

    def forget_pack(self, pack: str | None, tab: Tab) -> list:
        """Forget a pack."""
        assert self.packed is not None
        note = ""
        with _told():
            if not pack:
                raise ValueError("No pack is chosen; choose the one to forget.")
            self._submit(self.packed.forget, pack).result()
            note = f"Forgot {pack}."
        return [draw_note(note), *self.show_memory(tab)]

    def forget_learned(self, tab: Tab) -> list:
        """Undo all that was learned by reading."""
        assert self.learner is not None
        note = ""
        with _told():
            note = self._submit(self.learner.forget_learned).result()
        return [draw_note(note), *self.show_memory(tab)]

    def show_memory(self, tab: Tab) -> list:
        """The packs and the facts as they are now."""
        shown: list = [gr.skip()] * (3 if self.packed else 1)
        with _told():
            facts = self._submit(self.model.describe).result()
            shown[0] = draw_facts({**facts, **tab.speed}, tab.ended)
            if self.packed:
                packs = self._submit(self.packed.packs).result()
                names = tab.listed = [pack.name for pack in packs]
                choices = [(pack_label(pack), pack.name) for pack in packs]
                loaded = [name for name in names if name not in self.packed.unloaded]
                shown[1:] = [gr.update(choices=choices, value=loaded), gr.update(choices=names, value=None)]
        return shown

    def _submit(self, work: Callable, *arguments: Any, **options: Any) -> Future:
        return self._worker.submit(work, *arguments, **options)


@contextmanager
def _told() -> Iterator[None]:
    """Show an error as one sentence and go on; of a bug, the terminal gets the traceback."""
    try:
        yield
    except CancelledError:  # the server ends
        return
    except Exception as error:
        sentence = as_sentence(error)
        if sentence is None:
            logger.exception("A bug in the page")
            sentence = "A bug kept the page from doing that; the terminal of `karla ui` shows its traceback."
        gr.Warning(escape(sentence), duration=20)
