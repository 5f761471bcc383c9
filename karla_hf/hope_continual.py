"""A stream of documents through a HOPE: what is left of the earlier ones, by how it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from karla_hf.continual import forgetting_matrix
from karla_hf.modeling.cms_hope import named_levels
from karla_hf.modeling.modeling_hope import HopeForCausalLM


RATES = (1.0, 3.0)  # of learn
LEARNING_RATES = (1e-4, 3e-4)  # of fine-tuning
BARE, LEVELS, FLAT, TUNED = "no learning", "learn(), levels", "learn(), one rate", "fine-tuning"

Measure = Callable[[str], float]


def compare_hope_streams(
    model: HopeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: dict[str, str],
    control: str,
    development: Sequence[str],
    *,
    rates: Sequence[float] = RATES,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> dict:
    """Stream documents, each read once, through `learn()`, through the same model without levels, and fine-tuning.

    Without levels, all parameters that `learn` changes do so after every chunk. Fine-tuning changes all trainable
    parameters with AdamW after every chunk. Each one's rate leaves the least mean loss of the development documents.

    Args:
        model: a trained HOPE. Not modified.
        tokenizer: its encoder's tokenizer.
        documents: texts by title, in the order of the stream.
        control: a text that is never read.
        development: other texts, to choose rates on.
        rates: of `learn`, to choose from.
        learning_rates: of AdamW, to choose from.

    Returns:
        `rows`: perplexities by "<method>, after <title>", with a column for each document and `unrelated`.
        `matrices`: the same by method. `titles`. `rates`: those that were chosen. `forgetting`: by method, mean over all
        documents but the last of log(perplexity at the end / right after it was read).
    """
    texts, chosen = list(documents.values()), {}
    learners: dict[str, tuple[Sequence[float], Callable]] = {
        LEVELS: (rates, _with_levels), FLAT: (rates, _without_levels), TUNED: (learning_rates, _fine_tuned),
    }  # fmt: skip
    matrices = {BARE: [[measure_with(model, tokenizer)(text) for text in [*texts, control]]]}
    for name, (choices, make) in learners.items():
        losses = {}
        for rate in choices:
            learner, read = make(model, tokenizer, rate)
            for text in development:
                read(text)
            measure = measure_with(learner, tokenizer)
            losses[rate] = sum(math.log(measure(text)) for text in development) / len(development)
        chosen[name] = min(losses, key=lambda rate: losses[rate])
        learner, read = make(model, tokenizer, chosen[name])
        matrices[name] = forgetting_matrix(read, measure_with(learner, tokenizer), texts, control)
    columns = [*documents, "unrelated"]
    rows = {}
    for name, matrix in matrices.items():
        for title, row in zip(documents, matrix, strict=False):
            rows[name if name == BARE else f"{name}, after {title}"] = dict(zip(columns, row, strict=True))
    forgetting = {name: mean_forgetting(matrix) for name, matrix in matrices.items() if name != BARE}
    return {"rows": rows, "matrices": matrices, "titles": columns, "rates": chosen, "forgetting": forgetting}


def mean_forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean of log(perplexity at the end / right after reading) of all documents but the last.

    Example:
        >>> round(mean_forgetting([[2.0, math.nan, 9.0], [4.0, 2.0, 9.0]]) / math.log(2.0), 6)
        1.0
    """
    count = len(matrix) - 1
    return sum(math.log(matrix[-1][j] / matrix[j][j]) for j in range(count)) / count


def measure_with(model: HopeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Measure:
    """Perplexity of a text as one context."""

    def measure(text: str) -> float:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return math.exp(model.text_loss(torch.tensor([ids], device=model.device)))

    return measure


def _with_levels(model: HopeForCausalLM, tokenizer: PreTrainedTokenizerBase, rate: float) -> tuple:
    learner = copy.deepcopy(model)
    learner.reset_learning()
    return learner, lambda text: learner.learn(text, tokenizer, rate=rate, progress=False)


def _without_levels(model: HopeForCausalLM, tokenizer: PreTrainedTokenizerBase, rate: float) -> tuple:
    learner, read = _with_levels(model, tokenizer, rate)
    for _, level in named_levels(learner):
        level.update_period = 1
    return learner, read


def _fine_tuned(model: HopeForCausalLM, tokenizer: PreTrainedTokenizerBase, rate: float) -> tuple:
    learner = copy.deepcopy(model).eval()
    learner.reset_learning()
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)

    def read(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for loss, _ in learner._chunk_losses(torch.tensor([ids], device=learner.device)):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return learner, read
