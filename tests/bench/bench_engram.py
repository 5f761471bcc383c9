"""The memory: looking names up in small and large tables, writing, saving, reading, and what stays (about ten minutes).

Lookups and writes have 16 rows of 64 halves for every token.
"""

import numpy as np
import torch
from transformers import LlamaConfig

from karla_hf import KarlaConfig, KarlaForCausalLM, load_tokenizer
from karla_hf.bench import Result, Row, load_bench
from karla_hf.documents import class_documentation
from karla_hf.modeling import writing_karla
from karla_hf.modeling.engram_karla import Engram, new_engram
from karla_hf.modeling.hashing_karla import name_positions
from karla_hf.speed import read_row


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
VOCABULARY, HIDDEN = 49152, 576
FAMILIES = [{"kind": "ngram", "order": 4, "weight": 0.4}, {"kind": "sentence", "order": 12, "weight": 0.6}]
HEADS = 8
DECODED = 2000
PREFILLED = 4096


def rows():
    """Lookups, the write, saving, reading as a whole, and recall after reading on."""
    yield from _lookups("1e5", 100_000)
    yield from _lookups("5e7", 50_000_000)
    yield _write()
    yield from load_bench("commit").rows()
    tokenizer = load_tokenizer(NAME)
    document = class_documentation("trl", "trl/trainer/grpo_trainer.py", "GRPOTrainer")
    yield read_row(KarlaForCausalLM.from_backbone(NAME, tokenizer), tokenizer, document)

    kept = load_bench("retention").run()["rows"]
    recalled = [kept[when]["recalled of 200"] for when in ("after other text", "after the facts")]
    yield Result(
        "recall_after_100k", recalled[0], "of 200 facts", "before reading 100,000 further tokens", recalled[1]
    )


def _lookups(size: str, rows_of_64: int):
    engram, ids = _filled(rows_of_64)
    table = torch.from_numpy(engram.packs["full"].tables[-1].rows.reshape(-1, 64))
    index = torch.randint(len(table), (PREFILLED, len(FAMILIES) * HEADS))
    contexts = [ids[:, at : at + engram.history + 1] for at in range(DECODED)]
    text = ids[:, : PREFILLED + engram.history]

    def look_up(history):
        return engram.read(name_positions(history, engram.families, engram.constants))

    def embed(rows):
        return torch.nn.functional.embedding(rows, table)

    yield Row(f"decode_{size}", DECODED, "tokens", lambda: [look_up(history) for history in contexts],
              "bare torch embedding of 16 rows", lambda: [embed(rows) for rows in index[:DECODED]])  # fmt: skip
    yield Row(f"prefill_{size}", PREFILLED, "tokens", lambda: look_up(text),
              "bare torch embedding of 16 rows", lambda: embed(index))  # fmt: skip


def _filled(rows_of_64: int) -> tuple[Engram, torch.Tensor]:
    """A memory 80 % full, and random tokens every n-gram of which it holds: each lookup finds its rows."""
    config = KarlaConfig(
        text_config=LlamaConfig(
            hidden_size=HIDDEN, num_attention_heads=9, num_key_value_heads=3, vocab_size=VOCABULARY
        ),
        engram_families=FAMILIES,
        engram_rows_per_head=rows_of_64 // (HEADS * len(FAMILIES)),
        engram_update_periods=[1],
    )
    maps = torch.arange(VOCABULARY), torch.zeros(VOCABULARY, dtype=torch.uint8)
    engram = new_engram(config, *maps, pad_id=0)
    table = engram.open_pack("full").tables[-1]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (1, 2 * PREFILLED), generator=generator)
    held = name_positions(ids, engram.families, engram.constants).flatten().numpy()
    table.claim(held[: int(0.8 * len(table))])
    numbers = np.random.default_rng(0)
    while table.load < 0.8:
        table.claim(numbers.integers(1, 2**63, size=min(1 << 20, int(0.8 * len(table)) - table.num_owned + 1)))
    flat, some = table.rows.reshape(-1), numbers.standard_normal(1 << 20).astype(np.float16)
    for at in range(0, len(flat), len(some)):
        flat[at : at + len(some)] = some[: len(flat) - at]
    return engram, ids


def _write() -> Row:
    """Addressing, combining, repeats and scatter for a document, from problems that were worked out beforehand."""
    tokenizer = load_tokenizer(NAME)
    model = KarlaForCausalLM.from_backbone(NAME, tokenizer, engram_families=FAMILIES)
    text = class_documentation("trl", "trl/trainer/sft_trainer.py", "SFTTrainer")
    calls: list[tuple] = []
    correct = writing_karla._correct

    def record(engram, pack, names, problem, rule, sign):
        calls.append((names, problem, rule, sign))
        return correct(engram, pack, names, problem, rule, sign)

    writing_karla._correct = record
    try:
        tokens = model.read(text, tokenizer, progress=False).tokens
    finally:
        writing_karla._correct = correct
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[None]

    def write() -> None:
        model.forget("default")
        pack = model.engram.open_pack("default")
        name_positions(ids, model.engram.families, model.engram.constants)
        for number, call in enumerate(calls):
            correct(model.engram, pack, *call)
            if number % writing_karla.DEFAULT_RULE.rounds:
                pack.tick()

    def write_without_kernel() -> None:
        kernel, writing_karla.c_function = writing_karla.c_function, lambda *_: None
        try:
            write()
        finally:
            writing_karla.c_function = kernel

    return Row("write", tokens, "tokens", write, "the same in torch alone", write_without_kernel)
