"""What a person sees while a stage works. All of it goes to standard error: standard output is for results."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

WIDTH_OF_A_FILE = 120
"""Columns where standard error is not a terminal."""


def block(facts: Mapping[str, Any], indent: str = "  ") -> str:
    """Names and values in two aligned columns, one fact a line."""
    width = max(map(len, facts), default=0)
    return "\n".join(f"{indent}{name:<{width}}  {value}" for name, value in facts.items())


def say(text: str) -> None:
    """Says one thing in passing."""
    _console().print(Text(text), soft_wrap=True)


def banner(title: str, facts: Mapping[str, Any]) -> None:
    """Says what a stage is about to do: its name, and under it the facts."""
    console = _console()
    console.print(Text(title, style="bold"))
    console.print(Text(block(facts)), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Shows a table whose first column holds names and whose others hold numbers, floats to three decimals."""
    shown = Table(title=Text(title), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(Text(column), justify="right" if index else "left")
    for row in rows:
        shown.add_row(*(Text(f"{cell:.3f}" if isinstance(cell, float) else str(cell)) for cell in row))
    _console().print(shown)


class Progress:
    """How far a loop has come: a bar on a terminal, elsewhere a plain line now and then.

    with Progress("pretrain", total=500) as progress:
        progress.update(10, loss=5.1, tokens_per_second=12_000)
    """

    def __init__(self, title: str, total: int, *, first: int = 0, seconds_between_lines: float = 10.0):
        """Prepares to show `total` steps of which `first` were done earlier."""
        self._title = title
        self._total = total
        self._first = first
        self._seconds_between_lines = seconds_between_lines
        self._began = time.monotonic()
        self._last_line = -float("inf")
        self._last_step: int | None = None
        console = _console()
        self._bar = _bar(console) if console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=first, metrics="")

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, **metrics: float) -> None:
        """Shows that `step` steps are done, with `loss` and `tokens_per_second` where they are among the metrics."""
        shown = []
        if "loss" in metrics:
            shown.append(f"loss {metrics['loss']:.4f}")
        if "tokens_per_second" in metrics:
            shown.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics="  ".join(shown))
            return
        now = time.monotonic()
        too_soon = step < self._total and now - self._last_line < self._seconds_between_lines
        if too_soon or step == self._last_step:
            return
        self._last_line, self._last_step = now, step
        if step < self._total:
            shown.append(f"{_clock(self._seconds_left(step, now))} left")
        print("  ".join([f"{self._title}  {step:,}/{self._total:,}", *shown]), file=sys.stderr, flush=True)

    def _seconds_left(self, step: int, now: float) -> float:
        return (now - self._began) / max(step - self._first, 1) * (self._total - step)


def _console() -> Console:
    """Made anew each time, because tests and notebooks exchange `sys.stderr`."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=WIDTH_OF_A_FILE)


def _bar(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, for example `0:01:30`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
