"""The memory against what a user would pick instead: LoRA, retrieval into the prompt, a kNN-LM, on the same texts.

Every method learns the same document and facts into one model, and is then asked the facts and three perplexities.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from karla_hf.evaluation import exact_recall, perplexity
from karla_hf.facts import Fact
from karla_hf.knn import EVERYWHERE, RADII, KnnReader
from karla_hf.lora import LoraReader
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.retrieval import RetrievalReader, SentenceEncoder


LEARNING_RATES = (2e-4, 5e-4, 1e-3)
EPOCHS = (1, 4, 16)
TOP_KS = (1, 2, 4)
TUNING_FACTS = 40  # facts asked, of all that were stored, to choose a top_k
TUNING_TOKENS = 512

logger = logging.get_logger(__name__)
Row = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is learned and what is measured.

    Attributes:
        facts: made-up facts, learned and asked.
        document: a text, learned and measured.
        related: a text like the document, measured only.
        unrelated: a text of another kind, measured only.
    """

    facts: Sequence[Fact]
    document: str
    related: str
    unrelated: str

    @property
    def texts(self) -> list[str]:
        """All that is learned: the document, then the facts, each a text of its own."""
        return [self.document, *(fact.text for fact in self.facts)]


def compare(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    development: Task,
    *,
    encoder: SentenceEncoder | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: Sequence[int] = EPOCHS,
) -> dict:
    """Measure the bare backbone, Karla, kNN-LM, retrieval and LoRA on one task.

    kNN-LM's share and temperature and retrieval's top_k are chosen on the development task. LoRA is shown at every
    learning rate and number of epochs, so that the reader can choose for it.

    Args:
        backbone: a causal LM. As it was, afterwards.
        tokenizer: its tokenizer.
        task: what is reported.
        development: other facts and texts, to choose settings on.
        encoder: of the retrieval; by default MiniLM.
        learning_rates: of LoRA.
        epochs: of LoRA, increasing; each learning rate is one run that is measured on its way.

    Returns:
        `rows`: by method, `recall` (facts exact), `re-read`, `related` and `unrelated` (perplexities), `seconds` to
        learn, `seconds to ask` all facts, and `bytes` that were added to the backbone. Seconds are CPU time of this
        process, so that other programs do not count. `facts`: how many were asked. `chosen`: settings from the
        development task.
    """
    chosen: dict[str, float] = {}
    rows: dict[str, Row] = {"bare backbone": _measure(backbone, tokenizer, task, seconds=0.0, num_bytes=0)}
    rows["Karla, one reading"] = _karla(backbone, tokenizer, task)
    rows.update(_knn(backbone, tokenizer, task, development, chosen))
    rows["retrieval into the prompt"] = _retrieval(backbone, tokenizer, task, development, encoder, chosen)
    for rate in learning_rates:
        rows.update(_lora(backbone, tokenizer, task, rate, epochs))
    return {"rows": rows, "facts": len(task.facts), "chosen": chosen}


def best_lora(rows: dict[str, Row]) -> dict[str, Row]:
    """LoRA's rows at the learning rate that recalled most, then re-read best, for each number of epochs.

    Example:
        >>> rows = {"LoRA, 1 epochs, 1e-3": {"recall": 2, "re-read": 9.0},
        ...         "LoRA, 1 epochs, 2e-4": {"recall": 2, "re-read": 11.0}}
        >>> list(best_lora(rows))
        ['LoRA, 1 epochs, 1e-3']
    """
    best: dict[str, str] = {}
    for name, row in rows.items():
        if name.startswith("LoRA"):
            group = name.rsplit(",", 1)[0]
            rival = rows[best.setdefault(group, name)]
            if (-row["recall"], row["re-read"]) < (-rival["recall"], rival["re-read"]):
                best[group] = name
    return {name: rows[name] for name in best.values()}


