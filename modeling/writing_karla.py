"""Writing into the memory: a normalised delta rule on the final hidden state.

The write moves the rows of a position so that its next token becomes likely. With output embeddings W, the mean
competitor c = sum_{k != y} p_k W_k / (1 - p_y) and d = W_y - c, a change along d moves the margin of y by d . change, so

    change = margin * d / sum_f w_f |M_f d|^2,        row_f += w_f * M_f change,

with M_f the coordinates of family f, if its name has a row, and w_f the family's weight: a normalised delta rule
(Widrow-Hoff) on the final hidden state, exact for two classes, repeated a few times for more. Where several positions of
a chunk share a row, it moves by the mean of their changes. Nothing is differentiated through the backbone.

With sign -1 the same rule unlearns: it moves against d until the token is as unlikely as a learned one is likely.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from .engram_karla import Engram
from .levels_karla import Pack
from .native_karla import c_function, c_integers


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
        least_separation: least share of |W_y|^2 that a correction is divided by, so that a token whose embedding is
            (nearly) that of its competitor does not ask for a boundless one.
    """

    target: float = 0.9
    overshoot: float = 0.1
    max_margin: float = 10.0
    repeats: int = 4
    rounds: int = 2
    candidates: int = 16
    least_coverage: float = 0.1
    least_separation: float = 0.01


DEFAULT_RULE = WriteRule()


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
    pack: Pack,
    names: torch.Tensor,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    rule: WriteRule = DEFAULT_RULE,
    sign: int = 1,
    mean_embedding: torch.Tensor | None = None,
) -> WriteResult:
    """Write one chunk of positions: every read of the chunk sees the memory as it was before the chunk.

    Equal to `naive_write_chunk` up to rounding. Implements the normalised delta rule of the module's description. Several
    processes divide the logits among them (`engram.ranks`) and then work out the same corrections.

    Args:
        engram: the memory; reads see all of its packs.
        pack: the pack that is written (modified in place); one of `engram.packs`.
        names: [P, F] int64 of the P positions.
        hidden_states: [P, D] final hidden states without the memory, any float dtype. Not modified.
        targets: [P] int64, the token that followed.
        output_embeddings: [V, D] rows of the output layer, scaled so that logits = h W^T + bias.
        bias: [V] of the output layer, or None.
        rule: constants of the write.
        sign: 1 to learn the targets, -1 to unlearn them.
        mean_embedding: [D] mean of `output_embeddings`, where it is known already.

    Returns:
        Surprise before and after, and which positions were written.
    """
    if mean_embedding is None:
        mean_embedding = output_embeddings.mean(0)
    pending = torch.arange(len(targets))
    before = after = torch.empty(0)
    written = torch.zeros(len(targets), dtype=torch.bool)
    for _ in range(rule.rounds):
        sizes = engram.ranks.shares(len(pending))
        mine = pending[engram.ranks.mine(sizes)]
        states = hidden_states[mine] + engram.read(names[mine]).to(hidden_states)
        logits = torch.nn.functional.linear(states, output_embeddings, bias).float()
        total = logits.logsumexp(-1)
        surprise = engram.ranks.gather((total - logits.gather(-1, targets[mine][:, None])[:, 0]).cpu(), sizes)
        if len(after) == 0:
            before, after = surprise, surprise.clone()
        after[pending] = surprise
        todo = surprise > -math.log(rule.target) if sign > 0 else surprise < -math.log(1.0 - rule.target)
        pending = pending[todo]
        if len(pending) == 0:
            break
        ours = todo[engram.ranks.mine(sizes)]
        likeliest = _likeliest(logits[ours], total[ours], targets[mine[ours]], rule.candidates)
        likeliest = engram.ranks.gather(likeliest, [int(part.sum()) for part in todo.split(sizes)])
        problem = _Candidates.of(likeliest, output_embeddings, mean_embedding)
        named, log_odds = _correct(engram, pack, names[pending], problem, rule, sign)
        after[pending] = torch.nn.functional.softplus(-log_odds)
        written[pending[named]] = True
    return WriteResult(before, after, written)


