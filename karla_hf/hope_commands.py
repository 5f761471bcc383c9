"""What the commands of `karla` do with a HOPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from karla_hf.hope_chat import HopeSession
from karla_hf.hope_checkpoints import create_hope, is_untrained, load_hope
from karla_hf.hope_info import describe_hope, learned_bytes, state_bytes
from karla_hf.report import format_bytes, format_count, new_console, new_table, write_json
from karla_hf.terminal import run_chat


def create(encoder: str, directory: Path, *, revision: str | None, options: Mapping[str, Any], force: bool) -> None:
    """Make a HOPE; see `karla new --hope`."""
    model = create_hope(encoder, directory, revision=revision, options=options, force=force)
    fresh = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    new_console().print(
        f"Made {directory}: {encoder} stays frozen; {fresh:,} parameters of fast weights and levels are untrained.",
        markup=False,
    )


def show_info(directory: Path, json_file: Path | None) -> None:
    """Show the parts of a HOPE; see `karla info`."""
    model, _ = load_hope(directory)
    parts, state, learned = describe_hope(model), state_bytes(model), learned_bytes(directory)
    trained = "untrained" if is_untrained(model) else "trained"
    table = new_table(
        ["part", "changes", "parameters", "trainable", "learned", "in RAM"],
        text_columns=2,
        title=f"{directory}, a HOPE ({trained}) on {model.config.encoder_name_or_path or 'its own encoder'}",
        caption=f"State of a sequence: {format_bytes(state)}, however long. Learned by reading: {model.learning_step:,} chunks, "
        f"{format_bytes(learned)} on disk.",
    )
    for part in parts:
        if part.name == "total":
            table.add_section()
        counts = (format_count(number) for number in (part.parameters, part.trainable, part.learned))
        table.add_row(part.name, part.changes, *counts, format_bytes(part.bytes_in_ram))
    new_console().print(table)
    data = {"parts": [asdict(part) for part in parts], "state_bytes": state, "learned_bytes": learned}
    write_json(
        json_file,
        {"encoder": model.config.encoder_name_or_path, "trained": trained == "trained", **data,
         "learned_chunks": model.learning_step},
    )  # fmt: skip


def chat(directory: Path, max_new_tokens: int) -> None:
    """Talk to a HOPE; see `karla chat`."""
    model, tokenizer = load_hope(directory)
    console = new_console()
    if is_untrained(model):
        console.print(
            f"{directory} is untrained, so its answers are noise; train it with `karla train`, or teach it with /learn on.",
            style="yellow", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    run_chat(HopeSession(model, tokenizer, directory, max_new_tokens=max_new_tokens), console)
