"""Distil a teacher into a student on rows of text.

What to do comes from options, or from a recipe: a YAML file whose keys are the options, with underscores.
Command-line options override the recipe. --resume continues an interrupted run from the checkpoints in its output
folder.

The output folder gets the student, its model card, the numbers in it (metrics.json), the complete recipe, and
provenance.json: seeds, versions, commit, fingerprints of the data and the models, and the final numbers.
--reproduce FOLDER repeats the run in FOLDER and compares the numbers. It never pushes or reports anything, whatever
the recipe says.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._checkpoints import PROVENANCE, RECIPE, checkpoint_in, holds_only_a_start, last_whole_checkpoint
from ._display import say_result
from ._inputs import (
    BUILT_IN,
    DATA,
    SCHEDULE,
    add_data_arguments,
    add_training_arguments,
    check_trained,
    dataset_name,
    distillation_fields,
    load_splits,
    prompt_template,
    said_training_arguments,
    teacher_path,
)
from .init import Shape, add_shape_arguments, make_student


if TYPE_CHECKING:
    from datasets import DatasetDict

    from ..distillation import DistillationTrainer, DistillationTrainingArguments

SUMMARY = "distil a teacher into a student"
EXAMPLE = (
    "hf-encdec-distill distill student --teacher HuggingFaceTB/SmolLM2-135M-Instruct --dataset pairs.csv "
    "--output distilled --max-steps 500 --learning-rate 1e-3"
)
PASSES_ARGUMENTS_ON = True
_PATHS = {"student", "teacher", "teacher_tokenizer", "dataset", "output"}

# The training arguments that --help lists; the others are passed on as they come.
TRAINING = {
    **SCHEDULE,
    **{
        name: text if default is None else f"{text} (default: {default})"
        for name, (default, text) in distillation_fields().items()
        if name not in DATA
    },
    "divergence": "forward_kl (the default), reverse_kl, generalized_jsd, skew_kl, skew_reverse_kl or total_variation",
    "save_steps": "steps between checkpoints",
    "seed": "seed of the data order",
}


class _InPlaceOfAStudent(argparse.Action):
    """An option after which the positional argument may be left out."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "begin":
                action.required = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = """%(prog)s STUDENT --teacher TEACHER --output FOLDER ...
       %(prog)s RECIPE ...
       %(prog)s --reproduce FOLDER --output FOLDER"""
    parser.add_argument(
        "begin",
        metavar="STUDENT|RECIPE",
        help="folder or Hub id of an encoder-decoder or decoder-only model, for instance from `init`; or a .yaml file",
    )
    parser.add_argument(
        "--teacher",
        default=argparse.SUPPRESS,
        help=f"causal language model: folder, Hub id, or {BUILT_IN!r}; a folder from `cache`; or the URL of a server",
    )
    parser.add_argument(
        "--teacher-tokenizer",
        default=argparse.SUPPRESS,
        metavar="TOKENIZER",
        help="folder or Hub id (default: the one beside the teacher; of a server that of its model's name)",
    )
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="FOLDER", help="folder for the checkpoints and the student"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    parser.add_argument(
        "--reproduce",
        action=_InPlaceOfAStudent,
        metavar="FOLDER",
        help="repeat the run that made the student in FOLDER; fail if its numbers differ",
    )
    parser.add_argument("--student", default=argparse.SUPPRESS, help="overrides the student of the recipe")
    add_data_arguments(parser, only_said=True)
    add_training_arguments(parser, TRAINING, "transformers' Seq2SeqTrainingArguments")
    section = parser.add_argument_group("init, to make the student from the teacher first")
    section.add_argument(
        "--init.teacher",
        default=argparse.SUPPRESS,
        metavar="TEACHER",
        help="needed if --teacher is a cache or a server",
    )
    add_shape_arguments(section, "init.")


