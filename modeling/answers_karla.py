"""Answers: the rows that cues lead to, how they are written, and which of them is heard.

A cue's row says its token whatever the context: v_y is a short vector on the first `width` coordinates with

    v_y . (W_y - W_k) >= MARGIN      for every other token k,

found by projecting on the most violated half-space in turn (the perceptron with margin, Kaczmarz's step). It replaces
what n-grams say at its position. Sets of words keep silent where an n-gram of `COPY_ORDER` tokens or more is known: there a text
goes on as it was read. A cue that has led to two different tokens leads nowhere: its row is zero from then on.
"""

from __future__ import annotations

import numpy as np
import torch

from .cues_karla import cues_to_read, cues_to_write
from .engram_karla import Engram
from .hashing_karla import NO_NAME, name_positions
from .levels_karla import Pack
from .sentences_karla import NO_TOKEN
from .words_karla import Lexicon


MARGIN = 25.0  # nats by which a cue's token beats every other one, besides what the context says
OPENING_SHARE = 0.55  # of that margin, where the opening leads to the row
COPY_ORDER = 12  # tokens
_NEAREST = 64  # competitors of a token that are tracked
_STEPS = 64  # projections per round
_ROUNDS = 3  # looks at the whole vocabulary
_BATCH = 256  # tokens whose rows are found at once
_NOTHING = -1
_SAME = 0.99  # cosine above which two rows say the same


@torch.no_grad()
def say_rows(tokens: torch.Tensor, output_embeddings: torch.Tensor, width: int) -> torch.Tensor:
    """Rows that say tokens.

    Args:
        tokens: [N] int64.
        output_embeddings: [V, D], scaled so that logits = h W^T.
        width: coordinates of a row.

    Returns:
        [N, width] float32 on the CPU.

    Example:
        >>> rows = say_rows(torch.tensor([2]), torch.eye(3), width=3)
        >>> bool((rows @ torch.eye(3)).argmax() == 2)
        True
    """
    weights = output_embeddings[:, :width].float()
    own = weights[tokens]
    rows = own - weights.mean(0)
    rows *= (MARGIN / rows.square().sum(-1).clamp(min=1e-6))[:, None]
    for _ in range(_ROUNDS):
        scores = (rows @ weights.T).scatter_(1, tokens[:, None], -torch.inf)
        nearest = scores.topk(min(_NEAREST, scores.shape[1]), dim=-1).indices
        apart = own[:, None] - weights[nearest]  # [N, C, width]
        square = apart.square().sum(-1)
        for _ in range(_STEPS):
            lack = MARGIN - torch.einsum("ncw,nw->nc", apart, rows)
            lack = lack.masked_fill(square < 1e-4 * own.square().sum(-1, keepdim=True), 0.0)  # the same token twice
            worst = lack.max(-1)
            if bool((worst.values < 0.01 * MARGIN).all()):
                break
            index = torch.arange(len(tokens))
            step = worst.values.clamp(min=0) / square[index, worst.indices].clamp(min=1e-6)
            rows = rows + step[:, None] * apart[index, worst.indices]
    return rows.cpu()


class AnswerWriter:
    """Writes the answers that texts hold, text by text.

    Args:
        lexicon: what the tokens look like.
        texts: token ids of every text.
        output_embeddings: [V, D], scaled so that logits = h W^T.
        width: coordinates of a row.
        sign: 1 to learn; -1 to silence the cues that lead to what the texts say.
    """

    def __init__(
        self, lexicon: Lexicon, texts: list[list[int]], output_embeddings: torch.Tensor, width: int, sign: int = 1
    ):
        self.sign = sign
        self.cues = [_cues_of(text, lexicon) for text in texts]
        self.tokens = np.unique(np.concatenate([tokens for _, tokens in self.cues]))
        # all at once: each look at the output layer costs the same for one token and for many
        parts = [say_rows(part.clamp(min=0), output_embeddings, width) for part in
                 torch.from_numpy(self.tokens).split(_BATCH)]  # fmt: skip
        self.rows = torch.cat(parts).half().float() if parts else torch.zeros(0, width)
        self.rows[torch.from_numpy(self.tokens == _NOTHING)] = 0

    def write(self, pack: Pack, text: int) -> None:
        """Write the answers of one text into a pack, which is modified in place."""
        names, tokens = self.cues[text]
        _store(pack, names, self.rows[torch.from_numpy(np.searchsorted(self.tokens, tokens))], self.sign)