def _correct(
    engram: Engram, pack: Pack, names: torch.Tensor, problem: _Candidates, rule: WriteRule, sign: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correct each position until it reaches the target; returns which can be corrected, [P], and log-odds of y, [P].

    The corrections add up in `delta`, one row per distinct name, and reach the pack once, at the end.
    """
    flat = names.numpy().reshape(-1)
    distinct, inverse = _distinct(flat)
    kept = pack.claim(distinct)
    place = torch.from_numpy(inverse).view_as(names)
    owned = torch.from_numpy(kept)[place]  # [P, F]
    share = owned * engram.weights
    named = owned.any(-1)
    delta, log_odds = _repeat(engram, problem, place, share, len(distinct), rule, sign)
    pack.add(distinct[kept], delta[torch.from_numpy(kept)])
    return named, log_odds


def _repeat(
    engram: Engram,
    problem: _Candidates,
    place: torch.Tensor,
    share: torch.Tensor,
    count: int,
    rule: WriteRule,
    sign: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The corrections of `count` distinct names, [count, width], and the log-odds of y after them, [P].

    Args:
        engram: the memory.
        problem: of the P positions.
        place: [P, F] int64, which distinct name each family has.
        share: [P, F] float32, weight of each family, 0 where its name has no row.
        count: number of distinct names.
        rule: constants of the write.
        sign: 1 or -1.
    """
    aim = sign * _logit(rule.target)
    goal = aim + sign * rule.overshoot
    active = (share > 0).any(-1)
    kernel = c_function("karla_correct", "iiiiiipppppppp" + "ippppppp")
    if kernel is not None:
        return _repeat_in_c(kernel, engram, problem, place, share, count, rule, (aim, goal, sign), active.long())
    delta = torch.zeros(count, engram.layout.width)
    gain = engram.scatter(share[..., None].expand(-1, -1, engram.layout.width))  # [P, D]
    least = rule.least_separation * problem.embeddings[:, 0].square().sum(-1)
    direction, log_odds = problem.direction(torch.zeros(len(share), engram.hidden_size))
    active = (active & (sign * (aim - log_odds) > 0)).nonzero()[:, 0]
    problem, direction = problem.select(active), direction[active]
    for _ in range(rule.repeats):
        if len(active) == 0:
            break
        margin = (goal - log_odds[active]).clamp(-rule.max_margin, rule.max_margin)
        square = direction.square()
        strength = (gain[active] * square).sum(-1)
        strength = torch.maximum(strength, rule.least_coverage * square.sum(-1)).maximum(least[active])
        change = engram.gather(direction * (margin / strength)[:, None]) * share[active][..., None]  # [A, F, width]
        delta += _mean_by_row(change.flatten(0, 1), place[active].flatten(), count)
        direction, log_odds[active] = problem.direction(engram.scatter(delta[place[active]]))
        still = sign * (aim - log_odds[active]) > 0
        active, problem, direction = active[still], problem.select(still), direction[still]
    return delta, log_odds


def _repeat_in_c(kernel, engram, problem, place, share, count, rule, aims, active):
    """`_repeat` in the C kernel, with the same sums in another order."""
    positions, families = share.shape
    candidates, hidden = problem.embeddings.shape[1:]
    constants = torch.tensor([*aims[:2], rule.max_margin, rule.least_coverage, rule.least_separation, aims[2]])
    logits = problem.logits.masked_fill(problem.duplicate, -torch.inf)
    delta, log_odds = torch.zeros(count, engram.layout.width), torch.empty(positions)
    scratch = torch.empty(2 * positions * hidden + candidates)
    uses = torch.empty(count, dtype=torch.int64)
    inputs = (problem.embeddings.contiguous(), logits, problem.rest, problem.mean_embedding, place, share, constants)
    parts = scratch.split([positions * hidden, positions * hidden, candidates])
    kernel(positions, families, count, candidates, hidden, engram.layout.width, c_integers(*engram.starts),
           *(tensor.data_ptr() for tensor in inputs), rule.repeats, *(part.data_ptr() for part in parts),
           uses.data_ptr(), active.data_ptr(), delta.data_ptr(), log_odds.data_ptr())  # fmt: skip
    return delta, log_odds


def _distinct(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct names in the order of appearance, and which of them each of `names` [N] is."""
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    order = np.argsort(first, kind="stable")
    rank[order] = np.arange(len(first))
    return names[first[order]], rank[inverse]


def _mean_by_row(changes: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """[count, width] mean of the changes [N, width] that go to each row [N]; zero where there are none."""
    total = torch.zeros(count, changes.shape[-1]).index_add_(0, rows, changes)
    return total / torch.bincount(rows, minlength=count).clamp(min=1)[:, None]


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def _likeliest(logits: torch.Tensor, total: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
    """What the corrections need of logits [P, V], in one tensor that a process can send.

    Returns:
        [P, 2 C + 3] float64 on the CPU, which holds ids and float32 exactly: ids of the target and of the C likeliest
        tokens, their logits, and the log of the sum of all exponentials.
    """
    top = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
    index = torch.cat([targets[:, None], top], dim=-1)
    columns = index, logits.gather(-1, index), total[:, None]
    return torch.cat([column.cpu().double() for column in columns], dim=-1)


class _Candidates(NamedTuple):
    """The likeliest tokens of each position, the target first; everything else is one mass that stays constant."""

    logits: torch.Tensor  # [P, C + 1]
    embeddings: torch.Tensor  # [P, C + 1, D]
    duplicate: torch.Tensor  # [P, C + 1] bool, the target among the likeliest
    rest: torch.Tensor  # [P] log mass of all other tokens
    mean_embedding: torch.Tensor  # [D]

    @classmethod
    def of(cls, likeliest: torch.Tensor, embeddings: torch.Tensor, mean_embedding: torch.Tensor) -> _Candidates:
        """From the result of `_likeliest`, and the output embeddings [V, D] with their mean [D]."""
        tokens = likeliest.shape[1] // 2
        index = likeliest[:, :tokens].long()
        duplicate = index == index[:, :1]
        duplicate[:, 0] = False
        chosen = likeliest[:, tokens : 2 * tokens].float().masked_fill(duplicate, -torch.inf)
        total, tracked = likeliest[:, -1].float(), chosen.logsumexp(-1)
        rest = total + torch.log1p(-(tracked - total).exp().clamp(max=1 - 1e-7))
        rows = embeddings[index.to(embeddings.device)].float().cpu()
        return cls(chosen, rows, duplicate, rest, mean_embedding.float().cpu())

    def select(self, index: torch.Tensor) -> _Candidates:
        """The positions at `index`."""
        return self._replace(
            logits=self.logits[index],
            embeddings=self.embeddings[index],
            duplicate=self.duplicate[index],
            rest=self.rest[index],
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
