"""Supervised training of a Karla's head with TRL."""

from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from karla_hf.modeling.modeling_karla import KarlaForCausalLM


PROBE_ROWS = 2
PROBE_CERTAINTY = 0.8


class KarlaSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, which can also train with the two-tick loss and logs how the head thinks.

    With `config.tick_loss == "last"` training is TRL's own. With `"two_tick"` the model computes its loss itself, since
    TRL multiplies hidden states of one tick by the output layer (Continuous Thought Machine,
    https://arxiv.org/abs/2505.05522, section 2.5). The losses of evaluation are always those of the answer.

    Every log has `ticks` and `certainty`: means over the first rows of the held-out data (or, without any, of the
    training data), thought until certainty reaches `config.certainty_threshold`, or 0.8 if that is None.

    Args:
        args, kwargs: as of `SFTTrainer`.
    """

    model: KarlaForCausalLM
    train_dataset: Dataset
    eval_dataset: Dataset | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        rows = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        self.probe = self.data_collator([rows[i] for i in range(min(PROBE_ROWS, len(rows)))])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch, in nats per token; see the class for which one.

        Args:
            model: the model, perhaps wrapped for several processes.
            inputs: `input_ids`, `attention_mask` and `labels`, each [B, T] int64.
            return_outputs: whether to return the model's outputs too.
            num_items_in_batch: labels in the whole accumulated batch of all processes, or None for this batch's.
        """
        if self.model.config.tick_loss != "two_tick" or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # their gradients are averaged, but the count is over all
        tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add `ticks` and `certainty` to the entries of training."""
        if "loss" in logs:
            logs.update(self.measure_thought())
        super().log(logs, start_time)

    @torch.no_grad()
    def measure_thought(self) -> dict[str, float]:
        """Mean ticks and mean certainty (in [0, 1]) over the probe's tokens. The model is not modified."""
        batch = {key: value.to(self.model.device) for key, value in self.probe.items()}
        threshold = self.model.config.certainty_threshold
        was_training = self.model.training
        self.model.eval()
        out = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            certainty_threshold=PROBE_CERTAINTY if threshold is None else threshold,
        )
        self.model.train(was_training)
        real = batch["attention_mask"].bool()
        return {"ticks": out.ticks_used[real].float().mean().item(), "certainty": out.certainty[real].mean().item()}
