"""What the commands print: tables and JSON on standard output, errors and progress on standard error."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kernelhub.errors import KernelHubError, KernelHubWarning, printable
from kernelhub.hub.progress import LOGGER, TerminalLine
from kernelhub.hub.sources.base import Progress

_FEW = 20  # rows that may take several lines each


def show_json(value: Any) -> None:
    """Print a value as JSON, sorted; what would steer a terminal, or has no UTF-8, as JSON escapes it."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    print("".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a title; cells are shown as they are, whatever markup they seem to have.

    Columns without a name have no head, and a table without rows is `nothing`. Where a terminal is so narrow that columns
    would cut words, and the rows are few, they are facts below each other.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        show_line(f"{title}: nothing")
        return
    table = Table(show_header=any(columns), show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in row))
    natural = Console(width=sys.maxsize).measure(table)
    # Away from a terminal there is no width to keep to, and a wrapped table is hard to search.
    console = Console() if sys.stdout is not None and sys.stdout.isatty() else Console(width=natural.maximum)
    if natural.minimum <= console.width:
        for made in table.columns:  # of the others none needs to cut a word
            made.no_wrap = all(" " not in str(text) for text in (made.header, *made.cells))
    elif len(rows) <= _FEW:
        _show_as_facts(title, columns, rows)
        return
    console.print(Text(printable(title), "table.title"), soft_wrap=True)
    console.print(table)


def _show_as_facts(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table's rows below each other, each under its first cell; of columns without names each row is a fact itself."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not any(columns):
        show_facts(title, [(name, value) for name, value, *_ in cells])
        return
    show_line(title)
    for first, *rest in cells:
        show_facts(first, [(name, value) for name, value in zip(columns[1:], rest, strict=True) if value])


def show_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print named facts under a title, wrapped at the terminal's width (100 columns where there is none), between words."""
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    names = [printable(name) for name, _ in facts]
    indent = max((len(name) for name in names if len(name) <= 24), default=0) + 4
    show_line(title)
    for name, (_, text) in zip(names, facts, strict=True):
        lines = [part for line in printable(text).splitlines() for part in _wrapped(line.strip(), width - indent)]
        if len(name) > 24:
            show_line(f"  {name}")
        else:
            lines[:1] = [f"  {name}".ljust(indent) + (lines or [""])[0]]
            show_line(lines.pop(0).rstrip())
        for line in lines:
            show_line(" " * indent + line)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns; what is one word, such as a path, stays one line."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def show_line(text: str = "") -> None:
    """Print a line."""
    print(printable(text))


def show_note(text: str) -> None:
    """Print a line beside the output, on standard error."""
    print(printable(text), file=sys.stderr)


def show_error(error: KernelHubError, *, as_json: bool = False) -> None:
    """Print an error, and where it was asked for the same as JSON on standard output."""
    if as_json:
        show_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
    print(f"error: {error}", file=sys.stderr)


def show_steps() -> None:
    """From now on the process prints what takes seconds, a line each, where standard error is no terminal too."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kernelhub: %(message)s"))
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def show_warnings() -> None:
    """From now on the process prints this package's warnings as a sentence: where in it they arose says nothing here."""
    shown = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, KernelHubWarning):
            show_note(f"warning: {message}")
        else:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def size(count: int) -> str:
    """Bytes as a reader wants them: `1536` -> "1.5 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A progress bar for a transfer, where standard error is a terminal; elsewhere lines of what is built."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield TerminalLine()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(bars, label)


@contextmanager
def step_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told how many of how many steps are done, where standard error is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _nothing(done: int, total: int) -> None:
    """Nobody looks."""


class _Bar:
    """Progress on one bar; it appears with the first bytes that are expected."""

    def __init__(self, bars: Any, label: str) -> None:
        self._bars, self._label = bars, label
        self._task: Any = None
        self._total = 0

    def expect(self, size: int) -> None:
        self._total += size
        if self._task is None:
            self._task = self._bars.add_task(self._label, total=self._total)
        else:
            self._bars.update(self._task, total=self._total)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def advance(self, size: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, size)
