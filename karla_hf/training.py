"""Phase 1: train the head of a Karla to predict the next token, on a recipe."""

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging

from karla_hf.arguments import KarlaArguments, ModelArguments, Recipe, parse_recipe, read_recipe
from karla_hf.corpora import Corpus, load_corpus
from karla_hf.modeling.backbone_karla import load_tokenizer, resolve_backbone
from karla_hf.modeling.bitlinear_karla import BitLinear
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.pretrained_karla import finish_logits
from karla_hf.modeling.ternary_karla import CODES_PER_BYTE
from karla_hf.report import new_console, new_table, write_json
from karla_hf.runs import SUMMARY, PhaseName, keep_recipe, last_checkpoint
from karla_hf.trainer import KarlaSFTTrainer
from karla_hf.training_reading import clock, read_rows


logger = logging.get_logger(__name__)

# What a trained head can be told anew; the other options give the shapes of its weights or of the memory.
CHANGEABLE_OPTIONS = ("ctm_num_ticks", "certainty_threshold", "certainty_candidates", "tick_loss", "ponder_cost")


def run_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: type[KarlaArguments] = KarlaArguments,
    prepare: Callable[[KarlaSFTTrainer, Recipe], Any] | None = None,
    extend: Callable[[KarlaSFTTrainer, Recipe, Dataset], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train what a recipe says, save it, and compare it with its bare backbone on the held-out rows.

    Writes to `output_dir`: the Karla, packed unless `save_packed` is false, its tokenizer, TRL's checkpoints (of the head
    alone, in floats), and `summary.json`. Prints the comparison. Only the head is trained; the backbone is not modified, and
    the memory only reads if `read_texts` says so, once the head is trained.

    Args:
        path: the recipe; see `parse_recipe`. `resume_from_checkpoint` is a checkpoint's folder, or true for the last
            one in `output_dir`.
        overrides: `["--key", "value", ...]`, which go before the recipe's.
        kind: dataclass of the recipe's own keys.
        prepare: called with the trainer and the recipe before the training.
        extend: called with them and the held-out rows when the Karla is saved and measured; what it returns goes into the
            summary.

    Returns:
        The summary: losses in nats per held-out token, tokens, steps, seconds of training. Of several processes, only
        the first measures; the others return an empty one.

    Raises:
        FileNotFoundError, ValueError: for a recipe, a data set, or a checkpoint that cannot be used.
        OSError: if the model is found nowhere, or the results cannot be written.
    """
    recipe = parse_recipe(path, overrides, kind)
    arguments, training = recipe.arguments, recipe.training
    resume = resume_folder(training)
    corpus = load_texts(arguments)
    set_seed(training.seed)  # a fresh head is drawn here
    model, tokenizer = load_model(arguments, recipe.model_options)
    if arguments.save_packed:
        check_packable(model)
    if training.process_index == 0:
        keep_recipe(read_recipe(path, overrides), str(training.output_dir))
    trainer = make_trainer(recipe, model, tokenizer, corpus)
    held_out = cast("Dataset", trainer.eval_dataset)
    trainer.add_callback(PhaseName(trainer, arguments.phase))
    if prepare is not None:
        prepare(trainer, recipe)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    summary: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        summary = _finish(trainer, tokenizer, recipe, path, corpus.train, held_out, seconds)
        summary |= extend(trainer, recipe, held_out) if extend is not None else {}
        write_json(Path(str(training.output_dir), SUMMARY), summary)  # last: by it a run is known to be finished
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return summary


def load_texts(arguments: KarlaArguments) -> Corpus:
    """The rows that a recipe names."""
    return load_corpus(
        arguments.dataset_name,
        files=arguments.dataset_files,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        held_out_share=arguments.held_out_share,
    )


def make_trainer(
    recipe: Recipe, model: KarlaForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> KarlaSFTTrainer:
    """The trainer of a recipe, whose `eval_dataset` is the held-out rows that are measured."""
    arguments, training = recipe.arguments, recipe.training
    trainer = KarlaSFTTrainer(
        model=model,
        args=training,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        processing_class=tokenizer,
        states_dir=(arguments.cache_dir or Path(str(training.output_dir), "states"))
        if arguments.cache_states
        else None,
        states_dtype=arguments.cache_dtype,
        ternary_weight_decay=arguments.ternary_weight_decay,
        ternary_decay_share=arguments.ternary_decay_share,
        ternary_warmup=arguments.ternary_warmup,
        muon_learning_rate=arguments.muon_learning_rate,
        m3=arguments.m3,
        update_periods=arguments.update_periods,
    )
    if arguments.held_out_limit is not None:
        rows = cast("Dataset", trainer.eval_dataset)
        trainer.eval_dataset = rows.select(range(min(arguments.held_out_limit, len(rows))))
    return trainer


def load_model(arguments: ModelArguments, options: dict[str, Any]) -> tuple[KarlaForCausalLM, PreTrainedTokenizerBase]:
    """Load a Karla, or put a fresh memory and head on a backbone.

    Args:
        arguments: of the recipe.
        options: fields of `KarlaConfig`. A Karla takes only those that leave its weights' shapes as they are.

    Returns:
        The model, its head in trainable floats, and its tokenizer.

    Raises:
        OSError: if the model is found nowhere.
        ValueError: for options that the model cannot take.
    """
    name, revision = arguments.model_name_or_path, arguments.model_revision
    dtype = {} if arguments.backbone_dtype is None else {"dtype": arguments.backbone_dtype}
    place = resolve_backbone(name, revision=revision).path_or_name
    tokenizer = load_tokenizer(name, revision=revision)
    config, _ = KarlaConfig.get_config_dict(place, revision=None if os.path.isdir(place) else revision)
    try:
        if config.get("model_type") == KarlaConfig.model_type:
            model = KarlaForCausalLM.from_pretrained(place, revision=revision, backbone_kwargs=dtype)
            _change_options(model, arguments, options)
        else:
            quantization = arguments.backbone_quantization
            model = KarlaForCausalLM.from_backbone(
                name, tokenizer, revision=revision, quantization=quantization, backbone_kwargs=dtype, **options
            )
    except StrictDataclassError as error:
        reason = str(error.__cause__).removesuffix(".")
        raise ValueError(f"A model option of the recipe cannot be used: {reason}.") from error
    if model.config.ctm_packed:
        logger.warning(
            f"{name} is packed, so training begins from its ternary weights and not from the floats behind them; a checkpoint "
            "of its training has those."
        )
    return model.pack(False), tokenizer


def check_packable(model: KarlaForCausalLM) -> None:
    """Refuse a head that could not be packed before it is trained for it."""
    sizes = [layer.out_features for layer in model.model.ctm.modules() if isinstance(layer, BitLinear)]
    odd = [size for size in sizes if size % CODES_PER_BYTE]
    if odd:
        raise ValueError(
            f"A layer of the head has {odd[0]} outputs, but packing puts {CODES_PER_BYTE} rows into a byte; give sizes that "
            f"are multiples of {CODES_PER_BYTE}, or set `save_packed: false`."
        )


def _change_options(model: KarlaForCausalLM, arguments: ModelArguments, options: dict[str, Any]) -> None:
    fixed = sorted(set(options) - set(CHANGEABLE_OPTIONS))
    fixed += ["backbone_quantization"] if arguments.backbone_quantization is not None else []
    if fixed:
        raise ValueError(
            f"{arguments.model_name_or_path} is a Karla that was made with its own {', '.join(fixed)}; remove them from "
            f"the recipe, which may set {', '.join(CHANGEABLE_OPTIONS)}."
        )
    for key, value in options.items():
        setattr(model.config, key, value)
    model.config.validate()


@torch.no_grad()
def held_out_losses(
    model: KarlaForCausalLM, rows: Dataset, collate: Callable, batch_size: int
) -> tuple[float, float, int]:
    """Mean losses of the bare backbone and of Karla over the same tokens.

    Args:
        model: a Karla. Left in eval mode, else not modified.
        rows: tokenized rows.
        collate: makes `input_ids`, `attention_mask` and `labels`, each [B, T], of a list of rows.
        batch_size: rows per forward pass.

    Returns:
        The backbone's loss and Karla's in nats per token, and the number of tokens predicted.
    """
    model.eval()
    backbone_loss = karla_loss = tokens = 0.0
    for start in logging.tqdm(range(0, len(rows), batch_size), desc="held-out loss"):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        karla_loss += model(**batch, labels=labels, use_cache=False, num_items_in_batch=1).loss.item()
        hidden = model.model.backbone(**batch, use_cache=False).last_hidden_state
        logits = finish_logits(model.get_output_embeddings()(hidden), model.config.text_config)
        answers = labels[:, 1:].flatten()
        backbone_loss += cross_entropy(logits[:, :-1].flatten(0, 1).float(), answers, reduction="sum").item()
        tokens += (answers != -100).sum().item()
    return backbone_loss / tokens, karla_loss / tokens, int(tokens)


def _finish(
    trainer: KarlaSFTTrainer,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    path: str | Path,
    texts: Dataset,
    rows: Dataset,
    seconds: float,
) -> dict[str, Any]:
    """Let the memory read, save the model and the log, measure it, and print the summary."""
    model, output = trainer.accelerator.unwrap_model(trainer.model), Path(str(trainer.args.output_dir))
    batch_size, read = trainer.args.per_device_eval_batch_size, {}
    if recipe.arguments.read_texts:
        _, before, _ = held_out_losses(model, rows, trainer.plain_collator, batch_size)
        read = {"loss_before_reading": before}
        read |= read_rows(model, tokenizer, trainer, texts, recipe.arguments.read_texts)
    model.pack(recipe.arguments.save_packed)  # the outputs stay bit for bit what they are
    model.save_pretrained(output)  # not trainer.save_model, which would add a pickle of the arguments
    tokenizer.save_pretrained(output)
    trainer.save_state()
    backbone_loss, karla_loss, tokens = held_out_losses(model, rows, trainer.plain_collator, batch_size)
    summary = {
        "recipe": str(path),
        "model": recipe.arguments.model_name_or_path,
        "backbone_source": model.config.base_model_source,
        "data": recipe.arguments.dataset_name or ", ".join(recipe.arguments.dataset_files or ()),
        "backbone_loss": backbone_loss,
        "karla_loss": karla_loss,
        "tokens": tokens,
        "train_tokens": trainer._total_train_tokens,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "tick_loss": model.config.tick_loss,
        "levels": clock(model, recipe.arguments.update_periods),
        **read,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {model.device.type}",
        "versions": {name: version(name) for name in ("karla-hf", "torch", "transformers", "trl")},
    }
    new_console().print(_table(summary))
    return summary


def _table(summary: dict[str, Any]) -> Table:
    title = f"Loss on {summary['tokens']:,} held-out tokens of {summary['data']}"
    caption = f"{summary['steps']} steps in {summary['seconds']:.0f} s"
    table = new_table(["", "nats per token", "perplexity"], title=title, caption=caption)
    for name, loss in (("bare backbone", summary["backbone_loss"]), ("Karla", summary["karla_loss"])):
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.3f}")
    return table


def resume_folder(training: TrainingArguments) -> str | None:
    """The checkpoint's folder that `resume_from_checkpoint` means."""
    resume, output = training.resume_from_checkpoint, str(training.output_dir)
    if resume is None or resume.lower() == "false":
        return None
    if resume.lower() == "true":
        last = last_checkpoint(output)
        if last is None:
            raise ValueError(f"{output} holds no checkpoint to resume from; remove `resume_from_checkpoint`.")
        return str(last)
    if not os.path.isfile(os.path.join(resume, "trainer_state.json")):
        raise ValueError(f"{resume} is no checkpoint of a training run; give a folder `checkpoint-…` of one, or true.")
    return resume
