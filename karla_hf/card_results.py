"""What `karla eval`, `karla bench` and `karla train` wrote as JSON, as tables and scores of a model card."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, EvalResultEntry
from huggingface_hub._eval_results import eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


class CardTable(NamedTuple):
    """A table of a card: its cells are text, and its first column holds names."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


class Score(NamedTuple):
    """One number in the card's metadata.

    Attributes:
        task: what was asked of the model, such as "recall".
        dataset: name of the data set on the Hub, or None for data of one's own.
        data: what the data is called.
        metric: of the Hub's metrics.
        metric_name: in words.
        value: the number.
    """

    task: str
    dataset: str | None
    data: str
    metric: str
    metric_name: str
    value: float


class Measured(NamedTuple):
    """What goes into a card: tables for its readers, scores for its metadata."""

    tables: list[CardTable]
    scores: list[Score]


def read_measured(sources: Sequence[str]) -> Measured:
    """Read results.

    Args:
        sources: paths of JSON files; `owner/dataset=FILE` names the data set on the Hub that was measured on.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if it is no result of `karla eval`, `karla bench` or `karla train`, or a data set's name is none.
    """
    measured = Measured([], [])
    for source in sources:
        dataset, separator, file = source.rpartition("=")
        if separator and not Path(source).is_file():
            check_hub_name(dataset)
        else:
            dataset, file = "", source
        text = Path(file).read_text(encoding="utf-8")
        try:
            results = json.loads(text)
            for result in results if isinstance(results, list) else [results]:
                _add(measured, result, dataset or None)
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, StopIteration) as error:
            raise ValueError(
                f"{file} is no result of `karla eval`, `karla bench` or `karla train`; give a file that --json of one of "
                "them wrote."
            ) from error
    return measured


def eval_results(scores: Sequence[Score]) -> list[EvalResult]:
    """Scores for the `model-index` in a card's metadata."""
    return [
        EvalResult(
            task_type="text-generation", task_name=score.task, dataset_type=score.dataset or "own-data",
            dataset_name=score.data, dataset_config=score.data, metric_type=score.metric, metric_name=score.metric_name, metric_value=score.value,
        )
        for score in scores
    ]  # fmt: skip


def eval_entries(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores on data sets of the Hub for a file in `.eval_results`, which takes no others."""
    entries = [
        EvalResultEntry(score.dataset, score.task, score.value, notes=f"{score.metric_name}, {score.data}")
        for score in scores
        if score.dataset is not None
    ]
    return eval_result_entries_to_yaml(entries)


def check_hub_name(name: str) -> None:
    """Raise ValueError unless this can be the name of a repository or a data set."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is no name on the Hub; give `owner/name` of letters, digits, '-', '_' and '.'."
        ) from error


def _add(measured: Measured, result: Mapping[str, Any], dataset: str | None) -> None:
    match result:
        case {"facts": int(asked), "memory_off": off, "memory_on": on}:
            _add_recall(measured, asked, off, on, dataset)
        case {"files": [*files]}:
            _add_perplexity(measured, files, dataset)
        case {"per_tick": [*per_tick], "per_threshold": [*_], "chosen": chosen, "tokens": int(tokens)}:
            _add_ticks(measured, per_tick, chosen, tokens)
        case {"bench": str(name), "rows": dict(rows)}:
            measured.tables.append(_bench_table(name, rows, result))
        case {"backbone_loss": float(before), "karla_loss": float(after), "tokens": int(tokens)}:
            _add_training(measured, result, before, after, tokens, dataset)
        case _:
            raise ValueError("This is no known kind of result.")