def _cues_of(text: list[int], lexicon: Lexicon) -> tuple[np.ndarray, np.ndarray]:
    """Names [N] int64 of a text's cues, and the token [N] that each leads to; `_NOTHING` where it is more than one."""
    said: dict[int, int] = {}
    for cue in cues_to_write(text, lexicon):
        for name in cue.names:
            if said.setdefault(name, cue.token) != cue.token:
                said[name] = _NOTHING
    return np.array(list(said), np.int64), np.array(list(said.values()), np.int64)


def _store(pack: Pack, names: np.ndarray, rows: torch.Tensor, sign: int) -> None:
    before = pack.read(names)
    same = torch.nn.functional.cosine_similarity(before, rows) > _SAME
    new = torch.from_numpy(~pack.holds(names))
    wanted = torch.where(same[:, None], before, 0.0) if sign > 0 else torch.where(same[:, None], 0.0, before)
    if sign > 0:
        wanted = torch.where(new[:, None], rows, wanted)
    change = wanted - before
    todo = change.any(-1) | (new & (sign > 0))
    chosen = names[todo.numpy()]
    kept = pack.claim(chosen)
    pack.add(chosen[kept], change[todo][torch.from_numpy(kept)])


def recall(engram: Engram, history: torch.Tensor, keep: int) -> torch.Tensor:
    """What the memory adds to the last positions: n-grams, and answers where a question stands before them.

    Args:
        engram: the memory.
        history: [B, N] int64 token ids, `NO_TOKEN` where there is none; what is missing of `engram.reach` is taken for that.
        keep: positions wanted, from the end.

    Returns:
        [B, keep, D] float32 on the CPU; a single zero where the memory holds nothing.
    """
    if not engram.active:
        return torch.zeros(())
    length = engram.reach + keep
    history = torch.nn.functional.pad(history[:, -length:], (max(0, length - history.shape[1]), 0), value=NO_TOKEN)
    names = name_positions(history[:, -(engram.history + keep) :], engram.families, engram.constants)
    memory = engram.read(names)
    if engram.lexicon is None:
        return memory
    return read_answers(engram, cues_to_read(history, engram.lexicon, keep), names, memory)


def read_answers(engram: Engram, cues: torch.Tensor, names: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """What the memory adds where cues lead somewhere.

    The opening decides if it leads somewhere; otherwise the most telling set of words that does. The newest pack comes first.

    Args:
        engram: the memory.
        cues: [..., K] int64 from `cues_to_read`.
        names: [..., F] int64 n-gram names of the same positions.
        memory: [..., D] float32, what the n-grams add. Not modified.

    Returns:
        [..., D] float32 on the CPU.
    """
    asked = (cues != NO_NAME).any(-1)
    if engram.ranks.size == 1 and not _leads_somewhere(engram, cues[asked]):
        return memory
    copied = names[asked][:, [family.order >= COPY_ORDER for family in engram.families]]
    wanted = torch.cat([cues[asked], copied], dim=-1)  # [P, K + C]
    there = wanted != NO_NAME
    rows, held = engram.look_up(wanted[there].numpy())  # [packs, M, width], [packs, M]
    leads = rows.any(-1)
    newest = rows.flip(0)[leads.flip(0).int().argmax(0), torch.arange(rows.shape[1])]  # [M, width]
    known = torch.zeros(wanted.shape, dtype=torch.bool).masked_scatter_(there, held.any(0))
    hits = torch.zeros_like(known).masked_scatter_(there, leads.any(0))[:, : cues.shape[-1]]
    hits[:, 1:] &= ~known[:, cues.shape[-1] :].any(-1, keepdim=True)
    index = torch.zeros(wanted.shape, dtype=torch.int64).masked_scatter_(there, torch.arange(len(newest)))
    use = hits.any(-1)
    first = hits[use].int().argmax(-1)
    chosen = newest[index[use].gather(-1, first[:, None])[:, 0]]
    chosen *= torch.where(first == 0, OPENING_SHARE, 1.0)[:, None]
    result = memory.clone()
    places = tuple(part[use] for part in asked.nonzero(as_tuple=True))
    result[places] = torch.nn.functional.pad(chosen, (0, memory.shape[-1] - chosen.shape[-1]))
    return result


def _leads_somewhere(engram: Engram, cues: torch.Tensor) -> bool:
    """Whether any pack holds any of the cues [P, K]; those that are `NO_NAME` are held nowhere."""
    names = cues[cues != NO_NAME].numpy()
    return len(names) > 0 and any(pack.holds(names).any() for pack in engram.packs.values())
