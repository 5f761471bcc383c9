"""A HOPE behind the web page, and which model a folder puts there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from karla_hf.chat import Answer
from karla_hf.checkpoints import model_kind
from karla_hf.hope_chat import HopeSession
from karla_hf.hope_checkpoints import is_untrained, load_hope
from karla_hf.modeling.learning_hope import LEARNING_FILE
from karla_hf.page_model import KarlaPageModel, PageModel, Thinking, read_upload, stoppable
from karla_hf.report import format_bytes


class HopePageModel:
    """A HOPE behind the page: conversations share what it has learned. It neither thinks in ticks nor keeps packs.

    Args:
        directory: the checkpoint's folder, where what was learned is saved.
        max_new_tokens: tokens of an answer at the most.
    """

    thinking: Thinking | None = None

    def __init__(self, directory: str | Path, max_new_tokens: int = 256):
        self.directory, self.max_new_tokens = Path(directory), max_new_tokens
        self.model, self.tokenizer = load_hope(directory)
        self.title = f"{self.directory.resolve().name}, a HOPE"

    def answer(
        self,
        messages: list[dict[str, str]],
        line: str,
        on_text: Callable[[str], None],
        *,
        should_stop: Callable[[], bool],
        ticks: int | None = None,
        threshold: float | None = None,
    ) -> Answer:
        """Answer a line of a conversation, which is added to; there are no ticks to set. See `HopeSession.answer`."""
        session = self._session()
        session.messages = messages
        with stoppable(self.model.model, should_stop):
            return session.answer(line, on_text)

    def read(self, path: Path, pack: str, *, should_stop: Callable[[], bool]) -> str:
        """Learn a file and save it; on any failure what was learned is as it was.

        Args:
            path: a UTF-8 text file of one of `FILE_TYPES`.
            pack: not used; all that is learned changes the same levels.
            should_stop: asked before every chunk.

        Returns:
            A sentence on what was learned.

        Raises:
            OSError: if the file cannot be read, or what was learned not saved.
            ValueError: if the file is of another type, blank or not UTF-8.
            KeyboardInterrupt: if it was stopped.
        """
        text = read_upload(path)
        with stoppable(self.model.model, should_stop):
            report = self._session().learn({path.name: text})
        return (
            f"Learned {report.tokens:,} tokens of {path.name} at {report.tokens_per_second:,.0f} per second; loss "
            f"{report.losses_before[0]:.2f} before, {report.losses_after[0]:.2f} after."
        )

    def forget_learned(self) -> str:
        """Undo all that was learned by reading, here and in the folder; returns a sentence about that."""
        return f"Forgot {self._session().forget_learned():,} chunks."

    def describe(self) -> dict[str, str]:
        """How much was learned by reading, and whether the model was trained before."""
        path = self.directory / LEARNING_FILE
        size = path.stat().st_size if path.is_file() else 0
        trained = "no: its answers are noise until `karla train`" if is_untrained(self.model) else "yes"
        return {
            "trained": trained,
            "learned by reading": f"{self.model.learning_step:,} chunks",
            "learned, on disk": format_bytes(size),
        }

    def _session(self) -> HopeSession:
        return HopeSession(self.model, self.tokenizer, self.directory, max_new_tokens=self.max_new_tokens)


def open_model(directory: str | Path, max_new_tokens: int = 256) -> PageModel:
    """The model of a folder, a Karla or a HOPE, for the page.

    Raises:
        OSError: if the folder holds neither, or a file is missing or damaged.
    """
    kind = HopePageModel if model_kind(directory) == "hope" else KarlaPageModel
    return kind(directory, max_new_tokens)
