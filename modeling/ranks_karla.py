"""Processes that read together: who does which share of the work, and how the results come together.

All messages are CPU tensors (rows live on the CPU), so that a group of gloo serves beside the NCCL group that trains.
Every method that exchanges something is a collective: all processes call it, in the same order.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed


LEAST_SHARE = 16  # positions; for fewer, reading the output layer costs more than the division saves


class Ranks:
    """The processes of a group, or this one alone.

    Args:
        group: a process group that can send CPU tensors; None for this process alone.

    Attributes:
        rank: number of this process in the group, from 0.
        size: processes of the group.
    """

    def __init__(self, group=None):
        self.group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)

    def __deepcopy__(self, memo) -> Ranks:
        return self  # a process group cannot be copied, and a copied model has the same processes

    def shares(self, count: int, least: int = LEAST_SHARE) -> list[int]:
        """How many of `count` things each process takes, in order; the last ones none where there are few.

        Args:
            count: how many there are.
            least: how many a share has, unless that is more than there are. `LEAST_SHARE` positions are multiplied by
                the same routine as all of them, so that on most machines the bits are the same.

        Example:
            >>> Ranks().shares(5)
            [5]
        """
        parts = max(1, min(self.size, count // least))
        bounds = [count * min(rank, parts) // parts for rank in range(self.size + 1)]
        return [end - start for start, end in itertools.pairwise(bounds)]

    def mine(self, sizes: list[int]) -> slice:
        """Where this process's share lies in the whole, given the sizes of all shares."""
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def gather(self, part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Every process's part, one after the other; a collective.

        Args:
            part: [n, ...], this process's; dtype and the other sizes are the same everywhere. Not modified.
            sizes: n of every process, in order.

        Returns:
            [sum of `sizes`, ...] on the device of `part`; the same bits in every process.
        """
        if self.size == 1:
            return part
        whole = torch.empty(sum(sizes), *part.shape[1:], dtype=part.dtype)
        pieces = whole.split(sizes)
        pieces[self.rank].copy_(part)
        sent = []
        for rank, piece in enumerate(pieces):
            if piece.numel():
                content = piece.view(-1).view(torch.uint8)  # bytes: not every backend knows every dtype
                source = distributed.get_global_rank(self.group, rank)
                sent.append(distributed.broadcast(content, source, self.group, async_op=True))
        for work in sent:
            work.wait()
        return whole.to(part.device)

    def map(
        self,
        function: Callable[[Any], torch.Tensor],
        items: Sequence[Any],
        sizes: list[int],
        nothing: torch.Tensor,
    ) -> torch.Tensor:
        """What the function makes of all items, each of which one process takes; a collective.

        Args:
            function: makes [n, ...] of an item.
            items: the same in every process.
            sizes: n of every item.
            nothing: [0, ...] with the dtype and device of the results, for a process without an item.

        Returns:
            [sum of `sizes`, ...], in the order of the items; the same bits in every process.
        """
        shares = self.shares(len(items), least=1)
        parts = [function(item) for item in items[self.mine(shares)]]
        counts = iter(sizes)
        per_rank = [sum(itertools.islice(counts, share)) for share in shares]
        return self.gather(torch.cat(parts) if parts else nothing, per_rank)

    def swap(self, parts: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Send each process its part (all-to-all with uneven sizes); a collective.

        Args:
            parts: [sum of `sizes`, ...] on the CPU, what goes to process 0 first.
            sizes: how many go to each process.

        Returns:
            What the processes sent to this one, [sum of its sizes, ...], that of process 0 first; and its sizes.
        """
        outgoing = torch.tensor(sizes)
        incoming = torch.empty_like(outgoing)
        distributed.all_to_all_single(incoming, outgoing, group=self.group)
        received = incoming.tolist()
        arrived = torch.empty(sum(received), *parts.shape[1:], dtype=parts.dtype)
        distributed.all_to_all_single(arrived, parts.contiguous(), received, sizes, group=self.group)
        return arrived, received

    def gather_numbers(self, values: list[float]) -> torch.Tensor:
        """[size, N] float64: the N numbers of every process; a collective."""
        return self.gather(torch.tensor([values], dtype=torch.float64), [1] * self.size)

    def check_same(self, *facts) -> None:
        """Raise ValueError, in every process, unless all were given the same work; a collective.

        Args:
            facts: what must be the same, as values whose `repr` tells them apart.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(repr(facts).encode()).digest()
        digests = self.gather(torch.tensor([list(digest)], dtype=torch.uint8), [1] * self.size)
        if (digests != digests[0]).any():
            raise ValueError(
                "The processes were given different texts, or their memories are not the same; give every process the same "
                "texts in the same order, which read() divides among them itself."
            )


ALONE = Ranks()