def run(args: argparse.Namespace) -> None:
    from transformers import set_seed

    from ..cards import ModelCardCallback
    from ..distillation import DistillationTrainer, DistillationTrainingArguments
    from ..distillation.teachers.recorded import is_cache
    from ..files import alone_in, write_json
    from ..models.loading import find
    from ._provenance import check_inputs, compare_results, describe, describe_result, read_provenance, warn_of_changes
    from ._recipe import read_recipe, training_part, write_recipe

    recipe = _recipe(args)
    recorded = None if args.reproduce is None else read_provenance(Path(args.reproduce))
    output = Path(recipe["output"])
    checkpoint, is_new = checkpoint_in(output, args.resume), not output.exists()
    if recorded is not None:
        _take_threads(recorded["machine"])

    training = DistillationTrainingArguments(output_dir=str(output), **copy.deepcopy(training_part(recipe)))
    if training.resume_from_checkpoint is not None:  # which `Trainer` leaves to the script, as scripts have it
        raise ValueError(
            f"resume_from_checkpoint={training.resume_from_checkpoint!r}: leave it out; --resume goes on from the "
            "last checkpoint in --output"
        )
    training.prompt_template = prompt_template(training.prompt_template, recipe["dataset"])
    for option in ("teacher_dtype", "teacher_quantization"):
        if getattr(training, option) is not None and is_cache(recipe["teacher"]):
            raise ValueError(f"{option} with the cache {recipe['teacher']}, which has no model to load: leave it out")
    if "student" in recipe:
        find(recipe["student"])  # a name that is none is told before the data are read, which may take minutes
    set_seed(training.seed)  # weights that a student lacks are drawn
    splits = load_splits(recipe["dataset"], recipe["source_column"], recipe["target_column"])
    if checkpoint is not None and training.prompt_date is None and (output / RECIPE).is_file():
        # That of the run, not of today, if the student is made again.
        training.prompt_date = read_recipe(output / RECIPE).get("prompt_date")
    student, tokenizer = _student(recipe, splits, training)
    trainer = DistillationTrainer(
        model=student,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        teacher=teacher_path(recipe["teacher"]),
        teacher_processing_class=_teacher_tokenizer(recipe),
    )
    _check_lengths(trainer, splits)
    card = ModelCardCallback(trainer, **_known(recipe, student))
    trainer.add_callback(card)
    provenance = describe(trainer)
    if recorded is not None:
        check_inputs(recorded, provenance, Path(args.reproduce))
    if checkpoint is not None:
        warn_of_changes(output, provenance)
    if trainer.is_world_process_zero():
        decided = {
            "prompt_template": training.prompt_template,
            "prompt_date": trainer.prompt_date,
            "seed": training.seed,
        }
        args.until_end.enter_context(alone_in(output))
        write_recipe(output / RECIPE, {**recipe, **decided})
        write_json(output / PROVENANCE, {**provenance, "result": None})
    try:
        train_and_save(trainer, checkpoint)
    except ValueError:  # a mistake that the first step finds, in a rate or a limit
        if is_new and trainer.is_world_process_zero() and not trainer.state.global_step and holds_only_a_start(output):
            shutil.rmtree(output)
        raise
    metrics = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    result = describe_result(trainer, metrics, output)
    write_json(output / PROVENANCE, {**provenance, "result": result})
    write_json(output / "metrics.json", card.metrics())
    lines = [f"{name}: {value}" for name, value in metrics.items()]
    if recorded is not None:
        lines.append(compare_results(recorded["result"], result, Path(args.reproduce)))
    say_result(args, {"output": str(output), "metrics": metrics}, "\n".join(lines))


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    """What is to be done, from a file (if one was named) and the options, which count for more."""
    from ..distillation import DistillationTrainingArguments
    from ._recipe import SUFFIXES, kept_to_itself, read_recipe

    said = said_training_arguments(DistillationTrainingArguments, args, TRAINING)
    if "output_dir" in said:
        args.parser.error(f"--output_dir {said['output_dir']}: give that folder with --output")
    own = ("student", "teacher", "teacher_tokenizer", "output", *DATA)
    said |= {name: getattr(args, name) for name in own if hasattr(args, name)}
    init = {name.removeprefix("init."): value for name, value in vars(args).items() if name.startswith("init.")}
    if args.reproduce is not None:
        surplus = {args.begin, *said, *(f"init.{name}" for name in init)}
        moved = {"student", "teacher", "teacher_tokenizer", "init.teacher", "dataset", "output"}
        surplus -= {None, *moved}  # those may be somewhere else now
        if surplus:
            args.parser.error(f"--reproduce does what was recorded: leave {min(surplus)} out")
        file = Path(args.reproduce) / RECIPE
        # Without an output, which is asked for below, nothing is written.
        recipe = kept_to_itself(read_recipe(file), str(file), said.get("output", ""))
        recipe.pop("output", None)
    elif args.begin.endswith(SUFFIXES):
        recipe = read_recipe(Path(args.begin))
    else:
        recipe = {"student": args.begin}
    if "student" in said:
        recipe.pop("init", None)
    recipe = {**DATA, **recipe, **said}
    if init:
        recipe["init"] = {**recipe.get("init", {}), **init}
    for part in (recipe, recipe.get("init", {})):
        part |= {name: os.path.expanduser(part[name]) for name in _PATHS & part.keys()}
    if recipe.get("init", {}).get("vocabulary"):
        recipe.setdefault("vocab_policy", "id_map")  # the one for a part of the teacher's tokens
    if "student" in recipe and "init" in recipe:
        args.parser.error(f"both a student, {recipe['student']!r}, and --init options that would make one")
    missing = [f"--{name}" for name in ("teacher", "output") if name not in recipe]
    if not {"student", "init"} & recipe.keys():
        missing.append("--student, or an init section")
    if missing:
        args.parser.error(f"the following arguments are required: {', '.join(missing)}")
    return recipe


