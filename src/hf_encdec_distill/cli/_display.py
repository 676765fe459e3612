"""What a command shows: its result, and on the way there its stages with the time left."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names: the first to the left, the others to the right."""
    widths = [max(len(str(row[column])) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (str(cell) for cell in cells)
        return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def say_result(args: argparse.Namespace, content: Mapping[str, Any], text: str) -> None:
    """What came of a command, on stdout: `text`, or with `--json` `content` as one JSON object."""
    print(json.dumps(content, indent=1) if args.json else text, file=args.stdout, flush=True)
