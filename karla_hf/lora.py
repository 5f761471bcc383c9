"""LoRA as a user would run it to teach a model some texts: a peft adapter, AdamW, several epochs."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase


IGNORED = -100  # label of padding


class LoraReader:
    """A backbone with an adapter on all its linear layers, trained on texts as next-token prediction.

    The learning rate is constant, so that a run of 16 epochs passes through the runs of 1 and 4; gradients are clipped
    to norm 1; forward passes run in bfloat16 as TRL's trainers do by default, the adapter is float32.

    Args:
        backbone: a causal LM. Gets adapter layers in place until `remove`; its weights never change.
        tokenizer: its tokenizer.
        learning_rate: of AdamW, without weight decay.
        rank: rank of the adapter; alpha is twice the rank.
        piece_tokens: texts are cut into rows of at most this many tokens, and a batch holds at most as many tokens.
        batch_size: most rows in a batch.
        seed: of the adapter's start and the order of the batches.

    Attributes:
        model: the backbone with its adapter, a causal LM for `exact_recall` and `perplexity`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        learning_rate: float,
        rank: int = 16,
        piece_tokens: int = 512,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.piece_tokens, self.batch_size = tokenizer, piece_tokens, batch_size
        self._random = random.Random(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._peft = get_peft_model(backbone, config)
        assert isinstance(self._peft, PeftModel), type(self._peft)
        self.model = backbone  # its linear layers are now peft's
        trainable = [parameter for parameter in self._peft.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)

    def read(self, texts: str | Sequence[str], epochs: int = 1) -> float:
        """Train on texts for some epochs; a further call goes on with the same optimizer.

        Args:
            texts: one or more texts of two tokens or more; each begins a row of its own.
            epochs: passes over all of them.

        Returns:
            The mean loss per batch in the last epoch.

        Raises:
            ValueError: if there is nothing to train on, or `epochs` is less than 1.
        """
        rows = self._rows([texts] if isinstance(texts, str) else texts)
        if not rows or epochs < 1:
            raise ValueError(
                f"LoRA was given {len(rows)} rows and {epochs} epochs; give a text of 2 tokens and 1 epoch, or more."
            )
        losses: list[float] = []
        self._peft.train()
        for _ in range(epochs):
            losses = [self._step(batch) for batch in self._batches(rows)]
        self._peft.eval()
        return sum(losses) / len(losses)

    @property
    def num_bytes(self) -> int:
        """Size of the adapter's file."""
        with tempfile.TemporaryDirectory() as folder:
            self._peft.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size

    def remove(self) -> None:
        """Take the adapter out of the backbone, which is then what it was."""
        self._peft.unload()
        # peft froze the backbone's parameters and leaves its own configuration as an attribute; a second adapter would
        # warn about that.
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        tokens = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        pieces = [ids[at : at + self.piece_tokens] for ids in tokens for at in range(0, len(ids), self.piece_tokens)]
        return [piece for piece in pieces if len(piece) > 1]

    def _batches(self, rows: list[list[int]]) -> list[list[list[int]]]:
        """Rows of alike length together, in a new order on each call."""
        order = sorted(self._random.sample(rows, len(rows)), key=lambda row: len(row).bit_length())
        batches: list[list[list[int]]] = []
        for row in order:
            if batches and len(batches[-1]) < self.batch_size:
                width = max(map(len, [*batches[-1], row]))
                if width * (len(batches[-1]) + 1) <= self.piece_tokens:
                    batches[-1].append(row)
                    continue
            batches.append([row])
        self._random.shuffle(batches)
        return batches

    def _step(self, rows: list[list[int]]) -> float:
        width = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            out = self._peft(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORED))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self._optimizer.param_groups[0]["params"], 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return out.loss.item()