def _add_recall(measured: Measured, asked: int, off: Mapping, on: Mapping, dataset: str | None) -> None:
    rows = [
        [_cell(form), str(counts["asked"]), str(off["by_form"][form]["exact"]), str(counts["exact"])]
        for form, counts in on["by_form"].items()
    ]
    rows = rows if len(rows) > 1 else []
    rows.append(["all", str(asked), str(off["exact"]), str(on["exact"])])
    columns = ["facts recalled exactly", "asked", "memory off", "memory on"]
    title = f"Facts asked by their bare prompt and answered greedily{_of(dataset)} (`karla eval recall`):"
    measured.tables.append(CardTable(title, columns, rows))
    value = on["exact"] / asked
    measured.scores.append(Score("recall", dataset, f"{asked} facts", "exact_match", "exact recall", value))


def _add_perplexity(measured: Measured, files: Sequence[Mapping], dataset: str | None) -> None:
    columns = ["perplexity", "tokens", "memory off", "memory on", "on / off"]
    rows = []
    for file in files:
        name, off, on = PurePath(file["file"]).name, file["memory_off"], file["memory_on"]
        rows.append([_cell(name), f"{file['tokens']:,}", f"{off:,.3f}", f"{on:,.3f}", f"{on / off:.3f}"])
        data = f"{name}, {file['tokens']:,} tokens"
        measured.scores.append(Score("perplexity", dataset, data, "perplexity", "perplexity", float(on)))
    title = f"Perplexity of texts, each as one context{_of(dataset)} (`karla eval perplexity`):"
    measured.tables.append(CardTable(title, columns, rows))


def _add_ticks(measured: Measured, per_tick: Sequence[Mapping], chosen: Mapping | None, tokens: int) -> None:
    rows = [[f"{entry['tick']:.0f}", f"{entry['loss']:.4f}", f"{entry['token_accuracy']:.1%}"] for entry in per_tick]
    note = "" if chosen is None else (
        f"At certainty {chosen['threshold']:g} a token gets {chosen['ticks']:.2f} ticks in the mean, with a loss of "
        f"{chosen['loss']:.4f} and {chosen['token_accuracy']:.1%} of the tokens right."
    )  # fmt: skip
    columns = ["answer after tick", "loss, nats per token", "tokens right"]
    title = f"What ticks of thought are worth, over {tokens:,} held-out tokens (`karla eval ticks`):"
    measured.tables.append(CardTable(title, columns, rows, note))


def _add_training(
    measured: Measured, result: Mapping, before: float, after: float, tokens: int, dataset: str | None
) -> None:
    data = PurePath(str(result["data"])).name
    columns = ["held-out loss", "nats per token", "perplexity"]
    rows = [
        [name, f"{loss:.4f}", f"{math.exp(loss):.3f}"] for name, loss in (("bare backbone", before), ("Karla", after))
    ]
    title = f"{tokens:,} held-out tokens of {data} after {result['steps']:,} steps (`karla train`):"
    measured.tables.append(CardTable(title, columns, rows))
    measured.scores.append(
        Score("language modelling", dataset, f"{data}, held out", "perplexity", "perplexity", math.exp(after))
    )


def _bench_table(name: str, rows: Mapping[str, Mapping], result: Mapping) -> CardTable:
    """A benchmark's rows: a rate and a peer's, or one column per quality."""
    timed = "peer" in next(iter(rows.values()))
    if timed:
        columns = ["", "ours", "peer", "peer's", "ratio"]
        cells = [
            [_cell(row), f"{_number(entry['value'])} {entry['unit']}", _cell(entry["peer"]),
             f"{_number(entry['peer_value'])} {entry['unit']}", f"{entry['ratio']:.2f}"]
            for row, entry in rows.items()
        ]  # fmt: skip
    else:
        columns = ["", *(_cell(column) for column in next(iter(rows.values())))]
        cells = [[_cell(row), *map(_number, entry.values())] for row, entry in rows.items()]
    machine = f"{result['machine']}, {result['threads']} threads." if "machine" in result else ""
    return CardTable(f"`karla bench {name}`:", columns, cells, machine)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _of(dataset: str | None) -> str:
    return "" if dataset is None else f", [{dataset}](https://huggingface.co/datasets/{dataset})"


def _cell(text: str) -> str:
    """Text that stays in its cell of a table and is no markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
