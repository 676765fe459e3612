"""What several commands are given: a teacher and rows of text. `built-in` names the demonstration's own."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import DatasetDict

BUILT_IN = "built-in"


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """`--dataset`, `--source-column` and `--target-column`."""
    parser.add_argument(
        "--dataset",
        default=BUILT_IN,
        metavar="DATA",
        help="a CSV, JSON or Parquet file or a datasets name; default: Python functions and their docstrings",
    )
    parser.add_argument("--source-column", default="source", metavar="NAME", help="column that the student reads")
    parser.add_argument("--target-column", default="target", metavar="NAME", help="column that it shall write")


def teacher_path(teacher: str) -> str:
    """A folder or Hub id for `from_pretrained`; the built-in teacher is fetched if it is not there yet.

    Raises:
        OSError: the built-in teacher could not be had; the message names the alternative.
    """
    if teacher != BUILT_IN:
        return teacher
    from ..data import fetch_builtin_teacher

    try:
        return str(fetch_builtin_teacher())
    except RuntimeError as error:
        raise OSError(str(error)) from error


def load_splits(dataset: str, source_column: str, target_column: str, packages: str = "all") -> DatasetDict:
    """Train, validation and test with the columns `source` and `target`; `packages` is for the built-in task."""
    from ..data import load_pairs, load_python_docstrings

    if dataset == BUILT_IN:
        return load_python_docstrings(packages)
    return load_pairs(dataset, source_column, target_column)


def prompt_template(given: str | None, dataset: str) -> str | None:
    """The template that was asked for, else the one of the built-in task; `None` leaves it to the chat template."""
    from ..data import PROMPT_TEMPLATE

    return PROMPT_TEMPLATE if given is None and dataset == BUILT_IN else given
