"""Two measurements of what a model knows: exact recall of facts by greedy generation, and perplexity of a text.

Both take any causal language model, with or without a memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from karla_hf.facts import Fact
from karla_hf.modeling.backbone_karla import split_backbone
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.pretrained_karla import finish_logits


BATCH_SIZE = 16
LOGITS_CHUNK = 256  # positions whose logits are held at once: 50 MB for a vocabulary of 49,152
Result = TypeVar("Result")


@dataclass(frozen=True)
class RecallResult:
    """What a model recalled.

    Attributes:
        facts: the facts that were asked, in their order.
        generated: what the model said to each prompt, in as many tokens as the answer has.
        hits: whether these tokens are the answer's.
    """

    facts: tuple[Fact, ...]
    generated: tuple[str, ...]
    hits: tuple[bool, ...]

    @property
    def exact(self) -> int:
        """Facts recalled exactly."""
        return sum(self.hits)

    @property
    def by_form(self) -> dict[str, tuple[int, int]]:
        """Facts recalled exactly and facts asked, by form, in the order in which the forms appear."""
        counts: dict[str, tuple[int, int]] = {}
        for fact, hit in zip(self.facts, self.hits, strict=True):
            exact, asked = counts.get(fact.form, (0, 0))
            counts[fact.form] = exact + hit, asked + 1
        return counts


@torch.no_grad()
def exact_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], progress: bool = True
) -> RecallResult:
    """Ask facts by their bare prompts and generate greedily.

    A fact is recalled if the generated tokens are exactly the answer's. The checkpoint's own settings for generation
    (sampling, penalties, end tokens) are left aside.

    Args:
        model: any causal language model. Not modified.
        tokenizer: its tokenizer.
        facts: at least one.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if there are no facts, or a prompt or an answer has no tokens.
    """
    if not facts:
        raise ValueError("There are no facts to ask; give at least one.")
    problems = [answer_tokens(fact, tokenizer) for fact in facts]
    # Alike lengths side by side: less padding, and no token is generated that no answer of the batch needs.
    order = sorted(range(len(facts)), key=lambda i: (len(problems[i][1]), len(problems[i][0])))
    generated: dict[int, list[int]] = {}
    with _evaluating(model), logging.tqdm(total=len(facts), unit="fact", desc="recall", disable=not progress) as bar:
        for at in range(0, len(order), BATCH_SIZE):
            batch = order[at : at + BATCH_SIZE]
            answers = _generate(model, [problems[i][0] for i in batch], max(len(problems[i][1]) for i in batch))
            generated.update((i, answer[: len(problems[i][1])]) for i, answer in zip(batch, answers, strict=True))
            bar.update(len(batch))
    said = [generated[i] for i in range(len(facts))]
    hits = tuple(tokens == problem[1] for tokens, problem in zip(said, problems, strict=True))
    return RecallResult(tuple(facts), tuple(str(tokenizer.decode(tokens)) for tokens in said), hits)


@torch.no_grad()
def chat_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    new_tokens: int = 40,
    progress: bool = True,
) -> RecallResult:
    """Ask facts as a user's turn of the chat template and let the model answer freely, greedily.

    A fact is recalled if what the model says contains the answer, without the space before it and the period after it.

    Args:
        model: any causal language model. Not modified.
        tokenizer: its tokenizer; it has a chat template.
        facts: at least one; their prompts are what the user says.
        new_tokens: length of the answers.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if there are no facts.
    """
    if not facts:
        raise ValueError("There are no facts to ask; give at least one.")
    prompts = []
    for fact in facts:
        turn = [{"role": "user", "content": fact.prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    said = []
    with _evaluating(model), logging.tqdm(total=len(facts), unit="fact", desc="chat", disable=not progress) as bar:
        for at in range(0, len(facts), BATCH_SIZE):
            batch = prompts[at : at + BATCH_SIZE]
            said += [str(tokenizer.decode(tokens)) for tokens in _generate(model, batch, new_tokens)]
            bar.update(len(batch))
    hits = tuple(fact.answer.strip(" .") in text for fact, text in zip(facts, said, strict=True))
    return RecallResult(tuple(facts), tuple(said), hits)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_tokens: int | None = None,
    progress: bool = True,
) -> float:
    """exp of the mean -log p of every token but the first, each given all tokens before it.

    The text is one context; what lies beyond `context_tokens` is left out.

    Args:
        model: any causal language model. Not modified.
        tokenizer: its tokenizer.
        text: the text.
        max_tokens: tokens to look at, 2 or more; None takes as many as the model has positions.
        progress: whether to show a progress bar.

    Returns:
        The perplexity, 1 or more.

    Raises:
        ValueError: if there are fewer than two tokens, or `max_tokens` is more than the model takes.
    """
    ids = context_tokens(model, tokenizer, text, max_tokens)
    base_model, lm_head = split_backbone(model)
    config = model.config.get_text_config()
    total = 0.0
    with _evaluating(model), logging.tqdm(total=len(ids), unit="tok", desc="perplexity", disable=not progress) as bar:
        input_ids = torch.tensor([ids], device=model.device)
        hidden_states = base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, :-1]
        targets = input_ids[0, 1:]
        for states, wanted in zip(hidden_states.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
            logits = finish_logits(lm_head(states), config).float()
            total += torch.nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum").item()
            bar.update(len(wanted))
        bar.update(1)
    return math.exp(total / len(targets))


def context_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None
) -> list[int]:
    """The tokens that `perplexity` looks at: the beginning of the text, as long as the model has positions.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        text: the text.
        max_tokens: the most tokens, 2 or more.

    Raises:
        ValueError: if there are fewer than two tokens, or `max_tokens` is more than the model takes.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_tokens is not None and not 2 <= max_tokens <= (limit or max_tokens):
        allowed = "2 or more" if limit is None else f"2 to {limit:,}, as many as the model has positions"
        raise ValueError(f"max_tokens is {max_tokens:,}; give {allowed}.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: max_tokens or limit]
    if len(ids) < 2:
        raise ValueError(f"The text {text[:40]!r} has {len(ids)} tokens; perplexity needs 2 or more.")
    return ids


def without_and_with_memory(model: KarlaForCausalLM, measure: Callable[[], Result]) -> tuple[Result, Result]:
    """Measure twice, with the memory off and on; afterwards it is as it was.

    Args:
        model: the Karla.
        measure: is called twice.

    Returns:
        Both results, that without memory first.
    """
    was_enabled = model.engram.enabled
    try:
        model.use_memory(False)
        off = measure()
        model.use_memory(True)
        return off, measure()
    finally:
        model.use_memory(was_enabled)


def answer_tokens(fact: Fact, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the answer as they follow it in the sentence, where the sentence splits between them."""
    prompt, answer, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (fact.prompt, fact.answer, fact.text)
    )
    if whole[: len(prompt)] == prompt:
        answer = whole[len(prompt) :]
    if not prompt or not answer:
        raise ValueError(f"The fact {fact.text!r} has a prompt or an answer without tokens; write words there.")
    return prompt, answer


def _generate(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    # No end token: a token that ends a text is one that the answer does not have.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    out = generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    return out[:, width:].tolist()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and none of the checkpoint's settings for generation, which `generate` would mix into its own."""
    was_training, settings = model.training, model.generation_config
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(was_training)
