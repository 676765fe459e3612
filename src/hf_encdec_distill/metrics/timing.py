"""When the tokens of an answer are there: what the times in reports are made from."""

import time
from collections.abc import Iterator


def timed(steps: Iterator[list[int]]) -> tuple[list[list[int]], list[float]]:
    """Go through the steps of an answer, from the first of their work on.

    Args:
        steps: the token ids of all rows, once a step; a generator, which has done nothing yet.

    Returns:
        The token ids of each row, and for each step the seconds from the call until its ids were there.
    """
    start, tokens, times = time.perf_counter(), [], []
    for step in steps:
        tokens.append(step)
        times.append(time.perf_counter() - start)
    return [list(row) for row in zip(*tokens, strict=True)], times