def _measure(
    model: PreTrainedModel | RetrievalReader,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    seconds: float,
    num_bytes: int,
) -> Row:
    started = time.process_time()
    recalled = exact_recall(model, tokenizer, task.facts, progress=False).exact  # type: ignore[arg-type]
    asked = time.process_time() - started

    def measure(text: str) -> float:
        if isinstance(model, RetrievalReader):
            return model.perplexity(text)
        return perplexity(model, tokenizer, text, progress=False)

    texts = {"re-read": task.document, "related": task.related, "unrelated": task.unrelated}
    perplexities = {name: measure(text) for name, text in texts.items()}
    row = {"recall": recalled, **perplexities, "seconds": seconds, "seconds to ask": asked, "bytes": num_bytes}
    logger.info("measured %s", row)
    return row


def _karla(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Row:
    model = KarlaForCausalLM.from_backbone(backbone, tokenizer)
    before = _saved_bytes(model)
    seconds = _seconds(lambda: model.read(task.texts, tokenizer, progress=False))
    return _measure(model, tokenizer, task, seconds=seconds, num_bytes=_saved_bytes(model) - before)


def _saved_bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _knn(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    development: Task,
    chosen: dict[str, float],
) -> dict[str, Row]:
    kinds = {"kNN-LM": EVERYWHERE, "kNN-LM within a radius": RADII}
    tuned = KnnReader(backbone, tokenizer)
    tuned.read(development.texts)
    asked = [(fact.prompt, fact.answer) for fact in development.facts]
    examples = [*asked, *(("", text) for text in (development.document, development.related, development.unrelated))]
    settings = {name: tuned.tune(examples, radii) for name, radii in kinds.items()}
    tuned.remove()
    reader = KnnReader(backbone, tokenizer)
    seconds = _seconds(lambda: reader.read(task.texts))
    rows = {}
    for name, setting in settings.items():
        chosen.update({f"{name}: {key}": value for key, value in setting.items() if math.isfinite(value)})
        reader.head.share, reader.head.temperature, reader.head.radius = setting.values()
        rows[name] = _measure(reader.model, tokenizer, task, seconds=seconds, num_bytes=reader.num_bytes)
    reader.remove()
    return rows


def _retrieval(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    development: Task,
    encoder: SentenceEncoder | None,
    chosen: dict[str, float],
) -> Row:
    encoder = encoder or SentenceEncoder()
    tuned = RetrievalReader(backbone, tokenizer, encoder)
    tuned.read(development.texts)

    def loss(top_k: int) -> tuple[int, float]:
        tuned.top_k = top_k
        asked = development.facts[:TUNING_FACTS]
        missed = len(asked) - exact_recall(tuned, tokenizer, asked, progress=False).exact  # type: ignore[arg-type]
        return missed, tuned.perplexity(development.document, TUNING_TOKENS)

    losses = {top_k: loss(top_k) for top_k in TOP_KS}
    logger.info("retrieval: facts missed and perplexity by top_k: %s", losses)
    chosen["retrieval: top_k"] = top_k = min(losses, key=lambda k: losses[k])
    reader = RetrievalReader(backbone, tokenizer, encoder, top_k)
    seconds = _seconds(lambda: reader.read(task.texts))
    return _measure(reader, tokenizer, task, seconds=seconds, num_bytes=reader.num_bytes)


def _lora(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    learning_rate: float,
    epochs: Sequence[int],
) -> dict[str, Row]:
    reader = LoraReader(backbone, tokenizer, learning_rate=learning_rate)
    rows: dict[str, Row] = {}
    seconds, done = 0.0, 0
    for total in epochs:
        seconds += _seconds(lambda more=total - done: reader.read(task.texts, more))  # type: ignore[misc]
        done = total
        measured = _measure(reader.model, tokenizer, task, seconds=seconds, num_bytes=reader.num_bytes)
        rows[f"LoRA, {total} epochs, {learning_rate:.0e}".replace("e-0", "e-")] = measured
    reader.remove()
    return rows


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
