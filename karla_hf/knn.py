"""kNN-LM: the backbone's next-token probabilities mixed with those of the nearest stored hidden states.

Khandelwal et al., "Generalization through Memorization" (https://arxiv.org/abs/1911.00172).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from karla_hf.modeling.backbone_karla import split_backbone


NEIGHBOURS = 64
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
TEMPERATURES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
EVERYWHERE = (math.inf,)
RADII = (10.0, 30.0, 100.0, 200.0, 400.0, 800.0, math.inf)


class KnnHead(nn.Module):
    """An output layer that mixes in what followed the nearest stored states.

        p(y | h) = (1 - share) softmax(lm_head(h))_y + share sum_{i: y_i = y} softmax_i(-|h - k_i|^2 / temperature)

    over the `NEIGHBOURS` nearest keys k_i. Search is exact. The paper's share is one number for every state; with a
    `radius` it counts only where the nearest key is that near, so that text unlike all that was read is left alone.

    Args:
        lm_head: the output layer, [V, D]. Not modified.

    Attributes:
        share: the weight of the neighbours, 0 to 1; at 0, or with nothing stored, the layer is `lm_head`.
        temperature: of the softmax over squared distances, more than 0.
        radius: largest squared distance of the nearest key; infinite as in the paper.
        keys: [N, D] float16.
        values: [N] int32, the token that followed each key.
    """

    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.share, self.temperature, self.radius = 0.5, 10.0, math.inf
        self.keys = torch.empty(0, self.weight.shape[1], dtype=torch.float16)
        self.values = torch.empty(0, dtype=torch.int32)

    @property
    def weight(self) -> Tensor:
        """[V, D] rows of the wrapped layer, which callers ask an output layer for."""
        weight = self.lm_head.weight
        assert isinstance(weight, Tensor), type(weight)
        return weight

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Store states [N, D] and the tokens [N] that followed them."""
        self.keys = torch.cat([self.keys, keys.to("cpu", torch.float16)])
        self.values = torch.cat([self.values, values.to("cpu", torch.int32)])

    def neighbours(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances [B, K] float32, increasing, and tokens [B, K] int64, for states [B, D]."""
        distances = torch.cdist(states.float(), self.keys.to(states.device).float()).square()
        nearest = distances.topk(min(NEIGHBOURS, len(self.keys)), largest=False)
        return nearest.values, self.values.to(states.device)[nearest.indices].long()

    def forward(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]; where neighbours count, they are log-probabilities."""
        logits = self.lm_head(states)
        if self.share == 0 or len(self.keys) == 0:
            return logits
        distances, tokens = self.neighbours(states.flatten(0, -2))
        share = self.share * (distances[:, :1] <= self.radius)
        mixed = (1 - share) * logits.float().softmax(-1).flatten(0, -2)
        mixed.scatter_add_(1, tokens, share * torch.softmax(-distances / self.temperature, dim=-1))
        return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log().view_as(logits)


class KnnReader:
    """A backbone whose output layer is a `KnnHead`; reading stores each state with the token that follows.

    Args:
        backbone: a causal LM without scaled or capped logits. Gets the head in place until `remove`.
        tokenizer: its tokenizer.

    Attributes:
        model: the backbone with its head, a causal LM for `exact_recall` and `perplexity`.
        head: the head.
    """

    def __init__(self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = backbone, tokenizer
        self._base_model, lm_head = split_backbone(backbone)
        self.head = KnnHead(lm_head).eval()
        backbone.set_output_embeddings(self.head)

    @torch.no_grad()
    def read(self, texts: str | Sequence[str]) -> None:
        """Store the final states of texts, each text one context.

        Raises:
            ValueError: if a text has fewer than two tokens.
        """
        for text in [texts] if isinstance(texts, str) else texts:
            states, targets = self._states(text)
            self.head.add(states, targets)

    @torch.no_grad()
    def tune(self, examples: Sequence[tuple[str, str]], radii: Sequence[float] = EVERYWHERE) -> dict[str, float]:
        """Choose share, temperature and radius for the least mean loss per token, averaged over kinds of examples.

        Args:
            examples: pairs of what is given and what is to be predicted after it. Each one whose given part is empty
                is a kind of its own; all others together are one kind (facts).
            radii: to choose from.

        Returns:
            The chosen `share`, `temperature` and `radius`, which the head now has.
        """
        measured = [self._measure(given, predicted) for given, predicted in examples]
        documents = [parts for parts, (given, _) in zip(measured, examples, strict=True) if not given]
        facts = [parts for parts, (given, _) in zip(measured, examples, strict=True) if given]
        kinds = [*documents, tuple(torch.cat(column) for column in zip(*facts, strict=True))] if facts else documents

        def loss(share: float, temperature: float, radius: float) -> float:
            total = 0.0
            for base, distances, right in kinds:
                near = share * (distances[:, 0] <= radius)
                mixed = (1 - near) * base + near * (torch.softmax(-distances / temperature, -1) * right).sum(-1)
                total -= mixed.log().mean().item()
            return total / len(kinds)

        best = min(itertools.product(SHARES, TEMPERATURES, radii), key=lambda point: loss(*point))
        self.head.share, self.head.temperature, self.head.radius = best
        return dict(zip(("share", "temperature", "radius"), best, strict=True))

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.head.keys.nbytes + self.head.values.nbytes

    def remove(self) -> None:
        """Give the backbone its own output layer back."""
        self.model.set_output_embeddings(self.head.lm_head)

    def _states(self, text: str, given: str = "") -> tuple[Tensor, Tensor]:
        """Final states [N, D] and next tokens [N] of the part of a text after `given`."""
        ids = self.tokenizer(given + text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
        ids = ids[:, : getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        if ids.shape[1] < 2:
            raise ValueError(f"The text {text[:40]!r} has {ids.shape[1]} tokens; kNN-LM needs 2 or more.")
        states = self._base_model(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state[0]
        known = max(len(self.tokenizer(given, add_special_tokens=False)["input_ids"]) - 1, 0) if given else 0
        return states[known:-1], ids[0, known + 1 :].to(states.device)

    def _measure(self, given: str, predicted: str) -> tuple[Tensor, Tensor, Tensor]:
        """The backbone's probability of each token [N], distances [N, K], and which neighbours are right [N, K]."""
        states, targets = self._states(predicted, given)
        base = self.head.lm_head(states).float().softmax(-1).gather(1, targets[:, None])[:, 0]
        distances, tokens = self.head.neighbours(states)
        return base, distances, (tokens == targets[:, None]).float()
