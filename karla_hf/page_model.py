"""What the web page asks of a model, and a Karla that answers it.

The page needs little: answers that come piece by piece, reading a file, and some lines about the memory. A model that
thinks in ticks, or keeps what it read in packs, says so, and the page shows the panels for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from karla_hf.chat import Answer, ChatSession
from karla_hf.checkpoints import load_checkpoint, load_memory, writing
from karla_hf.documents import read_text
from karla_hf.info import Pack, describe_levels, describe_packs
from karla_hf.modeling.manifest_karla import FOLDER, MANIFEST
from karla_hf.modeling.saving_karla import content_hash
from karla_hf.report import format_bytes


FILE_TYPES = (".txt", ".md", ".rst", ".py", ".json", ".csv", ".html")


@dataclass(frozen=True)
class Thinking:
    """How a model thinks unless it is told otherwise.

    Attributes:
        ticks: ticks per token at the most.
        threshold: certainty that ends a thought; None where every token gets all its ticks.
    """

    ticks: int
    threshold: float | None


def read_upload(path: Path) -> str:
    """The text of a file that was dropped on the page.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not of `FILE_TYPES`, blank or not UTF-8; the file's folder, which says nothing to people, is left out.
    """
    if path.suffix.lower() not in FILE_TYPES:
        raise ValueError(f"{path.name} is no text to read; give a UTF-8 file that ends in {', '.join(FILE_TYPES)}.")
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error


class PageModel(Protocol):
    """A model behind the page. Only one thread uses it at a time.

    Attributes:
        title: the model in a few words.
        directory: its folder, which the page never serves.
        tokenizer: turns the tokens of an answer into text.
        thinking: None if it does not think in ticks.
    """

    title: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    thinking: Thinking | None

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
        """Answer a line of a conversation, which is added to; see `ChatSession.answer`."""

    def read(self, path: Path, pack: str, *, should_stop: Callable[[], bool]) -> str:
        """Learn a file and save it; returns a sentence about that. KeyboardInterrupt if it was stopped."""

    def describe(self) -> dict[str, str]:
        """What the memory is and how large, for people."""


@runtime_checkable
class PackedModel(Protocol):
    """What a model has besides if it keeps what it read in packs.

    Attributes:
        unloaded: names of packs that are kept but not used.
    """

    unloaded: set[str]

    def packs(self) -> list[Pack]:
        """All packs, the ones that are not loaded too."""

    def use_packs(self, names: list[str], others: list[str]) -> None:
        """Use some packs, and some others not; what else there is stays as it is."""

    def forget(self, pack: str) -> None:
        """Remove a pack for good."""


@runtime_checkable
class LearningModel(Protocol):
    """What a model has besides if reading changes its weights."""

    def forget_learned(self) -> str:
        """Undo all that was learned by reading, for good; returns a sentence about that."""


class KarlaPageModel:
    """A Karla behind the page: conversations share its memory.

    Args:
        directory: the checkpoint's folder, where the memory is saved.
        max_new_tokens: tokens of an answer at the most.

    Attributes:
        model: the Karla; packs that are not loaded are not in its memory.
        unloaded: names of packs that are kept but not used.
    """

    def __init__(self, directory: str | Path, max_new_tokens: int = 256):
        self.directory, self.max_new_tokens = Path(directory), max_new_tokens
        self.model, self.tokenizer = load_checkpoint(directory)
        config = self.model.config
        self.thinking: Thinking | None = Thinking(config.ctm_num_ticks, config.certainty_threshold)
        name = Path(config.base_model_name_or_path or type(self.model.model.backbone).__name__).name
        self.title = f"{self.directory.resolve().name} on {name}"
        self.unloaded: set[str] = set()
        self._all = self.model.engram.packs

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
        """Answer a line of a conversation.

        Args:
            messages: what was said so far; line and answer are added.
            line: what the user says.
            on_text: gets every piece of the answer.
            should_stop: asked before every token; the answer ends when it says so.
            ticks: ticks per token, or None for the configuration's.
            threshold: certainty that ends a thought, or None for the configuration's.

        Raises:
            ValueError: if the line alone is longer than the model's context.
        """
        self.refresh()
        session = ChatSession(self.model, self.tokenizer, self.directory, max_new_tokens=self.max_new_tokens)
        session.messages, session.ticks, session.threshold = messages, ticks, threshold
        with stoppable(self.model.model.backbone, should_stop):
            return session.answer(line, on_text)

    def read(self, path: Path, pack: str, *, should_stop: Callable[[], bool]) -> str:
        """Read a text file into a pack and save the memory; on any failure it is as it was.

        Args:
            path: a UTF-8 text file of one of `FILE_TYPES`.
            pack: name of the pack; made if new, loaded if it was not.
            should_stop: asked before every pass of the backbone.

        Returns:
            A sentence on what was read.

        Raises:
            OSError: if the file cannot be read, the memory not saved, or another process is writing to it.
            ValueError: if the file is of another type, blank or not UTF-8, or no pack can have that name.
            KeyboardInterrupt: if it was stopped.
        """
        text = read_upload(path)
        with self._changing(), stoppable(self.model.model.backbone, should_stop):
            report = self.model.read(text, self.tokenizer, pack=pack, title=path.name)
            self.model.save_memory(self.directory)
            self.unloaded.discard(pack)
        return (
            f"Read {report.tokens:,} tokens of {path.name} into {pack} at {report.tokens_per_second:,.0f} per second; "
            f"surprise {report.surprise_before:.2f} before, {report.surprise_after:.2f} after."
        )

    def forget(self, pack: str) -> None:
        """Remove a pack and save the memory.

        Raises:
            KeyError: if there is no such pack.
            OSError: if the memory cannot be saved, or another process is writing to it.
        """
        with self._changing():
            self.model.forget(pack)
            self.model.save_memory(self.directory)

    def use_packs(self, names: list[str], others: list[str]) -> None:
        """Use some packs, and some others not, until the page ends; nothing is saved.

        Args:
            names: packs to use.
            others: packs to keep without using them.
        """
        self.refresh()
        self.unloaded = self.unloaded - set(names) | set(others)
        self._take_out()

    def packs(self) -> list[Pack]:
        """All packs, the ones that are not loaded too."""
        self.refresh()
        with self._whole():
            return describe_packs(self.model.engram, self.directory)

    def describe(self) -> dict[str, str]:
        """Packs, rows and bytes of the memory, and what the whole model takes."""
        self.refresh()
        packs = self.packs()
        with self._whole():
            levels = {level.what: level for level in describe_levels(self.model, self.directory)}
        memory, total = levels["memory"], levels[""]
        return {
            "packs": f"{len(packs) - len(self.unloaded)} of {len(packs)} loaded" if self.unloaded else str(len(packs)),
            "rows": f"{sum(pack.rows for pack in packs):,}",
            "memory on disk": format_bytes(memory.bytes_on_disk),
            "memory in RAM": format_bytes(memory.bytes_in_ram),
            "whole model in RAM": format_bytes(total.bytes_in_ram),
        }

    def refresh(self) -> None:
        """Load the memory again if another process has changed it.

        Raises:
            OSError: if a file of it is missing or damaged.
        """
        path = Path(self.directory, FOLDER, MANIFEST)
        if content_hash(path.read_bytes()) != self.model.engram.saved.get(path.parent.resolve()):
            self._reload()
            self._take_out()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change that is saved, of all packs and while no other process writes; if it fails, the memory is as before."""
        with writing(self.directory):
            self.refresh()
            with self._whole():
                try:
                    yield
                except BaseException:
                    self._reload()
                    raise

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Inside, the memory has all packs."""
        self.model.engram.packs = self._all
        try:
            yield
        finally:
            self._all = self.model.engram.packs
            self._take_out()

    def _take_out(self) -> None:
        self.unloaded &= set(self._all)
        self.model.engram.packs = {name: pack for name, pack in self._all.items() if name not in self.unloaded}

    def _reload(self) -> None:
        self.model.set_engram(*load_memory(self.directory))
        self._all = self.model.engram.packs


@contextmanager
def stoppable(module: Any, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Inside, a pass of the module raises KeyboardInterrupt, as Ctrl-C does, once `should_stop` says so."""

    def check(module: Any, inputs: Any) -> None:
        if should_stop():
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
