"""What a command shows at its end: tables, wrapped text, or JSON."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


WIDTH = 80  # of a terminal that nobody has made wider
_NAME, _FIRST = 14, 30  # what the name of a column, and the first column, may take where space is short


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
    """What came of a command, on stdout: `text`, or with `--json` `content` as one JSON object.

    A letter that stdout has no bytes for is escaped, as it is on stderr.
    """
    encoding = getattr(args.stdout, "encoding", None) or "utf-8"
    said = json.dumps(content, indent=1) if args.json else text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(said, file=args.stdout, flush=True)
    except BrokenPipeError:  # `head` has seen enough, and at exit there is nowhere to put the rest either
        os.dup2(os.open(os.devnull, os.O_WRONLY), args.stdout.fileno())
