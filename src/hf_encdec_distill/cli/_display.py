"""What a command shows: its result, and on the way there its stages with the time left."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


WIDTH = 80  # of a terminal that nobody has made wider
_NAME, _FIRST = 14, 30  # what the name of a column, and the first column, may take where space is short
_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_UNSEEN = 5.0  # what is done by then shows no bar


def clock(seconds: float) -> str:
    """`75.2` -> `"1:15"`; hours appear when there are any."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names: the first to the left, the others to the right.

    No line is longer than `WIDTH`: names are wrapped where needed, and columns that still do not fit go into another
    table below, under the same first column.
    """
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    narrow = _narrow(cells, widths)
    blocks: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        if len(blocks[-1]) > 1 and _length(narrow, [*blocks[-1], column]) > WIDTH:
            blocks.append([0])
        blocks[-1].append(column)
    return "\n\n".join(_block(cells, widths if _length(widths, block) <= WIDTH else narrow, block) for block in blocks)


def _narrow(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> list[int]:
    """No wider than the cells need once names are wrapped; the first column gets what the others leave of a line."""
    others = [
        max([min(max(map(len, name.split()), default=1), _NAME), *map(len, column)])
        for name, *column in zip(*(row[1:] for row in cells), strict=True)
    ]
    left = WIDTH - sum(width + 2 for width in others)
    return [min(widths[0], max(left, _FIRST)), *others]


def _length(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[column] for column in columns) + 2 * (len(columns) - 1)


def _block(cells: Sequence[Sequence[str]], widths: Sequence[int], columns: Sequence[int]) -> str:
    def lines(row: Sequence[str], is_header: bool = False) -> list[str]:
        wrapped = [
            textwrap.wrap(row[column], widths[column], subsequent_indent="" if column else "  ") for column in columns
        ]
        height = max(1, *map(len, wrapped))
        columns_of_lines = []
        for column, texts in zip(columns, wrapped, strict=True):
            empty = [""] * (height - len(texts))
            texts = [*empty, *texts] if is_header else [*texts, *empty]
            columns_of_lines.append([t.rjust(widths[column]) if column else t.ljust(widths[0]) for t in texts])
        return ["  ".join(line).rstrip() for line in zip(*columns_of_lines, strict=True)]

    rule = "  ".join("-" * widths[column] for column in columns)
    return "\n".join([*lines(cells[0], is_header=True), rule, *(line for row in cells[1:] for line in lines(row))])


def wrap(text: str, indent: int = 0) -> str:
    """A sentence, or a list of names, in lines that fit `WIDTH`; those after the first are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def say_result(args: argparse.Namespace, content: Mapping[str, Any], text: str) -> None:
    """What came of a command, on stdout: `text`, or with `--json` `content` as one JSON object."""
    print(json.dumps(content, indent=1) if args.json else text, file=args.stdout, flush=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar with the time left, on stderr, once the block has run for five seconds; yields `update(fraction done in
    0..1, detail)`."""
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}% {bar:20} {elapsed}<{remaining} {postfix}"
    with tqdm(total=1.0, desc=title, delay=_SECONDS_UNSEEN, leave=False, bar_format=form, file=sys.stderr) as bar:

        def update(fraction: float, detail: str = "") -> None:
            bar.set_postfix_str(detail, refresh=False)
            bar.update(fraction - bar.n)

        yield update


class Display:
    """Progress of a run that has `seconds_left()` until its budget is used, drawn by rich on a terminal and as plain
    lines elsewhere.

    Args:
        seconds_left: asked whenever something is drawn.
        stages: how many there will be.
        stream: where to draw; rich is used if it is installed and this is a terminal.
    """

    def __init__(self, seconds_left: Callable[[], float], stages: int, stream: TextIO | None = None):
        self.seconds_left = seconds_left
        self.stages = stages
        self.stream = sys.stderr if stream is None else stream
        self.begun = 0
        self._console = _rich_console(self.stream)

    def say(self, text: str) -> None:
        """One line of its own."""
        print(text, file=self.stream, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """Show a stage while the block runs; yields `update(fraction done in 0..1, detail)`."""
        self.begun += 1
        heading = f"[{self.begun}/{self.stages}] {title}"
        draw = self._bar if self._console else self._lines
        start = time.monotonic()
        with draw(heading) as update:
            yield update
        self.say(f"{heading}: {clock(time.monotonic() - start)}, {clock(self.seconds_left())} left")

    @contextmanager
    def _bar(self, heading: str) -> Iterator[Callable[[float, str], None]]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
        # Nothing here reads markup out of data: descriptions and details are ours.
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(heading, total=1.0, detail=f"{clock(self.seconds_left())} left")

            def update(fraction: float, detail: str = "") -> None:
                left = f"{clock(self.seconds_left())} left"
                progress.update(task, completed=min(fraction, 1.0), detail=f"{detail}, {left}" if detail else left)

            yield update

    @contextmanager
    def _lines(self, heading: str) -> Iterator[Callable[[float, str], None]]:
        self.say(f"{heading} ... {clock(self.seconds_left())} left")
        spoken = time.monotonic()

        def update(fraction: float, detail: str = "") -> None:
            nonlocal spoken
            if time.monotonic() - spoken >= _SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                self.say(f"    {min(fraction, 1.0):4.0%} {detail}, {clock(self.seconds_left())} left")

        yield update


def _rich_console(stream: TextIO):
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream)
    return None if console.is_dumb_terminal else console
