"""What several commands are given: a teacher and rows of text. `built-in` names the demonstration's own."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import Trainer, TrainingArguments

BUILT_IN = "built-in"
DATASETS = (
    "a CSV, TSV, JSON, JSON Lines or Parquet file, a folder with one file per split, or the name of a dataset on "
    "the Hub"
)
DATA = {"dataset": BUILT_IN, "source_column": "source", "target_column": "target"}
T = TypeVar("T", bound="TrainingArguments")
_DOCUMENTED = "https://huggingface.co/docs/transformers/main_classes/trainer"
# Training arguments that any run may want to set, with their help.
SCHEDULE = {
    "max_steps": "optimizer steps",
    "num_train_epochs": "passes over the data, if --max-steps is not given",
    "learning_rate": "peak learning rate",
    "per_device_train_batch_size": "rows per device and batch",
    "gradient_accumulation_steps": "batches per optimizer step",
}


def add_data_arguments(parser: argparse.ArgumentParser, only_said: bool = False) -> None:
    """`--dataset`, `--source-column` and `--target-column`, as in `DATA` or, if `only_said`, not in the namespace."""
    texts = {
        "dataset": f"{DATASETS} (default: Python functions and their docstrings)",
        "source_column": "column that the student reads (default: source)",
        "target_column": "column that it learns to write (default: target)",
    }
    for name, text in texts.items():
        # With underscores too: those would otherwise be taken for the training argument of the same name.
        options = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        default = argparse.SUPPRESS if only_said else DATA[name]
        parser.add_argument(*options, default=default, metavar="DATA" if name == "dataset" else "NAME", help=text)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """`--prompt-template`, `--max-source-length` and `--max-target-length`."""
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="the teacher's prompt, with {source} in it (default: its chat template)",
    )
    parser.add_argument("--max-source-length", type=int, metavar="TOKENS", help="truncate prompts to this many tokens")
    parser.add_argument("--max-target-length", type=int, metavar="TOKENS", help="truncate targets to this many tokens")


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError, in the words of the command line, where one of these options is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")


def refuse(args: argparse.Namespace, *names: str, reason: str) -> None:
    """Raises ValueError where one of these options was given, which would have no effect."""
    for name in names:
        if getattr(args, name) != args.parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


def refuse_of_other_kinds(args: argparse.Namespace) -> None:
    """Raises ValueError where an option is for records of another `--kind`."""
    for kind, names in {"top_k": ("k",), "sampled": ("rounds", "proposal_power")}.items():
        if kind != args.kind:
            given = [name for name in names if hasattr(args, name)]
            refuse(args, *given, reason=f"is for --kind {kind}, and the kind is {args.kind}: leave one out")


def check_is_there(file: str | Path, what: str) -> None:
    """Raises ValueError where there is nothing; `what` says for what to look."""
    if not Path(file).exists():
        raise ValueError(f"{file} is not there: give {what}")


def check_free(host: str, port: int) -> None:
    """Raises ValueError, before anything is loaded, if nobody can listen there."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on --host {host} --port {port} ({reason}): give others") from error


