"""What the commands of `karla` do. The command line itself, with its help texts, is `karla_hf.cli`."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from karla_hf.chat import ChatSession
from karla_hf.checkpoints import (
    check_checkpoint,
    create_checkpoint,
    load_checkpoint,
    load_memory,
    save_option,
    writing,
)
from karla_hf.documents import read_text
from karla_hf.evaluation import RecallResult, context_tokens, exact_recall, perplexity, without_and_with_memory
from karla_hf.facts import Fact, read_facts
from karla_hf.figures import draw_ticks
from karla_hf.info import Level, describe_levels, describe_packs
from karla_hf.modeling.exchange_karla import export_pack, find_pack, import_pack, merge_packs, verify_engram
from karla_hf.modeling.manifest_karla import check_pack_name
from karla_hf.modeling.packs_karla import save_engram
from karla_hf.report import format_bytes, format_count, new_console, new_table, write_json
from karla_hf.terminal import run_chat
from karla_hf.ticks import calibrate, measure_ticks, summary


def create(
    backbone: str,
    directory: Path,
    *,
    quantization: str | None,
    revision: str | None,
    options: Mapping[str, Any],
    force: bool,
) -> None:
    """Make a Karla; see `karla new`."""
    model = create_checkpoint(
        backbone, directory, quantization=quantization, revision=revision, options=options, force=force
    )
    head = sum(parameter.numel() for parameter in model.model.ctm.parameters())
    new_console().print(
        f"Made {directory}: {backbone} stays frozen, the memory is empty, the head has {head:,} parameters.",
        markup=False,
    )


def show_info(directory: Path, json_file: Path | None) -> None:
    """Show the levels of a Karla; see `karla info`."""
    model, _ = load_checkpoint(directory)
    levels, packs = describe_levels(model, directory), describe_packs(model.engram, directory)
    console = new_console()
    name = model.config.base_model_name_or_path or type(model.model.backbone).__name__
    precision = model.config.backbone_quantization or str(model.get_input_embeddings().weight.dtype).removeprefix(
        "torch."
    )
    table = new_table(
        ["level", "changes", "parameters", "trainable", "on disk", "in RAM", "budget"],
        text_columns=2,
        title=f"{directory} on {name} ({precision})",
        caption="Budget: promised in RAM for Qwen2.5-1.5B in nf4. L1 is counted whole, although the system gives it "
        "pages only as rows are written.",
    )
    for level in levels:
        if level.name == "total":
            table.add_section()
        table.add_row(
            f"{level.name} {level.what}",
            level.update_period,
            format_count(level.parameters),
            format_count(level.trainable),
            format_bytes(level.bytes_on_disk),
            format_bytes(level.bytes_in_ram),
            _budget(level),
        )
    console.print(table)
    if packs:
        _print_packs(packs)
    data = {"levels": [asdict(level) for level in levels], "packs": [asdict(pack) for pack in packs]}
    write_json(json_file, {"backbone": name, **data})


def read_files(
    directory: Path, files: Sequence[Path], *, pack: str, context: str, by_line: bool, json_file: Path | None
) -> None:
    """Read files into the memory; see `karla read`."""
    check_pack_name(pack)
    texts = [read_text(path) for path in files]
    if by_line:
        texts = [line.strip() for text in texts for line in text.split("\n") if line.strip()]
    with writing(directory):
        model, tokenizer = load_checkpoint(directory)
        report = model.read(texts, tokenizer, pack=pack, context=context, title=[path.name for path in files])
        model.save_memory(directory)
    table = new_table(["read", ""])
    table.add_row("texts", f"{report.texts:,}")
    table.add_row("tokens", f"{report.tokens:,}")
    table.add_row("positions written", f"{report.positions_written:,}")
    table.add_row(f"new rows in pack {pack}", f"{report.rows_written:,}")
    table.add_row(f"load of pack {pack}", f"{report.load:.2%}")
    table.add_row("surprise before, nats per token", f"{report.surprise_before:.3f}")
    table.add_row("surprise after, nats per token", f"{report.surprise_after:.3f}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    table.add_row("tokens per second", f"{report.tokens_per_second:,.0f}")
    new_console().print(table)
    write_json(json_file, {"pack": pack, "context": context, **report._asdict()})


def forget_pack(directory: Path, pack: str) -> None:
    """Remove a pack; see `karla forget`. The backbone is not loaded."""
    with writing(directory):
        engram, tokenizer_sha256 = load_memory(directory)
        rows = find_pack(engram, pack).num_owned
        del engram.packs[pack]
        save_engram(engram, directory, tokenizer_sha256)
    new_console().print(f"Forgot pack {pack!r} with {rows:,} rows.", markup=False)


def forget_texts(directory: Path, files: Sequence[Path], *, pack: str) -> None:
    """Unlearn files; see `karla forget --text`."""
    texts = [read_text(path) for path in files]
    with writing(directory):
        model, tokenizer = load_checkpoint(directory)
        find_pack(model.engram, pack)
        report = model.read(texts, tokenizer, pack=pack, sign=-1)
        model.save_memory(directory)
    new_console().print(
        f"Unlearned {report.tokens:,} tokens in pack {pack!r}: surprise {report.surprise_before:.3f} before, "
        f"{report.surprise_after:.3f} nats per token after.",
        markup=False,
    )


def export_one(directory: Path, pack: str, folder: Path) -> None:
    """Write a pack to a folder of its own; see `karla pack export`."""
    engram, tokenizer_sha256 = load_memory(directory)
    export_pack(engram, pack, folder, tokenizer_sha256)
    new_console().print(
        f"Exported pack {pack!r} with {engram.packs[pack].num_owned:,} rows to {folder}.", markup=False
    )


def import_one(directory: Path, folder: Path, name: str | None) -> None:
    """Add an exported pack; see `karla pack import`."""
    with writing(directory):
        engram, tokenizer_sha256 = load_memory(directory)
        name = import_pack(engram, folder, name, tokenizer_sha256)
        save_engram(engram, directory, tokenizer_sha256)
    new_console().print(f"Imported pack {name!r} with {engram.packs[name].num_owned:,} rows.", markup=False)


def merge(directory: Path, names: Sequence[str], into: str) -> None:
    """Make one pack of several; see `karla pack merge`."""
    with writing(directory):
        engram, tokenizer_sha256 = load_memory(directory)
        merged = merge_packs(engram, names, into)
        save_engram(engram, directory, tokenizer_sha256)
    new_console().print(f"Merged {len(set(names))} packs into {into!r} with {merged.num_owned:,} rows.", markup=False)


def verify(directory: Path, json_file: Path | None) -> None:
    """Check every file of a memory; see `karla pack verify`."""
    check_checkpoint(directory)
    damaged = verify_engram(directory)
    write_json(json_file, {"damaged": damaged})
    if damaged:
        listed = "; ".join(f"{file}: {reason}" for file, reason in damaged.items())
        raise OSError(
            f"The memory in {directory} is damaged ({listed}); restore the files from a good copy, or forget their packs."
        )
    new_console().print(f"Every file of the memory in {directory} is what was written.", markup=False)


def show_packs(directory: Path, json_file: Path | None) -> None:
    """List the packs of a Karla; see `karla packs`. The backbone is not loaded."""
    packs = describe_packs(load_memory(directory)[0], directory)
    if packs:
        _print_packs(packs)
    else:
        new_console().print(f"The memory of {directory} holds no packs; `karla read` makes one.", markup=False)
    write_json(json_file, {"packs": [asdict(pack) for pack in packs]})


def chat(directory: Path, max_new_tokens: int) -> None:
    """Talk to a Karla; see `karla chat`."""
    model, tokenizer = load_checkpoint(directory)
    run_chat(ChatSession(model, tokenizer, directory, max_new_tokens=max_new_tokens), new_console())


def open_page(directory: Path, port: int, max_new_tokens: int) -> None:
    """Serve the web page of a Karla or a HOPE; see `karla ui`."""
    try:
        from karla_hf.page_server import serve_page
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "fastapi", "starlette", "uvicorn"):
            raise
        raise ImportError("The page needs Gradio; install it with `pip install 'karla-hf[ui]'`.") from error
    from karla_hf.hope_page import open_model

    def show(address: str) -> None:
        new_console().print(f"The page is at {address}; Ctrl-C ends it.", markup=False, highlight=False)

    serve_page(open_model(directory, max_new_tokens), port, show)


def measure_recall(directory: Path, facts_file: Path, limit: int | None, json_file: Path | None) -> None:
    """Ask facts with memory off and on; see `karla eval recall`."""
    facts = read_facts(facts_file)[:limit]
    model, tokenizer = load_checkpoint(directory)
    off, on = without_and_with_memory(model, lambda: exact_recall(model, tokenizer, facts))
    table = new_table(["facts recalled exactly", "asked", "memory off", "memory on"])
    by_form = {form: (asked, off.by_form[form][0], exact) for form, (exact, asked) in on.by_form.items()}
    for form, counts in by_form.items() if len(by_form) > 1 else ():
        table.add_row(form, *map(str, counts))
    table.add_section()
    table.add_row("all", str(len(facts)), str(off.exact), str(on.exact))
    new_console().print(table)
    result = {"facts": len(facts), "memory_off": _recall_data(off), "memory_on": _recall_data(on)}
    write_json(json_file, result)


def measure_perplexity(directory: Path, files: Sequence[Path], max_tokens: int | None, json_file: Path | None) -> None:
    """Measure perplexity with memory off and on; see `karla eval perplexity`."""
    texts = [read_text(path) for path in files]
    model, tokenizer = load_checkpoint(directory)
    table = new_table(["perplexity", "tokens", "memory off", "memory on", "on / off"])
    results = []
    tokens = [len(context_tokens(model, tokenizer, text, max_tokens)) for text in texts]
    for path, text, count in zip(files, texts, tokens, strict=True):
        measure = functools.partial(perplexity, model, tokenizer, text, max_tokens)
        off, on = without_and_with_memory(model, measure)
        table.add_row(str(path), f"{count:,}", f"{off:,.3f}", f"{on:,.3f}", f"{on / off:.3f}")
        results.append({"file": str(path), "tokens": count, "memory_off": off, "memory_on": on})
    new_console().print(table)
    write_json(json_file, {"files": results})


def calibrate_ticks(
    directory: Path, files: Sequence[Path], *, max_rise: float, save: bool, json_file: Path | None
) -> None:
    """Find the threshold that thinks least at next to no loss; see `karla eval ticks`."""
    data: list[str | Fact] = []
    for path in files:
        data += read_facts(path) if path.suffix == ".jsonl" else [read_text(path)]
    model, tokenizer = load_checkpoint(directory)
    found = calibrate(measure_ticks(model, tokenizer, data), max_rise)
    console = new_console()
    columns = ["expected ticks", "loss", "rise", "tokens right", "answers right"]
    if not any(isinstance(entry, Fact) for entry in data):
        columns.pop()  # no text is right as a whole
    by_tick = new_table(["answer after tick", *columns[1:2], *columns[3:]], title="All tokens answer after one tick")
    for entry in found.per_tick:
        by_tick.add_row(f"{entry['tick']:.0f}", *_tick_row(entry, columns[1:2] + columns[3:]))
    console.print(by_tick)
    rule = new_table(
        ["threshold", *columns],
        title="Tokens answer when they are certain",
        caption=f"Of {found.tokens:,} tokens. Rise: of the loss, against all {len(found.per_tick) - 1} ticks.",
    )
    for entry in [entry for i, entry in enumerate(found.per_threshold) if i % 5 == 0 or entry == found.chosen]:
        mark = " ◂" if entry == found.chosen else ""
        rule.add_row(f"{entry['threshold']:g}{mark}", *_tick_row(entry, columns))
    console.print(rule)
    if json_file is not None:
        draw_ticks(summary(found), json_file.with_suffix(".png"))
    write_json(json_file, summary(found))
    if found.chosen is None:
        raise ValueError(f"No threshold keeps the rise of the loss within {max_rise:.2%}; allow more.")
    if save:
        save_option(directory, "certainty_threshold", found.chosen["threshold"])
        console.print(f"{directory} stops at certainty {found.chosen['threshold']:g} from now on.", markup=False)


def _tick_row(entry: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    shown = {"expected ticks": ("ticks", ".2f"), "loss": ("loss", ".4f"), "rise": ("rise", ".2%"),
             "tokens right": ("token_accuracy", ".1%"), "answers right": ("accuracy", ".1%")}  # fmt: skip
    return [format(entry[name], style) for name, style in (shown[column] for column in columns)]


def _budget(level: Level) -> str:
    if level.budget is None:
        return ""
    return f"{'≤' if level.bytes_in_ram <= level.budget else '>'} {format_bytes(level.budget)}"


def _print_packs(packs: Sequence) -> None:
    table = new_table(["pack", "sources", "rows", "tokens", "load", "on disk", "damaged files"], text_columns=2)
    for pack in packs:
        table.add_row(pack.name, ", ".join(pack.sources), f"{pack.rows:,}", f"{pack.tokens:,}", f"{pack.load:.2%}",
                      format_bytes(pack.bytes_on_disk), str(len(pack.damaged)) if pack.damaged else "")  # fmt: skip
    new_console().print(table)


def _recall_data(result: RecallResult) -> dict[str, Any]:
    by_form = {form: {"exact": exact, "asked": asked} for form, (exact, asked) in result.by_form.items()}
    return {"exact": result.exact, "by_form": by_form, "generated": list(result.generated)}
