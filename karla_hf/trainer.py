"""Supervised training of a Karla's head with TRL."""

from typing import Any

import torch
from datasets import Dataset
from transformers.training_args import OptimizerNames
from trl import SFTTrainer

from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.optimizer import RowsAdamW


ROWS_LR_FACTOR = 5
PROBE_ROWS = 2
PROBE_CERTAINTY = 0.8


class KarlaSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, which can also train with losses over several ticks and logs how the head thinks.

    With `config.tick_loss == "last"` training is TRL's own. With `"mean"`, `"two_tick"` (Continuous Thought Machine,
    https://arxiv.org/abs/2505.05522, section 2.5) or a `ponder_cost` the model computes its loss itself, since TRL
    multiplies hidden states of one tick by the output layer. The losses of evaluation are always those of the answer.

    Where the model has trained rows (`config.engram_layer_ids`), they are trained with five times the learning rate, without
    weight decay, and only where a batch addresses them (Engram, https://arxiv.org/abs/2601.07372, appendix).

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
        if not self.model.config.computes_own_loss or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # their gradients are averaged, but the count is over all
        tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Make the optimiser: the one of the arguments, or AdamW for both dense weights and trained rows.

        Raises:
            ValueError: if the model has trained rows and `optim` is not AdamW.
        """
        engram = self.model.model.layer_engram
        if self.optimizer is not None or engram is None or not engram.rows.weight.requires_grad:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if kind is not torch.optim.AdamW:
            raise ValueError(
                f"`optim` is {OptimizerNames(self.args.optim).value!r}, but trained rows need sparse steps; give 'adamw_torch' or "
                "'adamw_torch_fused', or set `engram_layer_ids` to None."
            )
        decays = set(self.get_decay_parameter_names(self.model))
        dense = {n: p for n, p in self.model.named_parameters() if p.requires_grad and p is not engram.rows.weight}
        groups = [
            {"params": [p for n, p in dense.items() if n in decays], "weight_decay": self.args.weight_decay},
            {"params": [p for n, p in dense.items() if n not in decays], "weight_decay": 0.0},
            {
                "params": [engram.rows.weight],
                "lr": ROWS_LR_FACTOR * options["lr"],
                "weight_decay": 0.0,
                "sparse": True,
            },
        ]
        self.optimizer = RowsAdamW(groups, **options)
        return self.optimizer

    def _clip_grad_norm(self, model):
        """Clip the norm of all gradients together and return it from before.

        torch has no norm of a sparse gradient, so its values stand in for it: once equal rows are added up, their norm is
        the gradient's, and scaling them in place scales it.
        """
        return self.accelerator.clip_grad_norm_(_with_dense_gradients(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # nothing was clipped
            grad_norm = self.accelerator.clip_grad_norm_(_with_dense_gradients(model), float("inf"))
        return super()._get_grad_norm(model, grad_norm)

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


def _with_dense_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters of a model; for one with a sparse gradient, a stand-in whose gradient is the values of that one."""
    found: list[torch.Tensor] = []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values = parameter.grad.values()
            found.append(torch.empty_like(values))
            found[-1].grad = values
        else:
            found.append(parameter)
    return found