def check_texts(texts: Sequence[str]) -> None:
    """Raises ValueError for a text that no tokenizer takes: bytes that are no UTF-8, half of a character."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} is not valid Unicode text ({error.reason}): give it in UTF-8") from error


@functools.cache
def distillation_fields() -> dict[str, tuple[Any, str]]:
    """Name -> (default, help) of the fields that `DistillationTrainingArguments` adds to those of transformers.

    Read from the source of the class: importing it takes seconds, which `--help` and completion should not.
    """
    source = Path(__file__).parents[1] / "distillation" / "arguments.py"
    fields = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            said = {keyword.arg: keyword.value for keyword in node.value.keywords}
            written = said["metadata"]
            assert isinstance(written, ast.Dict)  # we wrote it
            metadata = {ast.literal_eval(key): value for key, value in zip(written.keys, written.values) if key}
            fields[node.target.id] = ast.literal_eval(said["default"]), ast.literal_eval(metadata["help"])
    return fields


def add_training_arguments(parser: argparse.ArgumentParser, fields: Mapping[str, str], others: str) -> None:
    """Options for training arguments; `training_arguments` takes all others too.

    Args:
        fields: name -> help.
        others: where the other fields are from.
    """
    description = f"Every other field of {others} is an option, too:\n{_DOCUMENTED}"
    group = parser.add_argument_group("training arguments", description)
    flags = {name for name, (default, _) in distillation_fields().items() if default is False}
    for name, text in fields.items():
        value: dict[str, Any] = {"metavar": name.split("_")[-1].upper()}
        if name in flags:  # as HfArgumentParser takes one
            value = {"metavar": "BOOL", "nargs": "?", "const": "true"}
        text = text.replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **value)


def said_training_arguments(
    cls: type[TrainingArguments], args: argparse.Namespace, fields: Mapping[str, str]
) -> dict[str, Any]:
    """Fields of `cls`, a class of training arguments, from the options in `fields` and what was left over; only those
    that were said."""
    from transformers import HfArgumentParser

    words = list(args.extra)
    for name in fields:
        if hasattr(args, name):
            words += [f"--{name}", getattr(args, name)]

    class Parser(HfArgumentParser):
        error = args.parser.error  # one line, without the usage of some two hundred options

    parser = Parser(cls, prog=args.parser.prog)  # type: ignore[arg-type]  # DataClassType is opaque
    unsaid = argparse.Namespace(**{field.name: None for field in dataclasses.fields(cls)})  # in place of defaults
    parsed, unknown = parser.parse_known_args(words, unsaid)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    said = {name: value for name, value in vars(parsed).items() if value is not None}
    if "resume_from_checkpoint" in said:  # of which only example scripts of transformers know
        instead = (
            "go on with --resume"
            if hasattr(args, "resume")
            else "leave it out, this command starts from the beginning"
        )
        args.parser.error(f"--resume_from_checkpoint {said['resume_from_checkpoint']}: {instead}")
    return said


def training_arguments(cls: type[T], args: argparse.Namespace, fields: Mapping[str, str], output: Path) -> T:
    """An instance of `cls`, a class of training arguments, from what `said_training_arguments` finds."""
    from ..distillation.arguments import check_training_arguments, keep_tokens_out_of_pickles

    keep_tokens_out_of_pickles(cls)
    training = cls(**{"output_dir": str(output), **said_training_arguments(cls, args, fields)})
    check_training_arguments(training)
    return training


def check_trained(trainer: Trainer) -> None:
    """Raises ValueError, before anything is saved, if a training came to its end without a step."""
    if not trainer.state.global_step:
        args = trainer.args
        assert args.output_dir is not None  # its constructor sees to it
        if trainer.is_world_process_zero():  # `Trainer` saves at the end of an epoch, also of one without a step
            shutil.rmtree(Path(args.output_dir) / "checkpoint-0", ignore_errors=True)
        raise ValueError(
            f"no step was made, with num_train_epochs={args.num_train_epochs:g}, max_steps={args.max_steps}, "
            f"{args.train_batch_size} rows in a batch and dataloader_drop_last={args.dataloader_drop_last}: give more "
            "steps, epochs or rows, or smaller batches"
        )


def teacher_path(teacher: str) -> str:
    """A folder or Hub id for `from_pretrained`, with the home folder for `~`; the built-in teacher is fetched if it is
    not there yet.

    Raises:
        OSError: the built-in teacher could not be had; the message names the alternative.
    """
    if teacher != BUILT_IN:
        return os.path.expanduser(teacher)
    from ..data import fetch_builtin_teacher

    try:
        return str(fetch_builtin_teacher())
    except RuntimeError as error:
        raise OSError(str(error)) from error


def check_columns(dataset: str, source_column: str, target_column: str) -> None:
    """Raises ValueError for columns that are named where nobody reads them, of the built-in data."""
    for name, column in (("source_column", source_column), ("target_column", target_column)):
        if dataset == BUILT_IN and column != DATA[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} {column!r} names a column of your data, and --dataset is {BUILT_IN}: give --dataset too, "
                f"or leave {option} out"
            )


def load_splits(
    dataset: str,
    source_column: str,
    target_column: str,
    packages: Literal["stdlib", "all"] = "all",
    train: bool = True,
) -> DatasetDict:
    """Train, validation and test with the columns `source` and `target`; `packages` is for the built-in task.

    Args:
        train: whether there have to be rows to train on; without those, only what is there is returned.

    Raises:
        ValueError: as `check_columns`, or the data have no such columns or no training rows.
    """
    from ..data import load_pairs, load_python_docstrings

    check_columns(dataset, source_column, target_column)
    if dataset == BUILT_IN:
        return load_python_docstrings(packages)
    splits = load_pairs(dataset, source_column, target_column)
    if train and "train" not in splits:
        raise ValueError(
            f"{dataset} has no training rows, only the split {' and '.join(splits)}: give a folder with a file for "
            "train too, or the file by itself, which is then divided"
        )
    return splits


def load_test_rows(args: argparse.Namespace) -> Dataset:
    """The rows that models are measured on: the test split, or the validation split of data that have no other."""
    splits = load_splits(args.dataset, args.source_column, args.target_column, packages="stdlib", train=False)
    return splits["test" if "test" in splits else "validation"]


def dataset_name(dataset: str) -> str:
    """What a report calls the data that `load_splits` is given."""
    return "python-docstrings" if dataset == BUILT_IN else public_name(dataset)


def public_name(path: str) -> str:
    """A Hub id as it is, a file or folder by its own name, wherever it lies."""
    return Path(path).resolve().name if Path(path).exists() else path


def prompt_template(given: str | None, dataset: str) -> str | None:
    """The template that was asked for, else the one of the built-in task; `None` leaves it to the chat template."""
    from ..data import PROMPT_TEMPLATE

    return PROMPT_TEMPLATE if given is None and dataset == BUILT_IN else given
