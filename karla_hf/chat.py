"""A conversation with a Karla: answers come piece by piece, and files can be read in between."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from karla_hf.checkpoints import load_memory
from karla_hf.documents import find_texts
from karla_hf.modeling.generating_karla import recorded_thoughts
from karla_hf.modeling.learning_hope import LearnReport
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.reading_karla import ReadReport
from karla_hf.surprise import Surprise, first_states, measure_surprise


@dataclass(frozen=True)
class Answer:
    """What a model said, and how it thought.

    Attributes:
        text: the answer.
        tokens: tokens generated.
        ticks: mean ticks per token; 0 if there is no token.
        certainty: mean certainty per token, 0 to 1.
        seconds: wall time.
        ticks_used: ticks of every token.
        stopped: whether Ctrl-C ended it.
        surprise: how surprising the line was that it answers; None if no token of it can be told from the template.
        ids: the tokens.
        certainties: certainty of every token.
        learned: what learning the line did, of a HOPE that learns.
    """

    text: str
    tokens: int
    ticks: float
    certainty: float
    seconds: float
    ticks_used: tuple[int, ...]
    stopped: bool
    surprise: Surprise | None = None
    ids: tuple[int, ...] = ()
    certainties: tuple[float, ...] = ()
    learned: LearnReport | None = None


class _Prompt(NamedTuple):
    """Tokens of a conversation, and which of them are the last message."""

    ids: list[int]
    start: int
    end: int


class ChatSession:
    """A conversation. With a chat template, its messages; without one, a text that grows.

    Args:
        model: the model; its memory changes when something is read or forgotten.
        tokenizer: its tokenizer.
        directory: the checkpoint's folder, where the memory is saved.
        max_new_tokens: tokens of an answer at the most.

    Attributes:
        messages: what was said so far, as `{"role": "user" or "assistant", "content": text}`.
        ticks: ticks per token, or None for the configuration's.
        threshold: certainty at which a token needs no further ticks, or None for the configuration's.
    """

    def __init__(
        self,
        model: KarlaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        directory: str | Path,
        *,
        max_new_tokens: int = 256,
    ):
        self.model, self.tokenizer, self.directory = model, tokenizer, Path(directory)
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = []
        self.ticks: int | None = None
        self.threshold: float | None = None
        self._memory_is_whole = True

    @property
    def has_memory(self) -> bool:
        """Whether the model has packs to read into."""
        return hasattr(self.model, "packs")

    @property
    def has_ticks(self) -> bool:
        """Whether the model thinks in ticks."""
        return hasattr(self.model.config, "ctm_num_ticks")

    def answer(self, line: str, on_text: Callable[[str], None]) -> Answer:
        """Answer a line; Ctrl-C ends the answer early and the session goes on.

        Args:
            line: what the user says.
            on_text: gets every piece of the answer as soon as it is complete.

        Raises:
            ValueError: if the line alone is longer than the model's context; nothing is remembered of it then.
        """
        self._mend_memory()
        prompt = self._prompt([*self.messages, {"role": "user", "content": line}])
        ids = torch.tensor([prompt.ids], device=self.model.device)
        chosen = {"max_ticks": self.ticks, "certainty_threshold": self.threshold}
        options = {key: value for key, value in chosen.items() if value is not None}
        ends = {self.tokenizer.eos_token_id, *_as_list(self.model.generation_config.eos_token_id)} - {None}
        streamer = PieceStreamer(self.tokenizer, on_text)
        started, stopped, surprise = time.perf_counter(), False, None
        generate: Callable[..., Any] = self.model.generate
        with recorded_thoughts(self.model) as records, first_states(self.model) as states:
            try:
                generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.max_new_tokens,
                    num_beams=1,
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=min(ends, default=0),
                    streamer=streamer,
                    **options,
                )
            except KeyboardInterrupt:
                stopped = True
        streamer.end()
        seconds = time.perf_counter() - started
        self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": streamer.text}]
        with suppress(KeyboardInterrupt):  # the answer stands
            if states:
                surprise = measure_surprise(self.model, ids, prompt.start, prompt.end, states[0], **options)
        thoughts = [(int(used[0, -1]), float(sure[0, -1])) for used, sure in records[: len(streamer.ids)]]
        ticks, certainty = torch.tensor(thoughts or [(0.0, 0.0)], dtype=torch.float64).mean(0).tolist()
        said, sure = tuple(streamer.ids), tuple(sure for _, sure in thoughts)
        used = tuple(used for used, _ in thoughts)
        return Answer(streamer.text, len(said), ticks, certainty, seconds, used, stopped, surprise, said, sure)

    def read(self, path: str | Path) -> ReadReport:
        """Read a file, or the texts of a folder as `find_texts` finds them, into the pack "default"; see `read_texts`.

        Raises:
            OSError: if the file or folder cannot be read, or the memory not saved.
            ValueError: if the file is blank or not UTF-8, or the folder holds no text or too much.
        """
        return self.read_texts(find_texts(path).texts)

    def read_texts(self, texts: Mapping[str, str]) -> ReadReport:
        """Read texts by their titles into the pack "default" and save the memory.

        Ctrl-C, or a failure, leaves the memory as it was, in RAM and on disk.

        Raises:
            OSError: if the memory cannot be saved.
            ValueError: if there is no text, or one has fewer than two tokens.
        """
        with self._changing_memory():
            report = self.model.read(list(texts.values()), self.tokenizer, title=list(texts))
            self.model.save_memory(self.directory)
        return report

    def forget(self, pack: str) -> None:
        """Remove a pack and save the memory; a failure leaves it as it was.

        Raises:
            KeyError: if there is no such pack.
            OSError: if the memory cannot be saved.
        """
        with self._changing_memory():
            self.model.forget(pack)
            self.model.save_memory(self.directory)

    @contextmanager
    def _changing_memory(self) -> Iterator[None]:
        """Whatever ends the work inside, even twice Ctrl-C, the memory in RAM is that on disk before it is used again."""
        self._mend_memory()
        self._memory_is_whole = False
        try:
            yield
            self._memory_is_whole = True
        finally:
            self._mend_memory()

    def _mend_memory(self) -> None:
        if not self._memory_is_whole:
            self.model.set_engram(*load_memory(self.directory))
            self._memory_is_whole = True

    def set_ticks(self, text: str) -> int:
        """Set the ticks per token from what a user typed; an empty text changes nothing. Returns the number in force.

        Raises:
            ValueError: if the text is no whole number from 1.
        """
        if text:
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"/ticks takes a whole number from 1, but was given {text!r}.")
            self.ticks = int(text)
        return self.ticks or self.model.config.ctm_num_ticks

    def set_threshold(self, text: str) -> float | None:
        """Set the certainty that ends a thought from what a user typed; an empty text changes nothing.

        Returns:
            The threshold in force; None where every token gets all its ticks.

        Raises:
            ValueError: if the text is no number from 0 to 1.
        """
        if text:
            try:
                threshold = float(text)
            except ValueError:
                threshold = -1.0
            if not 0.0 <= threshold <= 1.0:
                raise ValueError(f"/certainty takes a number from 0 to 1, but was given {text!r}.")
            self.threshold = threshold
        return self.model.config.certainty_threshold if self.threshold is None else self.threshold

    def _prompt(self, messages: list[dict[str, str]]) -> _Prompt:
        """Tokens of the conversation, without its oldest messages if it is longer than the context."""
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        room = None if limit is None else limit - self.max_new_tokens
        while True:
            prompt = self._tokens(messages)
            if room is None or len(prompt.ids) <= room:
                return prompt
            if len(messages) == 1:
                raise ValueError(
                    f"The message has {len(prompt.ids):,} tokens, but the context has room for {max(room, 0):,} beside an "
                    f"answer of {self.max_new_tokens:,}; write a shorter one, or read a file with /read."
                )
            messages = messages[2:]

    def _tokens(self, messages: list[dict[str, str]]) -> _Prompt:
        if self.tokenizer.chat_template is not None:
            text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        else:
            ends = {"user": "", "assistant": "\n"}
            text = "".join(message["content"] + ends[message["role"]] for message in messages)
        fast, last = self.tokenizer.is_fast, messages[-1]["content"].strip()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        first = text.rfind(last)
        if not fast or first < 0:
            return _Prompt(encoded["input_ids"], 0, 0)
        inside = [begin < first + len(last) and end > first for begin, end in encoded["offset_mapping"]]
        start = inside.index(True) if True in inside else 0
        return _Prompt(encoded["input_ids"], start, start + sum(inside))


class PieceStreamer(BaseStreamer):
    """Decodes generated tokens and hands on the text as far as its characters are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.text = ""
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take in the prompt, which is passed over, and then one token at a time."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self._decode()
        if not text.endswith("\ufffd"):  # else the last token ends within a character
            self._emit(text)

    def end(self) -> None:
        """Hand on what is left; a second call does nothing."""
        self._emit(self._decode())

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _emit(self, text: str) -> None:
        piece, self.text = text[len(self.text) :], text
        if piece:
            self.on_text(piece)


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [value] if value is not None else []
