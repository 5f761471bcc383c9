"""What learns small tasks best that the backbone does badly: heads of several kinds on its states, or LoRA inside it.

All arms see the same 2,000 rows in the same number of passes. The form of the head, its optimiser, and LoRA's learning rate
out of 5e-4, 1e-3 and 3e-3 were chosen on validation rows of `chain`.
"""

import math
import statistics
import time

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from karla_hf.head_arms import MlpHead, TaskHead, Trained, train_head
from karla_hf.modeling.backbone_karla import load_backbone, load_tokenizer
from karla_hf.tasks import TEST_ROWS, TRAIN_ROWS, VALIDATION_ROWS, digit_rows, encode, task_rows, task_states


BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PASSES = {"count": 1, "chain": 3, "chain_sum": 3}  # over the training rows of each task
EQUAL_TIME = {"chain_sum": 7}  # passes that take about LoRA's CPU time; on the other tasks the first row already does
SEEDS, TICKS, LAYERS = (0, 1, 2), 10, [0, 7, 15, 22, 30]
STREAM = {"ctm_num_neurons": 0, "ctm_stream_size": 512}
NEURONS = {"ctm_num_neurons": 256, "ctm_stream_size": 0}
BOTH = {"ctm_num_neurons": 256, "ctm_stream_size": 512}
WIDE_STEPS = {"batch_size": 16}
# name: ticks, fields of the configuration, settings of the training
HEADS = {
    "Karla's head": (TICKS, STREAM, {"batch_size": 8}),
    "Karla's head, 16 rows a step": (TICKS, STREAM, WIDE_STEPS),
    "· 1 tick": (1, STREAM, WIDE_STEPS),
    "· with CTM neurons": (TICKS, BOTH, WIDE_STEPS),
    "· CTM neurons alone": (TICKS, NEURONS, WIDE_STEPS),
    "· last layer only": (TICKS, {**STREAM, "ctm_source_layers": [30]}, WIDE_STEPS),
    "· float weights": (TICKS, STREAM, {**WIDE_STEPS, "ternary_warmup": math.inf}),
    "· MLP on the last state": (1, None, WIDE_STEPS),
}
LORA = "LoRA r6, all linears"
LORA_RATE, LORA_BATCH, LORA_RANK = 3e-3, 16, 6


def new_head(text_config, arm: str, seed: int) -> tuple[torch.nn.Module, dict]:
    """A fresh head of an arm and the settings of its training."""
    ticks, options, settings = HEADS[arm]
    torch.manual_seed(seed)
    head = MlpHead(text_config.hidden_size, 1536) if options is None else TaskHead(text_config, ticks, **options)
    return head, settings


def train_lora(task: str, seed: int) -> Trained:
    """LoRA in every linear of the backbone, in bfloat16, with the loss and the rows of the heads."""
    model, tokenizer = load_backbone(BACKBONE, dtype=torch.bfloat16), load_tokenizer(BACKBONE)
    digits = digit_rows(model, tokenizer)
    ids, labels = encode(tokenizer, task_rows(task, TRAIN_ROWS + VALIDATION_ROWS + TEST_ROWS))
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"))
    trained = [parameter.requires_grad_() for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.data = parameter.data.float()

    def logits(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.base_model.model.model(ids[rows], use_cache=False).last_hidden_state
        return hidden[:, -labels.shape[1] :].float() @ digits.T

    optimizer = torch.optim.AdamW(trained, lr=LORA_RATE, weight_decay=0.0)
    generator, steps, step = torch.Generator().manual_seed(seed), PASSES[task] * TRAIN_ROWS // LORA_BATCH, 0
    started = time.process_time()
    for _ in range(PASSES[task]):
        for rows in torch.randperm(TRAIN_ROWS, generator=generator).split(LORA_BATCH):
            rate = LORA_RATE * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            cross_entropy(logits(rows).flatten(0, 1), labels[rows].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    seconds = time.process_time() - started
    with torch.no_grad():
        right = [
            (logits(rows).argmax(-1) == labels[rows]).all(-1) for rows in torch.arange(TRAIN_ROWS, len(ids)).split(50)
        ]
    flat = torch.cat(right).float()
    test = flat[VALIDATION_ROWS:].mean().item()
    return Trained(flat[:VALIDATION_ROWS].mean().item(), test, [test], seconds, sum(p.numel() for p in trained))


def run() -> dict:
    """Train every arm on every task with every seed (about two hours on one core)."""
    results: dict[str, dict[str, list[Trained]]] = {}
    model, tokenizer = load_backbone(BACKBONE), load_tokenizer(BACKBONE)
    states_seconds = {}
    for name, passes in PASSES.items():
        task = task_states(model, tokenizer, task_rows(name, TRAIN_ROWS + VALIDATION_ROWS + TEST_ROWS), LAYERS)
        states_seconds[name] = task.cpu_seconds
        results.setdefault(LORA, {})[name] = [train_lora(name, seed) for seed in SEEDS]
        for arm in HEADS:
            results.setdefault(arm, {})[name] = [_train(model.config, arm, task, seed, passes) for seed in SEEDS]
        if name in EQUAL_TIME:
            results["Karla's head, LoRA's CPU time"] = {
                name: [_train(model.config, "Karla's head", task, seed, EQUAL_TIME[name]) for seed in SEEDS]
            }
    return table(results, states_seconds)


def _train(text_config, arm: str, task, seed: int, passes: int) -> Trained:
    head, settings = new_head(text_config, arm, seed)
    if arm == "· last layer only":
        task = task._replace(sources=task.sources[:, :, -1:])
    return train_head(head, task, passes=passes, seed=seed, **settings)


def table(results: dict[str, dict[str, list[Trained]]], states_seconds: dict[str, float]) -> dict:
    """Mean and spread of the test accuracies by arm and task, and the CPU seconds of training."""
    rows = {}
    for arm, by_task in results.items():
        row: dict[str, float] = {"parameters": next(iter(by_task.values()))[0].parameters}
        for name, runs in by_task.items():
            test = [run.test for run in runs]
            row |= {name: statistics.mean(test), f"{name} ±": statistics.stdev(test)}
            row[f"{name} s"] = statistics.mean(run.cpu_seconds for run in runs)
        rows[arm] = {column: row.get(column, math.nan) for column in rows.get(LORA, row)}
    by_tick = {
        name: [statistics.mean(ticks) for ticks in zip(*(run.test_by_tick for run in runs), strict=True)]
        for name, runs in results["Karla's head"].items()
    }
    return {"rows": rows, "test_by_tick": by_tick, "states_seconds": states_seconds}


def draw(result: dict, path) -> None:
    """Accuracy after every tick of Karla's head."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, ticks in result["test_by_tick"].items():
        axes.plot(range(1, len(ticks) + 1), ticks, marker="o", label=name)
    axes.set(xlabel="tick", ylabel="answers right", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)
