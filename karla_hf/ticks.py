"""How many ticks a Karla needs: the threshold of certainty that thinks least and loses next to nothing.

One pass over held-out data with all ticks gives certainty and loss of every token after every tick. What any threshold
would have answered follows from these, so no threshold is run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from karla_hf.evaluation import answer_tokens, context_tokens
from karla_hf.facts import Fact
from karla_hf.modeling.certainty_karla import halting_ticks
from karla_hf.modeling.losses_karla import tick_certainties
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.pretrained_karla import finish_logits


THRESHOLDS = (*(step / 50 for step in range(50)), 0.99, 0.995, 1.0)
CONTEXT = 512  # tokens of a context at the most: the deltas of all its ticks are held at once
LOGITS_CHUNK = 64


@dataclass(frozen=True)
class TickTable:
    """What every token is after every tick, tick 0 (no thought) first.

    Attributes:
        certainties: [S + 1, n].
        losses: [S + 1, n] nats.
        hits: [S + 1, n] bool: whether the likeliest token is the right one.
        group: [n] int64: what belongs together, an answer or a text; an answer is right if all of its tokens are.
    """

    certainties: torch.Tensor
    losses: torch.Tensor
    hits: torch.Tensor
    group: torch.Tensor

    @property
    def num_ticks(self) -> int:
        """S."""
        return len(self.losses) - 1

    def at(self, ticks: torch.Tensor) -> tuple[float, float, float]:
        """Mean loss, share of right tokens and share of right groups, if token i answers after `ticks` [n] int64."""
        losses, hits = (part.gather(0, ticks[None])[0].double() for part in (self.losses, self.hits))
        groups = torch.ones(int(self.group.max()) + 1, dtype=hits.dtype)
        groups = groups.scatter_reduce(0, self.group, hits, "amin")
        return losses.mean().item(), hits.mean().item(), groups.mean().item()


@dataclass(frozen=True)
class Calibration:
    """What thresholds cost and save.

    Attributes:
        tokens: how many were measured.
        per_tick: for tick 0 to S, `tick`, `loss`, `token_accuracy` and `accuracy`, if all answered after it.
        per_threshold: by threshold, `threshold`, `ticks` (expected), `rise` of the loss and the same numbers.
        chosen: the entry of `per_threshold` that was chosen, or None.
        max_rise: the rise that was allowed.
    """

    tokens: int
    per_tick: list[dict[str, float]]
    per_threshold: list[dict[str, float]]
    chosen: dict[str, float] | None
    max_rise: float


@torch.no_grad()
def measure_ticks(
    model: KarlaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str | Fact],
    progress: bool = True,
) -> TickTable:
    """Think all ticks of the tokens of texts, or of the answers to prompts.

    A text is cut into contexts of 512 tokens, and every token but a context's first is measured; of a fact, the tokens of
    its answer.

    Args:
        model: the model. Not modified.
        tokenizer: its tokenizer.
        data: texts or facts, at least one.
        progress: whether to show a progress bar.

    Returns:
        The table, on the CPU.

    Raises:
        ValueError: if there is nothing, or a text or answer has too few tokens.
    """
    if not data:
        raise ValueError("There is nothing to measure; give at least one text or fact.")
    contexts: list[tuple[list[int], int, int]] = []  # tokens, first token measured, group
    for group, entry in enumerate(data):
        if isinstance(entry, Fact):
            prompt, answer = answer_tokens(entry, tokenizer)
            contexts.append((prompt + answer, len(prompt), group))
        else:
            context_tokens(model, tokenizer, entry)  # refuses what is too short
            ids = tokenizer(entry, add_special_tokens=False, verbose=False)["input_ids"]
            contexts += [(ids[at : at + CONTEXT], 1, group) for at in range(0, len(ids) - 1, CONTEXT)]
    parts: list[tuple[torch.Tensor, ...]] = []
    was_training = model.training
    model.eval()
    try:
        with logging.tqdm(total=len(contexts), unit="text", desc="ticks", disable=not progress) as bar:
            for ids, first, group in contexts:
                parts.append(_measure_context(model, ids, first, group))
                bar.update(1)
    finally:
        model.train(was_training)
    certainties, losses, hits, groups = zip(*parts, strict=True)
    return TickTable(torch.cat(certainties, 1), torch.cat(losses, 1), torch.cat(hits, 1), torch.cat(groups))


@torch.no_grad()
def measure_rows(
    model: KarlaForCausalLM, rows: Iterable[Mapping[str, torch.Tensor]], progress: bool = True
) -> TickTable:
    """Think all ticks of the labels of tokenized rows; as `measure_ticks`, which takes texts.

    Args:
        model: the model. Not modified.
        rows: each a batch of one, with `input_ids` and `labels`, both [1, T] int64; label -100 is not measured.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if there is no label.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    was_training = model.training
    model.eval()
    try:
        for group, row in enumerate(logging.tqdm(rows, unit="row", desc="ticks", disable=not progress)):
            ids, labels = row["input_ids"][0].tolist(), row["labels"][0]
            for at in range(0, len(ids) - 1, CONTEXT):
                real = labels[at + 1 : at + CONTEXT] != -100
                if real.any():
                    found = _measure_context(model, ids[at : at + CONTEXT], 1, group)
                    parts.append(tuple(part[..., real] for part in found))
    finally:
        model.train(was_training)
    if not parts:
        raise ValueError("There is nothing to measure; give at least one row with a label.")
    certainties, losses, hits, groups = zip(*parts, strict=True)
    groups = torch.cat(groups).unique(return_inverse=True)[1]
    return TickTable(torch.cat(certainties, 1), torch.cat(losses, 1), torch.cat(hits, 1), groups)


