"""Timings: ours and a peer in turn, in one process, median of several rounds; and tables of qualities.

A bench is `tests/bench/bench_<name>.py`. One of timings defines `rows()`, which yields `Row`s and `Result`s. One of qualities defines
`run()`, which returns `{"rows": {name: {column: number}}}` and whatever else belongs into the JSON, and, if it has a
figure, `draw(result, path)`.
"""

from __future__ import annotations

import importlib.util
import json as jsonlib
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table


BENCH_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "bench"
VERSIONS = ("torch", "transformers", "trl", "karla-hf")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: row name in the result.
        amount: units of work that both sides do in one call.
        unit: what `amount` counts, such as "tokens"; results are per second.
        ours: does the work our way.
        peer: what it is compared with.
        theirs: does the same work the peer's way.
    """

    name: str
    amount: float
    unit: str
    ours: Callable[[], object]
    peer: str
    theirs: Callable[[], object]


@dataclass(frozen=True)
class Result:
    """A comparison that is no timing, measured already.

    Attributes:
        name: row name in the result.
        value: ours.
        unit: of both values.
        peer: what it is compared with.
        peer_value: the peer's.
    """

    name: str
    value: float
    unit: str
    peer: str
    peer_value: float


def measure(row: Row | Result, rounds: int = 5) -> dict[str, float | str]:
    """Time both sides of a row in turn, after one untimed call of each.

    Args:
        row: the comparison; a `Result` is taken as it is.
        rounds: timed calls of each side.

    Returns:
        `value` and `peer_value` in `unit` (per second), `peer`, and `ratio` = value / peer_value (> 1: ours is better).

    Example:
        >>> row = Row("sleep", 1, "naps", lambda: time.sleep(0.01), "longer nap", lambda: time.sleep(0.03))
        >>> measure(row, rounds=2)["ratio"] > 1
        True
    """
    if isinstance(row, Result):
        return {**_as_dict(row), "ratio": row.value / row.peer_value}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    row.ours()
    row.theirs()
    for _ in range(rounds):
        for side in seconds:
            started = time.perf_counter()
            getattr(row, side)()
            seconds[side].append(time.perf_counter() - started)
    value, peer_value = (row.amount / statistics.median(seconds[side]) for side in ("ours", "theirs"))
    return {
        "value": value,
        "unit": f"{row.unit}/s",
        "peer": row.peer,
        "peer_value": peer_value,
        "ratio": value / peer_value,
    }


def bench_names() -> list[str]:
    """Names of the benches in `tests/bench` of a source checkout.

    Raises:
        FileNotFoundError: if this is an installed package without its tests.
    """
    if not BENCH_FOLDER.is_dir():
        raise FileNotFoundError(
            f"The benches are not at {BENCH_FOLDER}; they come with the source checkout, so clone it and install with -e."
        )
    return sorted(path.stem.removeprefix("bench_") for path in BENCH_FOLDER.glob("bench_*.py"))


def run_bench(names: list[str], json: Path | None = None, rounds: int = 5) -> list[dict]:
    """Run benches, show each as a table, and write the results.

    Args:
        names: benches to run; `["all"]` runs every one.
        json: file for the results: one object for one bench, a list for several. Figures of benches that have one are
            written beside it, as `<file>-<bench>.png`.
        rounds: timed calls of each side.

    Returns:
        One result per bench: `bench`, `rows`, `machine`, `threads`, `versions`.

    Raises:
        ValueError: for an unknown bench.
    """
    known = bench_names()
    names = known if names == ["all"] else names
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"There is no bench {', '.join(unknown)}; the benches are {', '.join(known)} and all.")
    results = []
    for name in names:
        module = load_bench(name)
        if hasattr(module, "run"):
            results.append({"bench": name, **module.run(), **environment()})
            _show_qualities(results[-1])
        else:
            rows = {row.name: measure(row, rounds) for row in module.rows()}
            results.append({"bench": name, "rows": rows, **environment()})
            _show(results[-1])
        if json is not None and hasattr(module, "draw"):
            module.draw(results[-1], json.with_name(f"{json.stem}-{name}.png"))
    if json is not None:
        written = _without_nan(results[0] if len(results) == 1 else results)
        json.write_text(jsonlib.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return results


def environment() -> dict[str, object]:
    """Machine, threads and versions that a timing belongs to."""
    return {
        "machine": f"{platform.machine()} {platform.system()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }


def _as_dict(result: Result) -> dict[str, float | str]:
    return {key: value for key, value in asdict(result).items() if key != "name"}


def load_bench(name: str) -> ModuleType:
    """The module of a bench in `tests/bench`."""
    path = BENCH_FOLDER / f"bench_{name}.py"
    spec = importlib.util.spec_from_file_location(f"karla_bench_{name}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _show(result: dict) -> None:
    table = Table(title=f"bench {result['bench']}, {result['threads']} threads, {result['machine']}")
    for column in ("row", "ours", "peer", "peer's", "ratio"):
        table.add_column(column, justify="left" if column in ("row", "peer") else "right")
    for name, row in result["rows"].items():
        unit = row["unit"]
        table.add_row(
            name, f"{row['value']:.1f} {unit}", row["peer"], f"{row['peer_value']:.1f} {unit}", f"{row['ratio']:.2f}"
        )
    Console().print(table)


def _show_qualities(result: dict) -> None:
    table = Table(title=f"bench {result['bench']}, {result['threads']} threads, {result['machine']}")
    table.add_column("")
    columns = list(next(iter(result["rows"].values())))
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in result["rows"].items():
        table.add_row(name, *(_cell(row[column]) for column in columns))
    Console().print(table)


def _cell(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "" if math.isnan(value) else f"{value:.2f}"


def _without_nan(value: object) -> object:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
