"""Slow reference for writing_karla.py: the delta rule position by position, in Python floats.

Only tests import this file, so it never travels to the Hub.
"""

from __future__ import annotations

import math

import torch

from .engram_karla import Engram
from .reference_engram import NaivePack, Rows, coordinates_of, naive_read
from .writing_karla import DEFAULT_RULE, WriteResult, WriteRule


@torch.no_grad()
def naive_write_chunk(
    engram: Engram,
    pack: NaivePack,
    names: torch.Tensor,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    rule: WriteRule = DEFAULT_RULE,
    sign: int = 1,
) -> WriteResult:
    """`write_chunk` position by position, in float64; only at the end of a round rows are rounded, to float16.

    Arguments and result are those of `write_chunk`, with surprises in float64 and a `NaivePack` of the memory's.
    """
    count = len(targets)
    before, after = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    written = torch.zeros(count, dtype=torch.bool)
    weight = output_embeddings.double()
    pending = list(range(count))
    for turn in range(rule.rounds):
        memory = naive_read(engram, names)
        problems = {}
        for p in pending:
            logits = weight @ (hidden_states[p].double() + memory[p])
            if bias is not None:
                logits = logits + bias.double()
            after[p] = logits.logsumexp(0) - logits[targets[p]]
            if turn == 0:
                before[p] = after[p]
            likelihood = math.exp(-after[p])
            if likelihood < rule.target if sign == 1 else likelihood > 1 - rule.target:
                problems[p] = _Problem(logits, int(targets[p]), weight, rule.candidates)
        pending = list(problems)
        if not pending:
            break
        named, log_odds = _correct(engram, pack, names.tolist(), problems, rule, sign)
        for p in pending:
            after[p] = math.log1p(math.exp(-log_odds[p]))
            written[p] |= named[p]
    return WriteResult(before, after, written)


class _Problem:
    """One position's target against its likeliest tokens and a constant mass of all others."""

    def __init__(self, logits: torch.Tensor, target: int, weight: torch.Tensor, count: int):
        likeliest = logits.topk(min(count, len(logits))).indices.tolist()
        rivals = [token for token in likeliest if token != target]
        total = float(logits.logsumexp(0))
        tracked = sum(math.exp(float(logits[token]) - total) for token in [target, *rivals])
        self.logits = [float(logits[token]) for token in [target, *rivals]]
        self.embeddings = [weight[token] for token in [target, *rivals]]
        self.rest = total + math.log1p(-min(tracked, 1 - 1e-7))
        self.mean_embedding = weight.mean(0)

    def direction(self, moved: torch.Tensor) -> tuple[torch.Tensor, float]:
        """W_y minus the mean competitor, and the log-odds of y, after the memory has moved."""
        logits = [value + float(row @ moved) for value, row in zip(self.logits, self.embeddings, strict=True)]
        rivals = [*logits[1:], self.rest]
        largest = max(rivals)
        masses = [math.exp(value - largest) for value in rivals]
        competitor = torch.zeros_like(moved)
        for mass, row in zip(masses, [*self.embeddings[1:], self.mean_embedding], strict=True):
            competitor += mass / sum(masses) * row
        return self.embeddings[0] - competitor, logits[0] - largest - math.log(sum(masses))


def _correct(
    engram: Engram, pack: NaivePack, names: list[list[int]], problems: dict[int, _Problem], rule: WriteRule, sign: int
) -> tuple[dict[int, bool], dict[int, float]]:
    """Correct positions until they reach the target; which have a row of their own, and the log-odds of y."""
    wanted = list(dict.fromkeys(name for p in problems for name in names[p]))
    kept = [name for name, has in zip(wanted, pack.claim(wanted), strict=True) if has]
    owned = {p: [f for f, name in enumerate(names[p]) if name in kept] for p in problems}
    coordinates = [coordinates_of(engram.layout, f, len(engram.families)) for f in range(len(engram.families))]
    aim = sign * math.log(rule.target / (1 - rule.target))
    delta: Rows = {name: torch.zeros(engram.layout.width, dtype=torch.float64) for name in kept}

    def direction(p: int) -> tuple[torch.Tensor, float]:
        moved = torch.zeros(engram.hidden_size, dtype=torch.float64)
        for f in owned[p]:
            for coordinate, value in zip(coordinates[f], delta[names[p][f]].tolist(), strict=True):
                moved[coordinate] += value
        return problems[p].direction(moved)

    directions = {p: direction(p) for p in problems}
    active = [p for p in problems if owned[p]]
    for _ in range(rule.repeats):
        active = [p for p in active if sign * (aim - directions[p][1]) > 0]  # once there, a position is left alone
        changes: dict[int, list[torch.Tensor]] = {}
        for p in active:
            d, log_odds = directions[p]
            covered = 0.0
            for f in owned[p]:
                for coordinate in coordinates[f]:
                    covered += engram.families[f].weight * float(d[coordinate]) ** 2
            whole, own = float(d @ d), float(problems[p].embeddings[0] @ problems[p].embeddings[0])
            divisor = max(covered, rule.least_coverage * whole, rule.least_separation * own)
            margin = min(abs(aim - log_odds) + rule.overshoot, rule.max_margin)
            change = d * (sign * margin / divisor)
            for f in owned[p]:
                share = engram.families[f].weight * change[coordinates[f]]
                changes.setdefault(names[p][f], []).append(share)
        for name, shares in changes.items():
            delta[name] += sum(shares) / len(shares)
        directions.update({p: direction(p) for p in active})
    pack.add(delta)
    return {p: bool(owned[p]) for p in problems}, {p: directions[p][1] for p in problems}
