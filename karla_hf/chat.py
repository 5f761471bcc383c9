"""A conversation with a Karla: answers come piece by piece, and files can be read in between."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from karla_hf.checkpoints import load_memory
from karla_hf.documents import read_text
from karla_hf.modeling.generating_karla import recorded_thoughts
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.reading_karla import ReadReport


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
        ids: the tokens.
        certainties: certainty of every token.
    """

    text: str
    tokens: int
    ticks: float
    certainty: float
    seconds: float
    ticks_used: tuple[int, ...]
    stopped: bool
    ids: tuple[int, ...] = ()
    certainties: tuple[float, ...] = ()


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

    def answer(self, line: str, on_text: Callable[[str], None]) -> Answer:
        """Answer a line; Ctrl-C ends the answer early and the session goes on.

        Args:
            line: what the user says.
            on_text: gets every piece of the answer as soon as it is complete.

        Raises:
            ValueError: if the line alone is longer than the model's context; nothing is remembered of it then.
        """
        prompt = self._prompt([*self.messages, {"role": "user", "content": line}])
        chosen = {"max_ticks": self.ticks, "certainty_threshold": self.threshold}
        options = {key: value for key, value in chosen.items() if value is not None}
        ends = {self.tokenizer.eos_token_id, *_as_list(self.model.generation_config.eos_token_id)} - {None}
        streamer = _PieceStreamer(self.tokenizer, on_text)
        started, stopped = time.perf_counter(), False
        generate: Callable[..., Any] = self.model.generate
        with recorded_thoughts(self.model) as records:
            try:
                generate(
                    input_ids=torch.tensor([prompt], device=self.model.device),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=self.model.device),
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
        self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": streamer.text}]
        thoughts = [(int(used[0, -1]), float(sure[0, -1])) for used, sure in records[: len(streamer.ids)]]
        ticks, certainty = torch.tensor(thoughts or [(0.0, 0.0)], dtype=torch.float64).mean(0).tolist()
        seconds, used = time.perf_counter() - started, tuple(used for used, _ in thoughts)
        ids, sure = tuple(streamer.ids), tuple(sure for _, sure in thoughts)
        return Answer(streamer.text, len(ids), ticks, certainty, seconds, used, stopped, ids, sure)

    def read(self, path: str | Path) -> ReadReport:
        """Read a file into the pack "default" and save the memory; Ctrl-C, or a failure to save, leaves it as it was.

        Raises:
            OSError: if the file cannot be read, or the memory not saved.
            ValueError: if the file is blank or not UTF-8.
        """
        text = read_text(path)
        try:
            report = self.model.read(text, self.tokenizer, title=Path(path).name)
            self.model.save_memory(self.directory)
        except (KeyboardInterrupt, OSError):
            self.model.set_engram(*load_memory(self.directory))
            raise
        return report

    def forget(self, pack: str) -> None:
        """Remove a pack and save the memory.

        Raises:
            KeyError: if there is no such pack.
            OSError: if the memory cannot be saved.
        """
        self.model.forget(pack)
        self.model.save_memory(self.directory)

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

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of the conversation, without its oldest messages if it is longer than the context."""
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        room = None if limit is None else limit - self.max_new_tokens
        while True:
            ids = self._tokens(messages)
            if room is None or len(ids) <= room:
                return ids
            if len(messages) == 1:
                raise ValueError(
                    f"The message has {len(ids):,} tokens, but the context has room for {max(room, 0):,} beside an answer "
                    f"of {self.max_new_tokens:,}; write a shorter one, or read a file with /read."
                )
            messages = messages[2:]

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is not None:
            text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        else:
            ends = {"user": "", "assistant": "\n"}
            text = "".join(message["content"] + ends[message["role"]] for message in messages)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class _PieceStreamer(BaseStreamer):
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
