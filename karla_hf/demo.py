"""`karla demo`: read a document and forty facts once, and measure what changed and what did not."""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from karla_hf import KarlaForCausalLM, load_backbone, load_tokenizer
from karla_hf.bench import environment, measure
from karla_hf.documents import class_documentation, unrelated_text
from karla_hf.evaluation import exact_recall, perplexity
from karla_hf.facts import make_facts
from karla_hf.figures import draw_before_after
from karla_hf.speed import decode_row, read_row


BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DOCUMENT = ("trl", "trl/trainer/sft_trainer.py", "SFTTrainer")
RELATED = ("trl", "trl/trainer/grpo_trainer.py", "GRPOTrainer")
NUM_FACTS = 40
MEASURED = {
    "recall": "made-up facts recalled exactly",
    "reread": "perplexity of the document read",
    "related": "perplexity of a related document, not read",
    "unrelated": "perplexity of an unrelated story, not read",
}
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer(sys.argv[2], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=int(sys.argv[4]), do_sample=False)
sys.stdout.write(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:]))
"""


def run_demo(output_dir: Path, json: Path | None = None) -> dict:
    """Run the demonstration on SmolLM2-135M-Instruct, offline, and write its results.

    Args:
        output_dir: gets `demo.json`, `demo.png` and the saved model in `model/`; made if missing.
        json: a further file for the results.

    Returns:
        What was measured; the keys are those of `demo.json`.

    Raises:
        RuntimeError: if the reloaded model answers differently.
    """
    console = Console()
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    console.rule("A frozen SmolLM2-135M, a new memory, a new head")
    tokenizer = load_tokenizer(BACKBONE)
    model = KarlaForCausalLM.from_backbone(BACKBONE, tokenizer)
    facts = make_facts(NUM_FACTS, split="test")
    texts = {
        "reread": class_documentation(*DOCUMENT),
        "related": class_documentation(*RELATED),
        "unrelated": unrelated_text(),
    }
    console.print(
        f"The document: the documentation of {DOCUMENT[2]} in the installed TRL ({_tokens(texts, tokenizer)})."
    )
    prompt, answer_tokens = facts[0].prompt, len(tokenizer(facts[0].answer)["input_ids"])
    measured: dict = {"facts": NUM_FACTS}

    console.rule("Before reading")
    _measure(model, tokenizer, facts, texts, "before", measured)
    before = _answer(model, tokenizer, prompt, answer_tokens)

    console.rule("Reading once, closed-book: no gradient, no change of the backbone")
    for pack, read in (("document", texts["reread"]), ("facts", [fact.text for fact in facts])):
        report = model.read(read, tokenizer, pack=pack)
        console.print(
            f"  {pack}: {report.tokens} tokens at {report.tokens_per_second:.0f} tokens/s, "
            f"{report.positions_written} surprising ones written; mean surprise {report.surprise_before:.2f} -> "
            f"{report.surprise_after:.2f} nats; the pack is {report.load:.1%} full"
        )

    console.rule("After reading")
    _measure(model, tokenizer, facts, texts, "after", measured)
    after = _answer(model, tokenizer, prompt, answer_tokens)

    console.rule("Speed and size")
    measured["read_vs_forward"] = measure(read_row(model, tokenizer, texts["reread"]), rounds=3)["ratio"]
    decode = decode_row(model, load_backbone(BACKBONE), tokenizer, prompt)
    measured["decode_vs_backbone"] = measure(decode)["ratio"]

    folder = output_dir / "model"
    model.pack().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured["head_bytes"] = (folder / "model.safetensors").stat().st_size
    _show(console, measured)

    console.rule("An answer")
    console.print(f"  asked   {prompt!r}\n  before  {before!r}\n  after   {after!r}  (expected {facts[0].answer!r})")
    console.print(f"  ticks   {_ticks(model, tokenizer, prompt + after)}", highlight=False)
    reloaded = _answer_elsewhere(folder, prompt, answer_tokens)
    console.print(f"  reload  {reloaded!r}  (saved, loaded in a new process)")
    if reloaded != after:
        raise RuntimeError(f"The reloaded model answers {reloaded!r}, the saved one answered {after!r}.")

    measured.update(environment(), seconds=time.perf_counter() - started)
    draw_before_after(measured, output_dir / "demo.png")
    for path in filter(None, (output_dir / "demo.json", json)):
        path.write_text(jsonlib.dumps(measured, indent=1) + "\n", encoding="utf-8")
    console.print(f"\n{measured['seconds']:.0f} s. Written: {output_dir}/demo.json, demo.png and model/")
    return measured


def _measure(model, tokenizer, facts, texts: dict[str, str], when: str, measured: dict) -> None:
    measured[f"recall_{when}"] = exact_recall(model, tokenizer, facts).exact
    for name, text in texts.items():
        measured[f"{name}_{when}"] = perplexity(model, tokenizer, text)


def _tokens(texts: dict[str, str], tokenizer) -> str:
    counts = {name: len(tokenizer(text)["input_ids"]) for name, text in texts.items()}
    return f"{counts['reread']} tokens; the related one has {counts['related']}, the story {counts['unrelated']}"


def _answer(model, tokenizer, prompt: str, new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def _ticks(model, tokenizer, text: str, threshold: float = 0.8) -> str:
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    used = model(ids, certainty_threshold=threshold, use_cache=False).ticks_used[0].tolist()
    tokens = [tokenizer.decode([token]).strip() or "_" for token in ids[0].tolist()[1:]]
    shown = " ".join(f"{token}:{ticks}" for token, ticks in zip(tokens, used, strict=False))
    return f"{shown}\n          (for each token, stopping at certainty {threshold}; the head is new, so it adds nothing yet)"


def _answer_elsewhere(folder: Path, prompt: str, new_tokens: int) -> str:
    arguments = [str(folder), prompt, str(torch.get_num_threads()), str(new_tokens)]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The saved model could not be loaded in a new process:\n{done.stderr}")
    return done.stdout


def _show(console: Console, measured: dict) -> None:
    table = Table()
    table.add_column("")
    for when in ("before", "after"):
        table.add_column(when, justify="right")
    for name, label in MEASURED.items():
        cells = [measured[f"{name}_{when}"] for when in ("before", "after")]
        table.add_row(label, *(f"{c} of {NUM_FACTS}" if name == "recall" else f"{c:.3f}" for c in cells))
    table.add_section()
    table.add_row("reading speed / forward pass with logits", "", f"{measured['read_vs_forward']:.2f}")
    table.add_row("decoding speed / bare backbone", "", f"{measured['decode_vs_backbone']:.2f}")
    table.add_row("head on disk, packed", "", f"{measured['head_bytes'] / 1e6:.2f} MB")
    console.print(table)
