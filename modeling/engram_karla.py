"""Engram, the memory that learns by reading: hashed rows in CPU RAM, read in O(1), written by a delta rule.

A pack is one table of rows. A position's names (see `hashing_karla`) address one row per family and head; a row counts
only if its fingerprint says that it belongs to that name. Each head owns fixed coordinates of the hidden state, a random
subset per family, so a read is a sparse sum of rows and no projection is needed:

    m_t = sum_f sum_j  P_{f,j}^T row_{f,j}(t),        P_{f,j} selects `head_dim` coordinates.

The write moves the rows of a position so that its next token becomes likely. With output embeddings W, the mean
competitor c = sum_{k != y} p_k W_k / (1 - p_y) and d = W_y - c, a change along d moves the margin of y by d . change, so

    change = margin * d / sum_f w_f |M_f d|^2,        rows_{f,j} += w_f * P_{f,j} change,

with M_f the coordinates whose rows the name owns and w_f the family's weight: a normalised delta rule (Widrow-Hoff) on
the final hidden state, exact for two classes, repeated a few times for more. Nothing is differentiated through the
backbone.

The rows are neither parameters nor buffers: `.to()`, quantisers, DDP and `state_dict` never touch them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .hashing_karla import NO_TOKEN, HashConstants, Names, NgramFamily, hash_constants


class WriteRule(NamedTuple):
    """Constants of the write.

    Attributes:
        target: probability at which a token counts as learned, in (0, 1).
        overshoot: nats of log-odds beyond the target that a correction aims at.
        max_margin: largest correction in nats of log-odds.
        repeats: corrections per round at the most.
        rounds: how often the full vocabulary is looked at; a second look catches tokens that a correction raised from
            beyond the candidates.
        candidates: tokens whose probability is tracked exactly in a round; the rest is one constant mass.
        least_coverage: least share of |d|^2 that a correction is divided by.
    """

    target: float = 0.9
    overshoot: float = 0.1
    max_margin: float = 10.0
    repeats: int = 4
    rounds: int = 2
    candidates: int = 16
    least_coverage: float = 0.1


DEFAULT_RULE = WriteRule()


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


class WriteResult(NamedTuple):
    """What a write did.

    Attributes:
        surprise_before: [P] float32, -log p of the token before the write, in nats.
        surprise_after: [P] float32, the same after it, from the tracked candidates.
        written: [P] bool, positions that were corrected.
    """

    surprise_before: torch.Tensor
    surprise_after: torch.Tensor
    written: torch.Tensor


@torch.no_grad()
def write_chunk(
    engram: Engram,
    table: EngramTable,
    names: Names,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    rule: WriteRule = DEFAULT_RULE,
) -> WriteResult:
    """Write one chunk of positions: every read of the chunk sees the table as it was before the chunk.

    Equal to `naive_write_chunk` up to rounding. Implements the normalised delta rule of the module's description.

    Args:
        engram: the memory; reads see all of its packs.
        table: the pack that is written (modified in place); one of `engram.packs`.
        names: of the P positions.
        hidden_states: [P, D] final hidden states without the memory, any float dtype. Not modified.
        targets: [P] int64, the token that followed.
        output_embeddings: [V, D] rows of the output layer, scaled so that logits = h W^T + bias.
        bias: [V] of the output layer, or None.
        rule: constants of the write.

    Returns:
        Surprise before and after, and which positions were written.
    """
    pending = torch.arange(len(targets))
    before = after = torch.empty(0)
    written = torch.zeros(len(targets), dtype=torch.bool)
    for _ in range(rule.rounds):
        states = hidden_states[pending] + engram.read(names.select(pending)).to(hidden_states)
        logits = torch.nn.functional.linear(states, output_embeddings, bias).float()
        total = logits.logsumexp(-1)
        surprise = (total - logits.gather(-1, targets[pending][:, None])[:, 0]).cpu()
        if len(after) == 0:
            before, after = surprise, surprise.clone()
        after[pending] = surprise
        low = surprise > -math.log(rule.target)
        pending = pending[low]
        if len(pending) == 0:
            break
        problem = _Candidates.gather(logits[low], total[low], targets[pending], output_embeddings, rule.candidates)
        named, log_odds = _correct(engram, table, names.select(pending), problem, rule)
        after[pending] = torch.nn.functional.softplus(-log_odds)
        written[pending[named]] = True
    return WriteResult(before, after, written)


def _correct(
    engram: Engram, table: EngramTable, names: Names, problem: _Candidates, rule: WriteRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correct positions until they reach the target; returns which can be corrected, [P], and log-odds of y, [P]."""
    table.claim(names)
    gain = _owned_weights(engram, table, names)  # [P, D]
    named = gain.sum(-1) > 0
    start = engram.read(names)
    aim = _logit(rule.target)
    for _ in range(rule.repeats):
        direction, log_odds = problem.direction(engram.read(names) - start)
        todo = named & (log_odds < aim)
        if not bool(todo.any()):
            break
        margin = (aim + rule.overshoot - log_odds[todo]).clamp(max=rule.max_margin)
        square = direction[todo].square()
        strength = (gain[todo] * square).sum(-1)
        strength = torch.maximum(strength, rule.least_coverage * square.sum(-1))
        change = direction[todo] * (margin / strength)[:, None]  # [P, D]
        table.add(names.select(todo), change[:, engram.coordinates] * engram.weights[:, None, None])
    return named, problem.direction(engram.read(names) - start)[1]


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def _owned_weights(engram: Engram, table: EngramTable, names: Names) -> torch.Tensor:
    """[P, D]: how much of a change at each coordinate reaches the read, summed over families."""
    owned = table.owned(names).float() * engram.weights[:, None]  # [P, F, H]
    width = engram.coordinates.shape[-1]
    spread = owned[..., None].expand(*owned.shape, width).flatten(1)
    return torch.zeros(len(owned), engram.hidden_size).index_add_(1, engram.coordinates.flatten(), spread)


