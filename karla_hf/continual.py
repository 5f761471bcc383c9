"""A stream of documents, one after another: what is left of each of the earlier ones (a forgetting matrix)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from karla_hf.evaluation import perplexity
from karla_hf.lora import LoraReader
from karla_hf.modeling.modeling_karla import KarlaForCausalLM


PASSES = (1, 4)
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
PIECE_TOKENS = 128  # of LoRA: short texts in pieces of 512 would be one or two steps

logger = logging.get_logger(__name__)


def forgetting_matrix(
    read: Callable[[str], object], measure: Callable[[str], float], documents: Sequence[str], control: str
) -> list[list[float]]:
    """Read documents in turn; after each, measure the perplexity of all read so far, and of a text never read.

    Args:
        read: learns a document.
        measure: perplexity of a text.
        documents: N texts.
        control: a text that is not among them.

    Returns:
        N rows of N + 1 numbers: in row i, column j <= i, the perplexity of document j after document i was read; NaN
        where j > i; the control last.

    Example:
        >>> known = []
        >>> forgetting_matrix(known.append, lambda text: 2.0 if text in known else 9.0, ["a", "b"], "c")
        [[2.0, nan, 9.0], [2.0, 2.0, 9.0]]
    """
    matrix = []
    for at, document in enumerate(documents):
        read(document)
        seen = [measure(text) for text in documents[: at + 1]]
        matrix.append([*seen, *[math.nan] * (len(documents) - at - 1), measure(control)])
        logger.info("after document %d: %s", at + 1, matrix[-1])
    return matrix


def compare_streams(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: dict[str, str],
    control: str,
    development: Sequence[str],
    *,
    passes: Sequence[int] = PASSES,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> dict:
    """Stream documents through Karla (one reading each) and through LoRA (some passes each).

    LoRA goes on with one adapter. For each number of passes its learning rate is the one that leaves the least mean
    log perplexity of the development documents after all of them.

    Args:
        backbone: a causal LM. As it was, afterwards.
        tokenizer: its tokenizer.
        documents: texts by title, in the order of the stream.
        control: a text that is never read.
        development: other texts, to choose LoRA's learning rate on.
        passes: of LoRA over each document.
        learning_rates: to choose from.

    Returns:
        `rows`: perplexities by "<method>, after <title>", with a column for each document and `unrelated`.
        `matrices`: the same by method, as lists of rows. `titles`. `learning_rates`: those that were chosen.
    """
    texts, chosen = list(documents.values()), {}

    def measure_with(model: PreTrainedModel) -> Callable[[str], float]:
        return lambda text: perplexity(model, tokenizer, text, progress=False)

    bare = [measure_with(backbone)(text) for text in [*texts, control]]
    matrices = {"bare backbone": [bare]}
    # A new head adds nothing to the answer, so one tick of it is enough.
    karla = KarlaForCausalLM.from_backbone(backbone, tokenizer, ctm_num_ticks=1)
    matrices["Karla, one reading"] = forgetting_matrix(
        lambda text: karla.read(text, tokenizer, progress=False), measure_with(karla), texts, control
    )
    for number in passes:
        name = "LoRA, 1 pass" if number == 1 else f"LoRA, {number} passes"
        chosen[name] = _choose_rate(backbone, tokenizer, development, number, learning_rates)
        lora = LoraReader(backbone, tokenizer, learning_rate=chosen[name], piece_tokens=PIECE_TOKENS)
        read = _reading(lora, number)
        matrices[name] = forgetting_matrix(read, measure_with(lora.model), texts, control)
        lora.remove()
    columns = [*documents, "unrelated"]
    rows = {}
    for name, matrix in matrices.items():
        for title, row in zip(documents, matrix, strict=False):
            label = name if len(matrix) < len(texts) else f"{name}, after {title}"
            rows[label] = dict(zip(columns, row, strict=True))
    return {"rows": rows, "matrices": matrices, "titles": columns, "learning_rates": chosen}


def first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The beginning of a text, as long as so many tokens; the tokenizer must know offsets."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return text if len(offsets) <= count else text[: offsets[count - 1][1]]


def _reading(lora: LoraReader, passes: int) -> Callable[[str], float]:
    return lambda text: lora.read(text, passes)


def _choose_rate(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    development: Sequence[str],
    passes: int,
    learning_rates: Sequence[float],
) -> float:
    losses = {}
    for rate in learning_rates:
        lora = LoraReader(backbone, tokenizer, learning_rate=rate, piece_tokens=PIECE_TOKENS)
        for text in development:
            lora.read(text, passes)
        left = [perplexity(lora.model, tokenizer, text, progress=False) for text in development]
        losses[rate] = sum(map(math.log, left)) / len(left)
        lora.remove()
    logger.info("LoRA, %d passes: mean log perplexity by learning rate: %s", passes, losses)
    return min(losses, key=lambda rate: losses[rate])
