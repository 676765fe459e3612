"""What a command shows on its way: its stages, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


_SECONDS_BETWEEN_LINES = 15.0


_SECONDS_LATE = 30.0  # of which a run speaks


_SECONDS_UNSEEN = 5.0  # what is done by then shows no bar


def clock(seconds: float) -> str:
    """`75.2` -> `"1:15"`; hours appear when there are any."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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
    """Progress of a run that will end in `seconds_left()`, drawn by rich on a terminal and as plain lines elsewhere.

    Args:
        seconds_left: asked whenever something is drawn.
        stages: how many there will be.
        stream: where to draw; rich is used if it is installed and this is a terminal.
        seconds_late: by how much the run will end later than it was asked to; it says so from half a minute on.
    """

    def __init__(
        self,
        seconds_left: Callable[[], float],
        stages: int,
        stream: TextIO | None = None,
        seconds_late: Callable[[], float] = lambda: 0.0,
    ):
        self.seconds_left, self.seconds_late = seconds_left, seconds_late
        self.stages = stages
        self.stream = sys.stderr if stream is None else stream
        self.begun = 0
        self._console = _rich_console(self.stream)

    def say(self, text: str) -> None:
        """One line of its own."""
        print(text, file=self.stream, flush=True)

    def _left(self) -> str:
        left, late = f"{clock(self.seconds_left())} left", self.seconds_late()
        return left if late < _SECONDS_LATE else f"{left}, {max(round(late / 60), 1)} min later than asked for"

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """Show a stage while the block runs; yields `update(fraction done in 0..1, detail)`."""
        self.begun += 1
        heading = f"[{self.begun}/{self.stages}] {title}"
        draw = self._bar if self._console else self._lines
        start = time.monotonic()
        with draw(heading) as update:
            yield update
        self.say(f"{heading}: {clock(time.monotonic() - start)}, {self._left()}")

    @contextmanager
    def _bar(self, heading: str) -> Iterator[Callable[[float, str], None]]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
        # Nothing here reads markup out of data: descriptions and details are ours.
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(heading, total=1.0, detail=self._left())

            def update(fraction: float, detail: str = "") -> None:
                left = self._left()
                progress.update(task, completed=min(fraction, 1.0), detail=f"{detail}, {left}" if detail else left)

            yield update

    @contextmanager
    def _lines(self, heading: str) -> Iterator[Callable[[float, str], None]]:
        self.say(f"{heading} ... {self._left()}")
        spoken = time.monotonic()

        def update(fraction: float, detail: str = "") -> None:
            nonlocal spoken
            if time.monotonic() - spoken >= _SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                self.say(f"    {min(fraction, 1.0):4.0%} {detail}, {self._left()}")

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
