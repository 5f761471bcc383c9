"""Associative recall: keys are written once or twice and read later, by HOPE's delta rule and by plain Hebbian writes."""

import time
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.functional import cross_entropy

from karla_hf import HopeConfig, HopeForCausalLM
from karla_hf.modeling import delta_hope


KEYS, VALUES = 48, 16
PAIRS = {"written once": 24, "written twice": 12}  # 24 writes each
STEPS, BATCH, ASKED = 800, 32, 20  # the last: batches of the measurement
ENCODER = {
    "model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32,
    "vocab_size": KEYS + VALUES, "initializer_range": 1.0,
}  # fmt: skip


def make_batch(generator, count, task):
    """[count, 48 + 2 P] tokens: P different keys, each with a value, in each round anew; then all keys with their last values."""
    pairs = PAIRS[task]
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    parts = []
    for number in range(24 // pairs + 1):
        order = torch.rand(count, pairs, generator=generator).argsort(1)
        if number < 24 // pairs:
            values = torch.randint(KEYS, KEYS + VALUES, (count, pairs), generator=generator)
        parts.append(torch.stack([keys.gather(1, order), values.gather(1, order)], dim=-1).flatten(1))
    return torch.cat(parts, dim=1)


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


def learn(task, steps=STEPS, seed=0):
    """A small HOPE trained on the task; returns the share of values recalled, of chance 1 / VALUES, and the last loss."""
    torch.manual_seed(seed)
    config = HopeConfig(
        encoder_config=ENCODER, encoder_context="none", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        chunk_size=64, snapshot_periods=[64], level_sizes=[32], level_periods=[1], initializer_range=0.1,
    )  # fmt: skip
    model = HopeForCausalLM(config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        loss, _ = measure(model, make_batch(generator, BATCH, task))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.eval()
        found = [measure(model, make_batch(generator, BATCH, task)) for _ in range(ASKED)]
    loss, right = (sum(numbers) / ASKED for numbers in zip(*found, strict=True))
    return {"recalled": float(right), "loss": float(loss)}


def measure(model, ids):
    """Loss and share of right answers where a key is read."""
    logits = model(ids[:, :-1], use_cache=False).logits[:, 48::2, KEYS:]
    answers = ids[:, 49::2] - KEYS
    right = (logits.argmax(-1) == answers).float().mean()
    return cross_entropy(logits.flatten(0, 1), answers.flatten()), right


def run():
    """Share of values recalled, loss in nats, and CPU seconds, with and without the delta rule."""
    rows = {}
    for task in PAIRS:
        for name, writes in (("delta rule", nullcontext), ("Hebbian writes", hebbian_writes)):
            began = time.process_time()
            with writes():
                found = learn(task)
            rows[f"{task}, {name}"] = {**found, "CPU seconds": time.process_time() - began}
    return {"rows": rows, "keys": KEYS, "values": VALUES, "steps": STEPS}
