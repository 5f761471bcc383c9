"""Engram memory: rows on the CPU, addressed by what has just been read, added to the hidden state.

A pack is one body of reading: levels of tables, from a small fast one to a large slow one. Each name of a position (see
`hashing_karla`) has one row; family f owns the coordinates C_f of the hidden state, a run that wraps around, so a read is
a sparse sum of rows and no projection is needed:

    m_t = sum over packs, levels and families f of  scatter(row(name_{t,f}), C_f).

The rows are neither parameters nor buffers: `.to()`, quantisers, DDP and `state_dict` never touch them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .cues_karla import HISTORY
from .hashing_karla import NameConstants, NgramFamily, name_constants
from .levels_karla import EngramLayout, Pack
from .ranks_karla import ALONE
from .sentences_karla import NO_TOKEN
from .table_karla import spread
from .words_karla import Lexicon


class Engram:
    """A stack of packs behind one set of addresses.

    Args:
        constants: what names depend on.
        families: the F families.
        layout: the sizes.

    Attributes:
        damaged: files of the memory that could not be loaded, and why.
        saved: folders that hold the memory as it was loaded or saved there, with the hash of their manifests.
        made_with: the backbone that it is written with.
        packs: by name, in the order in which they were made.
        enabled: when False, reads return zero and nothing else changes.
        lexicon: what tokens look like, which cues need; None where that is not known, and then there are no cues.
        starts: first coordinate of the hidden state that each family owns, of `layout.width` that wrap around at the end.
        ranks: the processes that read together.
    """

    def __init__(self, constants: NameConstants, families: list[NgramFamily], layout: EngramLayout):
        self.constants, self.families, self.layout = constants, families, layout
        self.damaged: dict[str, str] = {}
        self.saved: dict[Path, str] = {}
        self.made_with: dict = {}
        self.weights = torch.tensor([family.weight for family in families])
        self.packs: dict[str, Pack] = {}
        self.enabled, self.ranks = True, ALONE
        self.lexicon: Lexicon | None = None
        self.starts = [family * layout.hidden_size // len(families) for family in range(len(families))]

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden state."""
        return self.layout.hidden_size

    @property
    def history(self) -> int:
        """Tokens of context that an n-gram needs before the current one."""
        return max(family.span for family in self.families) - 1

    @property
    def reach(self) -> int:
        """Tokens of context that a read needs before the current one."""
        return self.history if self.lexicon is None else max(self.history, HISTORY - 1)

    @property
    def active(self) -> bool:
        """Whether a read can be other than zero."""
        return self.enabled and bool(self.packs)

    @staticmethod
    def history_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids [B, T] int64 on the CPU, `NO_TOKEN` at masked positions.

        Args:
            input_ids: [B, T] int64 token ids.
            attention_mask: [B, T], 0 at padding; all ones when None.
        """
        ids = input_ids.cpu()
        return ids if attention_mask is None else ids.masked_fill(attention_mask.cpu() == 0, NO_TOKEN)

    def open_pack(self, name: str) -> Pack:
        """The pack of that name, made empty when it does not exist."""
        if name not in self.packs:
            self.packs[name] = self.new_pack()
        return self.packs[name]

    def new_pack(self) -> Pack:
        """An empty pack of this memory's sizes, not yet one of its packs."""
        return Pack(self.layout, len(self.families))

    def read(self, names: torch.Tensor) -> torch.Tensor:
        """What the memory adds to the hidden state.

        Args:
            names: [..., F] int64.

        Returns:
            [..., D] float32 on the CPU, sum over packs; each position depends on its own names only.
        """
        memory = torch.zeros(*names.shape[:-1], self.hidden_size)
        if self.enabled:
            names = names.contiguous()
            for pack in self.packs.values():
                for table in pack.tables:
                    table.add_rows_to(memory, names, self.starts)
        return memory

    def look_up(self, names: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Every pack's rows of names, and which of them it holds.

        Args:
            names: [N] int64.

        Returns:
            [packs, N, width] float32, zero where there is none; [packs, N] bool. In the order of `packs`, at least one.
        """
        packs = self.packs.values()
        held = torch.from_numpy(np.stack([pack.holds(names) for pack in packs]))
        return torch.stack([pack.read(names) for pack in packs]), held

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, F, width] float32 at the families' coordinates, summed: [N, D]."""
        state = rows.new_zeros(len(rows), self.hidden_size)
        spread(state, rows, self.starts)
        return state

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """The families' coordinates of states [N, D]: [N, F, width]."""
        twice = torch.cat([states, states], dim=-1)
        return torch.stack([twice[:, start : start + self.layout.width] for start in self.starts], dim=1)


def new_engram(config, token_map: torch.Tensor, boundaries: torch.Tensor, pad_id: int) -> Engram:
    """An empty memory with constants drawn from the seed of a `KarlaConfig`.

    Args:
        config: the configuration.
        token_map: [V] int64 compressed ids, see `compress_vocabulary`.
        boundaries: [V] uint8, see `sentence_boundaries`.
        pad_id: token id that stands for "no token" in a hash.
    """
    families = [
        NgramFamily(family["order"], family["weight"], family["kind"] == "sentence")
        for family in config.engram_families
    ]
    longest = max(family.order for family in families)
    constants = name_constants(longest, token_map, boundaries, pad_id, config.engram_seed)
    layout = EngramLayout(
        hidden_size=config.text_config.hidden_size,
        width=config.engram_num_heads * config.engram_head_dim,
        chunk_size=config.engram_chunk_size,
        update_periods=tuple(config.engram_update_periods),
        num_rows=config.engram_rows_per_head * len(families),
        max_rows=config.engram_max_rows,
    )
    return Engram(constants, families, layout)
