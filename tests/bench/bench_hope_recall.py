"""Associative recall: keys are written once and read later, by HOPE's delta rule and by plain Hebbian writes."""

import time
from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy

from karla_hf import HopeConfig, HopeForCausalLM
from karla_hf.modeling import delta_hope


KEYS, VALUES, PAIRS = 48, 16, 24
STEPS, BATCH, ASKED = 800, 32, 20  # the last: batches of the measurement
ENCODER = {
    "model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32,
    "vocab_size": KEYS + VALUES, "initializer_range": 1.0,
}  # fmt: skip


def make_batch(generator, count):
    """[count, 4 PAIRS] tokens: different keys, each with its value, then the same keys in another order with theirs."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(KEYS, KEYS + VALUES, (count, PAIRS), generator=generator)
    order = torch.rand(count, PAIRS, generator=generator).argsort(1)
    written = torch.stack([keys, values], dim=-1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=-1).flatten(1)
    return torch.cat([written, asked], dim=1)


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


def learn(steps=STEPS, seed=0):
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
        loss, _ = measure(model, make_batch(generator, BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.eval()
        found = [measure(model, make_batch(generator, BATCH)) for _ in range(ASKED)]
    loss, right = (sum(numbers) / ASKED for numbers in zip(*found, strict=True))
    return {"recalled": float(right), "loss": float(loss)}


def measure(model, ids):
    """Loss and share of right answers where a key is read."""
    logits = model(ids[:, :-1], use_cache=False).logits[:, 2 * PAIRS :: 2, KEYS:]
    answers = ids[:, 2 * PAIRS + 1 :: 2] - KEYS
    right = (logits.argmax(-1) == answers).float().mean()
    return cross_entropy(logits.flatten(0, 1), answers.flatten()), right


def run():
    """Share of values recalled, loss in nats, and CPU seconds, with and without the delta rule."""
    rows = {}
    for seed in (0, 1):
        for name, writes in (("delta rule", None), ("Hebbian writes", hebbian_writes)):
            began = time.process_time()
            if writes is None:
                found = learn(seed=seed)
            else:
                with writes():
                    found = learn(seed=seed)
            rows[f"{name}, seed {seed}"] = {**found, "CPU seconds": time.process_time() - began}
    return {"rows": rows, "pairs": PAIRS, "keys": KEYS, "values": VALUES, "steps": STEPS}
