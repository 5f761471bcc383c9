"""What Karla remembers between two calls of a generation: one extra layer of the Hugging Face `Cache`.

It holds the token ids that n-gram addresses reach back to and the head's keys and values of the last window.
As a layer of the cache it is reordered, repeated, cropped and reset together with the backbone's layers.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


FEW = 8  # new positions that are written behind the stored ones, where those have room
ROOM = 64  # positions of such room


class KarlaCacheLayer(CacheLayerMixin):
    """The last positions of every sequence.

    Args:
        keep: positions that a next token may need.
        slack: further positions that are kept so that `crop` can take back as many.

    Attributes:
        keys: [B, 2, H, T, S, d] the head's keys and values, oldest first; None before the first call.
        values: [B, T] int64 token ids on the CPU, negative at padding.
    """

    is_sliding = True
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, keep: int, slack: int):
        super().__init__()
        self.keep, self.slack, self.seen = keep, slack, 0
        self._room: tuple | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: `update` makes the tensors."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T new positions; returns all that are within reach of them.

        Args:
            key_states: [B, 2, H, T, S, d] new keys and values.
            value_states: [B, T] int64 new token ids, on the CPU.

        Returns:
            Keys and values [B, 2, H, K + T, S, d] and ids [B, K + T] with K <= `keep` earlier positions.
        """
        keys, ids, room = key_states, value_states, None
        if self.keys is not None:
            keys, room = self._followed_by(keys)
            ids = torch.cat([self.values, ids], dim=1)
        self.seen += value_states.shape[1]
        stored, reach = self.keep + self.slack, self.keep + value_states.shape[1]
        self.keys, self.values = keys[:, :, :, -stored:], ids[:, -stored:]
        self._room = room and (*room, id(self), self.keys)
        self.is_initialized = True
        return keys[:, :, :, -reach:], ids[:, -reach:]

    def _followed_by(self, new: torch.Tensor) -> tuple[torch.Tensor, tuple | None]:
        """The stored keys and values with new ones behind them, without a copy where there is room for few.

        Room is what is free behind the stored ones: a buffer and the first free place. A place is written once, so what
        was returned before stays as it is.
        """
        old, count = self.keys, new.shape[3]
        if torch.is_grad_enabled() or count > FEW:
            return torch.cat([old, new], dim=3), None
        buffer, end, owner, stored = self._room or (old, old.shape[3], 0, None)
        usable = torch.is_inference_mode_enabled() or not buffer.is_inference()
        if owner != id(self) or stored is not old or buffer.shape[3] < end + count or not usable:
            end = old.shape[3]
            buffer = old.new_empty((*old.shape[:3], end + count + ROOM, *old.shape[4:]))
            buffer[:, :, :, :end] = old
        buffer[:, :, :, end : end + count] = new
        return buffer[:, :, :, end - old.shape[3] : end + count], (buffer, end + count)

    def skip(self, count: int) -> None:
        """Pass over `count` new positions that no later one looks at; everything before them is forgotten."""
        if count:
            self.keys = self.values = None
            self.seen += count

    def part(self, rows: slice) -> KarlaCacheLayer:
        """A layer with some of the sequences."""
        layer = type(self)(self.keep, self.slack)
        layer.seen = self.seen
        if self.keys is not None:
            layer.keys, layer.values = self.keys[rows], self.values[rows]
        return layer

    def join(self, parts: list[KarlaCacheLayer]) -> None:
        """Take over what layers that were a `part` have become, in the order of the sequences."""
        self.keys = torch.cat([part.keys for part in parts])
        self.values = torch.cat([part.values for part in parts])
        self.seen, self.is_initialized = parts[0].seen, True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a full layer; Karla's own attention does not use it."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Positions seen so far."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (0 or negative, as everywhere in transformers 5).

        Raises:
            ValueError: if more are to be forgotten than can be taken back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop got {tokens_to_remove}; give minus the number of tokens to remove.")
        if tokens_to_remove == 0 or self.keys is None:
            return
        left = self.values.shape[1] + tokens_to_remove
        seen = self.seen + tokens_to_remove
        if seen < 0 or left < min(self.keep, seen):
            raise ValueError(
                f"crop got {tokens_to_remove}, but Karla's cache can take back at most {self.slack} tokens of the "
                f"{self.seen} seen; crop less or start from an empty cache."
            )
        self.seen = seen
        self.keys, self.values = self.keys[:, :, :, :left], self.values[:, :left]

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.seen, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the sequences `beam_idx` [B'], in that order."""
        if self.keys is not None:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices` [B']."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.keys is not None:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)


class RowsCacheLayer(KarlaCacheLayer):
    """What the trained rows' convolutions and addresses reach back to (`layer_engram_karla`).

    Attributes:
        keys: [B, 1, 1, T, L, D] inputs of the convolutions of the L inserted modules.
        values: [B, T] int64 compressed token ids on the CPU, negative at padding.
    """


def karla_layer(
    cache: Cache, keep: int, slack: int, past: int = 0, kind: type[KarlaCacheLayer] = KarlaCacheLayer
) -> KarlaCacheLayer:
    """The Karla layer of a cache, appended if it is not there.

    Args:
        cache: a cache whose backbone layers exist already.
        keep: see `KarlaCacheLayer`.
        slack: see `KarlaCacheLayer`.
        past: positions that the cache held before this call.
        kind: which of Karla's layers.

    Raises:
        ValueError: if the cache was filled by another model.
    """
    for layer in cache.layers:
        if type(layer) is kind:
            return layer
    if past:
        raise ValueError(
            f"past_key_values holds {past} positions but no Karla layer; give a cache that this model filled, or an "
            "empty one."
        )
    cache.layers.append(kind(keep, slack))
    return cache.layers[-1]
