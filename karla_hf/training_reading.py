"""What the memory of a Karla reads when its head is trained, and when each level of a run changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from karla_hf.info import memory_period
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.report import new_console


PACK = "training"


def read_rows(
    model: KarlaForCausalLM, tokenizer: PreTrainedTokenizerBase, trainer: Trainer, rows: Dataset, count: int
) -> dict[str, float]:
    """Let the memory read the first texts of a data set into the pack "training", and log what it wrote.

    The trainer's log and trackers get `memory_rows`, `memory_writes` (positions whose next token was surprising), and
    `surprise_before` and `surprise_after` the write, in nats per token.

    Args:
        model: whose memory is written.
        tokenizer: its tokenizer.
        trainer: that logs.
        rows: with `text`, `messages`, or `prompt` and `completion`.
        count: how many.

    Returns:
        What was logged.

    Raises:
        ValueError: for a text of fewer than two tokens.
    """
    texts = [as_text(row, tokenizer) for row in rows.select(range(min(count, len(rows))))]
    report = model.read(texts, tokenizer, pack=PACK)
    held = sum(model.packs().values())
    found = {"memory_rows": held, "memory_writes": report.positions_written,
             "surprise_before": report.surprise_before, "surprise_after": report.surprise_after}  # fmt: skip
    trainer.log(dict(found))
    new_console().print(
        f"The memory read {report.tokens:,} tokens of {report.texts} training texts and wrote {report.positions_written:,} of "
        f"them; it has {held:,} rows.",
        markup=False,
    )
    return found


def as_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A row of a data set as one text; conversations as the chat template writes them.

    Example:
        >>> as_text({"prompt": "2 + 2 =", "completion": " 4"}, None)
        '2 + 2 = 4'
    """
    if "text" in row:
        return row["text"]
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    return messages if isinstance(messages, str) else str(tokenizer.apply_chat_template(messages, tokenize=False))


def clock(model: KarlaForCausalLM, periods: Mapping[str, int] | None) -> dict[str, str]:
    """When each level of a run changes, by its name.

    Args:
        model: a Karla.
        periods: `update_periods` of the recipe.
    """
    slow = {f"L2, {pattern}": f"every {period} training steps" for pattern, period in (periods or {}).items()}
    return {"L0": "never", "L1": memory_period(model.engram), **slow, "L2": "every training step"}
