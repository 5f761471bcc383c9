"""Learning while reading: next-token loss of finished chunks changes the persistent levels, each at its own rate.

For every chunk of C tokens of a text, with the fast weights that the chunks before have left, and for every level l:

    G_l <- G_l + grad_{delta_l} loss(W + delta; chunk);      at steps t that the period P_l divides:
    D = rate * G_l / P_l,   delta_l <- delta_l - D * min(1, limit * ||W_l|| / ||D||),   G_l <- 0

(Nested Learning, equation 31, with the norm of a step bounded by a share of the level's weights.) Only deltas change: the trained weights W stay as they are.
The end of a text finishes its last chunk.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from .cache_hope import HopeCache, load_cache, save_cache
from .cms_hope import Level, named_levels
from .nested_karla import Clock, LevelSpec


LEARNING_FILE = "learning.safetensors"
RATE = 1.0
LIMIT = 0.01


class LearnReport(NamedTuple):
    """What one call of `learn` did.

    Attributes:
        texts: number of texts.
        tokens: tokens read, over all passes.
        losses_before: mean next-token loss of every text in nats, before the call.
        losses_after: the same after the call.
        updates: for each level, how often it changed.
        seconds: wall time.
        tokens_per_second: tokens / seconds.
    """

    texts: int
    tokens: int
    losses_before: list[float]
    losses_after: list[float]
    updates: dict[str, int]
    seconds: float
    tokens_per_second: float


class LearnedLevelsMixin:
    """What was learned by reading, of a model with a `hope` that holds the levels."""

    _learning_step: int = 0

    @property
    def learning_step(self) -> int:
        """Chunks learned since the last reset or merge."""
        return self.hope._learning_step

    @property
    def has_learned(self) -> bool:
        """Whether `learn` has changed anything since the last reset or merge."""
        return self.learning_step > 0

    def reset_learning(self) -> None:
        """Forget all that was learned by reading."""
        for _, level in named_levels(self.hope):
            level.forget()
        self.hope._learning_step = 0

    def merge_learning(self) -> None:
        """Add what was learned to the trained weights (modified in place), from which it cannot be told afterwards."""
        for _, level in named_levels(self.hope):
            level.merge()
        self.hope._learning_step = 0

    def _level_groups(self) -> dict[str, list[Level]]:
        """Levels of all blocks, from the fastest to the slowest, ready to learn."""
        groups: dict[str, list[Level]] = {}
        for name, level in named_levels(self.hope):
            level.begin_learning()
            groups.setdefault(f"level {int(name.rpartition('.')[2]) + 1}", []).append(level)
        return groups


class HopeLearningMixin(LearnedLevelsMixin):
    """Learning while reading, and sessions."""

    def learn(
        self,
        texts: str | Sequence[str],
        tokenizer,
        *,
        passes: int = 1,
        rate: float = RATE,
        limit: float = LIMIT,
        progress: bool = True,
    ) -> LearnReport:
        """Learn texts by changing the deltas of the persistent levels; trained weights are not modified.

        What has accumulated for a slow level waits for the next call, so that two calls do what one with all texts does.

        Args:
            texts: a text or several, each of two tokens or more.
            tokenizer: the encoder's tokenizer.
            passes: how often all texts are read.
            rate: factor of a step.
            limit: largest norm of a level's step, as a share of the norm of its weights.
            progress: whether to show a progress bar.

        Raises:
            ValueError: if there is no text, a text is too short, or `passes`, `rate` or `limit` is not positive.
        """
        started = time.perf_counter()
        rows = self._rows([texts] if isinstance(texts, str) else list(texts), tokenizer)
        for name, value in {"passes": passes, "rate": rate, "limit": limit}.items():
            if not value > 0:
                raise ValueError(f"`{name}` is {value}; give more than 0.")
        before = [self.text_loss(row) for row in rows]
        groups = self._level_groups()
        updates = dict.fromkeys(groups, 0)
        tokens = passes * sum(row.shape[1] for row in rows)
        bar = logging.tqdm(total=tokens, unit="tok", desc="learning", disable=not progress)
        with bar, self._in_eval_mode(), _gradients_of(_deltas(groups)):
            for row in rows * passes:
                for loss, count in self._chunk_losses(row):
                    self._accumulate(loss, groups)
                    for name in self._take_steps(groups, rate, limit):
                        updates[name] += 1
                    bar.update(count)
                bar.update(1)  # nothing predicts the first token
        after = [self.text_loss(row) for row in rows]
        seconds = time.perf_counter() - started
        return LearnReport(len(rows), tokens, before, after, updates, seconds, tokens / seconds)

    @torch.no_grad()
    def text_loss(self, input_ids: torch.Tensor) -> float:
        """Mean next-token loss in nats of one text [1, N], N >= 2, read in chunks."""
        with self._in_eval_mode():
            return sum(loss.item() * count for loss, count in self._chunk_losses(input_ids)) / (input_ids.shape[1] - 1)

    def save_session(self, cache: HopeCache, path: str | Path) -> None:
        """Write the state after some tokens, a cache of this model, into a safetensors file.

        Raises:
            ValueError: if the cache has seen nothing.
        """
        save_cache(cache, path, self._fingerprint())

    @torch.no_grad()
    def load_session(self, path: str | Path) -> HopeCache:
        """Read a state that `save_session` wrote; names, shapes and the model that it belongs to are checked.

        Raises:
            OSError: if the file is missing or damaged.
            ValueError: if it is of another model.
        """
        like = HopeCache(self.config.num_hidden_layers)
        self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.device), past_key_values=like)
        return load_cache(path, like, self._fingerprint())

    def _rows(self, texts: list[str], tokenizer) -> list[torch.Tensor]:
        if not texts:
            raise ValueError("There is no text to learn; give one or more.")
        rows = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) < 2:
                raise ValueError(f"The text {text[:40]!r} has {len(row)} tokens; learning needs 2 or more.")
        return [torch.tensor([row], device=self.device) for row in rows]

    def _chunk_losses(self, row: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """Mean loss of the tokens that each chunk predicts, and their number; no gradient reaches the chunk before."""
        cache, size = HopeCache(self.config.num_hidden_layers), self.config.chunk_size
        for at in range(0, row.shape[1] - 1, size):
            inputs, targets = row[:, at : at + size], row[0, at + 1 : at + size + 1]
            states = self.model(inputs, past_key_values=cache).last_hidden_state[0, : len(targets)]
            cache.detach()
            yield nn.functional.cross_entropy(self.lm_head(states).float(), targets), len(targets)

    def _accumulate(self, loss: torch.Tensor, groups: dict[str, list[Level]]) -> None:
        gradients = iter(torch.autograd.grad(loss, _deltas(groups)))
        for level in (level for levels in groups.values() for level in levels):
            for waiting in level.waiting:
                waiting.add_(next(gradients))

    @torch.no_grad()
    def _take_steps(self, groups: dict[str, list[Level]], rate: float, limit: float) -> Iterator[str]:
        """Let the clock take one step, and all levels that are due at it; yields their names."""
        clock = Clock(
            [LevelSpec(name, levels[0].update_period) for name, levels in groups.items()], self.learning_step
        )
        for name, period in clock.tick():
            steps = [waiting * (rate / period) for level in groups[name] for waiting in level.waiting]
            weights = [weight.float() for level in groups[name] for weight in level.matrices]
            norm, most = (torch.nn.utils.get_total_norm(tensors) for tensors in (steps, weights))
            for delta, step in zip(_deltas({name: groups[name]}), steps, strict=True):
                delta.sub_(step * (limit * most / norm).clamp(max=1.0))
            for level in groups[name]:
                for waiting in level.waiting:
                    waiting.zero_()
            yield name
        self.hope._learning_step = clock.step

    @contextlib.contextmanager
    def _in_eval_mode(self):
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _fingerprint(self) -> dict[str, str]:
        """Hash of some trained weights, which a session must agree with."""
        weights = torch.cat([self.hope.norm.weight.flatten(), self.hope.out.weight.flatten()])
        return {"weights": hashlib.sha256(weights.detach().float().cpu().numpy().tobytes()).hexdigest()}


def _deltas(groups: dict[str, list[Level]]) -> list[torch.Tensor]:
    return [delta for levels in groups.values() for level in levels for delta in level.deltas]


@contextlib.contextmanager
def _gradients_of(tensors: list[torch.Tensor]):
    """Inside `with`, graphs are made for these tensors."""
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


def save_learning(model: LearnedLevelsMixin, path: str | Path) -> None:
    """Write deltas, waiting gradients and the clock of a model that has learned; of another, nothing."""
    if not model.has_learned:
        return
    tensors = {f"{name}.{part}": t for name, level in named_levels(model.hope) for part, t in level.learned().items()}
    tensors = {
        name: t.detach().cpu().contiguous() for name, t in tensors.items() if ".delta." in name or bool(t.any())
    }
    save_file(tensors, path, metadata={"format": "pt", "step": str(model.learning_step)})


def load_learning(model: LearnedLevelsMixin, path: str | Path) -> None:
    """Take over what `save_learning` wrote; nothing changes unless all of it fits.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is of a model with other levels.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            step = int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OSError(f"{path} cannot be read ({error}); restore it from a good copy, or delete it.") from error
    model.reset_learning()
    model._level_groups()
    own = {f"{name}.{part}": t for name, level in named_levels(model.hope) for part, t in level.learned().items()}
    wrong = [name for name, t in tensors.items() if name not in own or own[name].shape != t.shape]
    wrong += [name for name in own if ".delta." in name and name not in tensors]
    if wrong:
        model.reset_learning()
        raise ValueError(
            f"{path} is of a model with other levels, as {sorted(wrong)[0]} shows; give the file of this model."
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    model.hope._learning_step = step
