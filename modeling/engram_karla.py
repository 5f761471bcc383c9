"""Engram, the memory that learns by reading: hashed rows in CPU RAM, read in O(1).

A pack is one table of rows. A position's names (see `hashing_karla`) address one row per family and head; a row counts
only if its fingerprint says that it belongs to that name. Each head owns fixed coordinates of the hidden state, a random
subset per family, so a read is a sparse sum of rows and no projection is needed:

    m_t = sum_f sum_j  P_{f,j}^T row_{f,j}(t),        P_{f,j} selects `head_dim` coordinates.

The rows are neither parameters nor buffers: `.to()`, quantisers, DDP and `state_dict` never touch them.
"""

from __future__ import annotations

import torch

from .hashing_karla import NO_TOKEN, HashConstants, Names, NgramFamily, hash_constants


class EngramTable:
    """The rows of one pack.

    Args:
        num_rows: rows of all heads together.
        head_dim: width of a row.

    Attributes:
        rows: [R, head_dim] float16, zero where nothing was written.
        owners: [R] int16 fingerprints, 0 for an empty row.
    """

    def __init__(self, num_rows: int, head_dim: int):
        # zeros come as untouched pages of the operating system: memory is used as rows are written
        self.rows = torch.zeros(num_rows, head_dim, dtype=torch.float16)
        self.owners = torch.zeros(num_rows, dtype=torch.int16)

    def owned(self, names: Names) -> torch.Tensor:
        """[..., F, H] bool: which addressed rows belong to their name."""
        wanted = names.fingerprints[..., None]
        return (self.owners[names.rows] == wanted) & (wanted != 0)

    def read(self, names: Names) -> torch.Tensor:
        """[..., F, H, head_dim] float32: the addressed rows, zero where the row belongs to another name."""
        rows = self.rows[names.rows].float()
        return rows.masked_fill_(~self.owned(names)[..., None], 0.0)

    def claim(self, names: Names) -> None:
        """Give every empty addressed row to the first name that asks for it; owned rows keep their owner."""
        rows = names.rows.flatten()
        wanted = names.fingerprints[..., None].expand_as(names.rows).flatten()
        empty = (self.owners[rows] == 0) & (wanted != 0)
        rows, wanted = rows[empty].flip(0), wanted[empty].flip(0)
        # numpy assigns in order, so after the flip the first name's fingerprint is the one that stays
        self.owners.numpy()[rows.numpy()] = wanted.numpy()

    def add(self, names: Names, change: torch.Tensor) -> None:
        """Add to the owned rows; where several positions share a row, the mean of their changes (count-mean).

        Args:
            names: of P positions.
            change: [P, F, H, head_dim] float32.
        """
        owned = self.owned(names)
        rows, inverse, counts = torch.unique(names.rows[owned], return_inverse=True, return_counts=True)
        total = torch.zeros(len(rows), change.shape[-1]).index_add_(0, inverse, change[owned])
        self.rows[rows] = (self.rows[rows].float() + total / counts[:, None]).to(self.rows.dtype)

    @property
    def num_owned(self) -> int:
        """Rows that belong to a name."""
        return int((self.owners != 0).sum())


class Engram:
    """A stack of packs behind one set of addresses.

    Args:
        constants: hash constants.
        families: the F families, in the order of `constants.primes`.
        coordinates: [F, H, head_dim] int64, coordinates of the hidden state that each head holds; distinct in a family.
        hidden_size: width D of the hidden state.

    Attributes:
        packs: tables by name, in the order in which they were made.
        enabled: when False, reads return zero and nothing else changes.
    """

    def __init__(
        self, constants: HashConstants, families: list[NgramFamily], coordinates: torch.Tensor, hidden_size: int
    ):
        self.constants = constants
        self.families = families
        self.coordinates = coordinates
        self.hidden_size = hidden_size
        self.weights = torch.tensor([family.weight for family in families])
        self.packs: dict[str, EngramTable] = {}
        self.enabled = True

    @property
    def history(self) -> int:
        """Tokens of context that an address needs before the current one."""
        return max(family.span for family in self.families) - 1

    @property
    def active(self) -> bool:
        """Whether a read can be other than zero."""
        return self.enabled and bool(self.packs)

    def compress(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compressed ids [B, T] int64 on the CPU, `NO_TOKEN` at masked positions.

        Args:
            input_ids: [B, T] int64 token ids.
            attention_mask: [B, T], 0 at padding; all ones when None.
        """
        compressed = self.constants.token_map[input_ids.cpu()]
        if attention_mask is None:
            return compressed
        return compressed.masked_fill(attention_mask.cpu() == 0, NO_TOKEN)

    def open_pack(self, name: str) -> EngramTable:
        """The table of `name`, made empty when it does not exist."""
        if name not in self.packs:
            self.packs[name] = EngramTable(self.constants.num_rows, self.coordinates.shape[-1])
        return self.packs[name]

    def read(self, names: Names) -> torch.Tensor:
        """What the memory adds to the hidden state.

        Args:
            names: of any leading shape.

        Returns:
            [..., D] float32 on the CPU, sum over packs; each position depends on its own names only.
        """
        memory = torch.zeros(*names.rows.shape[:-2], self.hidden_size)
        if self.active:
            index = self.coordinates.flatten()
            for table in self.packs.values():
                memory.index_add_(-1, index, table.read(names).flatten(-3))
        return memory


def new_engram(config, token_map: torch.Tensor, pad_id: int) -> Engram:
    """An empty memory with constants drawn from the seed of a `KarlaConfig`.

    Args:
        config: the configuration.
        token_map: [V] int64 compressed ids, see `compress_vocabulary`.
        pad_id: token id that stands for "no token" in a hash.
    """
    families = [NgramFamily(family["order"], family["weight"]) for family in config.engram_families]
    heads, width, hidden = config.engram_num_heads, config.engram_head_dim, config.text_config.hidden_size
    orders = [family.order for family in families]
    constants = hash_constants(orders, heads, config.engram_rows_per_head, token_map, pad_id, config.engram_seed)
    generator = torch.Generator().manual_seed(config.engram_seed)
    shuffled = [torch.randperm(hidden, generator=generator)[: heads * width] for _ in families]
    return Engram(constants, families, torch.stack(shuffled).view(-1, heads, width), hidden)