def _student(
    recipe: Mapping[str, Any], splits: DatasetDict, training: DistillationTrainingArguments
) -> tuple[Any, Any]:
    """The model that training starts from, and its tokenizer."""
    from ..distillation.teachers.recorded import is_cache, recorded_prompt_date
    from ..distillation.teachers.served import is_served

    if "student" in recipe:
        return student_and_tokenizer(recipe["student"])
    shape = dict(recipe["init"])
    teacher = shape.pop("teacher", recipe["teacher"])
    if is_cache(teacher):
        raise ValueError(f"cannot build a student from a cache, {teacher}: name its teacher as init.teacher")
    if is_served(teacher):
        raise ValueError(
            f"cannot build a student from a served model, {teacher}: name a folder or Hub id as init.teacher"
        )
    day = training.prompt_date
    if day is None and is_cache(recipe["teacher"]):
        day = recorded_prompt_date(recipe["teacher"])
    path = teacher_path(teacher)
    student = make_student(path, Shape(**shape), splits["train"], training.prompt_template, day)
    return student, student.tokenizer


def _teacher_tokenizer(recipe: Mapping[str, Any]) -> Any:
    """None leaves it to the trainer."""
    from ..distillation.teachers.served import is_served
    from ..models.loading import load_tokenizer

    name = recipe.get("teacher_tokenizer")
    if name is None and is_served(recipe["teacher"]):
        name = recipe.get("init", {}).get("teacher")
    return None if name is None else load_tokenizer(teacher_path(name))


def _known(recipe: Mapping[str, Any], student: Any) -> dict[str, Any]:
    """What the card takes from the recipe: names, where trainer and data set have paths; and how the student began."""
    from ..data.builtin_teacher import FACTS
    from ..data.python_docstrings import ROWS_LICENSE

    name = dataset_name(recipe["dataset"])
    teacher = {"teacher": FACTS} if recipe["teacher"] == BUILT_IN else {}
    license = {"license": ROWS_LICENSE} if recipe["dataset"] == BUILT_IN else {}
    healing = getattr(student, "healing", None)
    start = {}
    if healing is not None and healing.taken:
        start["recipe"] = {"start": f"layers fitted on {healing.rows} rows. {healing}"}
    return {"data": {"name": name, **license}, "task": {"name": name}, **teacher, **start}


def student_and_tokenizer(path: str) -> tuple[Any, Any]:
    """From a folder or the Hub; of a student that reads images, its processor."""
    from ..models.loading import load_processor, load_student_of_any_kind, load_tokenizer, reads_images
    from ..models.prompts import PreTrainedTokenizerFast

    student = load_student_of_any_kind(path)
    if not student.config.is_encoder_decoder:
        return student, load_tokenizer(path)
    if reads_images(student.config):
        return student, load_processor(path)
    return student, load_tokenizer(path, PreTrainedTokenizerFast)


def _check_lengths(trainer: DistillationTrainer, splits: DatasetDict) -> None:
    """Raises ValueError for a row that is too long for the student, which a step might meet after hours."""
    from ..distillation.checks.limits import check_rows, max_positions
    from ..models.loading import reads_images

    args, config, encode = trainer.args, trainer.model.config, trainer.data_collator.encode
    limit = max_positions(config)
    if limit is None or reads_images(config):
        return
    if args.max_source_length and args.max_target_length and args.max_source_length + args.max_target_length <= limit:
        return
    for split in ("train", "validation"):
        lengths = []
        for row in splits[split]:
            # A token has at least a byte, and what a template adds is short.
            short = 2 * len(f"{row['source']}{row['target']}".encode()) < limit
            ready = None if short else encode(row)
            lengths.append((len(ready["input_ids"]), len(ready["labels"])) if ready else (0, 0))
        sources, targets = zip(*lengths)
        try:
            check_rows("the student", config, sources, targets)
        except ValueError as error:
            raise ValueError(f"{split}: {error}") from None


def train_and_save(trainer: DistillationTrainer, checkpoint: str | None) -> None:
    """Train to the end; the student is saved in the folder of the checkpoints.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the message says how to go on.
        ValueError: `metric_for_best_model` is not measured, or no step was made.
    """
    output = Path(str(trainer.args.output_dir))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if last_whole_checkpoint(output) is None:
            raise KeyboardInterrupt("stopped before its first checkpoint: begin with the same command again") from None
        raise KeyboardInterrupt(f"stopped; checkpoints in {output} go on with the same command and --resume") from None
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0]) from error  # `Trainer` finds out after an evaluation
    check_trained(trainer)
    if trainer.is_fsdp_enabled:  # shards of a checkpoint may stay shards, but `from_pretrained` wants the student
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(output)


def _take_threads(machine: Mapping[str, Any]) -> None:
    """On a CPU, sums are cut up by the number of threads, and their last bits depend on it."""
    import torch

    if machine["device"] == "cpu":
        torch.set_num_threads(machine["threads"])