class _Candidates(NamedTuple):
    """The likeliest tokens of each position, the target first; everything else is one mass that stays constant."""

    logits: torch.Tensor  # [P, C + 1]
    embeddings: torch.Tensor  # [P, C + 1, D]
    duplicate: torch.Tensor  # [P, C + 1] bool, the target among the likeliest
    rest: torch.Tensor  # [P] log mass of all other tokens
    mean_embedding: torch.Tensor  # [D]

    @classmethod
    def gather(
        cls, logits: torch.Tensor, total: torch.Tensor, targets: torch.Tensor, embeddings: torch.Tensor, count: int
    ) -> _Candidates:
        top = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
        index = torch.cat([targets[:, None], top], dim=-1)
        duplicate = index == targets[:, None]
        duplicate[:, 0] = False
        chosen = logits.gather(-1, index).masked_fill(duplicate, -torch.inf)
        tracked = chosen.logsumexp(-1)
        rest = total + torch.log1p(-(tracked - total).exp().clamp(max=1 - 1e-7))
        return cls(
            chosen.cpu(),
            embeddings[index].float().cpu(),
            duplicate.cpu(),
            rest.cpu(),
            embeddings.mean(0).float().cpu(),
        )

    def direction(self, moved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """d = W_y - mean competitor, [P, D], and the log-odds of y, [P], after the memory has moved by [P, D]."""
        logits = self.logits + torch.einsum("pcd,pd->pc", self.embeddings, moved)
        logits = logits.masked_fill(self.duplicate, -torch.inf)
        others = torch.cat([logits[:, 1:], self.rest[:, None]], dim=-1)
        share = others.softmax(-1)
        competitor = torch.einsum("pc,pcd->pd", share[:, :-1], self.embeddings[:, 1:])
        competitor = competitor + share[:, -1:] * self.mean_embedding
        return self.embeddings[:, 0] - competitor, logits[:, 0] - others.logsumexp(-1)
