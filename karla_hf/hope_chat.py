"""A conversation with a HOPE: the state of the fast weights goes on from turn to turn, and levels may learn what is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from karla_hf.chat import Answer, ChatSession, PieceStreamer
from karla_hf.hope_checkpoints import learning
from karla_hf.modeling.cache_hope import HopeCache
from karla_hf.modeling.learning_hope import LearnReport
from karla_hf.modeling.modeling_hope import HopeForCausalLM


class HopeSession(ChatSession):
    """A conversation with a HOPE, one text that grows; answers end with an end-of-text token.

    Args:
        model: the model; what it has learned changes if `learns`.
        tokenizer: its encoder's tokenizer.
        directory: the checkpoint's folder, where what was learned is saved.
        max_new_tokens: tokens of an answer at the most.

    Attributes:
        learns: whether every line is learned after its answer, and saved at once.
    """

    model: HopeForCausalLM  # type: ignore[assignment]

    def __init__(
        self,
        model: HopeForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        directory: str | Path,
        *,
        max_new_tokens: int = 256,
    ):
        super().__init__(model, tokenizer, directory, max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
        self.learns = False
        self._said: list[dict[str, str]] = []  # the messages that `_ids` stands for
        self._ids: list[int] = []
        self._cache: HopeCache | None = None  # has seen a beginning of `_ids`

    def answer(self, line: str, on_text: Callable[[str], None]) -> Answer:
        """Answer a line; Ctrl-C ends the answer early and the session goes on. Then learn the line, if `learns`.

        Args:
            line: what the user says.
            on_text: gets every piece of the answer as soon as it is complete.

        Raises:
            ValueError: if the tokenizer makes no token of all that was said.
            OSError: if what was learned cannot be saved; it is not learned then.
        """
        ids = torch.tensor([self._ids_before() + self._encode(line)], device=self.model.device)
        if not ids.numel():
            raise ValueError("The message has no token that the model knows; write a word.")
        end = self.model.config.eos_token_id
        streamer, stopped = PieceStreamer(self.tokenizer, on_text), False
        started = time.perf_counter()
        generate: Callable[..., Any] = self.model.generate  # type: ignore[misc]
        cache, self._cache = self._cache or HopeCache(self.model.config.num_hidden_layers), None
        try:
            generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=self.max_new_tokens,
                num_beams=1,
                eos_token_id=end,
                pad_token_id=0 if end is None else end,
                streamer=streamer,
            )
            self._cache = cache
        except KeyboardInterrupt:  # in the middle of a token the cache is no state of any text
            stopped = True
        streamer.end()
        seconds = time.perf_counter() - started
        self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": streamer.text}]
        self._ids, self._said = [*ids[0].tolist(), *streamer.ids], list(self.messages)
        learned = self.learn({"line": line}) if self.learns and len(self._encode(line)) > 1 else None
        said = tuple(streamer.ids)
        return Answer(streamer.text, len(said), 0.0, 0.0, seconds, (), stopped, ids=said, learned=learned)

    def learn(self, texts: Mapping[str, str], progress: bool = False) -> LearnReport:
        """Learn texts and save what was learned; Ctrl-C, or a failure, leaves it as it was.

        Raises:
            OSError: if it cannot be saved, or another process is writing to the folder.
            ValueError: if there is no text, or one has fewer than two tokens.
        """
        with learning(self.model, self.directory):
            report = self.model.learn(list(texts.values()), self.tokenizer, progress=progress)
        self._cache = None
        return report

    def forget_learned(self) -> int:
        """Forget all that was learned by reading, here and in the folder; returns the number of chunks.

        Raises:
            OSError: if it cannot be saved, or another process is writing to the folder.
        """
        with learning(self.model, self.directory):
            chunks = self.model.learning_step
            self.model.reset_learning()
        self._cache = None
        return chunks

    def _ids_before(self) -> list[int]:
        """Tokens of all messages so far; those of the answers as they were generated, if they were."""
        if self._said != self.messages:
            ends = [] if self.model.config.eos_token_id is None else [self.model.config.eos_token_id]
            after = {"user": [], "assistant": ends}
            encoded = [self._encode(message["content"]) + after[message["role"]] for message in self.messages]
            self._ids, self._cache = [token for ids in encoded for token in ids], None
        return self._ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
