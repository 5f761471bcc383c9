"""Associative recall: keys are written and read later, by HOPE's delta rule and by plain Hebbian writes.

32 keys, each written once; 8 keys, each written once among 40 writes of 4 others, which are not asked for; 24 writes of 8
keys in random order, where the last value counts. Both arms train with the same recipe; mean, least and most of three seeds.
`memory` rows need no training: one matrix of 16 x 16, random keys and values, the same tasks, read back as the nearest value.
"""

import math
import statistics
import time
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.functional import cross_entropy, normalize

from karla_hf import HopeConfig, HopeForCausalLM
from karla_hf.modeling import delta_hope


KEYS, VALUES, HIDDEN, HEADS = 64, 16, 32, 2
TASKS = {  # keys that are asked for, other keys, and writes besides the first of each: of the others, if there are any
    "written once": (32, 0, 0),
    "written once among others": (8, 4, 40),
    "overwritten": (8, 0, 16),
}
ARMS = {"delta rule": False, "Hebbian writes": True}
STEPS, BATCH, ASKED, SEEDS = 400, 32, 20, (0, 1, 2)  # ASKED: batches of the measurement
COLUMNS = ("recalled", "least", "most", "loss", "CPU seconds")
HEAD_DIM, MEMORIES, RATES = 16, 2000, (1.0, 0.5, 0.25)  # of the untrained memory
ENCODER = {
    "model_type": "bert", "hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32,
    "vocab_size": KEYS + VALUES, "initializer_range": 1.0,
}  # fmt: skip


def make_writes(generator, count, task):
    """Which key is written when, and its value, both [count, writes]; and the last values [count, keys] of those asked for."""
    asked, others, more = TASKS[task]
    span = (asked, asked + others) if others else (0, asked)
    which = torch.cat(
        [torch.arange(asked).expand(count, asked), torch.randint(*span, (count, more), generator=generator)], dim=1
    )
    which = which.gather(1, torch.rand(which.shape, generator=generator).argsort(1))
    values = torch.randint(VALUES, which.shape, generator=generator)
    last = torch.zeros(count, asked + others, dtype=torch.int64)
    for t in range(which.shape[1]):
        last.scatter_(1, which[:, t : t + 1], values[:, t : t + 1])
    return which, values, last[:, :asked]


def make_batch(generator, count, task):
    """[count, 2 writes + 2 asked] tokens: pairs of key and value, then every key that is asked for with its last value."""
    asked, others, _ = TASKS[task]
    which, values, last = make_writes(generator, count, task)
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, : asked + others]
    order = torch.rand(count, asked, generator=generator).argsort(1)
    written = torch.stack([keys.gather(1, which), KEYS + values], dim=-1).flatten(1)
    answers = torch.stack([keys.gather(1, order), KEYS + last.gather(1, order)], dim=-1).flatten(1)
    return torch.cat([written, answers], dim=1)


def hebbian_chunk(running, query, key, target, eta, log_alpha):
    """`delta_hope._chunk` without erasure: S_t = a S_{t-1} + e u k^T."""
    g = log_alpha.cumsum(-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp()
    written, grown = eta.unsqueeze(-1) * target, g.exp().unsqueeze(-1)
    size = key.shape[-1]
    output = grown * (query @ running[:, :size].mT) + (query @ key.mT * decay).tril() @ written[..., :size]
    rest = (g[:, -1:] - g).exp().unsqueeze(-1)
    return output, grown[:, -1:] * running + written.mT @ (key * rest)


@contextmanager
def hebbian_writes():
    """Inside, HOPE writes without the delta rule."""
    chunk, token = delta_hope._chunk, delta_hope._token
    delta_hope._chunk = delta_hope._token = hebbian_chunk
    try:
        yield
    finally:
        delta_hope._chunk, delta_hope._token = chunk, token


def learn(task, hebbian, steps=STEPS, seed=0):
    """A small HOPE trained on the task; returns the share of values recalled, of chance 1 / VALUES, and the loss."""
    with hebbian_writes() if hebbian else nullcontext():
        torch.manual_seed(seed)
        config = HopeConfig(
            encoder_config=ENCODER, encoder_context="none", hidden_size=HIDDEN, num_hidden_layers=1,
            num_attention_heads=HEADS, chunk_size=64, snapshot_periods=[64], level_sizes=[HIDDEN], level_periods=[1],
            initializer_range=0.1,
        )  # fmt: skip
        model = HopeForCausalLM(config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
        generator = torch.Generator().manual_seed(seed + 1)
        for _ in range(steps):
            loss, _ = measure(model, make_batch(generator, BATCH, task), task)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model.eval()
            found = [measure(model, make_batch(generator, BATCH, task), task) for _ in range(ASKED)]
    loss, right = (sum(numbers) / ASKED for numbers in zip(*found, strict=True))
    return {"recalled": float(right), "loss": float(loss)}


def measure(model, ids, task):
    """Loss and share of right answers where a key is read."""
    asked, _, more = TASKS[task]
    start = 2 * (asked + more)
    logits = model(ids[:, :-1], use_cache=False).logits[:, start::2, KEYS:]
    answers = ids[:, start + 1 :: 2] - KEYS
    right = (logits.argmax(-1) == answers).float().mean()
    return cross_entropy(logits.flatten(0, 1), answers.flatten()), right


def recall_untrained(task, rate=None):
    """Share of values that one matrix recalls of random unit keys and values; `rate` of the delta rule, None: Hebbian."""
    generator = torch.Generator().manual_seed(0)
    which, values, last = make_writes(generator, MEMORIES, task)
    keys, codes = (
        normalize(torch.randn(MEMORIES, count, HEAD_DIM, generator=generator), dim=-1)
        for count in (sum(TASKS[task][:2]), VALUES)
    )
    memory, rows = torch.zeros(MEMORIES, HEAD_DIM, HEAD_DIM), torch.arange(MEMORIES)
    for t in range(which.shape[1]):
        key, code = keys[rows, which[:, t]], codes[rows, values[:, t]]
        write = code if rate is None else rate * (code - torch.einsum("nij,nj->ni", memory, key))
        memory += torch.einsum("ni,nj->nij", write, key)
    read = (keys[:, : last.shape[1]] @ memory.mT @ codes.mT).argmax(-1)
    return float((read == last).float().mean())


def run():
    """Share of values recalled, loss in nats, and CPU seconds, with and without the delta rule."""
    rows = {}
    for task in TASKS:
        for rate in (*RATES, None):
            name = "Hebbian writes" if rate is None else f"delta rule at {rate}"
            rows[f"{task}, memory, {name}"] = {
                **dict.fromkeys(COLUMNS, math.nan),
                "recalled": recall_untrained(task, rate),
            }
        for name, hebbian in ARMS.items():
            began = time.process_time()
            found = [learn(task, hebbian, seed=seed) for seed in SEEDS]
            recalled, losses = ([result[column] for result in found] for column in ("recalled", "loss"))
            mean, loss = (statistics.mean(numbers) for numbers in (recalled, losses))
            numbers = (mean, min(recalled), max(recalled), loss, time.process_time() - began)
            rows[f"{task}, {name}"] = dict(zip(COLUMNS, numbers, strict=True))
    return {"rows": rows, "keys": KEYS, "values": VALUES, "steps": STEPS, "seeds": len(SEEDS)}