def calibrate(table: TickTable, max_rise: float = 0.01, thresholds: Sequence[float] = THRESHOLDS) -> Calibration:
    """Choose the threshold with the fewest expected ticks among those that lose next to nothing.

    The rise of a threshold is loss(threshold) / loss(all ticks) - 1, where all ticks means that every token answers
    after the last one. Of equally few ticks, the highest threshold is taken.

    Args:
        table: what was measured.
        max_rise: the most that the loss may rise, as a share: 0.01 is one per cent.
        thresholds: in [0, 1].

    Raises:
        ValueError: if `max_rise` is negative.

    Example:
        >>> sure, right = torch.tensor([[0.9, 0.1], [0.9, 0.8]]), torch.tensor([[True, False], [True, True]])
        >>> losses = torch.tensor([[0.1, 3.0], [0.1, 0.2]])
        >>> found = calibrate(TickTable(sure, losses, right, torch.tensor([0, 1])), thresholds=[0.0, 0.5, 1.0])
        >>> found.chosen["threshold"], found.chosen["ticks"], found.chosen["accuracy"]
        (0.5, 0.5, 1.0)
    """
    if max_rise < 0:
        raise ValueError(f"The allowed rise of the loss is {max_rise}; give 0 or more.")
    count = table.losses.shape[1]
    names = ("loss", "token_accuracy", "accuracy")
    per_tick = []
    for tick in range(table.num_ticks + 1):
        numbers = table.at(torch.full((count,), tick))
        per_tick.append({"tick": tick, **dict(zip(names, numbers, strict=True))})
    full = per_tick[-1]["loss"]
    per_threshold = []
    for threshold in thresholds:
        ticks = halting_ticks(table.certainties, threshold)
        at = dict(zip(names, table.at(ticks), strict=True))
        rise = at["loss"] / full - 1 if full else float(at["loss"] > 0)
        expected = ticks.double().mean().item()
        per_threshold.append({"threshold": threshold, "ticks": expected, "rise": rise, **at})
    allowed = [entry for entry in per_threshold if entry["rise"] <= max_rise]
    chosen = min(allowed, key=lambda entry: (entry["ticks"], -entry["threshold"]), default=None)
    return Calibration(count, per_tick, per_threshold, chosen, max_rise)


def summary(found: Calibration) -> dict[str, Any]:
    """A calibration as what `json.dumps` takes."""
    return {
        "tokens": found.tokens, "max_loss_rise": found.max_rise, "chosen": found.chosen,
        "per_tick": found.per_tick, "per_threshold": found.per_threshold,
    }  # fmt: skip


def _measure_context(model: KarlaForCausalLM, ids: list[int], first: int, group: int) -> tuple[torch.Tensor, ...]:
    """Certainties, losses and hits [S + 1, n] of the tokens from `first` on, and their group [n]."""
    input_ids = torch.tensor([ids], device=model.device)
    out = model.model(input_ids[:, :-1], use_cache=False, all_ticks=True, logits_to_keep=len(ids) - first)
    deltas = out.tick_deltas[:, 0]
    state, labels = out.last_hidden_state[0] - deltas[-1], input_ids[0, first:]
    count = model.config.certainty_candidates
    weight, bias = model.model.output_projection()
    certainties = tick_certainties(state, deltas, weight, bias, count)
    losses, hits = [], []
    for delta in (torch.zeros_like(state), *deltas):
        found = [
            _judge(model, *part)
            for part in zip((state + delta).split(LOGITS_CHUNK), labels.split(LOGITS_CHUNK), strict=True)
        ]
        losses.append(torch.cat([part for part, _ in found]))
        hits.append(torch.cat([part for _, part in found]))
    return certainties.cpu(), torch.stack(losses).cpu(), torch.stack(hits).cpu(), torch.full((len(labels),), group)


def _judge(model: KarlaForCausalLM, state: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and hits [n] of states [n, D]."""
    head: Any = model.lm_head
    logits = finish_logits(head(state.to(head.weight.dtype)), model.config.text_config).float()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses, logits.argmax(-1) == labels
