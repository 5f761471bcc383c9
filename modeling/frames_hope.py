"""Where the tokens of one call stand: without padding, and in chunks counted from the first real token of each sequence."""

from __future__ import annotations

import torch

from .delta_hope import Span


class Frame:
    """Places of the T columns of a call.

    Real tokens come first in *compact* columns. In *frame* columns, sequences that stand at different places of a chunk
    are shifted so that the boundaries of all chunks coincide.

    Args:
        positions: [B] int64 on the CPU, real tokens of each sequence before this call.
        length: T.
        mask: [B, T], 0 at padding, or None.
        chunk_size: C.

    Example:
        >>> frame = Frame(torch.tensor([0, 0]), 3, torch.tensor([[0, 1, 1], [1, 1, 1]]), chunk_size=2)
        >>> frame.compact(torch.tensor([[9, 1, 2], [3, 4, 5]])).tolist()
        [[1, 2, 9], [3, 4, 5]]
        >>> [(span.start, span.stop) for span in frame.spans([2, 2], "cpu")]
        [(0, 2), (2, 3)]
    """

    def __init__(self, positions: torch.Tensor, length: int, mask: torch.Tensor | None, chunk_size: int):
        self.positions, self.length, self.chunk_size = positions, length, chunk_size
        self.counts = torch.full_like(positions, length)
        self._order = self._inverse = None
        if mask is not None and not bool((mask != 0).all()):
            padding = (mask == 0).long()
            self.counts = length - padding.sum(1).cpu()
            if bool((padding.diff(dim=1) < 0).any()):  # a real token after padding
                self._order = padding.argsort(dim=1, stable=True)
                self._inverse = self._order.argsort(dim=1)
        self.offsets = positions % chunk_size
        self.is_whole = bool((self.counts == length).all())
        self.is_uniform = bool((self.offsets == self.offsets[0]).all())
        self.width = length if self.is_uniform else int((self.offsets + self.counts).max())

    @property
    def first(self) -> int:
        """Place in a chunk of the first frame column."""
        return int(self.offsets[0]) if self.is_uniform else 0

    def compact(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] with real tokens first."""
        return x if self._order is None else _take(x, self._order)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `compact`."""
        return x if self._inverse is None else _take(x, self._inverse)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Frame columns [B, F, ...] of compact ones [B, T, ...]."""
        return x if self.is_uniform else self.aligned(x, self.width)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `enter`."""
        return x if self.is_uniform else self.unaligned(x)

    def aligned(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """[B, width, ...] of [B, T, ...], each sequence shifted to its place in its chunk; elsewhere anything."""
        places = torch.arange(width) - self.offsets[:, None]
        return _take(x, places.clamp(0, self.length - 1).to(x.device))

    def unaligned(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `aligned`."""
        places = torch.arange(self.length) + self.offsets[:, None]
        return _take(x, places.clamp(max=x.shape[1] - 1).to(x.device))

    def real(self, device: torch.device | str) -> torch.Tensor | None:
        """[B, F] bool where a frame column holds a real token; None if it does everywhere."""
        if self.is_whole and self.is_uniform:
            return None
        shift = 0 if self.is_uniform else self.offsets[:, None]
        places = torch.arange(self.width) - shift
        return ((places >= 0) & (places < self.counts[:, None])).to(device)

    def spans(self, periods: list[int], device: torch.device | str) -> list[Span]:
        """Spans of frame columns between boundaries, and which heads' snapshots are due at each.

        Args:
            periods: H, tokens between two snapshots of each head.
            device: where `due` is to be.
        """
        every = torch.tensor(periods)
        spans, start = [], 0
        while start < self.width:
            stop = min(start + self.chunk_size - (start + self.first) % self.chunk_size, self.width)
            at = self.positions + start if self.is_uniform else self.positions - self.offsets + start
            begun = (at >= self.positions) & (at < self.positions + self.counts)
            due = (at[:, None] % every == 0) & begun[:, None]
            if bool(due.all()) or not bool(due.any()):
                spans.append(Span(start, stop, bool(due.any())))
            else:
                spans.append(Span(start, stop, due.reshape(-1, 1, 1).to(device)))
            start = stop
        return spans


def _take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x[b, places[b]] for every b."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]
