"""Supervised training of a Karla's head with TRL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames
from trl import SFTTrainer

from karla_hf.cached_batches import STATE_ROW, StatesCollator
from karla_hf.loss import score_labels_only
from karla_hf.m3 import M3AdamW
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.multi_rate import set_update_periods
from karla_hf.muon import MuonAdamW, TernaryWarmup
from karla_hf.optimizer import RowsAdamW, TernaryDecay, split_ternary
from karla_hf.pushing import PublishingTrainerMixin
from karla_hf.states import store_states


ROWS_LR_FACTOR = 5
PROBE_ROWS = 2
PROBE_CERTAINTY = 0.8


class KarlaSFTTrainer(PublishingTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer`, which can also train with losses over several ticks and logs how the head thinks.

    With `config.tick_loss == "last"` the loss is TRL's own (`karla_hf.loss` computes it faster). With `"mean"`, `"two_tick"`
    (Continuous Thought Machine, https://arxiv.org/abs/2505.05522, section 2.5) or a `ponder_cost` the model computes its
    loss itself, since TRL multiplies hidden states of one tick by the output layer. The losses of evaluation are always
    those of the answer.

    Where the model has trained rows (`config.engram_layer_ids`), they are trained with five times the learning rate, without
    weight decay, and only where a batch addresses them (Engram, https://arxiv.org/abs/2601.07372, appendix).

    With `states_dir`, the frozen backbone runs over the data once: its states are stored there, and every step reads them
    instead (`karla_hf.states`).

    Of the ternary weights the decay may be set apart, and end before training does (as in BitNet b1.58,
    https://arxiv.org/abs/2402.17764, whose recipe takes it away in the second half). Whatever is not called a weight
    (biases, decays, start states, registers) never decays, nor do norms.

    Every log has `ticks` and `certainty`: means over the first rows of the held-out data (or, without any, of the
    training data), thought until certainty reaches `config.certainty_threshold`, or 0.8 if that is None.

    Args:
        args, kwargs: as of `SFTTrainer`.
        states_dir: folder for the backbone's states; None runs the backbone in every step.
        states_dtype: "bfloat16", "float16" or "float32", of stored states.
        ternary_weight_decay: decay of ternary weights; None takes `args.weight_decay`.
        ternary_decay_share: share of the training after which that of ternary weights is 0.
        ternary_warmup: share of the training over which weights go from float to ternary.
        muon_learning_rate: learning rate of Muon for the ternary weights; None trains them as all others.
        m3: options of `karla_hf.m3.M3` for the ternary weights instead, with `learning_rate`; None trains them as all others.
        update_periods: steps between two changes of the parameters whose names match a regular expression; see
            `karla_hf.multi_rate`.

    Raises:
        ValueError: for data without padding, or for states of a backbone that trains or of streamed data.
        OSError: if the disk has no room for the states.
    """

    model: KarlaForCausalLM
    train_dataset: Dataset
    eval_dataset: Dataset | None

    def __init__(
        self,
        *args: Any,
        states_dir: str | Path | None = None,
        states_dtype: str = "bfloat16",
        ternary_weight_decay: float | None = None,
        ternary_decay_share: float = 1.0,
        ternary_warmup: float = 0.0,
        muon_learning_rate: float | None = None,
        m3: Mapping[str, Any] | None = None,
        update_periods: Mapping[str, int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.padding_free:
            raise ValueError(
                "Rows without padding would let the head look from one text into another; use `packing_strategy: wrapped`, "
                "or no packing, and no `padding_free`."
            )
        self.plain_collator = self.data_collator
        decay = self.args.weight_decay if ternary_weight_decay is None else ternary_weight_decay
        self.ternary_decay = TernaryDecay(decay, ternary_decay_share)
        self.add_callback(self.ternary_decay)
        self.add_callback(TernaryWarmup(ternary_warmup))
        self.muon_learning_rate, self.m3, self.update_periods = muon_learning_rate, m3, update_periods
        score_labels_only(self.model)
        self.probe = self._make_probe()
        if states_dir is not None:
            self._store_states(Path(states_dir), states_dtype)

    def _make_probe(self) -> dict[str, torch.Tensor]:
        rows = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        batch = self.data_collator([rows[i] for i in range(min(PROBE_ROWS, len(rows)))])
        batch = {key: batch[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        if not self.model.backbone_trains:
            batch["source_states"] = self.model.model.backbone_states(**batch)
        return batch

    def _store_states(self, folder: Path, dtype: str) -> None:
        """Compute and store the states of the training data, and of held-out data if it is evaluated on the way."""
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError("Cached states need a data set of known length; load it without streaming.")
        accelerator = self.accelerator
        options: dict[str, Any] = {
            "dtype": dtype, "precision": accelerator.mixed_precision, "autocast": accelerator.autocast,
            "rank": accelerator.process_index, "world": accelerator.num_processes, "wait": accelerator.wait_for_everyone,
        }  # fmt: skip
        pad = cast("PreTrainedTokenizerBase", self.processing_class).pad_token_id
        train = store_states(self.model, self.train_dataset["input_ids"], folder / "train", **options)
        self.train_dataset = self.train_dataset.add_column(STATE_ROW, list(range(len(train))))
        parts = [train]
        if isinstance(self.eval_dataset, Dataset) and self.args.eval_strategy != "no":
            held_out = store_states(self.model, self.eval_dataset["input_ids"], folder / "eval", **options)
            rows = list(range(len(train), len(train) + len(held_out)))
            self.eval_dataset = self.eval_dataset.add_column(STATE_ROW, rows)
            parts.append(held_out)
        self.data_collator = StatesCollator(self.plain_collator, parts, 0 if pad is None else pad)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        if STATE_ROW not in columns:
            columns.append(STATE_ROW)

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
            ValueError: if the model has trained rows, or Muon is wanted, and `optim` is not AdamW.
        """
        if self.optimizer is not None:
            return super().create_optimizer(model)
        engram = self.model.model.layer_engram
        rows = engram is not None and engram.rows.weight.requires_grad
        optimizer = self._rows_optimizer(engram) if rows else super().create_optimizer(model)
        split_ternary(optimizer, self.model, self.ternary_decay.decay)
        if self.muon_learning_rate is not None:
            optimizer = self._for_matrices(optimizer, MuonAdamW, {"lr": self.muon_learning_rate})
        elif self.m3 is not None:
            own = {key: value for key, value in self.m3.items() if key != "learning_rate"}
            optimizer = self._for_matrices(optimizer, M3AdamW, {"lr": self.m3["learning_rate"], **own})
        if self.update_periods:
            optimizer = set_update_periods(optimizer, self.model, self.update_periods)
        self.optimizer = optimizer
        return optimizer

    def _for_matrices(
        self, optimizer: torch.optim.Optimizer, kind: type[MuonAdamW], own: Mapping[str, Any]
    ) -> MuonAdamW:
        """The same groups, but another optimiser, with options of its own, for those of ternary weights."""
        name, key = ("M3", "m3") if kind is M3AdamW else ("Muon", "muon_learning_rate")
        options = self._adamw_options(
            f"beside {name} only 'adamw_torch' and 'adamw_torch_fused' are possible; give one of them, or remove `{key}`."
        )
        kept = ("params", "lr", "weight_decay", "sparse", "ternary")
        groups = [{key: group[key] for key in kept if key in group} for group in optimizer.param_groups]
        return kind([{**group, "muon": True, **own} if group.get("ternary") else group for group in groups], **options)

    def _adamw_options(self, otherwise: str) -> dict[str, Any]:
        """Arguments of AdamW; where `optim` is another, ValueError with what stands against it."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if kind is not torch.optim.AdamW:
            raise ValueError(f"`optim` is {OptimizerNames(self.args.optim).value!r}, but {otherwise}")
        return options

    def get_decay_parameter_names(self, model) -> list[str]:
        """Names of the parameters that decay: weights, but not those of norms."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if "weight" in name.rpartition(".")[2]]

    def _rows_optimizer(self, engram) -> RowsAdamW:
        options = self._adamw_options(
            "trained rows need sparse steps; give 'adamw_torch' or 'adamw_torch_fused', or set `engram_layer_ids` to None."
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
        return RowsAdamW(groups, **options)

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
        """Log, and add `ticks`, `certainty` and, of a memory that holds some, `memory_rows` to the entries of training."""
        if "loss" in logs:
            logs.update(self.measure_thought())
            rows = sum(self.model.packs().values())
            logs.update({"memory_rows": rows} if rows else {})
        super().log(logs, start_time)

    @torch.no_grad()
    def measure_thought(self) -> dict[str, float]:
        """Mean ticks and mean certainty (in [0, 1]) over the probe's tokens. The model is not modified."""
        threshold = self.model.config.certainty_threshold
        was_training = self.model.training
        self.model.eval()
        out = self.model.model(
            **self.probe, use_cache=False, certainty_threshold=PROBE_CERTAINTY if threshold is None else threshold
        )
        self.model.train(was_training)
        real = self.probe["attention_mask"].bool()
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
