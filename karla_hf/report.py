"""How results are shown: tables on the terminal, the same numbers as JSON in a file."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table


PIPE_WIDTH = 120  # where standard output is no terminal
TEXT_WIDTH = 11  # least width of a column of text


def new_console(*, stderr: bool = False) -> Console:
    """A console on standard output or standard error as they are now."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH)


def new_table(
    columns: Sequence[str], *, text_columns: int = 1, title: str | None = None, caption: str | None = None
) -> Table:
    """An empty table.

    Args:
        columns: headings.
        text_columns: how many columns at the left hold text, which may wrap; the others hold numbers, right-aligned.
        title: a line above the table.
        caption: a line below the table.

    Example:
        >>> new_table(["fact", "exact"]).columns[1].justify
        'right'
    """
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption, pad_edge=False, collapse_padding=True)
    table.title_justify = table.caption_justify = "left"
    for number, column in enumerate(columns):
        is_text = number < text_columns
        side: JustifyMethod = "left" if is_text else "right"
        table.add_column(column, justify=side, no_wrap=not is_text, min_width=TEXT_WIDTH if is_text else None)
    return table


def format_count(number: int) -> str:
    """A large number in four digits.

    Example:
        >>> format_count(0), format_count(3_273_472), format_count(1_543_714_304)
        ('0', '3.273 M', '1.544 B')
    """
    for factor, unit in ((10**9, "B"), (10**6, "M")):
        if number >= factor:
            return f"{number / factor:.4g} {unit}"
    return f"{number:,}"


def format_bytes(size: int | None) -> str:
    """A size in decimal units, as budgets are given; "unknown" for None.

    Example:
        >>> format_bytes(999), format_bytes(11_940_000), format_bytes(2_000_000_000), format_bytes(None)
        ('999 B', '11.94 MB', '2 GB', 'unknown')
    """
    if size is None:
        return "unknown"
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} B"


def write_json(path: str | Path | None, data: Any) -> None:
    """Write data as JSON, whole or not at all; None writes nothing.

    Args:
        path: the file; an existing one is replaced.
        data: what `json.dumps` takes.

    Raises:
        OSError: if the file cannot be written; what was there before is whole.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "result.json"), {"exact": 40})
        ...     Path(folder, "result.json").read_text()
        '{\\n "exact": 40\\n}\\n'
    """
    if path is None:
        return
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as staging:
        fresh = Path(staging) / path.name
        fresh.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(fresh, path)
